"""List, download, convert and evaluate the released checkpoints.

python -m tools.zoo list
python -m tools.zoo info NAME
python -m tools.zoo download NAME...
python -m tools.zoo convert NAME|FILE -o OUT
python -m tools.zoo evaluate NAME --data DIR
python -m tools.zoo generate
"""

import argparse
import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import timm
import torch
import yaml
from torch import Tensor, nn

from flash_internimage.checkpoint import (
    clean_state_dict,
    fetch_checkpoint,
    find_misfits,
    load_checkpoint,
    save_atomically,
)
from flash_internimage.classification.cli import test
from flash_internimage.classification.config import ConfigError
from flash_internimage.classification.data import spread
from flash_internimage.classification.model import pick_device
from flash_internimage.conversion import convert_checkpoint, restore_checkpoint, unwrap_names
from flash_internimage.files import write_atomically
from tools.zoo_documents import documents
from tools.zoo_entries import ROOT, Entry, find, read_zoo

_logger = logging.getLogger(__name__)

# Accepted difference of a measured from a published figure, in percentage points. Published figures
# are rounded to 0.1, and the kernel used for them mixed up some pixels of the images in a batch.
TOLERANCE = 0.2

# Number of images in the complete data sets.
IMAGES = {"classification": 50_000, "detection": 5_000, "segmentation": 2_000}

# Names of the figures in mmdet and mmseg, and the factors that convert them to percent.
_METRICS = {
    "box_ap": ("coco/bbox_mAP", 100),
    "mask_ap": ("coco/segm_mAP", 100),
    "miou": ("mIoU", 1),
}

# Prefixes of the parameter names of detectors and segmentors, except the backbone's.
_HEADS = ("neck.", "roi_head.", "bbox_head.", "decode_head.", "memory_trans_fc.")


def _say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def build_model(name: str, entry: Entry) -> nn.Module:
    """Return the model of an entry, on the meta device to save the memory of its weights."""
    with torch.device("meta"):
        if entry.task == "classification":
            return timm.create_model(name)
        from mmengine.config import Config
        from mmengine.registry import MODELS, DefaultScope

        cfg = Config.fromfile(ROOT / entry.config)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            return MODELS.build(cfg.model)


def convert(
    source: Path,
    out: Path,
    model: nn.Module | None = None,
    published: bool = False,
    partial: bool = False,
) -> list[str]:
    """Convert a checkpoint to the current or the published parameter names.

    Args:
        source: Checkpoint of a classifier, detector or segmentor, with current or published names.
        out: File to write: *.safetensors, or *.pth, which contains `state_dict` and `meta`. The
            names and colours of the classes are stored where the current engine expects them or,
            with `published`, the old one.
        model: Model that the weights should fit. None skips the comparison.
        published: Write the published names instead of the current ones.
        partial: Write the weights that fit even if others do not.

    Returns:
        The mismatches: a line for each parameter that is missing, unexpected or of another shape.

    Raises:
        ValueError: If the source cannot be read or converted, or does not fit; the message then
            lists all mismatches.
        FileNotFoundError: If the folder of `out` does not exist.
    """
    if out.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"--output must end in .safetensors or .pth, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--output: there is no folder {out.parent}")
    checkpoint = load_checkpoint(source)
    if _is_of_openmmlab(checkpoint):
        checkpoint = convert_checkpoint(checkpoint)
    else:
        checkpoint = {"state_dict": clean_state_dict(checkpoint), "meta": {}}
    weights = checkpoint["state_dict"]
    if not weights or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ValueError(f"{source} must hold weights and nothing else")
    misfits = []
    if model is not None:
        own = model.state_dict()
        misfits = find_misfits(own, weights)
        if misfits and not partial:
            last = f"{source} does not fit, as said above; --partial writes what does"
            raise ValueError("\n".join(["what does not fit:", *misfits, last]))
        weights = {
            name: weight
            for name, weight in weights.items()
            if name in own and own[name].shape == weight.shape
        }
    checkpoint["state_dict"] = weights
    if published:
        checkpoint = restore_checkpoint(checkpoint)
    _write(checkpoint, out)
    return misfits


def _is_of_openmmlab(checkpoint: dict[str, Any]) -> bool:
    """Return whether a checkpoint is a detector's or segmentor's, not a classifier's."""
    weights = checkpoint.get("state_dict", checkpoint)
    if not isinstance(weights, dict):
        return False
    names = unwrap_names({name: name for name in map(str, weights)})
    return any(name.startswith(_HEADS) for name in names.values())


def _write(checkpoint: dict[str, dict], out: Path) -> None:
    if out.suffix == ".pth":
        return save_atomically(checkpoint, out)
    # safetensors rejects tensors that share memory.
    weights = {
        name: tensor.contiguous().clone() for name, tensor in checkpoint["state_dict"].items()
    }
    meta = {key: json.dumps(value) for key, value in checkpoint["meta"].items()}
    contents = safetensors.torch.save(weights, {"format": "pt", **meta})
    write_atomically(out, lambda file: file.write(contents))


