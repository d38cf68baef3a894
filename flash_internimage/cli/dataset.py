"""Convert and check own datasets, and write configs for them.

flash-internimage dataset convert voc|yolo|labelme|labelstudio SOURCE TARGET
flash-internimage dataset check CONFIG
flash-internimage dataset config coco|ade|folder SOURCE --model NAME -o CONFIG
"""

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from ..configs import find_config
from ..console import log_to_terminal
from ..files import require_writable, write_atomically

_logger = logging.getLogger(__name__)

PROGRAM = "flash-internimage dataset"
FORMATS = {
    "voc": "PASCAL VOC, also as exported by CVAT, labelImg and Roboflow",
    "yolo": "YOLO: data.yaml, or classes.txt",
    "labelme": "labelme",
    "labelstudio": "Label Studio's JSON export",
}


def _say(text: str) -> None:
    # Names of files and classes may have letters that the terminal does not.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _convert(arguments: argparse.Namespace) -> int:
    source, target = arguments.source, arguments.target
    if not source.exists():
        raise FileNotFoundError(f"SOURCE not found: {source}")
    if arguments.format in ("voc", "labelme") and not source.is_dir():
        raise ValueError(f"SOURCE must be a folder, got {source}")
    _require_file("--classes", arguments.classes)
    if not 0 <= arguments.val_fraction < 1:
        raise ValueError(
            f"--val-fraction must be at least 0 and below 1, got {arguments.val_fraction}"
        )
    if arguments.images is not None and not arguments.images.is_dir():
        raise FileNotFoundError(f"--images must be a folder, got {arguments.images}")
    from ..own_data.class_names import read_classes
    from ..own_data.conversion.convert import Options, convert

    options = Options(
        label_maps=arguments.label_maps,
        classes=read_classes(arguments.classes) if arguments.classes else None,
        val_fraction=arguments.val_fraction,
        difficult=arguments.difficult,
        images=arguments.images,
        boxes_as_masks=arguments.boxes_as_masks,
        link=arguments.link,
    )
    result = convert(arguments.format, source, target, options)
    unit = "labeled pixels" if arguments.label_maps else "objects"
    for split, images in result.images.items():
        _say(f"{split}: {images} images, {result.counts[split]} {unit}\n")
    _say(f"classes ({len(result.classes)}): {', '.join(result.classes)}\n")
    if lines := result.losses.lines():
        _say("left out or changed:\n" + "".join(f"  {line}\n" for line in lines))
    else:
        _say("nothing was left out or changed\n")
    if "train" not in result.images:
        _logger.warning("no training split, got %s", ", ".join(result.images))
    elif len(result.images) == 1:
        _logger.warning("no validation split: --val-fraction 0.2 holds out a fifth of the images")
    _say(f"{target}\n")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    config = find_config(arguments.config)
    if config.suffix not in (".py", ".yaml", ".yml"):
        raise ValueError(f"CONFIG must end in .yaml, .yml or .py, got {arguments.config}")
    similar = arguments.near_duplicates
    if similar is not None and not 0 <= similar <= 32:
        raise ValueError(f"--near-duplicates must be from 0 to 32 bits, got {similar}")
    if similar is not None and arguments.headers_only:
        raise ValueError("--near-duplicates must not be used with --headers-only")
    overrides = _overrides(arguments.set)
    output = arguments.output
    if output is not None:
        require_writable(output, "-o")
    from PIL import Image

    from ..own_data.check import Options, check_dataset, draw_sheet

    options = Options(
        decode=not arguments.headers_only,
        similar=similar,
        pictures=output is not None,
        overrides=overrides,
    )
    findings = check_dataset(config, options)
    _say(findings.report.text())
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        findings.report.write(output)
        if findings.pictures:
            sheet = Image.fromarray(draw_sheet(findings))
            write_atomically(output / "contact_sheet.png", lambda file: sheet.save(file, "PNG"))
        _say(f"{output}\n")
    return 1 if findings.report.faults else 0


def _overrides(settings: list[str]) -> dict[str, Any]:
    overrides = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise ValueError(f"--set must be KEY=VALUE, got {setting}")
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = value
    return overrides


def _config(arguments: argparse.Namespace) -> int:
    root, output = arguments.source, arguments.output
    if not root.is_dir():
        raise FileNotFoundError(f"SOURCE must be a folder, got {root}")
    suffix = ".yaml" if arguments.kind == "folder" else ".py"
    if output is not None:
        if output.suffix != suffix:
            raise ValueError(f"-o must end in {suffix}, got {output}")
        if output.exists() and not arguments.overwrite:
            raise FileExistsError(f"-o must not exist unless --overwrite is given, got {output}")
    text = arguments.make(root, arguments)
    name = output.name if output else f"my_config{suffix}"
    scaling = "" if arguments.kind == "folder" else " --auto-scale-lr"
    text = f"# flash-internimage train {name}{scaling}\n{text}"
    if output is None:
        _say(text)
        return 0
    try:
        write_atomically(output, lambda file: file.write(text.encode()))
    except OSError as error:
        raise OSError(f"-o {output} cannot be written: {error.strerror}") from error
    _logger.info("check the data with: flash-internimage dataset check %s", output)
    _say(f"{output}\n")
    return 0


def _coco(root: Path, arguments: argparse.Namespace) -> str:
    from ..own_data.config_coco import coco_config
    from ..own_data.models import find_base_model

    model = find_base_model(arguments.model, "detection")
    return coco_config(root, model, arguments.train, arguments.val)


