"""Parts of configs for detectors and segmentors."""

import json
from collections.abc import Sequence
from pathlib import Path

from .models import Model

_LINE = 100  # characters


def read_classes(path: Path) -> list[str]:
    """Read a text file with the name of a class in each line.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a text file, or has no names or one twice.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text file in UTF-8, got {error}") from error
    names = [line for line in lines if line]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path} must have a different name in each line, got {some(names)}")
    return names


def config_text(model: Model, lines: Sequence[str], schedule: str | None) -> str:
    """Return a config that inherits from that of a model and starts from its weights.

    Args:
        model: Model to fine-tune.
        lines: Settings.
        schedule: Settings of the schedule; None for that of the model.
    """
    text = f'_base_ = "flash_internimage::{model.config}"\n' + "\n".join(lines) + "\n"
    if model.weights:
        data = "80 classes" if model.config.startswith("detection") else "150 classes"
        text += (
            f"# trained on {data}: the last layers of the heads stay randomly initialized\n"
            f'load_from = "{model.weights}"\n'
        )
    return text + (schedule or "")


def quote(text: str) -> str:
    """Return a string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def names_tuple(names: Sequence[str]) -> str:
    """Return the literal of a tuple of names, on several lines if it is long."""
    literals = [quote(name) for name in names]
    line = f"({', '.join(literals)}{',' * (len(literals) == 1)})"
    if len("classes = " + line) <= _LINE:
        return line
    return "(\n" + "".join(f"    {literal},\n" for literal in literals) + ")"


def some(items: Sequence[object], number: int = 5) -> str:
    """Return the first items, separated by commas."""
    return ", ".join(map(str, items[:number])) + ", ..." * (len(items) > number)
