"""Hand-written annotation files in the formats of annotation tools."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from flash_internimage.own_data.conversion.convert import Options, Result, convert

WIDTH, HEIGHT = 40, 30


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Path:
    """Write an image of random pixels; `size` is (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_json(path: Path, content: object) -> Path:
    return write_text(path, json.dumps(content))


def to_coco(kind: str, source: Path, target: Path, **options) -> tuple[dict[str, dict], Result]:
    """Convert a dataset, and return the COCO file of each split."""
    result = convert(kind, source, target, Options(**options))
    files = {
        path.stem.removeprefix("instances_"): json.loads(path.read_text())
        for path in (target / "annotations").glob("*.json")
    }
    return files, result


def to_label_maps(kind: str, source: Path, target: Path, **options) -> tuple[dict, Result]:
    """Convert a dataset, and return the label maps by their path without suffix."""
    result = convert(kind, source, target, Options(label_maps=True, **options))
    folder = target / "annotations"
    maps = {
        path.relative_to(folder).with_suffix("").as_posix(): np.asarray(Image.open(path))
        for path in sorted(folder.rglob("*.png"))
    }
    return maps, result


def write_coco(path: Path, images: list[str], annotations: list[dict], classes=("a", "b")) -> Path:
    """Write a COCO file whose images have the default size; ids count from 1."""
    content = {
        "images": [
            {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for i, name in enumerate(images, start=1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
        "annotations": [
            {"id": i, "iscrowd": 0, **annotation} for i, annotation in enumerate(annotations, 1)
        ],
    }
    return write_json(path, content)


def annotation(image: int, category: int, x: float, y: float, w: float, h: float) -> dict:
    """Return an annotation whose mask is its box."""
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, w, h],
        "area": w * h,
        "segmentation": [corners],
    }
