"""Print parameters, multiply-adds, activations and memory of models of any task.

flash-internimage complexity NAME|CONFIG... [--size H W] [--batch-size N] [--markdown]
flash-internimage complexity --all --markdown
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout

from tqdm import tqdm

from ..checkpoints.zoo import read_zoo
from ..complexity import Complexity, measure_complexity
from ..inference.predictor import find_model

PROGRAM = "flash-internimage complexity"
_COLUMNS = ("model", "image", "parameters", "MACs", "activations", "inference", "training step")


def parse_arguments(argv: list[str] | None, program: str = PROGRAM) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv: Arguments; None for those of the process.
        program: Name of the program in usage messages.
    """
    parser = argparse.ArgumentParser(
        program,
        description="Print the parameters, multiply-adds and activations of models, and the peak "
        "memory of a prediction and of a training step with AdamW in float32. Nothing is computed: "
        "neither a GPU nor weights are needed.",
    )
    parser.add_argument("models", nargs="*", metavar="NAME|CONFIG",
                        help="models of the zoo or of timm, or configs of any task")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="all models of the zoo")
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"),
                        help="size of the images (default: the test size for classifiers, "
                        "800 1280 for detectors, one crop x four crops for "
                        "segmentors)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=1, metavar="N",
                        help="images in a batch (default: 1)")  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run the command and return the exit code."""
    arguments = parse_arguments(argv, program)
    logging.disable(logging.WARNING)  # OpenMMLab's, on building models
    try:
        # OpenMMLab prints when it is imported.
        with warnings.catch_warnings(action="ignore"), redirect_stdout(sys.stderr):
            rows = _measure(arguments)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    finally:
        logging.disable(logging.NOTSET)
    sys.stdout.write(_table([_COLUMNS, *rows], arguments.markdown))
    return 0


def _measure(arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    if bool(arguments.models) == arguments.all:
        given = " ".join([*arguments.models, *(["--all"] if arguments.all else [])]) or "nothing"
        raise ValueError(f"the models must be NAME|CONFIG... or --all, got {given}")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    size = arguments.size and (arguments.size[0], arguments.size[1])
    if size and min(size) < 1:
        raise ValueError(f"--size must be two positive numbers, got {size[0]} {size[1]}")
    sources = [find_model(name) for name in (read_zoo() if arguments.all else arguments.models)]
    return [
        _row(source.name, measure_complexity(source, size, arguments.batch_size))
        for source in tqdm(sources, leave=False, disable=None)
    ]


def _row(name: str, measured: Complexity) -> tuple[str, ...]:
    height, width = measured.size
    return (
        name,
        f"{height} x {width}",
        f"{measured.parameters / 1e6:.1f} M",
        f"{measured.multiply_adds / 1e9:.1f} G",
        f"{measured.activations / 1e6:.1f} M",
        f"{measured.inference_memory / 2**20:.0f} MiB",
        f"{measured.training_memory / 2**20:.0f} MiB",
    )


def _table(rows: Sequence[Sequence[str]], markdown: bool) -> str:
    if markdown:
        rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "".join(f"{line}\n" for line in lines)
