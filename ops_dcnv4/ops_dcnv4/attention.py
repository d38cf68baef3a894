"""Functional multi-scale deformable attention and its argument checks."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from .ops import MAX_SIDE, autocasts, check_dense, check_size, check_tensor, to_int

SpatialShapes = Tensor | Sequence[tuple[int, int]]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute multi-scale deformable attention as in mmcv and Deformable DETR.

    For each query and head, the levels are sampled bilinearly at the given locations, and the
    samples are summed with the attention weights (arXiv:2010.04159, equation 3, without the
    projections). Samples outside a level count as zero. :mod:`ops_dcnv4.reference` states the
    formula.

    Args:
        value: Feature maps of shape (N, S, M, D): the S pixels of all levels, concatenated level by
            level and row by row, for M heads of D channels. Float32, float64, float16 or bfloat16.
            16-bit values are computed and accumulated in float32, except that the forward pass on
            CUDA may interpolate between pixels in 16 bits.
        spatial_shapes: (H, W) of each of the L levels, S pixels in total, as a list of pairs or an
            integer tensor of shape (L, 2).
        level_start_index: Index of the first pixel of each level, of shape (L,). None computes it
            from `spatial_shapes`.
        sampling_locations: Coordinates (x, y) of K points per level, of shape
            (N, Lq, M, L, K, 2). (0, 0) is the top left corner of the level and (1, 1) the bottom
            right corner. The dtype is that of `value`, or float32 with a 16-bit `value`, which
            avoids rounding the locations; autocast uses float32.
        attention_weights: Normalized weights of shape (N, Lq, M, L, K). The dtype is that of
            `value`, or float32 with a 16-bit `value`.

    Returns:
        Tensor of shape (N, Lq, M * D) with the dtype of `value`.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or device does not match, a level has no pixels, or the levels do not
            cover `value` exactly; the message names the argument. The contents of GPU tensors are
            not checked here, to avoid a synchronization: a level that exceeds `value` is treated as
            empty, and the compiled kernels fail a device-side assertion.

    Example:
        >>> value, locations = torch.randn(2, 8 * 8 + 4 * 4, 4, 16), torch.rand(2, 100, 4, 2, 3, 2)
        >>> weights = torch.full((2, 100, 4, 2, 3), 1 / 6)
        >>> ms_deform_attn(value, [(8, 8), (4, 4)], [0, 64], locations, weights).shape
        torch.Size([2, 100, 64])
    """
    _check_value(value)
    levels = _levels(value, spatial_shapes, level_start_index)
    _check_split(value, levels[0].shape[0], sampling_locations, attention_weights)
    if sampling_locations.dtype != attention_weights.dtype:
        sampling_locations, attention_weights = (
            sampling_locations.float(),
            attention_weights.float(),
        )
    return torch.ops.ops_dcnv4.ms_deform_attn(value, *levels, sampling_locations, attention_weights)


def flash_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_loc_attn: Tensor,
    n_points: int,
) -> Tensor:
    """Compute multi-scale deformable attention as in the DCNv4 package.

    Locations and attention logits share one tensor, and the softmax over levels and points is part
    of the operator.

    Args:
        value: See :func:`ms_deform_attn`.
        spatial_shapes: See :func:`ms_deform_attn`.
        level_start_index: See :func:`ms_deform_attn`.
        sampling_loc_attn: Tensor of shape (N, Lq, M, 3 * L * K): for each query and head, 2 * L * K
            location coordinates, ordered by level and point, followed by L * K logits. The dtype is
            that of `value`, or float32 with a 16-bit `value`.
        n_points: Number of points per level, K.

    Returns:
        Tensor of shape (N, Lq, M * D) with the dtype of `value`.

    Raises:
        TypeError: See :func:`ms_deform_attn`.
        ValueError: See :func:`ms_deform_attn`.

    Example:
        >>> value, packed = torch.randn(2, 8 * 8 + 4 * 4, 4, 16), torch.rand(2, 100, 4, 3 * 2 * 8)
        >>> flash_deform_attn(value, [(8, 8), (4, 4)], [0, 64], packed, n_points=8).shape
        torch.Size([2, 100, 64])
    """
    _check_value(value)
    levels = _levels(value, spatial_shapes, level_start_index)
    n_points = to_int(n_points, "n_points")
    _check_fused(value, levels[0].shape[0], sampling_loc_attn, n_points)
    return torch.ops.ops_dcnv4.flash_deform_attn(value, *levels, sampling_loc_attn, n_points)


