"""Predictions as JSON."""

from typing import Any

import numpy as np

from ..predictions import Classification, Detections, LabelMap, Result


def to_record(result: Result) -> dict[str, Any]:
    """Return a prediction as a dict for JSON.

    Returns:
        A dict with one list. Classification: `classes`, best first, with `label`, `name` and
        `score`. Detection: `objects`, by descending score, with `label`, `name`, `score`, `bbox`
        (x, y, width and height, in pixels) and `segmentation` if the model predicts masks.
        Segmentation: `segments`, one per class in the image, with `label`, `name`, `share` (of the
        pixels) and `segmentation`. Each `segmentation` is COCO's run-length encoding.
    """
    if isinstance(result, Classification):
        parts = zip(result.labels.tolist(), result.names, result.scores.tolist(), strict=True)
        return {
            "classes": [
                {"label": label, "name": name, "score": round(score, 6)}
                for label, name, score in parts
            ]
        }
    if isinstance(result, Detections):
        return {"objects": [_object(result, i) for i in range(len(result.boxes))]}
    return {"segments": _segments(result)}


def _object(result: Detections, i: int) -> dict[str, Any]:
    label = int(result.labels[i])
    x1, y1, x2, y2 = result.boxes[i].tolist()
    found = {
        "label": label,
        "name": result.classes[label],
        "score": round(float(result.scores[i]), 6),
        "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
    }
    if result.masks is not None:
        found["segmentation"] = encode_mask(result.masks[i])
    return found


def _segments(result: LabelMap) -> list[dict[str, Any]]:
    labels, counts = np.unique(result.labels, return_counts=True)
    return [
        {
            "label": label,
            "name": result.classes[label],
            "share": round(count / result.labels.size, 6),
            "segmentation": encode_mask(result.labels == label),
        }
        for label, count in zip(labels.tolist(), counts.tolist(), strict=True)
    ]


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return COCO's run-length encoding of a mask, as `size` and `counts`.

    Args:
        mask: (H, W) bool.
    """
    from pycocotools import mask as coco  # requires the extra "openmmlab"

    encoded = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
