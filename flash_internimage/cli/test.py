"""Evaluate a model of any task; the config decides which.

flash-internimage test CONFIG CHECKPOINT ...
torchrun --nproc-per-node 8 -m flash_internimage test CONFIG CHECKPOINT ...
"""

import importlib
import os
import re
from pathlib import Path
from types import ModuleType

import timm

from ..checkpoints.zoo import TASKS
from .configs import config_parser, is_for_classification, resolve


def main(argv: list[str], program: str) -> int:
    """Evaluate with the arguments of a command line, and return the exit code."""
    parser = config_parser(
        program, "Evaluate a classifier, detector or segmentor.", "CONFIG CHECKPOINT"
    )
    if argv and timm.is_model(argv[0]):
        return _classification(argv[0], argv[1:], program)
    config, options = resolve(parser, argv)
    if is_for_classification(config):
        return _classification(config, options, program)
    _program_of(config).main(program, [config, *options])
    return 0


def _program_of(config: str) -> ModuleType:
    """Return the module that evaluates models of OpenMMLab's config."""
    from ..openmmlab.cli.config import read_config
    from ..openmmlab.errors import one_line_errors

    with one_line_errors():
        scope = read_config(Path(config), import_custom_modules=False).get("default_scope")
        if scope not in TASKS:
            raise ValueError(
                f"default_scope must be {' or '.join(map(repr, TASKS))}, got {scope!r}"
            )
    return importlib.import_module(f"flash_internimage.openmmlab.cli.{TASKS[scope]}")


def _classification(model: str, options: list[str], program: str) -> int:
    from ..classification.cli import test

    if options and (os.path.isfile(options[0]) or not re.match(r"-|[\w.]+=", options[0])):
        options = ["--checkpoint", *options]
    return test.main([model, *options], program)
