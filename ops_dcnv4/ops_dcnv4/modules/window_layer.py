"""Base class of the layers whose operator samples a window: DCNv3 and DCNv4."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import check_dense, to_bool, to_float, to_int, to_pair
from ..window import Window
from .common import NotScriptable


def to_odd(number: int, name: str, alternative: str = "") -> int:
    """Convert an odd, positive integer to an int; errors name the argument `name`."""
    number = to_int(number, name, minimum=1)
    if number % 2 == 0:
        raise ValueError(f"{name} must be odd{alternative}, got {number}")
    return number


def depth_wise(channels: int, kernel_size: int, **factory: Any) -> nn.Conv2d:
    """Return a depth-wise convolution for :meth:`WindowLayer.convolve`."""
    padding = kernel_size // 2
    return nn.Conv2d(channels, channels, kernel_size, padding=padding, groups=channels, **factory)


class WindowLayer(NotScriptable):
    """Layer that samples the window around each output pixel, (N, H, W, C) -> (N, H, W, C).

    The arguments are those of :class:`~ops_dcnv4.DCNv4`. A layer calls :meth:`reset_parameters` at
    the end of its own constructor.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `group` does not divide `channels`, or an argument is out of range.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        pad: int | tuple[int, int],
        dilation: int | tuple[int, int],
        group: int,
        offset_scale: float,
        center_feature_scale: bool,
        remove_center: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        channels, group = to_int(channels, "channels", minimum=1), to_int(group, "group")
        if group < 1 or channels % group:
            raise ValueError(f"group must be positive and divide channels={channels}, got {group}")
        self.channels = channels
        self.kernel_size = to_pair(kernel_size, "kernel_size", minimum=1)
        self.stride = to_pair(stride, "stride", minimum=1)
        self.pad = to_pair(pad, "pad", minimum=0)
        self.dilation = to_pair(dilation, "dilation", minimum=1)
        self.group = group
        self.offset_scale = to_float(offset_scale, "offset_scale")
        self.center_feature_scale = to_bool(center_feature_scale, "center_feature_scale")
        self.remove_center = to_bool(remove_center, "remove_center")
        self.taps = self.kernel_size[0] * self.kernel_size[1] - self.remove_center
        if self.center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(
                torch.empty(group, channels, **factory)
            )
            self.center_feature_scale_proj_bias = nn.Parameter(torch.empty(group, **factory))

    def reset_parameters(self) -> None:
        """Initialize the gate of `center_feature_scale`, which is 0.5 everywhere."""
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    def forward(self, input: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Apply the layer.

        Args:
            input: Features of shape (N, H, W, C), or (N, L, C) with L = H * W.
            shape: (H, W) of an (N, L, C) input. May be omitted if the image is square.

        Returns:
            Features of shape (N, H_out, W_out, C), or (N, H_out * W_out, C) for (N, L, C) input.

        Raises:
            ValueError: If the shape of `input` is invalid or does not match `shape`.
        """
        output = self.apply_to_image(self._as_image(input, shape))
        return output if input.dim() == 4 else output.flatten(1, 2)

    def apply_to_image(self, x: Tensor) -> Tensor:
        """Map features (N, H, W, C) to (N, H_out, W_out, C)."""
        raise NotImplementedError

    def window(self) -> Window:
        """Return the parameters of the operator."""
        return Window(
            self.kernel_size,
            self.stride,
            self.pad,
            self.dilation,
            self.group,
            self.offset_scale,
            self.remove_center,
        )

    def _as_image(self, input: Tensor, shape: Sequence[int] | None) -> Tensor:
        check_dense("input", input)
        if input.dim() not in (3, 4) or input.shape[-1] != self.channels:
            raise ValueError(
                f"input must be (N, L, {self.channels}) or (N, H, W, {self.channels}), "
                f"got shape {tuple(input.shape)}"
            )
        if input.dim() == 4:
            if shape is not None and tuple(shape) != tuple(input.shape[1:3]):
                raise ValueError(
                    f"shape must be {tuple(input.shape[1:3])} like input, got {tuple(shape)}"
                )
            return input
        length = input.shape[1]
        if shape is None:
            if torch.compiler.is_exporting() and isinstance(length, torch.SymInt):
                raise ValueError(
                    "shape must be (H, W) to export a dynamic length of input, got None"
                )
            height = width = torch.sym_int(torch.sym_sqrt(length))
        else:
            shape = shape.tolist() if hasattr(shape, "tolist") else shape
            height, width = to_pair(shape, "shape", minimum=1)
        if height * width != length:
            raise ValueError(
                f"shape must be (H, W) with H * W = {length}, the length of input, got {shape}"
                + (" and the length is not a square" if shape is None else "")
            )
        return input.unflatten(1, (height, width))

    def convolve(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Apply a depth-wise convolution at the centers of the output pixels' windows.

        Args:
            conv: Convolution of odd size; its own stride is not used.
            x: Features of shape (N, H, W, C).

        Returns:
            Features of shape (N, H_out, W_out, C).
        """
        window = self.window()
        pads = window.padding_for(x, conv.kernel_size[0])
        x = x.permute(0, 3, 1, 2)
        # The convolution's own padding avoids a copy, so use it where it is equivalent.
        padding = pads[0][0], pads[1][0]
        if not window.has_center() or min(padding) < 0:
            x, padding = F.pad(x, (*pads[1], *pads[0])), (0, 0)
        x = F.conv2d(x, conv.weight, conv.bias, self.stride, padding, groups=self.channels)
        return x.permute(0, 2, 3, 1)

    def blend(self, output: Tensor, value: Tensor, features: Tensor) -> Tensor:
        """Blend the operator's output with the value by a gate per group.

        Args:
            output: Output of the operator, of shape (N, H_out, W_out, C).
            value: Value of the operator, of shape (N, H, W, C).
            features: Features of shape (N, H_out, W_out, C) that the gate is computed from.
        """
        weight, bias = self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
        gate = F.linear(features, weight, bias).sigmoid()
        gate = gate.repeat_interleave(self.channels // self.group, dim=-1)
        return output * (1 - gate) + self.window().at_centers(value) * gate

    def extra_repr(self) -> str:
        """Return the arguments to show in the string representation."""
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"pad={self.pad}, dilation={self.dilation}, group={self.group}, "
            f"offset_scale={self.offset_scale}"
        )
