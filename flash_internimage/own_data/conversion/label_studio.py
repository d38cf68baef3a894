"""Read exports of Label Studio in its JSON format."""

from pathlib import Path
from typing import Any

import numpy as np

from ..text_files import read_json
from .annotations import (
    AnnotatedImage,
    Dataset,
    Losses,
    Shape,
    check_label,
    check_numbers,
    declared_size,
    ellipse,
    find_images,
    flat,
    image_size,
    rotated_rectangle,
)
from .studio_images import StudioImages, image_name

_REGIONS = ("rectanglelabels", "polygonlabels", "brushlabels", "ellipselabels")


def read_label_studio(source: Path, folder: Path | None = None) -> Dataset:
    """Read an export of Label Studio (JSON, not JSON-MIN) and the images that it refers to.

    Nothing is downloaded: images are found by their name in a local folder.

    Args:
        source: JSON file, or the folder that contains a single one.
        folder: Folder of the images; None for the folder of the file.

    Raises:
        FileNotFoundError: If there is no JSON file, or none of its images is found.
        ValueError: If it is not an export of Label Studio.
    """
    path = _find_export(source)
    tasks = _read_tasks(path)
    folder = folder or path.parent
    found = find_images(folder).values()
    files = StudioImages(found)
    dataset = Dataset()
    losses = dataset.losses
    used = set()
    for task in tasks:
        where = f"{path}, task {task.get('id')}"
        images = files.find(task)
        if len(images) != 1:
            kind = "is in several folders" if images else "is not found"
            losses.add(f"tasks whose image {kind} left out", f"{where}: {image_name(task)}")
            continue
        image = images[0]
        results = _results(task, where, losses)
        if results is None:
            continue
        if image in used:
            losses.add("further tasks of the same image left out", where)
            continue
        used.add(image)
        item = _read_task(image, results, where, losses)
        if item is not None:
            dataset.splits.setdefault("", []).append(item)
    if not used:
        raise FileNotFoundError(
            f"--images must be the folder of the images, found none of {len(tasks)} tasks with an "
            f"annotation in {folder}, such as {image_name(tasks[0])}; " + "; ".join(losses.lines())
        )
    for file in found:
        if file not in used:
            losses.add("images without an annotation left out", file)
    return dataset


