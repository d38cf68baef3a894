"""Validation of COCO annotation files."""

import json
import math
import posixpath
import reprlib
from collections.abc import Iterator
from typing import Any, TypeGuard

import numpy as np

# faster-coco-eval stores annotation ids as int64 and all other ids as float64.
_ANNOTATION_ID_BITS, _ID_BITS = 63, 53
_LARGEST_NUMBER = 1e9
_NOTHING = object()
_MALFORMED = np.array([-1])


def parse_json(content: bytes) -> Any:
    """Parse a COCO annotation file.

    Args:
        content: The uncompressed file, JSON in UTF-8.

    Raises:
        ValueError: If the file is not a single JSON document.
    """
    if content.startswith(b"\x1f\x8b"):
        raise ValueError("the file must be uncompressed, got a gzip file")
    try:
        return json.loads(content.decode())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise ValueError(
                f"the file must contain one JSON object, got another at line {error.lineno} (JSON "
                "Lines are not supported)"
            ) from error
        raise


def check_annotations(content: Any, masks: bool, all_masks: bool = False) -> None:
    """Validate the fields of a COCO annotation file that training and evaluation read.

    Args:
        content: The parsed file.
        masks: Whether to check `segmentation` where it is present.
        all_masks: Whether to require a `segmentation` in every annotation.

    Raises:
        ValueError: If a field is missing or malformed. The message names the first such image,
            category or annotation and how many there are.
    """
    for kind, faults in _all_faults(content, masks, all_masks):
        first = next(faults, None)
        if first:
            more = sum(1 for _ in faults)
            raise ValueError(first + (f" ({more + 1} such {kind})" if more else ""))


def find_faults(content: Any, masks: bool, all_masks: bool = False) -> list[str]:
    """Return a line for every malformed image, category or annotation of a COCO annotation file.

    Annotations are only checked if images and categories have no faults.

    Args:
        content: The parsed file.
        masks: Whether to check `segmentation` where it is present.
        all_masks: Whether to require a `segmentation` in every annotation.

    Raises:
        ValueError: If the file has no lists of images, categories and annotations.
    """
    found: list[str] = []
    for kind, faults in _all_faults(content, masks, all_masks):
        if not (kind == "annotations" and found):
            found += faults
    return found


def _all_faults(content: Any, masks: bool, all_masks: bool) -> Iterator[tuple[str, Iterator[str]]]:
    if not isinstance(content, dict):
        raise ValueError(f"the file must contain a JSON object, got {_short(content)}")
    lists = {}
    for key in ("images", "categories", "annotations"):
        # Files for test images, such as COCO's test-dev, have no annotations.
        entries = content.get(key, [] if key == "annotations" else _NOTHING)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            hint = f"; the file has {_short([*content])}" if entries is _NOTHING else ""
            raise ValueError(f"{key} must be a list of objects, got {_short(entries)}{hint}")
        if not entries and key != "annotations":
            raise ValueError(f"{key} must not be empty")
        lists[key] = entries
    images, categories, annotations = lists.values()
    yield "images", _image_faults(images)
    yield "categories", _category_faults(categories)
    yield "annotations", _annotation_faults(annotations, images, categories, masks, all_masks)


def _image_faults(images: list[dict]) -> Iterator[str]:
    seen: set[int] = set()
    files: set[str] = set()
    for image in images:
        name = image.get("file_name", _NOTHING)
        fault = _id_fault(image, seen)
        if not fault and not (isinstance(name, str) and name):
            fault = _fault(image, "file_name", "the name of a file")
        if not fault:
            file = posixpath.normpath(name)
            if file in files:
                # Each entry would treat the objects of the other one as background.
                fault = f"file_name must be unique, got {_plain(name)} again"
            files.add(file)
        for key in ("height", "width"):
            if not fault and not (_is_int(image.get(key)) and 0 < image[key] < 2**31):
                fault = _fault(image, key, "a positive integer")
        if fault:
            yield f"image {_short(image.get('id', _NOTHING))} ({_plain(name)}): {fault}"


def _category_faults(categories: list[dict]) -> Iterator[str]:
    seen: set[int] = set()
    names: set[str] = set()
    for category in categories:
        name = category.get("name", _NOTHING)
        fault = _id_fault(category, seen)
        if not fault and not (isinstance(name, str) and name):
            fault = _fault(category, "name", "a string")
        elif not fault and name in names:
            fault = f"name must be unique, got {_short(name)} again"
        if fault:
            yield f"category {_short(category.get('id', _NOTHING))} ({_plain(name)}): {fault}"
        else:
            names.add(name)


def _annotation_faults(
    annotations: list[dict],
    images: list[dict],
    categories: list[dict],
    masks: bool,
    all_masks: bool,
) -> Iterator[str]:
    seen: set[int] = set()
    images_by_id = {image["id"]: image for image in images}
    category_ids = {category["id"] for category in categories}
    for annotation in annotations:
        image_id = annotation.get("image_id", _NOTHING)
        image = images_by_id.get(image_id) if _is_int(image_id) else None
        # In the evaluation, the id 0 means "not matched".
        fault = _id_fault(annotation, seen, lowest=1, bits=_ANNOTATION_ID_BITS)
        if not fault and image is None:
            fault = _fault(annotation, "image_id", "the id of an image in the file")
        fault = fault or _object_fault(annotation, category_ids)
        checked = all_masks or (masks and annotation.get("segmentation"))
        if image is not None and checked and not fault:
            fault = _segmentation_fault(annotation, image["height"], image["width"])
        if fault:
            name = "" if image is None else f" ({_plain(image['file_name'])})"
            identity = _short(annotation.get("id", _NOTHING))
            yield f"image {_short(image_id)}{name}, annotation {identity}: {fault}"


