"""Find the splits of a dataset by the usual names of files and folders."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TRAIN = ("train", "training")
VAL = ("val", "valid", "validation", "test", "testing")  # the first that exists


class CocoSplit(NamedTuple):
    """A split in COCO format.

    Attributes:
        ann_file: Annotation file, relative to the root of the dataset.
        images: Folder of the images, relative to the root, empty for the root itself.
        content: The parsed file.
    """

    ann_file: Path
    images: str
    content: dict[str, Any]


class LabelMapSplit(NamedTuple):
    """Folders of images and label maps, relative to the root of the dataset."""

    images: str
    labels: str


def find_coco_split(root: Path, names: Sequence[str], option: str, given: Path | None) -> CocoSplit:
    """Find the annotation file and the images of a split.

    Args:
        root: Root of the dataset.
        names: Usual names of the split, the preferred one first.
        option: Option that names the annotation file, for error messages.
        given: Annotation file, in or below the current folder or the root; None to search.

    Raises:
        FileNotFoundError: If there is no annotation file, or none of its images exists.
        ValueError: If the file is not JSON with images and categories.
    """
    if given is None:
        ann_file = next((path for path in _annotation_files(root, names) if path.is_file()), None)
        if ann_file is None:
            found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.json"))
            raise FileNotFoundError(
                f"{root} must contain {names[0]}.json or annotations/instances_{names[0]}.json, "
                f"got {', '.join(found[:5]) or 'no JSON files'}{', ...' * (len(found) > 5)}; name "
                f"it with {option}"
            )
    else:
        ann_file = given if given.is_file() else root / given
        if not ann_file.is_file():
            raise FileNotFoundError(f"{option} not found: {given}")
    content = _read_coco(ann_file)
    names = [str(image.get("file_name")) for image in content["images"]]
    some = names[:: max(1, len(names) // 100)]
    folders = list(_image_folders(root, ann_file))
    best = max(folders, key=lambda folder: sum(is_file(folder / name) for name in some))
    if not any(is_file(best / name) for name in some):
        places = ", ".join(dict.fromkeys(str(folder) for folder in folders))
        raise FileNotFoundError(f"{ann_file}: image {some[0]:.100} not found in {places}")
    return CocoSplit(_below(ann_file, root), _below(best, root).as_posix(), content)


def is_file(path: Path) -> bool:
    """Return whether a file exists; names in annotations may be too long for one."""
    try:
        return path.is_file()
    except OSError:
        return False


def _annotation_files(root: Path, names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        for folder in (root, root / "annotations"):
            yield folder / f"{name}.json"
            yield folder / f"instances_{name}.json"
            yield from sorted(folder.glob(f"instances_{name}[0-9]*.json"))
        yield root / name / "_annotations.coco.json"  # Roboflow
        yield root / name / "annotations.json"


def _image_folders(root: Path, ann_file: Path) -> Iterator[Path]:
    split = ann_file.stem.removeprefix("instances_")
    if ann_file.parent not in (root, root / "annotations"):
        yield ann_file.parent
        yield ann_file.parent / "images"
    yield root / "images" / split
    yield root / split
    yield root / "images"
    yield root


def _read_coco(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))  # as training does: without byte-order marks
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file in UTF-8, got {error}") from error
    for key in ("images", "categories", "annotations"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path} must contain a list of {key}, as in COCO's format")
        if not entries:
            raise ValueError(f"{path} must contain {key}, got an empty list")
    return content


def _below(path: Path, root: Path) -> Path:
    """Return a path relative to the root, or as it is if it is elsewhere."""
    path, root = path.absolute(), root.absolute()
    return path.relative_to(root) if path.is_relative_to(root) else path


def find_label_map_split(root: Path, names: Sequence[str]) -> LabelMapSplit:
    """Find the folders of the images and label maps of a split.

    Args:
        root: Root of the dataset.
        names: Usual names of the split, the preferred one first.

    Raises:
        FileNotFoundError: If there are no such folders.
    """
    for name in names:
        for images, labels in (
            ("images", "annotations"), ("images", "labels"), ("images", "masks"),
            ("img_dir", "ann_dir"),
        ):  # fmt: skip
            for pair in (
                (f"{images}/{name}", f"{labels}/{name}"),
                (f"{name}/{images}", f"{name}/{labels}"),
            ):
                if all((root / folder).is_dir() for folder in pair):
                    return LabelMapSplit(*pair)
    found = sorted(
        path.relative_to(root).as_posix()
        for pattern in ("*", "*/*")
        for path in root.glob(pattern)
        if path.is_dir()
    )
    raise FileNotFoundError(
        f"{root} must contain images/{names[0]} and annotations/{names[0]}, or {names[0]}/images "
        f"and {names[0]}/labels, got the folders {', '.join(found[:8]) or 'none'}"
        f"{', ...' * (len(found) > 8)}"
    )


def find_class_folders(root: Path, names: Sequence[str]) -> str:
    """Return the name of the folder of a split that contains class folders.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    for name in names:
        if (root / name).is_dir():
            return name
    found = sorted(path.name for path in root.iterdir() if path.is_dir())
    raise FileNotFoundError(
        f"{root} must contain the folder {names[0]} with a folder for each class, got "
        f"{', '.join(found[:8]) or 'no folders'}{', ...' * (len(found) > 8)}"
    )
