"""What importing fastlora does (little), and who may import whom (only downward)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# from the bottom up: a part imports itself and what stands on the lines above it
ARROW = """
kernels
version environment
blocks
checks dropout dispatch
backends
autograd
functional
merge
layers
models
injection adapters
testing utils flops
fastlora
doctor tune
__main__
"""
TIER = {part: tier for tier, line in enumerate(ARROW.split("\n")) for part in line.split()}


def module_files():
    for path in sorted(ROOT.glob("fastlora/**/*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path
    for path in sorted(ROOT.glob("kernels/**/*.py")):
        yield ".".join(("fastlora", *path.relative_to(ROOT).with_suffix("").parts)), path


TREES = {name: ast.parse(path.read_text(), path.name) for name, path in module_files()}
MODULES = {name.removesuffix(".__init__") for name in TREES}


def imports(name, tree):
    """Names of all modules that ``tree``, module ``name``, imports at run time, lazily or not."""
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


def runtime_nodes(node):
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from runtime_nodes(child)


def part(module):
    """The part of the library that ``module`` belongs to; ``fastlora`` is the package itself."""
    names = module.removesuffix(".__init__").split(".")
    return names[1] if len(names) > 1 else names[0]


def of_fastlora(module):
    return module.partition(".")[0] == "fastlora"


def test_every_part_has_its_place():
    assert {part(name) for name in TREES} <= TIER.keys()


@pytest.mark.parametrize("name", TREES)
def test_dependencies_point_down(name):
    own = part(name)
    for module in filter(of_fastlora, imports(name, TREES[name])):
        used = part(module)
        if used == "_C":
            assert own in ("backends", "doctor"), f"{name} imports {module}"
        else:
            assert used == own or TIER[used] < TIER[own], f"{name} imports {module}"


@pytest.mark.parametrize("name", [name for name in TREES if part(name) == "kernels"])
def test_kernels_stand_alone(name):
    for module in imports(name, TREES[name]):
        first = module.partition(".")[0]
        ours = part(module) == "kernels" and of_fastlora(module)
        assert ours or first in {"torch", "triton"} | sys.stdlib_module_names, module


def test_the_environment_is_read_in_one_function():
    readers = set()
    for name, tree in TREES.items():
        inside = {
            id(node): function.name
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            named = getattr(node, "attr", None) or getattr(node, "id", None)
            if named in ("environ", "environb", "getenv"):
                readers.add(f"{name}:{inside.get(id(node), 'import time')}")
    assert len(readers) <= 1, readers
    assert not any(reader.endswith("import time") for reader in readers), readers


@pytest.mark.parametrize("name", TREES)
def test_no_pickle(name):
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {module.partition(".")[0] for module in imports(name, TREES[name])} & unsafe
    calls = {ast.unparse(node) for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
    assert "torch.load" not in calls


PROBE = """
import sys, torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton" or name == "fastlora._C":
            raise ImportError(f"{name} is blocked")

def touched(*args, **kwargs):
    raise AssertionError("importing fastlora asked for a GPU")

if sys.argv[1] == "blocked":
    sys.meta_path.insert(0, Blocked())
for query in ("is_available", "device_count", "current_device", "get_device_capability",
              "get_device_properties", "get_device_name", "init", "_lazy_init"):
    setattr(torch.cuda, query, touched)
before = set(sys.modules)
import fastlora, fastlora.kernels
assert not torch.cuda.is_initialized()
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


@pytest.mark.parametrize("mode", ["blocked", "free"])
def test_import_is_light(mode, tmp_path):
    """No triton, no extension, no GPU, nothing heavy: whether they are there or not."""
    command = [sys.executable, "-c", PROBE, mode]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    heavy = {"accelerate", "loralib", "matplotlib", "peft", "rich", "transformers", "triton"}
    assert not set(result.stdout.split()) & heavy
