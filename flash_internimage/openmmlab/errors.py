"""Reporting of errors by the scripts: user errors in one line, bugs with a traceback."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from types import TracebackType

import flash_internimage

from ..mmcv_ops import MissingOperatorError

# Errors about data, files and values of settings, whenever they are raised.
_ALWAYS = (OSError, ValueError, FloatingPointError, MissingOperatorError)

# Errors about settings while models, datasets, optimizers and hooks are built from them.
_WHILE_BUILDING = (
    AssertionError, AttributeError, ImportError, IndexError, KeyError, NotImplementedError,
    RuntimeError, TypeError,
)  # fmt: skip
# Transforms and metrics also raise these for unsupported data or settings while running.
_REFUSALS = (AssertionError, NotImplementedError)
_STEPS = {"train_step", "val_step", "test_step"}
_WORK = {"__next__", "evaluate"}
_OURS = str(Path(flash_internimage.__file__).parent)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with code 2 and one line on stderr if the user can fix the cause of an error.

    All other errors are bugs and keep their traceback.
    """
    try:
        yield
    except Exception as error:
        if not is_users(error):
            raise
        sys.stderr.write(f"error: {describe(error)}\n")
        raise SystemExit(2) from error


def end_in_one_line(error: Exception) -> None:
    """Make an uncaught error end the program as :func:`one_line_errors` does.

    OpenMMLab's own scripts do not catch errors. Other errors keep their traceback.
    """
    vars(error)["ends_in_one_line"] = True
    if sys.excepthook is not _print_one_line:
        global _excepthook
        _excepthook, sys.excepthook = sys.excepthook, _print_one_line


_excepthook = sys.excepthook


def _print_one_line(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    if not getattr(error, "ends_in_one_line", False):
        return _excepthook(kind, error, trace)
    sys.stderr.write(f"error: {describe(error)}\n")
    raise SystemExit(2)


def is_users(error: Exception) -> bool:
    """Return whether an error is caused by the user's data, files or settings."""
    names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if isinstance(error, _ALWAYS):
        # Within a model, a ValueError of PyTorch or NumPy is about its arithmetic.
        numeric = isinstance(error, ValueError) and _is_from(error, "/torch/", "/numpy/")
        return not (names & _STEPS and numeric)
    working = _STEPS if isinstance(error, _REFUSALS) else _STEPS | _WORK
    building = isinstance(error, _WHILE_BUILDING) and not names & working
    unknown = isinstance(error, TypeError) and "unexpected keyword argument" in str(error)
    return building and (unknown or not is_from_this_package(error))


def is_from_this_package(error: BaseException) -> bool:
    """Return whether an error was raised by the code of this package."""
    return _is_from(error, _OURS)


def _is_from(error: BaseException, *folders: str) -> bool:
    """Return whether an error was raised by a file in one of the folders."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(folder in frames[-1].filename for folder in folders)


def describe(error: BaseException) -> str:
    """Return the message of an error as one line of at most 2000 characters."""
    text = str(error)
    if isinstance(error, KeyError) and len(error.args) == 1:
        text = str(error.args[0])  # str() would add quotes.
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        text = error.strerror
    if "Original Traceback (most recent call last)" in text:  # raised in a data loader worker
        lines = text.rpartition('\n  File "')[2].splitlines()[1:]
        code = list(takewhile(lambda line: line.startswith("    "), lines))
        raised = "\n".join(lines[len(code) :])
        text = raised.partition(": ")[2] or ": ".join([raised, *code[:1]])
    if not text.strip():  # such as an assertion without a message
        frames = traceback.extract_tb(error.__traceback__)
        text = ": ".join([type(error).__name__, *(frame.line or "" for frame in frames[-1:])])
    return " ".join(text.split())[:2000]