def _id_fault(entry: dict, seen: set[int], lowest: int = 0, bits: int = _ID_BITS) -> str | None:
    identity = entry.get("id")
    if not (_is_int(identity) and lowest <= identity < 2**bits):
        return _fault(entry, "id", f"a unique integer of at least {lowest} and below 2**{bits}")
    if identity in seen:
        return f"id must be unique, got {identity} again"
    seen.add(identity)
    return None


def _object_fault(annotation: dict, categories: set[int]) -> str | None:
    category, box = annotation.get("category_id"), annotation.get("bbox")
    if not (_is_int(category) and category in categories):
        return _fault(annotation, "category_id", "the id of a category in the file")
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        return _fault(annotation, "bbox", "[x, y, width, height], 4 finite numbers below 1e9")
    if not _is_number(annotation.get("area")):
        return _fault(annotation, "area", "a finite number")
    for key in ("iscrowd", "ignore"):
        flag = annotation.get(key, 0)
        if not (isinstance(flag, int) and flag in (0, 1)):
            return _fault(annotation, key, "0 or 1")
    return None


def _segmentation_fault(annotation: dict, height: int, width: int) -> str | None:
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        if not _is_rle(segmentation, height, width):
            accepted = f"an RLE of size {[height, width]} whose counts add up to {height * width}"
            return _fault(annotation, "segmentation", accepted)
        return None
    # The memory and time that pycocotools needs are proportional to the length of the outline.
    margin = max(height, width)
    if not (
        isinstance(segmentation, list)
        and segmentation
        and all(_is_polygon(polygon, -margin, 2 * margin) for polygon in segmentation)
        # mmdet drops polygons of one or two points, so at least one must have more.
        and any(len(polygon) >= 6 for polygon in segmentation)
    ):
        accepted = (
            "an RLE or a list of polygons, each [x1, y1, x2, y2, x3, y3, ...] with finite numbers "
            "in or near the image"
        )
        return _fault(annotation, "segmentation", accepted)
    return None


def _is_polygon(polygon: Any, lowest: float, highest: float) -> bool:
    return (
        isinstance(polygon, list)
        and len(polygon) >= 2
        and len(polygon) % 2 == 0
        and set(map(type, polygon)) <= {int, float}
        and lowest <= min(polygon)
        and max(polygon) <= highest
        and math.isfinite(sum(polygon))  # NaN may pass the comparisons.
    )


def _is_rle(rle: dict, height: int, width: int) -> bool:
    size, counts = rle.get("size"), rle.get("counts")
    if not (isinstance(size, list) and all(map(_is_int, size)) and size == [height, width]):
        return False
    if isinstance(counts, str):
        lengths = _decode_counts(counts)
        return lengths.min() >= 0 and lengths.sum() == height * width
    return (
        isinstance(counts, list)
        and all(map(_is_int, counts))
        and min(counts, default=-1) >= 0
        and sum(counts) == height * width
    )


def _decode_counts(counts: str) -> np.ndarray:
    """Return the run lengths of a compressed RLE, with a negative one if it is malformed.

    pycocotools decodes without checks: if the last number is truncated, it reads and writes out of
    bounds.
    """
    if not counts.isascii():
        return _MALFORMED
    # Numbers are encoded in groups of 5 bits, lowest first. Bit 5 marks that another group follows;
    # bit 4 of the last group is the sign.
    groups = np.frombuffer(counts.encode(), np.uint8) - np.uint8(48)
    if not groups.size or groups.max() > 63 or groups[-1] & 32:
        return _MALFORMED
    last = np.flatnonzero(groups < 32)
    length = last + 1
    length[1:] -= length[:-1].copy()
    if length.max() > 7:  # 7 groups hold any 32-bit number.
        return _MALFORMED
    first = last - length + 1
    shift = 5 * (np.arange(groups.size) - first.repeat(length))
    numbers = np.add.reduceat((groups & np.int64(31)) << shift, first)
    numbers -= ((groups[last] & np.int64(16)) << 1) << 5 * (length - 1)
    # From the fourth number on, each is the difference from the one two before.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def _is_int(value: Any) -> TypeGuard[int]:
    return type(value) is int  # bool is a subclass of int.


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST_NUMBER < value < _LARGEST_NUMBER


def _fault(entry: dict, key: str, accepted: str) -> str:
    return f"{key} must be {accepted}, got {_short(entry.get(key, _NOTHING))}"


def _short(value: Any) -> str:
    return "nothing" if value is _NOTHING else reprlib.repr(value)


def _plain(name: Any) -> str:
    return name if isinstance(name, str) and name.isprintable() else _short(name)
