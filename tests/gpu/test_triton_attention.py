"""Tests of the Triton kernels of deformable attention on a GPU."""

import pytest
import torch

from ops_dcnv4 import choose_backend
from tests.gpu.test_triton import _triton  # noqa: F401  autouse fixture
from tests.ops_dcnv4 import attention_cases, cases
from tests.ops_dcnv4.test_attention import *  # noqa: F403  tests for every backend
from tests.ops_dcnv4.test_attention import both_forms

# Triton is used only by the public functions, which check the arguments.
del test_kernels_reject_arguments_that_exceed_their_tensors  # noqa: F821
del test_backward_kernel_rejects_a_gradient_unlike_the_output  # noqa: F821


@pytest.mark.parametrize("operator", [""])
def test_the_expected_kernels_are_used(operator, device):
    """Replace the shared test of the same name."""
    assert choose_backend(device) == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@both_forms
def test_sizes_of_a_detector(form, dtype, device):
    levels = ((25, 38), (13, 19), (7, 10), (4, 5))
    sizes = {"points": 4, "heads": 8, "head_channels": 32, "queries": 300, "steps": 1024}
    inputs = attention_cases.random_inputs(levels, **sizes).to(dtype, points=torch.float32)
    actual = attention_cases.run_operator(inputs, form, device)
    exact = attention_cases.run_exactly(inputs, form)
    cases.assert_rounded_once(actual.output, exact.output)
    cases.assert_rounded_once(actual.grad_value, exact.grad_value)
    for name in ("grad_locations", "grad_weights"):
        difference = (getattr(actual, name).double() - getattr(exact, name)).abs().max()
        assert difference < 1e-5 * getattr(exact, name).abs().max()
