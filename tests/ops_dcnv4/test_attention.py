"""Tests of values, gradients, edge cases and errors of deformable attention, for every backend.

This module tests the CPU kernels. Tests of other backends import it and replace the fixtures that
run the operator.
"""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops_dcnv4 import is_compiled
from tests.ops_dcnv4 import attention_cases
from tests.ops_dcnv4.attention_cases import (
    FORMS,
    OPERATORS,
    Inputs,
    Result,
    Run,
    call,
    pack,
    random_inputs,
    run_exactly,
    run_operator,
    run_reference,
)
from tests.ops_dcnv4.cases import DTYPES, assert_equal, assert_rounded_once

GOLDENS = sorted((Path(__file__).parents[1] / "data" / "msda").glob("*.npz"))
both_forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def run(device) -> Run:
    return functools.partial(run_operator, device=device)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_expected_kernels_are_used(operator, device):
    assert is_compiled()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ops_dcnv4::{operator}", device.upper())


# Values and gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@both_forms
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_published_operator(path, form, dtype, tolerance, run, assert_near):
    golden = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    inputs = Inputs(
        golden["value"],
        golden["spatial_shapes"],
        golden["level_start_index"],
        golden["sampling_locations"],
        golden["attention_weights" if form == "split" else "attention_logits"],
        golden["grad_output"],
    ).to(dtype)
    result = run(inputs, form)
    for name in ("output", "grad_value"):
        assert_near(getattr(result, name), golden[name], tolerance)
    assert_near(result.grad_locations, golden["grad_sampling_locations"], tolerance)
    if form == "split":
        assert_near(result.grad_weights, golden["grad_attention_weights"], tolerance)
    else:
        packed = pack(inputs._replace(locations=result.grad_locations, weights=result.grad_weights))
        assert_near(packed, golden["grad_sampling_loc_attn"], tolerance)


@pytest.mark.usefixtures("deterministic")
@both_forms
def test_gradients_match_finite_differences(form, device):
    inputs = random_inputs(((4, 8),), points=2, queries=3, batch=1)
    sizes = inputs.spatial_shapes.flip(1)
    pixels = (inputs.locations * sizes).round() + 0.2 + 0.1 * inputs.weights.sigmoid()[..., None]
    # Gradients are discontinuous at integers.
    inputs = inputs._replace(locations=(pixels + 0.5) / sizes).on(device)
    leaves = [inputs.value, inputs.locations, inputs.weights]

    def function(value, locations, weights):
        return call(inputs._replace(value=value, locations=locations, weights=weights), form)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in leaves], fast_mode=True)


@st.composite
def problems(draw) -> dict:
    sides = st.integers(1, 9)
    return {
        "shapes": tuple(draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=5))),
        "points": draw(st.integers(1, 9)),
        "heads": draw(st.integers(1, 4)),
        "head_channels": draw(st.sampled_from([1, 3, 16, 20, 32, 33]) | st.integers(1, 70)),
        "queries": draw(st.integers(0, 12)),
        "batch": draw(st.integers(0, 3)),
        "spread": draw(st.sampled_from([0.3, 1.0, 20.0])),
        "seed": draw(st.integers(0, 999)),
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=problems(), form=st.sampled_from(FORMS))
def test_operator_equals_reference_for_all_sizes(sizes, form, run, assert_near):
    inputs = random_inputs(**sizes)
    results = run(inputs, form), run_reference(inputs, form)
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected, 1e-11)


def test_edges_are_exclusive_and_gradients_at_pixels_are_right_sided(run):
    value = torch.tensor([9.0, 1, 2, 4, 8]).view(1, 5, 1, 1)  # one pixel, then four in a row
    x = torch.tensor([-1.0, 0, 1, 3, 4])  # in pixels of the row
    locations = torch.stack(((x + 0.5) / 4, torch.full((5,), 0.5)), dim=-1).view(1, 5, 1, 1, 1, 2)
    levels = torch.tensor([[1, 1], [1, 4]]), torch.tensor([0, 1])
    elsewhere = torch.full_like(locations, -1.0)
    inputs = Inputs(
        value,
        *levels,
        torch.cat((elsewhere, locations), dim=3),
        torch.ones(1, 5, 1, 2, 1),
        torch.ones(1, 5, 1),
    )
    result = run(inputs, "split")
    grad_x, grad_y = (result.grad_locations[0, :, 0, 1, 0] / torch.tensor([4, 1])).T.tolist()
    assert result.output.flatten().tolist() == [0, 1, 2, 8, 0]
    assert result.grad_value.flatten().tolist() == [0, 1, 1, 0, 1]
    assert grad_x == [0, 1, 2, -8, 0]
    assert grad_y == [0, -1, -2, -8, 0]
    assert result.grad_weights[..., 1, 0].flatten().tolist() == [0, 1, 2, 8, 0]
    assert not result.grad_locations[:, :, :, 0].any()


# 16-bit dtypes


