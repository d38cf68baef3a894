"""Tests of the Triton kernels on a GPU: shared tests and realistic sizes."""

from collections.abc import Iterator

import pytest
import torch

from ops_dcnv4 import choose_backend, use_backend
from tests.ops_dcnv4 import cases
from tests.ops_dcnv4.test_ops import *  # noqa: F403  tests for every backend

FAST_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# Triton is used only by the public functions, which check the arguments.
del test_kernels_reject_arguments_that_exceed_their_tensors  # noqa: F821
del test_backward_kernel_rejects_a_gradient_unlike_the_output  # noqa: F821


@pytest.fixture(scope="module", autouse=True)
def _triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


def test_the_expected_kernels_are_used(device):
    """Replace the shared test of the same name."""
    assert choose_backend(device) == "triton"


@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize(("size", "groups"), [((56, 56), 4), ((14, 14), 16), ((7, 7), 32)])
def test_sizes_of_the_models(size, groups, dtype, device):
    p = cases.Parameters(groups=groups)
    tensors = cases.random_tensors(p, 2, size, group_channels=16, steps_per_pixel=64).to(dtype)
    results = cases.run_operator(tensors, p, device), cases.run_exactly(tensors, p)
    for actual, exact in zip(*results, strict=True):
        cases.assert_rounded_once(actual, exact)
