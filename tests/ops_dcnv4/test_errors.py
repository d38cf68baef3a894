"""Tests that errors of the public functions name the argument."""

import inspect

import numpy as np
import pytest
import torch

from ops_dcnv4 import dcnv4, flash_deform_attn, ms_deform_attn, reference

VALUE, OFFSET_MASK = torch.zeros(2, 5, 6, 8), torch.zeros(2, 5, 6, 56)
ERRORS = [
    ({"value": [1.0]}, TypeError, "value must be a tensor"),
    ({"offset_mask": None}, TypeError, "offset_mask must be a tensor"),
    ({"value": VALUE[0]}, ValueError, "value must be .N, H, W, C.*5, 6, 8"),
    ({"offset_mask": OFFSET_MASK[0]}, ValueError, "offset_mask must be .N, H, W, C"),
    ({"value": VALUE.int()}, TypeError, "value must be floating point"),
    ({"offset_mask": OFFSET_MASK.int()}, TypeError, "offset_mask must be floating point"),
    ({"value": VALUE.to(torch.complex64)}, TypeError, "value must be floating point"),
    ({"offset_mask": OFFSET_MASK.to("meta")}, ValueError, "value and offset_mask.*one device"),
    ({"offset_mask": OFFSET_MASK.double()}, TypeError, "value and offset_mask.*one dtype"),
    (
        {"value": VALUE.to("meta"), "offset_mask": OFFSET_MASK.double().to("meta")},
        TypeError,
        "value and offset_mask.*one dtype",
    ),
    ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
    ({"stride": (1, 0)}, ValueError, "stride must be at least 1"),
    ({"padding": -1}, ValueError, "padding must be at least 0"),
    ({"dilation": 0}, ValueError, "dilation must be at least 1"),
    ({"kernel_size": 3.0}, TypeError, "kernel_size must be an int or a pair"),
    ({"stride": (1, 2, 3)}, TypeError, "stride must be an int or a pair"),
    ({"padding": "same"}, TypeError, "padding must be an int or a pair"),
    ({"dilation": None}, TypeError, "dilation must be an int or a pair"),
    ({"groups": 2.0}, TypeError, "groups must be an int"),
    ({"groups": True}, TypeError, "groups must be an int, got True"),
    ({"groups": torch.tensor(2)}, TypeError, "groups must be an int"),
    ({"stride": (1, True)}, TypeError, "stride must be an int or a pair"),
    ({"offset_scale": None}, TypeError, "offset_scale must be a number, got None"),
    ({"remove_center": "no"}, TypeError, "remove_center must be a bool, got 'no'"),
    ({"groups": 0}, ValueError, "groups must be positive"),
    ({"groups": 3}, ValueError, r"groups must .* divide the channels of value \(8\), got 3"),
    ({"kernel_size": 9}, ValueError, "output would be -1 x 0.*kernel_size"),
    ({"value": VALUE[:1]}, ValueError, r"offset_mask must be \(1, 5, 6"),
    ({"stride": 2}, ValueError, r"offset_mask must be \(2, 3, 3"),
    ({"offset_mask": OFFSET_MASK[..., :53]}, ValueError, "offset_mask .*at least 54 channels"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_error_names_the_wrong_argument(change, error, message):
    arguments = {"value": VALUE, "offset_mask": OFFSET_MASK, "groups": 2} | change
    with pytest.raises(error, match=message):
        dcnv4(**arguments)


PIXELS, LEVELS = torch.zeros(2, 10, 2, 4), [(2, 3), (2, 2)]
LOCATIONS, WEIGHTS = torch.zeros(2, 5, 2, 2, 3, 2), torch.zeros(2, 5, 2, 2, 3)
SHAPES, START = torch.tensor(LEVELS), torch.tensor([0, 6])
LEVEL_ERRORS = [
    ({"value": PIXELS[0]}, ValueError, "value must be .N, S, M, D.*10, 2, 4"),
    ({"value": None}, TypeError, "value must be a tensor, got NoneType"),
    ({"value": PIXELS.int()}, TypeError, "value must be floating point"),
    ({"value": PIXELS[:, :9]}, ValueError, "spatial_shapes must have as many pixels.*S = 9.*10"),
    ({"spatial_shapes": LEVELS[0]}, ValueError, r"spatial_shapes must be \(L, 2\)"),
    ({"spatial_shapes": SHAPES[:, 0]}, ValueError, r"spatial_shapes must be \(L, 2\)"),
    ({"spatial_shapes": SHAPES[:0]}, ValueError, r"spatial_shapes must be \(L, 2\)"),
    ({"spatial_shapes": SHAPES.float()}, TypeError, "spatial_shapes must hold integers"),
    ({"spatial_shapes": "2x3"}, TypeError, "spatial_shapes must hold integers"),
    ({"spatial_shapes": None}, TypeError, "spatial_shapes must hold integers, got None"),
    ({"spatial_shapes": []}, ValueError, r"spatial_shapes must be \(L, 2\)"),
    ({"spatial_shapes": [(2, 3), (2, 1)]}, ValueError, "spatial_shapes must have as many pixels"),
    ({"spatial_shapes": [(2, 3), (-2, -2)]}, ValueError, "spatial_shapes must hold positive"),
    ({"level_start_index": START[:1]}, ValueError, r"level_start_index must be \(2,\)"),
    ({"level_start_index": [0, 5]}, ValueError, r"level_start_index must be \[0, 6\].*\[0, 5\]"),
    ({"level_start_index": [0, 6.5]}, TypeError, "level_start_index must hold integers"),
]
SPLIT_ERRORS = [
    ({"sampling_locations": LOCATIONS[0]}, ValueError, "sampling_locations must be .N, Lq, M, L"),
    ({"sampling_locations": LOCATIONS[:, :4]}, ValueError, "attention_weights must be .N, Lq, M"),
    ({"sampling_locations": LOCATIONS[..., :1]}, ValueError, "sampling_locations must be .N, Lq"),
    ({"sampling_locations": LOCATIONS[..., :0, :]}, ValueError, "sampling_locations .*K = 0"),
    ({"sampling_locations": LOCATIONS.long()}, TypeError, "sampling_locations must be floating"),
    ({"sampling_locations": LOCATIONS.double()}, TypeError, "sampling_locations must have value's"),
    ({"sampling_locations": LOCATIONS.half()}, TypeError, "sampling_locations must have value's"),
    ({"sampling_locations": LOCATIONS.to("meta")}, ValueError, "value and sampling_locations must"),
    ({"attention_weights": WEIGHTS[..., 0]}, ValueError, "attention_weights must be .N, Lq, M, L"),
    ({"attention_weights": WEIGHTS[:, :, :1]}, ValueError, "attention_weights must be .N, Lq, M"),
    ({"attention_weights": WEIGHTS.double()}, TypeError, "attention_weights must have value's"),
    ({"value": PIXELS[:1]}, ValueError, r"sampling_locations must be .* = \(1, 5, 2, 2, 3, 2\)"),
    ({"spatial_shapes": [(5, 2)]}, ValueError, r"sampling_locations must be .* to match value and"),
]
PACKED = torch.zeros(2, 5, 2, 18)
FUSED_ERRORS = [
    ({"sampling_loc_attn": PACKED[0]}, ValueError, "sampling_loc_attn must be .N, Lq, M, 3 .*"),
    ({"sampling_loc_attn": PACKED[..., :17]}, ValueError, r"= \(2, 5, 2, 18\) to match"),
    (
        {"sampling_loc_attn": PACKED.double()},
        TypeError,
        "sampling_loc_attn must have value's dtype",
    ),
    ({"n_points": 4}, ValueError, r"sampling_loc_attn must be .* = \(2, 5, 2, 24\) to match"),
    ({"n_points": 0}, ValueError, "n_points must be at least 1, got 0"),
    ({"n_points": 3.0}, TypeError, "n_points must be an int, got 3.0"),
]


@pytest.mark.parametrize(("change", "error", "message"), LEVEL_ERRORS + SPLIT_ERRORS)
def test_error_of_ms_deform_attn_names_the_wrong_argument(change, error, message):
    arguments = {
        "value": PIXELS,
        "spatial_shapes": SHAPES,
        "level_start_index": None,
        "sampling_locations": LOCATIONS,
        "attention_weights": WEIGHTS,
    }
    assert ms_deform_attn(**arguments).shape == (2, 5, 8)
    with pytest.raises(error, match=message):
        ms_deform_attn(**arguments | change)


@pytest.mark.parametrize(("change", "error", "message"), LEVEL_ERRORS + FUSED_ERRORS)
def test_error_of_flash_deform_attn_names_the_wrong_argument(change, error, message):
    arguments = {
        "value": PIXELS,
        "spatial_shapes": SHAPES,
        "level_start_index": START,
        "sampling_loc_attn": PACKED,
        "n_points": 3,
    }
    assert flash_deform_attn(**arguments).shape == (2, 5, 8)
    with pytest.raises(error, match=message):
        flash_deform_attn(**arguments | change)


DENSE = {
    "dcnv4": {"value": VALUE, "offset_mask": OFFSET_MASK},
    "ms_deform_attn": {
        "value": PIXELS,
        "spatial_shapes": SHAPES,
        "level_start_index": START,
        "sampling_locations": LOCATIONS,
        "attention_weights": WEIGHTS,
    },
    "flash_deform_attn": {
        "value": PIXELS,
        "spatial_shapes": SHAPES,
        "level_start_index": START,
        "sampling_loc_attn": PACKED,
    },
}
FURTHER = {
    "dcnv4": ([3, 3], [1, 1], [1, 1], [1, 1], 2, 1.0, False),
    "ms_deform_attn": (),
    "flash_deform_attn": (3,),
}
PUBLIC = {"dcnv4": dcnv4, "ms_deform_attn": ms_deform_attn, "flash_deform_attn": flash_deform_attn}
CONVERSIONS = {
    "sparse_coo": torch.Tensor.to_sparse,
    "sparse_csr": lambda t: (t if t.dim() < 3 else t.flatten(0, -2)).to_sparse_csr(),
    "_mkldnn": torch.Tensor.to_mkldnn,
    "nested": lambda t: torch.nested.nested_tensor([t]),
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR|Sparse.*invariant)")
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize(("operator", "argument"), [(o, a) for o in DENSE for a in DENSE[o]])
def test_errors_name_sparse_nested_and_mkldnn_tensors(operator, argument, conversion):
    dense = DENSE[operator][argument]
    is_integer, has_rows = dense.dtype == torch.int64, dense.dim() > 1
    if (conversion == "_mkldnn" and (is_integer or dense.dim() > 5)) or (
        conversion == "sparse_csr" and not has_rows
    ):
        return  # PyTorch has no such tensor.
    arguments = DENSE[operator] | {argument: CONVERSIONS[conversion](dense)}
    raw = getattr(torch.ops.ops_dcnv4, operator)
    backward = getattr(torch.ops.ops_dcnv4, f"{operator}_backward")
    options = {"groups": 2} if operator == "dcnv4" else {}
    options |= {"n_points": 3} if operator == "flash_deform_attn" else {}
    for call in (
        lambda: PUBLIC[operator](**arguments, **options),
        lambda: raw(*arguments.values(), *FURTHER[operator]),
        lambda: backward(VALUE, *arguments.values(), *FURTHER[operator]),
    ):
        with pytest.raises(TypeError, match=f"{argument} must be a dense tensor.*{conversion}"):
            call()


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_errors_name_gradients_that_are_not_dense(conversion):
    grad_output = CONVERSIONS[conversion](VALUE)
    with pytest.raises(TypeError, match=f"grad_output must be a dense tensor.*{conversion}"):
        torch.ops.ops_dcnv4.dcnv4_backward(grad_output, VALUE, OFFSET_MASK, *FURTHER["dcnv4"])


def test_numpy_numbers_and_lists_are_accepted():
    generator = torch.Generator().manual_seed(0)
    value, offset_mask, pixels, packed = (
        torch.rand(t.shape, generator=generator) for t in (VALUE, OFFSET_MASK, PIXELS, PACKED)
    )
    expected = dcnv4(value, offset_mask, 3, 1, 1, 1, 2, 0.5, False)
    numbers = np.int64(3), [1, 1], np.int32(1), (np.uint8(1), 1), np.int64(2), np.float32(0.5)
    assert torch.equal(dcnv4(value, offset_mask, *numbers, np.bool_(False)), expected)
    expected = flash_deform_attn(pixels, SHAPES, START, packed, 3)
    shapes, start = np.array(LEVELS), [np.int64(0), 6]
    assert torch.equal(flash_deform_attn(pixels, shapes, start, packed, np.int64(3)), expected)


def test_ms_deform_attn_takes_its_arguments_in_the_order_of_mmcv():
    names = [*DENSE["ms_deform_attn"]]
    schema = torch.ops.ops_dcnv4.ms_deform_attn.default._schema
    assert list(inspect.signature(ms_deform_attn).parameters) == names
    assert list(inspect.signature(reference.ms_deform_attn).parameters) == names
    assert [argument.name for argument in schema.arguments] == names
    with pytest.raises(TypeError, match=r"level_start_index must hold integers, got torch\.float"):
        ms_deform_attn(PIXELS, SHAPES, LOCATIONS, WEIGHTS, START)


def test_level_start_index_of_none_is_computed():
    generator = torch.Generator().manual_seed(0)
    value, locations, weights = (
        torch.rand(t.shape, generator=generator) for t in (PIXELS, LOCATIONS, WEIGHTS)
    )
    expected = ms_deform_attn(value, SHAPES, START, locations, weights)
    assert expected.any()
    assert ms_deform_attn(value, SHAPES, None, locations, weights).equal(expected)
    points = {"sampling_locations": locations, "attention_weights": weights}
    assert ms_deform_attn(value, SHAPES, level_start_index=None, **points).equal(expected)


def test_levels_in_lists_become_tensors_on_the_device_of_value():
    with torch.device("meta"):
        assert not ms_deform_attn(PIXELS, LEVELS, [0, 6], LOCATIONS, WEIGHTS).any()
    on_meta = (t.to("meta") for t in (PIXELS, LOCATIONS, WEIGHTS))
    value, locations, weights = on_meta
    assert ms_deform_attn(value, LEVELS, None, locations, weights).is_meta


def test_levels_in_lists_are_checked_in_compiled_graphs_too():
    compiled = torch.compile(ms_deform_attn, fullgraph=True, backend="eager")
    for change in ([(2, 3), (2, 1)], None), (LEVELS, [0, 5]):
        with pytest.raises(Exception, match=r"spatial_shapes must have|level_start_index must be"):
            compiled(PIXELS, *change, LOCATIONS, WEIGHTS)


@pytest.mark.parametrize("under_autocast", [False, True])
def test_mixing_float64_with_other_dtypes_is_rejected(under_autocast):
    doubles = PIXELS.double(), LOCATIONS.double(), WEIGHTS.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        for value, locations, weights in (
            (doubles[0], LOCATIONS, WEIGHTS),
            (PIXELS, doubles[1], doubles[2]),
            (doubles[0], doubles[1], WEIGHTS),
        ):
            with pytest.raises(TypeError, match="must have value's dtype"):
                ms_deform_attn(value, SHAPES, START, locations, weights)
        with pytest.raises(TypeError, match="one dtype"):
            dcnv4(VALUE.double(), OFFSET_MASK, groups=2)
