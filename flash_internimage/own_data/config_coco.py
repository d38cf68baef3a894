"""Write configs for datasets in COCO format."""

import logging
from pathlib import Path

from .class_names import check_classes, some, warn_of_case
from .config_text import config_text, names_tuple, quote
from .layouts import TRAIN, VAL, CocoSplit, find_coco_split
from .models import Model
from .schedules import detection_schedule

_logger = logging.getLogger(__name__)


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
            f"order, {some(classes)}, got {some(others[0])}"
        )
    for split in splits:
        if model.family != "dino" or model.is_demo:  # The demo's pipelines load masks.
            _require_masks(root, split, model)
    check_classes(classes)
    warn_of_case(classes)
    count = len(classes)
    lines = [
        f"classes = {names_tuple(classes)}",
        f"data_root = {quote(root.as_posix() + '/')}",
        _detector(model, count),
    ]
    for key, split in zip(("train", "val"), splits, strict=True):
        lines.append(
            f"{key}_dataloader = dict(\n"
            "    dataset=dict(\n"
            "        data_root=data_root,\n"
            f"        ann_file={quote(split.ann_file.as_posix())},\n"
            f"        data_prefix=dict(img={quote(_folder(split.images))}),\n"
            "        metainfo=dict(classes=classes),\n"
            "    )\n"
            ")"
        )
    lines += [
        "test_dataloader = val_dataloader",
        f"val_evaluator = dict(ann_file={_path(splits[1].ann_file)})",
        "test_evaluator = val_evaluator",
    ]
    images = len(splits[0].content["images"])
    schedule = detection_schedule(images, model.batch_size, model.family)
    return config_text(model, lines, schedule)


def _categories(root: Path, split: CocoSplit) -> list[str]:
    names = [category.get("name") for category in split.content["categories"]]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(
            f"{root / split.ann_file}: categories must have different names, got {some(names)}"
        )
    used = {annotation.get("category_id") for annotation in split.content["annotations"]}
    if unused := [c["name"] for c in split.content["categories"] if c.get("id") not in used]:
        _logger.warning("%s: no annotations of %s", root / split.ann_file, some(unused))
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
    return (  # a box head for each of the three stages
        "model = dict(\n    roi_head=dict(\n"
        "        bbox_head=[\n"
        f"            dict(head, num_classes={count}) for head in _base_.model.roi_head.bbox_head\n"
        "        ],\n"
        f"        mask_head=dict(num_classes={count}),\n"
        "    )\n)"
    )


def _path(ann_file: Path) -> str:
    """Return the expression of the path of an annotation file below the root, or elsewhere."""
    path = quote(ann_file.as_posix())
    return path if ann_file.is_absolute() else f"data_root + {path}"


def _folder(folder: str) -> str:
    return "" if folder == "." else f"{folder}/"
