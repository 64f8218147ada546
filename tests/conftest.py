"""What tests of every backend share."""

import os
from importlib.util import find_spec

import pytest
import torch

# without a GPU, Triton's kernels run in its interpreter, guarded: set before any import of it
if find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    from .kernels.interpreter import install

    install()

import fastlora
from fastlora import backends, dispatch

from .csrc.emulated import load as load_emulated


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="compile the CUDA kernels for every architecture"
    )


@pytest.fixture(autouse=True, scope="session")
def no_tables_of_the_developer(tmp_path_factory):
    """What somebody's ``fastlora tune`` measured changes nothing in what the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder of tables, the user's, and none of the package's."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "SHIPPED", tmp_path / "shipped")
    dispatch.forget()
    yield tmp_path / "cache"
    dispatch.forget()


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The operators for CUDA tensors on the emulated device, built once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    return load_emulated(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@pytest.fixture(params=["reference", "native", "triton", "emulated"])
def backend_name(request, monkeypatch):
    """Each of the backends for CPU tensors, and the one that takes them for CUDA tensors."""
    if request.param == "emulated":
        module = request.getfixturevalue("emulated")
        monkeypatch.setitem(backends._BACKENDS, "emulated", module)
        monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "emulated"))
    if reason := backends.available("cpu")[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def backend(backend_name):
    """What leaves the choice of a backend open runs on each of these."""
    with fastlora.use_backend(backend_name):
        yield backend_name


@pytest.fixture
def path(request):
    """What leaves the choice of a backend open runs on the one given, or on the usual one."""
    name = getattr(request, "param", "auto")
    if name != "auto" and (reason := backends.available("cpu")[name]):
        pytest.skip(f"{name}: {reason}")
    with fastlora.use_backend(name):
        yield name
