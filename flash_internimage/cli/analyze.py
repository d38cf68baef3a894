"""Report on a trained model of any task, or compare the curves of several runs.

flash-internimage analyze NAME|CONFIG [CHECKPOINT] -o FOLDER ...
flash-internimage analyze runs RUN... -o curves.png
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..extras import required_by

_USAGE = """{program} [-h] NAME|CONFIG [CHECKPOINT] -o FOLDER [--pictures N] ...
       {program} [-h] runs RUN [RUN ...] -o FILE [--metrics NAME ...]"""


def main(argv: list[str] | None = None, program: str = "flash-internimage analyze") -> int:
    """Run the program and return its exit code.

    Args:
        argv: Arguments; None for those of the process.
        program: Name of the program in usage messages.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["runs"]:
        return _compare(arguments[1:], f"{program} runs")
    parser = argparse.ArgumentParser(
        program,
        usage=_USAGE.format(program=program),
        description="Evaluate a classifier, detector or segmentor and write a report, or compare "
        "the curves of several runs.",
        epilog=f"Further options depend on the model: `{program} CONFIG --help` lists them.",
    )
    parser.add_argument("model", metavar="NAME|CONFIG", help="zoo or timm model, or a config")
    name = parser.parse_args(arguments[:1]).model
    try:
        return _report(name, arguments[1:], program)
    except (OSError, ValueError) as error:
        from ..classification.errors import describe

        sys.stderr.write(f"error: {describe(error)}\n")
        return 2


def _compare(argv: list[str], program: str) -> int:
    parser = argparse.ArgumentParser(
        program, description="Draw the training curves of several runs of any task in one chart."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output or work folder")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE",
                        help=".png, .svg or .pdf for a chart, .csv for a table")  # fmt: skip
    parser.add_argument("--metrics", nargs="+", default=(), metavar="NAME",
                        help="names of recorded scalars (default: loss, learning rate and the "
                        "main metrics)")  # fmt: skip
    arguments = parser.parse_args(argv)
    with required_by(program):
        from ..analysis.runs import compare_runs, read_runs
        from ..console import log_to_terminal
        from ..files import writable_folder

        log_to_terminal()

        try:
            if arguments.output.is_dir():
                raise ValueError(f"-o must be a file, got the folder {arguments.output}")
            runs = read_runs([path.expanduser() for path in arguments.runs])
            with writable_folder(arguments.output.parent, "-o"):
                compare_runs(runs, arguments.output, arguments.metrics)
        except (OSError, ValueError) as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
    sys.stdout.write(f"{arguments.output}\n")
    return 0


def _report(name: str, options: list[str], program: str) -> int:
    """Write the report of a model; its task decides which options there are."""
    from ..inference.predictor import find_model

    source = find_model(name)
    model = source.name if source.config is None else str(source.config)
    if source.task == "classification":
        return _classification(model, options, program)
    released = source.entry.addresses[0] if source.entry else None
    return _openmmlab(model, source.task, released, options, program)


def _add_report_arguments(parser: argparse.ArgumentParser, pictures: int) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER",
                        help="folder of the report")  # fmt: skip
    parser.add_argument("--pictures", type=int, default=pictures, metavar="N",
                        help=f"images in a contact sheet (default: {pictures})")  # fmt: skip


