"""Names of classes: files of them, and names that files cannot contain."""

import logging
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from .text_files import read_text

_NO_TEXT = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, line separators
_logger = logging.getLogger(__name__)


def read_classes(path: Path) -> list[str]:
    """Read a text file with the name of a class in each line.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a text file, or has no names or one twice.
    """
    names = [name for line in read_text(path).splitlines() if (name := line.strip())]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path} must have a different name in each line, got {some(names)}")
    return names


def check_classes(names: Sequence[str]) -> None:
    """Check that the names can be written to a file with a name in each line.

    Raises:
        ValueError: If a name is empty or has line breaks or other control characters.
    """
    for name in names:
        if not name or any(unicodedata.category(letter) in _NO_TEXT for letter in name):
            raise ValueError(
                f"names of classes must be text without control characters, got {name!r:.100}"
            )


def warn_of_case(names: Sequence[str]) -> None:
    """Log the names that differ only in case, which are mostly one class."""
    spellings = defaultdict(list)
    for name in names:
        spellings[name.casefold()].append(name)
    if same := [" and ".join(group) for group in spellings.values() if len(group) > 1]:
        _logger.warning("classes differ only in case: %s", some(same))


def some(items: Sequence[object], number: int = 5) -> str:
    """Return the first items, separated by commas."""
    return ", ".join(map(str, items[:number])) + ", ..." * (len(items) > number)
