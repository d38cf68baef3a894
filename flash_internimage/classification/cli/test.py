"""Command line of `python -m classification.test`."""

import argparse
import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import torch.distributed as dist
from timm.utils.distributed import world_info_from_env

from ...console import log_to_terminal
from ...files import write_text
from ..config import MAX_WORKERS, ConfigError
from ..errors import describe
from ..evaluation import evaluate_checkpoint, measure_throughput
from ..model import pick_device
from ..precision import AMP_DTYPES
from ..processes import EndedByAnother, fail_together, join_processes, rank, world_size

_logger = logging.getLogger(__name__)

PROGRAM = "python -m classification.test"

MAX_BATCH_SIZE = 65536


def parse_arguments(argv: list[str] | None, program: str = PROGRAM) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(program, description="Evaluate a classifier.")
    add_evaluation_arguments(parser)
    parser.add_argument("--throughput", action="store_true",
                        help="measure the speed of random weights on random images")  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_intermixed_args(argv)


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of an evaluation to a parser."""
    parser.add_argument("model", metavar="MODEL|CONFIG", help="timm model, or training config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.crop_pct=0.9")
    parser.add_argument("--checkpoint", help="path or URL (default: the released weights)")
    parser.add_argument("--data", help="root of the dataset (default: from the config)")
    parser.add_argument("--split", help="split to evaluate (default: from the config)")
    parser.add_argument("--limit", type=int, metavar="N",
                        help="evaluate N evenly spaced images (default: all)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=64, metavar="N",
                        help="images per batch and process (default: 64)")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, metavar="N",
                        help="data loader workers per process (default: 2)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--amp", choices=("auto", *AMP_DTYPES), default="off",
                        help="mixed precision (default: off)")  # fmt: skip
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema",
        help="weights to evaluate if the checkpoint has both (default: ema)",
    )  # fmt: skip


def check_numbers(arguments: argparse.Namespace) -> None:
    """Check the numbers among the arguments of an evaluation.

    Raises:
        ConfigError: If one is out of range.
    """
    for name, least, most in (
        ("limit", 1, math.inf), ("batch_size", 1, MAX_BATCH_SIZE), ("workers", 0, MAX_WORKERS),
    ):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            limits = f"at least {least}" if value < least else f"at most {most}"
            raise ConfigError(f"--{name.replace('_', '-')} must be {limits}, got {value}")


def evaluation_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of an evaluation by keyword, as `evaluate_checkpoint` takes them."""
    names = (
        "overrides", "checkpoint", "weights", "data", "split", "limit", "batch_size", "workers",
        "device", "amp",
    )  # fmt: skip
    return {name: getattr(arguments, name) for name in names}


def expand_paths(arguments: argparse.Namespace) -> None:
    """Expand `~` in `--checkpoint` and `--data`: shells do not expand `--data=~/images`."""
    for name in ("checkpoint", "data"):
        if (value := getattr(arguments, name)) is not None:
            setattr(arguments, name, os.path.expanduser(value))


def _check(arguments: argparse.Namespace) -> None:
    check_numbers(arguments)
    if arguments.throughput and world_size() > 1:
        raise ConfigError("--throughput measures a single process: run it without torchrun")
    if arguments.throughput:
        unused = ("checkpoint", "data", "split", "limit")
        if given := [name for name in unused if getattr(arguments, name) is not None]:
            raise ConfigError(f"--throughput uses random weights and images: remove --{given[0]}")
    if arguments.json is not None and rank() == 0:
        check_json(arguments.json)


def check_json(path: Path) -> None:
    """Check that a result can be written to a file.

    Raises:
        ConfigError: If `path` exists but is not a file, or its folder is not writable.
    """
    if os.path.exists(path) and not path.is_file():
        raise ConfigError(f"--json must be a file, got {path}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--json must be in a writable folder, got {path}")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the result that parsed arguments request; every process of torchrun must call this."""
    device = join_processes(pick_device(arguments.device))
    if rank() != 0:
        logging.getLogger().setLevel(logging.WARNING)
    with fail_together(device):
        _check(arguments)
    settings = {**evaluation_settings(arguments), "device": device}
    if arguments.throughput:
        used = ("overrides", "batch_size", "device", "amp")
        return measure_throughput(arguments.model, **{name: settings[name] for name in used})
    return evaluate_checkpoint(arguments.model, **settings)


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run the script and return its exit code.

    Args:
        argv: Arguments; None for those of the process.
        program: Name of the program in usage messages.
    """
    log_to_terminal()
    huggingface_hub.utils.logging.disable_propagation()  # it has its own handler
    arguments = parse_arguments(argv, program)
    expand_paths(arguments)
    if arguments.json is not None:
        arguments.json = arguments.json.expanduser()
    try:
        result = run(arguments)
        if rank() == 0:
            _write(result, arguments.json)
    except EndedByAnother:
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        # Before the process group exists, every process raises the same error.
        if dist.is_initialized() or world_info_from_env()[1] == 0:
            _logger.error("%s", describe(error))
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _write(result: dict[str, Any], path: Path | None) -> None:
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if path:
        write_text(path, text)
    width = max(map(len, result))
    sys.stdout.write("".join(f"{key:<{width}}  {value}\n" for key, value in result.items()))
    sys.stdout.write(json.dumps(result) + "\n")
