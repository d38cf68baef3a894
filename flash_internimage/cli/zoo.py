"""List, download, convert and evaluate the released checkpoints.

flash-internimage zoo list [--task TASK] [--family FAMILY]
flash-internimage zoo info NAME
flash-internimage zoo download NAME...
flash-internimage zoo convert NAME|FILE -o OUT
flash-internimage zoo evaluate NAME --data DIR
flash-internimage zoo push NAME|CONFIG USER/NAME
"""

import argparse
import difflib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import get_args

import huggingface_hub
import timm
import torch
import yaml
from torch import nn

from ..checkpoints import convert_file, fetch_checkpoint
from ..checkpoints.zoo import Entry, Family, Task, find, read_zoo
from ..configs import find_config, list_configs
from ..console import log_to_terminal
from ..files import write_text

_logger = logging.getLogger(__name__)

PROGRAM = "flash-internimage zoo"
# Name, description and function of a command.
Command = tuple[str, str, Callable[[dict[str, Entry], argparse.Namespace], None]]


def _say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def build_model(name: str, entry: Entry) -> nn.Module:
    """Return the model of an entry, on the meta device to save the memory of its weights."""
    if entry.task == "classification":
        with torch.device("meta"):
            return timm.create_model(name)
    from ..openmmlab.cli.config import read_config
    from ..openmmlab.utils import build_without_memory

    return build_without_memory(read_config(entry.config_path))


def _list(zoo: dict[str, Entry], arguments: argparse.Namespace) -> None:
    task, family = arguments.task, arguments.family
    zoo = {
        name: entry
        for name, entry in zoo.items()
        if task in (None, entry.task) and family in (None, entry.family)
    }
    width = max(map(len, zoo), default=0)
    _say(f"{'name':<{width}}  {'parameters':>10}  published (percent)")
    for name, entry in zoo.items():
        figures = ", ".join(f"{key} {value}" for key, value in entry.published.items())
        _say(f"{name:<{width}}  {entry.parameters / 1e6:8.1f} M  {figures}".rstrip())


def _info(zoo: dict[str, Entry], arguments: argparse.Namespace) -> None:
    entry = find(zoo, arguments.name)
    try:
        file = str(entry.fetch(offline=True))
    except FileNotFoundError:
        file = "not downloaded"
    known = {key: value for key, value in asdict(entry).items() if value is not None}
    _say(yaml.safe_dump({arguments.name: known | {"file": file}}, sort_keys=False).rstrip())


def _download(zoo: dict[str, Entry], arguments: argparse.Namespace) -> None:
    for entry in [find(zoo, name) for name in arguments.names]:
        _say(str(entry.fetch(arguments.offline)))


def _convert(zoo: dict[str, Entry], arguments: argparse.Namespace) -> None:
    name = arguments.model or (arguments.source if arguments.source in zoo else None)
    expected = build_model(name, find(zoo, name)).state_dict() if name else None
    source = arguments.source
    if os.path.isfile(source) or source.lower().startswith(("http://", "https://")):
        source = fetch_checkpoint(source, arguments.offline)
    else:
        source = find(zoo, source).fetch(arguments.offline)
    if expected is None:
        _logger.warning("the weights of %s are not compared with a model; see --model", source)
    mismatches = convert_file(
        source, arguments.output, expected, arguments.published, arguments.partial
    )
    for mismatch in mismatches:
        _logger.warning("%s", mismatch)
    if mismatches and not arguments.partial:
        raise ValueError(
            f"{source} does not match {name}, see above; --partial writes the matching weights"
        )
    _say(str(arguments.output))


def _evaluate(zoo: dict[str, Entry], arguments: argparse.Namespace) -> None:
    from ..classification.cli.test import check_json
    from .zoo_evaluation import IMAGES, compare, evaluate

    name = arguments.name
    entry = find(zoo, name)
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {arguments.limit}")
    if arguments.tta and entry.task != "segmentation":
        raise ValueError(f"--tta must be used with a segmentor, got {name} ({entry.task})")
    if not arguments.data.is_dir():
        raise FileNotFoundError(f"--data not found: {arguments.data}")
    if arguments.json:
        check_json(arguments.json)
    if arguments.checkpoint:
        checkpoint = fetch_checkpoint(arguments.checkpoint, arguments.offline)
    else:
        checkpoint = entry.fetch(arguments.offline)
    measured, images = evaluate(
        name, entry, checkpoint, arguments.data, device=arguments.device,
        limit=arguments.limit, tta=arguments.tta, work_dir=arguments.work_dir,
    )  # fmt: skip
    whole = images == IMAGES[entry.task]
    if not whole:
        _logger.warning(
            "evaluated %d of %d images: cannot tell whether the result is reproduced",
            images, IMAGES[entry.task],
        )  # fmt: skip
    result = {
        "name": name,
        "checkpoint": str(checkpoint),
        "data": str(arguments.data),
        "images": images,
        "figures": compare(entry, measured, whole),
    }
    _say(f"{'':<20}{'measured':>10}{'published':>11}{'difference':>12}")
    for figure, row in result["figures"].items():
        cells = f"{row['measured']:>10.2f}{row.get('published', '-'):>11}"
        _say(f"{figure:<20}{cells}{row.get('difference', '-'):>12}")
    _say(json.dumps(result, allow_nan=False))
    if arguments.json:
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        write_text(arguments.json, text)


def _push(zoo: dict[str, Entry], arguments: argparse.Namespace) -> None:
    from ..hub import push

    options = {key: value for key, value in vars(arguments).items() if key != "run"}
    name, repo_id = options.pop("name"), options.pop("repo_id")
    entry, config = zoo.get(name), None
    if entry is None and not _is_classifier(name):
        config = _find_config(zoo, name)
        name = config.stem  # A commit message must not contain the path.
    _say(push(name, repo_id, config=config, entry=entry, **options))


