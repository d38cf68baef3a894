"""Geometry of the kernel window of DCNv4."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def output_size(
    size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[int, int]:
    """Return the output size of :func:`dcnv4`, which is that of a convolution.

    Args:
        size: (H, W) of the input.
        kernel_size: (height, width) of the kernel window.
        stride: Stride in (height, width).
        padding: Padding in (height, width).
        dilation: Dilation in (height, width).

    Returns:
        (H_out, W_out), which may be zero or negative if the window does not fit.
    """
    height, width = (
        (n + 2 * p - (d * (k - 1) + 1)) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )
    return height, width


class Window(NamedTuple):
    """The parameters of DCNv4 in the order of its schema; pairs are (height, width)."""

    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    offset_scale: float
    remove_center: bool

    def taps(self) -> int:
        """Return the number of taps."""
        return self.kernel_size[0] * self.kernel_size[1] - (1 if self.remove_center else 0)

    def center_tap(self) -> int:
        """Return the index of the center tap, counted column by column."""
        rows, columns = self.kernel_size
        return columns // 2 * rows + rows // 2

    def center(self) -> Pair:
        """Return the distance in pixels from the first tap to the center, rounded down."""
        (rows, columns), (step_y, step_x) = self.kernel_size, self.dilation
        return step_y * (rows - 1) // 2, step_x * (columns - 1) // 2

    def has_center(self) -> bool:
        """Return whether the center of the window is a pixel."""
        extents = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return all(extent % 2 == 0 for extent in extents)

    def output_size(self, name: str, size: Pair) -> Pair:
        """Return the output size for the argument `name`, an image of (H, W) = `size`.

        Raises:
            ValueError: If the output would be empty.
        """
        height, width = output_size(
            size, self.kernel_size, self.stride, self.padding, self.dilation
        )
        if height < 1 or width < 1:
            raise ValueError(
                f"the output would be {height} x {width}: {name} of {size[0]} x {size[1]} is too "
                f"small for kernel_size {self.kernel_size}, padding {self.padding} and "
                f"dilation {self.dilation}"
            )
        return height, width

    def padding_for(self, x: Tensor, size: int) -> list[Pair]:
        """Return the padding that aligns a sliding window of another size with this one.

        With x (N, H, W, C) padded by (before, after) in H and in W, a window of `size` and the same
        stride has the same output size and centers as this one. Negative padding crops.
        """
        out, center = self.output_size("input", (x.shape[1], x.shape[2])), self.center()
        pads = []
        for axis in range(2):
            before = self.padding[axis] - center[axis] + size // 2
            covered = (out[axis] - 1) * self.stride[axis] + size
            pads.append((before, covered - x.shape[1 + axis] - before))
        return pads

    def at_centers(self, x: Tensor) -> Tensor:
        """Return x (N, H, W, C) at the centers of the output pixels' windows, zero-padded."""
        out, pads = self.output_size("input", (x.shape[1], x.shape[2])), self.padding_for(x, size=1)
        if not (self.has_center() and all(before == 0 for before, _ in pads)):
            x = F.pad(x, (0, 0, *pads[1], *pads[0]))
        # Symbolic tracing cannot prove that the size of a slice equals the operator's output size.
        for axis in range(2):
            if self.stride[axis] > 1:
                index = torch.arange(out[axis], device=x.device) * self.stride[axis]
                x = x.index_select(axis + 1, index)
        return x