def _ade(root: Path, arguments: argparse.Namespace) -> str:
    if not 0 <= arguments.ignore_index <= 255:
        raise ValueError(f"--ignore-index must be from 0 to 255, got {arguments.ignore_index}")
    _require_file("--classes", arguments.classes)
    from ..own_data.class_names import read_classes
    from ..own_data.config_label_maps import label_map_config
    from ..own_data.models import find_base_model

    model = find_base_model(arguments.model, "segmentation")
    classes = read_classes(arguments.classes) if arguments.classes else None
    return label_map_config(
        root, model, classes, arguments.ignore_index, arguments.reduce_zero_label
    )


def _folder(root: Path, arguments: argparse.Namespace) -> str:
    from ..own_data.config_folder import folder_config

    return folder_config(root, arguments.model, (arguments.output or root).stem)


def _require_file(option: str, path: Path | None) -> None:
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{option} must be a file, got {path}")


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program, description="Convert and check own datasets, and write configs for them."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_convert(commands)
    _add_check(commands)
    _add_config(commands)
    return parser


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="convert a dataset of an annotation tool to COCO or label maps",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n" + "".join(f"  {k:<12} {text}\n" for k, text in FORMATS.items()),
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("format", choices=FORMATS)
    convert.add_argument("source", type=Path, metavar="SOURCE", help="folder or file to convert")
    convert.add_argument("target", type=Path, metavar="TARGET", help="folder to create")
    add = convert.add_argument
    add(
        "--label-maps",
        action="store_true",
        help="write label maps for semantic segmentation instead of COCO annotations",
    )
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="classes to convert, one in each line (default: those of the source)",
    )
    add(
        "--val-fraction",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="hold out a share of the images for validation if the source has no splits",
    )
    add(
        "--difficult",
        choices=("crowd", "keep", "drop"),
        default="crowd",
        help="VOC's difficult objects become crowds, which training and evaluation ignore "
        "(default), are kept as other objects, or are left out",
    )
    add(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="folder of the images, for Label Studio (default: that of the JSON file)",
    )
    add(
        "--boxes-as-masks",
        action="store_true",
        help="take boxes as masks where objects have no outline",
    )
    add("--link", action="store_true", help="link the images instead of copying them")


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="list the contents and all faults of the dataset of a config",
        description="List the contents and all faults of the dataset of a config. The exit code is "
        "0 without faults, 1 with faults, and 2 for wrong arguments.",
    )
    check.set_defaults(run=_check)
    check.add_argument("config", metavar="CONFIG", help="file or name of a shipped config")
    add = check.add_argument
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write report.json, classes.csv, faults.csv and contact_sheet.png",
    )
    add(
        "--headers-only",
        action="store_true",
        help="do not decode images, which takes most of the time",
    )
    add(
        "--near-duplicates",
        type=int,
        metavar="BITS",
        nargs="?",
        const=2,
        help="also report images in different splits whose 64-bit hashes differ in at most BITS "
        "bits (default: 2)",
    )
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override settings")


def _add_config(commands: Any) -> None:
    config = commands.add_parser("config", help="write the config of an own dataset")
    kinds = config.add_subparsers(dest="kind", metavar="KIND", required=True)
    descriptions: dict[str, tuple[str, Callable[[Path, argparse.Namespace], str]]] = {
        "coco": ("detection or instance segmentation: annotations in COCO format", _coco),
        "ade": ("semantic segmentation: images and label maps", _ade),
        "folder": ("classification: a folder of images for each class", _folder),
    }
    for kind, (description, make) in descriptions.items():
        parser = kinds.add_parser(kind, help=description, description=f"Config for {description}.")
        parser.set_defaults(run=_config, make=make)
        parser.add_argument("source", type=Path, metavar="SOURCE", help="root of the dataset")
        parser.add_argument(
            "-o",
            "--output",
            type=Path,
            metavar="CONFIG",
            help="file to write (default: standard output)",
        )
        parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
        if kind == "folder":
            parser.add_argument(
                "--model",
                default="flash_internimage_tiny.in1k",
                help="checkpoint of the zoo, or architecture without weights such as "
                "flash_internimage_nano (default: %(default)s)",
            )
            continue
        parser.add_argument(
            "--model",
            required=True,
            help="architecture and size, such as "
            + ("mask_rcnn-t or dino-s" if kind == "coco" else "upernet-t or mask2former-b"),
        )
        if kind == "coco":
            for name in ("train", "val"):
                parser.add_argument(
                    f"--{name}",
                    type=Path,
                    metavar="FILE",
                    help="annotation file, if its name is unusual",
                )
            continue
        parser.add_argument(
            "--classes",
            type=Path,
            metavar="FILE",
            help="names of the classes, one in each line (default: SOURCE/classes.txt)",
        )
        parser.add_argument(
            "--ignore-index",
            type=int,
            default=255,
            metavar="VALUE",
            help="value of pixels to ignore (default: %(default)s)",
        )
        parser.add_argument(
            "--reduce-zero-label",
            action="store_true",
            help="0 is to be ignored and 1 is the first class",
        )


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run a command of a command line.

    Args:
        argv: Arguments; None for those of the process.
        program: Name of the program in usage messages.

    Returns:
        0; 1 if `check` found faults; 2 for arguments or data that cannot be used; 128 and the
        number of the signal if interrupted.
    """
    log_to_terminal()
    arguments = _parser(program).parse_args(argv)
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 128 + (received or [signal.SIGINT])[-1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
