"""Evaluates a segmentor.

python -m segmentation.test CONFIG CHECKPOINT [--tta]
"""

import argparse
from pathlib import Path

from flash_internimage.openmmlab.programs import (
    build_runner,
    evaluation_config,
    evaluation_parser,
    one_line_errors,
)
from flash_internimage.openmmlab.runtime import FlashRunner


def get_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser("segmentation.test", "Evaluate a segmentor.")
    parser.add_argument("--tta", action="store_true", help="at several scales, and flipped")
    parser.add_argument("--out", type=Path, help="write the label maps into this folder, *.png")
    parser.add_argument("--show-dir", help="draw the predictions into <work dir>/<this folder>")
    return parser


def get_runner(args: argparse.Namespace) -> FlashRunner:
    """
    Raises:
        FileNotFoundError: there is no such configuration.
        ValueError: an option is not known.
    """
    cfg = evaluation_config(args)
    if args.tta:
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = {**cfg.tta_model, "module": cfg.model}
    if args.out:
        cfg.test_evaluator.output_dir = str(args.out)
    if args.show_dir:
        cfg.default_hooks.visualization.draw = True
        cfg.visualizer.save_dir = str(Path(cfg.work_dir, args.show_dir))
    return build_runner(cfg)


def main() -> None:
    args = get_parser().parse_args()
    with one_line_errors():
        runner = get_runner(args)
    runner.test()


if __name__ == "__main__":
    main()
