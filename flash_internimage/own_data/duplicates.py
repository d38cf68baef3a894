"""Find images that occur several times in a dataset."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

Place = tuple[str, str]  # split and path
MAX_PAIRS = 1000  # in a report
_CHUNK = 1 << 22  # pairs of hashes that are compared at a time


def find_duplicates(paths: Mapping[str, Sequence[str]]) -> list[list[Place]]:
    """Return groups of files with identical contents.

    Only files of the same size are read. A file that several splits list counts as a duplicate.

    Args:
        paths: Paths of the images of each split.

    Returns:
        Groups of two or more (split, path), in the order of the splits.
    """
    places = [(split, path) for split, files in paths.items() for path in files]
    same_size = _groups(places, lambda place: os.path.getsize(place[1]))
    return [group for some in same_size for group in _groups(some, lambda place: _digest(place[1]))]


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _groups(places: Iterable[Place], key: Callable[[Place], object]) -> list[list[Place]]:
    grouped = defaultdict(list)
    for place in places:
        try:
            grouped[key(place)].append(place)
        except OSError:  # unreadable files are reported where they are decoded
            continue
    return [group for group in grouped.values() if len(group) > 1]


def difference_hash(image: Image.Image) -> int:
    """Return a 64-bit hash that similar images share.

    Its bits tell whether brightness increases between neighboring pixels of the image, reduced to
    9 x 8 pixels.
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


class Pair(NamedTuple):
    """Similar images in different splits, and how many bits of their hashes differ."""

    first: Place
    second: Place
    bits: int


def find_similar(
    hashes: Mapping[str, Mapping[str, int]], distance: int, limit: int
) -> tuple[list[Pair], int]:
    """Return the images in different splits whose hashes differ in few bits.

    Args:
        hashes: Hash of each path, for each split.
        distance: Maximum number of bits that differ.
        limit: Maximum number of pairs to return.

    Returns:
        The most similar pairs, in this order, and the number of all pairs.
    """
    pairs: list[Pair] = []
    total = 0
    splits = list(hashes)
    for i, first in enumerate(splits):
        for second in splits[i + 1 :]:
            ours, theirs = list(hashes[first]), list(hashes[second])
            a = np.array(list(hashes[first].values()), np.uint64)
            b = np.array(list(hashes[second].values()), np.uint64)
            step = max(1, _CHUNK // max(1, len(b)))
            for start in range(0, len(a), step):
                bits = np.bitwise_count(a[start : start + step, None] ^ b[None])
                rows, columns = np.nonzero(bits <= distance)
                total += len(rows)
                found = bits[rows, columns]
                for k in np.argsort(found, kind="stable")[:limit]:
                    places = (first, ours[start + rows[k]]), (second, theirs[columns[k]])
                    pairs.append(Pair(*places, int(found[k])))
                pairs = sorted(pairs, key=lambda pair: pair.bits)[:limit]
    return pairs, total