def evaluate(
    name: str, entry: Entry, checkpoint: Path, arguments: argparse.Namespace
) -> tuple[dict[str, float], int]:
    """Evaluate a checkpoint on a data set.

    Args:
        name: Name of the entry.
        entry: Entry of the zoo.
        checkpoint: Checkpoint to evaluate.
        arguments: Arguments of the command line.

    Returns:
        The figures in percent, named as in :class:`~tools.zoo_entries.Figures`, and the number of
        images.
    """
    if entry.task == "classification":
        model = str(ROOT / entry.config) if entry.config else name
        argv = [model, "--checkpoint", checkpoint, "--data", arguments.data]
        argv += ["--device", arguments.device]
        argv += ["--limit", arguments.limit] if arguments.limit else []
        result = test.run(test.parse_arguments([str(argument) for argument in argv]))
        return {"top1": result["top1"]}, result["images"]
    _use_device(arguments.device)
    program = importlib.import_module(f"{entry.task}.test")
    config = ROOT / entry.config
    work_dir = arguments.work_dir or Path("output", "zoo", name)
    argv = [str(config), str(checkpoint), "--work-dir", str(work_dir)]
    parsed = program.get_parser().parse_args(argv + ["--tta"] * arguments.tta)
    settings = _detection_data if entry.task == "detection" else _segmentation_data
    parsed.cfg_options = settings(config, arguments.data, arguments.limit, work_dir)
    runner = program.get_runner(parsed)
    measured = runner.test()
    figures = {
        figure: float(measured[metric]) * factor
        for figure, (metric, factor) in _METRICS.items()
        if metric in measured
    }
    if arguments.tta:
        figures = {"miou_several_scales": figures["miou"]}
    return figures, len(runner.test_dataloader.dataset)


def _use_device(name: str) -> None:
    """Select the device on which mmengine runs, for which it has no setting."""
    import mmengine.device.utils

    device = pick_device(name)
    mmengine.device.utils.DEVICE = device.type
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)


def _detection_data(config: Path, data: Path, limit: int | None, work_dir: Path) -> dict[str, Any]:
    from mmengine.config import Config

    ann_file = data / Config.fromfile(config).test_dataloader.dataset.ann_file
    if limit and ann_file.is_file():
        # The metric counts all images of its annotation file, so limit the file itself.
        truth = json.loads(ann_file.read_text())
        truth["images"] = [truth["images"][i] for i in spread(len(truth["images"]), limit)]
        kept = {image["id"] for image in truth["images"]}
        truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in kept]
        work_dir.mkdir(parents=True, exist_ok=True)
        ann_file = work_dir / f"limit_{limit}_{ann_file.name}"
        ann_file.write_text(json.dumps(truth))
    return {
        "test_dataloader.dataset.data_root": f"{data}/",
        "test_dataloader.dataset.ann_file": str(ann_file.absolute()),
        "test_evaluator.ann_file": str(ann_file.absolute()),
    }


def _segmentation_data(
    config: Path, data: Path, limit: int | None, work_dir: Path
) -> dict[str, Any]:
    settings: dict[str, Any] = {"test_dataloader.dataset.data_root": f"{data}/"}
    if limit:
        from mmengine.config import Config

        dataset = Config.fromfile(config).test_dataloader.dataset
        files = os.listdir(data / dataset.data_prefix.img_path)
        images = sum(file.endswith(dataset.get("img_suffix", ".jpg")) for file in files)
        settings["test_dataloader.dataset.indices"] = spread(images, limit)
    return settings


def compare(entry: Entry, measured: dict[str, float], whole: bool) -> dict[str, dict[str, Any]]:
    """Compare measured with published figures.

    Args:
        entry: Entry of the zoo.
        measured: Measured figures, in percent.
        whole: Whether they were measured on the whole data set.

    Returns:
        For each figure `measured` and, if a figure was published, `published`, `difference` and
        `reproduced`. The latter is None unless `whole`.
    """
    published = entry.published.known()
    figures = {}
    for figure, value in measured.items():
        row: dict[str, Any] = {"measured": round(value, 2)}
        if figure in published:
            difference = round(value - published[figure], 2)
            row |= {"published": published[figure], "difference": difference}
            row["reproduced"] = abs(difference) <= TOLERANCE if whole else None
        figures[figure] = row
    return figures


def _list(zoo: dict[str, Entry], arguments: argparse.Namespace) -> None:
    width = max(map(len, zoo))
    _say(f"{'name':<{width}}  {'parameters':>10}  published, in percent")
    for name, entry in zoo.items():
        figures = ", ".join(f"{key} {value}" for key, value in entry.published.known().items())
        _say(f"{name:<{width}}  {entry.parameters / 1e6:8.1f} M  {figures}".rstrip())


