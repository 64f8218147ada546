"""What tests of every backend share."""

import pytest

import fastlora
from fastlora import backends


@pytest.fixture(params=["reference", "native"])
def backend(request):
    """What leaves the choice of a backend open runs on each of those for CPU tensors."""
    if reason := backends.available()[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    with fastlora.use_backend(request.param):
        yield request.param
