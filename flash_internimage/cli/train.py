"""Train a model of any task; the config decides which.

flash-internimage train CONFIG ...
torchrun --nproc-per-node 8 -m flash_internimage train CONFIG ...
"""

from .configs import config_parser, is_for_classification, resolve


def main(argv: list[str], program: str) -> int:
    """Train with the arguments of a command line, and return the exit code."""
    parser = config_parser(program, "Train a classifier, detector or segmentor.")
    config, options = resolve(parser, argv)
    if is_for_classification(config):
        from ..classification.cli import train as classification

        return classification.main([config, *options], program)
    from ..openmmlab.cli import train as openmmlab

    openmmlab.main(program, "Train a detector or segmentor.", [config, *options])
    return 0
