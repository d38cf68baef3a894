"""Nested settings as one level of dotted keys."""

from collections.abc import Mapping
from typing import Any


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections into one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        is_section = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return flat