def _find_export(source: Path) -> Path:
    if source.is_file():
        return source
    found = sorted(source.glob("*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5])
        raise FileNotFoundError(
            f"SOURCE must be a JSON file or a folder with a single one, got {len(found)} in "
            f"{source}{': ' if names else ''}{names}"
        )
    return found[0]


def _read_tasks(path: Path) -> list[dict[str, Any]]:
    tasks = read_json(path)
    if not (
        isinstance(tasks, list)
        and tasks
        and all(
            isinstance(t, dict)
            and isinstance(t.get("data"), dict)
            and isinstance(t.get("annotations", ()), list | None)
            for t in tasks
        )
    ):
        raise ValueError(
            f"{path} must be an export of Label Studio as JSON (not JSON-MIN): a list of tasks "
            "with data and annotations"
        )
    return tasks


def _results(task: dict[str, Any], where: str, losses: Losses) -> list[Any] | None:
    """Return the regions of the first annotation of a task that was not cancelled."""
    if isinstance(predictions := task.get("predictions"), list):
        losses.add("predictions left out", where, len(predictions))
    annotations = [a for a in task["annotations"] or [] if isinstance(a, dict)]
    kept = [a for a in annotations if not a.get("was_cancelled")]
    losses.add("cancelled annotations left out", where, len(annotations) - len(kept))
    if not kept:
        losses.add("tasks without an annotation left out", where)
        return None
    losses.add("further annotations of the same image left out", where, len(kept) - 1)
    results = kept[0].get("result")
    return results if isinstance(results, list) else []


def _read_task(
    image: Path, results: list[Any], where: str, losses: Losses
) -> AnnotatedImage | None:
    regions = [r for r in results if isinstance(r, dict)]
    sizes = {declared_size(r.get("original_height"), r.get("original_width")) for r in regions}
    sizes.discard(None)
    size = image_size(image, sizes.pop() if len(sizes) == 1 else None, where, losses)
    if size is None:
        return None
    if any(region.get("image_rotation") for region in regions):
        losses.add("tasks with an image rotated in Label Studio left out", where)
        return None
    item = AnnotatedImage(image, image.name, size, where=where)
    for region in regions:
        place = f"{where}, region {region.get('id')}"
        try:
            shape = _read_region(region, size, place, losses)
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            losses.add("malformed regions left out", f"{place}: {error}")
            continue
        if shape is not None:
            item.shapes.append(shape)
    return item


def _read_region(
    region: dict[str, Any], size: tuple[int, int], where: str, losses: Losses
) -> Shape | None:
    """Return the shape of a region; coordinates are percent of the image."""
    kind = region.get("type")
    if kind not in _REGIONS:
        losses.add(f"results of type {kind} left out", where)
        return None
    value = region["value"]
    labels = value.get(kind) or []
    if not isinstance(labels, list):
        raise ValueError(f"{kind} must be a list, got {labels!r:.50}")
    if not labels:
        losses.add("regions without a label left out", where)
        return None
    if len(labels) > 1:
        losses.add("further labels of a region left out", where, len(labels) - 1)
    shape = Shape(check_label(labels[0]))
    height, width = size
    if kind == "polygonlabels":
        points = flat(value["points"])
        if len(points) < 6:
            raise ValueError(f"a polygon must have at least 3 points, got {len(points) // 2}")
        shape.polygons = [[p * (height if i % 2 else width) / 100 for i, p in enumerate(points)]]
    elif kind == "brushlabels":
        annotated = declared_size(region.get("original_height"), region.get("original_width"))
        if annotated != size:
            raise ValueError(f"a mask must have the size {size}, got {annotated}")
        shape.mask = _decode_brush(value["rle"], size)
    elif kind == "ellipselabels":
        x, y, rx, ry = check_numbers(value[k] for k in ("x", "y", "radiusX", "radiusY"))
        losses.add("ellipses turned into polygons", where)
        (angle,) = check_numbers([value.get("rotation") or 0])
        scale_x, scale_y = width / 100, height / 100
        shape.polygons = [ellipse(x * scale_x, y * scale_y, rx * scale_x, ry * scale_y, angle)]
    else:
        x, y, w, h = check_numbers(value[k] for k in ("x", "y", "width", "height"))
        x, y, w, h = x * width / 100, y * height / 100, w * width / 100, h * height / 100
        (angle,) = check_numbers([value.get("rotation") or 0])
        if angle:
            losses.add("rotated boxes turned into polygons", where)
            shape.polygons = [rotated_rectangle(x, y, w, h, angle)]
        else:
            shape.box = x, y, x + w, y + h
    return shape


def _decode_brush(rle: list[int], size: tuple[int, int]) -> np.ndarray:
    """Decode the mask of a brush in an image of a (height, width), (H, W) bool.

    It is a stream of bits: the number of values (32 bits), their size minus 1 (5) and four sizes of
    counts, minus 1 (4 each). Then follow runs: whether a value is repeated (1), which size of count
    is used (2), the count minus 1, and one value or as many as the count. The values are the RGBA
    channels of the pixels; those that are not transparent are the mask.

    Raises:
        ValueError: If the stream ends early or has another number of pixels.
    """
    bits = np.unpackbits(np.asarray(rle, np.uint8))
    weights = 1 << np.arange(32)[::-1]
    position = 0

    def read(size: int) -> int:
        nonlocal position
        chunk = bits[position : position + size]
        if len(chunk) < size:
            raise ValueError("the run lengths of a brush end early")
        position += size
        return int(chunk @ weights[32 - size :])

    total, value_size = read(32), read(5) + 1
    height, width = size
    if total != 4 * height * width or value_size != 8:
        raise ValueError(
            f"the mask of a brush must have {4 * height * width} values of 8 bits, got {total} of "
            f"{value_size}"
        )
    count_sizes = [read(4) + 1 for _ in range(4)]
    values = np.zeros(total, np.uint8)
    filled = 0
    while filled < total:
        repeats = read(1)
        count = read(count_sizes[read(2)]) + 1
        end = min(filled + count, total)
        if repeats:
            values[filled:end] = read(8)
        else:
            values[filled:end] = [read(8) for _ in range(filled, end)]
        filled = end
    return values.reshape(height, width, 4)[..., 3] > 0
