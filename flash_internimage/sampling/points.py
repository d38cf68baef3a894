"""Sampling points of DCNv3 and DCNv4 layers, and their composition through several layers.

A pixel of a layer with stride s (4 to 32) is the center of its receptive field in the convolutions
of the stem and between the stages, all of which have 3 x 3 taps, stride 2 and padding 1: pixel
(row, column) is centered on pixel (s * row, s * column) of the network's input. The input is the
image, resized with half-pixel centers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ops_dcnv4 import reference
from ops_dcnv4.window import Window

from .layers import Layer, Model, find_layer, predict_offset_masks
from .preprocessing import Preprocessing, preprocessing_of


@dataclass(frozen=True)
class SamplingPoints:
    """Sampling points of one layer, for the unit at a pixel or for the units that a unit reads.

    Attributes:
        layer: Name of the layer.
        stride: Pixels of the network's input per pixel of the layer.
        positions: (n, 2) float64, x and y in pixels of the image; integers are centers of pixels.
        weights: (n,) float64. The modulation, which may be negative, multiplied by the weight of
            the unit that the point belongs to, which is 1 in the first layer.
        groups: (n,) int64, the group of each point.
        num_groups: Number of groups of the layer.
        omitted: Share of the sum of absolute weights that belongs to points omitted because there
            were more than the maximum.
    """

    layer: str
    stride: int
    positions: np.ndarray
    weights: np.ndarray
    groups: np.ndarray
    num_groups: int
    omitted: float


@dataclass(frozen=True)
class Units:
    """Output pixels of a layer with their weights; all tensors have shape (U,)."""

    rows: Tensor
    columns: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Taps:
    """Sampling points in pixels of a layer; all tensors have shape (n,)."""

    x: Tensor
    y: Tensor
    weights: Tensor
    groups: Tensor


@dataclass(frozen=True)
class Mapping:
    """Coordinates of an image of (height, width) = `size` that is resized to `input_size`."""

    size: tuple[int, int]
    input_size: tuple[int, int]

    def to_unit(self, pixel: tuple[float, float], stride: int) -> tuple[int, int]:
        """Return (row, column) of the unit of a layer whose center is closest to pixel (x, y).

        Raises:
            ValueError: If the pixel is outside the image.
        """
        (height, width), (x, y) = self.size, pixel
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"pixel must be inside the image of {width} x {height} pixels, got {x},{y}"
            )
        row, column = (
            min(round(((n + 0.5) * new / old - 0.5) / stride), (new - 1) // stride)
            for n, new, old in zip((y, x), self.input_size, self.size, strict=True)
        )
        return max(row, 0), max(column, 0)

    def to_image(self, x: Tensor, y: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        """Return the coordinates in the image of points in pixels of a layer."""
        (height, width), (input_height, input_width) = self.size, self.input_size
        return (
            (x * stride + 0.5) * width / input_width - 0.5,
            (y * stride + 0.5) * height / input_height - 0.5,
        )


def sampling_points(
    model: Model,
    image: np.ndarray,
    layer: str,
    pixel: tuple[float, float],
    depth: int = 1,
    *,
    max_points: int = 2000,
    preprocessing: Preprocessing | None = None,
) -> list[SamplingPoints]:
    """Return where a layer samples its input for a pixel, and where the layers below do.

    With a depth above 1, points are composed as in Deformable Convolutional Networks (Dai et al.,
    arXiv:1703.06211, figure 6): each point of a layer is interpolated from four units of the layer
    below, whose own points follow. Weights multiply along the way, with those of the interpolation.
    A unit that is read by several points has the sum of their absolute weights, divided by the
    number of groups. This describes which pixels are read; the residual connections, the channels'
    projections, and the extent of the convolutions between stages are left out.

    Args:
        model: A FlashInternImage or InternImage, a model that contains one, or a predictor.
        image: RGB image of shape (H, W, 3), uint8.
        layer: Name of a block, such as `levels.2.blocks.5`, see :func:`list_layers`.
        pixel: (x, y) in the image. The points are those of the closest output pixel of the layer.
        depth: Number of layers, from `layer` downwards.
        max_points: Maximum number of points per layer; those with the largest absolute weights are
            kept, and only these are continued in the layer below.
        preprocessing: How the image is resized and normalized; by default as the model expects, see
            :func:`preprocessing_of`.

    Returns:
        The points of each layer, beginning with `layer`.

    Raises:
        ValueError: If the model has no such layer, the pixel is outside the image, or another
            argument is out of range.
    """
    layers = _layers_down(find_layer(model, layer), depth)
    if max_points < 1:
        raise ValueError(f"max_points must be at least 1, got {max_points}")
    preprocessing = preprocessing or preprocessing_of(model)
    size = image.shape[0], image.shape[1]
    mapping = Mapping(size, preprocessing.input_size(*size))
    row, column = mapping.to_unit(pixel, layers[0].stride)
    weight = next(layers[0].dcn.parameters())
    masks = predict_offset_masks(layers, preprocessing(image).to(weight))
    start = torch.ones(1, dtype=torch.float64)
    units = Units(torch.tensor([row]), torch.tensor([column]), start)
    result = []
    for current, mask in zip(layers, masks, strict=True):
        taps, omitted = strongest(points_of_units(mask, current.window(), units), max_points)
        positions = torch.stack(mapping.to_image(taps.x, taps.y, current.stride), dim=-1)
        result.append(
            SamplingPoints(
                current.name,
                current.stride,
                positions.numpy(),
                taps.weights.numpy(),
                taps.groups.numpy(),
                current.dcn.group,
                omitted,
            )
        )
        if (below := current.below()) is not None:
            ratio = current.stride // below.stride
            units = units_read(taps, mask.shape[1:3], current.dcn.group, ratio)
    return result


def _layers_down(layer: Layer, depth: int) -> list[Layer]:
    layers = [layer]
    while (below := layers[-1].below()) is not None:
        layers.append(below)
    if not 1 <= depth <= len(layers):
        raise ValueError(
            f"depth must be from 1 to {len(layers)}, the layers from {layer.name} down to "
            f"{layers[-1].name}, got {depth}"
        )
    return layers[:depth]


def points_of_units(offset_mask: Tensor, window: Window, units: Units) -> Taps:
    """Return the sampling points of output pixels of DCNv4, in pixels of its input.

    Args:
        offset_mask: Offsets and modulation of one image, (1, H_out, W_out, P).
        window: Parameters of the operator.
        units: Output pixels.

    Returns:
        U * G * K points, whose weights are the modulation multiplied by the weight of the unit.
    """
    points = reference.sampling_points(offset_mask, *window)
    x, y, modulation = (t[0, units.rows, units.columns].double() for t in points)
    group = torch.arange(window.groups)[:, None].expand(x.shape)
    weights = units.weights[:, None, None] * modulation
    return Taps(x.flatten(), y.flatten(), weights.flatten(), group.flatten())


def strongest(taps: Taps, count: int) -> tuple[Taps, float]:
    """Return the points with the largest absolute weights, and the share of weights omitted."""
    if len(taps.x) <= count:
        return taps, 0.0
    strength = taps.weights.abs()
    kept = strength.argsort(descending=True, stable=True)[:count].sort().values
    total = strength.sum().item()
    omitted = 1 - strength[kept].sum().item() / total if total else 0.0
    fields = (taps.x, taps.y, taps.weights, taps.groups)
    return Taps(*(field[kept] for field in fields)), omitted


def units_read(taps: Taps, size: Sequence[int], groups: int, ratio: int = 1) -> Units:
    """Return the units of the layer below that sampling points are interpolated from.

    Args:
        taps: Points in pixels of a layer.
        size: (H, W) of the input of that layer.
        groups: Number of groups, by which the weights are divided.
        ratio: Stride of the layer relative to that below; the units are the centers of windows.

    Returns:
        The units with non-zero weights.
    """
    height, width = size
    weights = torch.zeros(height * width, dtype=torch.float64)
    for corner in reference.corners(taps.x, taps.y, height, width):
        share = torch.where(corner.inside, corner.weight * taps.weights.abs(), 0)
        weights.index_add_(0, corner.pixel, share)
    read = weights.nonzero().flatten()
    return Units(read // width * ratio, read % width * ratio, weights[read] / groups)
