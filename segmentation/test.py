"""Evaluate a segmentor.

Example::

    python -m segmentation.test CONFIG CHECKPOINT [--tta]
"""

import argparse
from pathlib import Path

from flash_internimage.openmmlab.errors import one_line_errors
from flash_internimage.openmmlab.programs import (
    build_runner,
    evaluation_config,
    evaluation_parser,
    require_writable,
)
from flash_internimage.openmmlab.runtime import FlashRunner


def get_parser() -> argparse.ArgumentParser:
    """Return the argument parser of the program."""
    parser = evaluation_parser("segmentation.test", "Evaluate a segmentor.")
    parser.add_argument("--tta", action="store_true", help="at several scales, and flipped")
    parser.add_argument("--out", type=Path, help="write the label maps into this folder, *.png")
    parser.add_argument("--show-dir", help="draw the predictions into <work dir>/<this folder>")
    return parser


def get_runner(args: argparse.Namespace) -> FlashRunner:
    """Build the runner of an evaluation.

    Raises:
        FileNotFoundError: If the config does not exist.
        OSError: If a folder cannot be written.
        ValueError: If an argument does not fit.
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


def main() -> None:
    """Parse the command line and evaluate a segmentor."""
    args = get_parser().parse_args()
    with one_line_errors():
        get_runner(args).test()


if __name__ == "__main__":
    main()
