"""Read the label maps of datasets in the format of PASCAL VOC."""

from pathlib import Path

import numpy as np
from PIL import Image

from ...images import UnreadableImage, read_label_map
from ..text_files import read_text
from .annotations import AnnotatedImage, Dataset, Losses, possible_sizes
from .voc_files import apply_image_sets, find_stems

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip


def read_voc_label_maps(root: Path, dataset: Dataset, classes: list[str] | None) -> None:
    """Read the label maps in SegmentationClass: palette indices or the colors of labelmap.txt."""
    folder = root / "SegmentationClass"
    if not folder.is_dir():
        raise FileNotFoundError(f"{root} must contain the folder SegmentationClass")
    names, colors = read_label_map_names(root)
    if names and classes:
        raise ValueError(
            f"--classes must not be used with {root / 'labelmap.txt'}, which names the classes"
        )
    dataset.classes = names or classes or list(CLASSES)
    colors = colors or {tuple(color): i for i, color in enumerate(_palette(len(CLASSES)))}
    maps = find_stems(folder, dataset.losses)
    images_folder = root / "JPEGImages"
    images = find_stems(images_folder, dataset.losses)
    for stem in sorted(images.keys() - maps.keys()):
        dataset.losses.add("images without a label map left out", images_folder / images[stem])
    for stem, name in sorted(maps.items()):
        path = folder / name
        if stem not in images:
            dataset.losses.add("label maps without an image", path)
            continue
        image = images_folder / images[stem]
        try:
            labels = _indices(read_label_map(path), colors, path, dataset.losses)
        except UnreadableImage as error:
            dataset.losses.add("unreadable label maps left out", error)
            continue
        sizes = possible_sizes(image, dataset.losses)
        if sizes is None:
            continue
        if labels.shape not in sizes:
            dataset.losses.add("label maps of another size than their image left out", path)
            continue
        item = AnnotatedImage(image, images[stem], labels.shape, label_map=labels, where=str(path))
        dataset.splits.setdefault("", []).append(item)
    if (root / "ImageSets").is_dir():
        apply_image_sets(root, "Segmentation", dataset)


def read_label_map_names(root: Path) -> tuple[list[str], dict[tuple[int, ...], int]]:
    """Return the names and colors in labelmap.txt, as CVAT writes it: `name:r,g,b:parts:actions`.

    Raises:
        ValueError: If the file is malformed.
    """
    path = root / "labelmap.txt"
    names: list[str] = []
    colors: dict[tuple[int, ...], int] = {}
    text = read_text(path, "replace") if path.is_file() else ""
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        values = rest.partition(":")[0].split(",")
        color = tuple(int(value) for value in values if value.strip().isdecimal())
        if len(color) != 3 or len(values) != 3 or max(color) > 255:
            raise ValueError(f"{path} must have lines such as cat:64,0,0::, got {line!r}")
        if color in colors:
            raise ValueError(f"{path} must have a color for each class, got {line!r} again")
        colors[color] = len(names)
        names.append(name)
    return names, colors


def _indices(
    image: Image.Image, colors: dict[tuple[int, ...], int], path: Path, losses: Losses
) -> np.ndarray:
    """Return the class indices of a label map, (H, W) uint8; unknown colors are ignored pixels."""
    values = np.asarray(image)
    if values.ndim == 2:
        unknown = (values < 0) | (values > 255)
        losses.add("pixels of unknown classes made ignored pixels", path, int(unknown.sum()))
        return np.where(unknown, 255, values).astype(np.uint8)
    rgb = np.asarray(image.convert("RGB"), np.int64)
    codes = rgb @ np.array([65536, 256, 1])
    labels = np.full(codes.shape, 255, np.uint8)
    for (red, green, blue), index in colors.items():
        labels[codes == red * 65536 + green * 256 + blue] = index
    border = 224 * 65536 + 224 * 256 + 192
    unknown = (labels == 255) & (codes != border)
    losses.add("pixels of unknown colors made ignored pixels", path, int(unknown.sum()))
    return labels


def _palette(count: int) -> list[list[int]]:
    """Return VOC's colors: the bits of the class index, spread over red, green and blue."""
    colors = []
    for index in range(count):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        colors.append(color)
    return colors
