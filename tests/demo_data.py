"""Contents of demo datasets."""

import json
from pathlib import Path
from typing import Any


def contents(root: Path) -> dict[Path, bytes]:
    """Return the contents of all files in a folder, by path."""
    return {file.relative_to(root): file.read_bytes() for file in root.rglob("*.*")}


def read_annotations(root: Path, split: str) -> dict[str, Any]:
    """Return the COCO annotations of a split."""
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())
