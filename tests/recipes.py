"""What the tests of the detectors' and the segmentors' configs share."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"


def read_recipes(file: str) -> dict[str, dict[str, str]]:
    """A table of the published recipes, by the names of the configs."""
    with open(DATA / "openmmlab" / file, newline="") as table:
        return {row["config"]: row for row in csv.DictReader(table)}


def plain(value: Any) -> Any:
    """A part of a config as dicts and lists, without the name of the project it comes from."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if key != "_scope_"}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def without(value: Any, names: set[str]) -> Any:
    """A part of a config without some of its keys, however deep they lie."""
    if isinstance(value, dict):
        return {key: without(item, names) for key, item in value.items() if key not in names}
    if isinstance(value, list):
        return [without(item, names) for item in value]
    return value


def an_eighth(value: Any, key: str = "") -> Any:
    """A pipeline whose images are so much smaller."""
    if isinstance(value, Mapping):
        return {key: an_eighth(item, key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(an_eighth(item, key) for item in value)
    return value // 8 if key in ("scale", "scales", "crop_size") else value
