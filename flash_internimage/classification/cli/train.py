"""Command line of `python -m classification.train`."""

import argparse
import logging

import torch.distributed as dist
from tqdm.contrib.logging import logging_redirect_tqdm

from ...console import log_to_terminal
from ..config import load_config
from ..errors import describe
from ..interruption import Interrupted
from ..output import held_log
from ..processes import EndedByAnother
from ..training import EXPECTED_ERRORS, train

_logger = logging.getLogger(__name__)

PROGRAM = "python -m classification.train"


def parse_arguments(argv: list[str] | None, program: str = PROGRAM) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(program, description="Train a classifier.")
    parser.add_argument("config", help="training config (YAML), see configs/classification")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.lr=1e-3")
    parser.add_argument(
        "--resume",
        metavar="auto|FILE",
        help="resume from FILE, or from last.pth in the output folder if it exists (auto)",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run the script and return its exit code.

    Args:
        argv: Arguments; None for those of the process.
        program: Name of the program in usage messages.
    """
    log_to_terminal()
    arguments = parse_arguments(argv, program)
    try:
        with logging_redirect_tqdm(), held_log() as held:
            train(load_config(arguments.config, arguments.overrides), arguments.resume, held)
    except Interrupted as interruption:
        return 128 + interruption.signal_number
    except EndedByAnother:
        return 2
    except EXPECTED_ERRORS as error:
        _logger.error("%s", describe(error))
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
