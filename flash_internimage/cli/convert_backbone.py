"""Write FlashInternImage weights that are initialized from an InternImage.

flash-internimage convert-backbone INTERNIMAGE_CHECKPOINT OUTPUT [--model NAME] [-v]
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import huggingface_hub
import timm
import torch
from torch import Tensor

from ..backbones import FlashInternImage, flash_internimage, intern_image
from ..checkpoints import clean_state_dict, fetch_checkpoint, load_checkpoint, load_internimage
from ..checkpoints.conversion import check_output, write_checkpoint
from ..checkpoints.loading import released_classifiers
from ..checkpoints.weights import first_size
from ..console import log_to_terminal

_logger = logging.getLogger(__name__)

PROGRAM = "flash-internimage convert-backbone"
_PREFIX = "flash_internimage_"
_MODELS = [f"{_PREFIX}{size}" for size in flash_internimage.ARCHITECTURES]
_BLOCK = re.compile(r"levels\.(\d+)\.blocks\.(\d+)\.dcn\.dw_conv\.")


def parse_arguments(argv: list[str] | None, program: str = PROGRAM) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv: Arguments; None for those of the process.
        program: Name of the program in usage messages.
    """
    parser = argparse.ArgumentParser(
        program,
        description="Write a checkpoint of a FlashInternImage that is initialized from the weights "
        "of an InternImage, as a start for fine-tuning.",
    )
    parser.add_argument("checkpoint", metavar="INTERNIMAGE_CHECKPOINT",
                        help="path or URL of a classifier, detector or segmentor, or the name "
                        "of released weights such as internimage_tiny.in1k")  # fmt: skip
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="*.safetensors or *.pth")
    parser.add_argument("--model", choices=_MODELS, metavar="NAME",
                        help=f"model to initialize: {', '.join(_MODELS)} "
                        "(default: that of the checkpoint's size)")  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="print the names of tensors")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run the command and return the exit code."""
    log_to_terminal()
    huggingface_hub.utils.logging.disable_propagation()  # it has its own handler
    arguments = parse_arguments(argv, program)
    try:
        _run(arguments)
    except (ValueError, OSError) as error:
        _logger.error("%s", " ".join(str(error).split()))
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    output = arguments.output.expanduser()
    check_output(output)
    _check_released(arguments.checkpoint, arguments.model)
    source = fetch_checkpoint(os.path.expanduser(arguments.checkpoint))
    if output.exists() and output.samefile(source):
        raise ValueError(f"output must be another file than the checkpoint, got {output} for both")
    weights = clean_state_dict(load_checkpoint(source))
    channels, depths = _size(weights, source)
    size = f"{channels} channels and {', '.join(map(str, depths))} blocks"
    name = arguments.model or _find_model(channels, depths)
    if name is None:
        raise ValueError(
            f"the checkpoint must have the size of one of {', '.join(_MODELS)}, got {size}"
        )
    arch = name.removeprefix(_PREFIX)
    theirs = intern_image.ARCHITECTURES.get(arch, {})
    torch.manual_seed(0)  # of tensors without a counterpart
    classes = first_size(weights.get("head.weight")) or 1000
    model = cast(FlashInternImage, timm.create_model(name, num_classes=classes))
    transfer = load_internimage(model, weights, theirs.get("offset_scale", 1.0))
    if not transfer.converted:
        raise ValueError(f"--model must have the size of the checkpoint, got {name} for {size}")
    if transfer.kept:
        _logger.warning("%d tensors of %s stay randomly initialized", len(transfer.kept), name)
    write_checkpoint({"state_dict": model.state_dict(), "meta": {}}, output)
    if arguments.verbose:
        for kind in ("copied", "converted", "kept", "unused"):
            sys.stdout.writelines(f"{kind:10}{tensor}\n" for tensor in getattr(transfer, kind))
    sys.stdout.write(f"{name}: {output}\n")


def _check_released(source: str, model: str | None) -> None:
    """Check the size of released weights before they are downloaded."""
    arch = source.partition(".")[0]
    if os.path.isfile(source) or source not in released_classifiers():
        return
    if (name := f"flash_{arch}") not in _MODELS:
        sizes = ", ".join(name.removeprefix("flash_") for name in _MODELS[1:])
        raise ValueError(f"the released weights must be those of {sizes}, got {source}")
    if model not in (None, name):
        raise ValueError(f"--model must have the size of the checkpoint, got {model} for {source}")


def _size(weights: Mapping[str, Tensor], source: Path) -> tuple[int, tuple[int, ...]]:
    """Return the channels of the first stage, and the number of blocks of each stage."""
    stem = weights.get("patch_embed.conv2.weight")
    blocks = [(int(m[1]), int(m[2])) for m in map(_BLOCK.match, weights) if m]
    if stem is None or stem.dim() != 4 or not blocks:
        raise ValueError(f"the checkpoint must contain the weights of an InternImage, got {source}")
    stages = sorted({stage for stage, _ in blocks})
    depths = (1 + max(block for other, block in blocks if other == stage) for stage in stages)
    return len(stem), tuple(depths)


def _find_model(channels: int, depths: tuple[int, ...]) -> str | None:
    """Return the name of the FlashInternImage with this size, if any."""
    for name, arch in flash_internimage.ARCHITECTURES.items():
        if (arch["channels"], arch["depths"]) == (channels, depths):
            return f"{_PREFIX}{name}"
    return None
