"""Read datasets in the format of PASCAL VOC."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from defusedxml import DefusedXmlException, ElementTree

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
    rotated_rectangle,
)
from .voc_files import apply_image_sets, find_annotations, find_devkit, find_stems
from .voc_label_maps import read_label_map_names, read_voc_label_maps

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
    root = find_devkit(root)
    dataset = Dataset()
    if label_maps:
        read_voc_label_maps(root, dataset, classes)
        return dataset
    names, _ = read_label_map_names(root)
    dataset.classes = [name for name in names if name != "background"] or None
    for split, images, annotations in _folders(root):
        for name, image, annotation in _pairs(images, annotations, dataset.losses):
            item = _read_annotation(name, image, annotation, difficult, dataset.losses)
            if item is not None:
                dataset.splits.setdefault(split, []).append(item)
    if (root / "ImageSets").is_dir():
        apply_image_sets(root, "Main", dataset)
    if (root / "SegmentationObject").is_dir():
        masks = len(find_images(root / "SegmentationObject"))
        dataset.losses.add("instance masks in SegmentationObject left out", root, masks)
    return dataset


def _folders(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield the name of each split and the folders of its images and annotations."""
    annotations = find_annotations(root)
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
    files = find_stems(images, losses)
    xml = {
        p.relative_to(annotations).with_suffix("").as_posix() for p in annotations.rglob("*.xml")
    }
    for stem in sorted(xml - files.keys()):
        losses.add("annotation files without an image", annotations / f"{stem}.xml")
    for stem in sorted(files.keys() - xml):
        losses.add("images without an annotation file left out", images / files[stem])
    for stem in sorted(xml & files.keys()):
        yield files[stem], images / files[stem], annotations / f"{stem}.xml"


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
