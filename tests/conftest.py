"""What tests of every backend share."""

import pytest

import fastlora
from fastlora import backends


@pytest.fixture(params=["reference", "native"])
def backend_name(request):
    """Each of the backends for CPU tensors."""
    if reason := backends.available()[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def backend(backend_name):
    """What leaves the choice of a backend open runs on each of these."""
    with fastlora.use_backend(backend_name):
        yield backend_name