@pytest.mark.parametrize("points", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both_forms
def test_16_bit_results_are_rounded_only_once(form, dtype, points, run):
    inputs = random_inputs(head_channels=21, steps=64).to(dtype, points)
    results = run(inputs, form), run_exactly(inputs, form)
    for name, actual, exact in zip(Result._fields, *results, strict=True):
        assert actual.dtype == (dtype if name in ("output", "grad_value") else points or dtype)
        assert_rounded_once(actual, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
class TestSumsIn32Bits:
    """Sums of 2304 ones, which saturate at 256 in bfloat16 and at 2048 in float16."""

    def inputs(self, dtype, queries=1, points=1, channels=1) -> Inputs:
        ones = random_inputs(((1, 1),), points, 1, channels, queries, 1)
        inputs = Inputs(*(torch.ones_like(t) if t.is_floating_point() else t for t in ones))
        return inputs._replace(locations=inputs.locations / 2).to(dtype)

    def test_over_the_points(self, dtype, run):
        assert run(self.inputs(dtype, points=2304), "split").output.item() == 2304

    def test_over_the_points_that_read_a_pixel(self, dtype, run):
        assert run(self.inputs(dtype, queries=2304), "split").grad_value.item() == 2304

    def test_over_the_channels(self, dtype, run):
        assert run(self.inputs(dtype, channels=2304), "split").grad_weights.item() == 2304


# Independence of batch and memory layout


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_channels", [3, 16, 32])
@both_forms
def test_image_in_a_batch_equals_the_image_alone(form, head_channels, dtype, run):
    inputs = random_inputs(batch=4, head_channels=head_channels, heads=3, queries=37).to(dtype)
    together = run(inputs, form)
    for i in range(4):
        alone = run(inputs.of_image(i), form)
        assert_equal(Result(*(t[i : i + 1] for t in together)), alone)


def scatter(tensor: Tensor) -> Tensor:
    """Return equal values in non-contiguous memory."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


@pytest.mark.usefixtures("deterministic")
@both_forms
def test_results_do_not_depend_on_the_memory_layout(form, run, device, monkeypatch):
    inputs = random_inputs().on(device)
    expected = run(inputs, form)
    scattered = Inputs(*(scatter(t) for t in inputs))
    assert not any(t.is_contiguous() for t in (*scattered, scatter(pack(inputs))))
    monkeypatch.setattr(attention_cases, "pack", lambda inputs: scatter(pack(inputs)))
    assert_equal(run(scattered, form), expected)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"head_channels": 0}])
@both_forms
def test_empty_work_gives_zeros(form, sizes, run):
    inputs = random_inputs(**sizes)
    result = run(inputs, form)
    shapes = [inputs.grad_output.shape, inputs.value.shape, inputs.locations.shape]
    assert [t.shape for t in result] == [*shapes, inputs.weights.shape]
    assert not any(t.any() for t in result)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("which", ["value", "locations", "weights"])
def test_only_the_requested_gradient_is_returned(which, run, device):
    inputs = random_inputs().on(device)
    getattr(inputs, which).requires_grad_()
    call(inputs, "split").backward(inputs.grad_output)
    grads = {name: getattr(inputs, name).grad for name in ("value", "locations", "weights")}
    assert [name for name, grad in grads.items() if grad is not None] == [which]
    expected = getattr(run(inputs, "split"), f"grad_{which}")
    torch.testing.assert_close(grads[which].cpu(), expected, rtol=0, atol=0)


# Points outside the images, and non-finite numbers

POINT = (slice(None), slice(None), slice(None), 1, 2)  # the third point of the second level


def without_the_point(inputs: Inputs) -> Inputs:
    """Return the inputs with a weight of zero for the point."""
    weights = inputs.weights.clone()
    weights[POINT] = 0
    return inputs._replace(weights=weights)


# 16 channels use the kernels that load several channels at a time.
dtypes_and_widths = pytest.mark.parametrize(
    ("dtype", "head_channels"), [*((dtype, 5) for dtype in DTYPES), (torch.float16, 16)]
)


@dtypes_and_widths
@pytest.mark.parametrize("location", [1e30, -1e30, 1e4, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weight", [1.0, math.inf, math.nan])
def test_distant_and_non_finite_points_contribute_nothing(
    weight, axis, location, dtype, head_channels, run, assert_near
):
    inputs = random_inputs(head_channels=head_channels).to(dtype)
    inputs.locations[(*POINT, axis)] = location
    inputs.weights[POINT] = weight
    result, expected = run(inputs, "split"), run(without_the_point(inputs), "split")
    assert not result.grad_locations[POINT].any()
    assert not result.grad_weights[POINT].any()
    for actual, wanted in zip(result, expected, strict=True):
        assert_near(actual, wanted, 1e-5)


@dtypes_and_widths
@pytest.mark.parametrize("location", [1e30, -math.inf, math.nan])
def test_distant_and_non_finite_points_keep_their_softmax_weight(
    location, dtype, head_channels, run, assert_near
):
    inputs = random_inputs(head_channels=head_channels).to(dtype)
    inputs.locations[POINT] = location
    result, expected = run(inputs, "fused"), run_exactly(inputs, "fused")
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 2e-2)
    for actual, wanted in zip(result, expected, strict=True):
        assert_near(actual.double(), wanted, tolerance)
    assert not result.grad_locations[POINT].any()


@pytest.mark.parametrize("infinite", [math.inf, math.nan])
@both_forms
def test_output_gradient_of_a_query_outside_the_images_is_ignored(form, infinite, run, assert_near):
    inputs = random_inputs()
    inputs.locations[:, 2] = 100
    expected = run(inputs, form)
    inputs.grad_output[:, 2] = infinite
    for actual, wanted in zip(run(inputs, form), expected, strict=True):
        assert_near(actual, wanted, 1e-12)


@pytest.mark.usefixtures("deterministic")
@dtypes_and_widths
@pytest.mark.parametrize("infinite", [math.inf, math.nan])
def test_a_pixel_is_read_only_by_adjacent_points(infinite, dtype, head_channels, run):
    inputs = random_inputs(((4, 4), (2, 2)), 1, head_channels=head_channels).to(dtype)
    inputs.locations.fill_(0.625)  # pixels 2 and 1, at a quarter or half of their cells
    inputs.locations[:, 0, :, 0] = 0.125  # pixel 0 of the first level, in the first query
    inputs.locations[:, 1, :, 0] = -100
    inputs.value[:, 0] = 0
    expected = run(inputs, "split")
    inputs.value[:, 0] = infinite
    result = run(inputs, "split")
    assert not result.output[:, 0].isfinite().any()
    assert not result.grad_weights[:, 0, :, 0].isfinite().any()
    result.output[:, 0] = expected.output[:, 0]
    result.grad_locations[:, 0] = expected.grad_locations[:, 0]
    result.grad_weights[:, 0] = expected.grad_weights[:, 0]
    assert_equal(result, expected)


@both_forms
def test_large_logits_and_weights_do_not_overflow(form, run, assert_near):
    inputs = random_inputs()
    inputs = inputs._replace(weights=300 * inputs.weights).to(torch.float32)
    results = run(inputs, form), run_exactly(inputs, form)
    for actual, expected in zip(*results, strict=True):
        assert_near(actual.double(), expected, 1e-4)


# Errors

SPLIT = random_inputs()
CHANGES = [
    ({"value": SPLIT.value[0]}, ValueError, "dimensions of value must be 4"),
    ({"value": SPLIT.value.int()}, TypeError, "sampling_loc"),
    ({"value": SPLIT.value[:1]}, ValueError, "shape of sampling_loc"),
    ({"value": SPLIT.value[:, :, :1]}, ValueError, "shape of sampling_loc"),
    ({"value": SPLIT.value.float()}, TypeError, "must have the dtype of value"),
    ({"spatial_shapes": SPLIT.spatial_shapes.int()}, TypeError, "64-bit integers"),
    ({"spatial_shapes": SPLIT.spatial_shapes[:, :1]}, ValueError, "spatial_shapes"),
    ({"spatial_shapes": SPLIT.spatial_shapes[:0]}, ValueError, "spatial_shapes"),
    ({"level_start_index": SPLIT.level_start_index[:1]}, ValueError, "level_start_index"),
    ({"level_start_index": SPLIT.level_start_index.double()}, TypeError, "64-bit integers"),
    ({"value": SPLIT.value[:, :0]}, ValueError, "pixels of value must be from 1 to"),
    (
        {"value": SPLIT.value[:0, :, :1, :1].expand(0, 47, 2**40, 2**40)},
        ValueError,
        "shape of sampling_loc|must be from 0 to",
    ),
]


def raw_arguments(inputs: Inputs, form: str) -> tuple:
    value, shapes, start, locations, weights, _ = inputs
    points = (locations, weights) if form == "split" else (pack(SPLIT.on(value.device)), 3)
    return value, shapes, start, *points


def raw_operators(form: str) -> tuple:
    namespace, name = torch.ops.ops_dcnv4, OPERATORS[0 if form == "split" else 2]
    return getattr(namespace, name), getattr(namespace, f"{name}_backward")


@pytest.mark.parametrize(("change", "message"), [(change, text) for change, _, text in CHANGES])
@both_forms
@torch.inference_mode()  # bypasses the Python checks
def test_kernels_reject_arguments_that_exceed_their_tensors(form, change, message, device):
    inputs = SPLIT._replace(**change).on(device)
    forward, backward = raw_operators(form)
    with pytest.raises(ValueError, match=message):
        forward(*raw_arguments(inputs, form))
    with pytest.raises(ValueError, match=message):
        backward(inputs.grad_output, *raw_arguments(inputs, form))


@pytest.mark.parametrize("grad_output", [SPLIT.grad_output[:, 1:], SPLIT.grad_output.float()])
@both_forms
def test_backward_kernel_rejects_a_gradient_unlike_the_output(form, grad_output, device):
    inputs = SPLIT._replace(grad_output=grad_output).on(device)
    with pytest.raises(ValueError, match="grad_output"):
        raw_operators(form)[1](inputs.grad_output, *raw_arguments(inputs, form))
