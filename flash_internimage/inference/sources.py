"""Find and read the images of a prediction."""

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ImageOps

from ..files import check_no_loops
from ..images import UnreadableImage, image_suffixes, read_image, to_rgb

_logger = logging.getLogger(__name__)

# Folders of the results within the output folder.
PICTURES, LABEL_MAPS, VIDEOS = "pictures", "label_maps", "videos"

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")


@dataclass(frozen=True)
class Source:
    """An image, a video or a camera.

    Attributes:
        kind: 'image', 'video' or 'camera'.
        path: File, or the number of a camera.
        file_name: Path relative to the folder that contains all inputs, with '/' as separator.
        name: Unique name of the results: `file_name` without its suffix where that is unique.
    """

    kind: Literal["image", "video", "camera"]
    path: Path | int
    file_name: str
    name: str


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """Read an image as people see it.

    Photographs are rotated as their EXIF data says, 16-bit grayscale keeps its full range (see
    `flash_internimage.images.to_rgb`), and transparency is dropped.

    Args:
        path: File of any format that Pillow reads.

    Returns:
        Array (H, W, 3) of dtype uint8 in RGB.

    Raises:
        UnreadableImage: If the file is not an image, is damaged, has too many pixels (see
            `PIL.Image.MAX_IMAGE_PIXELS`), or one side is more than 200 times the other.
    """
    image = read_image(path)
    try:
        return np.array(to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # Pillow raises errors of any type for malformed EXIF data.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"cannot read image {path}: {reason:.500}") from error


def find_sources(inputs: Sequence[str], output: Path | None = None) -> list[Source]:
    """Find images, videos and cameras.

    Args:
        inputs: Files, folders (searched recursively for images), patterns such as `photos/*.jpg`
            or `photos/**/*.png`, and numbers of cameras. A file that is found several times counts
            once.
        output: Folder of the results, which may be in a folder of inputs or be one. Results of an
            earlier run are left out there.

    Returns:
        The sources in the order of the inputs, those of a folder or pattern by name, and cameras
        last.

    Raises:
        FileNotFoundError: If an input does not exist.
        ValueError: If a folder contains no images, a pattern matches nothing, or an input is a
            result in `output`, which might be overwritten.
        OSError: If a folder cannot be read.
    """
    cameras = [i for i in inputs if re.fullmatch(r"\d{1,4}", i) and not os.path.exists(i)]
    files: dict[str, Path] = {}
    parents: list[str] = []
    seen = Counter[str]()
    for given in inputs:
        if given in cameras:
            continue
        for path in _expand(given, output):
            found, parent = _files_of(path, output)
            parents.append(parent)
            for file in found:
                real = os.path.realpath(file)
                seen[real] += 1
                files.setdefault(real, file)
    if repeated := sum(count - 1 for count in seen.values()):
        _logger.warning("%d files are given more than once: each is predicted once", repeated)
    root = os.path.commonpath(parents) if parents else ""
    sources = []
    for file in files.values():
        name = Path(os.path.relpath(os.path.abspath(file), root)).as_posix()
        kind: Literal["image", "video"] = "video" if _is_video(file) else "image"
        sources.append(Source(kind, file, name, name))
    for number in dict.fromkeys(map(int, cameras)):
        sources.append(Source("camera", number, f"camera_{number}", f"camera_{number}"))
    names = _unique_names([source.file_name for source in sources])
    return [
        Source(source.kind, source.path, source.file_name, name)
        for source, name in zip(sources, names, strict=True)
    ]


def _expand(given: str, output: Path | None) -> list[str]:
    """Return the paths that an input stands for."""
    given = os.path.expanduser(given)
    if os.path.lexists(given):
        if _is_result(given, output):
            raise ValueError(
                f"INPUT must not be a result in the output folder {output}, got {given}"
            )
        return [given]
    if not glob.has_magic(given):
        raise FileNotFoundError(f"INPUT not found: {given}")
    found = sorted(glob.glob(given, recursive=True))
    paths = [p for p in found if not (_is_same(p, output) or _is_result(p, output))]
    if len(paths) < len(found):
        _logger.info("%s: %d results of %s are left out", given, len(found) - len(paths), output)
    if not paths:
        raise ValueError(f"INPUT must match at least one file, got '{given}'")
    return paths


def _is_result(path: str, output: Path | None) -> bool:
    """Return whether a path is in one of the folders of results."""
    if output is None:
        return False
    relative = os.path.relpath(os.path.realpath(path), os.path.realpath(output))
    return relative.partition(os.sep)[0] in (PICTURES, LABEL_MAPS, VIDEOS)


def _is_same(path: str, output: Path | None) -> bool:
    return output is not None and os.path.realpath(path) == os.path.realpath(output)


def _files_of(path: str, output: Path | None) -> tuple[list[Path], str]:
    """Return the files of a path, and the absolute path of the folder that they are in."""
    if not os.path.isdir(path):
        return [Path(path)], os.path.dirname(os.path.abspath(path))
    check_no_loops(path)
    suffixes, others, found = image_suffixes(), 0, []
    for file in _walk(path, output):
        if file.suffix.lower() in suffixes:
            found.append(file)
        else:
            others += 1
    if not found:
        raise ValueError(
            f"INPUT must contain images, got the folder {path} with {others} other files"
        )
    if others:
        _logger.info("%s: %d files that are not images are left out", path, others)
    return found, os.path.abspath(path)


def _walk(folder: str, output: Path | None) -> Iterator[Path]:
    """Yield the files below a folder by name, without hidden ones and results."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".")
            and not _is_same(os.path.join(parent, name), output)
            and not _is_result(os.path.join(parent, name), output)
        ]
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _unique_names(file_names: Sequence[str]) -> list[str]:
    """Return names for results that are unique even where case does not matter.

    Suffixes are removed where that leaves a unique name.
    """
    stems = [re.sub(r"(?<=[^/])\.[^./]+$", "", name) for name in file_names]
    taken = Counter(stem.casefold() for stem in stems)
    names, used = [], set()
    for file_name, stem in zip(file_names, stems, strict=True):
        name = unique = stem if taken[stem.casefold()] == 1 else file_name
        number = 1
        while unique.casefold() in used:
            number += 1
            unique = f"{name}_{number}"
        used.add(unique.casefold())
        names.append(unique)
    return names
