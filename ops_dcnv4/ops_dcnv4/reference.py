"""DCNv4's core operator in plain PyTorch: the specification of the compiled kernels.

For output pixel (r, c), group g and kernel tap k in column i and row j of the kernel,

    x = c * stride_w - padding_w + center_w + offset_scale * (i * dilation_w - center_w + dx[k])
    y = r * stride_h - padding_h + center_h + offset_scale * (j * dilation_h - center_h + dy[k])
    output[r, c, g] = sum over k of modulation[k] * bilinear(value[:, :, g], y, x)

with center = dilation * (kernel_size - 1) // 2. The modulation is not normalised (DCNv4,
arXiv:2401.06197, section 3.1). Taps are ordered column by column; remove_center drops the middle
one. Of offset_mask's channels, group g owns [3*K*g, 3*K*(g + 1)) for K taps: K pairs (dx, dy),
then K modulation scalars; channels from 3*K*groups on are padding. A point counts if -1 < y < H and
-1 < x < W, and each of its four pixels if it lies inside the image. Gradients are those of the cell
that starts at floor(coordinate). float16 and bfloat16 are computed in float32.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]


class Corner(NamedTuple):
    """One of the four pixels around each sampling point; tensors are (N, H_out, W_out, G, K)."""

    index: Tensor  # into the H*W pixels of the image, 0 where the pixel lies outside
    inside: Tensor
    weight: Tensor
    weight_dx: Tensor  # derivative of the weight with respect to x
    weight_dy: Tensor


def sampling_points(
    offset_mask: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates x, y in pixels and modulation of every tap, each (N, H_out, W_out, G, K)."""
    height_out, width_out = offset_mask.shape[1:3]
    tensor_options = {"dtype": offset_mask.dtype, "device": offset_mask.device}
    taps = [
        (i, j)
        for i in range(kernel_size[1])
        for j in range(kernel_size[0])
        if not (remove_center and (i, j) == (kernel_size[1] // 2, kernel_size[0] // 2))
    ]
    packed = offset_mask[..., : 3 * groups * len(taps)].unflatten(-1, (groups, 3 * len(taps)))
    offsets, modulation = packed.split([2 * len(taps), len(taps)], dim=-1)

    def coordinates(axis: int, out: int, steps: list[int], offset: Tensor) -> Tensor:
        center = dilation[axis] * (kernel_size[axis] - 1) // 2
        start = torch.arange(out, **tensor_options) * stride[axis] - padding[axis] + center
        grid = torch.tensor(steps, **tensor_options) * dilation[axis] - center
        shape = (-1, 1, 1, 1) if axis == 0 else (-1, 1, 1)
        return start.view(shape) + offset_scale * (grid + offset)

    x = coordinates(1, width_out, [i for i, _ in taps], offsets[..., 0::2])
    y = coordinates(0, height_out, [j for _, j in taps], offsets[..., 1::2])
    return x, y, modulation


def corners(x: Tensor, y: Tensor, height: int, width: int) -> Iterator[Corner]:
    """The four pixels around the points (x, y), with their bilinear weights."""
    # Not finite: every comparison is false, and zeros keep the arithmetic below free of NaN.
    in_range = (y > -1) & (y < height) & (x > -1) & (x < width)
    x, y = (torch.where(in_range, coordinate, 0) for coordinate in (x, y))
    left, top = x.detach().floor(), y.detach().floor()
    dx, dy = x - left, y - top
    for below in (0, 1):
        for right in (0, 1):
            row, column = (top + below).long(), (left + right).long()
            inside = in_range & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight_x, weight_y = (dx if right else 1 - dx), (dy if below else 1 - dy)
            yield Corner(
                index=torch.where(inside, row * width + column, 0),
                inside=inside,
                weight=weight_x * weight_y,
                weight_dx=weight_y if right else -weight_y,
                weight_dy=weight_x if below else -weight_x,
            )


def gather(pixels: Tensor, corner: Corner) -> Tensor:
    """Values (N, H_out, W_out, G, K, D) of pixels (N, H*W, G, D) at a corner, zero outside."""
    n, _, groups, _ = pixels.shape
    image = torch.arange(n, device=pixels.device).view(-1, 1, 1, 1, 1)
    group = torch.arange(groups, device=pixels.device).view(-1, 1)
    return torch.where(corner.inside[..., None], pixels[image, corner.index, group], 0)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tensors of `dtype` are computed and accumulated in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


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
    """The operator; arguments as in :func:`ops_dcnv4.dcnv4`. Differentiable by autograd."""
    dtype = compute_dtype(value.dtype)
    x, y, modulation = sampling_points(
        offset_mask.to(dtype),
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center,
    )  # fmt: skip
    height, width = value.shape[1:3]
    pixels = value.to(dtype).flatten(1, 2).unflatten(-1, (groups, -1))
    output = 0
    for corner in corners(x, y, height, width):
        weight = torch.where(corner.inside, corner.weight * modulation, 0)
        output = output + (weight[..., None] * gather(pixels, corner)).sum(-2)
    return output.flatten(-2).to(value.dtype)


def dcnv4_backward(
    grad_output: Tensor,
    value: Tensor,
    offset_mask: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of value and offset_mask, in their shapes and dtypes."""
    dtype = compute_dtype(value.dtype)
    x, y, modulation = sampling_points(
        offset_mask.to(dtype),
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center,
    )  # fmt: skip
    n, height, width, channels = value.shape
    pixels = value.to(dtype).flatten(1, 2).unflatten(-1, (groups, -1))
    grad = grad_output.to(dtype).unflatten(-1, (groups, 1, -1))

    grad_pixels = torch.zeros_like(pixels)
    grad_x, grad_y, grad_modulation = (torch.zeros_like(modulation) for _ in range(3))
    image = torch.arange(n, device=value.device).view(-1, 1, 1, 1, 1)
    group = torch.arange(groups, device=value.device).view(-1, 1)
    for corner in corners(x, y, height, width):
        weight = torch.where(corner.inside, corner.weight * modulation, 0)
        where = tuple(t.expand_as(weight) for t in (image, corner.index, group))
        spread = torch.where(corner.inside[..., None], weight[..., None] * grad, 0)
        grad_pixels.index_put_(where, spread, accumulate=True)
        product = torch.where(corner.inside, (gather(pixels, corner) * grad).sum(-1), 0)
        slope = torch.where(corner.inside, modulation * product * offset_scale, 0)
        grad_x += corner.weight_dx * slope
        grad_y += corner.weight_dy * slope
        grad_modulation += corner.weight * product

    grad_offsets = torch.stack((grad_x, grad_y), dim=-1).flatten(-2)
    grad_packed = torch.cat((grad_offsets, grad_modulation), dim=-1).flatten(-2)
    grad_offset_mask = torch.zeros_like(offset_mask, memory_format=torch.contiguous_format)
    grad_offset_mask[..., : grad_packed.shape[-1]] = grad_packed.to(offset_mask.dtype)
    return grad_pixels.reshape(n, height, width, channels).to(value.dtype), grad_offset_mask
