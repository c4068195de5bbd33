"""Fixtures of the tests of quantization."""

import pytest

from shared.quantization import native
from shared.quantization.kernels import find_kernel
from tests.quantization.helpers import COMPILED


@pytest.fixture(params=[pytest.param("native", marks=COMPILED), "torch", "unpacked"])
def kernels(request) -> tuple[str, ...]:
    """Each way of computing, whatever is chosen on this machine."""
    return () if request.param == "unpacked" else (request.param,)


@pytest.fixture
def fresh():
    """Kernels are looked for anew, in the test and after it."""
    find_kernel.cache_clear()
    native.load_variant.cache_clear()
    yield
    find_kernel.cache_clear()
    native.load_variant.cache_clear()
