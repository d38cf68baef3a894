"""The DCNv3 layer."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import dcnv3, to_bool
from .common import reset_projection, softmax_over_taps
from .window_layer import WindowLayer, depth_wise, to_odd

ACTIVATIONS = {"GELU": nn.GELU, "ReLU": nn.ReLU, "SiLU": nn.SiLU}


class ChannelsLast(nn.Module):
    """Permute (N, C, H, W) to (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x with its channels last."""
        return x.permute(0, 2, 3, 1)


class DCNv3(WindowLayer):
    """DCNv3 layer of InternImage (arXiv:2211.05778, section 3.1), on the operator of DCNv4.

    A depth-wise convolution, a norm and an activation precede the linear layers that predict
    offsets and modulation. Unlike in DCNv4, a softmax over the taps of each group normalizes the
    modulation. Argument names and state-dict keys are those of the published layer. As published,
    a fresh layer averages over its window.

    Args:
        channels: Number of input and output channels.
        kernel_size: Size of the kernel window.
        dw_kernel_size: Odd kernel size of the depth-wise convolution; None for `kernel_size`.
        stride: Stride of the kernel window. The published layer supports 1 only.
        pad: Zero padding on each side of the input.
        dilation: Spacing between kernel taps.
        group: Number of channel groups; must divide `channels`.
        offset_scale: Factor on both the tap grid and the learned offsets.
        act_layer: Activation: 'GELU', 'ReLU' or 'SiLU'.
        norm_layer: Norm before the activation: 'LN' or 'BN'.
        center_feature_scale: Blend the operator's output with the value by a learned gate per
            group.
        remove_center: Omit the center tap of the kernel.
        use_dcn_v4_op: Has no effect: every DCNv3 layer uses the operator of DCNv4.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `group` does not divide `channels`, `dw_kernel_size` is even, or `act_layer`
            or `norm_layer` is unknown.

    Example:
        >>> DCNv3(32, group=2)(torch.randn(1, 14, 14, 32)).shape
        torch.Size([1, 14, 14, 32])
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int | tuple[int, int] = 3,
        dw_kernel_size: int | None = None,
        stride: int | tuple[int, int] = 1,
        pad: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        center_feature_scale: bool = False,
        remove_center: bool = False,
        use_dcn_v4_op: bool = False,
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
        to_bool(use_dcn_v4_op, "use_dcn_v4_op")
        if act_layer not in ACTIVATIONS:
            raise ValueError(f"act_layer must be 'GELU', 'ReLU' or 'SiLU', got {act_layer!r}")
        if norm_layer not in ("LN", "BN"):
            raise ValueError(f"norm_layer must be 'LN' or 'BN', got {norm_layer!r}")
        self.dw_kernel_size = self._dw_kernel_size(dw_kernel_size)
        norm: tuple[nn.Module, nn.Module]
        if norm_layer == "LN":
            norm = ChannelsLast(), nn.LayerNorm(self.channels, eps=1e-6, **factory)
        else:
            norm = nn.BatchNorm2d(self.channels, **factory), ChannelsLast()
        self.dw_conv = nn.Sequential(
            depth_wise(self.channels, self.dw_kernel_size, **factory),
            nn.Sequential(*norm),
            ACTIVATIONS[act_layer](),
        )
        self.offset = nn.Linear(self.channels, 2 * self.group * self.taps, **factory)
        self.mask = nn.Linear(self.channels, self.group * self.taps, **factory)
        self.input_proj = nn.Linear(self.channels, self.channels, **factory)
        self.output_proj = nn.Linear(self.channels, self.channels, **factory)
        self.reset_parameters()

    def _dw_kernel_size(self, given: int | None) -> int:
        if given is not None:
            return to_odd(given, "dw_kernel_size", " or None")
        height, width = self.kernel_size
        if height != width or height % 2 == 0:
            raise ValueError(
                f"dw_kernel_size must be given for kernel_size {self.kernel_size}, which is not "
                "square and odd, got None"
            )
        return height

    def reset_parameters(self) -> None:
        """Initialize as published; the depth-wise convolution is initialized like nn.Conv2d."""
        super().reset_parameters()
        for layer in self.dw_conv.modules():
            if isinstance(layer, (nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)):
                layer.reset_parameters()
        for linear in (self.offset, self.mask):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        reset_projection(self.input_proj)
        reset_projection(self.output_proj)

    def apply_to_image(self, x: Tensor) -> Tensor:
        """Map features (N, H, W, C) to (N, H_out, W_out, C)."""
        value = self.input_proj(x)
        convolution, norm, activation = self.dw_conv
        assert isinstance(convolution, nn.Conv2d)
        features = activation(norm(self.convolve(convolution, x).permute(0, 3, 1, 2)))
        mask = softmax_over_taps(self.mask(features), self.group)
        output = dcnv3(value, self.offset(features), mask, *self.window())
        if self.center_feature_scale:
            output = self.blend(output, value, features)
        return self.output_proj(output)
