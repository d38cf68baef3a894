"""Read the results that the evaluation programs write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .card import METRICS, Result

# Metrics of OpenMMLab, and the factors that convert them to percent.
_OPENMMLAB = {
    "coco/bbox_mAP": ("box_ap", 100),
    "coco/segm_mAP": ("mask_ap", 100),
    "mIoU": ("miou", 1),
}


def read_results(path: Path, name: str, weights: str, released: bool) -> list[Result]:
    """Read measured results from a file.

    Args:
        path: File written by `zoo evaluate --json`, by `classification.test --json`, or by
            OpenMMLab's logger, which states neither a model nor a checkpoint.
        name: Zoo entry, timm model or config file that the results should belong to.
        weights: Name of the checkpoint file that the results should belong to.
        released: Whether it is the released one.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not such a file, or states another model or checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--results not found: {path}")
    try:
        contents = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"--results {path} must be JSON: {error}") from error
    values = _values(contents) if isinstance(contents, dict) else {}
    if not values:
        raise ValueError(f"--results {path} must contain metrics of an evaluation program")
    given, model = Path(name).stem, str(contents.get("name", contents.get("model", name)))
    if Path(model).stem != given:
        raise ValueError(f"--results {path} must be of {given}, got those of {model}")
    evaluated = Path(str(contents.get("checkpoint", weights))).name
    if evaluated not in (weights, "released" if released else weights):
        raise ValueError(f"--results {path} must be of {weights}, got those of {evaluated}")
    images = contents.get("images")
    for figure, value in values.items():
        if not isinstance(value, int | float) or not 0 <= value <= 100:
            raise ValueError(f"--results {path}: {figure} must be a percentage, got {value!r}")
    return [
        Result(figure, round(value, 2), "measured", images if isinstance(images, int) else None)
        for figure, value in values.items()
    ]


def _values(contents: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the known metrics, in percent."""
    if isinstance(figures := contents.get("figures"), dict):
        rows = {figure: row for figure, row in figures.items() if isinstance(row, dict)}
        return {figure: row.get("measured") for figure, row in rows.items() if figure in METRICS}
    values = {figure: contents[figure] for figure in ("top1", "top5") if figure in contents}
    for metric, (figure, factor) in _OPENMMLAB.items():
        if isinstance(value := contents.get(metric), int | float):
            values[figure] = value * factor
    return values
