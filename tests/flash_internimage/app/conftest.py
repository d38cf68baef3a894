"""The page of a classifier, in a process of its own."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from tests.flash_internimage.models import nano

CHECKOUT = Path(__file__).resolve().parents[3]
CONFIG = "flash_internimage_nano_digits"
NOT_DOWNLOADED = "http://127.0.0.1:9/missing.safetensors"  # nothing listens on port 9


@dataclass
class Page:
    """A running page.

    Attributes:
        address: Its address, such as `http://127.0.0.1:7860`.
        folder: Its working directory, which contains a file `secret.txt`.
        uploads: Folder in which it keeps uploads and pictures.
        weights: Weights of a classifier.
        model: Label of that classifier.
        missing: Label of a model whose weights cannot be downloaded.
        images: Ten handwritten digits of 48 x 40 pixels.
    """

    address: str
    folder: Path
    uploads: Path
    weights: Path
    model: str
    missing: str
    images: list[Path]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "secret.txt").write_text("not for users")
    weights = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    _write_weights(weights)
    temporary = tmp_path_factory.mktemp("temporary")
    command = [
        *(sys.executable, "-m", "flash_internimage", "app", "--port", "0"),
        *(f"{CONFIG}={weights}", f"{CONFIG}={NOT_DOWNLOADED}"),
    ]
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "TMPDIR": str(temporary)}
    log = folder.with_suffix(".log")
    with open(log, "w") as errors:
        process = subprocess.Popen(command, cwd=folder, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=errors)  # fmt: skip
    try:
        assert process.stdout is not None
        first_line = process.stdout.readline()
        found = re.match(r"Running on (http://127\.0\.0\.1:\d+);", first_line)
        assert found, f"{first_line}{log.read_text()}"
        yield Page(
            found[1], folder, temporary, weights,
            f"{CONFIG} (weights.safetensors)", f"{CONFIG} (missing.safetensors)",
            _write_images(tmp_path_factory.mktemp("images")),
        )  # fmt: skip
        before = len(log.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0, "Ctrl-C must end the program cleanly"
        assert log.read_text()[before:] == ""
        assert not list(temporary.iterdir()), "uploads must be deleted at the end"
        assert [file.name for file in folder.iterdir()] == ["secret.txt"]
    finally:
        process.kill()
        process.communicate()


def _write_weights(path: Path) -> None:
    model = nano(0, num_classes=10)
    with torch.no_grad():
        model.head.weight *= 50  # without training, all images would get similar scores
    save_file(model.state_dict(), path)


def _write_images(folder: Path) -> list[Path]:
    digits = np.rint(load_digits().images[:10] * (255 / 16)).astype(np.uint8)
    paths = [folder / f"digit_{k}.png" for k in range(len(digits))]
    for path, pixels in zip(paths, digits, strict=True):
        Image.fromarray(pixels).convert("RGB").resize((48, 40)).save(path)
    return paths
