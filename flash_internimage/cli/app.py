"""Serve a page that shows the predictions of models in the browser.

flash-internimage app
flash-internimage app flash_internimage_tiny.in1k
flash-internimage app my_config.py=output/best.pth --port 8080
"""

import argparse
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import huggingface_hub
from PIL import Image

from ..app.address import free_port
from ..app.models import Models, Source
from ..app.presentation import LOWEST_SCORE
from ..checkpoints import fetch_checkpoint, is_remote
from ..checkpoints.zoo import read_zoo
from ..classification.model import pick_device
from ..console import log_to_terminal
from ..extras import describe
from ..inference import Predictor, load_predictor
from ..inference.predictor import find_model

_logger = logging.getLogger(__name__)

PROGRAM = "flash-internimage app"


def parse_arguments(argv: list[str] | None, program: str = PROGRAM) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv: Arguments; None for those of the process.
        program: Name of the program in usage messages.
    """
    parser = argparse.ArgumentParser(
        program, description="Serve a page that shows the predictions of models in the browser."
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL",
        help="name in the zoo or in timm, or CONFIG=CHECKPOINT (default: all of the zoo)",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                        help="address to listen on; 0.0.0.0 lets other machines use the page "
                             "(default: 127.0.0.1, this machine only)")  # fmt: skip
    parser.add_argument(
        "--port", type=int, default=7860, help="0 for any that is free (default: 7860)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--max-upload", type=int, default=20, metavar="MB",
                        help="maximum size of an uploaded image (default: 20)")  # fmt: skip
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Serve the page and return the exit code; see :func:`parse_arguments`."""
    log_to_terminal()
    huggingface_hub.utils.logging.disable_propagation()  # it has its own handler
    for library in ("httpx", "httpx2"):  # of gradio and huggingface_hub; they log every request
        logging.getLogger(library).setLevel(logging.WARNING)
    # Images above the page's own limit on pixels are refused.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    arguments = parse_arguments(argv, program)
    try:
        sources = [_to_source(text) for text in arguments.models] or _zoo()
        if arguments.max_upload < 1:
            raise ValueError(f"--max-upload must be at least 1, got {arguments.max_upload}")
        pick_device(arguments.device)
        port = free_port(arguments.host, arguments.port)
        models = Models(sources, _fetch, partial(_load, device=arguments.device))
        with _own_folder():
            # Importing gradio takes seconds; it reads its folders from the environment.
            from ..app.page import build_page
            from ..app.server import serve

            serve(build_page(models), arguments.host, port, arguments.max_upload)
    except (ValueError, OSError) as error:
        _logger.error("%s", " ".join(str(error).split()))
        return 2
    return 0


def _zoo() -> list[Source]:
    return [Source(name) for name in read_zoo()]


def _to_source(text: str) -> Source:
    model, equals, checkpoint = text.partition("=")
    checkpoint = os.path.expanduser(checkpoint)  # shells expand ~ at the start of a word only
    if not model or (equals and not checkpoint):
        raise ValueError(f"MODEL must be NAME or CONFIG=CHECKPOINT, got {text}")
    found = find_model(model)
    if found.config is not None and found.entry is None and not checkpoint:
        raise ValueError(
            f"MODEL must be CONFIG=CHECKPOINT for a config without released weights, got {text}"
        )
    if checkpoint and not is_remote(checkpoint) and not os.path.isfile(checkpoint):
        raise FileNotFoundError(f"checkpoint not found: {checkpoint}")
    return Source(model, checkpoint or None)


def _fetch(source: Source) -> Path | None:
    if source.checkpoint is not None:
        return fetch_checkpoint(source.checkpoint)
    entry = find_model(source.model).entry
    return None if entry is None else entry.fetch()


def _load(source: Source, weights: Path | None, device: str) -> Predictor:
    checkpoint = None if source.checkpoint is None else weights
    try:
        return load_predictor(source.model, checkpoint, device=device, score_threshold=LOWEST_SCORE)
    except ModuleNotFoundError as error:  # not of the program, but of a user's request
        raise RuntimeError(f"{source.label()} requires {describe(error) or error.name}") from error


@contextmanager
def _own_folder() -> Iterator[None]:
    """Let gradio keep uploads and pictures in a temporary folder, and send no usage statistics."""
    with tempfile.TemporaryDirectory(prefix="flash-internimage-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_EXAMPLES_CACHE"] = os.path.join(folder, "examples")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        yield
