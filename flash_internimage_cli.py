"""The console program `flash-internimage`.

It is not part of the package `flash_internimage` because importing that imports PyTorch and timm,
which takes seconds: help, the version and misspelt commands are immediate.
"""

import argparse
import importlib
import signal
import sys
from importlib import metadata
from typing import Any

# Each command is a module of flash_internimage.cli with a function `main(arguments, program)`.
COMMANDS = {
    "train": "train a classifier, detector or segmentor",
    "test": "evaluate a classifier, detector or segmentor",
    "predict": "predict images, videos or a camera",
    "analyze": "report on a trained model, or compare the curves of several runs",
    "visualize": "draw where DCNv4 layers sample an image",
    "export": "export a model to ONNX, OpenVINO, torch.export or AOTInductor",
    "complexity": "print parameters, multiply-adds, activations and memory of models",
    "app": "serve a page that shows predictions in the browser",
    "zoo": "list, download, convert, evaluate and publish checkpoints",
    "convert-backbone": "initialize FlashInternImage from an InternImage checkpoint",
    "dataset": "convert and check own datasets, and write configs for them",
    "demo-data": "write a small dataset of real images, without a download",
}


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        sys.stdout.write(f"flash-internimage {metadata.version('flash-internimage')}\n")
        parser.exit()


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program,
        description="FlashInternImage for classification, detection and segmentation.",
        epilog=f"`{program} COMMAND --help` describes a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, description in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    return parser


def main(argv: list[str] | None = None, program: str = "flash-internimage") -> int:
    """Run a command and return the exit code.

    Args:
        argv: Arguments; None for those of the process.
        program: Name of the program in usage messages.
    """
    arguments = sys.argv[1:] if argv is None else argv
    command = _parser(program).parse_args(arguments[:1]).command
    try:
        extras = importlib.import_module("flash_internimage.extras")
        with extras.required_by(f"{program} {command}"):
            module = importlib.import_module(f"flash_internimage.cli.{command.replace('-', '_')}")
            return module.main(arguments[1:], f"{program} {command}")
    except KeyboardInterrupt:
        sys.stderr.write(f"{program} {command}: interrupted\n")
        return 128 + signal.SIGINT
