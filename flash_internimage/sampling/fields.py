"""Maps of a layer: the length of its offsets, and the effective receptive field of a unit."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .layers import Model, all_layers, find_layer, predict_offset_masks, run_to
from .points import Mapping
from .preprocessing import Preprocessing, preprocessing_of


@dataclass(frozen=True)
class OffsetLengths:
    """Lengths of the offsets of a layer, averaged over its groups and taps.

    Attributes:
        layer: Name of the layer.
        stride: Pixels of the network's input per pixel of the layer.
        scale: Pixels of the image per pixel of the network's input.
        lengths: (H, W) float64 in pixels of the layer.
    """

    layer: str
    stride: int
    scale: float
    lengths: np.ndarray

    @property
    def mean(self) -> float:
        """Return the mean length in pixels of the layer."""
        return float(self.lengths.mean())

    @property
    def mean_in_image(self) -> float:
        """Return the mean length in pixels of the image."""
        return self.mean * self.stride * self.scale


def offset_lengths(
    model: Model,
    image: np.ndarray,
    layers: Sequence[str] | None = None,
    *,
    preprocessing: Preprocessing | None = None,
) -> list[OffsetLengths]:
    """Return how far layers move their taps from the regular grid, for each of their pixels.

    An offset is the learned displacement of a tap in pixels, which includes the layer's
    `offset_scale`.

    Args:
        model: A FlashInternImage or InternImage, a model that contains one, or a predictor.
        image: RGB image of shape (H, W, 3), uint8.
        layers: Names of blocks; None for all.
        preprocessing: As for :func:`sampling_points`.

    Raises:
        ValueError: If the model has no such layer.
    """
    found = all_layers(model) if layers is None else [find_layer(model, name) for name in layers]
    if not found:
        raise ValueError("layers must not be empty")
    preprocessing = preprocessing or preprocessing_of(model)
    weight = next(found[0].dcn.parameters())
    x = preprocessing(image).to(weight)
    scale = float(np.sqrt(np.prod(image.shape[:2]) / np.prod(x.shape[2:])))
    result = []
    for layer, mask in zip(found, predict_offset_masks(found, x), strict=True):
        window, taps = layer.window(), layer.dcn.taps
        packed = mask[0, ..., : 3 * window.groups * taps].unflatten(-1, (window.groups, 3 * taps))
        offsets = packed[..., : 2 * taps].double().unflatten(-1, (taps, 2))
        lengths = abs(window.offset_scale) * offsets.norm(dim=-1).mean((-1, -2))
        result.append(OffsetLengths(layer.name, layer.stride, scale, lengths.numpy()))
    return result


def effective_receptive_field(
    model: Model,
    images: np.ndarray | Sequence[np.ndarray],
    layer: str,
    pixel: tuple[float, float] | None = None,
    *,
    samples: int = 4,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
) -> np.ndarray:
    """Return how strongly the output of a layer at one pixel depends on each pixel of the input.

    This is the effective receptive field of Luo et al. (arXiv:1701.04128): the gradient of the
    unit's output with respect to the network's input, in absolute value, summed over the colors and
    averaged. The channels of the unit are added with random weights, drawn anew for each sample.

    Args:
        model: A FlashInternImage or InternImage, a model that contains one, or a predictor.
        images: RGB image of shape (H, W, 3), uint8, or several of one size.
        layer: Name of a block, such as `levels.2.blocks.5`; its output includes the residual.
        pixel: (x, y) in the image; None for the center.
        samples: Number of random weights per image.
        seed: Seed of the random weights.
        preprocessing: As for :func:`sampling_points`.

    Returns:
        Array (H', W') of float64 whose sum is 1, of the size of the network's input.

    Raises:
        ValueError: If the model has no such layer, the pixel is outside the image, the images have
            several sizes, or another argument is out of range.
    """
    found = find_layer(model, layer)
    images = [images] if isinstance(images, np.ndarray) else images
    sizes = sorted({(image.shape[0], image.shape[1]) for image in images})
    if len(sizes) != 1:
        raise ValueError(f"images must have one size, got {sizes}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    [(height, width)] = sizes
    preprocessing = preprocessing or preprocessing_of(model)
    if pixel is None:
        pixel = (width - 1) / 2, (height - 1) / 2
    mapping = Mapping((height, width), preprocessing.input_size(height, width))
    row, column = mapping.to_unit(pixel, found.stride)
    weight = next(found.dcn.parameters())
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(mapping.input_size, dtype=torch.float64)
    for image in images:
        x = preprocessing(image).to(weight).requires_grad_()
        with torch.enable_grad():
            [output] = run_to([found], [found.module], x)
        unit = output[0, row, column]
        for i in range(samples):
            draw = torch.randn(len(unit), generator=generator, dtype=torch.float64).to(unit)
            [grad] = torch.autograd.grad(unit, x, draw, retain_graph=i + 1 < samples)
            total += grad[0].double().abs().sum(0).cpu()
    return (total / total.sum()).numpy()
