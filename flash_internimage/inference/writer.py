"""Write predictions to a folder."""

import csv
import heapq
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..checkpoints.zoo import Task
from ..files import is_partial, write_atomically, write_text
from ..predictions import LabelMap, Result
from .pictures import draw
from .records import to_record
from .sources import LABEL_MAPS, PICTURES, VIDEOS, Source

_PARTS = "predictions.process*.jsonl"


class ResultWriter:
    """Write the pictures and predictions of one process to a folder.

    Pictures and label maps are written one by one. All else is added to a file of the process, one
    line of JSON per source, which :func:`merge` combines with those of the other processes.

    Args:
        folder: Existing folder.
        rank: Number of this process.
        pictures: Whether to draw pictures.
    """

    def __init__(self, folder: Path, rank: int = 0, pictures: bool = True) -> None:
        self._folder, self._rank, self._pictures = folder, rank, pictures
        self.written = self.skipped = 0

    def __enter__(self) -> "ResultWriter":
        part = self._folder / _PARTS.replace("*", str(self._rank))
        self._part = open(part, "w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._part.close()

    def add(self, index: int, source: Source, image: np.ndarray, result: Result) -> None:
        """Write the prediction of an image.

        Args:
            index: Position of the image among all sources.
            source: The image.
            image: (H, W, 3) uint8 array in RGB.
            result: Prediction for this image.

        Raises:
            OSError: If a file cannot be written.
        """
        line: dict[str, Any] = {"height": image.shape[0], "width": image.shape[1]}
        if isinstance(result, LabelMap):
            self._save_image(LABEL_MAPS, source, _to_image(result), ".png")
        else:
            line |= to_record(result)
        if self._pictures:
            self._save_image(PICTURES, source, Image.fromarray(draw(image, result)), ".jpg")
        self._append(index, source, line)
        self.written += 1

    def add_video(self, index: int, source: Source, frames: int) -> None:
        """Note a video, which was written to :meth:`path`."""
        self._append(index, source, {"frames": frames})
        self.written += 1

    def skip(self, index: int, source: Source, reason: object) -> None:
        """Note that a source could not be predicted."""
        self._append(index, source, {"skipped": " ".join(str(reason).split())})
        self.skipped += 1

    def path(self, kind: str, source: Source, suffix: str) -> Path:
        """Return the path of a result of a source, in an existing folder."""
        path = self._folder / kind / f"{source.name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _save_image(self, kind: str, source: Source, image: Image.Image, suffix: str) -> None:
        options = {"quality": 90} if suffix == ".jpg" else {}
        format_name = "JPEG" if suffix == ".jpg" else "PNG"
        path = self.path(kind, source, suffix)
        write_atomically(path, lambda file: image.save(file, format_name, **options))

    def _append(self, index: int, source: Source, line: dict[str, Any]) -> None:
        line = {"index": index, "file_name": source.file_name, **line}
        self._part.write(json.dumps(line, allow_nan=False) + "\n")
        self._part.flush()


def _to_image(result: LabelMap) -> Image.Image:
    labels = result.labels
    return Image.fromarray(labels if labels.dtype == np.uint8 else labels.astype(np.uint16))


def remove_parts(folder: Path) -> None:
    """Remove the files of the processes, and partial results of an earlier run that was killed."""
    for part in folder.glob(_PARTS):
        part.unlink()
    for kind in (PICTURES, LABEL_MAPS, VIDEOS):
        for parent, _, names in os.walk(folder / kind):
            for name in names:
                if is_partial(name):
                    os.unlink(os.path.join(parent, name))


def merge(folder: Path, task: Task, classes: Sequence[str]) -> None:
    """Write the predictions of all processes in the formats of the task.

    - Classification: `predictions.csv`, one row per image and class.
    - Detection: `predictions.json` in COCO's format of results, and `images.json`, a COCO dataset
      without annotations that contains the images and categories.
    - Segmentation: `classes.txt`, the names of the values of the label maps.
    - `skipped.csv`: sources that could not be predicted, and the reasons; only if there are any.

    Raises:
        OSError: If a file cannot be written.
    """
    parts = sorted(folder.glob(_PARTS))

    def lines(key: str) -> Iterator[dict[str, Any]]:
        read = (_read_lines(part) for part in parts)
        return (line for line in heapq.merge(*read, key=lambda line: line["index"]) if key in line)

    if task == "classification":
        header = ("file_name", "rank", "label", "name", "score")
        _write_csv(folder / "predictions.csv", header, _class_rows(lines("classes")))
    elif task == "detection":
        _write_json(folder / "predictions.json", _coco_results(lines("objects")))
        images = [_coco_image(line) for line in lines("objects")]
        categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
        contents = {"info": {}, "images": images, "annotations": [], "categories": categories}
        write_text(folder / "images.json", json.dumps(contents))
    else:
        text = "".join(f"{name}\n" for name in classes)
        write_text(folder / "classes.txt", text)
    skipped = [(line["file_name"], line["skipped"]) for line in lines("skipped")]
    if skipped:
        _write_csv(folder / "skipped.csv", ("file_name", "reason"), iter(skipped))
    else:
        (folder / "skipped.csv").unlink(missing_ok=True)


def _read_lines(part: Path) -> Iterator[dict[str, Any]]:
    with open(part, encoding="utf-8") as file:
        # The last line of a process that is still writing may be incomplete.
        yield from (json.loads(line) for line in file if line.endswith("\n"))


def _class_rows(lines: Iterator[dict[str, Any]]) -> Iterator[tuple]:
    for line in lines:
        for rank, found in enumerate(line["classes"], 1):
            yield line["file_name"], rank, found["label"], found["name"], found["score"]


def _coco_image(line: dict[str, Any]) -> dict[str, Any]:
    names = ("file_name", "height", "width")
    return {"id": line["index"] + 1} | {name: line[name] for name in names}


def _coco_results(lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for line in lines:
        for found in line["objects"]:
            rest = {key: found[key] for key in ("bbox", "score", "segmentation") if key in found}
            image = {"image_id": line["index"] + 1, "file_name": line["file_name"]}
            yield image | {"category_id": found["label"] + 1} | rest


def _write_csv(path: Path, header: Sequence[str], rows: Iterator[tuple]) -> None:
    def write(file: BinaryIO) -> None:
        # File names need not be UTF-8.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        text.flush()
        text.detach()

    write_atomically(path, write)


def _write_json(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write a list of dicts, one per line, without holding all of them in memory."""

    def write(file: BinaryIO) -> None:
        file.write(b"[")
        for i, row in enumerate(rows):
            file.write((",\n" if i else "\n").encode() + json.dumps(row).encode())
        file.write(b"\n]\n")

    write_atomically(path, write)
