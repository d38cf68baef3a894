"""Predict images, videos or a camera with a model of any task.

flash-internimage predict NAME|CONFIG [CHECKPOINT] INPUT... -o OUT
torchrun --nproc-per-node 8 -m flash_internimage predict NAME INPUT... -o OUT
"""

import argparse
import logging
import os
import re
import signal
import sys
import warnings
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import huggingface_hub
import timm
import torch
import torch.distributed as dist
from PIL import Image
from tqdm.contrib.logging import logging_redirect_tqdm

from ..classification.model import pick_device
from ..classification.precision import AMP_DTYPES, resolve_amp
from ..classification.processes import (
    EndedByAnother,
    fail_together,
    gather,
    rank,
    world_size,
)
from ..console import log_to_terminal
from ..files import own_folder, require_writable
from ..images import UnreadableImage
from ..inference.predictor import find_model, load_predictor
from ..inference.run import predict_sources
from ..inference.sources import Source, find_sources
from ..inference.writer import ResultWriter, merge, remove_parts

_logger = logging.getLogger(__name__)

PROGRAM = "flash-internimage predict"

_CHECKPOINT_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
_DTYPES = {"off": "float32", "fp16": "float16", "bf16": "bfloat16"}
_CPU = torch.device("cpu")

_EPILOG = """\
The second argument is CHECKPOINT if it ends in .pth, .pt, .safetensors, .bin or .ckpt, is a URL or
the name of released weights such as flash_internimage_tiny.in1k; otherwise it is an INPUT.
Exit code: 0 if everything was predicted, 1 if inputs were skipped, 2 for a wrong argument.
"""


def parse_arguments(argv: list[str] | None, program: str = PROGRAM) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        program,
        usage=f"{program} [-h] NAME|CONFIG [CHECKPOINT] INPUT... -o OUT [options]",
        description="Predict images, videos or a camera with a model of any task.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="NAME|CONFIG",
        help="model of the zoo or of timm, or a config: *.yaml for classifiers, *.py for detectors "
        "and segmentors",
    )  # fmt: skip
    parser.add_argument(
        "inputs", nargs="+", metavar="[CHECKPOINT] INPUT",
        help="weights (default: the released ones); images, folders (searched recursively), "
        "patterns, videos, and numbers of cameras",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder of the results"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N",
                        help="images or frames per batch (default: 1)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--amp", choices=("auto", *AMP_DTYPES), default="off",
                        help="mixed precision (default: off)")  # fmt: skip
    parser.add_argument("--checkpoint", help="weights, if they are not the second argument")
    parser.add_argument("--top-k", type=int, metavar="K",
                        help="classes per image, for classifiers (default: 5)")  # fmt: skip
    parser.add_argument("--score-threshold", type=float, metavar="SCORE",
                        help="minimum score, for detectors (default: 0.3)")  # fmt: skip
    parser.add_argument("--tta", action="store_true",
                        help="average over scales and flips, for segmentors")  # fmt: skip
    parser.add_argument("--max-frames", type=int, metavar="N",
                        help="frames per video or camera (default: all)")  # fmt: skip
    parser.add_argument("--no-pictures", action="store_true",
                        help="do not draw the predictions of images")  # fmt: skip
    arguments = parser.parse_intermixed_args(argv)
    if _is_checkpoint(arguments.inputs[0]):
        if arguments.checkpoint is not None:
            parser.error(f"CHECKPOINT must be given once, got {arguments.inputs[0]} as well")
        arguments.checkpoint = arguments.inputs.pop(0)
        if not arguments.inputs:
            parser.error("INPUT must follow CHECKPOINT")
    if arguments.checkpoint is not None:
        arguments.checkpoint = os.path.expanduser(arguments.checkpoint)
    return arguments


