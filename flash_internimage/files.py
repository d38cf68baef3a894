"""Atomic writes, and output folders that only one run at a time can use."""

import csv
import errno
import io
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

_logger = logging.getLogger(__name__)

_PARTIAL = ".partial"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file atomically, so that `path` never refers to a partial file.

    The data is written to a unique hidden file in the same folder, which is removed if writing
    fails.

    Args:
        path: Destination; an existing file is replaced.
        write: Function that writes the contents to an open binary file.

    Raises:
        OSError: If the file cannot be written. For a full disk or an exceeded quota, the message
            says so and names the file.
    """
    path = Path(path)
    partial = partial_path(path)
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


def partial_path(path: Path, suffix: str = "") -> Path:
    """Return a unique path of a hidden file to write before it replaces `path`.

    Args:
        path: Destination. Its name may be as long as file systems allow.
        suffix: End of the returned path.
    """
    start = path.name.encode(errors="surrogateescape")[:200].decode(errors="ignore")
    return path.with_name(f".{start}.{uuid.uuid4().hex[:12]}{_PARTIAL}{suffix}")


def is_partial(name: str) -> bool:
    """Return whether a file name is one of :func:`partial_path`."""
    return re.fullmatch(rf"(?s)\..*\.[0-9a-f]{{12}}{re.escape(_PARTIAL)}(\.\w+)?", name) is not None


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically in UTF-8; bytes of file names that are not text are escaped."""
    encoded = text.encode(errors="backslashreplace")
    write_atomically(path, lambda file: file.write(encoded))


def write_csv(path: str | os.PathLike, rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically, the header in the first row; see :func:`write_text`."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def require_writable(folder: Path, option: str) -> None:
    """Check that a folder is writable or can be created; see :func:`writable_folder`."""
    with writable_folder(folder, option):
        pass


@contextmanager
def writable_folder(folder: Path, option: str) -> Iterator[None]:
    """Create a folder for the time of a block; it remains if it contains something in the end.

    Args:
        folder: Folder, which may exist.
        option: Command-line option that named the folder, for the error message.

    Raises:
        OSError: If the folder cannot be created or written to.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(f"{option} {folder} cannot be written: {error.strerror}") from error
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # not empty, or not created
                path.rmdir()


def disk_full_error(error: BaseException | None, path: str | os.PathLike) -> OSError | None:
    """Return a one-line error if a full disk caused `error`, otherwise None.

    Args:
        error: Error, whose causes and contexts are examined as well.
        path: File that was being written, for the message.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            message = f"{os.strerror(error.errno)} while writing {path}: free some space and resume"
            return OSError(error.errno, message)
        error = error.__cause__ or error.__context__
    return None


def remove_partial_files(folder: str | os.PathLike) -> None:
    """Remove partial files left by killed processes that used :func:`write_atomically`.

    Only the owner of the folder may call this, as it also removes files that are being written.
    """
    for partial in Path(folder).glob(f".*{_PARTIAL}"):
        partial.unlink(missing_ok=True)


class FolderInUseError(OSError):
    """Raised if another process owns a folder."""


@contextmanager
def own_folder(folder: str | os.PathLike, timeout: float = 10) -> Iterator[None]:
    """Lock an output folder, so that two runs never write to it at the same time.

    The folder is created if necessary, and removed in the end if it is new and still empty. Partial
    files of earlier owners are removed. The operating system releases the lock when the process
    ends, even if it is killed. On file systems without locks, only a warning is logged.

    Args:
        folder: Output folder of a run.
        timeout: Seconds to wait for another owner, such as the job that this one replaces.

    Raises:
        FolderInUseError: If another process still owns the folder after `timeout`.
        OSError: If the folder cannot be created.
    """
    path = Path(folder).absolute()  # The run may change its current folder.
    lock, deadline = FileLock(path / ".lock"), time.monotonic() + timeout
    while True:
        is_new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(max(0, deadline - time.monotonic()))
            break
        except Timeout as error:
            raise FolderInUseError(
                f"another run is writing to {folder}: wait until it has ended, or choose another "
                "folder"
            ) from error
        except FileNotFoundError:  # Another owner has removed the folder in the meantime.
            if time.monotonic() > deadline:
                raise
        except NotImplementedError:
            _logger.warning(
                "%s is on a file system without locks: make sure that one run at a time writes "
                "there",
                folder,
            )
            break
    try:
        remove_partial_files(path)
        yield
    finally:
        # The run may have removed the folder; Windows does not remove an open file.
        with suppress(OSError):
            if is_new and [entry.name for entry in path.iterdir()] == [".lock"]:
                (path / ".lock").unlink()
                path.rmdir()
        lock.release()


def check_no_loops(folder: str | os.PathLike) -> None:
    """Check that no symbolic link below a folder leads back to one of the link's own parents.

    Readers of image folders follow links and would list the images of such a folder many times.

    Raises:
        OSError: If there is such a link.
    """
    waiting = [(Path(folder), {os.path.realpath(folder)})]
    while waiting:
        parent, above = waiting.pop()
        for entry in os.scandir(parent):
            # entry.is_dir() raises an error for a link to itself. For entries that are not links,
            # it saves a system call.
            if not (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()):
                continue
            real = os.path.realpath(entry.path)
            if real in above:
                raise OSError(f"symbolic link {entry.path} leads back to {real}: remove it")
            waiting.append((Path(entry.path), above | {real}))
