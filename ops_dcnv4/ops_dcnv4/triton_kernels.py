"""Triton kernels of the operators, for GPUs without the compiled CUDA library.

The functions match those of :mod:`ops_dcnv4.reference`, which states the formulas. A unit of work
is one output pixel and group, or one query and head. A program processes UNITS units of one image
and CHANNELS of their channels at a time, and iterates over the points.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .window import Pair, Window

# Bilinear samples


@triton.jit
def _neighbors(coordinate, size, in_range, INDEX: tl.constexpr):
    """Return indices, inside flags and weights of the pixels before and after a coordinate."""
    floor = tl.floor(coordinate)
    before, weight = floor.to(INDEX), coordinate - floor
    inside = in_range & (before >= 0), in_range & (before + 1 < size)
    index = tl.where(inside[0], before, 0), tl.where(inside[1], before + 1, 0)
    return index, inside, (1 - weight, weight)


@triton.jit
def _cell(x, y, height, width, exists, INDEX: tl.constexpr):
    """Return columns and rows of the four pixels around points (x, y), each as _neighbors does."""
    # NaN and infinite points fail the comparisons. Zeros keep NaN out of the weights.
    in_range = exists & (y > -1) & (y < height) & (x > -1) & (x < width)
    x, y = tl.where(in_range, x, 0), tl.where(in_range, y, 0)
    return _neighbors(x, width, in_range, INDEX), _neighbors(y, height, in_range, INDEX)


@triton.jit
def _corner(cell, width, below: tl.constexpr, right: tl.constexpr):
    """Return index, inside flag and the two factors of the weight of one pixel of a cell."""
    columns, has_column, weights_x = cell[0]
    rows, has_row, weights_y = cell[1]
    index = rows[below] * width + columns[right]
    return index, has_row[below] & has_column[right], weights_x[right], weights_y[below]


@triton.jit
def _sample(image, width, stride, cell, modulation, channel, has_channel):
    """Return the modulated samples of a block of channels, of shape (UNITS, CHANNELS).

    `image` points to each unit's channels in the first pixel; pixels are `stride` elements apart.
    """
    sample = tl.zeros([modulation.shape[0], channel.shape[0]], modulation.dtype)
    for below in tl.static_range(2):
        for right in tl.static_range(2):
            index, inside, weight_x, weight_y = _corner(cell, width, below, right)
            where = (image + index * stride)[:, None] + channel[None, :]
            pixel = tl.load(where, inside[:, None] & has_channel[None, :], other=0)
            weight = tl.where(inside, weight_x * weight_y * modulation, 0)
            sample += weight[:, None] * pixel.to(modulation.dtype)
    return sample


@triton.jit
def _sample_backward(
    grad_output, image, grad_image, width, stride, cell, modulation, exists,
    GROUP_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return the gradients of x, y and modulation; add the pixels' gradients to `grad_image`.

    The returned gradients have shape (UNITS,).
    """
    ACC: tl.constexpr = modulation.dtype
    grad_x, grad_y = tl.zeros_like(modulation), tl.zeros_like(modulation)
    grad_modulation = tl.zeros_like(modulation)
    for first in range(0, GROUP_CHANNELS, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        has_channel = channel < GROUP_CHANNELS
        mask = exists[:, None] & has_channel[None, :]
        grad = tl.load(grad_output[:, None] + channel[None, :], mask, other=0).to(ACC)
        for below in tl.static_range(2):
            for right in tl.static_range(2):
                index, inside, weight_x, weight_y = _corner(cell, width, below, right)
                where = (index * stride)[:, None] + channel[None, :]
                mask = inside[:, None] & has_channel[None, :]
                pixel = tl.load(image[:, None] + where, mask, other=0).to(ACC)
                product = tl.where(inside, tl.sum(pixel * grad, axis=1), 0)
                slope = tl.where(inside, modulation * product, 0)
                grad_x += (weight_y if right else -weight_y) * slope
                grad_y += (weight_x if below else -weight_x) * slope
                grad_modulation += weight_x * weight_y * product
                weight = tl.where(inside, weight_x * weight_y * modulation, 0)
                share = weight[:, None] * grad
                tl.atomic_add(grad_image[:, None] + where, share, mask, sem="relaxed")
    if modulation.shape[0] == 1:  # deterministic mode: finish before the next point adds
        tl.debug_barrier()
    return grad_x, grad_y, grad_modulation


# Launching

PROGRAM_BYTES = 128 * 16  # that a program loads per corner: 16 in each of 128 threads
MAX_CHANNELS = 128
MAX_INT32 = 2**30  # leaves room for unit indices beyond the last unit of an image


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    units: int,
    groups: int,
    group_channels: int,
    *sizes: int,
    in_order: bool = False,
    **constants: Any,
) -> None:
    """Launch a kernel on `units` units per image.

    Args:
        kernel: Triton kernel.
        tensors: Tensors to pass to the kernel, starting with value.
        units: Number of units per image.
        groups: Number of channel groups or heads.
        group_channels: Number of channels per group or head.
        *sizes: Further sizes to pass to the kernel.
        in_order: Let one program process all units of a group one by one, so that gradients are
            summed in a deterministic order.
        **constants: Further compile-time constants of the kernel.
    """
    value = tensors[0]
    if value.shape[0] * units == 0:
        return
    channels = triton.next_power_of_2(min(max(group_channels, 1), MAX_CHANNELS))
    block = 1 if in_order else PROGRAM_BYTES // value.element_size() // channels
    programs = groups if in_order else triton.cdiv(units, block)
    largest = max(tensor.numel() for tensor in tensors) // value.shape[0]
    with torch.cuda.device_of(value):
        kernel[(value.shape[0] * programs,)](
            *tensors,
            programs,
            units,
            groups,
            *sizes,
            GROUP_CHANNELS=group_channels,
            UNITS=block,
            CHANNELS=channels,
            INDEX=tl.int32 if largest <= MAX_INT32 else tl.int64,
            ACC=tl.float64 if value.dtype == torch.float64 else tl.float32,
            num_warps=1 if in_order else 4,
            **constants,
        )


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _empty(like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Allocate a result.

    Triton's interpreter cannot round to bfloat16, so there the result is float32 and cast later.
    """
    interpreted = like.dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    dtype = torch.float32 if interpreted else like.dtype
    return like.new_empty(like.shape if shape is None else shape, dtype=dtype)


def _zeros(like: Tensor) -> Tensor:
    """Allocate an accumulator, at least float32, that is cast to the result's dtype later."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_zeros(like.shape, dtype=dtype)


# DCNv4


@dataclass(frozen=True)
class _Geometry:
    """Regular grid of sampling points, before the offsets.

    Taps are at stride * pixel + start + scale * (dilation * tap - center + offset).
    """

    rows: int
    taps: int
    removed: int  # index of the tap that remove_center omits; taps if none
    stride: Pair
    start: Pair
    dilation: Pair
    center: Pair
    scale: float


def _geometry(window: Window) -> _Geometry:
    taps, center, padding = window.taps(), window.center(), window.padding
    return _Geometry(
        rows=window.kernel_size[0],
        taps=taps,
        removed=window.center_tap() if window.remove_center else taps,
        stride=(window.stride[0], window.stride[1]),
        start=(center[0] - padding[0], center[1] - padding[1]),
        dilation=(window.dilation[0], window.dilation[1]),
        center=center,
        scale=float(window.offset_scale),
    )


def _sizes(value: Tensor, offset_mask: Tensor, groups: int) -> tuple[int, ...]:
    """Return the arguments of _launch from `units` on."""
    _, height, width, channels = value.shape
    _, height_out, width_out, offset_channels = offset_mask.shape
    units = height_out * width_out * groups
    return units, groups, channels // groups, height, width, width_out, offset_channels


@triton.jit
def _tap(offsets, tap, row, column, exists, GEOMETRY: tl.constexpr, ACC: tl.constexpr):
    """Return x, y and modulation of a tap; `offsets` points to each unit's part of offset_mask."""
    in_window = tl.where(tap >= GEOMETRY.removed, tap + 1, tap)
    grid_x = in_window // GEOMETRY.rows * GEOMETRY.dilation[1] - GEOMETRY.center[1]
    grid_y = in_window % GEOMETRY.rows * GEOMETRY.dilation[0] - GEOMETRY.center[0]
    dx = tl.load(offsets + 2 * tap, exists, other=0).to(ACC)
    dy = tl.load(offsets + 2 * tap + 1, exists, other=0).to(ACC)
    modulation = tl.load(offsets + 2 * GEOMETRY.taps + tap, exists, other=0).to(ACC)
    x = (column * GEOMETRY.stride[1] + GEOMETRY.start[1]).to(ACC) + GEOMETRY.scale * (grid_x + dx)
    y = (row * GEOMETRY.stride[0] + GEOMETRY.start[0]).to(ACC) + GEOMETRY.scale * (grid_y + dy)
    return x, y, modulation


@triton.jit
def _dcnv4_kernel(
    value, offset_mask, output,
    programs, units, groups, height, width, width_out, offset_channels,
    GEOMETRY: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    UNITS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // programs).to(tl.int64)
    unit = tl.program_id(0) % programs * UNITS + tl.arange(0, UNITS).to(INDEX)
    exists = unit < units
    pixel, group = unit // groups, unit % groups
    row, column = pixel // width_out, pixel % width_out
    stride = groups * GROUP_CHANNELS
    value += image * height * width * stride
    offset_mask += image * (units // groups) * offset_channels
    offsets = offset_mask + (pixel * offset_channels + group * (3 * GEOMETRY.taps))
    output += image * units * GROUP_CHANNELS
    for first in range(0, GROUP_CHANNELS, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        has_channel = channel < GROUP_CHANNELS
        total = tl.zeros([UNITS, CHANNELS], ACC)
        for tap in range(GEOMETRY.taps):
            x, y, modulation = _tap(offsets, tap, row, column, exists, GEOMETRY, ACC)
            cell = _cell(x, y, height, width, exists, INDEX)
            pixels = value + group * GROUP_CHANNELS
            total += _sample(pixels, width, stride, cell, modulation, channel, has_channel)
        where = (unit * GROUP_CHANNELS)[:, None] + channel[None, :]
        tl.store(output + where, total, exists[:, None] & has_channel[None, :])


@triton.jit
def _dcnv4_backward_kernel(
    value, offset_mask, grad_output, grad_value, grad_offset_mask,
    programs, units, groups, height, width, width_out, offset_channels,
    GEOMETRY: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    UNITS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // programs).to(tl.int64)
    stride = groups * GROUP_CHANNELS
    value += image * height * width * stride
    grad_value += image * height * width * stride
    grad_output += image * units * GROUP_CHANNELS
    offset_mask += image * (units // groups) * offset_channels
    grad_offset_mask += image * (units // groups) * offset_channels
    for first in range(tl.program_id(0) % programs * UNITS, units, programs * UNITS):
        unit = first + tl.arange(0, UNITS).to(INDEX)
        exists = unit < units
        pixel, group = unit // groups, unit % groups
        row, column = pixel // width_out, pixel % width_out
        channel = group * GROUP_CHANNELS
        offset = pixel * offset_channels + group * (3 * GEOMETRY.taps)
        for tap in range(GEOMETRY.taps):
            x, y, modulation = _tap(offset_mask + offset, tap, row, column, exists, GEOMETRY, ACC)
            grad_x, grad_y, grad_modulation = _sample_backward(
                grad_output + unit * GROUP_CHANNELS, value + channel, grad_value + channel,
                width, stride, _cell(x, y, height, width, exists, INDEX), modulation, exists,
                GROUP_CHANNELS, CHANNELS,
            )  # fmt: skip
            grad_offsets = grad_offset_mask + offset
            tl.store(grad_offsets + 2 * tap, GEOMETRY.scale * grad_x, exists)
            tl.store(grad_offsets + 2 * tap + 1, GEOMETRY.scale * grad_y, exists)
            tl.store(grad_offsets + 2 * GEOMETRY.taps + tap, grad_modulation, exists)


def dcnv4(value: Tensor, offset_mask: Tensor, *parameters: Any) -> Tensor:
    """Compute DCNv4; arguments as in :func:`ops_dcnv4.dcnv4`."""
    window = Window(*parameters)
    value, offset_mask = _contiguous(value, offset_mask)
    output = _empty(value, (*offset_mask.shape[:3], value.shape[3]))
    _launch(
        _dcnv4_kernel,
        (value, offset_mask, output),
        *_sizes(value, offset_mask, window.groups),
        GEOMETRY=_geometry(window),
    )
    return output.to(value.dtype)


def dcnv4_backward(
    grad_output: Tensor,
    value: Tensor,
    offset_mask: Tensor,
    *parameters: Any,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of value and offset_mask, in their shapes and dtypes."""
    window = Window(*parameters)
    tensors = value, offset_mask, grad_output = _contiguous(value, offset_mask, grad_output)
    grad_value, grad_offset_mask = _zeros(value), _empty(offset_mask)
    grad_offset_mask[..., 3 * window.groups * window.taps() :] = 0
    _launch(
        _dcnv4_backward_kernel,
        (*tensors, grad_value, grad_offset_mask),
        *_sizes(value, offset_mask, window.groups),
        in_order=deterministic or torch.are_deterministic_algorithms_enabled(),
        GEOMETRY=_geometry(window),
    )
    return grad_value.to(value.dtype), grad_offset_mask.to(offset_mask.dtype)


# Multi-scale deformable attention


@triton.jit
def _level(spatial_shapes, level_start_index, level, pixels, INDEX: tl.constexpr):
    """Return height, width and first pixel of a level; a level that exceeds value has size 0."""
    height = tl.load(spatial_shapes + 2 * level)
    width = tl.load(spatial_shapes + 2 * level + 1)
    start = tl.load(level_start_index + level)
    lies_in_value = (height > 0) & (width > 0) & (height <= pixels // tl.maximum(width, 1))
    lies_in_value &= (start >= 0) & (start <= pixels - height * width)
    height, width = tl.where(lies_in_value, height, 0), tl.where(lies_in_value, width, 0)
    return height.to(INDEX), width.to(INDEX), tl.where(lies_in_value, start, 0).to(INDEX)


@triton.jit
def _softmax(logits, count, exists, SOFTMAX: tl.constexpr, ACC: tl.constexpr):
    """Return each unit's largest logit and sum of exponentials; both are unused without SOFTMAX."""
    largest = tl.full([exists.shape[0]], float("-inf"), ACC)
    total = tl.zeros([exists.shape[0]], ACC)
    if SOFTMAX:
        for point in range(count):
            largest = tl.maximum(largest, tl.load(logits + point, exists, other=0).to(ACC))
        for point in range(count):
            total += tl.exp(tl.load(logits + point, exists, other=0).to(ACC) - largest)
    return largest, total


@triton.jit
def _weight(weights, point, exists, softmax, SOFTMAX: tl.constexpr, ACC: tl.constexpr):
    """Return the attention weights of a point; `softmax` is the result of _softmax."""
    weight = tl.load(weights + point, exists, other=0).to(ACC)
    if SOFTMAX:
        weight = tl.exp(weight - softmax[0]) / softmax[1]
    return weight


@triton.jit
def _location(locations, point, height, width, exists, INDEX: tl.constexpr, ACC: tl.constexpr):
    """Return the cell around a point."""
    x = tl.load(locations + 2 * point, exists, other=0).to(ACC) * width - 0.5
    y = tl.load(locations + 2 * point + 1, exists, other=0).to(ACC) * height - 0.5
    return _cell(x, y, height, width, exists, INDEX)


@triton.jit
def _attention_kernel(
    value, spatial_shapes, level_start_index, locations, weights, output,
    programs, units, heads, pixels, levels, points, location_stride, weight_stride,
    SOFTMAX: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    UNITS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // programs).to(tl.int64)
    unit = tl.program_id(0) % programs * UNITS + tl.arange(0, UNITS).to(INDEX)
    exists = unit < units
    stride = heads * GROUP_CHANNELS
    value += image * pixels * stride
    output += image * units * GROUP_CHANNELS
    locations = locations + image * units * location_stride + unit * location_stride
    weights = weights + image * units * weight_stride + unit * weight_stride
    softmax = _softmax(weights, levels * points, exists, SOFTMAX, ACC)
    for first in range(0, GROUP_CHANNELS, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        has_channel = channel < GROUP_CHANNELS
        total = tl.zeros([UNITS, CHANNELS], ACC)
        for level in range(levels):
            height, width, start = _level(spatial_shapes, level_start_index, level, pixels, INDEX)
            image_of_level = value + (unit % heads * GROUP_CHANNELS + start * stride)
            for point in range(level * points, level * points + points):
                cell = _location(locations, point, height, width, exists, INDEX, ACC)
                weight = _weight(weights, point, exists, softmax, SOFTMAX, ACC)
                total += _sample(image_of_level, width, stride, cell, weight, channel, has_channel)
        where = (unit * GROUP_CHANNELS)[:, None] + channel[None, :]
        tl.store(output + where, total, exists[:, None] & has_channel[None, :])


@triton.jit
def _attention_backward_kernel(
    value, spatial_shapes, level_start_index, locations, weights,
    grad_output, grad_value, grad_locations, grad_weights,
    programs, units, heads, pixels, levels, points, location_stride, weight_stride,
    SOFTMAX: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    UNITS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // programs).to(tl.int64)
    stride = heads * GROUP_CHANNELS
    value += image * pixels * stride
    grad_value += image * pixels * stride
    grad_output += image * units * GROUP_CHANNELS
    locations += image * units * location_stride
    grad_locations += image * units * location_stride
    weights += image * units * weight_stride
    grad_weights += image * units * weight_stride
    for first in range(tl.program_id(0) % programs * UNITS, units, programs * UNITS):
        unit = first + tl.arange(0, UNITS).to(INDEX)
        exists = unit < units
        own_locations, own_weights = unit * location_stride, unit * weight_stride
        softmax = _softmax(weights + own_weights, levels * points, exists, SOFTMAX, ACC)
        mean = tl.zeros([UNITS], ACC)
        for level in range(levels):
            height, width, start = _level(spatial_shapes, level_start_index, level, pixels, INDEX)
            channel = unit % heads * GROUP_CHANNELS + start * stride
            for point in range(level * points, level * points + points):
                weight = _weight(weights + own_weights, point, exists, softmax, SOFTMAX, ACC)
                grad_x, grad_y, grad_weight = _sample_backward(
                    grad_output + unit * GROUP_CHANNELS, value + channel, grad_value + channel,
                    width, stride,
                    _location(locations + own_locations, point, height, width, exists, INDEX, ACC),
                    weight, exists, GROUP_CHANNELS, CHANNELS,
                )  # fmt: skip
                tl.store(grad_locations + own_locations + 2 * point, width * grad_x, exists)
                tl.store(grad_locations + own_locations + 2 * point + 1, height * grad_y, exists)
                tl.store(grad_weights + own_weights + point, grad_weight, exists)
                mean += weight * grad_weight
        if SOFTMAX:
            # Other threads may have stored the weight gradients that are read and replaced below.
            tl.debug_barrier()
            for point in range(levels * points):
                weight = _weight(weights + own_weights, point, exists, softmax, SOFTMAX, ACC)
                grad_logits = grad_weights + own_weights + point
                grad_weight = tl.load(grad_logits, exists, other=0)
                tl.store(grad_logits, weight * (grad_weight - mean), exists)


def _attention_sizes(
    value: Tensor, spatial_shapes: Tensor, queries: int, points: int, packed: bool
) -> tuple[int, ...]:
    """Return the arguments of _launch from `units` on.

    If packed, locations and weights share one tensor.
    """
    _, pixels, heads, channels = value.shape
    levels = len(spatial_shapes)
    count = levels * points
    strides = (3 * count, 3 * count) if packed else (2 * count, count)
    return queries * heads, heads, channels, pixels, levels, points, *strides


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute deformable attention; arguments as in :func:`ops_dcnv4.ms_deform_attn`."""
    tensors = value, spatial_shapes, *_ = _contiguous(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    output = _empty(value, (value.shape[0], queries, value.shape[2] * value.shape[3]))
    sizes = _attention_sizes(value, spatial_shapes, queries, points, packed=False)
    _launch(_attention_kernel, (*tensors, output), *sizes, SOFTMAX=False)
    return output.to(value.dtype)


def ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights, in their shapes and dtypes."""
    inputs = value, sampling_locations, attention_weights
    tensors = _contiguous(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights, grad_output
    )
    grads = _zeros(value), _empty(sampling_locations), _empty(attention_weights)
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    sizes = _attention_sizes(value, spatial_shapes, queries, points, packed=False)
    _launch(
        _attention_backward_kernel,
        (*tensors, *grads),
        *sizes,
        in_order=deterministic or torch.are_deterministic_algorithms_enabled(),
        SOFTMAX=False,
    )
    grad_value, grad_locations, grad_weights = (
        grad.to(tensor.dtype) for grad, tensor in zip(grads, inputs, strict=True)
    )
    return grad_value, grad_locations, grad_weights


def flash_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc_attn: Tensor,
    n_points: int,
) -> Tensor:
    """Compute fused attention; arguments as in :func:`ops_dcnv4.flash_deform_attn`."""
    *tensors, packed = _contiguous(value, spatial_shapes, level_start_index, sampling_loc_attn)
    logits = packed[..., 2 * len(spatial_shapes) * n_points :]
    queries = packed.shape[1]
    output = _empty(value, (value.shape[0], queries, value.shape[2] * value.shape[3]))
    sizes = _attention_sizes(value, spatial_shapes, queries, n_points, packed=True)
    _launch(_attention_kernel, (*tensors, packed, logits, output), *sizes, SOFTMAX=True)
    return output.to(value.dtype)


def flash_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc_attn: Tensor,
    n_points: int,
    *,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of value and sampling_loc_attn, in their shapes and dtypes."""
    *tensors, packed, grad_output = _contiguous(
        value, spatial_shapes, level_start_index, sampling_loc_attn, grad_output
    )
    first_logit = 2 * len(spatial_shapes) * n_points
    # grad_packed holds intermediate results too, so it is not rounded to 16 bits.
    grad_value, grad_packed = _zeros(value), _zeros(packed)
    sizes = _attention_sizes(value, spatial_shapes, packed.shape[1], n_points, packed=True)
    _launch(
        _attention_backward_kernel,
        (
            *tensors, packed, packed[..., first_logit:], grad_output,
            grad_value, grad_packed, grad_packed[..., first_logit:],
        ),
        *sizes,
        in_order=deterministic or torch.are_deterministic_algorithms_enabled(),
        SOFTMAX=True,
    )  # fmt: skip
    return grad_value.to(value.dtype), grad_packed.to(sampling_loc_attn.dtype)
