"""Command line that evaluates a detector."""

import argparse
import pickle
from pathlib import Path

from mmdet.evaluation import DumpDetResults

from ...files import require_writable, write_atomically
from ..datasets.files import require_unique_names
from ..engine.runner.runner import SafeRunner
from ..errors import one_line_errors
from .common import build_runner, ending_together
from .test import evaluation_config, evaluation_parser


class _AtomicDump(DumpDetResults):
    """DumpDetResults that writes its file atomically."""

    def compute_metrics(self, results: list) -> dict:
        Path(self.out_file_path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out_file_path, lambda file: pickle.dump(results, file))
        return {}


def get_parser(program: str = "python -m detection.test") -> argparse.ArgumentParser:
    """Return the argument parser of a program with this name."""
    parser = evaluation_parser(program, "Evaluate a detector.")
    parser.add_argument("--out", type=Path, help="write the predictions to this .pkl file")
    parser.add_argument(
        "--show-dir", help="draw the predictions to <work dir>/<time>/<this folder>"
    )
    return parser


def get_runner(args: argparse.Namespace) -> SafeRunner:
    """Build the runner of an evaluation.

    Raises:
        FileNotFoundError: If the config does not exist.
        OSError: If a folder cannot be written.
        ValueError: If an argument is invalid.
    """
    if args.out and args.out.suffix not in (".pkl", ".pickle"):
        raise ValueError(f"--out must end in .pkl or .pickle, got {args.out}")
    if args.out:
        require_writable(args.out.parent, "--out")
        if args.out.is_dir():
            raise ValueError(f"--out must be a file, got the folder {args.out}")
    cfg = evaluation_config(args)
    if args.show_dir:
        cfg.default_hooks.visualization.update(draw=True, test_out_dir=args.show_dir)
    runner = build_runner(cfg)
    if args.show_dir:
        require_unique_names(runner.test_loop.dataloader.dataset, "--show-dir", suffixes=True)
    if args.out:
        runner.test_evaluator.metrics.append(_AtomicDump(out_file_path=str(args.out)))
    return runner


def main(program: str = "python -m detection.test", argv: list[str] | None = None) -> None:
    """Parse a command line and evaluate a detector.

    Args:
        program: Name of the program in usage messages.
        argv: Arguments; None for those of the process.
    """
    args = get_parser(program).parse_args(argv)
    with one_line_errors(), ending_together():
        get_runner(args).test()
