"""Write annotated images as a COCO dataset for detection and instance segmentation."""

import json
from typing import Any

from pycocotools import mask as coco_mask

from ...files import write_text
from .annotations import AnnotatedImage, Box, Losses, Shape, near, segment
from .output import Output

_CLIPPED = 1.0  # pixels beyond the image that are not worth mentioning


def write_coco(output: Output) -> dict[str, int]:
    """Write annotations/instances_SPLIT.json and the images of each split; ids count from 1.

    Returns:
        Number of objects of each split.
    """
    folder, losses = output.folder / "annotations", output.losses
    folder.mkdir(parents=True)
    ids = {name: i for i, name in enumerate(output.classes, start=1)}
    counts = {}
    for split, items in output.splits.items():
        names = output.write_images(items, output.folder / split)
        annotations: list[dict[str, Any]] = []
        images = []
        for image_id, (item, name) in enumerate(zip(items, names, strict=True), start=1):
            height, width = item.size
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
            for shape in item.shapes:
                entry = _annotation(shape, item, losses)
                if entry is not None:
                    category = {"image_id": image_id, "category_id": ids[shape.label]}
                    annotations.append({"id": len(annotations) + 1, **category, **entry})
        content = {
            "images": images,
            "categories": [{"id": i, "name": name} for name, i in ids.items()],
            "annotations": annotations,
        }
        text = json.dumps(content, ensure_ascii=False)
        write_text(folder / f"instances_{split}.json", text)
        counts[split] = len(annotations)
        if any("segmentation" in a for a in annotations):
            without = [a for a in annotations if "segmentation" not in a]
            losses.add("boxes among outlines, without a segmentation", split, len(without))
    return counts


def _annotation(shape: Shape, item: AnnotatedImage, losses: Losses) -> dict[str, Any] | None:
    """Return the fields of an object, or None if it has no pixel in its image."""
    height, width = item.size
    if shape.mask is not None and not shape.mask.any():
        losses.add("empty masks left out", item.where)
        return None
    rle = segment(shape, item.size)
    box = _box(shape, rle)
    if box[0] > box[2] or box[1] > box[3]:
        losses.add("boxes with corners in the wrong order, which were swapped", item.where)
        (left, right), (top, bottom) = sorted(box[::2]), sorted(box[1::2])
        box = left, top, right, bottom
    if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
        losses.add("objects outside of their image left out", f"{item.where}: {box}")
        return None
    x1, y1, x2, y2 = max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)
    area = (x2 - x1) * (y2 - y1) if rle is None else float(coco_mask.area(rle))
    if x2 - x1 < 1 or y2 - y1 < 1 or area < 1:
        losses.add("objects smaller than a pixel left out", f"{item.where}: {box}")
        return None
    if max(x1 - box[0], y1 - box[1], box[2] - x2, box[3] - y2) > _CLIPPED:
        losses.add("boxes clipped to their image", f"{item.where}: {box}")
    entry: dict[str, Any] = {
        "bbox": [_round(n) for n in (x1, y1, x2 - x1, y2 - y1)],
        "area": _round(area),
        "iscrowd": int(shape.crowd),
    }
    if rle is None:
        return entry
    if shape.polygons and not shape.crowd:
        entry["segmentation"] = [near(polygon, item.size) for polygon in shape.polygons]
    else:
        entry["segmentation"] = {**rle, "counts": rle["counts"].decode()}
    return entry


def _box(shape: Shape, rle: dict[str, Any] | None) -> Box:
    """Return the box of a shape: as annotated, of its outline, or of its mask."""
    if shape.box is not None:
        return shape.box
    if shape.polygons:
        xs = [x for polygon in shape.polygons for x in polygon[::2]]
        ys = [y for polygon in shape.polygons for y in polygon[1::2]]
        return min(xs), min(ys), max(xs), max(ys)
    x, y, width, height = map(float, coco_mask.toBbox(rle))
    return x, y, x + width, y + height


def _round(number: float) -> float:
    return round(float(number), 3)
