"""Folders and file names of the checkpoints of a run."""

import os
from contextlib import suppress
from pathlib import Path
from string import Formatter
from typing import Any

DEFAULT_TEMPLATES = ("epoch_{}.pth", "iter_{}.pth")


def checkpoint_number(template: str, name: str) -> int | None:
    """Return the epoch or iteration in a file name, or None if the template does not match."""
    (before, *_), *rest = Formatter().parse(template)
    after = rest[0][0] if rest else ""
    with suppress(ValueError):
        number = int(name[len(before) : len(name) - len(after)])
        if number > 0 and template.format(number) == name:
            return number
    return None


def checkpoint_folder(work_dir: str, out_dir: str | os.PathLike | None) -> str:
    """Return the folder in which CheckpointHook saves the checkpoints of a run."""
    work_dir = os.path.abspath(work_dir)
    if out_dir is None or os.fspath(out_dir) == work_dir:
        return work_dir
    return os.path.join(out_dir, os.path.basename(work_dir))


def check_checkpoint_names(out_dir: Any, template: Any) -> None:
    """Check the options `out_dir` and `filename_tmpl` of a checkpoint hook.

    Raises:
        ValueError: If `out_dir` is not a local folder, or if the epoch or iteration cannot be read
            back from a file name.
    """
    local = isinstance(out_dir, str | os.PathLike) and "://" not in os.fspath(out_dir)
    if not (out_dir is None or local):
        raise ValueError(f"out_dir must be a local folder or None, got {out_dir!r:.200}")
    if template is None:
        return
    known = False
    with suppress(AttributeError, LookupError, TypeError, ValueError):
        known = all(checkpoint_number(template, template.format(n)) == n for n in (1, 1234567))
    if not known or os.path.basename(template) != template:
        raise ValueError(
            "filename_tmpl must be a file name with one {} for the epoch or iteration, such as "
            f"epoch_{{}}.pth, got {template!r:.200}"
        )


def latest_checkpoint(
    folder: Path, template: str | None = None, by_epoch: bool = True
) -> Path | None:
    """Return the checkpoint of the highest epoch or iteration in a folder.

    mmengine's own record, the file `last_checkpoint`, may be outdated or empty after a kill.

    Args:
        folder: Folder with the checkpoints of one run. Other files are ignored.
        template: `filename_tmpl` of the checkpoint hook, which is preferred to the default names.
        by_epoch: Whether to prefer `epoch_N.pth` to `iter_N.pth`.

    Returns:
        The path, or None if there is no checkpoint.
    """
    templates = [template] if template else []
    for name in [*templates, *(DEFAULT_TEMPLATES if by_epoch else reversed(DEFAULT_TEMPLATES))]:
        found = [
            (number, path)
            for path in folder.glob("*")
            if (number := checkpoint_number(name, path.name)) and path.is_file()
        ]
        if found:
            return max(found)[1]
    return None
