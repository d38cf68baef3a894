"""Tests of the PyTorch reference of deformable attention."""

import pytest
import torch

from ops_dcnv4 import reference
from tests.ops_dcnv4.attention_cases import FORMS, Run, pack, random_inputs, run_reference
from tests.ops_dcnv4.test_attention import (  # noqa: F401
    TestSumsIn32Bits,
    test_16_bit_results_are_rounded_only_once,
    test_a_pixel_is_read_only_by_adjacent_points,
    test_distant_and_non_finite_points_contribute_nothing,
    test_distant_and_non_finite_points_keep_their_softmax_weight,
    test_edges_are_exclusive_and_gradients_at_pixels_are_right_sided,
    test_empty_work_gives_zeros,
    test_large_logits_and_weights_do_not_overflow,
    test_output_gradient_of_a_query_outside_the_images_is_ignored,
    test_published_operator,
    test_results_do_not_depend_on_the_memory_layout,
)


@pytest.fixture(scope="module")
def run() -> Run:
    return run_reference


@pytest.mark.parametrize("form", FORMS)
def test_backward_is_the_derivative_of_the_forward(form, assert_near):
    inputs = random_inputs()
    leaves = [t.requires_grad_() for t in (inputs.value, inputs.locations, inputs.weights)]
    if form == "split":
        output = reference.ms_deform_attn(*inputs[:5])
    else:
        points = pack(inputs), inputs.locations.shape[4]
        output = reference.flash_deform_attn(*inputs[:3], *points)
    by_autograd = torch.autograd.grad(output, leaves, inputs.grad_output)
    with torch.no_grad():
        by_formula = run_reference(inputs, form)[1:]
    for actual, expected in zip(by_formula, by_autograd, strict=True):
        assert_near(actual, expected, 1e-12)
