"""Write configs for datasets of images and label maps."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..images import UnreadableImage, image_suffixes, read_label_map
from .class_names import read_classes, some, warn_of_case
from .config_text import config_text, names_tuple, quote
from .layouts import TRAIN, VAL, LabelMapSplit, find_label_map_split
from .models import Model
from .scanning import scan
from .schedules import segmentation_schedule

_logger = logging.getLogger(__name__)

IGNORED = 255  # by default


def label_map_config(
    root: Path,
    model: Model,
    classes: Sequence[str] | None = None,
    ignore_index: int = IGNORED,
    reduce_zero_label: bool = False,
) -> str:
    """Return a config that trains a segmentor on images and label maps.

    Args:
        root: Root of the dataset.
        model: Model to fine-tune.
        classes: Names of the classes; None for `classes.txt` in the root or, without one, names
            made from the values in the label maps.
        ignore_index: Value of the pixels to ignore.
        reduce_zero_label: Whether 0 marks pixels to ignore, and 1 the first class.

    Raises:
        FileNotFoundError: If the folders of the splits, or files in them, are not found.
        ValueError: If the label maps have other values than the classes.
    """
    splits = [find_label_map_split(root, names) for names in (TRAIN, VAL)]
    suffixes = {_suffixes(root, split) for split in splits}
    if len(suffixes) > 1:
        raise ValueError(
            f"images and label maps must have the same suffixes in both splits, got "
            f"{' and '.join(map(str, sorted(suffixes)))}"
        )
    image_suffix, label_suffix = suffixes.pop()
    values: Counter[int] = Counter()
    for split in splits:
        values += _values(root / split.labels, label_suffix)
    if classes is None and (root / "classes.txt").is_file():
        classes = read_classes(root / "classes.txt")
    classes = _check_values(values, classes, ignore_index, reduce_zero_label)
    warn_of_case(classes)
    settings = [
        'type="CheckedSegDataset"',
        f"data_root={quote(root.as_posix() + '/')}",
        "metainfo=dict(classes=classes)",
        f"reduce_zero_label={reduce_zero_label}",
    ]
    if ignore_index != IGNORED:
        settings.append(f"ignore_index={ignore_index}")
    if (image_suffix, label_suffix) != (".jpg", ".png"):
        settings += [f"img_suffix={quote(image_suffix)}", f"seg_map_suffix={quote(label_suffix)}"]
    lines = [
        f"classes = {names_tuple(classes)}",
        "data = dict(\n" + "".join(f"    {setting},\n" for setting in settings) + ")",
    ]
    for key, split in zip(("train", "val"), splits, strict=True):
        prefix = f"img_path={quote(split.images)}, seg_map_path={quote(split.labels)}"
        lines.append(
            f"{key}_dataloader = dict(\n    dataset=dict(data_prefix=dict({prefix}), **data)\n)"
        )
    lines += ["test_dataloader = val_dataloader", _segmentor(model, len(classes))]
    images = len(list((root / splits[0].images).rglob(f"*{image_suffix}")))
    return config_text(model, lines, segmentation_schedule(images, model.batch_size))


def _suffixes(root: Path, split: LabelMapSplit) -> tuple[str, str]:
    """Return the suffixes of the images and label maps that have the rest of their name in common.

    Raises:
        FileNotFoundError: If no image has a label map.
    """
    known = image_suffixes()
    images, labels = (
        sorted(
            path.relative_to(root / folder).as_posix()
            for path in (root / folder).rglob("*")
            if path.suffix.lower() in known and not path.name.startswith(".")
        )
        for folder in split
    )
    stems = {name[: -len(Path(name).suffix)]: Path(name).suffix for name in images}
    pairs: Counter[tuple[str, str]] = Counter()
    for label in labels:
        for end in range(len(label), 0, -1):
            if label[:end] in stems:
                pairs[stems[label[:end]], label[end:]] += 1
                break
    if not pairs:
        raise FileNotFoundError(
            f"{root} must contain label maps named after their images, got {len(images)} images in "
            f"{split.images} ({some(images)}) and {len(labels)} label maps in {split.labels} "
            f"({some(labels)})"
        )
    if len(pairs) > 1:
        counts = ", ".join(f"{n} of {pair[0]} and {pair[1]}" for pair, n in pairs.most_common(3))
        raise ValueError(
            f"images and label maps in {root / split.images} must have one suffix each, got "
            f"{counts}: rename or convert them"
        )
    return next(iter(pairs))


def _values(folder: Path, suffix: str) -> Counter[int]:
    """Return the values in label maps, each with the number of label maps that contain it."""
    paths = sorted(folder.rglob(f"*{suffix}"))

    def read(path: Path) -> list[int] | UnreadableImage:
        try:
            image = np.asarray(read_label_map(path))
        except UnreadableImage as error:
            return error
        if image.ndim != 2:
            raise ValueError(
                f"label map {path} must have one channel that contains class indices, got an array "
                f"of shape {image.shape}"
            )
        return np.unique(image).tolist()

    values: Counter[int] = Counter()
    for found in scan(read, paths, folder.name):
        if isinstance(found, UnreadableImage):
            _logger.warning("%s", found)
        else:
            values.update(map(int, found))
    return values


def _check_values(
    values: Counter[int],
    classes: Sequence[str] | None,
    ignore_index: int,
    reduce_zero_label: bool,
) -> Sequence[str]:
    """Return the names of the classes after comparing their number with the label maps.

    Raises:
        ValueError: If there are fewer than two classes, or values that are no class.
    """
    first = int(reduce_zero_label)
    used = sorted(set(values) - {ignore_index, IGNORED} - set(range(first)))
    shown = f"{some(sorted(values), 20)}, of which {ignore_index} is ignored"
    highest = used[-1] if used else first
    if classes is None:
        if len(used) < 2 or highest - first >= IGNORED - 1:
            raise ValueError(
                f"label maps must contain the indices of at least 2 classes, got the values {shown}"
            )
        classes = [f"class {value}" for value in range(first, highest + 1)]
        _logger.warning(
            "no classes.txt and no --classes: %d classes are named after the values of the label "
            "maps", len(classes),
        )  # fmt: skip
    if highest - first >= len(classes):
        hint = ""
        if highest == len(classes) and not reduce_zero_label:
            hint = "; --reduce-zero-label if 1 is the first class and 0 is to be ignored"
        wrong = [value for value in used if value - first >= len(classes)]
        raise ValueError(
            f"label maps must contain the indices {first} to {first + len(classes) - 1} of the "
            f"{len(classes)} classes or {ignore_index} to ignore pixels (--ignore-index), got "
            f"{some(wrong, 20)}{hint}"
        )
    if len(classes) > IGNORED:
        raise ValueError(
            f"classes must be at most {IGNORED}, one for each value of a byte, got {len(classes)}"
        )
    if len(classes) < 2:
        raise ValueError(
            f"classes must be at least 2, got {some(list(classes))}; for a single kind of object, "
            "add a class for the background"
        )
    absent = [classes[i] for i in range(len(classes)) if i + first not in values]
    if absent:
        _logger.warning("no pixels of %s", some(absent))
    if ignore_index != IGNORED and ignore_index - first in range(len(classes)):
        raise ValueError(
            f"--ignore-index must not be the index of a class, got {ignore_index} with the classes "
            f"{first} to {first + len(classes) - 1}"
        )
    return classes


def _segmentor(model: Model, count: int) -> str:
    if model.family == "mask2former":
        weights = f"dict(class_weight=[1.0] * {count} + [0.1])"
        return f"model = dict(decode_head=dict(num_classes={count}, loss_cls={weights}))"
    if not model.is_demo:
        head = f"dict(num_classes={count})"
    else:  # The demo has class weights for its own classes.
        head = f"dict(num_classes={count}, loss_decode=dict(class_weight=None))"
    return f"model = dict(\n    decode_head={head},\n    auxiliary_head={head},\n)"
