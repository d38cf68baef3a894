"""Annotated images between a reader and a writer, and what is lost on the way."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ...images import UnreadableImage, image_suffixes, read_orientation, read_size

Box = tuple[float, float, float, float]
Polygon = list[float]  # x1, y1, x2, y2, ...

SUMMARY = "conversion.json"  # in the folder of each converted dataset
_LARGEST = 1e9
_CIRCLE = 64  # corners of the polygons that replace circles and ellipses


class Losses:
    """What a conversion leaves out or changes: a count and the first place of each kind."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def add(self, kind: str, where: object, count: int = 1) -> None:
        """Count something that is left out or changed.

        Args:
            kind: What it is, in plural, and what became of it.
            where: File, and object in it, for the report.
            count: How often it occurs there.
        """
        if count:
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.first.setdefault(kind, str(where))

    def lines(self) -> list[str]:
        """Return one line for each kind."""
        return [
            f"{count} {kind} (the first: {self.first[kind]})" for kind, count in self.counts.items()
        ]


@dataclass
class Shape:
    """An object: its class, box and, if they are known, its outline or mask.

    Attributes:
        label: Name of the class.
        box: x1, y1, x2 and y2 in pixels; None for that of the outline or mask.
        polygons: Outline of each of its parts.
        mask: (H, W) bool.
        crowd: Whether training and evaluation are to ignore the region.
    """

    label: str
    box: Box | None = None
    polygons: list[Polygon] | None = None
    mask: np.ndarray | None = None
    crowd: bool = False


@dataclass
class AnnotatedImage:
    """An image file and the objects in it.

    Attributes:
        source: The image file, or its contents.
        name: Relative path of the image in its split.
        size: (height, width) to which the annotations refer.
        shapes: Objects, those in front last.
        label_map: (H, W) uint8, class indices or 255, if the source has them.
        where: Annotation file, for messages.
    """

    source: Path | bytes
    name: str
    size: tuple[int, int]
    shapes: list[Shape] = field(default_factory=list)
    label_map: np.ndarray | None = None
    where: str = ""


@dataclass
class Dataset:
    """What a reader returns.

    Attributes:
        splits: Images of each split, in order.
        classes: Names of the classes, in order; None for those of the shapes, sorted.
        losses: What the reader has left out or changed.
    """

    splits: dict[str, list[AnnotatedImage]] = field(default_factory=dict)
    classes: list[str] | None = None
    losses: Losses = field(default_factory=Losses)


def segment(shape: Shape, size: tuple[int, int]) -> dict[str, Any] | None:
    """Return the mask of a shape as a compressed RLE, or None if only its box is known.

    Args:
        shape: An object.
        size: (height, width) of its image.
    """
    if shape.mask is not None:
        return coco_mask.encode(np.asfortranarray(shape.mask, np.uint8))
    if shape.polygons:
        polygons = [near(polygon, size) for polygon in shape.polygons]
        return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
    return None


def near(polygon: Polygon, size: tuple[int, int]) -> Polygon:
    """Limit coordinates to three times the size of the image, as training does.

    pycocotools needs memory for all pixels of an outline, also for those far outside of the image.

    Args:
        polygon: An outline.
        size: (height, width) of its image.
    """
    margin = max(size)
    return [round(min(max(float(number), -margin), 2 * margin), 3) for number in polygon]


def rectangle(box: Box) -> Polygon:
    """Return the corners of a box."""
    x1, y1, x2, y2 = box
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def rotated_rectangle(x: float, y: float, width: float, height: float, angle: float) -> Polygon:
    """Return the corners of a rectangle that is rotated around its first corner.

    Args:
        x: Of the first corner, top left before the rotation.
        y: Likewise.
        width: Before the rotation.
        height: Likewise.
        angle: In degrees, clockwise on the screen.
    """
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    corners = ((0, 0), (width, 0), (width, height), (0, height))
    return [c for dx, dy in corners for c in (x + dx * cos - dy * sin, y + dx * sin + dy * cos)]


