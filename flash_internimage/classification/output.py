"""Output folder of a run: ownership, configuration, last checkpoint and log."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path

import yaml

from ..files import FolderInUseError, own_folder, write_text
from .config import Config, ConfigError, find_ignored
from .errors import describe
from .state import TrainingState

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def own_output(output: Path) -> Iterator[None]:
    """Own the output folder of a run; see :func:`~flash_internimage.files.own_folder`.

    Raises:
        FolderInUseError: If another run owns the folder.
        ConfigError: If the folder cannot be created.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(own_folder(output))
        except FolderInUseError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"output cannot be created, got {str(output)!r}: {reason}") from error
        yield


def find_checkpoint(resume: str | None, last: Path) -> Path | None:
    """Return the checkpoint to resume from, if any.

    Args:
        resume: Checkpoint file, 'auto' for `last` if it exists, or None for a new run.
        last: Path of the last checkpoint in the output folder.

    Raises:
        ConfigError: If the output folder contains a run that this one would overwrite.
    """
    if resume == "auto":
        return last if last.exists() else None
    continues = resume is not None and Path(resume).resolve().parent == last.resolve().parent
    if last.exists() and not continues:
        raise ConfigError(
            f"{last} exists: pass --resume auto to continue that run, or choose another output"
        )
    return Path(resume) if resume else None


def save_config(cfg: Config) -> None:
    """Write the configuration of a run to config.yaml in its output folder."""
    text = yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)
    path = Path(cfg.output) / "config.yaml"
    write_text(path, text)


class LogFile(logging.FileHandler):
    """Log file that reports write errors on stderr, once."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Report the first OSError on stderr and ignore further ones."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            sys.stderr.write(f"WARNING cannot write {self.baseFilename}: {error.strerror}\n")

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # handleError has reported it
            super().close()

    def add_error(self, error: Exception, with_traceback: bool) -> None:
        """Write an error that the caller reports to the terminal itself."""
        record = {
            "levelno": logging.ERROR,
            "levelname": "ERROR",
            "msg": describe(error),
            "exc_info": (type(error), error, error.__traceback__) if with_traceback else None,
        }
        self.handle(logging.makeLogRecord(record))


@contextlib.contextmanager
def held_log() -> Iterator[MemoryHandler]:
    """Buffer the log of the block until the returned handler gets a target."""
    # Once there is a target, this capacity forwards every record immediately.
    handler = MemoryHandler(capacity=1, flushLevel=sys.maxsize)
    logging.getLogger().addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def log_file(path: Path, held: MemoryHandler) -> Iterator[LogFile]:
    """Append the log of the block, and the records held before it, to a file."""
    handler = LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    held.setTarget(handler)
    held.flush()
    try:
        yield handler
    finally:
        held.setTarget(None)
        handler.close()


def suitable_ema_decay(updates: int) -> str:
    """Return the EMA decay that leaves about 1 % of the initial weights at the end of a run."""
    return f"{1 - float(f'{1 - 0.01 ** (1 / updates):.2g}'):.9g}"


def log_start(state: TrainingState, checkpoint: Path | None, changes: list[str]) -> None:
    """Log the model, changed and ignored settings, and the checkpoint that a run resumes from."""
    cfg, parameters = state.cfg, sum(p.numel() for p in state.model.parameters())
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    images = cfg.batch_size * cfg.accumulation_steps  # per process
    _logger.info(
        "%s, %.1f M parameters%s; total batch size %d (%d x %d) on %s with amp=%s; "
        "%d optimizer steps per epoch",
        cfg.model.name, parameters / 1e6,
        f", {trained / 1e6:.4g} M of them trained" if cfg.model.freeze else "",
        state.world_size * images, state.world_size, images,
        state.device, state.amp, state.updates_per_epoch,
    )  # fmt: skip
    for line in (*changes, *find_ignored(cfg)):
        _logger.warning("%s", line)
    updates = cfg.schedule.epochs * state.updates_per_epoch
    if cfg.ema_decay is not None and (rest := cfg.ema_decay**updates) > 0.1:
        _logger.warning(
            "ema_decay=%s is high for a run of %d optimizer steps: the average would retain "
            "%.3g %% of the initial weights; consider ema_decay=%s",
            cfg.ema_decay, updates, 100 * rest, suitable_ema_decay(updates),
        )  # fmt: skip
    if checkpoint is not None:
        _logger.info(
            "resuming from %s after %d epochs, at step %d/%d",
            checkpoint, state.epoch, state.update, state.updates_per_epoch,
        )  # fmt: skip
