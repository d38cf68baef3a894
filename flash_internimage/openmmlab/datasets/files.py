"""Files of datasets: where they are, which of them exist, and whether their names are unique."""

import os
from collections.abc import Iterable
from typing import Any

from mmengine.fileio import LocalBackend, get_file_backend


def is_local(path: str | os.PathLike, backend_args: dict | None = None) -> bool:
    """Return whether mmengine reads `path` from a disk, not from a server or database."""
    backend = get_file_backend(path, backend_args=backend_args, enable_singleton=True)
    return isinstance(backend, LocalBackend)


def require_unique_names(dataset: Any, argument: str, suffixes: bool = False) -> None:
    """Require that results of all images can be written to files named after them.

    Args:
        dataset: mmengine dataset, or a wrapper of one or several.
        argument: Name of the setting that writes the files, for the error.
        suffixes: Whether the names keep the suffixes of the images.

    Raises:
        ValueError: If two images have the same name, without their folders.
    """
    paths: dict[str, str] = {}
    for i in range(len(dataset)):
        path = dataset.get_data_info(i).get("img_path", str(i))
        name = os.path.basename(path)
        first = paths.setdefault(name if suffixes else os.path.splitext(name)[0], path)
        if first != path:
            raise ValueError(
                f"{argument} must not be used with images of the same name, whose results would "
                f"overwrite each other, got {first} and {path}"
            )


def find_missing(paths: Iterable[str]) -> set[str]:
    """Return the paths that do not exist.

    Each folder is listed once, which on network disks is faster than one request per file.
    """
    listed: dict[str, set[str]] = {}
    missing = set()
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listed[folder]:
            missing.add(path)
    return missing
