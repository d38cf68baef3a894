"""A drop-in replacement for nn.Conv2d."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import check_dense, dcnv4, to_bool, to_int, to_pair
from ..window import Window
from .common import NotScriptable, offset_mask_channels, reset_offset_mask, reset_projection


class DCNv4Conv2d(NotScriptable):
    """Drop-in replacement for nn.Conv2d that aggregates with DCNv4.

    A value projection, the DCNv4 operator with offsets predicted by a linear layer, and an output
    projection. A fresh layer averages over its window. The layer has the arguments of nn.Conv2d in
    their order, and its attributes except `weight`.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel_size: Size of the kernel window.
        stride: Stride of the kernel window.
        padding: Zero padding on each side of the input, 'valid', or 'same' (only with stride 1 and
            an odd window).
        dilation: Spacing between kernel taps.
        groups: Only 1 is supported: every output channel depends on every input channel.
        bias: Add a learnable bias to the output.
        padding_mode: Only 'zeros' is supported.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        offset_groups: Number of groups of input channels, each with its own offsets and modulation,
            as in torchvision's `deform_conv2d`. By default, each group has 16 channels, as in the
            published models; if 16 does not divide `in_channels`, there is one group.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `offset_groups` does not divide `in_channels`, or `groups`, `padding` or
            `padding_mode` is not supported.

    Example:
        >>> DCNv4Conv2d(32, 64, kernel_size=3, stride=2, padding=1)(torch.randn(1, 32, 8, 8)).shape
        torch.Size([1, 64, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = to_int(in_channels, "in_channels", minimum=1)
        self.out_channels = to_int(out_channels, "out_channels", minimum=1)
        self.kernel_size = to_pair(kernel_size, "kernel_size", minimum=1)
        self.stride = to_pair(stride, "stride", minimum=1)
        self.dilation = to_pair(dilation, "dilation", minimum=1)
        self.padding: tuple[int, int] | str = (
            padding if isinstance(padding, str) else to_pair(padding, "padding", minimum=0)
        )
        self.groups = to_int(groups, "groups")
        if groups != 1:
            raise ValueError(
                "groups must be 1, as every output channel of DCNv4 depends on every input "
                f"channel, got {groups}; offset_groups sets the groups of channels that share "
                "their offsets"
            )
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {padding_mode!r}")
        if offset_groups is None:
            offset_groups = self.in_channels // 16 if self.in_channels % 16 == 0 else 1
        self.offset_groups = to_int(offset_groups, "offset_groups")
        if self.offset_groups < 1 or self.in_channels % self.offset_groups:
            raise ValueError(
                f"offset_groups must be positive and divide in_channels={self.in_channels}, "
                f"got {offset_groups}"
            )
        self._window()  # Reject unsupported names of paddings.
        # Further attributes of nn.Conv2d, which code that converts or summarizes models reads.
        self.padding_mode, self.transposed, self.output_padding = padding_mode, False, (0, 0)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = offset_mask_channels(self.offset_groups, math.prod(self.kernel_size))
        self.offset_mask = nn.Linear(self.in_channels, channels, **factory)
        self.value_proj = nn.Linear(self.in_channels, self.in_channels, **factory)
        bias = to_bool(bias, "bias")
        self.output_proj = nn.Linear(self.in_channels, self.out_channels, bias, **factory)
        self.reset_parameters()

    @property
    def bias(self) -> nn.Parameter | None:
        """Return the bias of the output projection."""
        return self.output_proj.bias

    def reset_parameters(self) -> None:
        """Initialize the layer to average over its window."""
        taps = math.prod(self.kernel_size)
        reset_offset_mask(self.offset_mask, self.offset_groups, taps, modulation=1 / taps)
        reset_projection(self.value_proj)
        reset_projection(self.output_proj)

    def _window(self) -> Window:
        padding = self.padding
        if isinstance(padding, str):
            padding = _named_padding(padding, self.kernel_size, self.stride, self.dilation)
        return Window(
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            groups=self.offset_groups,
            offset_scale=1.0,
            remove_center=False,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: Features of shape (N, C_in, H, W).

        Returns:
            Features of shape (N, C_out, H_out, W_out) in channels-last memory format.

        Raises:
            ValueError: If the shape of `input` is invalid.
        """
        check_dense("input", input)
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            raise ValueError(
                f"input must be (N, {self.in_channels}, H, W), got shape {tuple(input.shape)}"
            )
        x, window = input.permute(0, 2, 3, 1), self._window()
        offset_mask = self.offset_mask(window.at_centers(x))
        output = dcnv4(self.value_proj(x), offset_mask, *window)
        return self.output_proj(output).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """Return the arguments to show in the string representation."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"bias={self.bias is not None}, offset_groups={self.offset_groups}"
        )


def _named_padding(
    padding: str, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int]:
    if padding == "valid":
        return 0, 0
    extent = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    if padding == "same" and stride == (1, 1) and all(n % 2 == 0 for n in extent):
        return extent[0] // 2, extent[1] // 2
    raise ValueError(
        "padding must be ints, 'valid', or 'same' with stride 1 and an odd window, got "
        f"{padding!r} with stride {stride}, kernel_size {kernel_size} and dilation {dilation}"
    )
