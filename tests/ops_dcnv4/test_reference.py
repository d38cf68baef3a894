"""Tests of the PyTorch reference of DCNv4."""

import pytest
import torch

from ops_dcnv4 import reference
from tests.ops_dcnv4.cases import VARIED, Run, random_tensors, run_reference
from tests.ops_dcnv4.test_ops import (  # noqa: F401
    TestSumsIn32Bits,
    test_16_bit_results_are_rounded_only_once,
    test_a_pixel_is_read_only_by_adjacent_points,
    test_distant_and_non_finite_points_contribute_nothing,
    test_edges_are_exclusive_and_gradients_at_pixels_are_right_sided,
    test_empty_batch,
    test_modulation_of_a_point_outside_the_image_is_ignored,
    test_output_gradient_of_a_point_outside_the_image_is_ignored,
    test_published_operator,
    test_results_do_not_depend_on_the_memory_layout,
)


@pytest.fixture(scope="module")
def run() -> Run:
    return run_reference


@pytest.mark.parametrize("p", VARIED.values(), ids=VARIED)
def test_backward_is_the_derivative_of_the_forward(p, assert_near):
    tensors = random_tensors(p)
    value, offset_mask = (t.requires_grad_() for t in tensors[:2])
    output = reference.dcnv4(value, offset_mask, *p)
    by_autograd = torch.autograd.grad(output, (value, offset_mask), tensors.grad_output)
    by_formula = reference.dcnv4_backward(tensors.grad_output, value, offset_mask, *p)
    for actual, expected in zip(by_formula, by_autograd, strict=True):
        assert_near(actual, expected, 1e-12)
