"""Write configs for own datasets."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from ..images import UnreadableImage, image_suffixes, read_label_map
from .layouts import (
    TRAIN,
    VAL,
    CocoSplit,
    LabelMapSplit,
    find_class_folders,
    find_coco_split,
    find_label_map_split,
)
from .models import Model
from .scanning import scan
from .schedules import classification_epochs, detection_schedule, segmentation_schedule

_logger = logging.getLogger(__name__)

IGNORED = 255
_LINE = 100


def coco_config(
    root: Path, model: Model, train: Path | None = None, val: Path | None = None
) -> str:
    """Return a config that trains a detector on a dataset in COCO format.

    Args:
        root: Root of the dataset.
        model: Model to fine-tune.
        train: Annotation file of the training split; None to search for the usual names.
        val: Annotation file of the validation split; likewise.

    Raises:
        FileNotFoundError: If an annotation file or its images are not found.
        ValueError: If an annotation file is malformed, the splits differ in their categories, or
            the model needs masks that the annotations do not have.
    """
    splits = [
        find_coco_split(root, TRAIN, "--train", train),
        find_coco_split(root, VAL, "--val", val),
    ]
    classes, *others = [_categories(root, split) for split in splits]
    if others != [classes]:
        raise ValueError(
            f"{splits[1].ann_file} must have the categories of {splits[0].ann_file} in the same "
            f"order, {_some(classes)}, got {_some(others[0])}"
        )
    for split in splits:
        if model.family != "dino":
            _require_masks(root, split, model)
    count = len(classes)
    lines = [
        f"classes = {_names(classes)}",
        f"data_root = {_text(root.as_posix() + '/')}",
        _detector(model, count),
    ]
    for key, split in zip(("train", "val"), splits, strict=True):
        lines.append(
            f"{key}_dataloader = dict(\n"
            "    dataset=dict(\n"
            "        data_root=data_root,\n"
            f"        ann_file={_text(split.ann_file.as_posix())},\n"
            f"        data_prefix=dict(img={_text(_folder(split.images))}),\n"
            "        metainfo=dict(classes=classes),\n"
            "    )\n"
            ")"
        )
    lines += [
        "test_dataloader = val_dataloader",
        f"val_evaluator = dict(ann_file=data_root + {_text(splits[1].ann_file.as_posix())})",
        "test_evaluator = val_evaluator",
    ]
    images = len(splits[0].content["images"])
    schedule = detection_schedule(images, model.batch_size, model.family)
    return _openmmlab(model, lines, schedule)


def _categories(root: Path, split: CocoSplit) -> list[str]:
    names = [category.get("name") for category in split.content["categories"]]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(
            f"{root / split.ann_file}: categories must have different names, got {_some(names)}"
        )
    used = {annotation.get("category_id") for annotation in split.content["annotations"]}
    if unused := [c["name"] for c in split.content["categories"] if c.get("id") not in used]:
        _logger.warning("%s: no annotations of %s", root / split.ann_file, _some(unused))
    return names


def _require_masks(root: Path, split: CocoSplit, model: Model) -> None:
    annotations = split.content["annotations"]
    if without := sum(not annotation.get("segmentation") for annotation in annotations):
        raise ValueError(
            f"--model must be one without masks, such as dino-t, for {root / split.ann_file}, of "
            f"whose {len(annotations)} annotations {without} have no segmentation, got {model.name}"
        )


def _detector(model: Model, count: int) -> str:
    if model.family == "dino":
        return f"model = dict(bbox_head=dict(num_classes={count}))"
    if model.family == "mask_rcnn":
        head = f"dict(num_classes={count})"
        return f"model = dict(roi_head=dict(bbox_head={head}, mask_head={head}))"
    heads = ("bbox_head", "mask_head")
    return (
        "model = dict(\n    roi_head=dict(\n"
        + "".join(
            f"        {name}=[\n            dict(head, num_classes={count}) "
            f"for head in _base_.model.roi_head.{name}\n        ],\n"
            for name in heads
        )
        + "    )\n)"
    )


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
    settings = [
        'type="CheckedSegDataset"',
        f"data_root={_text(root.as_posix() + '/')}",
        "metainfo=dict(classes=classes)",
        f"reduce_zero_label={reduce_zero_label}",
    ]
    if ignore_index != IGNORED:
        settings.append(f"ignore_index={ignore_index}")
    if (image_suffix, label_suffix) != (".jpg", ".png"):
        settings += [f"img_suffix={_text(image_suffix)}", f"seg_map_suffix={_text(label_suffix)}"]
    lines = [
        f"classes = {_names(classes)}",
        "data = dict(\n" + "".join(f"    {setting},\n" for setting in settings) + ")",
    ]
    for key, split in zip(("train", "val"), splits, strict=True):
        prefix = f"img_path={_text(split.images)}, seg_map_path={_text(split.labels)}"
        lines.append(
            f"{key}_dataloader = dict(\n    dataset=dict(data_prefix=dict({prefix}), **data)\n)"
        )
    lines += ["test_dataloader = val_dataloader", _segmentor(model, len(classes))]
    images = len(list((root / splits[0].images).rglob(f"*{image_suffix}")))
    return _openmmlab(model, lines, segmentation_schedule(images, model.batch_size))


def read_classes(path: Path) -> list[str]:
    """Read a text file with the name of a class in each line.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a text file, or has no names or one twice.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text file in UTF-8, got {error}") from error
    names = [line for line in lines if line]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path} must have a different name in each line, got {_some(names)}")
    return names


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
            f"{split.images} ({_some(images)}) and {len(labels)} label maps in {split.labels} "
            f"({_some(labels)})"
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
    shown = f"{_some(sorted(values), 20)}, of which {ignore_index} is ignored"
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
            f"{_some(wrong, 20)}{hint}"
        )
    if len(classes) < 2:
        raise ValueError(
            f"classes must be at least 2, got {_some(list(classes))}; for a single kind of object, "
            "add a class for the background"
        )
    absent = [classes[i] for i in range(len(classes)) if i + first not in values]
    if absent:
        _logger.warning("no pixels of %s", _some(absent))
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


