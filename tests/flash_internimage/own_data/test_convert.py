"""Tests of what all conversions share: splits, classes, images and the target folder."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flash_internimage.own_data.conversion.convert import Options, convert

from .datasets import HEIGHT, WIDTH, to_coco, to_label_maps, write_image, write_text

POLYGON = "0 0.25 0.2 0.75 0.2 0.75 0.8 0.25 0.8\n"


@pytest.fixture
def root(tmp_path):
    """Return a YOLO dataset of ten images without splits."""
    for i in range(10):
        write_image(tmp_path / f"in/images/{i}.jpg", i)
        write_text(tmp_path / f"in/labels/{i}.txt", POLYGON)
    write_text(tmp_path / "in/classes.txt", "leaf\nstem\n")
    return tmp_path / "in"


def names(files: dict, split: str) -> list[str]:
    return [image["file_name"] for image in files[split]["images"]]


def test_a_share_of_the_images_is_held_out_by_name(root, tmp_path):
    files, _ = to_coco("yolo", root, tmp_path / "a", val_fraction=0.3)
    assert len(names(files, "val")) == 3
    assert len(names(files, "train")) == 7
    (root / f"images/{names(files, 'train')[0]}").unlink()
    again, _ = to_coco("yolo", root, tmp_path / "b", val_fraction=0.34)
    assert names(again, "val") == names(files, "val")


def test_at_least_one_image_is_held_out(root, tmp_path):
    files, _ = to_coco("yolo", root, tmp_path / "coco", val_fraction=0.01)
    assert len(names(files, "val")) == 1


def test_no_share_can_be_held_out_of_existing_splits(root, tmp_path):
    write_text(root / "data.yaml", "train: images\nnames: [leaf]\n")
    with pytest.raises(
        ValueError, match="--val-fraction must be used with a source without splits"
    ):
        to_coco("yolo", root, tmp_path / "coco", val_fraction=0.3)


def test_classes_can_be_selected(root, tmp_path):
    write_text(root / "labels/0.txt", POLYGON + POLYGON.replace("0", "1", 1))
    files, result = to_coco("yolo", root, tmp_path / "coco", classes=["stem", "root"])
    assert files["train"]["categories"] == [{"id": 1, "name": "stem"}, {"id": 2, "name": "root"}]
    assert len(files["train"]["annotations"]) == 1
    assert result.losses.counts["objects of unknown classes left out"] == 10


def test_the_summary_is_also_a_file(root, tmp_path):
    (root / "labels/3.txt").unlink()
    _, result = to_coco("yolo", root, tmp_path / "coco")
    summary = json.loads((tmp_path / "coco/conversion.json").read_text())
    assert summary["images"] == {"train": 10}
    assert summary["objects"] == {"train": 9}
    assert summary["left_out_or_changed"] == result.losses.counts
    assert sum(result.losses.counts.values()) == 1


def test_a_target_with_files_is_refused_and_an_empty_one_is_used(root, tmp_path):
    target = tmp_path / "coco"
    target.mkdir()
    to_coco("yolo", root, target)
    with pytest.raises(FileExistsError, match="TARGET must not exist or be empty"):
        convert("yolo", root, target, Options())


def test_nothing_is_left_behind_by_a_failed_conversion(root, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="No space"):
        convert("yolo", root, tmp_path / "coco", Options())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_images_can_be_linked(root, tmp_path):
    to_coco("yolo", root, tmp_path / "coco", link=True)
    link = tmp_path / "coco/train/0.jpg"
    assert link.is_symlink()
    assert link.resolve() == (root / "images/0.jpg").resolve()


def test_images_of_one_name_are_renamed(root, tmp_path):
    write_image(root / "more/images/0.jpg", 20)
    write_text(root / "more/labels/0.txt", POLYGON)
    write_text(root / "data.yaml", "names: [leaf]\ntrain: [images, more/images]\n")
    files, result = to_coco("yolo", root, tmp_path / "coco")
    # Names are relative to the common folder of a split.
    assert {"images/0.jpg", "more/images/0.jpg"} <= set(names(files, "train"))
    assert not result.losses.counts
    Image.open(root / "images/1.jpg").save(root / "images/1.png")
    maps, result = to_label_maps("yolo", root, tmp_path / "maps")
    kind = "images renamed, as another one has the same name"
    assert result.losses.counts[kind] == 1
    assert {"train/images/1", "train/images/1_2"} <= maps.keys()


def test_images_of_label_maps_get_one_format_without_losing_pixels(root, tmp_path):
    write_image(root / "images/0.bmp", 3)
    (root / "images/0.jpg").unlink()
    (root / "images/1.jpg").rename(root / "images/1.JPEG")
    maps, result = to_label_maps("yolo", root, tmp_path / "maps")
    written = sorted(path.name for path in (tmp_path / "maps/images/train").iterdir())
    assert written == [f"{i}.png" for i in range(10)]
    kind = "images written as PNG, as those of a dataset must have one format"
    assert result.losses.counts == {kind: 10}
    pixels = [
        np.asarray(Image.open(p))
        for p in (root / "images/0.bmp", tmp_path / "maps/images/train/0.png")
    ]
    assert (pixels[0] == pixels[1]).all()
    assert all(labels.shape == (HEIGHT, WIDTH) for labels in maps.values())


def test_annotations_of_turned_photographs_refer_to_what_people_see(root, tmp_path):
    image = Image.open(root / "images/0.jpg")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(root / "images/0.jpg", exif=exif)
    write_text(root / "labels/0.txt", "0 0.5 0.5 0.2 0.1\n")
    files, _ = to_coco("yolo", root, tmp_path / "coco")
    assert files["train"]["images"][0] == {
        "id": 1, "file_name": "0.jpg", "height": WIDTH, "width": HEIGHT,
    }  # fmt: skip
    assert files["train"]["annotations"][0]["bbox"] == [12.0, 18.0, 6.0, 4.0]


def test_a_source_without_annotated_images_is_an_error(root, tmp_path):
    for i in range(10):
        write_text(root / f"images/{i}.jpg", "no image")
    with pytest.raises(ValueError, match=r"in must have annotated images.*10 unreadable images"):
        to_coco("yolo", root, tmp_path / "coco")
    assert not (tmp_path / "coco").exists()


def test_images_in_cmyk_are_converted_for_a_common_format(root, tmp_path):
    Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0)).save(root / "images/0.tif")
    (root / "images/0.jpg").unlink()
    to_label_maps("yolo", root, tmp_path / "maps")
    with Image.open(tmp_path / "maps/images/train/0.png") as image:
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 0, 0))


def test_a_damaged_image_is_named(root, tmp_path):
    (root / "images/0.jpg").unlink()
    write_image(root / "images/0.bmp")
    data = (root / "images/0.bmp").read_bytes()
    (root / "images/0.bmp").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"0\.bmp"):
        to_label_maps("yolo", root, tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


def test_the_target_can_be_the_current_folder(root, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    convert("yolo", root, Path(), Options())
    assert (tmp_path / "empty/annotations/instances_train.json").is_file()


def test_results_inside_the_source_are_not_read(root, tmp_path):
    for i in range(10):
        (root / f"images/{i}.jpg").rename(root / f"{i}.jpg")
        (root / f"labels/{i}.txt").rename(root / f"{i}.txt")
    (root / "images").rmdir()
    write_image(root / ".trash/old.jpg")
    for name in ("first", "second"):
        _, result = to_coco("yolo", root, root / name)
        assert result.images == {"train": 10}


@pytest.mark.parametrize("target", ["in/classes.txt/coco", "x" * 300])
def test_a_target_that_cannot_be_written_is_an_error_at_the_start(root, tmp_path, target):
    write_text(root / "classes.txt", "one\none\n")  # would be the next error
    with pytest.raises(OSError, match=r"TARGET .* cannot be written: "):
        convert("yolo", root, tmp_path / target, Options())
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="TARGET must not exist or be empty"):
        convert("yolo", root, tmp_path / "link", Options())


def test_two_runs_do_not_write_to_the_same_folder(root, tmp_path, monkeypatch):
    copy, target = shutil.copyfile, tmp_path / "new/coco"

    def copy_and_start_another(*paths):
        monkeypatch.setattr("shutil.copyfile", copy)
        convert("yolo", root, target, Options(classes=["stem"]))
        copy(*paths)

    monkeypatch.setattr("shutil.copyfile", copy_and_start_another)
    with pytest.raises(OSError, match="not empty"):
        convert("yolo", root, target, Options())
    assert json.loads((target / "conversion.json").read_text())["classes"] == ["stem"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "new"]


def test_names_of_images_that_are_not_text_are_changed(root, tmp_path):
    (root / "images/0.jpg").rename(root / "images" / os.fsdecode(b"\xff.jpg"))
    files, result = to_coco("yolo", root, tmp_path / "coco", val_fraction=0.3)
    assert "?.jpg" in names(files, "train") + names(files, "val")
    assert result.losses.counts["images renamed, as their name is not valid text"] == 1


def test_label_maps_have_at_most_255_classes(root, tmp_path):
    write_text(root / "classes.txt", "".join(f"{i}\n" for i in range(255)))
    with pytest.raises(ValueError, match="classes of label maps must be at most 255, got 256"):
        to_label_maps("yolo", root, tmp_path / "maps")
