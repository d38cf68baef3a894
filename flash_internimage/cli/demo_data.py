"""Write demo datasets of real images. The images are part of scikit-learn; nothing is downloaded.

    flash-internimage demo-data [digits | digits-scenes | digits-scenes-ade20k] [--root data/...]

digits                an ImageFolder of handwritten digits: root/{train,val}/{0..9}/NNNN.png, 1,437
                      and 360 images, a fixed stratified split
digits-scenes         these digits on photographs, for detection and instance segmentation in COCO
                      format: root/annotations/instances_{train,val}.json, root/{train,val}/*.jpg,
                      400 and 60 images
digits-scenes-ade20k  similar scenes of the digits 0, 1, 4 and 7 for semantic segmentation in ADE20K
                      format, 800 and 100 images: root/images/{training,validation}/*.jpg and
                      root/annotations/{training,validation}/*.png, where 0 is the ignore index
                      (crowds), 1 the background, and 2 to 5 the digits
"""

import argparse
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

from ..console import log_to_terminal
from .demo_scenes import Layout, Material, Scene, make_scenes, to_coco

_logger = logging.getLogger(__name__)

SEGMENTED_DIGITS = (0, 1, 4, 7)
SEGMENTED_LAYOUT = Layout(digit_sizes=(32, 56), digits_per_scene=(3, 7))
# What identifies a dataset that was written before.
_CONTENTS = {
    "digits": ("train/0", "val/0"),
    "digits-scenes": ("annotations/instances_train.json", "annotations/instances_val.json"),
    "digits-scenes-ade20k": ("images/training", "annotations/training"),
}
_PHOTO_SPLIT = 440  # training uses the photographs left of this column, validation the rest


def write_digits(root: Path, size: int = 32) -> None:
    """Write the digits, scaled from 8 x 8 to `size` pixels; `root` is only created if complete."""
    digits = load_digits()
    with _write_atomically(root) as partial:
        for split, chosen in _split(digits.target).items():
            for i in chosen:
                folder = partial / split / str(digits.target[i])
                folder.mkdir(parents=True, exist_ok=True)
                pixels = np.rint(digits.images[i] * (255 / 16)).astype(np.uint8)
                image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
                image.save(folder / f"{i:04d}.png")


def write_digits_scenes(root: Path, train: int = 400, val: int = 60) -> None:
    """Write scenes and their COCO annotations.

    The splits share neither digits nor parts of the photographs. `root` is only created if
    complete.

    Args:
        root: Folder to create.
        train: Number of training scenes.
        val: Number of validation scenes.
    """
    with _write_atomically(root) as partial:
        (partial / "annotations").mkdir(parents=True)
        for split, scenes in split_scenes(train, val).items():
            _write_images(partial / split, scenes)
            annotations = partial / "annotations" / f"instances_{split}.json"
            annotations.write_text(json.dumps(to_coco(scenes)))


def write_digits_scenes_ade20k(root: Path, train: int = 800, val: int = 100) -> None:
    """Write scenes and their label maps in ADE20K's layout.

    As in :func:`write_digits_scenes`, only the shape tells the digits apart: their colors are
    random. They are four digits of different shapes, larger than there, so that a segmentor learns
    them in minutes on a CPU.

    Args:
        root: Folder to create.
        train: Number of training scenes.
        val: Number of validation scenes.
    """
    names = {"train": "training", "val": "validation"}
    with _write_atomically(root) as partial:
        scenes_of = split_scenes(train, val, SEGMENTED_DIGITS, SEGMENTED_LAYOUT)
        for split, scenes in scenes_of.items():
            _write_images(partial / "images" / names[split], scenes)
            folder = partial / "annotations" / names[split]
            folder.mkdir(parents=True)
            for file_name, scene in scenes:
                path = (folder / file_name).with_suffix(".png")
                Image.fromarray(scene.label_map(SEGMENTED_DIGITS)).save(path)


def split_scenes(
    train: int, val: int, labels: Sequence[int] = range(10), layout: Layout | None = None
) -> dict[str, list[tuple[str, Scene]]]:
    """Return the scenes of each split, with the names of their images."""
    digits, photos = load_digits(), load_sample_images().images
    chosen = _split(digits.target)
    views = {
        "train": [photo[:, :_PHOTO_SPLIT] for photo in photos],
        "val": [photo[:, _PHOTO_SPLIT:] for photo in photos],
    }
    splits = {}
    for seed, (split, count) in enumerate({"train": train, "val": val}.items()):
        i = chosen[split][np.isin(digits.target[chosen[split]], labels)]
        material = Material(digits.images[i], digits.target[i], i, views[split])
        scenes = enumerate(make_scenes(material, count, seed, layout), start=1)
        splits[split] = [(f"{number:06d}.jpg", scene) for number, scene in scenes]
    return splits


def _write_images(folder: Path, scenes: list[tuple[str, Scene]]) -> None:
    folder.mkdir(parents=True)
    for file_name, scene in scenes:
        Image.fromarray(scene.image).save(folder / file_name, quality=95)


def _split(labels: np.ndarray) -> dict[str, np.ndarray]:
    train, val = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    return {"train": train, "val": val}


@contextmanager
def _write_atomically(root: Path) -> Iterator[Path]:
    """Yield a folder to write to, which is renamed to `root` when everything is written."""
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    partial.rename(root)


def main(argv: list[str] | None = None, program: str = "flash-internimage demo-data") -> int:
    """Write the dataset named on a command line, unless it exists.

    Args:
        argv: Arguments; None for those of the process.
        program: Name of the program in usage messages.

    Returns:
        The exit code.
    """
    log_to_terminal()
    writers: dict[str, Callable[[Path], None]] = {
        "digits": write_digits,
        "digits-scenes": write_digits_scenes,
        "digits-scenes-ade20k": write_digits_scenes_ade20k,
    }
    parser = argparse.ArgumentParser(
        program, description="Write a small dataset of real images, which are in scikit-learn."
    )
    parser.add_argument("name", nargs="?", choices=writers, default="digits")
    parser.add_argument("--root", type=Path, help="folder to create (default: data/NAME)")
    arguments = parser.parse_args(argv)
    root = arguments.root or Path("data") / arguments.name
    if root.exists():
        if all((root / path).exists() for path in _CONTENTS[arguments.name]):
            _logger.info("%s already exists and is kept", root)
            return 0
        _logger.error("--root must be a new folder, or one of %s, got %s", arguments.name, root)
        return 2
    try:
        writers[arguments.name](root)
    except OSError as error:
        _logger.error("%s cannot be written: %s", root, error.strerror or error)
        return 2
    _logger.info("wrote %s to %s", arguments.name, root)
    return 0
