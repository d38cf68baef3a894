"""Read the results that the evaluation programs write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.zoo import to_figures
from .card import METRICS, Result


def read_results(path: Path, name: str, weights: str, released: bool) -> list[Result]:
    """Read measured results from a file.

    Args:
        path: File written by `zoo evaluate --json`, by `classification.test --json`, or by
            OpenMMLab's logger, which states neither a model nor a checkpoint.
        name: Name of the model that the results should belong to.
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
    model = str(contents.get("name", contents.get("model", name)))
    if not _may_be_same(model, name):
        raise ValueError(f"--results {path} must be of {name}, got those of {model}")
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


def _may_be_same(one: str, other: str) -> bool:
    """Return whether names are of the same model; one of them may lack timm's tag."""
    architecture, _, tag = one.partition(".")
    other_architecture, _, other_tag = other.partition(".")
    return architecture == other_architecture and (tag == other_tag or not (tag and other_tag))


def _values(contents: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the known metrics, in percent."""
    if isinstance(figures := contents.get("figures"), dict):
        rows = {figure: row for figure, row in figures.items() if isinstance(row, dict)}
        return {figure: row.get("measured") for figure, row in rows.items() if figure in METRICS}
    values = {figure: contents[figure] for figure in ("top1", "top5") if figure in contents}
    metrics = {key: value for key, value in contents.items() if isinstance(value, int | float)}
    return values | to_figures(metrics)
