"""Read the scalars that mmengine's LocalVisBackend writes, over all attempts of a run."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any


def read_rows(work_dir: Path) -> list[dict[str, Any]]:
    """Return the rows with a step in a work folder, the latest attempt last.

    Half a line, with which a killed attempt may end, is left out.
    """
    rows = []
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows


def is_number(value: Any) -> bool:
    """Return whether a value of a row is a number, which may be NaN or infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: int | float) -> bool:
    """Return whether a number is finite; Python's integers can exceed the range of floats."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def read_scalars(work_dir: Path) -> dict[str, dict[int, float]]:
    """Return {name: {step: value}} over all attempts of a run; the latest attempt wins."""
    scalars: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for row in read_rows(work_dir):
        for name, value in row.items():
            if is_number(value) and name != "step":
                scalars[name][row["step"]] = value
    return dict(scalars)
