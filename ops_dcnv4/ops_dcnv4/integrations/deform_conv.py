"""torchvision's deformable convolution in the depth-wise form that DCNv4 computes.

With one group per channel and a weight that the channels of an offset group share,
`torchvision.ops.deform_conv2d` is DCNv4 with the weight as a factor of the modulation.
"""

import torch
from torch import Tensor

from ..ops import dcnv4, to_pair


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute `torchvision.ops.deform_conv2d` for depth-wise weights that DCNv4 can express.

    Args:
        input: Features of shape (N, C, H, W).
        offset: Offsets (dy, dx) of each tap, of shape (N, 2 * G * K, H_out, W_out), for G offset
            groups and K = kernel_h * kernel_w taps in row-major order.
        weight: Weight of shape (C, 1, kernel_h, kernel_w), equal over the C / G channels of each
            offset group. It receives no gradient.
        bias: Bias of shape (C,).
        stride: Stride, in pixels.
        padding: Zero padding on each side, in pixels.
        dilation: Spacing between taps, in pixels.
        mask: Modulation of shape (N, G * K, H_out, W_out); None for ones.

    Returns:
        Tensor of shape (N, C, H_out, W_out).

    Raises:
        ValueError: If the weight is not depth-wise, requires a gradient while gradients are
            recorded, or differs within an offset group. Where this cannot be checked without a
            synchronization (compiled graphs, GPUs), a differing weight fails an assertion.

    Example:
        >>> input, weight = torch.randn(2, 8, 14, 14), torch.ones(8, 1, 3, 3)
        >>> offset, mask = torch.randn(2, 18, 14, 14), torch.rand(2, 9, 14, 14)
        >>> deform_conv2d(input, offset, weight, padding=1, mask=mask).shape
        torch.Size([2, 8, 14, 14])
    """
    n, channels = input.shape[:2]
    if tuple(weight.shape[:2]) != (channels, 1):
        raise ValueError(
            f"weight must be depth-wise, (C, 1, kernel_h, kernel_w) with C = {channels} as in "
            f"input, got shape {tuple(weight.shape)}"
        )
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError(
            "weight must not require a gradient, as DCNv4 has none for it: freeze it, or use "
            "torchvision's deform_conv2d"
        )
    rows, columns = weight.shape[2:]
    height, width = offset.shape[2:]
    groups = offset.shape[1] // (2 * rows * columns)
    if groups < 1 or channels % groups:
        raise ValueError(
            f"offset must have 2 * G * {rows * columns} channels with G dividing the channels of "
            f"input ({channels}), got shape {tuple(offset.shape)}"
        )
    count = rows * columns
    if mask is not None and mask.shape != (n, groups * count, height, width):
        raise ValueError(
            f"mask must have the shape {(n, groups * count, height, width)}, got "
            f"{tuple(mask.shape)}"
        )
    taps = _shared_weight(weight, groups)

    # (dy, dx), row by row, becomes (dx, dy), column by column.
    points = offset.view(n, groups, rows, columns, 2, height, width).flip(4)
    points = points.permute(0, 5, 6, 1, 3, 2, 4).reshape(n, height, width, groups, 2 * count)
    modulation = taps.transpose(1, 2).reshape(groups, count)
    if mask is None:
        modulation = modulation.expand(n, height, width, -1, -1)
    else:
        mask = mask.view(n, groups, rows, columns, height, width).permute(0, 4, 5, 1, 3, 2)
        modulation = mask.reshape(n, height, width, groups, count) * modulation
    output = dcnv4(
        input.permute(0, 2, 3, 1),
        torch.cat((points, modulation), -1).flatten(3),
        (rows, columns),
        to_pair(stride, "stride", 1),
        to_pair(padding, "padding", 0),
        to_pair(dilation, "dilation", 1),
        groups,
    ).permute(0, 3, 1, 2)
    if bias is not None:
        output = output + bias[:, None, None]
    return output.contiguous()


def _shared_weight(weight: Tensor, groups: int) -> Tensor:
    """Return the weight of each offset group, (groups, kernel_h, kernel_w)."""
    channels = weight[:, 0].unflatten(0, (groups, -1))
    shared = channels[:, :1]
    message = f"weight must be equal over the channels of each of the {groups} offset groups"
    if torch.compiler.is_compiling() or weight.device.type != "cpu":
        torch._assert_async((channels == shared).all(), message)
    elif not torch.equal(channels, shared.expand_as(channels)):
        raise ValueError(f"{message}; use torchvision's deform_conv2d for other weights")
    return shared[:, 0]
