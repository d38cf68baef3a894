"""Read datasets in the format of PASCAL VOC."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from defusedxml import DefusedXmlException, ElementTree
from PIL import Image

from ...images import UnreadableImage, read_label_map
from ..text_files import read_text
from .annotations import (
    AnnotatedImage,
    Box,
    Dataset,
    Losses,
    Shape,
    check_label,
    check_numbers,
    find_images,
    image_size,
    possible_sizes,
    rotated_rectangle,
)

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
_SPLITS = ("train", "val", "test")
_MALFORMED = "malformed annotation files left out, with their images"
_ALIASES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


def read_voc(
    root: Path,
    difficult: str = "crowd",
    label_maps: bool = False,
    classes: list[str] | None = None,
) -> Dataset:
    """Read a dataset in the format of PASCAL VOC.

    The root has the folders JPEGImages, Annotations or SegmentationClass, and ImageSets; or a
    folder for each split, with an XML file beside each image; or such files without splits.

    Args:
        root: Folder of the dataset, such as VOCdevkit/VOC2012.
        difficult: What becomes of difficult objects: `crowd`, `keep` or `drop`.
        label_maps: Whether to read the label maps in SegmentationClass instead of the objects.
        classes: Names of the values in the label maps; None for those of VOC.

    Raises:
        FileNotFoundError: If there are no annotations.
        ValueError: If the label maps have colors that `labelmap.txt` does not list.
    """
    root = _devkit(root)
    dataset = Dataset()
    if label_maps:
        _read_label_maps(root, dataset, classes)
        return dataset
    names, _ = _label_map_names(root)
    dataset.classes = [name for name in names if name != "background"] or None
    for split, images, annotations in _folders(root):
        for name, image, annotation in _pairs(images, annotations, dataset.losses):
            item = _read_annotation(name, image, annotation, difficult, dataset.losses)
            if item is not None:
                dataset.splits.setdefault(split, []).append(item)
    if (root / "ImageSets").is_dir():
        _apply_image_sets(root, "Main", dataset)
    if (root / "SegmentationObject").is_dir():
        masks = len(find_images(root / "SegmentationObject"))
        dataset.losses.add("instance masks in SegmentationObject left out", root, masks)
    return dataset


def _devkit(root: Path) -> Path:
    """Return the folder that contains Annotations, which may be one or two levels below."""
    for pattern in ("", "*", "*/*"):
        for folder in [root] if not pattern else sorted(root.glob(pattern)):
            if _annotations(folder) or (folder / "SegmentationClass").is_dir():
                return folder
    return root


def _annotations(root: Path) -> Path | None:
    """Return the folder of the annotations; some datasets have other names than VOC."""
    if (root / "Annotations").is_dir():
        return root / "Annotations"
    folder = root / "annotations"
    return folder if any(folder.rglob("*.xml")) else None


def _folders(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield the name of each split and the folders of its images and annotations."""
    annotations = _annotations(root)
    if annotations is not None:
        images = (root / name for name in ("JPEGImages", "images"))
        yield "", next((folder for folder in images if folder.is_dir()), root), annotations
        return
    splits = [path for path in sorted(root.iterdir()) if path.is_dir() and any(path.glob("*.xml"))]
    for path in splits:
        yield _ALIASES.get(path.name, path.name), path, path
    if not splits:
        if not any(root.glob("*.xml")):
            raise FileNotFoundError(
                f"{root} must contain the folder Annotations or XML files beside the images"
            )
        yield "", root, root


def _pairs(images: Path, annotations: Path, losses: Losses) -> Iterator[tuple[str, Path, Path]]:
    """Yield name, image and annotation file; files without their counterpart are counted."""
    files = _stems(images, losses)
    xml = {
        p.relative_to(annotations).with_suffix("").as_posix() for p in annotations.rglob("*.xml")
    }
    for stem in sorted(xml - files.keys()):
        losses.add("annotation files without an image", annotations / f"{stem}.xml")
    for stem in sorted(files.keys() - xml):
        losses.add("images without an annotation file left out", images / files[stem])
    for stem in sorted(xml & files.keys()):
        yield files[stem], images / files[stem], annotations / f"{stem}.xml"


def _stems(folder: Path, losses: Losses) -> dict[str, str]:
    """Return the relative paths of the images in a folder by their path without suffix."""
    stems: dict[str, str] = {}
    for name in find_images(folder):
        if stems.setdefault(name.rpartition(".")[0], name) != name:
            losses.add("images that differ only in their suffix left out", folder / name)
    return stems