def _is_checkpoint(argument: str) -> bool:
    if os.path.isdir(argument):
        return False
    address = re.match(r"https?://", argument, re.IGNORECASE) is not None
    is_ours = argument.startswith(("flash_internimage_", "internimage_"))
    released = is_ours and timm.is_model(argument)
    return address or released or argument.lower().endswith(_CHECKPOINT_SUFFIXES)


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run the command and return the exit code.

    Args:
        argv: Arguments; None for those of the process.
        program: Name of the program in usage messages.
    """
    log_to_terminal()
    huggingface_hub.utils.logging.disable_propagation()  # it has its own handler
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every request
    arguments = parse_arguments(argv, program)
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with logging_redirect_tqdm(), warnings.catch_warnings():
            # Pillow warns of images of more than 89 megapixels, and rejects twice as many.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return _run(arguments)
    except KeyboardInterrupt:
        _logger.warning("stopped; %s contains the results until then", arguments.output)
        return 128 + (received[-1] if received else signal.SIGINT)
    except EndedByAnother:
        return 2
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        _logger.error("%s", " ".join(str(error).split()))
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(arguments: argparse.Namespace) -> int:
    """Predict and write the results, on every process of torchrun."""
    _join_processes()
    if rank() != 0:
        logging.getLogger().setLevel(logging.WARNING)
    with ExitStack() as stack:
        with fail_together(_CPU):
            options = _check(arguments)
            sources: list[Source] = []
            if rank() == 0:
                # The other processes would find pictures that the first one has written.
                sources = find_sources(arguments.inputs, arguments.output)
                _check_cameras(sources)
                require_writable(arguments.output, "-o")
                stack.enter_context(own_folder(arguments.output))
                remove_parts(arguments.output)
        sources = gather(sources)[0]
        with fail_together(_CPU):
            device = _own_device(arguments.device)
            predictor = load_predictor(
                options.pop("source"), arguments.checkpoint, tta=arguments.tta, device=device,
                dtype=_DTYPES[resolve_amp(arguments.amp, torch.device(device))], **options,
            )  # fmt: skip
        share = list(enumerate(sources))[rank() :: world_size()]
        try:
            with ResultWriter(arguments.output, rank(), not arguments.no_pictures) as writer:
                predict_sources(
                    predictor, share, writer, batch_size=arguments.batch_size,
                    max_frames=arguments.max_frames, progress=rank() == 0,
                )  # fmt: skip
        except BaseException:
            if rank() == 0:
                merge(arguments.output, predictor.task, predictor.classes)
                if world_size() == 1:
                    remove_parts(arguments.output)
            raise
        counts = gather((writer.written, writer.skipped))  # waits for all processes
        written, skipped = (sum(numbers) for numbers in zip(*counts, strict=True))
        if rank() == 0:
            merge(arguments.output, predictor.task, predictor.classes)
            remove_parts(arguments.output)
            sys.stdout.write(_summary(written, skipped, arguments.output))
    return 1 if skipped else 0


def _summary(written: int, skipped: int, folder: Path) -> str:
    left_out = f", {skipped} skipped (see skipped.csv)" if skipped else ""
    return f"{written} of {written + skipped} inputs predicted{left_out}; results in {folder}\n"


def _join_processes() -> None:
    """Join the processes of torchrun, which only share lists of files and counts."""
    if dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # One process may have much more to do than another, such as a long video.
        dist.init_process_group("gloo", timeout=timedelta(days=7))


def _own_device(name: str) -> str:
    """Return the device of this process: under torchrun, each one has its own accelerator."""
    device = pick_device(name)
    if world_size() == 1 or device.type == "cpu" or device.index is not None:
        return str(device)
    number = int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count()
    return f"{device.type}:{number}"


def _check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check the arguments, and return the model's source and the options of its task."""
    for name, least in (("batch_size", 1), ("top_k", 1), ("max_frames", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    threshold = arguments.score_threshold
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"--score-threshold must be from 0 to 1, got {threshold}")
    pick_device(arguments.device)
    source = find_model(arguments.model)
    options: dict[str, Any] = {"source": source}
    for name, task, kind in (
        ("top_k", "classification", "classifier"),
        ("score_threshold", "detection", "detector"),
        ("tta", "segmentation", "segmentor"),
    ):
        value = getattr(arguments, name)
        if value is None or value is False:
            continue
        if source.task != task:
            raise ValueError(
                f"--{name.replace('_', '-')} must be used with a {kind}, got {source.name} "
                f"({source.task})"
            )
        if name != "tta":
            options[name] = value
    return options


def _check_cameras(sources: list[Source]) -> None:
    """Raise an error before the model is loaded if a camera does not exist."""
    for source in sources:
        if source.kind != "camera":
            continue
        from ..inference.video import VideoReader  # requires OpenCV

        try:
            VideoReader(source).close()
        except UnreadableImage as error:
            raise ValueError(f"INPUT: {error}") from error