def ellipse(x: float, y: float, radius_x: float, radius_y: float, angle: float = 0) -> Polygon:
    """Return a polygon that replaces an ellipse around (x, y), rotated clockwise in degrees."""
    turn = math.radians(angle)
    polygon = []
    for i in range(_CIRCLE):
        dx = radius_x * math.cos(2 * math.pi * i / _CIRCLE)
        dy = radius_y * math.sin(2 * math.pi * i / _CIRCLE)
        polygon.append(x + dx * math.cos(turn) - dy * math.sin(turn))
        polygon.append(y + dx * math.sin(turn) + dy * math.cos(turn))
    return polygon


def declared_size(height: object, width: object) -> tuple[int, int] | None:
    """Return the size in an annotation file as (height, width), or None if it is not there."""
    if type(height) is int and type(width) is int:
        return height, width
    return None


def image_size(
    path: Path, declared: tuple[int, int] | None, where: str, losses: Losses
) -> tuple[int, int] | None:
    """Return the (height, width) that the annotations of an image refer to.

    That is the declared size if the image has it, as stored or as its EXIF data rotates it.
    Otherwise it is the size after the rotation. Unreadable images are counted.

    Args:
        path: The image.
        declared: Size in the annotation file, if it has one.
        where: Annotation file.
        losses: Receives unreadable images and sizes that differ.
    """
    sizes = possible_sizes(path, losses)
    if sizes is None or declared in sizes:
        return sizes and declared
    if declared is not None:
        losses.add("images of another size than annotated, whose own size is taken", where)
    return sizes[1]


def possible_sizes(path: Path, losses: Losses) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return the (height, width) of an image as stored and after its EXIF rotation.

    Args:
        path: The image.
        losses: Receives the image if it is unreadable, for which None is returned.
    """
    try:
        height, width = read_size(path)
        with Image.open(path) as image:
            turned = read_orientation(image) >= 5
    except UnreadableImage as error:
        losses.add("unreadable images left out", error)
        return None
    return (height, width), (width, height) if turned else (height, width)


def find_images(folder: Path) -> dict[str, Path]:
    """Return the images in a folder by their relative path.

    Hidden files and folders, and folders that contain the result of a conversion, are left out.
    """
    suffixes = image_suffixes()
    results = {path.parent for path in folder.rglob(SUMMARY)} - {folder}
    images = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.suffix.lower() in suffixes and not hidden and results.isdisjoint(path.parents):
            images[name.as_posix()] = path
    return images


def check_label(value: object) -> str:
    """Return the name of a class without white space around it.

    Raises:
        ValueError: If it is not a text, or empty.
    """
    label = value.strip() if isinstance(value, str) else ""
    if not label:
        raise ValueError(f"the name of a class must be a text, got {value!r:.50}")
    return label


def check_numbers(values: Iterable[object], count: int | None = None) -> list[float]:
    """Return numbers or texts as floats that can be multiplied and added without overflow.

    Raises:
        ValueError: If one is not a number of at most 1e9, or there are not `count` of them.
        TypeError: If one is neither a number nor a text.
    """
    try:
        numbers = [float(value) for value in values]  # type: ignore[arg-type]
    except OverflowError as error:
        raise ValueError(f"numbers must be at most {_LARGEST:g}, got a huge integer") from error
    if wrong := [number for number in numbers if not abs(number) <= _LARGEST]:
        raise ValueError(f"numbers must be at most {_LARGEST:g}, got {wrong[0]}")
    if count is not None and len(numbers) != count:
        raise ValueError(f"{count} numbers must be given, got {len(numbers)}")
    return numbers


def flat(points: Sequence[Sequence[object]]) -> Polygon:
    """Return points [[x, y], ...] as [x, y, ...].

    Raises:
        ValueError: If one is not a pair of finite numbers.
        TypeError: If `points` has another structure.
    """
    return [number for point in points for number in check_numbers(point, 2)]
