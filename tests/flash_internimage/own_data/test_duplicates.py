"""Tests of finding duplicate images."""

import shutil

import numpy as np
from PIL import Image

from flash_internimage.own_data.duplicates import (
    difference_hash,
    find_duplicates,
    find_similar,
)

from .datasets import write_image


def test_only_files_of_the_same_contents_are_duplicates(tmp_path):
    a, b, c = (str(write_image(tmp_path / f"{i}.bmp", i)) for i in range(3))  # of the same size
    copy = str(shutil.copyfile(a, tmp_path / "copy.bmp"))
    missing = str(tmp_path / "missing.bmp")
    assert find_duplicates({"train": [a, b, missing], "val": [c, copy]}) == [
        [("train", a), ("val", copy)]
    ]
    assert find_duplicates({"train": [a, b], "val": [a]}) == [[("train", a), ("val", a)]]


def test_a_resized_and_compressed_photograph_is_similar(tmp_path):
    y, x = np.mgrid[:120, :160]
    waves = np.stack([np.sin(x / 9 + y / 23), np.cos(x / 31 - y / 7), np.sin(x * y / 900)], -1)
    image = Image.fromarray(np.uint8(127 * (1 + waves)))
    image.resize((120, 90)).save(tmp_path / "small.jpg", quality=60)
    other = Image.fromarray(np.uint8(127 * (1 - waves)))
    hashes = {
        "train": {"a": difference_hash(image), "b": difference_hash(other)},
        "val": {"c": difference_hash(Image.open(tmp_path / "small.jpg"))},
    }
    (pair,), total = find_similar(hashes, 3, 10)
    assert total == 1
    assert (pair.first, pair.second) == (("train", "a"), ("val", "c"))
    assert find_similar({"train": {"a": 0b1111}, "val": {"b": 0b0101, "c": 0}}, 2, 10) == (
        [(("train", "a"), ("val", "b"), 2)],
        1,
    )


def test_the_most_similar_pairs_are_returned_and_the_others_counted():
    train = {str(i): 0 for i in range(1000)}
    val = {**{str(i): 0b11 for i in range(1000)}, "near": 0b1, "equal": 0}
    test = {"equal": 0}
    pairs, total = find_similar({"train": train, "val": val, "test": test}, 2, 2002)
    assert total == 1000 * 1002 + 1000 + 1002
    assert [pair.bits for pair in pairs] == [0] * 2001 + [1]


def test_the_hash_tells_where_brightness_increases():
    rising = np.arange(9, dtype=np.uint8)[None].repeat(8, 0) * 20
    assert difference_hash(Image.fromarray(rising)) == 2**64 - 1
    assert difference_hash(Image.fromarray(rising[:, ::-1])) == 0
