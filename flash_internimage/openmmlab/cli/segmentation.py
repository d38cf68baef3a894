"""Evaluate a segmentor.

Example::

    python -m segmentation.test CONFIG CHECKPOINT [--tta]
"""

import argparse
from pathlib import Path

from flash_internimage.files import require_writable
from flash_internimage.openmmlab import SafeRunner
from flash_internimage.openmmlab.cli.common import build_runner, ending_together
from flash_internimage.openmmlab.cli.test import evaluation_config, evaluation_parser
from flash_internimage.openmmlab.errors import one_line_errors


def get_parser() -> argparse.ArgumentParser:
    """Return the argument parser of the script."""
    parser = evaluation_parser("segmentation.test", "Evaluate a segmentor.")
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


def main() -> None:
    """Parse the command line and evaluate a segmentor."""
    args = get_parser().parse_args()
    with one_line_errors(), ending_together():
        get_runner(args).test()


if __name__ == "__main__":
    main()
