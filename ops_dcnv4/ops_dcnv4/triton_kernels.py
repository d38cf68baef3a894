"""The operators as Triton kernels, for GPUs where the compiled CUDA library is missing.

The functions are those of :mod:`ops_dcnv4.reference`, which spells out the formulas. The work is
divided into units of one output pixel and group, or one query and head. A program takes UNITS of an
image's units and CHANNELS of their channels at a time, and follows their points one by one.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

Pair = tuple[int, int]


# Bilinear samples


@triton.jit
def _neighbours(coordinate, size, in_range, INDEX: tl.constexpr):
    """Of the pixels before and after a coordinate: indices, whether they are inside, weights."""
    floor = tl.floor(coordinate)
    before, weight = floor.to(INDEX), coordinate - floor
    inside = in_range & (before >= 0), in_range & (before + 1 < size)
    index = tl.where(inside[0], before, 0), tl.where(inside[1], before + 1, 0)
    return index, inside, (1 - weight, weight)


@triton.jit
def _cell(x, y, height, width, exists, INDEX: tl.constexpr):
    """Columns and rows of the four pixels around points (x, y), each as from _neighbours."""
    # Not finite: every comparison is false, and zeros keep the arithmetic below free of NaN.
    in_range = exists & (y > -1) & (y < height) & (x > -1) & (x < width)
    x, y = tl.where(in_range, x, 0), tl.where(in_range, y, 0)
    return _neighbours(x, width, in_range, INDEX), _neighbours(y, height, in_range, INDEX)


@triton.jit
def _corner(cell, width, below: tl.constexpr, right: tl.constexpr):
    """One of a cell's four pixels: its index, whether it is inside, its weight's factors."""
    (columns, has_column, weights_x), (rows, has_row, weights_y) = cell
    index = rows[below] * width + columns[right]
    return index, has_row[below] & has_column[right], weights_x[right], weights_y[below]


@triton.jit
def _sample(image, width, stride, cell, modulation, channel, has_channel):
    """The samples of some channels times modulation, (UNITS, CHANNELS).

    `image` points at each unit's channels of the first pixel; pixels are `stride` apart.
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
    """Gradients of x, y and modulation, (UNITS,). Those of the pixels are added to grad_image."""
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
    return grad_x, grad_y, grad_modulation


# Launching

PROGRAM_BYTES = 128 * 16  # of one pixel per unit: 128 threads with 16 bytes each
MAX_CHANNELS = 128


def _launch(
    kernel,
    tensors: tuple[Tensor, ...],
    units: int,
    groups: int,
    group_channels: int,
    *sizes: int,
    in_order: bool = False,
    **constants,
) -> None:
    """Launches a kernel on `units` units of each image of the tensors, the first of which is value.

    In order, a program follows the units of one group one by one, so that sums do not change.
    """
    value = tensors[0]
    channels = min(triton.next_power_of_2(group_channels), MAX_CHANNELS)
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
            INDEX=tl.int32 if largest < 2**30 else tl.int64,  # within an image, and a bit beyond
            ACC=tl.float64 if value.dtype == torch.float64 else tl.float32,
            num_warps=1 if in_order else 4,
            **constants,
        )


def _empty(like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Memory for a result. Triton's interpreter cannot round to bfloat16: there, torch must."""
    interpreted = like.dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    dtype = torch.float32 if interpreted else like.dtype
    return like.new_empty(like.shape if shape is None else shape, dtype=dtype)


def _zeros(like: Tensor) -> Tensor:
    """Memory for sums, which are rounded afterwards."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_zeros(like.shape, dtype=dtype)


# DCNv4


@dataclass(frozen=True)
class _Window:
    """Where taps lie: at stride * pixel + start + scale * (dilation * tap - center + offset)."""

    rows: int
    taps: int
    removed: int  # the place in the window that remove_center drops
    stride: Pair
    start: Pair
    dilation: Pair
    center: Pair
    scale: float


def _window(
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    offset_scale: float,
    remove_center: bool,
) -> _Window:
    rows, columns = kernel_size
    taps = rows * columns - bool(remove_center)
    center = [d * (k - 1) // 2 for d, k in zip(dilation, kernel_size, strict=True)]
    return _Window(
        rows,
        taps,
        removed=columns // 2 * rows + rows // 2 if remove_center else taps,
        stride=tuple(stride),
        start=tuple(c - p for c, p in zip(center, padding, strict=True)),
        dilation=tuple(dilation),
        center=tuple(center),
        scale=float(offset_scale),
    )


def _sizes(value: Tensor, offset_mask: Tensor, groups: int) -> tuple[int, ...]:
    """Arguments of _launch, from `units` on."""
    _, height, width, channels = value.shape
    _, height_out, width_out, offset_channels = offset_mask.shape
    units = height_out * width_out * groups
    return units, groups, channels // groups, height, width, width_out, offset_channels


@triton.jit
def _tap(offsets, tap, row, column, exists, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """Coordinates and modulation of a tap; `offsets` points at each unit's part of offset_mask."""
    in_window = tl.where(tap >= WINDOW.removed, tap + 1, tap)
    grid_x = in_window // WINDOW.rows * WINDOW.dilation[1] - WINDOW.center[1]
    grid_y = in_window % WINDOW.rows * WINDOW.dilation[0] - WINDOW.center[0]
    dx = tl.load(offsets + 2 * tap, exists, other=0).to(ACC)
    dy = tl.load(offsets + 2 * tap + 1, exists, other=0).to(ACC)
    modulation = tl.load(offsets + 2 * WINDOW.taps + tap, exists, other=0).to(ACC)
    x = (column * WINDOW.stride[1] + WINDOW.start[1]).to(ACC) + WINDOW.scale * (grid_x + dx)
    y = (row * WINDOW.stride[0] + WINDOW.start[0]).to(ACC) + WINDOW.scale * (grid_y + dy)
    return x, y, modulation


@triton.jit
def _dcnv4_kernel(
    value, offset_mask, output,
    programs, units, groups, height, width, width_out, offset_channels,
    WINDOW: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
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
    offsets = offset_mask + (pixel * offset_channels + group * (3 * WINDOW.taps))
    output += image * units * GROUP_CHANNELS
    for first in range(0, GROUP_CHANNELS, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        has_channel = channel < GROUP_CHANNELS
        total = tl.zeros([UNITS, CHANNELS], ACC)
        for tap in range(WINDOW.taps):
            x, y, modulation = _tap(offsets, tap, row, column, exists, WINDOW, ACC)
            cell = _cell(x, y, height, width, exists, INDEX)
            pixels = value + group * GROUP_CHANNELS
            total += _sample(pixels, width, stride, cell, modulation, channel, has_channel)
        where = (unit * GROUP_CHANNELS)[:, None] + channel[None, :]
        tl.store(output + where, total, exists[:, None] & has_channel[None, :])


def dcnv4(
    value: Tensor,
    offset_mask: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> Tensor:
    """The operator; arguments as in :func:`ops_dcnv4.dcnv4`."""
    value, offset_mask = value.contiguous(), offset_mask.contiguous()
    output = _empty(value, (*offset_mask.shape[:3], value.shape[3]))
    if output.numel():
        _launch(
            _dcnv4_kernel,
            (value, offset_mask, output),
            *_sizes(value, offset_mask, groups),
            WINDOW=_window(kernel_size, stride, padding, dilation, offset_scale, remove_center),
        )
    return output.to(value.dtype)
