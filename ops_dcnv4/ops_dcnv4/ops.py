"""Functional DCNv4 and DCNv3, and their argument checks."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .window import Window

# Same limits as in csrc/checks.h. Coordinates are computed in float32, which
# represents all integers up to MAX_SIDE; the other limits keep 32-bit arithmetic from overflowing.
MAX_SIDE = 2**24
MAX_PARAMETER = 2**27
MAX_COUNT = (2**31 - 1) // 4


def dcnv4(
    value: Tensor,
    offset_mask: Tensor,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """Compute the deformable aggregation of DCNv4 (arXiv:2401.06197, section 3.1).

    For each output pixel, channel group and tap of the kernel window, `value` is sampled bilinearly
    at the tap's position plus a learned offset, multiplied by a learned modulation scalar, and
    summed over the taps. Neither offsets nor scalars are normalized. :mod:`ops_dcnv4.reference`
    states the formula.

    Args:
        value: Features of shape (N, H, W, C) with C = groups * group_channels. Float32, float64,
            float16 or bfloat16. 16-bit inputs are computed and accumulated in float32, except that
            the forward pass on CUDA may interpolate between pixels in 16 bits.
        offset_mask: Offsets and modulation of shape (N, H_out, W_out, P), with the dtype and device
            of `value`; P >= 3 * groups * K with K = kernel_h * kernel_w - remove_center. Group g
            owns channels 3*K*g to 3*K*(g + 1): K pairs (dx, dy) in pixels, ordered column by column
            of the window, then K modulation scalars. Further channels are padding; they are ignored
            and their gradient is zero.
        kernel_size: Size of the kernel window, odd or even.
        stride: Stride of the kernel window, in pixels.
        padding: Zero padding on each side of the input, in pixels.
        dilation: Spacing between kernel taps, in pixels.
        groups: Number of channel groups, each with its own offsets and modulation.
        offset_scale: Factor on both the regular tap grid and the learned offsets.
        remove_center: Omit the center tap of the kernel.

    Returns:
        Tensor of shape (N, H_out, W_out, C); :func:`output_size` computes H_out and W_out.

    Raises:
        TypeError: If an argument has the wrong type or dtype, or the dtypes differ.
        ValueError: If a shape, device or parameter is invalid, or an image has no pixels; the
            message names the argument.

    Example:
        >>> value = torch.randn(2, 14, 14, 32)
        >>> offset_mask = torch.zeros(2, 14, 14, 56)  # 3 * 2 groups * 9 taps, padded to 56
        >>> dcnv4(value, offset_mask, groups=2).shape
        torch.Size([2, 14, 14, 32])
    """
    window = _parse_window(
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center
    )
    _check_dcnv4(value, offset_mask, window)
    return torch.ops.ops_dcnv4.dcnv4(value, offset_mask, *window)


def dcnv3(
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """Compute the deformable aggregation of DCNv3 (arXiv:2211.05778, equation 2).

    It is that of :func:`dcnv4` with offsets and modulation in separate tensors.

    Args:
        value: Features of shape (N, H, W, C) with C = groups * group_channels, of a dtype of
            :func:`dcnv4`.
        offset: Offsets of shape (N, H_out, W_out, 2 * groups * K) with the dtype and device of
            `value` and K = kernel_h * kernel_w - remove_center: for each group, K pairs (dx, dy) in
            pixels, ordered column by column of the window.
        mask: Modulation of shape (N, H_out, W_out, groups * K), after the softmax over the K taps
            of each group.
        kernel_size: Size of the kernel window, odd or even.
        stride: Stride of the kernel window, in pixels.
        padding: Zero padding on each side of the input, in pixels.
        dilation: Spacing between kernel taps, in pixels.
        groups: Number of channel groups, each with its own offsets and modulation.
        offset_scale: Factor on both the regular tap grid and the learned offsets.
        remove_center: Omit the center tap of the kernel.

    Returns:
        Tensor of shape (N, H_out, W_out, C); :func:`output_size` computes H_out and W_out.

    Raises:
        TypeError: If an argument has the wrong type or dtype, or the dtypes differ.
        ValueError: If a shape, device or parameter is invalid, or an image has no pixels; the
            message names the argument.

    Example:
        >>> value, offset = torch.randn(2, 14, 14, 32), torch.zeros(2, 14, 14, 36)
        >>> mask = torch.zeros(2, 14, 14, 2, 9).softmax(-1).flatten(-2)
        >>> dcnv3(value, offset, mask, groups=2).shape
        torch.Size([2, 14, 14, 32])
    """
    window = _parse_window(
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center
    )
    _check_operands(value, window, offset=offset, mask=mask)
    groups, taps = window.groups, window.taps()
    for name, tensor, numbers in (("offset", offset, 2), ("mask", mask, 1)):
        if tensor.shape[3] != numbers * groups * taps:
            raise ValueError(
                f"{name} must have {numbers * groups * taps} channels ({numbers} * groups * taps = "
                f"{numbers} * {groups} * {taps}), got {tensor.shape[3]}"
            )
    parts = offset.unflatten(3, (groups, 2 * taps)), mask.unflatten(3, (groups, taps))
    return torch.ops.ops_dcnv4.dcnv4(value, torch.cat(parts, dim=4).flatten(3), *window)


def _parse_window(
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> Window:
    return Window(
        to_pair(kernel_size, "kernel_size", minimum=1),
        to_pair(stride, "stride", minimum=1),
        to_pair(padding, "padding", minimum=0),
        to_pair(dilation, "dilation", minimum=1),
        to_int(groups, "groups"),
        to_float(offset_scale, "offset_scale"),
        to_bool(remove_center, "remove_center"),
    )


def to_int(number: int, name: str, minimum: int | None = None) -> int:
    """Convert a Python or NumPy integer to an int; errors name the argument `name`."""
    if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt, Integral)):
        raise TypeError(f"{name} must be an int, got {number!r}")
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number if isinstance(number, (int, torch.SymInt)) else int(number)


def to_pair(number: int | Sequence[int], name: str, minimum: int) -> tuple[int, int]:
    """Convert an int or a pair of ints to (height, width); errors name the argument `name`."""
    numbers = tuple(number) if isinstance(number, (tuple, list)) else (number, number)
    try:
        height, width = (to_int(n, name) for n in numbers)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an int or a pair of ints, got {number!r}") from None
    if min(height, width) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number!r}")
    if max(height, width) > MAX_PARAMETER:
        raise ValueError(f"{name} must be at most {MAX_PARAMETER}, got {number!r}")
    return height, width


def to_float(number: float, name: str) -> float:
    """Convert a real Python or NumPy number to a float; errors name the argument `name`."""
    accepted = (int, float, torch.SymFloat, Real)
    if isinstance(number, bool) or not isinstance(number, accepted):
        raise TypeError(f"{name} must be a number, got {number!r}")
    return float(number)


def to_bool(flag: bool, name: str) -> bool:
    """Convert a Python or NumPy bool, 0 or 1 to a bool; errors name the argument `name`."""
    if isinstance(flag, (str, Tensor)) or flag not in (False, True):
        raise TypeError(f"{name} must be a bool, got {flag!r}")
    return bool(flag)


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_tensor(name: str, tensor: Tensor, shape: tuple[str, ...]) -> None:
    """Raise an error unless argument `name` is a dense floating-point tensor of rank len(shape)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)
    if tensor.dim() != len(shape):
        expected = ", ".join(shape)
        raise ValueError(f"{name} must be ({expected}), got shape {tuple(tensor.shape)}")
    if tensor.dtype not in _DTYPES:
        accepted = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"{name} must be floating point ({accepted}), got {tensor.dtype}")


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise TypeError if argument `name` is sparse, nested or in oneDNN layout."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested tensor" if tensor.is_nested else f"tensor of layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor, got a {kind}")


