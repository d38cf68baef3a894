"""Scenes of handwritten digits on photographs, with COCO annotations and label maps.

The digits (8 x 8 pixels, 0 to 16) are scaled, rotated and painted over one another, so that each
instance has an exact mask: the part of its ink that no later digit covers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from contourpy import FillType, contour_generator
from PIL import Image

IMAGE_SIZES = (128, 160)  # height and width, in pixels
CROWD_DIGIT_SIZES = (10, 14)
DIGITS_PER_CROWD = (12, 20)
CROWD_SIZE = 64  # side of the square that contains a crowd, in pixels
MAX_ROTATION = 25.0  # degrees; small enough to tell a 6 from a 9
MIN_VISIBLE = 0.5  # share of an instance's ink
EDGE = 0.45  # share of full ink at the edge of a stroke
PERIOD = 20  # one scene in this many has a crowd, and one has no objects


@dataclass(frozen=True)
class Material:
    """The K digits and the photographs, (H, W, 3) uint8, of a split."""

    digits: np.ndarray  # (K, 8, 8), 0 to 16
    labels: np.ndarray  # (K,), 0 to 9
    indices: np.ndarray  # (K,), in scikit-learn's load_digits
    photos: list[np.ndarray]


@dataclass(frozen=True)
class Layout:
    """The smallest and largest size and number of the digits of a scene."""

    digit_sizes: tuple[int, int] = (24, 52)  # height before the rotation, in pixels
    digits_per_scene: tuple[int, int] = (2, 7)


@dataclass(frozen=True)
class Instance:
    """A digit in a scene, or a crowd of digits with one label."""

    label: int
    mask: np.ndarray  # (H, W) bool, the visible part
    sources: tuple[int, ...]  # indices in load_digits
    crowd: bool = False


@dataclass(frozen=True)
class Scene:
    """An image and its instances."""

    image: np.ndarray  # (H, W, 3) uint8
    instances: list[Instance]

    def label_map(self, digits: Sequence[int]) -> np.ndarray:
        """Return the label map in ADE20K format, (H, W) uint8.

        0 is the ignore index (crowds), 1 the background, and i + 2 the digit `digits[i]`.
        """
        labels = np.ones(self.image.shape[:2], np.uint8)
        for instance in self.instances:  # masks are disjoint
            labels[instance.mask] = 0 if instance.crowd else digits.index(instance.label) + 2
        return labels


def make_scenes(
    material: Material, count: int, seed: int, layout: Layout | None = None
) -> Iterator[Scene]:
    """Yield scenes; each only depends on the material, the seed, the layout and its index."""
    layout = layout or Layout()
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        objects = 0 if i % PERIOD == PERIOD // 2 else _uniform(rng, layout.digits_per_scene)
        yield _make_scene(material, layout, objects, crowd=i % PERIOD == PERIOD - 1, rng=rng)


def _make_scene(
    material: Material, layout: Layout, objects: int, crowd: bool, rng: np.random.Generator
) -> Scene:
    image = _crop(material.photos, rng)
    instances = [_paint_crowd(image, material, rng)] if crowd else []
    inks = [instance.mask.sum() for instance in instances]
    while len(inks) < objects:
        k = rng.integers(len(material.labels))
        opacity = _opacity(material.digits[k], _uniform(rng, layout.digit_sizes), rng)
        box = _place(opacity.shape, image.shape, rng)
        mask = np.zeros(image.shape[:2], bool)
        mask[box] = opacity >= 0.5
        below = [replace(instance, mask=instance.mask & ~mask) for instance in instances]
        if any(it.mask.sum() < MIN_VISIBLE * ink for it, ink in zip(below, inks, strict=True)):
            continue
        _paint(image[box], opacity, rng)
        index = int(material.indices[k])
        instances = [*below, Instance(int(material.labels[k]), mask, sources=(index,))]
        inks.append(mask.sum())
    return Scene(np.rint(image).astype(np.uint8), instances)


def _paint_crowd(image: np.ndarray, material: Material, rng: np.random.Generator) -> Instance:
    labels = np.unique(material.labels)
    label = int(labels[rng.integers(len(labels))])
    members = rng.choice(np.flatnonzero(material.labels == label), _uniform(rng, DIGITS_PER_CROWD))
    region = _place((CROWD_SIZE, CROWD_SIZE), image.shape, rng)
    mask = np.zeros(image.shape[:2], bool)
    for k in members:
        opacity = _opacity(material.digits[k], _uniform(rng, CROWD_DIGIT_SIZES), rng)
        box = _place(opacity.shape, (CROWD_SIZE, CROWD_SIZE), rng)
        _paint(image[region][box], opacity, rng)
        mask[region][box] |= opacity >= 0.5
    sources = tuple(int(i) for i in material.indices[members])
    return Instance(label, mask, sources, crowd=True)


def _uniform(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(*bounds, endpoint=True))


def _crop(photos: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    photo = photos[rng.integers(len(photos))]
    size = _uniform(rng, IMAGE_SIZES), _uniform(rng, IMAGE_SIZES)
    return photo[_place(size, photo.shape, rng)].astype(np.float32)


def _opacity(digit: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return the opacity, in [0, 1], of a digit scaled to `size` pixels, rotated and trimmed."""
    padded = Image.fromarray(np.pad(digit / 16, 1).astype(np.float32))
    side = round(size * padded.height / 8)
    ink = padded.resize((side, side), Image.Resampling.BICUBIC).rotate(
        rng.uniform(-MAX_ROTATION, MAX_ROTATION), Image.Resampling.BICUBIC, expand=True
    )
    # Ink fades over about size / 8 pixels; this slope makes the edge about one pixel wide.
    opacity = np.clip(0.5 + (np.asarray(ink) - EDGE) * size / 8, 0, 1)
    rows, columns = (np.flatnonzero(opacity.any(axis)) for axis in (1, 0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(
    size: tuple[int, ...], within: tuple[int, ...], rng: np.random.Generator
) -> tuple[slice, slice]:
    height, width = size
    top, left = _uniform(rng, (0, within[0] - height)), _uniform(rng, (0, within[1] - width))
    return np.s_[top : top + height, left : left + width]


def _paint(image: np.ndarray, opacity: np.ndarray, rng: np.random.Generator) -> None:
    """Paint a digit in place, in the one of a few random colors that differs most from below."""
    there = np.tensordot(opacity, image) / opacity.sum()
    colors = rng.uniform(0, 255, (8, 3))
    color = colors[np.argmax(np.linalg.norm(colors - there, axis=1))]
    image += rng.uniform(0.9, 1) * opacity[..., None] * (color - image)


def to_coco(scenes: Iterable[tuple[str, Scene]]) -> dict[str, Any]:
    """Return COCO instance annotations of named scenes; category i + 1 is the digit i.

    Each annotation also has `sources`, the indices of its digits in scikit-learn's load_digits.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, (file_name, scene) in enumerate(scenes, start=1):
        height, width = scene.image.shape[:2]
        images.append(
            {"id": i, "license": 1, "file_name": file_name, "height": height, "width": width}
        )
        for instance in scene.instances:
            annotation = {"id": len(annotations) + 1, "image_id": i, **_annotation(instance)}
            annotations.append(annotation)
    return {
        "info": {
            "description": "scikit-learn's handwritten digits on its sample photographs",
            "contributor": "E. Alpaydin, C. Kaynak (digits); "
            "flickr.com/photos/danielbuechele (china.jpg), /vultilion (flower.jpg)",
            "version": "1",
        },
        "licenses": [
            {"id": 1, "name": "CC BY 2.0", "url": "https://creativecommons.org/licenses/by/2.0/"}
        ],
        "categories": [
            {"id": label + 1, "name": str(label), "supercategory": "digit"} for label in range(10)
        ],
        "images": images,
        "annotations": annotations,
    }


def _annotation(instance: Instance) -> dict[str, Any]:
    rows, columns = (np.flatnonzero(instance.mask.any(axis)) for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    # Crowds are run-length encoded, as in COCO. So are digits with holes, such as 0, 6, 8 and 9:
    # COCO takes the union of polygons, which cannot express holes.
    polygons = None if instance.crowd else _polygons(instance.mask)
    return {
        "category_id": instance.label + 1,
        "iscrowd": int(instance.crowd),
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "area": int(instance.mask.sum()),
        "segmentation": polygons or _run_lengths(instance.mask),
        "sources": list(instance.sources),
    }


def _polygons(mask: np.ndarray) -> list[list[float]] | None:
    """Return the outlines [x0, y0, x1, y1, ...] of a mask's parts, or None if a part has a hole."""
    tracer = contour_generator(z=np.pad(mask, 1).astype(float), fill_type=FillType.OuterOffset)
    outlines: Any = tracer.filled(0.5, np.inf)
    parts, offsets = outlines
    if any(len(boundaries) > 2 for boundaries in offsets):
        return None
    # Convert indices into the padded mask to coordinates, in which the center of the first pixel is
    # at 0.5. The last point repeats the first.
    return [(points[:-1] - 0.5).ravel().tolist() for points in parts]


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Return COCO's uncompressed RLE: lengths of alternating runs of zeros and ones, by column."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    counts = np.diff(changes, prepend=0, append=flat.size)
    return {"size": list(mask.shape), "counts": counts.tolist()}
