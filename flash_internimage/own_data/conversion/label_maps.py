"""Write annotated images as label maps for semantic segmentation."""

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ...files import write_text
from .annotations import AnnotatedImage, Losses, segment
from .output import Output

IGNORED = 255
BACKGROUND = "background"


def write_label_maps(output: Output) -> dict[str, int]:
    """Write images/SPLIT, annotations/SPLIT and classes.txt.

    Returns:
        Number of labeled pixels of each split, without ignored ones.

    Raises:
        ValueError: If there are more classes than values of a byte.
    """
    names, losses = output.classes, output.losses
    if len(names) > IGNORED:
        raise ValueError(
            f"classes of label maps must be at most {IGNORED}, got {len(names)}: select some with "
            "--classes"
        )
    indices = {name: i for i, name in enumerate(names)}
    counts = {}
    for split, items in output.splits.items():
        files = output.write_images(items, output.folder / "images" / split)
        counts[split] = 0
        for item, name in zip(items, files, strict=True):
            labels = item.label_map
            if labels is None:
                labels = _draw(item, indices, losses)
            else:
                unknown = (labels >= len(names)) & (labels != IGNORED)
                losses.add(
                    "pixels of unknown classes made ignored pixels", item.where, int(unknown.sum())
                )
                labels = np.where(unknown, IGNORED, labels).astype(np.uint8)
            counts[split] += int((labels != IGNORED).sum())
            path = (output.folder / "annotations" / split / name).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(path)
    text = "".join(f"{name}\n" for name in names)
    write_text(output.folder / "classes.txt", text)
    return counts


def _draw(item: AnnotatedImage, indices: dict[str, int], losses: Losses) -> np.ndarray:
    """Draw the shapes of an image, later ones over earlier ones, (H, W) uint8."""
    labels = np.zeros(item.size, np.uint8)
    for shape in item.shapes:
        index = IGNORED if shape.crowd else indices[shape.label]
        rle = segment(shape, item.size)
        if rle is None:
            losses.add("boxes without an outline left out", item.where)
            continue
        mask = coco_mask.decode(rle).astype(bool)
        if not mask.any():
            losses.add("objects without a pixel in their image left out", item.where)
        labels[mask] = index
    return labels