def _read_annotation(
    name: str, image: Path, path: Path, difficult: str, losses: Losses
) -> AnnotatedImage | None:
    try:
        tree = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, DefusedXmlException, LookupError, ValueError) as error:
        losses.add(_MALFORMED, f"{path}: {error}")
        return None
    if tree.tag != "annotation":
        losses.add(_MALFORMED, f"{path}: the root must be annotation, got {tree.tag:.50}")
        return None
    size = image_size(image, _declared_size(tree), str(path), losses)
    if size is None:
        return None
    item = AnnotatedImage(image, name, size, where=str(path))
    for number, element in enumerate(tree.iter("object"), start=1):
        where = f"{path}, object {number}"
        try:
            shape = _read_object(element, where, losses)
        except (ValueError, TypeError) as error:
            losses.add("malformed objects left out", f"{where}: {error}")
            continue
        if _flag(element, "difficult") and difficult != "keep":
            if difficult == "drop":
                losses.add("difficult objects left out", where)
                continue
            losses.add("difficult objects made crowds (iscrowd=1)", where)
            shape.crowd = True
        item.shapes.append(shape)
    return item


def _declared_size(tree: Element) -> tuple[int, int] | None:
    try:
        height, width = (int(tree.findtext(f"size/{key}") or "") for key in ("height", "width"))
    except ValueError:
        return None
    return height, width


def _flag(element: Element, name: str) -> bool:
    return (element.findtext(name) or "0").strip().lower() in ("1", "true")


def _read_object(element: Element, where: str, losses: Losses) -> Shape:
    """Read an object; pixels are counted from 1 and the last one is part of the box."""
    label = check_label(element.findtext("name"))
    for part in element.findall("part"):
        losses.add("parts of objects left out", f"{where}, part {part.findtext('name')}")
    polygons = []
    for polygon in element.findall("polygon"):
        numbers = check_numbers(coordinate.text for coordinate in polygon)
        if len(numbers) < 6 or len(numbers) % 2:
            raise ValueError(f"a polygon must have at least 3 points, got {len(numbers)} numbers")
        polygons.append([number - 1 for number in numbers])
    rotated = element.find("robndbox")
    if rotated is not None:
        losses.add("rotated boxes turned into polygons", where)
        cx, cy, width, height, angle = _numbers(rotated, "cx", "cy", "w", "h", "angle")
        degrees = float(np.degrees(angle))
        # The corner from which the rectangle is rotated, itself rotated around the center.
        x, y = rotated_rectangle(cx - 1, cy - 1, -width / 2, -height / 2, degrees)[4:6]
        polygons.append(rotated_rectangle(x, y, width, height, degrees))
    box: Box | None = None
    bounds = element.find("bndbox")
    if bounds is not None:
        x1, y1, x2, y2 = _numbers(bounds, "xmin", "ymin", "xmax", "ymax")
        box = x1 - 1, y1 - 1, x2, y2
    elif not polygons:
        raise ValueError("bndbox must be present")
    return Shape(label, box if bounds is not None else None, polygons or None)


def _numbers(element: Element, *names: str) -> list[float]:
    return check_numbers(element.findtext(name) for name in names)


def _apply_image_sets(root: Path, kind: str, dataset: Dataset) -> None:
    """Distribute the images over the splits listed in ImageSets, and count the others."""
    folder = root / "ImageSets" / kind
    lists = {name: folder / f"{name}.txt" for name in _SPLITS}
    if not lists["train"].is_file() and (folder / "trainval.txt").is_file():
        lists["train"] = folder / "trainval.txt"
    if not any(path.is_file() for path in lists.values()):
        return
    images = {
        Path(item.name).with_suffix("").as_posix(): item for item in dataset.splits.pop("", [])
    }
    used = set()
    for split, path in lists.items():
        if not path.is_file():
            continue
        names = [
            words[0] for line in read_text(path, "replace").splitlines() if (words := line.split())
        ]
        if not names:
            dataset.losses.add("splits without images", path)
        for name in names:
            if name in images:
                dataset.splits.setdefault(split, []).append(images[name])
                used.add(name)
            else:
                dataset.losses.add(
                    "images of a split that are missing or left out", f"{path}: {name}"
                )
    for name in images.keys() - used:
        dataset.losses.add("images in no split left out", images[name].source)


def _label_map_names(root: Path) -> tuple[list[str], dict[tuple[int, ...], int]]:
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
        color = rest.partition(":")[0]
        try:
            colors[tuple(int(value) for value in color.split(","))] = len(names)
        except ValueError as error:
            raise ValueError(
                f"{path} must have lines such as cat:64,0,0::, got {line!r}"
            ) from error
        names.append(name)
    return names, colors


def _read_label_maps(root: Path, dataset: Dataset, classes: list[str] | None) -> None:
    """Read the label maps in SegmentationClass: palette indices or the colors of labelmap.txt."""
    folder = root / "SegmentationClass"
    if not folder.is_dir():
        raise FileNotFoundError(f"{root} must contain the folder SegmentationClass")
    names, colors = _label_map_names(root)
    if names and classes:
        raise ValueError(
            f"--classes must not be used with {root / 'labelmap.txt'}, which names the classes"
        )
    dataset.classes = names or classes or list(CLASSES)
    colors = colors or {tuple(color): i for i, color in enumerate(_palette(len(CLASSES)))}
    maps = _stems(folder, dataset.losses)
    images_folder = root / "JPEGImages"
    images = _stems(images_folder, dataset.losses)
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
        _apply_image_sets(root, "Segmentation", dataset)


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