def _is_classifier(name: str) -> bool:
    is_file = name.endswith((".py", ".yaml", ".yml"))
    is_ours = name.startswith(("flash_internimage_", "internimage_"))
    return is_ours and not is_file and timm.is_model(name)


def _find_config(zoo: dict[str, Entry], name: str) -> Path:
    """Return the path of the OpenMMLab config NAME, which is neither in the zoo nor in timm."""
    try:
        config = find_config(name)
    except FileNotFoundError:
        if name.endswith(".py"):
            raise
        shipped = [PurePath(path).stem for path in list_configs("*.py")]
        close = difflib.get_close_matches(name, dict.fromkeys([*zoo, *shipped]), n=2, cutoff=0.5)
        similar = f"did you mean {' or '.join(map(repr, close))}?"
        hint = similar if close else "see `flash-internimage zoo list`"
        raise ValueError(f"no checkpoint or config '{name}'; {hint}") from None
    if config.suffix != ".py":
        raise ValueError(
            f"CONFIG must end in .py, got {name}; publish a classifier by the name of its model"
        )
    return config


def parse_arguments(
    argv: list[str] | None, program: str = PROGRAM, others: Sequence[Command] = ()
) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv: Arguments; None for those of the process.
        program: Name of the program in usage messages.
        others: Further commands.
    """
    parser = argparse.ArgumentParser(program, description="Manage the released checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cached = argparse.ArgumentParser(add_help=False)
    cached.add_argument("--offline", action="store_true", help="use cached files only")

    listing = commands.add_parser("list", help="list names, sizes and published results")
    listing.add_argument("--task", choices=get_args(Task))
    listing.add_argument("--family", choices=get_args(Family), help="backbones")
    listing.set_defaults(run=_list)

    info = commands.add_parser("info", help="show an entry")
    info.add_argument("name", metavar="NAME")
    info.set_defaults(run=_info)

    download = commands.add_parser("download", parents=[cached], help="download to the cache")
    download.add_argument("names", nargs="+", metavar="NAME")
    download.set_defaults(run=_download)

    conversion = commands.add_parser("convert", parents=[cached],
                                     help="convert to other names or formats")  # fmt: skip
    conversion.add_argument("source", metavar="NAME|FILE", help="entry of the zoo, path or URL")
    conversion.add_argument("-o", "--output", type=Path, required=True, metavar="OUT",
                            help="*.safetensors or *.pth")  # fmt: skip
    conversion.add_argument(
        "--model", metavar="NAME", help="zoo entry whose model the weights are checked against"
    )
    conversion.add_argument("--published", action="store_true",
                            help="convert to the published parameter names")  # fmt: skip
    conversion.add_argument("--partial", action="store_true",
                            help="write only the matching weights")  # fmt: skip
    conversion.set_defaults(run=_convert)

    evaluation = commands.add_parser("evaluate", parents=[cached],
                                     help="evaluate, compare with published results")  # fmt: skip
    evaluation.add_argument("name", metavar="NAME")
    evaluation.add_argument("--data", type=Path, required=True, metavar="DIR",
                            help="root of ImageNet, COCO or ADEChallengeData2016")  # fmt: skip
    evaluation.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto)")
    evaluation.add_argument("--limit", type=int, metavar="N", help="evaluate on N images only")
    evaluation.add_argument("--tta", action="store_true",
                            help="multi-scale evaluation of a segmentor")  # fmt: skip
    evaluation.add_argument("--checkpoint", help="path or URL of another checkpoint of this model")
    evaluation.add_argument("--work-dir", type=Path,
                            help="folder for OpenMMLab's logs (output/zoo/NAME)")  # fmt: skip
    evaluation.add_argument("--json", type=Path, help="also write the result to this file")
    evaluation.set_defaults(run=_evaluate)

    publication = commands.add_parser("push", parents=[cached],
                                      help="publish on the Hugging Face Hub")  # fmt: skip
    publication.add_argument("name", metavar="NAME|CONFIG",
                             help="entry of the zoo, timm model or OpenMMLab config")  # fmt: skip
    publication.add_argument("repo_id", metavar="USER/NAME", help="repository to create or update")
    publication.add_argument("--checkpoint", help="path or URL of your own weights of this model")
    publication.add_argument("--dataset", metavar="ID", help="dataset of your own weights")
    publication.add_argument("--results", type=Path, metavar="FILE",
                             help="result of an evaluation (--json) for the card")  # fmt: skip
    publication.add_argument("--license", metavar="ID", help="license, such as mit or cc-by-4.0")
    publication.add_argument("--branch", metavar="NAME", help="branch to create or update (main)")
    publication.add_argument("--private", action="store_true", help="make the repository private")
    publication.add_argument("--folder", type=Path, metavar="DIR",
                             help="write the files here and upload nothing")  # fmt: skip
    publication.set_defaults(run=_push)

    for name, description, run in others:
        commands.add_parser(name, help=description).set_defaults(run=run)
    return parser.parse_args(argv)


def main(
    argv: list[str] | None = None, program: str = PROGRAM, others: Sequence[Command] = ()
) -> int:
    """Run a command and return the exit code; see :func:`parse_arguments`."""
    log_to_terminal()
    huggingface_hub.utils.logging.disable_propagation()  # it has its own handler
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every request
    arguments = parse_arguments(argv, program, others)
    try:
        arguments.run(read_zoo(), arguments)
    except (ValueError, OSError, RuntimeError) as error:
        _logger.error("%s", error)
        return 2
    return 0
