"""Find the local files of the images that Label Studio's tasks refer to."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")  # prefix of uploaded files


class StudioImages:
    """Images in a folder, found by the URLs and paths in tasks.

    Args:
        files: The images.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._by_name: dict[str, list[Path]] = {}
        self._by_upload: dict[str, list[Path]] = {}
        for file in files:
            self._by_name.setdefault(file.name, []).append(file)
            self._by_upload.setdefault(_upload_name(file.name), []).append(file)

    def find(self, task: dict[str, Any]) -> list[Path]:
        """Return the images of the name of a task's image.

        Of several, those are returned that have most of the folders in the URL in common: a single
        one unless the URL does not tell them apart.
        """
        for address in _addresses(task):
            for path in _paths(address):
                original = _UPLOAD.sub("", path.name, count=1)
                files = (
                    self._by_name.get(path.name)
                    or self._by_name.get(original)
                    or (self._by_upload.get(original) if original != path.name else None)
                )
                if files:
                    common = [_common(path.parts[:-1], file.parts[:-1]) for file in files]
                    best = max(common)
                    return [f for f, n in zip(files, common, strict=True) if n == best]
        return []


def image_name(task: dict[str, Any]) -> str:
    """Return the name of a task's image, for messages."""
    address = next(_addresses(task), "")
    return next(_paths(address)).name


def _addresses(task: dict[str, Any]) -> Iterator[str]:
    """Yield the values of a task that may be the address of its image, the likeliest first."""
    data = task["data"]
    for key in sorted(data, key=lambda key: key not in ("image", "img")):
        if isinstance(data[key], str):
            yield data[key]


def _paths(address: str) -> Iterator[PurePosixPath]:
    """Yield the possible paths in a URL: not all storages escape the names of their files."""
    texts = [address]
    try:
        parts = urlsplit(address)
        local = re.search(r"(?:^|&)d=([^&]*)", parts.query)
        path = local[1] if local else parts.path
        texts = [unquote(path), path, address]
    except ValueError:  # not a URL
        pass
    for text in texts:
        yield PurePosixPath(text.replace("\\", "/"))


def _upload_name(name: str) -> str:
    """Return the name under which Label Studio stores an uploaded file, without its prefix."""
    return re.sub(r"[^-\w.]", "", name.strip().replace(" ", "_"))


def _common(folders: Sequence[str], others: Sequence[str]) -> int:
    """Return the number of folders in common, from the end."""
    count = 0
    for folder, other in zip(reversed(folders), reversed(others), strict=False):
        if folder != other:
            break
        count += 1
    return count
