"""Parts of configs for detectors and segmentors."""

import json
from collections.abc import Sequence

from .models import Model

_LINE = 100  # characters


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
    """Return a string literal in double quotes, without the {{ that mmengine substitutes."""
    return json.dumps(text, ensure_ascii=False).replace("{{", "{\\u007b")


def names_tuple(names: Sequence[str]) -> str:
    """Return the literal of a tuple of names, on several lines if it is long."""
    literals = [quote(name) for name in names]
    line = f"({', '.join(literals)}{',' * (len(literals) == 1)})"
    if len("classes = " + line) <= _LINE:
        return line
    return "(\n" + "".join(f"    {literal},\n" for literal in literals) + ")"
