"""Copy the images of a converted dataset."""

import io
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from ...files import write_atomically
from ...images import read_image, to_rgb
from .annotations import AnnotatedImage, Losses

ImageWriter = Callable[[Sequence[AnnotatedImage], Path], list[str]]

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "I;16B")
_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")


def image_writer(losses: Losses, link: bool, one_suffix: str | None = None) -> ImageWriter:
    """Return a function that writes images to a folder and returns their relative names.

    Args:
        losses: Receives images that get another name or format.
        link: Whether to write symbolic links instead of copies.
        one_suffix: Suffix of all images, for datasets that require one; see
            :func:`common_suffix`. Images in other formats are written as PNG.
    """

    def write(items: Sequence[AnnotatedImage], folder: Path) -> list[str]:
        taken: set[str] = set()
        names = []
        for item in items:
            text = item.name.encode(errors="replace").decode()
            if text != item.name:
                losses.add("images renamed, as their name is not valid text", item.where)
            name = PurePosixPath(text)
            suffix = _normalized(name.suffix)
            converts = one_suffix is not None and suffix != one_suffix
            if one_suffix is not None:
                name = name.with_suffix(one_suffix)
            unique, number = name, 2
            while unique.as_posix() in taken:
                unique = name.with_stem(f"{name.stem}_{number}")
                number += 1
            if unique != name:
                losses.add("images renamed, as another one has the same name", item.where)
            taken.add(unique.as_posix())
            names.append(unique.as_posix())
            _write(item, folder / unique, converts, link, losses)
        return names

    return write


def _write(item: AnnotatedImage, path: Path, converts: bool, link: bool, losses: Losses) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    source = item.source
    if converts:
        losses.add("images written as PNG, as those of a dataset must have one format", item.where)
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        image: Image.Image = read_image(stream, item.name)
        exif = image.getexif()
        (image if image.mode in _PNG_MODES else to_rgb(image)).save(path, exif=exif)
    elif isinstance(source, bytes):
        write_atomically(path, lambda file: file.write(source))
    elif link:
        os.symlink(source.resolve(), path)
    else:
        shutil.copyfile(source, path)


def common_suffix(items: Sequence[AnnotatedImage]) -> str:
    """Return the suffix of images if all have the same format, otherwise that of PNG."""
    suffixes = {_normalized(PurePosixPath(item.name).suffix) for item in items}
    return suffixes.pop() if len(suffixes) == 1 else ".png"


def _normalized(suffix: str) -> str:
    suffix = suffix.lower()
    return ".jpg" if suffix in _JPEG else suffix
