"""Tests of reading YOLO."""

import pytest

from .datasets import HEIGHT, WIDTH, to_coco, to_label_maps, write_image, write_text

YAML = "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: bolt\n  1: nut\n"


@pytest.fixture
def root(tmp_path):
    """Return a dataset with the images a and b for training and c for validation."""
    root = tmp_path / "in"
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        write_image(root / f"images/{split}/{name}.jpg")
        write_text(root / f"labels/{split}/{name}.txt", "0 0.5 0.5 0.5 0.5\n")
    write_text(root / "data.yaml", YAML)
    return root


def test_boxes_are_a_center_and_a_size_relative_to_the_image(root, tmp_path):
    write_text(root / "labels/train/a.txt", "1 0.5 0.5 0.25 0.2\n\n0 0.1 0.2 0.1 0.2\n")
    files, result = to_coco("yolo", root, tmp_path / "coco")
    first, second = files["train"]["annotations"][:2]
    # Of 40 x 30: center (20, 15) and size 10 x 6; center (4, 6) and size 4 x 6.
    assert first["bbox"] == [15.0, 12.0, 10.0, 6.0]
    assert (first["category_id"], first["area"]) == (2, 60.0)
    assert second["bbox"] == [2.0, 3.0, 4.0, 6.0]
    assert "segmentation" not in first
    assert result.images == {"train": 2, "val": 1}
    assert files["val"]["categories"] == [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut"}]
    assert not result.losses.counts


def test_polygons_keep_their_points(root, tmp_path):
    write_text(root / "labels/val/c.txt", "1 0.25 0.2 0.75 0.2 0.75 0.8 0.25 0.8\n")
    files, _ = to_coco("yolo", root / "data.yaml", tmp_path / "coco")
    (only,) = files["val"]["annotations"]
    assert only["segmentation"] == [[10.0, 6.0, 30.0, 6.0, 30.0, 24.0, 10.0, 24.0]]
    assert only["bbox"] == [10.0, 6.0, 20.0, 18.0]
    assert only["area"] == 360.0


def test_polygons_become_label_maps_and_boxes_only_on_request(root, tmp_path):
    write_text(root / "labels/val/c.txt", "1 0.25 0.2 0.75 0.2 0.75 0.8 0.25 0.8\n")
    maps, result = to_label_maps("yolo", root, tmp_path / "maps")
    labels = maps["val/c"]
    assert (labels[6:24, 10:30] == 2).all()
    assert (labels == 2).sum() == 360
    assert not maps["train/a"].any()
    assert result.losses.counts == {"boxes without an outline left out": 2}
    assert (tmp_path / "maps/classes.txt").read_text() == "background\nbolt\nnut\n"
    maps, _ = to_label_maps("yolo", root, tmp_path / "filled", boxes_as_masks=True)
    assert (maps["train/a"] == 1).sum() == WIDTH // 2 * HEIGHT // 2


def test_what_cannot_be_converted_is_counted_and_named(root, tmp_path):
    lines = ["7 0.5 0.5 0.1 0.1", "0 0.5 0.5 0.1", "0 0.5 0.5 0.1 x", "0 0.5 0.5 0.2 0.2 0.93"]
    lines += [
        "1.5 0.5 0.5 0.1 0.1",
        "0 0.5 nan 0.1 0.1",
        "0 1.5 0.5 0.1 0.1",
        "0 0.5 0.5 0.001 0.5",
        "-1 0.5 0.5 0.1 0.1",
    ]
    write_text(root / "labels/train/a.txt", "\n".join(lines))
    (root / "labels/train/b.txt").unlink()
    write_text(root / "labels/val/z.txt", "")
    files, result = to_coco("yolo", root, tmp_path / "coco")
    assert len(files["train"]["images"]) == 2
    assert len(files["train"]["annotations"]) == 1
    assert result.losses.counts == {
        "objects of unknown classes left out": 2,
        "malformed lines left out": 4,
        "confidences left out": 1,
        "images without a label file, taken as images without objects": 1,
        "label files without an image": 1,
        "objects outside of their image left out": 1,
        "objects smaller than a pixel left out": 1,
    }
    assert result.losses.first["objects of unknown classes left out"] == (
        f"{root / 'labels/train/a.txt'}, line 1: class 7"
    )


def test_boxes_among_polygons_are_counted(root, tmp_path):
    write_text(root / "labels/train/a.txt", "1 0.1 0.1 0.5 0.1 0.5 0.5\n")
    _, result = to_coco("yolo", root, tmp_path / "coco")
    assert result.losses.counts == {"boxes among outlines, without a segmentation": 1}
    files, result = to_coco("yolo", root, tmp_path / "filled", boxes_as_masks=True)
    assert files["val"]["annotations"][0]["segmentation"] == [
        [10.0, 7.5, 30.0, 7.5, 30.0, 22.5, 10.0, 22.5]
    ]
    assert result.losses.counts == {"boxes taken as masks": 2}


def test_keypoints_of_pose_datasets_are_left_out(root, tmp_path):
    write_text(root / "data.yaml", YAML + "kpt_shape: [2, 3]\n")
    write_text(root / "labels/val/c.txt", "0 0.5 0.5 0.5 0.4 0.1 0.1 2 0.2 0.2 2\n")
    files, result = to_coco("yolo", root, tmp_path / "coco")
    assert files["val"]["annotations"][0]["bbox"] == [10.0, 9.0, 20.0, 12.0]
    assert result.losses.counts == {"sets of keypoints left out": 1}


@pytest.mark.parametrize("train", ["../images/train", "[images/train]", "train.txt"])
def test_splits_can_be_named_in_several_ways(root, tmp_path, train):
    write_text(root / "train.txt", "./images/train/a.jpg\n./images/train/b.jpg\n")
    write_text(root / "data.yaml", f"train: {train}\nval: images/val\nnames: [bolt, nut]\n")
    _, result = to_coco("yolo", root, tmp_path / "coco")
    assert result.images == {"train": 2, "val": 1}


def test_without_data_yaml_classes_txt_names_the_classes(root, tmp_path):
    (root / "data.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"in must contain data\.yaml, or classes\.txt"):
        to_coco("yolo", root, tmp_path / "coco")
    write_text(root / "classes.txt", "bolt\nnut\n")
    files, _ = to_coco("yolo", root, tmp_path / "coco")
    assert [image["file_name"] for image in files["train"]["images"]] == [
        "train/a.jpg", "train/b.jpg", "val/c.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/train\n", "names must be a list of class names, got None"),
        ("names: {1: a, 2: b}\ntrain: images/train\n", "names must be numbered from 0"),
        ("b: &b [x, x]\nnames: [*b, *b]\n", r"names must be a list of class names, got \[\['x'"),
        ("names: [a]\ntrain: [[x]]\n", r"train must be a folder or a list of files, got \['x'\]"),
        ("names: [a, a]\ntrain: images/train\n", "names must differ"),
        ("names: [a, b\n", "must be a YAML file"),
        ("names: " + "[" * 500, "must be a YAML file, got maximum recursion depth"),
        ("names: [yes, no]\n", r"got \[True, False\]; quote words such as yes and no"),
        ('names: ["a\\nb"]\ntrain: images/train\n', "must be text without control characters"),
        ('names: ["\\ud800"]\ntrain: images/train\n', "must be text without control characters"),
        ("names: [a]\ntrain: nowhere\n", "train not found: nowhere"),
    ],
)
def test_errors_name_the_key(root, tmp_path, text, message):
    write_text(root / "data.yaml", text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        to_coco("yolo", root, tmp_path / "coco")


def test_images_listed_with_dots_stay_in_the_target(root, tmp_path):
    write_text(root / "lists/train.txt", "../images/train/a.jpg\n../../in/images/train/b.jpg\n")
    write_text(root / "data.yaml", YAML.replace("images/train", "lists/train.txt"))
    files, _ = to_coco("yolo", root, tmp_path / "coco")
    assert [image["file_name"] for image in files["train"]["images"]] == ["a.jpg", "b.jpg"]
    assert sorted(path.name for path in (tmp_path / "coco/train").iterdir()) == ["a.jpg", "b.jpg"]


def test_points_far_outside_need_no_memory(root, tmp_path):
    """pycocotools allocates memory for every pixel of an outline."""
    write_text(root / "labels/val/c.txt", "1 0.25 0.2 1e8 0.2 1e8 0.8 0.25 0.8\n")
    files, _ = to_coco("yolo", root, tmp_path / "coco")
    (only,) = files["val"]["annotations"]
    assert only["bbox"] == [10.0, 6.0, 30.0, 18.0]
    assert only["area"] == 540.0


def test_classes_txt_must_have_different_names(root, tmp_path):
    (root / "data.yaml").unlink()
    write_text(root / "classes.txt", "bolt\nbolt\n")
    with pytest.raises(ValueError, match=r"classes\.txt must have a different name in each line"):
        to_coco("yolo", root, tmp_path / "coco")


def test_files_of_windows_are_read(root, tmp_path):
    yaml = "path: D:\\parts\\in\r\ntrain: images\\train\r\nval: val.txt\r\nnames: [bolt, nut]\r\n"
    (root / "data.yaml").write_text(yaml, "utf-8-sig", newline="")
    (root / "val.txt").write_text(".\\images\\val\\c.jpg\r\n", "utf-16", newline="")
    (root / "labels/train/a.txt").write_text("1 0.5 0.5 0.5 0.5\r\n", "utf-8-sig", newline="")
    (root / "labels/train/b.txt").write_text("1 0.5 0.5 0.5 0.5\r\n", "utf-16", newline="")
    files, result = to_coco("yolo", root, tmp_path / "coco")
    assert [a["category_id"] for a in files["train"]["annotations"]] == [2, 2]
    assert result.images == {"train": 2, "val": 1}
    assert not result.losses.counts
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("bolt\r\nnut\r\n", "utf-8-sig", newline="")
    _, result = to_coco("yolo", root, tmp_path / "other")
    assert result.classes == ["bolt", "nut"]


def test_classes_may_be_written_as_decimals(root, tmp_path):
    """numpy.savetxt writes them so, and Ultralytics reads them."""
    write_text(root / "labels/val/c.txt", "1.0 0.5 0.5 0.5 0.5\n1.0e+00 0.5 0.5 0.5 0.5\n")
    files, _ = to_coco("yolo", root, tmp_path / "coco")
    assert [a["category_id"] for a in files["val"]["annotations"]] == [2, 2]


def test_splits_without_images_are_counted(root, tmp_path):
    (root / "images/val/c.jpg").unlink()
    write_text(root / "data.yaml", YAML + "test: ../test/images\n")  # as Roboflow writes it
    _, result = to_coco("yolo", root, tmp_path / "coco")
    assert result.images == {"train": 2}
    assert result.losses.counts["splits without images"] == 2
    assert result.losses.first["splits without images"] == f"{root / 'data.yaml'}: val"


def test_missing_images_elsewhere_do_not_change_the_names_of_others(root, tmp_path):
    write_text(root / "train.txt", "images/train/a.jpg\n/nowhere/x.jpg\n")
    write_text(root / "data.yaml", YAML.replace("images/train", "train.txt"))
    files, _ = to_coco("yolo", root, tmp_path / "coco")
    assert [image["file_name"] for image in files["train"]["images"]] == ["a.jpg"]
