"""Write annotated images as label maps for semantic segmentation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ...files import write_text
from .annotations import AnnotatedImage, Losses, rectangle, segment
from .images import ImageWriter

IGNORED = 255
BACKGROUND = "background"


def write_label_maps(
    target: Path,
    splits: dict[str, list[AnnotatedImage]],
    classes: Sequence[str],
    losses: Losses,
    *,
    boxes_as_masks: bool,
    write_images: ImageWriter,
) -> dict[str, int]:
    """Write images/SPLIT, annotations/SPLIT and classes.txt to a folder.

    Args:
        target: Folder to write to.
        splits: Images of each split.
        classes: Names of the classes, without the background if the images have shapes.
        losses: Receives what is left out or changed.
        boxes_as_masks: Whether to fill the boxes of objects without an outline.
        write_images: Writes the images of a split to a folder and returns their names.

    Returns:
        Number of labeled pixels of each split, without ignored ones.
    """
    maps = any(item.label_map is not None for items in splits.values() for item in items)
    names = (
        list(classes) if maps else [BACKGROUND, *(name for name in classes if name != BACKGROUND)]
    )
    if len(names) > IGNORED:
        raise ValueError(f"classes must be at most {IGNORED}, got {len(names)}")
    indices = {name: i for i, name in enumerate(names)}
    counts = {}
    for split, items in splits.items():
        files = write_images(items, target / "images" / split)
        counts[split] = 0
        for item, name in zip(items, files, strict=True):
            labels = item.label_map
            if labels is None:
                labels = _draw(item, indices, losses, boxes_as_masks)
            else:
                unknown = (labels >= len(names)) & (labels != IGNORED)
                losses.add(
                    "pixels of unknown classes made ignored pixels", item.where, int(unknown.sum())
                )
                labels = np.where(unknown, IGNORED, labels).astype(np.uint8)
            counts[split] += int((labels != IGNORED).sum())
            path = (target / "annotations" / split / name).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(path)
    text = "".join(f"{name}\n" for name in names)
    write_text(target / "classes.txt", text)
    return counts


def _draw(
    item: AnnotatedImage, indices: dict[str, int], losses: Losses, boxes_as_masks: bool
) -> np.ndarray:
    """Draw the shapes of an image, later ones over earlier ones, (H, W) uint8."""
    labels = np.zeros(item.size, np.uint8)
    for shape in item.shapes:
        index = IGNORED if shape.crowd else indices.get(shape.label)
        if index is None:
            losses.add("objects of unknown classes left out", f"{item.where}: {shape.label}")
            continue
        if boxes_as_masks and shape.box and not shape.polygons and shape.mask is None:
            shape.polygons = [rectangle(shape.box)]
            losses.add("boxes taken as masks", item.where)
        rle = segment(shape, item.size)
        if rle is None:
            losses.add("boxes without an outline left out", item.where)
            continue
        mask = coco_mask.decode(rle).astype(bool)
        if not mask.any():
            losses.add("objects without a pixel in their image left out", item.where)
        labels[mask] = index
    return labels
