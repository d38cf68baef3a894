"""Parse CONFIG, which selects the task and its options."""

import argparse

from ..configs import find_config

_YAML = (".yaml", ".yml")


def config_parser(program: str, description: str, usage: str = "CONFIG") -> argparse.ArgumentParser:
    """Return the parser of a command line whose first argument is a config.

    Args:
        program: Name of the program.
        description: Description of the program in its help.
        usage: Positional arguments.
    """
    parser = argparse.ArgumentParser(
        program,
        usage=f"{program} [-h] {usage} ...",
        description=description,
        epilog=f"The options depend on the config: `{program} CONFIG --help` lists them.",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="file or name of a shipped config; *.yaml for classifiers, *.py for detectors and "
        "segmentors",
    )
    return parser


def resolve(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[str, list[str]]:
    """Return the path of the config, and the arguments that follow it.

    A file or config that does not exist ends the program with code 2 and one line.
    """
    name = parser.parse_args(argv[:1]).config
    try:
        config = find_config(name)
        if config.suffix not in (*_YAML, ".py"):
            raise ValueError(f"CONFIG must end in .yaml, .yml or .py, got {name}")
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    return str(config), argv[1:]


def is_for_classification(config: str) -> bool:
    """Return whether a config is that of a classifier, not one of OpenMMLab's."""
    return config.endswith(_YAML)