def check_raw_dcnv4(value: Tensor, offset_mask: Tensor, *parameters: Any) -> tuple[int, ...]:
    """Check the arguments of the operator in torch.ops and return the shape of its output.

    The compiled kernels perform the same checks. Upper limits of symbolic sizes are checked when
    the operator runs.
    """
    window = Window(*parameters)
    for name, pair in zip(Window._fields[:4], parameters[:4], strict=True):
        if len(pair) != 2:
            raise ValueError(f"{name} must be a pair of ints, got {list(pair)}")
        to_pair(tuple(pair), name, minimum=0 if name == "padding" else 1)
    _check_dcnv4(value, offset_mask, window)
    _, height, width, channels = value.shape
    _, height_out, width_out, offset_channels = offset_mask.shape
    check_size("the height of value", height, MAX_SIDE)
    check_size("the width of value", width, MAX_SIDE)
    check_size("the number of pixels of an image", height * width)
    check_size("the number of pixels of an output image", height_out * width_out)
    check_size("the number of channels of value", channels)
    check_size("the number of channels of offset_mask", offset_channels)
    check_size("the product of kernel_size", window.kernel_size[0] * window.kernel_size[1])
    check_size("groups", window.groups)
    return *offset_mask.shape[:3], channels


def check_size(name: str, size: int, limit: int = MAX_COUNT) -> None:
    """Raise ValueError if a size exceeds the limit; symbolic sizes are not checked."""
    if isinstance(size, int) and size > limit:
        raise ValueError(f"{name} must be at most {limit}, got {size}")


