"""What tests of every backend share."""

import os
import sys
from importlib.util import find_spec

import pytest
import torch

# without a GPU, Triton's kernels run in its interpreter, guarded: set before any import of it
if find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    from .kernels.interpreter import install

    install()

import fastlora
from fastlora import backends, dispatch, merge

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


@pytest.fixture(autouse=True)
def a_device_that_still_works(request):
    """After a kernel that broke it, no test of this process can pass: xdist starts another one."""
    yield
    if not request.node.get_closest_marker("gpu") or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{request.node.nodeid} broke the device: {error}"
        print(message, file=sys.stderr, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(message, returncode=1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder of tables, the user's, and none of the package's."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "SHIPPED", tmp_path / "shipped")
    dispatch.forget()
    yield tmp_path / "cache"
    dispatch.forget()


@pytest.fixture(scope="session")
def workers_folder(tmp_path_factory):
    """A temporary folder that is the same for all workers."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def emulated(workers_folder):
    """The operators for CUDA tensors on the emulated device, built once for all workers."""
    return load_emulated(workers_folder)


@pytest.fixture
def usable(request, monkeypatch):
    """Gives the name of a backend for CPU tensors back, or skips the test.

    "emulated" is the one that takes native's kernels for CUDA tensors.
    """

    def check(name):
        if name == "emulated":
            monkeypatch.setitem(backends._BACKENDS, name, request.getfixturevalue(name))
            monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, name))
            monkeypatch.setitem(merge._MODULES, name, torch.ops.fastlora_emulated)
        if name != "auto" and (reason := backends.available("cpu")[name]):
            pytest.skip(f"{name}: {reason}")
        return name

    return check


@pytest.fixture(params=["reference", "native", "triton", "emulated"])
def backend_name(request, usable):
    """Each of the backends for CPU tensors."""
    return usable(request.param)


@pytest.fixture
def backend(backend_name):
    """What leaves the choice of a backend open runs on each of these."""
    with fastlora.use_backend(backend_name):
        yield backend_name


@pytest.fixture
def path(request, usable):
    """What leaves the choice of a backend open runs on the one given, or on the usual one."""
    name = usable(getattr(request, "param", "auto"))
    with fastlora.use_backend(name):
        yield name
