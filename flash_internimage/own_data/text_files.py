"""Read text and JSON files, also as Windows' tools write them."""

import codecs
import json
from pathlib import Path
from typing import Any


def read_text(path: Path, errors: str = "strict") -> str:
    """Return the text of a file in UTF-8 or, with a byte-order mark, in UTF-16.

    Args:
        path: Text file.
        errors: What to do with other bytes; see :meth:`bytes.decode`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is in another encoding.
    """
    data = path.read_bytes()
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text file in UTF-8, got {error}") from error


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file, got {error}") from error
