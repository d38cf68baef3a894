"""Train a classifier, from its configuration to the final report."""

import contextlib
import logging
from logging.handlers import MemoryHandler
from pathlib import Path

from ..tracking import check_packages
from .config import Config, check_output
from .data import TooManyCorruptImages
from .engine import Diverged, Trainer
from .interruption import Interrupted, stopped_by_signals
from .model import pick_device
from .output import find_checkpoint, held_log, log_file, log_start, own_output, save_config
from .processes import EndedByAnother, fail_together, gather, join_processes, rank

_logger = logging.getLogger(__name__)

# Errors that users can fix, which are reported on one line without a traceback.
EXPECTED_ERRORS = (ValueError, OSError, Diverged, TooManyCorruptImages, EndedByAnother)


def train(cfg: Config, resume: str | None = None, held: MemoryHandler | None = None) -> None:
    """Train from the beginning or resume from a checkpoint; every process must call this.

    Args:
        cfg: Configuration of the run.
        resume: Checkpoint to resume from; 'auto' for last.pth in the output folder if it exists.
        held: Buffered log from :func:`~.output.held_log` to write to the log file of the run.

    Raises:
        Interrupted: If a signal arrived; the state has been saved.
        ValueError: If a setting, the data or the checkpoint cannot be used.
        OSError: If a file cannot be read or written, or another run owns the output folder.
        Diverged: If too many consecutive steps have no finite loss, or a weight is not finite.
        TooManyCorruptImages: If more images than `data.max_corrupt` cannot be read.
        EndedByAnother: If one of the above was raised on another process.
    """
    device = join_processes(pick_device(cfg.device))
    is_first = rank() == 0
    if not is_first:
        logging.getLogger().setLevel(logging.WARNING)
    output = Path(cfg.output)
    log = None
    with contextlib.ExitStack() as stack:
        held = held or stack.enter_context(held_log())
        if not is_first:
            held.setTarget(logging.NullHandler())
        checkpoint = None
        with fail_together(device):
            if is_first:
                check_output(cfg.output)
                check_packages(cfg.loggers)
                stack.enter_context(own_output(output))
                checkpoint = find_checkpoint(resume, output / "last.pth")
        checkpoint = gather(checkpoint)[0]
        trainer = Trainer(cfg, device, load_initial=checkpoint is None)
        changes = []
        with fail_together(device):
            if checkpoint is not None:
                changes = trainer.resume(checkpoint)
        with fail_together(device):
            if is_first:
                log = stack.enter_context(log_file(output / "train.log", held))
                log_start(trainer, checkpoint, changes)
        try:
            with fail_together(device):
                if is_first:
                    save_config(cfg)
            with stopped_by_signals(trainer):
                trainer.fit()
            if is_first:
                trainer.report()
                _logger.info(
                    "done: best %stop-1 %.2f %%; metrics, curves, predictions and checkpoints "
                    "are in %s",
                    "EMA " if trainer.ema is not None else "", trainer.best_top1, cfg.output,
                )  # fmt: skip
        except Interrupted as interruption:
            if is_first:
                _logger.warning("stopped by %s; continue with --resume auto", interruption)
            raise
        except Exception as error:
            if log is not None:
                log.add_error(error, with_traceback=not isinstance(error, EXPECTED_ERRORS))
            raise