def _info(zoo: dict[str, Entry], arguments: argparse.Namespace) -> None:
    entry = find(zoo, arguments.name)
    try:
        file = str(entry.fetch(offline=True))
    except FileNotFoundError:
        file = "not downloaded"
    described = entry.model_dump(exclude_none=True)
    _say(yaml.safe_dump({arguments.name: described | {"file": file}}, sort_keys=False).rstrip())


def _download(zoo: dict[str, Entry], arguments: argparse.Namespace) -> None:
    for entry in [find(zoo, name) for name in arguments.names]:
        _say(str(entry.fetch(arguments.offline)))


def _convert(zoo: dict[str, Entry], arguments: argparse.Namespace) -> None:
    name = arguments.model or (arguments.source if arguments.source in zoo else None)
    model = build_model(name, find(zoo, name)) if name else None
    source = arguments.source
    if os.path.isfile(source) or source.lower().startswith(("http://", "https://")):
        source = fetch_checkpoint(source, arguments.offline)
    else:
        source = find(zoo, source).fetch(arguments.offline)
    if model is None:
        _logger.warning("%s is compared with no model: --model names one", source)
    misfits = convert(source, arguments.output, model, arguments.published, arguments.partial)
    for misfit in misfits:
        _logger.warning("%s", misfit)
    _say(str(arguments.output))


def _evaluate(zoo: dict[str, Entry], arguments: argparse.Namespace) -> None:
    name = arguments.name
    entry = find(zoo, name)
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {arguments.limit}")
    if arguments.tta and entry.task != "segmentation":
        raise ConfigError(f"--tta is for segmentation, {name} is of {entry.task}")
    if not arguments.data.is_dir():
        raise FileNotFoundError(f"--data not found: {arguments.data}")
    if arguments.json:
        test.check_json(arguments.json)
    if arguments.checkpoint:
        checkpoint = fetch_checkpoint(arguments.checkpoint, arguments.offline)
    else:
        checkpoint = entry.fetch(arguments.offline)
    measured, images = evaluate(name, entry, checkpoint, arguments)
    whole = images == IMAGES[entry.task]
    if not whole:
        _logger.warning(
            "measured on %d images, published on %d: no figure counts as reproduced or not",
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
        write_atomically(arguments.json, lambda file: file.write(text.encode()))


def _generate(zoo: dict[str, Entry], arguments: argparse.Namespace) -> None:
    for path, text in documents(zoo).items():
        path.write_text(text)
        _say(str(path))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.zoo", description="The released checkpoints."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cached = argparse.ArgumentParser(add_help=False)
    cached.add_argument("--offline", action="store_true", help="use downloaded files only")

    listing = commands.add_parser("list", help="all names, sizes and published figures")
    listing.set_defaults(run=_list)

    info = commands.add_parser("info", help="what is known of one")
    info.add_argument("name", metavar="NAME")
    info.set_defaults(run=_info)

    download = commands.add_parser("download", parents=[cached], help="download to the cache")
    download.add_argument("names", nargs="+", metavar="NAME")
    download.set_defaults(run=_download)

    conversion = commands.add_parser("convert", parents=[cached], help="to other names or formats")
    conversion.add_argument("source", metavar="NAME|FILE", help="or an address")
    conversion.add_argument("-o", "--output", type=Path, required=True, metavar="OUT",
                            help="*.safetensors or *.pth")  # fmt: skip
    conversion.add_argument("--model", metavar="NAME", help="of the zoo, that a FILE is to fit")
    conversion.add_argument("--published", action="store_true", help="to the published names")
    conversion.add_argument("--partial", action="store_true", help="leave out what does not fit")
    conversion.set_defaults(run=_convert)

    evaluation = commands.add_parser("evaluate", parents=[cached], help="beside what is published")
    evaluation.add_argument("name", metavar="NAME")
    evaluation.add_argument("--data", type=Path, required=True, metavar="DIR",
                            help="of ImageNet, COCO or ADE20K (ADEChallengeData2016)")  # fmt: skip
    evaluation.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto)")
    evaluation.add_argument("--limit", type=int, metavar="N", help="take N images for a quick look")
    evaluation.add_argument("--tta", action="store_true", help="segmentation at several scales")
    evaluation.add_argument("--checkpoint", help="another one of the same model")
    evaluation.add_argument("--work-dir", type=Path, help="for logs, default output/zoo/NAME")
    evaluation.add_argument("--json", type=Path, help="also write the result to this file")
    evaluation.set_defaults(run=_evaluate)

    generation = commands.add_parser("generate", help="README's tables and OpenMMLab's metafiles")
    generation.set_defaults(run=_generate)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    huggingface_hub.utils.logging.disable_propagation()  # it has its own handler
    arguments = parse_arguments(argv)
    try:
        arguments.run(read_zoo(), arguments)
    except ImportError as error:
        _logger.error("%s: detection and segmentation need requirements-openmmlab.txt", error)
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        _logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
