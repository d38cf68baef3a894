"""Command line that evaluates a segmentor."""

import argparse
from pathlib import Path

from ...files import require_writable
from ..engine.runner.runner import SafeRunner
from ..errors import one_line_errors
from .common import build_runner, ending_together
from .test import evaluation_config, evaluation_parser


def get_parser(program: str = "python -m segmentation.test") -> argparse.ArgumentParser:
    """Return the argument parser of a program with this name."""
    parser = evaluation_parser(program, "Evaluate a segmentor.")
    parser.add_argument("--tta", action="store_true", help="average over scales and flips")
    parser.add_argument("--out", type=Path, help="write the label maps to this folder, as PNG")
    parser.add_argument(
        "--show-dir",
        metavar="DIR",
        help="draw the predictions to <work dir>/DIR/vis_data/vis_image",
    )
    return parser


def get_runner(args: argparse.Namespace) -> SafeRunner:
    """Build the runner of an evaluation.

    Raises:
        FileNotFoundError: If the config does not exist.
        OSError: If a folder cannot be written.
        ValueError: If an argument is invalid.
    """
    if args.out:
        require_writable(args.out, "--out")
    cfg = evaluation_config(args, args.tta)
    if args.out:
        cfg.test_evaluator.output_dir = str(args.out)
    if args.show_dir:
        cfg.default_hooks.visualization.draw = True
        cfg.visualizer.save_dir = str(Path(cfg.work_dir, args.show_dir))
    return build_runner(cfg)


def main(program: str = "python -m segmentation.test", argv: list[str] | None = None) -> None:
    """Parse a command line and evaluate a segmentor.

    Args:
        program: Name of the program in usage messages.
        argv: Arguments; None for those of the process.
    """
    args = get_parser(program).parse_args(argv)
    with one_line_errors(), ending_together():
        get_runner(args).test()
