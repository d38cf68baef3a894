"""Command line of `python -m classification.train`."""

import argparse
import contextlib
import logging
from logging.handlers import MemoryHandler
from pathlib import Path

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so
from tqdm.contrib.logging import logging_redirect_tqdm

from ..config import Config, check_output, load_config
from ..data import TooManyCorruptImages
from ..engine import Diverged, Trainer
from ..interruption import Interrupted, stopped_by_signals
from ..model import pick_device
from ..output import (
    describe,
    find_checkpoint,
    held_log,
    log_file,
    log_start,
    own_output,
    save_config,
)
from ..processes import EndedByAnother, fail_together, gather

_logger = logging.getLogger(__name__)

# Errors that users can fix, which are reported on one line without a traceback.
_EXPECTED = (ValueError, OSError, Diverged, TooManyCorruptImages, EndedByAnother)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m classification.train", description="Train a classifier."
    )
    parser.add_argument("config", help="a YAML file, see configs/classification")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.lr=1e-3")
    parser.add_argument(
        "--resume",
        metavar="auto|FILE",
        help="continue from FILE; 'auto': from the output's last.pth if there is one",
    )
    return parser.parse_intermixed_args(argv)


def train(cfg: Config, resume: str | None = None, held: MemoryHandler | None = None) -> None:
    """Train from the beginning or from a checkpoint.

    Args:
        cfg: Configuration of the run.
        resume: Checkpoint to resume from; 'auto' for last.pth in the output folder if it exists.
        held: Buffered log from :func:`~.output.held_log` to write to the log file of the run.

    Raises:
        Interrupted: If a signal arrived; the state has been saved.
        ValueError: If a setting, the data or the checkpoint cannot be used.
        OSError: If a file cannot be read or written, or another run owns the output folder.
        Diverged: If too many updates in a row have no finite loss, or a weight is not finite.
        TooManyCorruptImages: If more images than `data.max_corrupt` cannot be read.
        EndedByAnother: If one of the above was raised on another process.
    """
    env = init_distributed_device_so(device=str(pick_device(cfg.device)))
    device, rank, world_size = torch.device(env["device"]), env["global_rank"], env["world_size"]
    if rank != 0:
        logging.getLogger().setLevel(logging.WARNING)
    output = Path(cfg.output)
    log = None
    with contextlib.ExitStack() as stack:
        held = held or stack.enter_context(held_log())
        if rank != 0:
            held.setTarget(logging.NullHandler())
        checkpoint = None
        with fail_together(device):
            if rank == 0:
                check_output(cfg.output)
                stack.enter_context(own_output(output))
                checkpoint = find_checkpoint(resume, output / "last.pth")
        checkpoint = gather(checkpoint)[0]
        trainer = Trainer(cfg, device, rank, world_size, load_initial=checkpoint is None)
        changes = []
        with fail_together(device):
            if checkpoint is not None:
                changes = trainer.resume(checkpoint)
        with fail_together(device):
            if rank == 0:
                log = stack.enter_context(log_file(output / "train.log", held))
                log_start(trainer, checkpoint, changes)
        try:
            with fail_together(device):
                if rank == 0:
                    save_config(cfg)
            with stopped_by_signals(trainer):
                trainer.fit()
            if rank == 0:
                trainer.report()
                _logger.info(
                    "done: best %stop-1 %.2f %%; metrics, curves, predictions and checkpoints "
                    "are in %s",
                    "EMA " if trainer.ema is not None else "", trainer.best_top1, cfg.output,
                )  # fmt: skip
        except Interrupted as interruption:
            if rank == 0:
                _logger.warning("stopped by %s; --resume auto continues", interruption)
            raise
        except Exception as error:
            if log is not None:
                log.add_error(error, with_traceback=not isinstance(error, _EXPECTED))
            raise


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    arguments = parse_arguments(argv)
    try:
        with logging_redirect_tqdm(), held_log() as held:
            train(load_config(arguments.config, arguments.overrides), arguments.resume, held)
    except Interrupted as interruption:
        return 128 + interruption.signal_number
    except EndedByAnother:
        return 2
    except _EXPECTED as error:
        _logger.error("%s", describe(error))
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
