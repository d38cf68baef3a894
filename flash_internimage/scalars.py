"""Read the scalars that mmengine's LocalVisBackend writes, over all attempts of a run."""

import json
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
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def read_scalars(work_dir: Path) -> dict[str, dict[int, float]]:
    """Return {name: {step: value}} over all attempts of a run; the latest attempt wins."""
    scalars: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for row in read_rows(work_dir):
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                scalars[name][row["step"]] = value
    return dict(scalars)