def _check(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.pictures <= 1000:
        raise ValueError(f"--pictures must be from 0 to 1000, got {arguments.pictures}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "WORLD_SIZE must be 1, as a report is written by a single process, got "
            f"{os.environ['WORLD_SIZE']}"
        )


def _classification(model: str, options: list[str], program: str) -> int:
    from ..classification.cli import test
    from ..classification.data import TooManyCorruptImages

    if options and (os.path.isfile(options[0]) or not re.match(r"-|[\w.]+=", options[0])):
        options = ["--checkpoint", *options]
    parser = argparse.ArgumentParser(program, description="Write a report on a classifier.")
    test.add_evaluation_arguments(parser)
    _add_report_arguments(parser, 24)
    arguments = parser.parse_intermixed_args([model, *options])
    test.expand_paths(arguments)
    test.check_numbers(arguments)
    _check(arguments)
    from ..analysis.classification import analyze_classifier
    from ..console import log_to_terminal
    from ..files import writable_folder

    log_to_terminal()
    with writable_folder(arguments.output, "-o"):
        settings = test.evaluation_settings(arguments)
        try:
            figures = analyze_classifier(
                model, arguments.output, pictures=arguments.pictures, **settings
            )
        except TooManyCorruptImages as error:
            raise ValueError(str(error)) from error
    _print(figures, arguments.output)
    return 0


def _openmmlab(
    config: str, task: str, released: str | None, options: Sequence[str], program: str
) -> int:
    from ..files import writable_folder
    from ..openmmlab.errors import one_line_errors

    with one_line_errors():
        arguments = _openmmlab_parser(program, task).parse_intermixed_args([config, *options])
        _check(arguments)
        if not 0 <= getattr(arguments, "score_threshold", 0) <= 1:
            raise ValueError(
                f"--score-threshold must be from 0 to 1, got {arguments.score_threshold}"
            )
        if arguments.checkpoint and arguments.positional:
            raise ValueError(f"CHECKPOINT must be given once, got {arguments.positional} as well")
        arguments.checkpoint = arguments.positional or arguments.checkpoint or released
        if arguments.checkpoint is None:
            raise ValueError("CHECKPOINT must be given for a config, got none")
        with writable_folder(arguments.output, "-o"):
            figures = _analyze(arguments)
    _print(figures, arguments.output)
    return 0


def _openmmlab_parser(program: str, task: str) -> argparse.ArgumentParser:
    from ..openmmlab.cli.common import base_parser

    parser = base_parser(
        program, f"Write a report on a {'detector' if task == 'detection' else 'segmentor'}."
    )
    parser.add_argument("positional", nargs="?", metavar="CHECKPOINT",
                        help="path or URL (default: the released weights)")  # fmt: skip
    parser.add_argument("--checkpoint", help="weights, if they are not the second argument")
    parser.add_argument("--data", type=Path, help="root of the dataset (default: from the config)")
    if task == "detection":
        parser.add_argument("--score-threshold", type=float, default=0.3, metavar="SCORE",
                            help="score from which boxes are drawn and count as false "
                            "(default: 0.3)")  # fmt: skip
    else:
        parser.add_argument("--tta", action="store_true", help="average over scales and flips")
    _add_report_arguments(parser, 12)
    return parser


def _analyze(arguments: argparse.Namespace) -> dict:
    from ..openmmlab.cli.config import config_of
    from ..openmmlab.cli.test import move_data, prepare_evaluation

    arguments.work_dir = arguments.work_dir or arguments.output / "log"
    cfg = config_of(arguments)
    prepare_evaluation(cfg, arguments.checkpoint, getattr(arguments, "tta", False))
    if arguments.data is not None:
        move_data(cfg, arguments.data.expanduser())
    if hasattr(arguments, "score_threshold"):
        from ..analysis.detection import analyze_detector

        return analyze_detector(
            cfg, arguments.output, pictures=arguments.pictures,
            score_threshold=arguments.score_threshold,
        )  # fmt: skip
    from ..analysis.segmentation import analyze_segmentor

    return analyze_segmentor(cfg, arguments.output, pictures=arguments.pictures)


def _print(figures: dict, folder: Path) -> None:
    # mmseg's are float32.
    figures = {k: round(float(v), 4) if hasattr(v, "item") else v for k, v in figures.items()}
    width = max(map(len, figures), default=0)
    sys.stdout.write("".join(f"{key:<{width}}  {value}\n" for key, value in figures.items()))
    sys.stdout.write(f"{folder / 'report.md'}\n")