def check_raw_grad_output(grad_output: Tensor, value: Tensor, shape: tuple[int, ...]) -> None:
    """Raise an error unless `grad_output` is a dense tensor like the output, which has `shape`."""
    check_dense("grad_output", grad_output)
    if (grad_output.dtype, grad_output.device) != (value.dtype, value.device):
        raise ValueError(
            f"grad_output must be a {value.dtype} tensor on {value.device} like the output, "
            f"got {grad_output.dtype} on {grad_output.device}"
        )
    if tuple(grad_output.shape) != tuple(shape):
        raise ValueError(
            f"grad_output must be {tuple(shape)} like the output, "
            f"got shape {tuple(grad_output.shape)}"
        )


def autocasts(device_type: str) -> bool:
    """Return whether autocast is active for a device type."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _check_dcnv4(value: Tensor, offset_mask: Tensor, window: Window) -> None:
    _check_operands(value, window, offset_mask=offset_mask)
    groups, taps = window.groups, window.taps()
    if offset_mask.shape[3] < 3 * groups * taps:
        raise ValueError(
            f"offset_mask must have at least {3 * groups * taps} channels (3 * groups * taps = "
            f"3 * {groups} * {taps}), got {offset_mask.shape[3]}"
        )


def _check_operands(value: Tensor, window: Window, **predicted: Tensor) -> None:
    """Raise an error unless `value` fits the window, and other operands the output."""
    for name, tensor in (("value", value), *predicted.items()):
        check_tensor(name, tensor, ("N", "H", "W", "C"))
    for name, tensor in predicted.items():
        if value.device != tensor.device:
            raise ValueError(
                f"value and {name} must be on one device, got {value.device} and {tensor.device}"
            )
        has_double = torch.float64 in (value.dtype, tensor.dtype)  # autocast does not cast float64
        if value.dtype != tensor.dtype and (has_double or not autocasts(value.device.type)):
            raise TypeError(
                f"value and {name} must have one dtype, got {value.dtype} and {tensor.dtype}"
            )
    n, height, width, channels = value.shape
    if window.groups < 1 or channels % window.groups:
        raise ValueError(
            f"groups must be positive and divide the channels of value ({channels}), got "
            f"{window.groups}; value is (N, H, W, C) = {tuple(value.shape)}"
        )
    if height < 1 or width < 1:
        raise ValueError(
            "value must have at least one row and one column, got (N, H, W, C) = "
            f"{tuple(value.shape)}"
        )
    height_out, width_out = window.output_size("value", (height, width))
    for name, tensor in predicted.items():
        if tuple(tensor.shape[:3]) != (n, height_out, width_out):
            raise ValueError(
                f"{name} must be ({n}, {height_out}, {width_out}, ...) like the output, "
                f"got shape {tuple(tensor.shape)}"
            )
