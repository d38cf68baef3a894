"""Plain PyTorch implementation of the operators: the specification of all backends.

**DCNv4.** For output pixel (r, c), group g and kernel tap k in column i and row j of the window,

    x = c * stride_w - padding_w + center_w + offset_scale * (i * dilation_w - center_w + dx[k])
    y = r * stride_h - padding_h + center_h + offset_scale * (j * dilation_h - center_h + dy[k])
    output[r, c, g] = sum over k of modulation[k] * bilinear(value[:, :, g], y, x)

with center = dilation * (kernel_size - 1) // 2. The modulation is not normalized (DCNv4,
arXiv:2401.06197, section 3.1). Taps are ordered column by column; remove_center omits the center
tap. With K taps, group g owns channels [3*K*g, 3*K*(g + 1)) of offset_mask: K pairs (dx, dy), then
K modulation scalars. Channels from 3*K*groups on are padding.

**Multi-scale deformable attention** (Deformable DETR, arXiv:2010.04159, section 4.1, equation 3,
without the projections). For query q, head m and point k of level l, which has H_l x W_l pixels and
starts at pixel level_start_index[l] of value,

    x = sampling_locations[q, m, l, k, 0] * W_l - 0.5
    y = sampling_locations[q, m, l, k, 1] * H_l - 0.5
    output[q, m] = sum over l, k of attention_weights[q, m, l, k] * bilinear(value_l[:, m], y, x)

The fused form packs, for each query and head, 2*L*K location coordinates in that order, then L*K
logits. The weights are the softmax of the logits over all levels and points.

**Both.** A point contributes if -1 < y < H and -1 < x < W; of its four neighboring pixels, those
outside the image count as zero. Gradients are those of the cell that starts at floor(coordinate).
Float16 and bfloat16 are computed in float32.

The functions modify nothing in place and create no constants, so that they can serve as
decompositions of the operators in exported and traced graphs. For runtimes such as Core ML, the
forward pass of DCNv4 has tensors of at most five dimensions, and only operators that coremltools
knows: no `&`, no scalars in `torch.where`, and no slices of the whole tensor.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .window import Window


class Corner(NamedTuple):
    """One of the four pixels around each sampling point; all tensors have the points' shape."""

    pixel: Tensor  # index in the image or levels; 0 if the pixel is outside
    inside: Tensor
    weight: Tensor
    weight_dx: Tensor  # derivative of the weight with respect to x
    weight_dy: Tensor


