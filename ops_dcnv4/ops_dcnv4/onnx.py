"""The operators in ONNX, for `torch.onnx.export(..., custom_translation_table=...)`.

ONNX has no multi-scale deformable attention, and its `DeformConv` (opset 19) computes DCNv4 with
other offsets: tap (j, i) of output pixel (r, c) is read at

    (r * stride_h - padding_h + j * dilation_h + offset_y, likewise for x)

Form `"deform_conv"` uses `DeformConv` with a kernel of ones, one group per channel and one offset
group per group of DCNv4. Form `"gather"` reads the four pixels around each point with `GatherND`,
for runtimes without `DeformConv`, and with opset 18. Attention always uses gathers: a form with
`GridSample` needs one node per level, and TensorRT (10.13 to 11) compiles it wrongly.

This module requires onnxscript.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import evaluator, opset19
from onnxscript import opset18 as op

from . import attention, ops  # noqa: F401  define torch.ops.ops_dcnv4
from .window import Window

Form = Literal["deform_conv", "gather"]
Value = Any  # a symbolic tensor of onnxscript

_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def translation_table(form: Form = "deform_conv") -> dict[Any, Callable]:
    """Return the translation of each operator, for `custom_translation_table`.

    Args:
        form: `"deform_conv"`, which onnxruntime computes fastest and which needs opset 19, or
            `"gather"`, for runtimes without `DeformConv`. Multi-scale deformable attention uses
            gathers in both.

    Raises:
        ValueError: If the form is unknown. `torch.onnx.export` raises one, as the cause of its
            error, for `"deform_conv"` with an opset below 19.

    Example:
        >>> torch.onnx.export(model, (x,), "model.onnx", dynamo=True, opset_version=19,
        ...                   custom_translation_table=ops_dcnv4.onnx.translation_table())
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    operators = torch.ops.ops_dcnv4
    return {
        operators.dcnv4.default: {"deform_conv": _deform_conv, "gather": _dcnv4_by_gathers}[form],
        operators.ms_deform_attn.default: ms_deform_attn,
        operators.flash_deform_attn.default: flash_deform_attn,
    }


def _constant(values: Any, dtype: ir.DataType) -> Value:
    constant: Any = ir.tensor(np.asarray(values, dtype.numpy()))
    return op.Constant(value=constant)


def _integers(*values: int) -> Value:
    return op.Constant(value_ints=values)


def _scalar(value: int) -> Value:
    return op.Constant(value_int=value)


def _compute_dtype(value: Value) -> ir.DataType:
    """Return the dtype of the computation: float32 for 16-bit tensors, as in the kernels."""
    return value.dtype if value.dtype in _WIDE else ir.DataType.FLOAT


def _cast(value: Value, dtype: ir.DataType) -> Value:
    return value if value.dtype == dtype else op.Cast(value, to=dtype.value)


def _window(parameters: Sequence[Any]) -> Window:
    values: list[Any] = [tuple(p) if isinstance(p, Sequence) else p for p in parameters]
    return Window(*values)


def _taps(window: Window) -> list[int | None]:
    """Return the index in offset_mask of each tap of the window, row by row; None if removed."""
    rows, columns = window.kernel_size
    order: list[int | None] = []
    for row in range(rows):
        for column in range(columns):
            tap = column * rows + row
            if window.remove_center:
                center = window.center_tap()
                order.append(None if tap == center else tap - (tap > center))
            else:
                order.append(tap)
    return order


def _zeros(value: Value, offset_mask: Value) -> Value:
    """Return the output of a window without taps, a 1 x 1 kernel whose center is removed."""
    shape = op.Concat(
        op.Shape(offset_mask, start=0, end=3), op.Shape(value, start=3, end=4), axis=0
    )
    return op.Expand(_constant(0, value.dtype), shape)


