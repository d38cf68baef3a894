"""List the images in class folders, and find images that two splits share."""

import hashlib
import logging
import os
import tarfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key

from ...files import check_no_loops
from ...images import image_suffixes
from ..processes import on_first

_logger = logging.getLogger(__name__)

COMPARED = 1000  # validation images that are compared with the training images
_LARGE = 20_000  # training images; beyond this, only files of the same name are compared


class Listing(NamedTuple):
    """Files in a folder or tar file.

    Attributes:
        images: Relative paths of the images.
        others: Number of other files by kind, such as their suffix.
        empty: Folders at the level of class folders that contain no images.
    """

    images: list[str]
    others: Counter[str]
    empty: list[str]


class FolderReader(ReaderImageFolder):
    """timm ReaderImageFolder for all formats that Pillow decodes, without hidden files.

    Args:
        root: Folder that contains the class folders.
        listing: Files in `root`.
        outermost: Use the outermost folders as classes, in lexicographic order, like torchvision's
            ImageFolder. Otherwise, the folders that directly contain the images are the classes, in
            natural order.
    """

    def __init__(self, root: str, listing: Listing, outermost: bool = False) -> None:
        self.root = root
        if outermost:
            labels = [_composed(path.partition(os.sep)[0]) for path in listing.images]
            self.class_to_idx = {name: i for i, name in enumerate(sorted(set(labels)))}
        else:
            labels = [_label(path) for path in listing.images]
            self.class_to_idx = _class_indices(labels)
        samples = [
            (os.path.join(root, path), self.class_to_idx[label])
            for path, label in zip(listing.images, labels, strict=True)
        ]
        self.samples = sorted(samples, key=lambda sample: natural_key(sample[0]))


def list_folder(folder: Path) -> Listing:
    """List the files below a folder.

    Raises:
        OSError: If a folder cannot be read, or links form a loop.
    """

    def fail(error: OSError) -> None:
        raise error

    check_no_loops(folder)
    files, folders, hidden = [], [], 0
    for parent, below, names in os.walk(folder, followlinks=True, onerror=fail):
        relative = os.path.relpath(parent, folder)
        prefix = "" if relative == os.curdir else f"{relative}{os.sep}"
        shown = [name for name in below if not _is_hidden(name)]
        hidden += len(below) - len(shown)
        below[:] = shown
        folders += [prefix + name for name in shown]
        files += [prefix + name for name in names]
    listing = _sort_out(files, folders)
    listing.others.update({"hidden": hidden} if hidden else {})
    return listing


def list_tar(path: Path) -> Listing:
    """List the members of a tar file; nested tar files count as folders.

    Raises:
        OSError: If the tar file cannot be read.
        tarfile.TarError: If it is damaged.
        ValueError: If a nested tar file is damaged or compressed.
    """
    with tarfile.open(path, "r:") as tar:
        members = list(_members(tar))
    files, folders = ([name for name, kind in members if kind == k] for k in ("file", "folder"))
    listing = _sort_out(files, folders)
    if special := len(members) - len(files) - len(folders):
        listing.others["links and devices"] = special
    return listing


def _members(tar: tarfile.TarFile, parent: str = "") -> Iterator[tuple[str, str]]:
    for member in tar:
        path = os.path.normpath(os.path.join(parent, member.name))
        stem, suffix = os.path.splitext(path)
        if not member.isfile():
            yield path, "folder" if member.isdir() else "other"
        elif suffix.lower() != ".tar":
            yield path, "file"
        else:
            yield stem, "folder"
            try:
                with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                    yield from _members(inner, stem)
            except tarfile.ReadError as error:
                raise ValueError(f"nested {path} must be an uncompressed tar file") from error


def _sort_out(files: Iterable[str], folders: Iterable[str]) -> Listing:
    suffixes = image_suffixes()
    images: list[str] = []
    others: Counter[str] = Counter()
    for path in files:
        suffix = os.path.splitext(path)[1].lower()
        if _is_hidden(path):
            others["hidden"] += 1
        elif suffix in suffixes:
            images.append(path)
        else:
            others[suffix or "without suffix"] += 1
    classes = {os.path.dirname(path) for path in images}
    filled = classes | {str(parent) for name in classes for parent in Path(name).parents}
    empty = []
    for folder in sorted(set(folders)):
        # A folder within a class or within an empty folder does not count as another class.
        if (
            folder not in filled
            and not _is_hidden(folder)
            and classes.isdisjoint(map(str, Path(folder).parents))
        ):
            empty.append(folder)
            classes.add(folder)
    return Listing(images, others, empty)


