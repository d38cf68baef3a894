"""Tests of the demo datasets: the digits, and properties of the scenes that need no OpenMMLab."""

from functools import partial

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from flash_internimage.cli.demo_data import (
    _CONTENTS,
    main,
    write_digits,
    write_digits_scenes,
    write_digits_scenes_ade20k,
)
from flash_internimage.cli.demo_scenes import Instance, Scene
from tests.demo_data import contents, read_annotations


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "digits"
    write_digits(root)
    return root


def test_digits_are_written_as_a_stratified_image_folder(folder):
    files = sorted(folder.rglob("*.png"))
    counts = {
        split: [len(list((folder / split / str(i)).iterdir())) for i in range(10)]
        for split in ("train", "val")
    }
    assert (sum(counts["train"]), sum(counts["val"])) == (1437, 360)
    assert max(counts["val"]) - min(counts["val"]) <= 2
    assert len({file.stem for file in files}) == 1797  # no image in both splits


def test_images_show_the_digit_of_their_folder(folder):
    digits = load_digits()
    for file in sorted((folder / "val").rglob("*.png"))[::40]:
        with Image.open(file) as image:
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float) / 255 * 16
        index = int(file.stem)
        assert file.parent.name == str(digits.target[index])
        assert np.corrcoef(small.ravel(), digits.images[index].ravel())[0, 1] > 0.95


def test_the_split_is_deterministic(folder, tmp_path):
    write_digits(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_scenes_are_deterministic_and_do_not_depend_on_their_number(tmp_path):
    for name, train in (("a", 4), ("b", 4), ("c", 6)):
        write_digits_scenes(tmp_path / name, train=train, val=2)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert len(a) == 4 + 2 + 2
    assert a == b
    assert all(c[path] == a[path] for path in a if path.suffix == ".jpg")
    first = read_annotations(tmp_path / "a", "train")["annotations"]
    assert first == read_annotations(tmp_path / "c", "train")["annotations"][: len(first)]


def test_label_map_encodes_crowds_background_and_digits():
    left, middle, right = np.zeros((3, 3, 4), bool)
    left[1, 0] = middle[:, 1] = right[:, 3] = True
    scene = Scene(
        np.zeros((3, 4, 3), np.uint8),
        [
            Instance(0, left, sources=(5,)),
            Instance(9, middle, sources=(6,)),
            Instance(9, right, sources=(7, 8), crowd=True),
        ],
    )
    expected = np.array([[1, 3, 1, 0], [2, 3, 1, 0], [1, 3, 1, 0]], np.uint8)
    np.testing.assert_array_equal(scene.label_map([0, 9]), expected, strict=True)


@pytest.mark.parametrize(
    "write",
    [
        write_digits,
        partial(write_digits_scenes, train=2, val=2),
        partial(write_digits_scenes_ade20k, train=2, val=2),
    ],
    ids=["digits", "scenes", "ade20k"],
)
def test_an_interrupted_write_leaves_no_partial_dataset(write, tmp_path, monkeypatch):
    save, saved = Image.Image.save, []

    def interrupted(self, path, **options):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "data")
    assert len(saved) == 3
    assert not (tmp_path / "data").exists()

    write(tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("arguments", "name", "root"),
    [
        ([], "digits", "data/digits"),
        (["--root", "elsewhere"], "digits", "elsewhere"),
        (["digits"], "digits", "data/digits"),
        (["digits-scenes"], "digits-scenes", "data/digits-scenes"),
        (["digits-scenes-ade20k"], "digits-scenes-ade20k", "data/digits-scenes-ade20k"),
    ],
)
def test_command_writes_the_named_dataset_once(arguments, name, root, tmp_path, monkeypatch):
    written = []

    def writer(name):
        def write(root):
            for path in _CONTENTS[name]:
                (root / path).mkdir(parents=True)
            written.append((name, str(root)))

        return write

    for each in ("digits", "digits-scenes", "digits-scenes-ade20k"):
        function = f"write_{each.replace('-', '_')}"
        monkeypatch.setattr(f"flash_internimage.cli.demo_data.{function}", writer(each))
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    assert main(arguments) == 0  # The dataset exists.
    assert written == [(name, root)]


@pytest.mark.parametrize("content", ["file", "empty", "val/0"])
def test_command_writes_into_no_other_file_or_folder(content, tmp_path, caplog):
    root = tmp_path / "data"
    if content == "file":
        root.touch()
    else:
        (root / content).mkdir(parents=True)
    assert main(["digits", "--root", str(root)]) == 2
    assert f"--root must be a new folder, or one of digits, got {root}" in caplog.text
