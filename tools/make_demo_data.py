"""Writes scikit-learn's handwritten digits as an ImageFolder: real images that need no download.

    python -m tools.make_demo_data [--root data/digits]

root/{train,val}/{0..9}/NNNN.png, 1,437 and 360 images, a fixed stratified split.
"""

import argparse
import logging
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

_logger = logging.getLogger(__name__)


def write_digits(root: Path, size: int = 32) -> None:
    """Writes the data set, scaled from 8 x 8 to `size` pixels; complete or not at all."""
    digits = load_digits()
    indices = np.arange(len(digits.target))
    train, val = train_test_split(indices, test_size=0.2, random_state=0, stratify=digits.target)
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split, chosen in (("train", train), ("val", val)):
        for i in chosen:
            folder = partial / split / str(digits.target[i])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.rint(digits.images[i] * (255 / 16)).astype(np.uint8)
            image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
            image.save(folder / f"{i:04d}.png")
    partial.rename(root)


def main() -> None:
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(description="Write the digits as an ImageFolder.")
    parser.add_argument("--root", type=Path, default=Path("data/digits"))
    root = parser.parse_args().root
    if root.exists():
        _logger.info("%s exists already", root)
        return
    write_digits(root)
    _logger.info("wrote 1,797 images to %s", root)


if __name__ == "__main__":
    main()
