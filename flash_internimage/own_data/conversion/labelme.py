"""Read datasets in the format of labelme: a JSON file for each image."""

import base64
import binascii
import io
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from ...images import UnreadableImage, read_image
from ..class_names import read_classes
from ..layouts import is_file
from ..text_files import read_json
from .annotations import (
    AnnotatedImage,
    Dataset,
    Losses,
    Shape,
    check_label,
    check_numbers,
    declared_size,
    ellipse,
    find_images,
    flat,
    image_size,
)

_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test",
}  # fmt: skip
_NAMES = ("labels.txt", "classes.txt")
# Labels with a meaning in labelme's own converters.
IGNORED, BACKGROUND = "__ignore__", "_background_"


def read_labelme(root: Path) -> Dataset:
    """Read a dataset in the format of labelme.

    Args:
        root: Folder of JSON files and images, or of a folder for each split. `labels.txt` or
            `classes.txt` lists the classes in order, if there is one.

    Raises:
        FileNotFoundError: If there are no JSON files of labelme.
        ValueError: If the list of classes is malformed.
    """
    dataset = Dataset()
    names = next((root / name for name in _NAMES if (root / name).is_file()), None)
    if names is not None:
        dataset.classes = [n for n in read_classes(names) if n not in (IGNORED, BACKGROUND)]
    folders = {
        _SPLITS[p.name]: p for p in sorted(root.iterdir()) if p.is_dir() and p.name in _SPLITS
    }
    used: set[Path] = set()
    files = 0
    for split, folder in folders.items() or [("", root)]:
        for path, content in _annotation_files(folder, dataset.losses):
            files += 1
            item = _read_item(path, content, folder, dataset.losses)
            if item is None:
                continue
            if isinstance(item.source, Path):
                image = item.source.resolve()
                if image in used:
                    dataset.losses.add("further annotation files of the same image left out", path)
                    continue
                used.add(image)
            dataset.splits.setdefault(split, []).append(item)
        for image in find_images(folder).values():
            if image.resolve() not in used:
                dataset.losses.add("images without an annotation file left out", image)
    if not files:
        raise FileNotFoundError(f"{root} must contain JSON files of labelme")
    return dataset


def _annotation_files(folder: Path, losses: Losses) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.rglob("*.json")):
        try:
            content = read_json(path)
        except ValueError as error:
            losses.add("malformed annotation files left out, with their images", error)
            continue
        if isinstance(content, dict) and isinstance(content.get("shapes"), list):
            yield path, content
        else:
            losses.add("JSON files that are not labelme's left out", path)


def _read_item(
    path: Path, content: dict[str, Any], folder: Path, losses: Losses
) -> AnnotatedImage | None:
    # labelme writes the separators of the system on which it runs.
    name = PureWindowsPath(str(content.get("imagePath") or "")).as_posix()
    declared = declared_size(content.get("imageHeight"), content.get("imageWidth"))
    image = path.parent / name
    source: Path | bytes = image
    suffix = image.suffix
    if name and is_file(image):
        size = image_size(image, declared, str(path), losses)
    else:
        embedded = _embedded(content, path, losses)
        if embedded is None:
            return None
        source, size, format_ = embedded
        if Image.registered_extensions().get(suffix.lower()) != format_:
            suffix = f".{format_.lower()}"  # labelme embeds most formats as PNG
        losses.add("images embedded in an annotation file, written as files", path)
    if size is None:
        return None
    relative = path.relative_to(folder).with_suffix(suffix or ".png").as_posix()
    item = AnnotatedImage(source, relative, size, where=str(path))
    groups: dict[tuple[str, str], Shape] = {}
    for number, entry in enumerate(content["shapes"], start=1):
        where = f"{path}, shape {number}"
        try:
            shape = _read_shape(entry, size, where, losses)
        except (ValueError, TypeError, KeyError, UnreadableImage) as error:
            losses.add("malformed shapes left out", f"{where}: {error}")
            continue
        if shape is None:
            continue
        group = entry.get("group_id")
        key = shape.label, str(group)
        first = groups.get(key) if group is not None else None
        if first is not None and first.polygons and shape.polygons:
            first.polygons += shape.polygons
        else:
            groups.setdefault(key, shape)
            item.shapes.append(shape)
    return item


def _embedded(
    content: dict[str, Any], path: Path, losses: Losses
) -> tuple[bytes, tuple[int, int], str] | None:
    """Return the image in an annotation file, its size and its format."""
    try:
        data = base64.b64decode(content.get("imageData") or "", validate=True)
        image = read_image(io.BytesIO(data), str(path))
    except (binascii.Error, TypeError, ValueError):
        losses.add("annotation files without an image", path)
        return None
    return data, (image.height, image.width), image.format or "PNG"


def _read_shape(entry: Any, size: tuple[int, int], where: str, losses: Losses) -> Shape | None:
    """Return a shape, or None if its type is not converted."""
    if not isinstance(entry, dict):
        raise ValueError(f"it must be an object, got {entry!r:.50}")
    label = check_label(entry.get("label"))
    kind = entry.get("shape_type") or "polygon"
    if kind not in ("polygon", "rectangle", "circle", "mask"):
        losses.add(f"shapes of type {kind} left out", where)
        return None
    points = entry["points"]
    numbers = flat(points)
    shape = Shape("background" if label == BACKGROUND else label, crowd=label == IGNORED)
    if kind == "polygon":
        if len(points) < 3:
            raise ValueError(f"a polygon must have at least 3 points, got {len(points)}")
        shape.polygons = [numbers]
    elif kind == "rectangle":
        if len(points) not in (2, 4):
            raise ValueError(f"a rectangle must have 2 or 4 points, got {len(points)}")
        xs, ys = numbers[::2], numbers[1::2]
        shape.box = min(xs), min(ys), max(xs), max(ys)
    elif kind == "circle":
        x, y, edge_x, edge_y = check_numbers(numbers, 4)
        losses.add("circles turned into polygons", where)
        radius = float(np.hypot(edge_x - x, edge_y - y))
        shape.polygons = [ellipse(x, y, radius, radius)]
    else:
        shape.mask = _read_mask(entry["mask"], numbers, size, where)
    return shape


def _read_mask(data: str, corners: list[float], size: tuple[int, int], where: str) -> np.ndarray:
    """Place the mask of a shape, an image in base64, at its first corner."""
    image: Image.Image = read_image(io.BytesIO(base64.b64decode(data, validate=True)), where)
    part = np.asarray(image.convert("L")) > 0
    if len(corners) < 2:
        raise ValueError("a mask must have the points of its corners, got none")
    x, y = round(corners[0]), round(corners[1])
    mask = np.zeros(size, bool)
    top, left = max(y, 0), max(x, 0)
    inside = part[top - y : size[0] - y, left - x : size[1] - x]
    mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return mask
