"""Read datasets in the format of YOLO (Ultralytics and Darknet)."""

import os
import reprlib
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from ..class_names import read_classes
from ..text_files import read_text
from .annotations import (
    AnnotatedImage,
    Dataset,
    Losses,
    Shape,
    check_numbers,
    find_images,
    image_size,
)

_SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
_NAMES = ("classes.txt", "obj.names", "labels.txt")


def read_yolo(source: Path) -> Dataset:
    """Read a dataset in the format of YOLO.

    Each line of a label file is a class and a box (center, width and height) or a polygon, relative
    to the size of the image.

    Args:
        source: data.yaml, or the folder that contains it; or a folder with `classes.txt`, images
            and labels, without splits.

    Raises:
        FileNotFoundError: If there is no data.yaml and no classes.txt, or a split has no images.
        ValueError: If data.yaml or classes.txt is malformed.
    """
    config = _find_config(source)
    dataset = Dataset()
    if config is None:
        names = next((source / name for name in _NAMES if (source / name).is_file()), None)
        if names is None:
            raise FileNotFoundError(
                f"{source} must contain data.yaml, or classes.txt with the name of a class in each "
                "line"
            )
        dataset.classes = read_classes(names)
        folder = source / "images" if (source / "images").is_dir() else source
        splits = {"": list(find_images(folder).values())}
        settings: dict[str, Any] = {}
    else:
        settings = _read_config(config)
        dataset.classes = settings["names"]
        splits = {}
        for key, split in _SPLITS.items():
            if settings.get(key):
                splits.setdefault(split, []).extend(_images(config, settings, key))
        folder = config.parent
    keypoints = "kpt_shape" in settings
    seen: set[Path] = set()
    for split, images in splits.items():
        if not images:
            dataset.losses.add("splits without images", f"{config or source}: {split}")
        items = []
        for image in images:
            labels = _label_file(image)
            seen.add(labels)
            size = image_size(image, None, str(labels), dataset.losses)
            if size is None:
                continue
            item = AnnotatedImage(image, "", size, where=str(labels))
            item.shapes = _read_labels(labels, size, dataset.classes, keypoints, dataset.losses)
            items.append(item)
        # Without "..", with which names would lead out of the target.
        places = [Path(os.path.abspath(str(item.source))) for item in items]
        root = _common_folder(places)
        for item, place in zip(items, places, strict=True):
            item.name = place.relative_to(root).as_posix()
        if items:
            dataset.splits[split] = items
    for path in sorted({path.parent for path in seen}):
        for labels in sorted(path.glob("*.txt")) if path.is_dir() else []:
            if labels not in seen and labels.name not in _NAMES:
                dataset.losses.add("label files without an image", labels)
    return dataset


def _find_config(source: Path) -> Path | None:
    if source.is_file():
        return source
    for pattern in ("data.yaml", "data.yml", "dataset.yaml", "*.yaml", "*.yml"):
        if found := sorted(source.glob(pattern)):
            return found[0]
    return None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(
            f"{path} must be a YAML file, got {' '.join(str(error).split())}"
        ) from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and all(isinstance(key, int) for key in names):
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"{path}: names must be numbered from 0, got {sorted(names)[:20]}")
        names = [names[key] for key in sorted(names)]
    plain = isinstance(names, list) and all(type(name) in (str, int, float) for name in names)
    if not names or not plain:
        got = reprlib.repr(names)  # of limited depth, as YAML can nest billions of names
        hint = (
            "; quote words such as yes and no" if plain is False and isinstance(names, list) else ""
        )
        raise ValueError(f"{path}: names must be a list of class names, got {got}{hint}")
    names = [str(name).strip() for name in names]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: names must differ, got {names}")
    return {**content, "names": names}


def _images(config: Path, settings: dict[str, Any], key: str) -> Iterator[Path]:
    """Yield the images of a split: folders, lists of files, or several of them."""
    places = settings[key]
    for place in places if isinstance(places, list) else [places]:
        if not isinstance(place, str):
            got = reprlib.repr(place)
            raise ValueError(f"{config}: {key} must be a folder or a list of files, got {got}")
        path = _resolve(config, settings.get("path"), place)
        if path is None and key == "test":  # Roboflow lists it, also where there is none
            continue
        if path is None:
            raise FileNotFoundError(f"{config}: {key} not found: {place}")
        if path.is_dir():
            yield from find_images(path).values()
            continue
        for line in read_text(path, "replace").splitlines():
            if line.strip():
                yield path.parent / _slashes(line.strip())  # which may be absolute


def _slashes(path: str) -> str:
    """Return a path with the separators that all systems read."""
    return PureWindowsPath(path).as_posix()


def _resolve(config: Path, root: object, place: str) -> Path | None:
    """Return the path of a split, relative to `path` of the config or to its folder."""
    roots = [config.parent]
    place = _slashes(place)
    if isinstance(root, str) and root:
        root = _slashes(root)
        roots = [config.parent / root, Path(root), config.parent / Path(root).name, *roots]
    places = [place]
    if place.startswith("../"):  # Roboflow writes paths relative to a folder beside the config.
        places.append(place.removeprefix("../"))
    for base in roots:
        for candidate in places:
            if (base / candidate).exists():
                return base / candidate
    return None


def _common_folder(images: list[Path]) -> Path:
    """Return the lowest folder that contains all images."""
    parents = [set(image.parents) for image in images]
    common = set.intersection(*parents) if parents else {Path()}
    return max(common, key=lambda path: len(path.parts))


def _label_file(image: Path) -> Path:
    """Return the label file of an image: beside it, or in `labels` instead of `images`."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[:-1][::-1].index("images")
        parts[last] = "labels"
        return Path(*parts).with_suffix(".txt")
    beside = image.with_suffix(".txt")
    other = image.parent.parent / "labels" / beside.name
    return other if not beside.is_file() and other.is_file() else beside


def _read_labels(
    path: Path, size: tuple[int, int], classes: list[str], keypoints: bool, losses: Losses
) -> list[Shape]:
    if not path.is_file():
        losses.add("images without a label file, taken as images without objects", path)
        return []
    shapes = []
    text = read_text(path, "replace")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            shape = _read_line(line.split(), size, classes, keypoints, where, losses)
        except ValueError as error:
            losses.add("malformed lines left out", f"{where}: {error}")
            continue
        if shape is not None:
            shapes.append(shape)
    return shapes


def _read_line(
    words: list[str],
    size: tuple[int, int],
    classes: list[str],
    keypoints: bool,
    where: str,
    losses: Losses,
) -> Shape | None:
    height, width = size
    index, *numbers = check_numbers(words)
    if not index.is_integer():
        raise ValueError(f"the class must be an integer, got {words[0]}")
    index = int(index)
    if not 0 <= index < len(classes):
        losses.add("objects of unknown classes left out", f"{where}: class {index}")
        return None
    label = classes[index]
    if keypoints and len(numbers) > 4:
        losses.add("sets of keypoints left out", where)
        numbers = numbers[:4]
    elif len(numbers) == 5:
        losses.add("confidences left out", where)
        numbers = numbers[:4]
    if len(numbers) == 4:
        x, y, w, h = numbers
        box = (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
        return Shape(label, box)
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(
            f"it must have 5 numbers, or a class and 3 or more points, got {len(words)}"
        )
    polygon = [n * (height if i % 2 else width) for i, n in enumerate(numbers)]
    return Shape(label, polygons=[polygon])
