"""Draw sampling points, offset lengths and effective receptive fields over an image.

Colors are those of ColorBrewer and matplotlib that color-blind readers tell apart. The functions
use neither pyplot nor other global state, so threads may call them.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from .fields import OffsetLengths, effective_receptive_field, offset_lengths
from .layers import Model, last_of_stages
from .points import Mapping, SamplingPoints, sampling_points
from .preprocessing import Preprocessing, preprocessing_of

_DPI = 100
_MAX_SIDE = 2000  # of an image in a panel, which has fewer pixels
_DIVERGING = "RdBu_r"
_SEQUENTIAL = "cividis"


def draw_sampling_points(
    model: Model,
    image: np.ndarray,
    layer: str,
    pixel: tuple[float, float],
    depth: int = 1,
    *,
    max_points: int = 2000,
    max_groups: int = 16,
    preprocessing: Preprocessing | None = None,
) -> np.ndarray:
    """Draw the sampling points of a layer for a pixel, sized and colored by their weights.

    For one layer, the points of all groups are drawn over the image, next to one enlarged panel per
    group. For a depth above 1, there is one panel per layer.

    Args:
        model: A FlashInternImage or InternImage, a model that contains one, or a predictor.
        image: RGB image of shape (H, W, 3), uint8.
        layer: Name of a block, such as `levels.2.blocks.5`, see :func:`list_layers`.
        pixel: (x, y) in the image.
        depth: Number of layers, see :func:`sampling_points`.
        max_points: Maximum number of points per layer, see :func:`sampling_points`.
        max_groups: Maximum number of panels for groups; those with the largest sum of absolute
            modulation are drawn.
        preprocessing: How the image is resized and normalized; by default as the model expects.

    Returns:
        RGB picture (H', W', 3), uint8, at least 640 pixels wide.

    Raises:
        ValueError: If the model has no such layer, the pixel is outside the image, or another
            argument is out of range.

    Example:
        >>> model = timm.create_model("flash_internimage_tiny", pretrained=True)
        >>> picture = draw_sampling_points(model, image, "levels.2.blocks.5", (120, 80))
    """
    if max_groups < 1:
        raise ValueError(f"max_groups must be at least 1, got {max_groups}")
    levels = sampling_points(
        model,
        image,
        layer,
        pixel,
        depth,
        max_points=max_points,
        preprocessing=preprocessing,
    )
    if depth == 1:
        return _rgb(plot_groups(image, levels[0], pixel, max_groups))
    return _rgb(plot_levels(image, levels, pixel))


def draw_maps(
    model: Model,
    image: np.ndarray,
    pixel: tuple[float, float],
    layers: Sequence[str] | None = None,
    *,
    samples: int = 4,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
) -> np.ndarray:
    """Draw the offset lengths of layers, and the effective receptive field of a pixel in each.

    Args:
        model: A FlashInternImage or InternImage, a model that contains one, or a predictor.
        image: RGB image of shape (H, W, 3), uint8.
        pixel: (x, y) in the image.
        layers: Names of blocks; None for the last block of each stage.
        samples: Random weights per field, see :func:`effective_receptive_field`.
        seed: Seed of the random weights.
        preprocessing: How the image is resized and normalized; by default as the model expects.

    Returns:
        RGB picture (H', W', 3), uint8: offset lengths above, receptive fields below.

    Raises:
        ValueError: If the model has no such layer, or the pixel is outside the image.
    """
    layers = last_of_stages(model) if layers is None else layers
    preprocessing = preprocessing or preprocessing_of(model)
    height, width = image.shape[:2]
    mapping = Mapping((height, width), preprocessing.input_size(height, width))
    fields = [
        effective_receptive_field(
            model,
            image,
            name,
            pixel,
            samples=samples,
            seed=seed,
            preprocessing=preprocessing,
        )
        for name in layers
    ]
    lengths = offset_lengths(model, image, layers, preprocessing=preprocessing)
    return _rgb(plot_maps(image, lengths, fields, pixel, mapping))


def plot_groups(
    image: np.ndarray, points: SamplingPoints, pixel: tuple[float, float], max_groups: int
) -> Figure:
    """Return the figure of :func:`draw_sampling_points` for one layer."""
    groups = points.num_groups
    strength = np.bincount(points.groups, np.abs(points.weights), groups)
    shown = np.sort(np.argsort(-strength, kind="stable")[:max_groups])
    rows = math.isqrt(len(shown) - 1) + 1
    columns = math.ceil(len(shown) / rows)
    height = min(max(6.0 * _aspect(image), 4.5), 10.0)
    figure = Figure(figsize=(13.0, height + 0.8), dpi=_DPI, layout="constrained")
    [[left, right]] = figure.subfigures(1, 2, squeeze=False)
    norm = _symmetric(points.weights)
    whole = left.subplots()
    _show_image(whole, image)
    drawn = _scatter(whole, points, np.full(len(points.groups), True), norm, largest=50)
    _stay_within(whole, image)
    _mark(whole, pixel)
    window = _window(points, pixel)
    x0, x1, y0, y1 = window
    whole.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="black", linewidth=0.8)
    whole.set_title(_count(image, points) + _omission(points), fontsize=9)
    _color_bar(left, drawn, whole, "modulation")
    axes = right.subplots(rows, columns, squeeze=False).ravel()
    for axis, group in zip(axes, shown, strict=False):
        _show_image(axis, image, window)
        _scatter(axis, points, points.groups == group, norm, largest=120 / rows**0.5)
        _mark(axis, pixel)
        axis.set(xlim=window[:2], ylim=window[:1:-1])
        axis.set_title(f"group {group}", fontsize=8)
    for axis in axes[len(shown) :]:
        axis.axis("off")
    text = f"{points.layer}: sampling points of pixel ({pixel[0]}, {pixel[1]}) in {groups} groups"
    if len(shown) < groups:
        text += f"; panels for the {len(shown)} with the largest modulation"
    figure.suptitle(text)
    return figure


def plot_levels(
    image: np.ndarray, levels: Sequence[SamplingPoints], pixel: tuple[float, float]
) -> Figure:
    """Return the figure of :func:`draw_sampling_points` for several layers."""
    columns = 2 if len(levels) in (2, 4) else 3
    rows = math.ceil(len(levels) / columns)
    panel = (13.0 / columns - 1.0) * min(max(_aspect(image), 0.4), 2.0)
    height = rows * (panel + 0.6) + 0.5
    figure = Figure(figsize=(13.0, min(height, 60.0)), dpi=_DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, (axis, points) in enumerate(zip(axes, levels, strict=False), 1):
        _show_image(axis, image)
        everything = np.full(len(points.groups), True)
        norm = _symmetric(points.weights)
        drawn = _scatter(axis, points, everything, norm, smallest=0.3, largest=40)
        _stay_within(axis, image)
        _mark(axis, pixel)
        _color_bar(figure, drawn, axis, "weight")
        axis.set_title(
            f"{number}: {points.layer}\n{_count(image, points)}{_omission(points)}", fontsize=9
        )
    for axis in axes[len(levels) :]:
        axis.axis("off")
    figure.suptitle(
        f"Sampling points of pixel ({pixel[0]}, {pixel[1]}), composed through {len(levels)} layers"
    )
    return figure


def plot_maps(
    image: np.ndarray,
    lengths: Sequence[OffsetLengths],
    fields: Sequence[np.ndarray],
    pixel: tuple[float, float],
    mapping: Mapping,
) -> Figure:
    """Return the figure of :func:`draw_maps`."""
    width = 3.4  # of a column with its color bar, in inches
    height = 2 * (width - 0.9) * _aspect(image) + 1.8
    figure = Figure(
        figsize=(max(width * len(lengths), 6.4), min(max(height, 3.0), 20.0)),
        dpi=_DPI,
        layout="constrained",
    )
    axes = figure.subplots(2, len(lengths), squeeze=False)
    for top, bottom, offsets, field in zip(*axes, lengths, fields, strict=True):
        _show_image(top, image)
        overlay = top.imshow(
            offsets.lengths,
            cmap=_SEQUENTIAL,
            vmin=0,
            alpha=0.8,
            extent=_extent(mapping, offsets.lengths.shape, offsets.stride),
        )
        _stay_within(top, image)
        top.set_title(
            f"{offsets.layer}\nmean offset {offsets.mean:.2f} pixels of the layer,\n"
            f"{offsets.mean_in_image:.1f} of the image",
            fontsize=9,
        )
        figure.colorbar(overlay, ax=top, shrink=0.8, label="pixels of the layer")
        _show_image(bottom, image)
        overlay = bottom.imshow(
            field / field.max(),
            cmap="inferno",
            norm=PowerNorm(0.4, 0, 1),
            alpha=0.85,
            extent=_extent(mapping, field.shape, 1),
        )
        _stay_within(bottom, image)
        _mark(bottom, pixel)
        bottom.set_title("effective receptive field", fontsize=9)
        figure.colorbar(overlay, ax=bottom, shrink=0.8, label="gradient / largest")
    figure.suptitle(f"Offset lengths, and receptive fields of pixel ({pixel[0]}, {pixel[1]})")
    return figure


def _omission(points: SamplingPoints) -> str:
    if not points.omitted:
        return ""
    return f"\nthe strongest, with {100 * (1 - points.omitted):.1f} % of the weights"


def _count(image: np.ndarray, points: SamplingPoints) -> str:
    """Return the number of points, also of those outside the image, which add nothing."""
    height, width = image.shape[:2]
    x, y = points.positions.T
    outside = np.sum((x < -0.5) | (x >= width - 0.5) | (y < -0.5) | (y >= height - 0.5))
    return f"{len(x)} points" + (f", {outside} outside the image" if outside else "")


def _scatter(
    axis: Axes,
    points: SamplingPoints,
    chosen: np.ndarray,
    norm: Normalize,
    largest: float,
    smallest: float = 3.0,
) -> PathCollection:
    weights = points.weights[chosen]
    order = np.argsort(np.abs(weights), kind="stable")  # the strongest on top
    x, y = points.positions[chosen][order].T
    strength = np.abs(weights[order]) / (norm.vmax or 1.0)
    return axis.scatter(
        x,
        y,
        s=smallest + largest * strength,
        c=weights[order],
        cmap=_DIVERGING,
        norm=norm,
        edgecolors="black",
        linewidths=0.1 + 0.5 * np.sqrt(strength),
    )


def _symmetric(weights: np.ndarray) -> Normalize:
    largest = float(np.abs(weights).max(initial=0)) or 1.0
    return Normalize(-largest, largest)


def _show_image(
    axis: Axes, image: np.ndarray, window: tuple[float, float, float, float] | None = None
) -> None:
    """Show an image in light gray tones, so that colors drawn over it stand out.

    Only the pixels in the window x0, x1, y0, y1 are drawn, and those of large images are reduced:
    matplotlib would need gigabytes for them.
    """
    height, width = image.shape[:2]
    x0, x1, y0, y1 = window or (0, width, 0, height)
    left, right = max(0, math.floor(x0)), min(width, math.ceil(x1) + 1)
    top, bottom = max(0, math.floor(y0)), min(height, math.ceil(y1) + 1)
    factor = -(-max(right - left, bottom - top) // _MAX_SIDE)
    shown = np.asarray(Image.fromarray(image[top:bottom, left:right]).reduce(factor))
    extent = (
        left - 0.5, left + shown.shape[1] * factor - 0.5,
        top + shown.shape[0] * factor - 0.5, top - 0.5,
    )  # fmt: skip
    gray = shown.mean(-1, keepdims=True).repeat(3, -1)
    faded = 0.35 * shown + 0.25 * gray + 0.4 * 255
    axis.imshow(faded.astype(np.uint8), interpolation="nearest", extent=extent)
    axis.set(xticks=[], yticks=[])


def _stay_within(axis: Axes, image: np.ndarray) -> None:
    height, width = image.shape[:2]
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _mark(axis: Axes, pixel: tuple[float, float]) -> None:
    for color, width in (("white", 4.0), ("black", 1.6)):
        axis.plot(
            *pixel, marker="+", markersize=14, markeredgewidth=width, color=color, linestyle=""
        )


def _color_bar(figure: Figure | SubFigure, drawn: PathCollection, axis: Axes, label: str) -> None:
    figure.colorbar(drawn, ax=axis, shrink=0.8, label=label)


def _window(
    points: SamplingPoints, pixel: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Return x0, x1, y0, y1 of a square around the pixel that contains the points."""
    (x, y), away = pixel, np.abs(points.positions - np.asarray(pixel)).max()
    half = 1.1 * max(float(away), 4.0)
    return x - half, x + half, y - half, y + half


def _extent(
    mapping: Mapping, shape: tuple[int, ...], stride: int
) -> tuple[float, float, float, float]:
    rows, columns = (torch.tensor([-0.5, n - 0.5], dtype=torch.float64) for n in shape)
    x, y = mapping.to_image(columns, rows, stride)
    return x[0].item(), x[1].item(), y[1].item(), y[0].item()


def _aspect(image: np.ndarray) -> float:
    return image.shape[0] / image.shape[1]


def _rgb(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
