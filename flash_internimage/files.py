"""Write files atomically, and keep an output folder to one run at a time."""

import errno
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

_logger = logging.getLogger(__name__)

_PARTIAL = ".partial"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that `path` is the old file or the new one at any moment, never a part of it.

    A partial file has a unique hidden name in the same folder and is removed when writing fails.

    Args:
        path: Destination; an existing file is replaced.
        write: Called with the open binary file.

    Raises:
        OSError: The file cannot be written. On a full disk or an exhausted quota the message says
            so and names the file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_PARTIAL}")
    try:
        with open(partial, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if full := disk_full_error(error, path):
            raise full from error
        raise


def require_writable(folder: Path, option: str) -> None:
    """Create a folder if need be.

    Raises:
        OSError: Nothing can be written there; the message names the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{option} {folder} cannot be written: {error.strerror}") from error


def disk_full_error(error: BaseException | None, path: str | os.PathLike) -> OSError | None:
    """Return a one-line error if `error` or one of its causes is a full disk, else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            message = f"{os.strerror(error.errno)} while writing {path}: free some space and resume"
            return OSError(error.errno, message)
        error = error.__cause__ or error.__context__
    return None


def remove_partial_files(folder: str | os.PathLike) -> None:
    """Remove what killed processes left of :func:`write_atomically`; call it as the owner."""
    for partial in Path(folder).glob(f".*{_PARTIAL}"):
        partial.unlink(missing_ok=True)


@contextmanager
def own_folder(folder: str | os.PathLike, timeout: float = 10) -> Iterator[None]:
    """Own an output folder, so that two runs never write into it at the same time.

    The folder is created and partial files of earlier owners are removed. The operating system
    releases the lock when the process ends, however it ends.

    Args:
        folder: Output folder of a run.
        timeout: Seconds to wait for another owner, such as the job that this one replaces.

    Raises:
        OSError: Another process still owns the folder after `timeout`, or it cannot be created.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout)
    except Timeout as error:
        raise OSError(
            f"another run is writing to {folder}: wait until it has ended, or choose another folder"
        ) from error
    except NotImplementedError:
        _logger.warning(
            "%s is on a file system without locks: make sure that one run at a time writes there",
            folder,
        )
    try:
        remove_partial_files(folder)
        yield
    finally:
        lock.release()


def check_no_loops(folder: str | os.PathLike) -> None:
    """Check that no symbolic link leads from within a folder back to a folder above the link.

    Readers of image folders follow links, and would list the images of such a folder many times.

    Raises:
        OSError: There is one; the message names it.
    """
    waiting = [(Path(folder), {os.path.realpath(folder)})]
    while waiting:
        parent, above = waiting.pop()
        for entry in os.scandir(parent):
            # For a link to itself, entry.is_dir() raises an error; for all that are no links, it
            # needs no access to the file system.
            if not (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()):
                continue
            real = os.path.realpath(entry.path)
            if real in above:
                raise OSError(f"symbolic link {entry.path} leads back to {real}: remove it")
            waiting.append((Path(entry.path), above | {real}))