def folder_config(root: Path, model: str, name: str) -> str:
    """Return a config that trains a classifier on folders of images.

    Args:
        root: Folder that contains a folder for each split, with a folder for each class.
        model: Name of a released checkpoint, or architecture of timm without weights.
        name: Name of the config, after which its output folder is called.

    Raises:
        FileNotFoundError: If the folders of the splits are not found.
        ValueError: If the training split has no images or fewer than two classes.
    """
    from ..checkpoints.zoo import read_zoo
    from ..classification.data.folders import list_folder
    from ..classification.output import suitable_ema_decay

    train, val = (find_class_folders(root, names) for names in (TRAIN, VAL))
    images = list_folder(root / train).images
    classes = {Path(image).parent.name for image in images} - {""}
    if len(classes) < 2:
        raise ValueError(
            f"{root / train} must contain at least 2 folders of images, one for each class, got "
            f"{len(classes)} with images"
        )
    batch_size = min(64, len(images) // 2 * 2)
    epochs = classification_epochs(len(images), batch_size)
    entry = read_zoo().get(model)
    settings = {"name": model.partition(".")[0], "num_classes": len(classes)}
    if entry is not None:
        settings["initial_checkpoint"] = model
    data = {"root": root.as_posix()}
    data |= {"train_split": train} if train != "train" else {}
    data |= {"val_split": val} if val != "val" else {}
    if entry is not None and entry.resolution != 224:
        data["image_size"] = entry.resolution
    content = {
        "output": f"output/{name}",
        "batch_size": batch_size,
        "ema_decay": float(suitable_ema_decay(epochs * (len(images) // batch_size))),
        "model": settings,
        "data": data,
        "schedule": {"epochs": epochs, "warmup_epochs": max(1, epochs // 15)},
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return f"# {len(images)} images of {len(classes)} classes\n{text}"


def _openmmlab(model: Model, lines: Sequence[str], schedule: str | None) -> str:
    text = f'_base_ = "flash_internimage::{model.config}"\n' + "\n".join(lines) + "\n"
    if model.weights:
        data = "80 classes" if model.config.startswith("detection") else "150 classes"
        text += (
            f"# trained on {data}: the last layers of the heads stay randomly initialized\n"
            f'load_from = "{model.weights}"\n'
        )
    return text + (schedule or "")


def _folder(folder: str) -> str:
    return "" if folder == "." else f"{folder}/"


def _text(text: str) -> str:
    """Return a string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _names(names: Sequence[str]) -> str:
    """Return a tuple of names, on several lines if it is long."""
    literals = [_text(name) for name in names]
    line = f"({', '.join(literals)}{',' * (len(literals) == 1)})"
    if len("classes = " + line) <= _LINE:
        return line
    return "(\n" + "".join(f"    {literal},\n" for literal in literals) + ")"


def _some(items: Sequence[object], number: int = 5) -> str:
    return ", ".join(map(str, items[:number])) + ", ..." * (len(items) > number)
