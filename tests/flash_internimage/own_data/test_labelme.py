"""Tests of reading labelme."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from .datasets import HEIGHT, WIDTH, to_coco, to_label_maps, write_image, write_json, write_text


def shape(label: str, points: list, kind: str = "polygon", **more) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, **more}


def write(path, *shapes, **more):
    """Write an annotation file and the image beside it."""
    image = write_image(path.with_suffix(".jpg"))
    content = {
        "version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image.name,
        "imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH, **more,
    }  # fmt: skip
    return write_json(path, content)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PNG = png(np.full((2, 2), 255, np.uint8))
SQUARE = [[10, 5], [20, 5], [20, 25], [10, 25]]


def test_polygons_rectangles_and_circles(tmp_path):
    write(
        tmp_path / "in/a.json",
        shape("leaf", SQUARE),
        shape("stem", [[30, 20], [22.5, 10]], "rectangle"),
        shape("eye", [[20, 15], [20, 5]], "circle"),
    )
    files, result = to_coco("labelme", tmp_path / "in", tmp_path / "coco")
    leaf, stem, eye = files["train"]["annotations"]
    assert files["train"]["categories"] == [
        {"id": 1, "name": "eye"}, {"id": 2, "name": "leaf"}, {"id": 3, "name": "stem"},
    ]  # fmt: skip
    assert (leaf["category_id"], leaf["bbox"], leaf["area"]) == (2, [10.0, 5.0, 10.0, 20.0], 200.0)
    assert leaf["segmentation"] == [[10.0, 5.0, 20.0, 5.0, 20.0, 25.0, 10.0, 25.0]]
    assert stem["bbox"] == [22.5, 10.0, 7.5, 10.0]
    assert eye["bbox"] == [10.0, 5.0, 20.0, 20.0]
    assert eye["area"] == pytest.approx(np.pi * 100, rel=0.03)
    assert result.losses.counts == {
        "circles turned into polygons": 1,
        "boxes among outlines, without a segmentation": 1,
    }


def test_shapes_of_a_group_are_one_object(tmp_path):
    other = [[30, 5], [35, 5], [35, 10], [30, 10]]
    write(
        tmp_path / "in/a.json",
        shape("leaf", SQUARE, group_id=1),
        shape("leaf", other, group_id=1),
        shape("leaf", other, group_id=2),
        shape("stem", other, group_id=1),
    )
    files, _ = to_coco("labelme", tmp_path / "in", tmp_path / "coco")
    first, *others = files["train"]["annotations"]
    assert len(first["segmentation"]) == 2
    assert (first["bbox"], first["area"]) == ([10.0, 5.0, 25.0, 20.0], 225.0)
    assert [a["area"] for a in others] == [25.0, 25.0]


def test_masks_are_placed_at_their_first_corner(tmp_path):
    part = np.zeros((6, 8), np.uint8)
    part[:, 2:] = 255
    buffer = io.BytesIO()
    Image.fromarray(part).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    write(tmp_path / "in/a.json", shape("leaf", [[35, 4], [43, 10]], "mask", mask=data))
    files, _ = to_coco("labelme", tmp_path / "in", tmp_path / "coco")
    (only,) = files["train"]["annotations"]
    # Columns 37 to 42 of the image, of which 37 to 39 exist; rows 4 to 9.
    assert (only["bbox"], only["area"]) == ([37.0, 4.0, 3.0, 6.0], 18.0)
    assert only["segmentation"]["size"] == [HEIGHT, WIDTH]


def test_label_maps_follow_labels_txt_and_special_labels(tmp_path):
    write(
        tmp_path / "in/a.json",
        shape("leaf", SQUARE),
        shape("__ignore__", [[0, 0], [5, 0], [5, 5], [0, 5]]),
        shape("_background_", [[10, 5], [20, 5], [20, 10], [10, 10]]),
        shape("weed", SQUARE),
    )
    write_text(tmp_path / "in/labels.txt", "__ignore__\n_background_\nstem\nleaf\n")
    maps, result = to_label_maps("labelme", tmp_path / "in", tmp_path / "maps")
    assert result.classes == ["background", "stem", "leaf"]
    assert (tmp_path / "maps/classes.txt").read_text() == "background\nstem\nleaf\n"
    labels = maps["train/a"]
    assert (labels[:5, :5] == 255).all()
    assert (labels[5:10, 10:20] == 0).all()  # drawn later
    assert (labels == 2).sum() == 150
    assert result.losses.counts == {"objects of unknown classes left out": 1}


def test_embedded_images_are_written(tmp_path):
    path = write(tmp_path / "in/a.json", shape("leaf", SQUARE))
    content = (tmp_path / "in/a.jpg").read_bytes()
    write(path, shape("leaf", SQUARE), imageData=base64.b64encode(content).decode())
    (tmp_path / "in/a.jpg").unlink()
    write(tmp_path / "in/b.json", shape("leaf", SQUARE), imagePath="..\\c\\b.jpg")
    _, result = to_coco("labelme", tmp_path / "in", tmp_path / "coco")
    assert (tmp_path / "coco/train/a.jpg").read_bytes() == content
    assert result.losses.counts == {
        "images embedded in an annotation file, written as files": 1,
        "annotation files without an image": 1,
        "images without an annotation file left out": 1,
    }


def test_what_cannot_be_converted_is_counted_and_named(tmp_path):
    root = tmp_path / "in"
    path = write(
        root / "train/a.json",
        shape("leaf", SQUARE),
        shape("vein", [[1, 1], [5, 5]], "line"),
        shape("tip", [[1, 1]], "point"),
        shape("tip", [[1, 1]], "point"),
        shape("leaf", [[1, 1], [2, 2]]),
        shape("", SQUARE),
        shape("leaf", [[1, "x"], [2, 2], [3, 3]]),
    )
    write(root / "val/b.json")
    write_text(root / "val/c.json", "{")
    write_json(root / "val/d.json", {"images": []})
    write_image(root / "val/e.jpg")
    files, result = to_coco("labelme", root, tmp_path / "coco")
    assert len(files["train"]["annotations"]) == 1
    assert [image["file_name"] for image in files["val"]["images"]] == ["b.jpg"]
    assert result.losses.counts == {
        "shapes of type line left out": 1,
        "shapes of type point left out": 2,
        "malformed shapes left out": 3,
        "malformed annotation files left out, with their images": 1,
        "JSON files that are not labelme's left out": 1,
        "images without an annotation file left out": 1,
    }
    assert result.losses.first["malformed shapes left out"] == (
        f"{path}, shape 5: a polygon must have at least 3 points, got 2"
    )


def test_a_folder_without_annotations_is_an_error(tmp_path):
    write_image(tmp_path / "in/a.jpg")
    with pytest.raises(FileNotFoundError, match="in must contain JSON files of labelme"):
        to_coco("labelme", tmp_path / "in", tmp_path / "coco")


def test_malformed_shapes_are_counted(tmp_path):
    write(
        tmp_path / "in/a.json",
        shape("leaf", SQUARE, group_id=[1]),
        shape("leaf", [], "mask", mask=base64.b64encode(PNG).decode()),
        shape("leaf", [[10**400, 5], [20, 5], [20, 25]]),
        shape("leaf", 5),
        5,
    )
    files, result = to_coco("labelme", tmp_path / "in", tmp_path / "coco")
    assert len(files["train"]["annotations"]) == 1
    assert result.losses.counts == {"malformed shapes left out": 4}


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b.png"])
def test_an_impossible_image_name_is_counted(tmp_path, name):
    write(tmp_path / "in/a.json", shape("leaf", SQUARE))
    write(tmp_path / "in/b.json", shape("leaf", SQUARE), imagePath=name)
    _, result = to_coco("labelme", tmp_path / "in", tmp_path / "coco")
    assert result.losses.counts["annotation files without an image"] == 1


def test_embedded_images_get_the_suffix_of_their_format(tmp_path):
    """labelme embeds all formats but JPEG as PNG."""
    path = write(tmp_path / "in/a.json", shape("leaf", SQUARE))
    path.with_suffix(".jpg").unlink()
    image = base64.b64encode(png(np.zeros((HEIGHT, WIDTH), np.uint8))).decode()
    for name in ("a.tif", "a.exe", ""):
        content = {"shapes": [shape("leaf", SQUARE)], "imagePath": name, "imageData": image}
        write_json(path, content)
        files, _ = to_coco("labelme", tmp_path / "in", tmp_path / f"coco-{name}")
        assert files["train"]["images"][0]["file_name"] == "a.png"


def test_embedded_images_of_label_maps_get_the_common_format(tmp_path):
    path = write(tmp_path / "in/a.json", shape("leaf", SQUARE))
    content = path.with_suffix(".jpg").read_bytes()
    write(path, shape("leaf", SQUARE), imageData=base64.b64encode(content).decode())
    path.with_suffix(".jpg").unlink()
    image = write_image(tmp_path / "in/b.png").name
    write(tmp_path / "in/b.json", shape("leaf", SQUARE), imagePath=image)
    to_label_maps("labelme", tmp_path / "in", tmp_path / "maps")
    with Image.open(tmp_path / "maps/images/train/a.png") as written:
        assert written.format == "PNG"


def test_a_second_annotation_file_of_an_image_is_counted(tmp_path):
    write(tmp_path / "in/a.json", shape("leaf", SQUARE))
    write(tmp_path / "in/b.json", shape("leaf", SQUARE), imagePath="a.jpg")
    files, result = to_coco("labelme", tmp_path / "in", tmp_path / "coco")
    assert [image["file_name"] for image in files["train"]["images"]] == ["a.jpg"]
    assert result.losses.counts["further annotation files of the same image left out"] == 1


def test_names_of_classes_are_trimmed_and_must_be_text(tmp_path, caplog):
    labels = (" leaf ", "Leaf", ["leaf"], "  ")
    write(tmp_path / "in/a.json", *(shape(label, SQUARE) for label in labels))
    files, result = to_coco("labelme", tmp_path / "in", tmp_path / "coco")
    assert [category["name"] for category in files["train"]["categories"]] == ["Leaf", "leaf"]
    assert result.losses.counts == {"malformed shapes left out": 2}
    assert "classes differ only in case: Leaf and leaf" in caplog.text
    write(tmp_path / "in/a.json", shape("a\nb", SQUARE))
    with pytest.raises(ValueError, match=r"text without control characters, got 'a\\nb'"):
        to_coco("labelme", tmp_path / "in", tmp_path / "other")
