"""Draw where the DCNv3 and DCNv4 layers of a model sample an image.

flash-internimage visualize NAME|CONFIG [CHECKPOINT] IMAGE --layer LAYER --pixel X,Y -o OUT.png
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
from PIL import Image

from ..classification.model import pick_device
from ..console import log_to_terminal
from ..files import require_writable, write_atomically
from ..inference.predictor import find_model, load_predictor
from ..inference.run import is_out_of_memory
from ..inference.sources import read_rgb
from ..sampling import draw_maps, draw_sampling_points, last_of_stages, preprocessing_of

_logger = logging.getLogger(__name__)

PROGRAM = "flash-internimage visualize"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def parse_arguments(argv: list[str] | None, program: str = PROGRAM) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv: Arguments; None for those of the process.
        program: Name of the program in usage messages.
    """
    parser = argparse.ArgumentParser(
        program,
        usage=f"{program} [-h] NAME|CONFIG [CHECKPOINT] IMAGE --layer LAYER --pixel X,Y -o OUT "
        "[--depth N] [--maps] [--size PIXELS] [--max-points N] [--device DEVICE] "
        "[--checkpoint CHECKPOINT]",
        description="Draw where the DCNv3 and DCNv4 layers of a model sample an image.",
    )
    parser.add_argument("model", metavar="NAME|CONFIG",
                        help="model of the zoo or of timm, or a config of any task")  # fmt: skip
    parser.add_argument("files", nargs="+", metavar="[CHECKPOINT] IMAGE",
                        help="weights (default: the released ones), and image")  # fmt: skip
    parser.add_argument("--layer", required=True, help="block, such as levels.2.blocks.5")
    parser.add_argument("--pixel", required=True, metavar="X,Y",
                        help="column and row in the image, counted from 0")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT",
                        help="picture to write: *.png, *.jpg or *.webp")  # fmt: skip
    parser.add_argument("--depth", type=int, default=1, metavar="N",
                        help="compose N layers, from LAYER down (default: 1)")  # fmt: skip
    parser.add_argument("--maps", action="store_true",
                        help="also draw the offset lengths and effective receptive fields of LAYER "
                        "and of the last block of each stage, into OUT-maps")  # fmt: skip
    parser.add_argument("--size", type=int, metavar="PIXELS",
                        help="resize the shorter side of the image to this (default: the test "
                        "size of the model)")  # fmt: skip
    parser.add_argument("--max-points", type=int, default=2000, metavar="N",
                        help="points to keep per layer (default: 2000)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--checkpoint", help="weights, if they are not the second argument")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run the command and return the exit code."""
    log_to_terminal()
    huggingface_hub.utils.logging.disable_propagation()  # it has its own handler
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every request
    # The drawn picture has few pixels, whatever the size of the image.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    arguments = parse_arguments(argv, program)
    try:
        _run(arguments)
    except (ValueError, OSError) as error:
        _logger.error("%s", " ".join(str(error).split()))
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _logger.error("not enough memory for an image of this size: reduce it by --size")
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    *checkpoint, image_file = arguments.files
    if arguments.checkpoint is not None:
        checkpoint.insert(0, arguments.checkpoint)
    if len(checkpoint) > 1:
        raise ValueError(
            f"the arguments must be NAME|CONFIG [CHECKPOINT] IMAGE, got {len(checkpoint) + 2}"
        )
    for option in ("depth", "size", "max_points"):
        number = getattr(arguments, option)
        if number is not None and number < 1:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} must be at least 1, got {number}")
    output = arguments.output
    if output.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"-o must end in {', '.join(_SUFFIXES)}, got {output}")
    maps_output = output.with_stem(f"{output.stem}-maps")
    outputs = [output, maps_output] if arguments.maps else [output]
    _check_outputs(outputs, [*checkpoint, image_file])
    image = read_rgb(image_file)
    pixel = _pixel(arguments.pixel, image)
    pick_device(arguments.device)
    source = find_model(arguments.model)
    require_writable(output.parent, "-o")
    weights = os.path.expanduser(checkpoint[0]) if checkpoint else None
    predictor = load_predictor(source, weights, device=arguments.device)
    layer = arguments.layer
    preprocessing = preprocessing_of(predictor)
    if arguments.size is not None:
        preprocessing = replace(preprocessing, size=arguments.size, max_size=None)
    picture = draw_sampling_points(
        predictor,
        image,
        layer,
        pixel,
        arguments.depth,
        max_points=arguments.max_points,
        preprocessing=preprocessing,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    _write(picture, output)
    if arguments.maps:
        layers = last_of_stages(predictor, layer)
        maps = draw_maps(predictor, image, pixel, layers, preprocessing=preprocessing)
        _write(maps, maps_output)


def _check_outputs(outputs: Sequence[Path], inputs: Sequence[str]) -> None:
    for output in outputs:
        if output.is_dir():
            raise ValueError(f"-o must be a file, got the folder {output}")
        for given in inputs:
            if output.exists() and os.path.exists(given) and output.samefile(given):
                raise ValueError(f"-o must not overwrite {given}, got {outputs[0]}")


def _pixel(text: str, image: np.ndarray) -> tuple[int, int]:
    height, width = image.shape[:2]
    try:
        x, y = (int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"--pixel must be two integers X,Y, got {text!r}") from None
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f"--pixel must be inside the image, from 0,0 to {width - 1},{height - 1}, got {text}"
        )
    return x, y


def _write(picture: np.ndarray, path: Path) -> None:
    kind = Image.registered_extensions()[path.suffix.lower()]
    write_atomically(path, lambda file: Image.fromarray(picture).save(file, kind))
    sys.stdout.write(f"{path}\n")