def _deform_conv(value: Value, offset_mask: Value, *parameters: Any) -> Value:
    recorder: Any = evaluator.default()  # of torch.onnx.export
    if recorder.opset.version < 19:
        raise ValueError(
            "opset_version must be at least 19 for the form 'deform_conv', got "
            f"{recorder.opset.version}; the form 'gather' needs 18"
        )
    window, dtype = _window(parameters), _compute_dtype(value)
    if not window.taps():
        return _zeros(value, offset_mask)
    rows, columns = window.kernel_size
    taps, order, center = window.taps(), _taps(window), window.center()
    offsets, shifts, scales, masks, kept = [], [], [], [], []
    for group in range(window.groups):
        first = 3 * taps * group
        for position, tap in enumerate(order):
            source = first + 2 * (tap or 0)
            scale = 0.0 if tap is None else window.offset_scale
            for axis, index in ((0, position // columns), (1, position % columns)):
                grid = index * window.dilation[axis] - center[axis]
                offsets.append(source + 1 - axis)
                shifts.append(scale * grid - grid)
                scales.append(scale)
            masks.append(first + 2 * taps + (tap or 0))
            kept.append(0.0 if tap is None else 1.0)

    def per_channel(values: Sequence[float]) -> Value:
        return _constant(np.reshape(values, (1, -1, 1, 1)), dtype)

    image = op.Transpose(_cast(value, dtype), perm=[0, 3, 1, 2])
    packed = op.Transpose(_cast(offset_mask, dtype), perm=[0, 3, 1, 2])
    offset = op.Gather(packed, _integers(*offsets), axis=1)
    offset = op.Add(op.Mul(offset, per_channel(scales)), per_channel(shifts))
    mask = op.Gather(packed, _integers(*masks), axis=1)
    if window.remove_center:
        mask = op.Mul(mask, per_channel(kept))
    channels = value.shape[3]
    output = opset19.DeformConv(
        image,
        _constant(np.ones((channels, 1, rows, columns)), dtype),
        offset,
        None,
        mask,
        kernel_shape=[rows, columns],
        strides=list(window.stride),
        pads=[*window.padding, *window.padding],
        dilations=list(window.dilation),
        group=channels,
        offset_group=window.groups,
    )
    return _cast_back(op.Transpose(output, perm=[0, 2, 3, 1]), value, dtype)


def _cast_back(output: Value, value: Value, dtype: ir.DataType) -> Value:
    return output if value.dtype == dtype else op.Cast(output, to=value.dtype.value)


def _sample(
    pixels: Value, x: Value, y: Value, weights: Value, shapes: Sequence[Value], dtype: ir.DataType
) -> Value:
    """Sum bilinear samples, with weights, over the last axis of the points.

    Args:
        pixels: (N, G, P, D).
        x: Horizontal coordinates in pixels, (N, G, ..., K).
        y: Vertical coordinates, likewise.
        weights: (N, G, ..., K).
        shapes: Height, width and first pixel of the images, int64, which broadcast with the points.
        dtype: Dtype of all but the shapes.

    Returns:
        (N, G, ..., D).
    """
    height, width, start = shapes
    zero, one, below = (_constant(number, dtype) for number in (0, 1, -1))
    real_height, real_width = (op.Cast(size, to=dtype.value) for size in (height, width))
    inside = op.And(
        op.And(op.Greater(y, below), op.Less(y, real_height)),
        op.And(op.Greater(x, below), op.Less(x, real_width)),
    )
    x, y = op.Where(inside, x, zero), op.Where(inside, y, zero)
    left, top = op.Floor(x), op.Floor(y)
    dx, dy = op.Sub(x, left), op.Sub(y, top)
    weights = op.Where(inside, weights, zero)
    origin = _integers(0)
    total: Value = None
    for row, weight_y in ((top, op.Sub(one, dy)), (op.Add(top, one), dy)):
        for column, weight_x in ((left, op.Sub(one, dx)), (op.Add(left, one), dx)):
            i, j = (op.Cast(index, to=ir.DataType.INT64.value) for index in (row, column))
            valid = op.And(
                op.And(op.GreaterOrEqual(i, origin), op.Less(i, height)),
                op.And(op.GreaterOrEqual(j, origin), op.Less(j, width)),
            )
            pixel = op.Where(valid, op.Add(start, op.Add(op.Mul(i, width), j)), origin)
            read = op.GatherND(pixels, op.Unsqueeze(pixel, _integers(-1)), batch_dims=2)
            weight = op.Where(valid, op.Mul(weights, op.Mul(weight_x, weight_y)), zero)
            samples = op.MatMul(op.Unsqueeze(weight, _integers(-2)), read)  # (N, G, ..., 1, D)
            total = samples if total is None else op.Add(total, samples)
    return op.Squeeze(total, _integers(-2))


def _dcnv4_by_gathers(value: Value, offset_mask: Value, *parameters: Any) -> Value:
    window, dtype = _window(parameters), _compute_dtype(value)
    taps, groups, center = window.taps(), window.groups, window.center()
    if not taps:
        return _zeros(value, offset_mask)
    packed = op.Slice(
        _cast(offset_mask, dtype), _integers(0), _integers(3 * groups * taps), _integers(-1)
    )
    packed = op.Reshape(packed, _integers(0, 0, 0, groups, 3 * taps))
    packed = op.Transpose(packed, perm=[0, 3, 1, 2, 4])
    order = sorted(tap for tap in _taps(window) if tap is not None)
    position = {tap: where for where, tap in enumerate(_taps(window))}

    def coordinates(axis: int) -> Value:
        index = [divmod(position[tap], window.kernel_size[1])[axis] for tap in order]
        grid = [i * window.dilation[axis] - center[axis] for i in index]
        offset = op.Gather(packed, _integers(*range(1 - axis, 2 * taps, 2)), axis=-1)
        out = op.Squeeze(op.Shape(offset_mask, start=1 + axis, end=2 + axis), _integers(0))
        first = op.Cast(op.Range(_scalar(0), out, _scalar(1)), to=dtype.value)
        first = op.Add(
            op.Mul(first, _constant(window.stride[axis], dtype)),
            _constant(center[axis] - window.padding[axis], dtype),
        )
        first = op.Unsqueeze(first, _integers(*((1, 2) if axis == 0 else (1,))))
        moved = op.Add(_constant(grid, dtype), offset)
        return op.Add(first, op.Mul(moved, _constant(window.offset_scale, dtype)))

    y, x = coordinates(0), coordinates(1)
    modulation = op.Gather(packed, _integers(*range(2 * taps, 3 * taps)), axis=-1)
    sizes = op.Shape(value, start=1, end=2), op.Shape(value, start=2, end=3)
    # An empty batch cannot be reshaped with -1, which onnxruntime would put in place of the product
    # if the size of the batch were that of the reshaped tensor.
    shape = op.Concat(
        op.Shape(offset_mask, start=0, end=1),
        op.Mul(*sizes),
        _integers(groups, value.shape[3] // groups),
        axis=0,
    )
    pixels = op.Reshape(_cast(value, dtype), shape)
    output = _sample(
        op.Transpose(pixels, perm=[0, 2, 1, 3]), x, y, modulation, (*sizes, _integers(0)), dtype
    )
    output = op.Transpose(output, perm=[0, 2, 3, 1, 4])
    return _cast_back(op.Reshape(output, _integers(0, 0, 0, value.shape[3])), value, dtype)


def _attend(
    value: Value, spatial_shapes: Value, level_start_index: Value, x: Value, y: Value,
    weights: Value, points: int,
) -> Value:  # fmt: skip
    """Sample values at points (N, M, Lq, L * K), given as fractions of their level."""
    dtype = _compute_dtype(value)

    def per_point(levels: Value) -> Value:
        repeated = op.Expand(op.Reshape(levels, _integers(-1, 1)), _integers(1, points))
        return op.Reshape(repeated, _integers(-1))

    height, width = (op.Gather(spatial_shapes, _scalar(i), axis=1) for i in (0, 1))
    shapes = [per_point(levels) for levels in (height, width, level_start_index)]
    half = _constant(0.5, dtype)
    y, x = (
        op.Sub(op.Mul(fraction, op.Cast(size, to=dtype.value)), half)
        for fraction, size in zip((y, x), shapes, strict=False)
    )
    pixels = op.Transpose(_cast(value, dtype), perm=[0, 2, 1, 3])
    output = op.Transpose(_sample(pixels, x, y, weights, shapes, dtype), perm=[0, 2, 1, 3])
    channels = value.shape[2] * value.shape[3]
    return _cast_back(op.Reshape(output, _integers(0, 0, channels)), value, dtype)


def ms_deform_attn(
    value: Value, spatial_shapes: Value, level_start_index: Value, sampling_locations: Value,
    attention_weights: Value,
) -> Value:  # fmt: skip
    """Translate :func:`ops_dcnv4.ms_deform_attn`."""
    dtype, (levels, points) = _compute_dtype(value), sampling_locations.shape[3:5]
    locations = _cast(sampling_locations, dtype)
    x, y, weights = (
        op.Transpose(op.Reshape(tensor, _integers(0, 0, 0, levels * points)), perm=[0, 2, 1, 3])
        for tensor in (
            op.Gather(locations, _scalar(0), axis=-1),
            op.Gather(locations, _scalar(1), axis=-1),
            _cast(attention_weights, dtype),
        )
    )
    return _attend(value, spatial_shapes, level_start_index, x, y, weights, points)


def flash_deform_attn(
    value: Value, spatial_shapes: Value, level_start_index: Value, sampling_loc_attn: Value,
    n_points: int,
) -> Value:  # fmt: skip
    """Translate :func:`ops_dcnv4.flash_deform_attn`."""
    dtype, count = _compute_dtype(value), sampling_loc_attn.shape[3] // 3
    packed = op.Transpose(_cast(sampling_loc_attn, dtype), perm=[0, 2, 1, 3])
    x, y, logits = (
        op.Gather(packed, _integers(*indices), axis=-1)
        for indices in (
            range(0, 2 * count, 2), range(1, 2 * count, 2), range(2 * count, 3 * count),
        )
    )  # fmt: skip
    weights = op.Softmax(logits, axis=-1)
    return _attend(value, spatial_shapes, level_start_index, x, y, weights, n_points)