def _levels(
    value: Tensor, spatial_shapes: SpatialShapes, level_start_index: Tensor | Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Return the shapes and start indices as int64 tensors on the device of `value`.

    Their contents are checked if they can be read without synchronizing.
    """
    shapes = to_integers("spatial_shapes", spatial_shapes)
    readable = _is_readable(spatial_shapes) and _is_readable(level_start_index)
    if shapes.dim() != 2 or shapes.shape[1] != 2 or shapes.shape[0] == 0:
        raise ValueError(
            "spatial_shapes must be (L, 2), with (H, W) of each level, "
            f"got shape {tuple(shapes.shape)}"
        )
    if level_start_index is None:
        pixels = shapes.prod(1)
        start = pixels.cumsum(0) - pixels
    else:
        start = to_integers("level_start_index", level_start_index)
        if tuple(start.shape) != (shapes.shape[0],):
            raise ValueError(
                f"level_start_index must be ({shapes.shape[0]},), one number for each level of "
                f"spatial_shapes, got shape {tuple(start.shape)}"
            )
    for name, tensor in (("spatial_shapes", shapes), ("level_start_index", start)):
        if tensor.is_meta and not value.is_meta:
            raise ValueError(f"{name} must have data like value, got a meta tensor")
    if readable:
        _check_contents(spatial_shapes, level_start_index, value.shape[1])
    # A blocking copy would wait for the work that is queued on the GPU.
    return (
        shapes.to(value.device, torch.int64, non_blocking=True),
        start.to(value.device, torch.int64, non_blocking=True),
    )


def _is_readable(numbers: Tensor | Sequence | None) -> bool:
    """Return whether the contents can be read without a synchronization or a graph break."""
    if not isinstance(numbers, Tensor):
        return True
    # Tracing uses tensor subclasses that have no contents, and torch.vmap tensors without data.
    is_plain = type(numbers) in (Tensor, Parameter) and numbers.device.type == "cpu"
    if not is_plain or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(numbers)


def _as_list(numbers: Tensor | Sequence) -> Sequence:
    return numbers.tolist() if isinstance(numbers, Tensor) else numbers


def to_integers(name: str, numbers: Tensor | Sequence) -> Tensor:
    """Convert integers to a tensor (on the CPU, for sequences); errors name the argument `name`."""
    if not isinstance(numbers, Tensor):
        try:
            dtype = None if len(numbers) else torch.int64
            numbers = torch.tensor(numbers, dtype=dtype, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must hold integers, got {numbers!r}") from error
    check_dense(name, numbers)
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {numbers.dtype}")
    return numbers


def _check_contents(
    spatial_shapes: SpatialShapes, level_start_index: Tensor | Sequence[int] | None, length: int
) -> None:
    shapes = [tuple(pair) for pair in _as_list(spatial_shapes)]
    if any(height < 1 or width < 1 for height, width in shapes):
        raise ValueError(f"spatial_shapes must hold positive sizes (H, W), got {shapes}")
    ends = list(itertools.accumulate(height * width for height, width in shapes))
    if ends[-1] != length:
        raise ValueError(
            f"spatial_shapes must have as many pixels as value, (N, S, M, D) with S = {length}, "
            f"got {ends[-1]} in {shapes}"
        )
    starts = [0, *ends[:-1]]
    if level_start_index is not None and list(_as_list(level_start_index)) != starts:
        raise ValueError(
            f"level_start_index must be {starts}, the first pixel of each level of "
            f"spatial_shapes, got {list(_as_list(level_start_index))}"
        )


def check_raw_ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[int, ...]:
    """Check the arguments of the operator in torch.ops and return the shape of its output.

    The compiled kernels perform the same checks. The contents of `spatial_shapes` and
    `level_start_index` are not checked.
    """
    levels = _check_raw_levels(value, spatial_shapes, level_start_index)
    _check_split(value, levels, sampling_locations, attention_weights)
    if sampling_locations.dtype != attention_weights.dtype:
        raise TypeError(
            "sampling_locations and attention_weights must have one dtype, got "
            f"{sampling_locations.dtype} and {attention_weights.dtype}"
        )
    _check_sizes(value, levels, sampling_locations.shape[1], sampling_locations.shape[4])
    return *sampling_locations.shape[:2], value.shape[2] * value.shape[3]


def check_raw_flash_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc_attn: Tensor,
    n_points: int,
) -> tuple[int, ...]:
    """Check the arguments of the fused operator in torch.ops and return the shape of its output."""
    levels = _check_raw_levels(value, spatial_shapes, level_start_index)
    _check_fused(value, levels, sampling_loc_attn, n_points)
    _check_sizes(value, levels, sampling_loc_attn.shape[1], n_points)
    return *sampling_loc_attn.shape[:2], value.shape[2] * value.shape[3]


def check_levels(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor) -> None:
    """Raise ValueError if a level exceeds `value`; index tensors on other devices are skipped."""
    if spatial_shapes.device.type != "cpu":
        return
    length, starts = value.shape[1], level_start_index.tolist()
    for level, ((height, width), start) in enumerate(
        zip(spatial_shapes.tolist(), starts, strict=True)
    ):
        is_image = 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE
        if not is_image or start < 0 or start + height * width > length:
            raise ValueError(
                f"level {level} of spatial_shapes and level_start_index must be within the "
                f"{length} pixels of value, got {height} x {width} starting at {start}"
            )


def _check_raw_levels(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor) -> int:
    _check_value(value)
    for name, tensor in (
        ("spatial_shapes", spatial_shapes),
        ("level_start_index", level_start_index),
    ):
        check_dense(name, tensor)
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be a tensor of int64, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(
                f"{name} must be on the device of value, {value.device}, got {tensor.device}"
            )
    if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2 or spatial_shapes.shape[0] == 0:
        raise ValueError(f"spatial_shapes must be (L, 2), got shape {tuple(spatial_shapes.shape)}")
    levels = spatial_shapes.shape[0]
    if tuple(level_start_index.shape) != (levels,):
        raise ValueError(
            f"level_start_index must be ({levels},), got shape {tuple(level_start_index.shape)}"
        )
    return levels


def _check_value(value: Tensor) -> None:
    check_tensor("value", value, ("N", "S", "M", "D"))
    if value.shape[1] < 1:
        raise ValueError(
            f"value must have at least one pixel, got (N, S, M, D) = {tuple(value.shape)}"
        )


def _check_split(
    value: Tensor, levels: int, sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    check_tensor("sampling_locations", sampling_locations, ("N", "Lq", "M", "L", "K", "2"))
    check_tensor("attention_weights", attention_weights, ("N", "Lq", "M", "L", "K"))
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    if points < 1:
        raise ValueError("sampling_locations must have at least one point per level, got K = 0")
    shape = (value.shape[0], queries, value.shape[2], levels, points)
    _check_shape("sampling_locations", sampling_locations, (*shape, 2), "(N, Lq, M, L, K, 2)")
    _check_shape("attention_weights", attention_weights, shape, "(N, Lq, M, L, K)")
    _check_like_value(value, "sampling_locations", sampling_locations)
    _check_like_value(value, "attention_weights", attention_weights)


def _check_fused(value: Tensor, levels: int, sampling_loc_attn: Tensor, n_points: int) -> None:
    check_tensor("sampling_loc_attn", sampling_loc_attn, ("N", "Lq", "M", "3 * L * K"))
    if n_points < 1:
        raise ValueError(f"n_points must be at least 1, got {n_points}")
    shape = (value.shape[0], sampling_loc_attn.shape[1], value.shape[2], 3 * levels * n_points)
    _check_shape("sampling_loc_attn", sampling_loc_attn, shape, "(N, Lq, M, 3 * L * K)")
    _check_like_value(value, "sampling_loc_attn", sampling_loc_attn)


def _check_sizes(value: Tensor, levels: int, queries: int, points: int) -> None:
    _, pixels, heads, channels = value.shape
    check_size("the length of value", pixels)
    check_size("the number of queries", queries)
    check_size("the number of heads", heads)
    check_size("the number of channels of a head", channels)
    check_size("the number of channels of value", heads * channels)
    check_size("the number of points of all levels", 3 * levels * points)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name} must be {meaning} = {expected} to match value and spatial_shapes, "
            f"got shape {tuple(tensor.shape)}"
        )


def _check_like_value(value: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.device != value.device:
        raise ValueError(
            f"value and {name} must be on one device, got {value.device} and {tensor.device}"
        )
    if tensor.dtype == value.dtype:
        return
    has_double = torch.float64 in (tensor.dtype, value.dtype)  # autocast does not cast float64
    if has_double or (tensor.dtype != torch.float32 and not autocasts(value.device.type)):
        raise TypeError(
            f"{name} must have value's dtype, or float32 with a 16-bit value, got {tensor.dtype} "
            f"and {value.dtype}"
        )
