"""DCNv4 and deformable attention layers, and a drop-in replacement for nn.Conv2d."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import SpatialShapes, flash_deform_attn, to_integers
from .ops import check_dense, checked_output_size, dcnv4, to_bool, to_float, to_int, to_pair


class _NotScriptable(nn.Module):
    """Base class that makes torch.jit.script fail with a clear error before compiling anything."""

    def __prepare_scriptable__(self) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script: use torch.export, "
            "torch.compile or torch.jit.trace"
        )


class _Window(NamedTuple):
    """Geometry of the kernel window; pairs are (height, width)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def output_size(self, x: Tensor) -> tuple[int, int]:
        """Return (H_out, W_out) for x (N, H, W, C); errors name the argument `input`."""
        return checked_output_size("input", (x.shape[1], x.shape[2]), *self)

    def has_center(self) -> bool:
        """Return whether the centre of the window is a pixel."""
        extents = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return all(extent % 2 == 0 for extent in extents)

    def padding_for(self, x: Tensor, size: int) -> list[tuple[int, int]]:
        """Return the padding that aligns a sliding window of another size with this one.

        With x (N, H, W, C) padded by (before, after) in H and in W, a window of `size` and the same
        stride has the same output size and centres as this one. Negative padding crops.
        """
        out = self.output_size(x)
        pads = []
        for axis in range(2):
            center = self.dilation[axis] * (self.kernel_size[axis] - 1) // 2
            before = self.padding[axis] - center + size // 2
            covered = (out[axis] - 1) * self.stride[axis] + size
            pads.append((before, covered - x.shape[1 + axis] - before))
        return pads

    def at_centers(self, x: Tensor) -> Tensor:
        """Return x (N, H, W, C) at the centres of the output pixels' windows, zero-padded."""
        pads, out = self.padding_for(x, size=1), self.output_size(x)
        if not (self.has_center() and all(before == 0 for before, _ in pads)):
            x = F.pad(x, (0, 0, *pads[1], *pads[0]))
        # Symbolic tracing cannot prove that the size of a slice equals the operator's output size.
        for axis in range(2):
            if self.stride[axis] > 1:
                index = torch.arange(out[axis], device=x.device) * self.stride[axis]
                x = x.index_select(axis + 1, index)
        return x


def offset_mask_channels(groups: int, taps: int) -> int:
    """Return the number of `offset_mask` channels, padded to a multiple of 8 as published."""
    return math.ceil(groups * taps * 3 / 8) * 8


