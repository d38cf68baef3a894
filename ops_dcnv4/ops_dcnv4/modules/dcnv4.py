"""The DCNv4 layer."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import dcnv4, to_bool, to_float
from .common import offset_mask_channels, reset_offset_mask, reset_projection
from .window_layer import WindowLayer, depth_wise, to_odd


class DCNv4(WindowLayer):
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
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            channels,
            kernel_size,
            stride,
            pad,
            dilation,
            group,
            offset_scale,
            center_feature_scale,
            remove_center,
            **factory,
        )
        if dw_kernel_size is not None:
            dw_kernel_size = to_odd(dw_kernel_size, "dw_kernel_size", " or None")
            self.offset_mask_dw = depth_wise(self.channels, dw_kernel_size, **factory)
        self.dw_kernel_size = dw_kernel_size
        self.without_pointwise = to_bool(without_pointwise, "without_pointwise")
        self.initial_modulation = to_float(initial_modulation, "initial_modulation")
        predicted = offset_mask_channels(self.group, self.taps)
        self.offset_mask = nn.Linear(self.channels, predicted, **factory)
        if not self.without_pointwise:
            output_bias = to_bool(output_bias, "output_bias")
            self.value_proj = nn.Linear(self.channels, self.channels, **factory)
            self.output_proj = nn.Linear(self.channels, self.channels, output_bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as published; the depth-wise convolution is initialized like nn.Conv2d."""
        super().reset_parameters()
        if self.dw_kernel_size is not None:
            self.offset_mask_dw.reset_parameters()
        reset_offset_mask(self.offset_mask, self.group, self.taps, self.initial_modulation)
        if not self.without_pointwise:
            reset_projection(self.value_proj)
            reset_projection(self.output_proj)

    def apply_to_image(self, x: Tensor) -> Tensor:
        """Map features (N, H, W, C) to (N, H_out, W_out, C)."""
        value = x if self.without_pointwise else self.value_proj(x)
        output = dcnv4(value, self.predict_offset_mask(x), *self.window())
        if self.center_feature_scale:
            output = self.blend(output, value, output)
        return output if self.without_pointwise else self.output_proj(output)

    def predict_offset_mask(self, x: Tensor) -> Tensor:
        """Predict offsets and modulation at the center of each output pixel's window.

        Args:
            x: Features of shape (N, H, W, C).

        Returns:
            `offset_mask` of shape (N, H_out, W_out, P).
        """
        if self.dw_kernel_size is None:
            return self.offset_mask(self.window().at_centers(x))
        return self.offset_mask(self.convolve(self.offset_mask_dw, x))