def sampling_points(offset_mask: Tensor, *parameters: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sampling points of DCNv4; arguments as in :func:`ops_dcnv4.dcnv4`.

    Returns:
        x and y in pixels, and the modulation, each of shape (N, H_out, W_out, G, K).
    """
    window = Window(*parameters)
    height_out, width_out = offset_mask.shape[1:3]
    device = offset_mask.device
    taps, center = window.taps(), window.center()
    tap = torch.arange(taps, device=device)
    if window.remove_center:
        tap = tap + (tap >= window.center_tap())
    channels = 3 * window.groups * taps
    packed = offset_mask if offset_mask.shape[-1] == channels else offset_mask[..., :channels]
    packed = packed.unflatten(-1, (window.groups, 3 * taps))
    offsets, modulation = packed.split([2 * taps, taps], dim=-1)

    def coordinates(axis: int, out: int, step: Tensor, offset: Tensor) -> Tensor:
        start = torch.arange(out, device=device) * window.stride[axis]
        start = start - window.padding[axis] + center[axis]
        grid = step * window.dilation[axis] - center[axis]
        shape = (-1, 1, 1, 1) if axis == 0 else (-1, 1, 1)
        start, grid = start.to(offset.dtype).view(shape), grid.to(offset.dtype)
        return start + window.offset_scale * (grid + offset)

    rows = window.kernel_size[0]
    x = coordinates(1, width_out, tap // rows, offsets[..., 0::2])
    y = coordinates(0, height_out, tap % rows, offsets[..., 1::2])
    return x, y, modulation


def _all(*conditions: Tensor) -> Tensor:
    return functools.reduce(torch.logical_and, conditions)


def _zero_unless(condition: Tensor, x: Tensor) -> Tensor:
    return torch.where(condition, x, torch.full((), 0, dtype=x.dtype, device=x.device))


def corners(
    x: Tensor, y: Tensor, height: int | Tensor, width: int | Tensor, start: int | Tensor = 0
) -> Iterator[Corner]:
    """Yield the four pixels around the points (x, y), with their bilinear weights.

    Args:
        x: Horizontal coordinates in pixels.
        y: Vertical coordinates in pixels.
        height: Height of the image; an int, or a tensor that broadcasts with the points.
        width: Width of the image, likewise.
        start: Index of the first pixel of the image, likewise.
    """
    # NaN and infinite points fail the comparisons. Zeros keep NaN out of the weights.
    in_range = _all(y > -1, y < height, x > -1, x < width)
    x, y = _zero_unless(in_range, x), _zero_unless(in_range, y)
    left, top = x.floor(), y.floor()
    dx, dy = x - left, y - top
    for below in (0, 1):
        for right in (0, 1):
            row, column = (top + below).long(), (left + right).long()
            inside = _all(in_range, row >= 0, row < height, column >= 0, column < width)
            weight_x, weight_y = (dx if right else 1 - dx), (dy if below else 1 - dy)
            yield Corner(
                pixel=_zero_unless(inside, start + row * width + column),
                inside=inside,
                weight=weight_x * weight_y,
                weight_dx=weight_y if right else -weight_y,
                weight_dy=weight_x if below else -weight_x,
            )


def gather_index(corner: Corner) -> tuple[Tensor, Tensor, Tensor]:
    """Return the index into pixels (N, P, G, D) that reads a corner of points (N, ..., G, K)."""
    shape, device = corner.pixel.shape, corner.pixel.device
    image = torch.arange(shape[0], device=device).view(-1, *[1] * (len(shape) - 1))
    group = torch.arange(shape[-2], device=device).view(-1, 1)
    return image, corner.pixel, group


def gather(pixels: Tensor, corner: Corner) -> Tensor:
    """Read pixels (N, P, G, D) at a corner of points (N, ..., G, K), zero outside the image."""
    return _zero_unless(corner.inside[..., None], pixels[gather_index(corner)])


def aggregate(pixels: Tensor, around: Iterator[Corner], modulation: Tensor) -> Tensor:
    """Sum the samples of pixels (N, P, G, D), weighted by modulation (N, ..., G, K), over K."""
    output = pixels.new_zeros((*modulation.shape[:-1], pixels.shape[-1]))
    for corner in around:
        weight = _zero_unless(corner.inside, corner.weight * modulation)
        output = output + (weight[..., None] * gather(pixels, corner)).sum(-2)
    return output


def aggregate_backward(
    grad: Tensor, pixels: Tensor, around: Iterator[Corner], modulation: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of pixels, x, y and modulation, given `grad` (N, ..., G, D)."""
    grad = grad.unsqueeze(-2)
    grad_pixels = torch.zeros_like(pixels)
    grad_x = grad_y = grad_modulation = torch.zeros_like(modulation)
    for corner in around:
        weight = _zero_unless(corner.inside, corner.weight * modulation)
        where = tuple(t.expand_as(weight) for t in gather_index(corner))
        spread = _zero_unless(corner.inside[..., None], weight[..., None] * grad)
        grad_pixels = grad_pixels.index_put(where, spread, accumulate=True)
        product = _zero_unless(corner.inside, (gather(pixels, corner) * grad).sum(-1))
        slope = _zero_unless(corner.inside, modulation * product)
        grad_x = grad_x + corner.weight_dx * slope
        grad_y = grad_y + corner.weight_dy * slope
        grad_modulation = grad_modulation + corner.weight * product
    return grad_pixels, grad_x, grad_y, grad_modulation


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of `dtype` are computed and accumulated."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def dcnv4(value: Tensor, offset_mask: Tensor, *parameters: Any) -> Tensor:
    """Compute DCNv4; arguments as in :func:`ops_dcnv4.dcnv4`. Differentiable by autograd."""
    window, dtype = Window(*parameters), compute_dtype(value.dtype)
    points = sampling_points(offset_mask.to(dtype), *window)
    x, y, modulation = (t.flatten(1, 2) for t in points)
    pixels = value.to(dtype).flatten(1, 2).unflatten(-1, (window.groups, -1))
    output = aggregate(pixels, corners(x, y, *value.shape[1:3]), modulation)
    return output.flatten(-2).unflatten(1, offset_mask.shape[1:3]).to(value.dtype)


def dcnv4_backward(
    grad_output: Tensor, value: Tensor, offset_mask: Tensor, *parameters: Any
) -> tuple[Tensor, Tensor]:
    """Return the gradients of value and offset_mask, in their shapes and dtypes."""
    window, dtype = Window(*parameters), compute_dtype(value.dtype)
    x, y, modulation = sampling_points(offset_mask.to(dtype), *window)
    grad_pixels, grad_x, grad_y, grad_modulation = aggregate_backward(
        grad_output.to(dtype).unflatten(-1, (window.groups, -1)),
        value.to(dtype).flatten(1, 2).unflatten(-1, (window.groups, -1)),
        corners(x, y, *value.shape[1:3]),
        modulation,
    )
    grad_offsets = window.offset_scale * torch.stack((grad_x, grad_y), dim=-1).flatten(-2)
    grad_packed = torch.cat((grad_offsets, grad_modulation), dim=-1).flatten(-2)
    padding_channels = offset_mask.shape[-1] - grad_packed.shape[-1]
    grad_offset_mask = F.pad(grad_packed, (0, padding_channels)).to(offset_mask.dtype)
    return grad_pixels.reshape(value.shape).to(value.dtype), grad_offset_mask


def corners_of_levels(
    sampling_locations: Tensor, spatial_shapes: Tensor, level_start_index: Tensor
) -> Iterator[Corner]:
    """Yield the four pixels around each location; the tensors have shape (N, Lq, M, L * K)."""
    points = sampling_locations.shape[4]
    height, width = spatial_shapes.repeat_interleave(points, dim=0).T
    start = level_start_index.repeat_interleave(points)
    x, y = sampling_locations.flatten(3, 4).unbind(-1)
    return corners(x * width - 0.5, y * height - 0.5, height, width, start)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute multi-scale deformable attention. Differentiable by autograd.

    Arguments as in :func:`ops_dcnv4.ms_deform_attn`.
    """
    dtype = compute_dtype(value.dtype)
    around = corners_of_levels(sampling_locations.to(dtype), spatial_shapes, level_start_index)
    output = aggregate(value.to(dtype), around, attention_weights.to(dtype).flatten(3))
    return output.flatten(-2).to(value.dtype)


def ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights, in their shapes and dtypes."""
    dtype = compute_dtype(value.dtype)
    grad_value, grad_x, grad_y, grad_weights = aggregate_backward(
        grad_output.to(dtype).unflatten(-1, value.shape[2:]),
        value.to(dtype),
        corners_of_levels(sampling_locations.to(dtype), spatial_shapes, level_start_index),
        attention_weights.to(dtype).flatten(3),
    )
    sizes = spatial_shapes.flip(1).to(dtype)[:, None]  # (L, 1, 2): W, H
    grad_points = torch.stack((grad_x, grad_y), dim=-1).view(sampling_locations.shape)
    return (
        grad_value.to(value.dtype),
        (grad_points * sizes).to(sampling_locations.dtype),
        grad_weights.view(attention_weights.shape).to(attention_weights.dtype),
    )


def unpack(sampling_loc_attn: Tensor, levels: int, n_points: int) -> tuple[Tensor, Tensor]:
    """Return sampling_locations (N, Lq, M, L, K, 2) and attention_weights (N, Lq, M, L, K)."""
    shape, count = (levels, n_points), levels * n_points
    locations, logits = sampling_loc_attn.split([2 * count, count], dim=-1)
    return locations.unflatten(-1, (*shape, 2)), logits.softmax(-1).unflatten(-1, shape)


def flash_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc_attn: Tensor,
    n_points: int,
) -> Tensor:
    """Compute fused multi-scale deformable attention. Differentiable by autograd.

    Arguments as in :func:`ops_dcnv4.flash_deform_attn`.
    """
    packed = sampling_loc_attn.to(compute_dtype(value.dtype))
    unpacked = unpack(packed, spatial_shapes.shape[0], n_points)
    return ms_deform_attn(value, spatial_shapes, level_start_index, *unpacked)


def flash_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc_attn: Tensor,
    n_points: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of value and sampling_loc_attn, in their shapes and dtypes."""
    packed = sampling_loc_attn.to(compute_dtype(value.dtype))
    locations, weights = unpack(packed, spatial_shapes.shape[0], n_points)
    grad_value, grad_locations, grad_weights = ms_deform_attn_backward(
        grad_output, value, spatial_shapes, level_start_index, locations, weights
    )
    weighted = (weights * grad_weights).flatten(3)
    grad_logits = weighted - weights.flatten(3) * weighted.sum(-1, keepdim=True)
    grad_packed = torch.cat((grad_locations.flatten(3), grad_logits), dim=-1)
    return grad_value, grad_packed.to(sampling_loc_attn.dtype)