def _reset_offset_mask(linear: nn.Linear, groups: int, taps: int, modulation: float) -> None:
    """Initialise the prediction of `offset_mask`: zero offsets, constant modulation."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    if modulation:
        with torch.no_grad():
            linear.bias[: 3 * groups * taps].view(groups, -1)[:, 2 * taps :] = modulation


def _reset_projection(linear: nn.Linear) -> None:
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


class DCNv4(_NotScriptable):
    """DCNv4 layer (arXiv:2401.06197): value projection, DCNv4 operator and output projection.

    Offsets and modulation are predicted from the input by a linear layer, optionally preceded by a
    depth-wise convolution. Argument names and state-dict keys are those of the published layer. As
    published, offsets and modulation are initialised to zero: the operator of a fresh layer returns
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
        remove_center: Omit the centre tap of the kernel.
        output_bias: Add a learnable bias in the output projection.
        without_pointwise: Omit the value and output projections.
        initial_modulation: Initial value of the modulation scalars. With 1 / taps, a fresh layer
            averages over its window, which helps where the published initialisation does not train.
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
        factory = {"device": device, "dtype": dtype}
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
        """Initialise as published; the depth-wise convolution is initialised like nn.Conv2d."""
        if self.dw_kernel_size is not None:
            self.offset_mask_dw.reset_parameters()
        _reset_offset_mask(self.offset_mask, self.group, self.taps, self.initial_modulation)
        if not self.without_pointwise:
            _reset_projection(self.value_proj)
            _reset_projection(self.output_proj)
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
        output = dcnv4(
            value,
            self.predict_offset_mask(x),
            *self._window(),
            self.group,
            self.offset_scale,
            self.remove_center,
        )
        if self.center_feature_scale:
            output = self._blend_with_value(output, value)
        if not self.without_pointwise:
            output = self.output_proj(output)
        return output if input.dim() == 4 else output.flatten(1, 2)

    def _window(self) -> _Window:
        return _Window(self.kernel_size, self.stride, self.pad, self.dilation)

    def _as_image(self, input: Tensor, shape: tuple[int, int] | None) -> Tensor:
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
                + (" and the length is no square" if shape is None else "")
            )
        return input.unflatten(1, (height, width))

    def predict_offset_mask(self, x: Tensor) -> Tensor:
        """Predict offsets and modulation at the centre of each output pixel's window.

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
        if window.has_center() and all(before >= 0 for before, _ in pads):
            padding = (pads[0][0], pads[1][0])
        else:
            x, padding = F.pad(x, (*pads[1], *pads[0])), 0
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


class DCNv4Conv2d(_NotScriptable):
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
        is_named = isinstance(padding, str)
        self.padding = padding if is_named else to_pair(padding, "padding", minimum=0)
        self._window()  # Checks a named padding.
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
        # Further attributes of nn.Conv2d, which code that converts or summarises models reads.
        self.padding_mode, self.transposed, self.output_padding = padding_mode, False, (0, 0)

        factory = {"device": device, "dtype": dtype}
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
        """Initialise the layer to average over its window."""
        taps = math.prod(self.kernel_size)
        _reset_offset_mask(self.offset_mask, self.offset_groups, taps, modulation=1 / taps)
        _reset_projection(self.value_proj)
        _reset_projection(self.output_proj)

    def _window(self) -> _Window:
        padding = self.padding
        if isinstance(padding, str):
            padding = _named_padding(padding, self.kernel_size, self.stride, self.dilation)
        return _Window(self.kernel_size, self.stride, padding, self.dilation)

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
        output = dcnv4(self.value_proj(x), offset_mask, *window, self.offset_groups)
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


class FlashDeformAttn(_NotScriptable):
    """Multi-scale deformable attention (arXiv:2010.04159, section 4.1) as in the DCNv4 package.

    Argument names and state-dict keys are those of the published layer. Unlike the published layer,
    it never rounds sampling locations to float16, not even under autocast.

    Args:
        d_model: Number of channels of queries, inputs and outputs.
        n_levels: Number of feature levels.
        n_heads: Number of attention heads; must divide `d_model`.
        n_points: Number of sampling points per query, head and level.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is below 1, or `n_heads` does not divide `d_model`.
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_model = to_int(d_model, "d_model", minimum=1)
        n_levels, n_points = to_int(n_levels, "n_levels", 1), to_int(n_points, "n_points", 1)
        n_heads = to_int(n_heads, "n_heads")
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(
                f"n_heads must be positive and divide d_model={d_model}, got {n_heads}"
            )
        self.d_model, self.n_levels = d_model, n_levels
        self.n_heads, self.n_points = n_heads, n_points
        factory = {"device": device, "dtype": dtype}
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2, **factory)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points, **factory)
        self.value_proj = nn.Linear(d_model, d_model, **factory)
        self.output_proj = nn.Linear(d_model, d_model, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as in Deformable DETR.

        The points of each head start 1, 2, ... pixels away from the reference point, in one
        direction per head.
        """
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            bias = self.sampling_offsets.bias.view(self.n_heads, self.n_levels, self.n_points, 2)
            bias.copy_(initial_offsets(self.n_heads, self.n_points, bias.device)[:, None])
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: SpatialShapes,
        input_level_start_index: Tensor | Sequence[int] | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Apply the layer.

        Args:
            query: Queries of shape (N, Lq, C).
            reference_points: Points (x, y) of shape (N, Lq, L, 2), where (0, 0) is the top left
                corner of the image and (1, 1) the bottom right corner, or boxes (x, y, w, h) of
                shape (N, Lq, L, 4), where (x, y) is the centre and offsets are relative to the box
                size. Points or boxes may be shared between images, queries or levels (a size of 1).
            input_flatten: Feature maps of shape (N, S, C), the levels concatenated.
            input_spatial_shapes: (H, W) of each level, of shape (L, 2).
            input_level_start_index: Index of the first pixel of each level, of shape (L,). Computed
                from `input_spatial_shapes` by default.
            input_padding_mask: Boolean mask of shape (N, S), True for pixels that count as zero.

        Returns:
            Output of shape (N, Lq, C).

        Raises:
            ValueError: If the shape or dtype of an argument is invalid; the message names the
                argument.
        """
        for name, tensor in (("query", query), ("input_flatten", input_flatten)):
            check_dense(name, tensor)
            if tensor.dim() != 3 or tensor.shape[-1] != self.d_model:
                raise ValueError(
                    f"{name} must be (N, length, {self.d_model}), got shape {tuple(tensor.shape)}"
                )
        if query.shape[0] != input_flatten.shape[0]:
            raise ValueError(
                "query and input_flatten must have one batch size, "
                f"got {query.shape[0]} and {input_flatten.shape[0]}"
            )
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            shape, dtype = tuple(input_padding_mask.shape), input_padding_mask.dtype
            if shape != tuple(value.shape[:2]) or dtype != torch.bool:
                raise ValueError(
                    f"input_padding_mask must be {tuple(value.shape[:2])} of torch.bool like "
                    f"input_flatten, got shape {shape} of {dtype}"
                )
            value = value.masked_fill(input_padding_mask[..., None], 0)
        heads = (self.n_heads, self.n_levels, self.n_points)
        locations = sampling_locations(
            self.sampling_offsets(query).unflatten(-1, (*heads, 2)),
            reference_points,
            input_spatial_shapes,
        )
        logits = self.attention_weights(query).unflatten(-1, (self.n_heads, -1))
        output = flash_deform_attn(
            value.unflatten(-1, (self.n_heads, -1)),
            input_spatial_shapes,
            input_level_start_index,
            torch.cat((locations.flatten(3), logits.to(locations.dtype)), dim=-1),
            self.n_points,
        )
        return self.output_proj(output)

    def extra_repr(self) -> str:
        """Return the arguments to show in the string representation."""
        return (
            f"{self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, "
            f"n_points={self.n_points}"
        )


def initial_offsets(heads: int, points: int, device: torch.device) -> Tensor:
    """Return Deformable DETR's initial sampling offsets, of shape (heads, points, 2) in pixels.

    Point k of head m is k + 1 pixels away (in the maximum norm) in direction 2 * pi * m / heads.
    """
    angles = torch.arange(heads, device=device) * (2 * math.pi / heads)
    directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    return directions[:, None] * torch.arange(1, points + 1, device=device)[:, None]


def sampling_locations(
    offsets: Tensor, reference_points: Tensor, spatial_shapes: SpatialShapes
) -> Tensor:
    """Compute sampling locations from predicted offsets and reference points or boxes.

    Args:
        offsets: Offsets of shape (N, Lq, M, L, K, 2), in pixels of the level for reference points,
            or in units of half the box size divided by K for reference boxes.
        reference_points: Points of shape (N, Lq, L, 2) or boxes (x, y, w, h) of shape
            (N, Lq, L, 4); N, Lq and L may be 1.
        spatial_shapes: (H, W) of each level, of shape (L, 2).

    Returns:
        Locations of shape (N, Lq, M, L, K, 2), where 0 to 1 spans the level. Float32 if the offsets
        have 16 bits.

    Raises:
        ValueError: If `reference_points` or `spatial_shapes` does not match the offsets.
    """
    n, queries, _, levels, points, _ = offsets.shape
    sizes = to_integers("spatial_shapes", spatial_shapes).to(offsets.device, non_blocking=True)
    if tuple(sizes.shape) != (levels, 2):
        raise ValueError(
            f"spatial_shapes must be ({levels}, 2), with (H, W) of each level, "
            f"got shape {tuple(sizes.shape)}"
        )
    shape = (n, queries, levels)
    if (
        reference_points.dim() != 4
        or reference_points.shape[3] not in (2, 4)
        or any(
            size not in (full, 1) for size, full in zip(reference_points.shape, shape, strict=False)
        )
    ):
        raise ValueError(
            f"reference_points must be ({n}, {queries}, {levels}, 2) or (..., 4), or broadcast to "
            f"that, got shape {tuple(reference_points.shape)}"
        )
    dtype = torch.promote_types(offsets.dtype, torch.float32)
    reference_points = reference_points.to(dtype)[:, :, None, :, None]
    if reference_points.shape[-1] == 2:
        return reference_points + offsets.to(dtype) / sizes.flip(-1)[:, None]
    centers, sizes = reference_points.split(2, dim=-1)
    return centers + offsets.to(dtype) / points * sizes * 0.5
