"""The DCNv4 layer."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import check_dense, dcnv4, to_bool, to_float, to_int, to_pair
from ..window import Window
from .common import NotScriptable, offset_mask_channels, reset_offset_mask, reset_projection


class DCNv4(NotScriptable):
    """DCNv4 layer (arXiv:2401.06197): value projection, DCNv4 operator and output projection.

    Offsets and modulation are predicted from the input by a linear layer, optionally preceded by a
    depth-wise convolution. Argument names and state-dict keys are those of the published layer. As
    published, offsets and modulation are initialized to zero: the operator of a fresh layer returns
    zeros, and the value projection receives no gradient in the very first step.

    Args:
        channels: Number of input and output channels.
        kernel_size: Size of the kernel window.
        stride: Stride of the kernel window.
        pad: Zero padding on each side of the input.
        dilation: Spacing between kernel taps.
        group: Number of channel groups; must divide `channels`. The published models use 16
            channels per group.
        offset_scale: Factor on both the tap grid and the learned offsets.
        dw_kernel_size: Odd kernel size of the depth-wise convolution before the offset prediction.
            None omits the convolution.
        center_feature_scale: Blend the output with the value by a learned gate per group.
        remove_center: Omit the center tap of the kernel.
        output_bias: Add a learnable bias in the output projection.
        without_pointwise: Omit the value and output projections.
        initial_modulation: Initial value of the modulation scalars. With 1 / taps, a fresh layer
            averages over its window, which helps where the published initialization does not train.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `group` does not divide `channels`, or `dw_kernel_size` is even.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        pad: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        initial_modulation: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels, group = to_int(channels, "channels", minimum=1), to_int(group, "group")
        if group < 1 or channels % group:
            raise ValueError(f"group must be positive and divide channels={channels}, got {group}")
        if dw_kernel_size is not None:
            dw_kernel_size = to_int(dw_kernel_size, "dw_kernel_size", minimum=1)
            if dw_kernel_size % 2 == 0:
                raise ValueError(f"dw_kernel_size must be odd or None, got {dw_kernel_size}")
        self.channels = channels
        self.kernel_size = to_pair(kernel_size, "kernel_size", minimum=1)
        self.stride = to_pair(stride, "stride", minimum=1)
        self.pad = to_pair(pad, "pad", minimum=0)
        self.dilation = to_pair(dilation, "dilation", minimum=1)
        self.group = group
        self.offset_scale = to_float(offset_scale, "offset_scale")
        self.dw_kernel_size = dw_kernel_size
        self.center_feature_scale = to_bool(center_feature_scale, "center_feature_scale")
        self.remove_center = to_bool(remove_center, "remove_center")
        self.without_pointwise = to_bool(without_pointwise, "without_pointwise")
        self.initial_modulation = to_float(initial_modulation, "initial_modulation")

        self.taps = self.kernel_size[0] * self.kernel_size[1] - self.remove_center
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if dw_kernel_size is not None:
            self.offset_mask_dw = nn.Conv2d(
                channels,
                channels,
                dw_kernel_size,
                padding=dw_kernel_size // 2,
                groups=channels,
                **factory,
            )
        self.offset_mask = nn.Linear(channels, offset_mask_channels(group, self.taps), **factory)
        if not self.without_pointwise:
            output_bias = to_bool(output_bias, "output_bias")
            self.value_proj = nn.Linear(channels, channels, **factory)
            self.output_proj = nn.Linear(channels, channels, bias=output_bias, **factory)
        if self.center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(
                torch.empty(group, channels, **factory)
            )
            self.center_feature_scale_proj_bias = nn.Parameter(torch.empty(group, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as published; the depth-wise convolution is initialized like nn.Conv2d."""
        if self.dw_kernel_size is not None:
            self.offset_mask_dw.reset_parameters()
        reset_offset_mask(self.offset_mask, self.group, self.taps, self.initial_modulation)
        if not self.without_pointwise:
            reset_projection(self.value_proj)
            reset_projection(self.output_proj)
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
        x = self._as_image(input, shape)
        value = x if self.without_pointwise else self.value_proj(x)
        output = dcnv4(value, self.predict_offset_mask(x), *self._window())
        if self.center_feature_scale:
            output = self._blend_with_value(output, value)
        if not self.without_pointwise:
            output = self.output_proj(output)
        return output if input.dim() == 4 else output.flatten(1, 2)

    def _window(self) -> Window:
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

    def predict_offset_mask(self, x: Tensor) -> Tensor:
        """Predict offsets and modulation at the center of each output pixel's window.

        Args:
            x: Features of shape (N, H, W, C).

        Returns:
            `offset_mask` of shape (N, H_out, W_out, P).
        """
        window = self._window()
        if self.dw_kernel_size is None:
            return self.offset_mask(window.at_centers(x))
        conv = self.offset_mask_dw
        pads = window.padding_for(x, self.dw_kernel_size)
        x = x.permute(0, 3, 1, 2)
        # The convolution's own padding avoids a copy, so use it where it is equivalent.
        padding = pads[0][0], pads[1][0]
        if not window.has_center() or min(padding) < 0:
            x, padding = F.pad(x, (*pads[1], *pads[0])), (0, 0)
        x = F.conv2d(x, conv.weight, conv.bias, self.stride, padding, groups=self.channels)
        return self.offset_mask(x.permute(0, 2, 3, 1))

    def _blend_with_value(self, output: Tensor, value: Tensor) -> Tensor:
        gate = F.linear(
            output, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
        ).sigmoid()
        gate = gate.repeat_interleave(self.channels // self.group, dim=-1)
        return output * (1 - gate) + self._window().at_centers(value) * gate

    def extra_repr(self) -> str:
        """Return the arguments to show in the string representation."""
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"pad={self.pad}, dilation={self.dilation}, group={self.group}, "
            f"offset_scale={self.offset_scale}"
        )