def printable(text: str) -> str:
    """Escape characters that cannot be encoded, as in file names that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def check_listing(listing: Listing, is_training: bool) -> None:
    """Check that every class has images, and log the files that are skipped.

    Args:
        listing: Files of a split.
        is_training: Whether the split is used for training.

    Raises:
        ValueError: If there are no images, images outside of class folders or, in training, class
            folders without images.
    """
    others = sorted(listing.others.items(), key=lambda item: (-item[1], item[0]))
    counts = printable(", ".join(f"{n} {kind}" for kind, n in others))
    if not listing.images:
        raise ValueError(f"it contains no images (other files: {counts or 'none'})")
    if any(not _label(path) for path in listing.images):
        # timm would make these images an additional first class.
        raise ValueError("it must contain a folder per class, got images outside of class folders")
    if listing.empty and is_training:
        names = printable(", ".join(listing.empty[:5])) + ", ..." * (len(listing.empty) > 5)
        raise ValueError(
            f"{len(listing.empty)} class folders contain no images: {names} (other files: "
            f"{counts or 'none'})"
        )
    if counts:
        level = on_first(logging.INFO if listing.others.keys() == {"hidden"} else logging.WARNING)
        _logger.log(level, "%d images; other files: %s", len(listing.images), counts)


def check_class_folders(folders: Iterable[str]) -> None:
    """Check that the folders with images are distinct classes; warn if their parents differ.

    Args:
        folders: Relative paths of the folders that directly contain images.

    Raises:
        ValueError: If folders in different places have the same name.
    """
    places: dict[str, list[str]] = defaultdict(list)
    parents: dict[str, str] = {}
    for folder in sorted(set(folders)):
        parent, name = os.path.split(folder)
        places[name].append(folder)
        parents.setdefault(parent, folder)
    rule = "the folders that directly contain images are the classes"
    for name, several in places.items():
        if len(several) > 1:
            names = ", ".join(several[:5]) + ", ..." * (len(several) > 5)
            raise ValueError(
                printable(
                    f"class names must be unique, got '{name}' in several folders ({names}): {rule}"
                )
            )
    if len(parents) > 1:
        deepest = max(parents.values(), key=lambda folder: folder.count(os.sep))
        _logger.log(
            on_first(logging.WARNING),
            "class folders are not all in the same folder, for example %s: %s",
            printable(deepest), rule,
        )  # fmt: skip


def folders_in_tar(reader: ReaderImageInTar) -> list[str]:
    """Return the folder of each image in a tar file; nested tar files count as folders."""
    return [
        os.path.normpath(
            os.path.join(os.path.splitext(tar.name)[0] if tar else "", os.path.dirname(member.path))
        )
        for member, _, tar in reader.samples
    ]


def drop_hidden(reader: ReaderImageInTar) -> None:
    """Drop hidden members of a tar file, such as those added by macOS, and rebuild the classes."""
    reader.samples = reader.samples[[not _is_hidden(ti.path) for ti, *_ in reader.samples]]
    # timm would name the class '.' for members such as './0.png' of a nested tar file.
    labels = [_composed(os.path.basename(folder)) for folder in folders_in_tar(reader)]
    reader.class_name_to_idx = _class_indices(labels)
    reader.class_idx_to_name = {i: name for name, i in reader.class_name_to_idx.items()}
    reader.targets = np.array([reader.class_name_to_idx[label] for label in labels])


def _is_hidden(path: str) -> bool:
    parts = path.split(os.sep)
    return any(
        (part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in parts
    )


def _label(path: str) -> str:
    return _composed(os.path.basename(os.path.dirname(path)))


def _composed(name: str) -> str:
    """Return a class name in Unicode's composed form; archives made on macOS are decomposed."""
    return unicodedata.normalize("NFC", name)


def _class_indices(labels: Iterable[str]) -> dict[str, int]:
    # Names that only differ in case or leading zeros have the same natural key.
    ordered = sorted(set(labels), key=lambda name: (natural_key(name), name))
    return {name: i for i, name in enumerate(ordered)}


def count_shared(train: Sequence[str], val: Sequence[str]) -> tuple[int, int]:
    """Count validation images that are also training images.

    Files of the same size and the same first 64 KiB count as identical.

    Args:
        train: Paths of the training images.
        val: Paths of the validation images; at most `COMPARED` of them, evenly spaced, are read.

    Returns:
        Number of shared images and number of compared images.
    """
    key = os.path.basename if len(train) > _LARGE else _size
    candidates = defaultdict(list)
    for path in train:
        candidates[key(path)].append(path)
    start = cache(start_of_file)
    compared = val[:: -(-len(val) // COMPARED)]
    shared = sum(
        any(start(path) == start(other) for other in candidates[key(path)])
        for path in compared
        if key(path) in candidates
    )
    return shared, len(compared)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # a broken link, which counts as an unreadable image later
        return -1


def start_of_file(path: str) -> tuple | str:
    """Return the size of a file and a hash of its first 64 KiB, or its path if it is unreadable."""
    try:
        # Opening a FIFO would block until it has a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            return _size(path), hashlib.sha256(file.read(65536)).digest()
    except OSError:
        return path
