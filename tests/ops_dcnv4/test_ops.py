"""Tests of values, gradients, edge cases and errors of DCNv4, for every backend.

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

from ops_dcnv4 import dcnv4, is_compiled
from tests.ops_dcnv4.cases import (
    DTYPES,
    VARIED,
    Parameters,
    Result,
    Run,
    Tensors,
    assert_equal,
    assert_rounded_once,
    random_tensors,
    run_exactly,
    run_operator,
    run_reference,
)

GOLDENS = sorted((Path(__file__).parents[1] / "data" / "op").glob("*.npz"))
varied = pytest.mark.parametrize("p", VARIED.values(), ids=VARIED)


@pytest.fixture(scope="module")
def run(device) -> Run:
    return functools.partial(run_operator, device=device)


def test_the_expected_kernels_are_used(device):
    assert is_compiled()
    for operator in ("ops_dcnv4::dcnv4", "ops_dcnv4::dcnv4_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, device.upper())


# Values and gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_published_operator(path, dtype, tolerance, run, assert_near):
    golden = np.load(path)

    def pair(name):
        return int(golden[f"{name}_h"]), int(golden[f"{name}_w"])

    p = Parameters(
        *map(pair, ("kernel", "stride", "pad", "dilation")),
        int(golden["group"]),
        float(golden["offset_scale"]),
        bool(golden["remove_center"]),
    )
    tensors = Tensors(*(torch.from_numpy(golden[name]) for name in Tensors._fields)).to(dtype)
    result = run(tensors, p)
    for name, actual in result._asdict().items():
        assert actual.dtype == dtype
        assert_near(actual, torch.from_numpy(golden[name]), tolerance)
    assert not result.grad_offset_mask[..., 3 * p.groups * p.taps :].any()


@pytest.mark.usefixtures("deterministic")
@varied
def test_gradients_match_finite_differences(p, device):
    tensors = random_tensors(p, batch=1, size=(4, 5), group_channels=3)
    fraction = 0.2 + 0.2 * tensors.offset_mask.sigmoid()  # Gradients are discontinuous at integers.
    offset_mask = tensors.offset_mask.clamp(-1, 1).round() + fraction
    inputs = [t.to(device).requires_grad_() for t in (tensors.value, offset_mask)]
    assert torch.autograd.gradcheck(lambda v, o: dcnv4(v, o, *p), inputs, fast_mode=True)


def pairs(low: int, high: int):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def problems(draw) -> tuple[Parameters, dict]:
    p = Parameters(
        kernel_size=draw(pairs(1, 4)),
        stride=draw(pairs(1, 3)),
        padding=draw(pairs(0, 3)),
        dilation=draw(pairs(1, 2)),
        groups=draw(st.integers(1, 3)),
        offset_scale=draw(st.sampled_from([0.3, 0.5, 1.0, 2.0])),
        remove_center=draw(st.booleans()),
    )
    smallest = (
        max(1, d * (k - 1) + 1 - 2 * pad)
        for k, pad, d in zip(p.kernel_size, p.padding, p.dilation, strict=True)
    )
    return p, {
        "size": tuple(n + extra for n, extra in zip(smallest, draw(pairs(0, 6)), strict=True)),
        "batch": draw(st.integers(0, 3)),
        "group_channels": draw(st.sampled_from([1, 3, 5, 16, 20, 33]) | st.integers(1, 40)),
        "padding_channels": draw(st.integers(0, 9)),
        "spread": draw(st.sampled_from([0.5, 3.0, 30.0])),
        "seed": draw(st.integers(0, 999)),
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_operator_equals_reference_for_all_parameters(problem, run, assert_near):
    p, shapes = problem
    tensors = random_tensors(p, **shapes)
    for actual, expected in zip(run(tensors, p), run_reference(tensors, p), strict=True):
        assert_near(actual, expected, 1e-11)


def test_edges_are_exclusive_and_gradients_at_pixels_are_right_sided(run):
    p = Parameters(kernel_size=(1, 1), padding=(0, 0), groups=1)
    value = torch.tensor([1.0, 2, 4, 8]).view(1, 1, 4, 1)
    offset_mask = torch.zeros(1, 1, 4, 3)
    offset_mask[0, 0, :, 0] = torch.tensor([-1, 0, 1, 1])  # reads columns -1, 1, 3 and 4 of 0..3
    offset_mask[..., 2] = 1
    result = run(Tensors(value, offset_mask, torch.ones(1, 1, 4, 1)), p)
    grad_x, grad_y, grad_modulation = result.grad_offset_mask[0, 0].T.tolist()
    assert result.output.flatten().tolist() == [0, 2, 8, 0]
    assert result.grad_value.flatten().tolist() == [0, 1, 0, 1]
    assert grad_x == [0, 2, -8, 0]
    assert grad_y == [0, -2, -8, 0]
    assert grad_modulation == [0, 2, 8, 0]


# 16-bit dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [Parameters(), Parameters(stride=(2, 1), offset_scale=2.0)])
def test_16_bit_results_are_rounded_only_once(p, dtype, run):
    tensors = random_tensors(p, group_channels=21).to(dtype)
    for actual, exact in zip(run(tensors, p), run_exactly(tensors, p), strict=True):
        assert actual.dtype == dtype
        assert_rounded_once(actual, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
class TestSumsIn32Bits:
    """Sums of 2304 ones, which saturate at 256 in bfloat16 and at 2048 in float16."""

    def test_over_the_taps(self, dtype, run):
        p = Parameters(kernel_size=(48, 48), padding=(0, 0), groups=1)
        offset_mask = torch.cat((torch.zeros(2 * p.taps), torch.ones(p.taps)))
        ones = torch.ones(1, 48, 48, 1, dtype=dtype), offset_mask.to(dtype).view(1, 1, 1, -1)
        assert run(Tensors(*ones, torch.ones(1, 1, 1, 1, dtype=dtype)), p).output.item() == 2304

    def test_over_the_points_that_read_a_pixel(self, dtype, run):
        p = Parameters(kernel_size=(1, 1), padding=(0, 0), groups=1)
        rows, columns = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
        to_origin = torch.stack((-columns, -rows, torch.ones(48, 48)), dim=-1)[None].to(dtype)
        image = torch.ones(1, 48, 48, 1, dtype=dtype)
        grad_value = run(Tensors(image, to_origin, image), p).grad_value
        assert grad_value[0, 0, 0, 0] == 2304
        assert grad_value.sum() == 2304

    def test_over_the_channels(self, dtype, run):
        p = Parameters(kernel_size=(1, 1), padding=(0, 0), groups=1)
        image = torch.ones(1, 1, 1, 2304, dtype=dtype)
        tensors = Tensors(image, torch.zeros(1, 1, 1, 3, dtype=dtype), image)
        assert run(tensors, p).grad_offset_mask[..., 2].item() == 2304


# Independence of batch and memory layout


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "group_channels"), [((9, 7), 16), ((3, 5), 20), ((3, 1), 3)])
def test_image_in_a_batch_equals_the_image_alone(size, group_channels, dtype, run):
    p = Parameters(groups=3)
    tensors = random_tensors(p, batch=5, size=size, group_channels=group_channels).to(dtype)
    together = run(tensors, p)
    for i in range(5):
        alone = run(Tensors(*(t[i : i + 1] for t in tensors)), p)
        assert_equal(Result(*(t[i : i + 1] for t in together)), alone)


@pytest.mark.usefixtures("deterministic")
def test_results_do_not_depend_on_the_memory_layout(run, device):
    p = Parameters()
    tensors = random_tensors(p).to(device)
    scattered = Tensors(
        tensors.value.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        torch.cat((tensors.offset_mask, tensors.offset_mask), dim=-1)[
            ..., : tensors.offset_mask.shape[-1]
        ],
        tensors.grad_output.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not any(t.is_contiguous() for t in scattered)
    assert_equal(run(scattered, p), run(tensors, p))


def test_empty_batch(run):
    p = Parameters()
    result = run(random_tensors(p, batch=0), p)
    assert [tuple(t.shape) for t in result] == [(0, 7, 6, 10), (0, 7, 6, 10), (0, 7, 6, 57)]


@pytest.mark.parametrize(
    ("p", "sizes"),
    [
        (Parameters(), {"group_channels": 0}),
        (Parameters(kernel_size=(1, 1), remove_center=True), {"padding_channels": 0}),
        (Parameters(kernel_size=(1, 1), remove_center=True), {}),
    ],
    ids=["no channels", "no taps and channels of offsets", "no taps"],
)
def test_empty_work_gives_zeros(p, sizes, run):
    tensors = random_tensors(p, **sizes)
    result = run(tensors, p)
    expected = (tensors.grad_output, tensors.value, tensors.offset_mask)
    assert [t.shape for t in result] == [t.shape for t in expected]
    assert not any(t.any() for t in result)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("which", [0, 1])
def test_only_the_requested_gradient_is_returned(which, run, device):
    p = Parameters()
    *inputs, grad_output = tensors = random_tensors(p).to(device)
    inputs[which].requires_grad_()
    dcnv4(*inputs, *p).backward(grad_output)
    assert inputs[1 - which].grad is None
    expected = run(tensors, p)[1 + which]
    torch.testing.assert_close(inputs[which].grad.cpu(), expected, rtol=0, atol=0)


# Points outside the image, and non-finite numbers

TAP = 4  # of the first group of Parameters()
X, Y, MODULATION = 2 * TAP, 2 * TAP + 1, 18 + TAP


def assert_tap_contributes_nothing(tensors: Tensors, p: Parameters, run, assert_near) -> None:
    """Assert that results equal those for zero modulation, and that the tap has zero gradients."""
    switched_off = tensors.offset_mask.clone()
    switched_off[..., [X, Y, MODULATION]] = 0
    result, expected = run(tensors, p), run(tensors._replace(offset_mask=switched_off), p)
    assert not result.grad_offset_mask[..., [X, Y, MODULATION]].any()
    expected.grad_offset_mask[..., MODULATION] = 0
    for actual, wanted in zip(result, expected, strict=True):
        assert_near(actual, wanted, 1e-5)


# 16 channels use the kernels that load several channels at a time.
dtypes_and_widths = pytest.mark.parametrize(
    ("dtype", "group_channels"), [*((dtype, 5) for dtype in DTYPES), (torch.float16, 16)]
)


@dtypes_and_widths
@pytest.mark.parametrize("offset", [1e30, -1e30, 1e4, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("channel", [X, Y])
def test_distant_and_non_finite_points_contribute_nothing(
    channel, offset, dtype, group_channels, run, assert_near
):
    p = Parameters()
    tensors = random_tensors(p, group_channels=group_channels).to(dtype)
    tensors.offset_mask[..., channel] = offset
    assert_tap_contributes_nothing(tensors, p, run, assert_near)


@dtypes_and_widths
@pytest.mark.parametrize("modulation", [math.inf, math.nan])
def test_modulation_of_a_point_outside_the_image_is_ignored(
    modulation, dtype, group_channels, run, assert_near
):
    p = Parameters()
    tensors = random_tensors(p, group_channels=group_channels).to(dtype)
    tensors.offset_mask[..., X], tensors.offset_mask[..., MODULATION] = 100, modulation
    assert_tap_contributes_nothing(tensors, p, run, assert_near)


@pytest.mark.parametrize("infinite", [math.inf, math.nan])
def test_output_gradient_of_a_point_outside_the_image_is_ignored(infinite, run, assert_near):
    p = Parameters(kernel_size=(1, 1), padding=(0, 0))
    tensors = random_tensors(p)
    tensors.offset_mask[:, 2, 3, :6] = 100
    expected = run(tensors, p)
    tensors.grad_output[:, 2, 3] = infinite
    for actual, wanted in zip(run(tensors, p), expected, strict=True):
        assert_near(actual, wanted, 1e-12)


@pytest.mark.usefixtures("deterministic")
@dtypes_and_widths
@pytest.mark.parametrize("infinite", [math.inf, math.nan])
def test_a_pixel_is_read_only_by_adjacent_points(infinite, dtype, group_channels, run):
    p = Parameters(kernel_size=(1, 1), padding=(0, 0))
    tensors = random_tensors(p, group_channels=group_channels).to(dtype)
    tensors.offset_mask[..., [0, 1, 3, 4]] = 0.5  # output (r, c) reads rows r, r+1, columns c, c+1
    tensors.offset_mask[:, 3, 3, 0] = -100
    tensors.value[:, 0, 0] = 0
    expected = run(tensors, p)
    tensors.value[:, 0, 0] = infinite
    result = run(tensors, p)
    assert not result.output[:, 0, 0].isfinite().any()
    assert not result.grad_offset_mask[:, 0, 0, :6].isfinite().any()
    result.output[:, 0, 0] = expected.output[:, 0, 0]
    result.grad_offset_mask[:, 0, 0] = expected.grad_offset_mask[:, 0, 0]
    assert_equal(result, expected)


# Errors

VALUE, OFFSET_MASK = torch.zeros(2, 5, 6, 8), torch.zeros(2, 5, 6, 56)
SCHEMA_ORDER = ("value", "offset_mask", *Parameters._fields)


ONE = torch.zeros(1, 1, 1, 1)  # expands to large shapes without memory
REFUSED = [
    ({"value": VALUE[0]}, ValueError, "dimensions of value must be 4, got 3"),
    ({"offset_mask": OFFSET_MASK[:1]}, ValueError, "batch size of offset_mask must be 2, got 1"),
    ({"offset_mask": OFFSET_MASK.double()}, TypeError, "one dtype"),
    ({"value": VALUE.int(), "offset_mask": OFFSET_MASK.int()}, TypeError, "floating-point"),
    ({"value": VALUE[:0].int(), "offset_mask": OFFSET_MASK[:0].int()}, TypeError, "floating-point"),
    ({"groups": 3}, ValueError, "groups"),
    ({"groups": -2}, ValueError, "groups"),
    ({"value": VALUE[..., :0], "groups": 2**62}, ValueError, "groups must be from 1 to 536870911"),
    ({"offset_mask": OFFSET_MASK[..., :53]}, ValueError, "at least 54 channels, got 53"),
    ({"kernel_size": (0, 3)}, ValueError, "kernel_size must be from 1"),
    ({"kernel_size": (2**20, 2**20), "padding": (2**20, 2**20)}, ValueError, "height of offset_m"),
    ({"stride": (2**40, 1)}, ValueError, "stride must be from 1 to 134217728"),
    ({"stride": (0, 1)}, ValueError, "stride must be from 1"),
    ({"stride": (1, 2**29)}, ValueError, "stride must be from 1 to 134217728"),
    ({"padding": (1, -1)}, ValueError, "padding must be from 0"),
    ({"padding": (2**29, 1)}, ValueError, "padding must be from 0 to 134217728"),
    ({"dilation": (1, 0)}, ValueError, "dilation must be from 1"),
    ({"dilation": (2**27, 1)}, ValueError, "the output would be empty"),
    ({"kernel_size": (9, 3)}, ValueError, "the output would be empty"),
    # Images without pixels, with enough padding for a non-empty output.
    (
        {"value": VALUE[:, :0], "offset_mask": OFFSET_MASK[:, :2], "padding": (2, 1)},
        ValueError,
        "height of value must be from 1 to 16777216, got 0",
    ),
    (
        {"value": VALUE[:, :, :0], "offset_mask": OFFSET_MASK[:, :, :2], "padding": (1, 2)},
        ValueError,
        "width of value must be from 1 to 16777216, got 0",
    ),
    # Offsets for an output of another size, or an empty one.
    ({"offset_mask": OFFSET_MASK[:, :4]}, ValueError, "height of offset_mask must be 5"),
    ({"offset_mask": OFFSET_MASK[:, :, :0]}, ValueError, "width of offset_mask must be 6"),
    ({"stride": (2, 2)}, ValueError, "height of offset_mask must be 3"),
    # Sides that are not exact in float32, and sizes beyond 32 bits.
    (
        {
            "value": ONE.expand(1, 1, 2**24 + 3, 2),
            "offset_mask": ONE.expand(1, 1, 2**24 + 3, 54),
        },
        ValueError,
        "width of value must be from 1 to 16777216",
    ),
    (
        {"value": ONE.expand(1, 2**15, 2**15, 2), "offset_mask": ONE.expand(1, 2**15, 2**15, 54)},
        ValueError,
        "number of pixels of an image must be from 0 to 536870911",
    ),
    ({"value": ONE.expand(2, 5, 6, 2**31)}, ValueError, "channels of value must be from 0"),
]


@pytest.mark.parametrize(("change", "message"), [(change, text) for change, _, text in REFUSED])
@torch.inference_mode()  # bypasses the Python checks
def test_kernels_reject_arguments_that_exceed_their_tensors(change, message, device):
    arguments = Parameters()._asdict() | {"value": VALUE, "offset_mask": OFFSET_MASK} | change
    value, offset_mask, *parameters = (arguments[name] for name in SCHEMA_ORDER)
    tensors = value.to(device), offset_mask.to(device)
    with pytest.raises(ValueError, match=message):
        torch.ops.ops_dcnv4.dcnv4(*tensors, *parameters)
    grad_output = torch.zeros_like(VALUE, dtype=value.dtype, device=device)
    with pytest.raises(ValueError, match=message):
        torch.ops.ops_dcnv4.dcnv4_backward(grad_output, *tensors, *parameters)


@pytest.mark.parametrize("grad_output", [VALUE[:, 1:], VALUE.double()])
def test_backward_kernel_rejects_a_gradient_unlike_the_output(grad_output, device):
    tensors = Tensors(VALUE, OFFSET_MASK, grad_output).to(device)
    with pytest.raises(ValueError, match="grad_output"):
        torch.ops.ops_dcnv4.dcnv4_backward(tensors.grad_output, *tensors[:2], *Parameters())
