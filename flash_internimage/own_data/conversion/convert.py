"""Convert datasets of annotation tools."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...files import write_text
from ..class_names import check_classes, warn_of_case
from .annotations import SUMMARY, AnnotatedImage, Dataset, Losses, Shape, rectangle
from .coco import write_coco
from .images import common_suffix, image_writer
from .label_maps import BACKGROUND, write_label_maps
from .label_studio import read_label_studio
from .labelme import IGNORED, read_labelme
from .output import Output
from .voc import read_voc
from .yolo import read_yolo

FORMATS = ("voc", "yolo", "labelme", "labelstudio")


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        label_maps: Whether to write label maps instead of COCO annotations.
        classes: Names of the classes to convert, in order; None for those of the source.
        val_fraction: Share of the images that become the validation split if the source has no
            splits.
        difficult: What becomes of VOC's difficult objects: `crowd`, `keep` or `drop`.
        images: Folder of the images, for Label Studio.
        boxes_as_masks: Whether boxes become masks where there are no outlines.
        link: Whether to link images instead of copying them.
    """

    label_maps: bool = False
    classes: list[str] | None = None
    val_fraction: float = 0.0
    difficult: str = "crowd"
    images: Path | None = None
    boxes_as_masks: bool = False
    link: bool = False


@dataclass(frozen=True)
class Result:
    """What has been written.

    Attributes:
        images: Number of images of each split.
        counts: Number of objects, or of labeled pixels, of each split.
        classes: Names of the classes.
        losses: What has been left out or changed.
    """

    images: dict[str, int]
    counts: dict[str, int]
    classes: list[str]
    losses: Losses


def convert(kind: str, source: Path, target: Path, options: Options) -> Result:
    """Convert a dataset to COCO annotations or label maps.

    Args:
        kind: Format of the source, one of `FORMATS`.
        source: Folder or file of the dataset.
        target: Folder to create. It only appears when everything is written.
        options: How to convert.

    Returns:
        Counts of what has been written, left out and changed, also in `conversion.json`.

    Raises:
        FileNotFoundError: If the source has no annotations or images of its format.
        FileExistsError: If the target exists.
        ValueError: If the source is malformed as a whole, or nothing is left to write.
        OSError: If a file cannot be read or written.
    """
    target = Path(os.path.abspath(target))  # "." has no name
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"TARGET must not exist or be empty, got {target}")
    with _complete_folder(target) as partial:
        return _convert(kind, source, partial, options)


def _convert(kind: str, source: Path, target: Path, options: Options) -> Result:
    dataset = _read(kind, source, options)
    losses = dataset.losses
    classes = _classes(dataset, options)
    splits = _splits(dataset, options.val_fraction)
    items = [item for some in splits.values() for item in some]
    if not items or not classes:
        reasons = "; ".join(losses.lines()) or f"{len(items)} images and {len(classes)} classes"
        what = "objects" if items else "annotated images"
        raise ValueError(f"{source} must have {what} to convert, got {reasons}")
    for item in items:
        item.shapes = list(_shapes(item, classes, options, losses))
    suffix = common_suffix(items) if options.label_maps else None
    write_images = image_writer(losses, options.link, suffix)
    write = write_label_maps if options.label_maps else write_coco
    counts = write(Output(target, splits, classes, losses, write_images))
    images = {split: len(some) for split, some in splits.items()}
    summary = {
        "source": str(source),
        "format": kind,
        "images": images,
        "pixels" if options.label_maps else "objects": counts,
        "classes": classes,
        "left_out_or_changed": losses.counts,
        "first": losses.first,
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    write_text(target / SUMMARY, text)
    return Result(images, counts, classes, losses)


def _read(kind: str, source: Path, options: Options) -> Dataset:
    if kind == "voc":
        return read_voc(source, options.difficult, options.label_maps, options.classes)
    if kind == "yolo":
        return read_yolo(source)
    if kind == "labelme":
        return read_labelme(source)
    return read_label_studio(source, options.images)


def _classes(dataset: Dataset, options: Options) -> list[str]:
    """Return the names of the classes; objects of others are left out by the writer."""
    classes = options.classes or dataset.classes
    if classes is None:
        shapes = (s for items in dataset.splits.values() for item in items for s in item.shapes)
        classes = sorted({shape.label for shape in shapes} - {IGNORED, BACKGROUND})
    items = (item for items in dataset.splits.values() for item in items)
    if options.label_maps and not any(item.label_map is not None for item in items):
        classes = [BACKGROUND, *(name for name in classes if name != BACKGROUND)]
    check_classes(classes)
    warn_of_case(classes)
    return classes


def _shapes(
    item: AnnotatedImage, classes: Sequence[str], options: Options, losses: Losses
) -> Iterator[Shape]:
    """Yield the objects of an image to write, with boxes as masks if the options say so."""
    for shape in item.shapes:
        if shape.label not in classes and not (options.label_maps and shape.crowd):
            losses.add("objects of unknown classes left out", f"{item.where}: {shape.label}")
            continue
        if options.boxes_as_masks and shape.box and not shape.polygons and shape.mask is None:
            shape.polygons = [rectangle(shape.box)]
            losses.add("boxes taken as masks", item.where)
        yield shape


def _splits(dataset: Dataset, val_fraction: float) -> dict[str, list[AnnotatedImage]]:
    """Return the splits, after dividing a dataset without splits."""
    splits = dict(dataset.splits)
    items = splits.pop("", [])
    if not items:
        if val_fraction:
            raise ValueError(
                f"--val-fraction must be used with a source without splits, got {', '.join(splits)}"
            )
        return splits
    # By a hash of the name, so that the split of an image does not depend on the others.
    ordered = sorted(items, key=lambda item: hashlib.sha256(os.fsencode(item.name)).digest())
    number = max(1, round(val_fraction * len(items))) if val_fraction else 0
    held_out = {id(item) for item in ordered[:number]}
    splits["train"] = [item for item in items if id(item) not in held_out]
    if held_out:
        splits["val"] = [item for item in items if id(item) in held_out]
    return splits


@contextmanager
def _complete_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to write to, which is renamed to `target` when everything is written."""
    existing = next(folder for folder in target.parents if os.path.lexists(folder))
    try:
        hidden = tempfile.TemporaryDirectory(".partial", f".{target.name}.", existing)
    except OSError as error:
        raise OSError(f"TARGET {target} cannot be written: {error.strerror}") from error
    with hidden as name:
        partial = Path(name, target.name)
        partial.mkdir()
        yield partial
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
