"""Tests of reading Label Studio's export."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from .datasets import HEIGHT, WIDTH, to_coco, write_image, write_json

SIZE = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}


def region(kind: str, label: str | list, **value) -> dict:
    labels = [label] if isinstance(label, str) else label
    return {"id": "r", "type": kind, "value": {**value, kind: labels}, **SIZE}


def box(label: str, x=10, y=20, width=25, height=50, rotation=0) -> dict:
    numbers = {"x": x, "y": y, "width": width, "height": height, "rotation": rotation}
    return region("rectanglelabels", label, **numbers)


def task(number: int, image: str, *results: dict, **more) -> dict:
    annotations = [{"id": 1, "was_cancelled": False, "result": list(results)}]
    return {"id": number, "data": {"image": image}, "annotations": annotations, **more}


@pytest.fixture
def convert(tmp_path):
    """Write an export and convert it; return annotations of the training split and the result."""
    for i, name in enumerate(("a", "b c", "d")):
        write_image(tmp_path / f"in/{name}.jpg", i)

    def convert(*tasks: dict, tmp: str = "coco", **options):
        write_json(tmp_path / "in/project.json", list(tasks))
        files, result = to_coco("labelstudio", tmp_path / "in", tmp_path / tmp, **options)
        return files["train"], result

    return convert


def test_boxes_and_polygons_are_percent_of_the_image(convert):
    points = [[25, 20], [75, 20], [75, 80], [25, 80]]
    polygon = region("polygonlabels", "bus", points=points)
    content, result = convert(
        task(1, "/data/upload/3/0a1b2c3d-a.jpg", box("car"), polygon),
        task(2, "/data/local-files/?d=photos/b%20c.jpg", box("car")),
        task(3, "https://example.org/photos/d.jpg?width=3", box("car")),
    )  # fmt: skip
    assert content["categories"] == [{"id": 1, "name": "bus"}, {"id": 2, "name": "car"}]
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "b c.jpg", "d.jpg"]
    car, bus = content["annotations"][:2]
    # Of 40 x 30: (4, 6), 10 x 15.
    assert (car["category_id"], car["bbox"], car["area"]) == (2, [4.0, 6.0, 10.0, 15.0], 150.0)
    assert bus["segmentation"] == [[10.0, 6.0, 30.0, 6.0, 30.0, 24.0, 10.0, 24.0]]
    assert (bus["bbox"], bus["area"]) == ([10.0, 6.0, 20.0, 18.0], 360.0)
    assert result.losses.counts == {"boxes among outlines, without a segmentation": 3}


def test_rotated_boxes_and_ellipses_become_polygons(convert):
    turned = box("car", x=50, y=20, width=25, height=50, rotation=90)
    oval = region("ellipselabels", "car", x=50, y=50, radiusX=25, radiusY=20, rotation=0)
    content, result = convert(task(1, "a.jpg", turned, oval))
    first, second = content["annotations"]
    # 10 x 15 turned clockwise around (20, 6): x from 20 - 15, y to 6 + 10.
    assert (first["bbox"], first["area"]) == ([5.0, 6.0, 15.0, 10.0], 150.0)
    assert second["bbox"] == [10.0, 9.0, 20.0, 12.0]
    assert second["area"] == pytest.approx(np.pi * 10 * 6, rel=0.03)
    assert result.losses.counts == {
        "rotated boxes turned into polygons": 1,
        "ellipses turned into polygons": 1,
        "images without an annotation left out": 2,
    }


def encode_brush(mask: np.ndarray, opacity: int = 255) -> list[int]:
    """Encode a mask as Label Studio does: RGBA values in runs of up to 8."""
    values = np.repeat(mask.reshape(-1, 1) * opacity, 4, axis=1).ravel()
    bits = f"{len(values):032b}{7:05b}" + f"{2:04b}{3:04b}{7:04b}{15:04b}"
    for start in range(0, len(values), 8):
        run = values[start : start + 8]
        if (run == run[0]).all():
            bits += f"1{0:02b}{len(run) - 1:03b}{run[0]:08b}"
        else:
            bits += f"0{1:02b}{len(run) - 1:04b}" + "".join(f"{value:08b}" for value in run)
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def test_brushes_become_masks(convert):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[3:9, 5:12] = 1
    mask[20, 30] = 1
    brush = region("brushlabels", "car", format="rle", rle=encode_brush(mask))
    faint = region("brushlabels", "car", format="rle", rle=encode_brush(mask, 1))
    empty = region("brushlabels", "car", format="rle", rle=encode_brush(mask, 0))
    cut = region("brushlabels", "car", format="rle", rle=encode_brush(mask)[:50])
    content, result = convert(task(1, "a.jpg", brush, cut, faint, empty))
    only, other = content["annotations"]
    assert other["segmentation"] == only["segmentation"]  # as Label Studio's own converter
    assert result.losses.counts["empty masks left out"] == 1
    assert (coco_mask.decode(only["segmentation"]) == mask).all()
    assert (only["bbox"], only["area"]) == ([5.0, 3.0, 26.0, 18.0], 43.0)
    assert result.losses.counts["malformed regions left out"] == 1
    assert "run lengths of a brush end early" in result.losses.first["malformed regions left out"]


def test_what_cannot_be_converted_is_counted_and_named(convert):
    two = [{"result": [box("bus")]}, {"result": [box("car")]}, {"was_cancelled": True}]
    rotated = {**box("car"), "image_rotation": 90}
    content, result = convert(
        task(1, "a.jpg", box("car"), region("keypointlabels", "car"), box(["car", "red"]), box([]),
             {"type": "choices", "value": {}}, predictions=[{}, {}]),
        {**task(2, "b c.jpg"), "annotations": two},
        task(3, "d.jpg", rotated),
        task(4, "e.jpg", box("car")),
        task(7, "http://[e.jpg", box("car")),
        {**task(5, "a.jpg"), "annotations": []},
        task(6, "a.jpg", box("car")),
    )  # fmt: skip
    assert [a["category_id"] for a in content["annotations"]] == [2, 2, 1]
    assert result.losses.counts == {
        "predictions left out": 2,
        "results of type keypointlabels left out": 1,
        "further labels of a region left out": 1,
        "regions without a label left out": 1,
        "results of type choices left out": 1,
        "cancelled annotations left out": 1,
        "further annotations of the same image left out": 1,
        "tasks with an image rotated in Label Studio left out": 1,
        "tasks whose image is not found left out": 2,
        "tasks without an annotation left out": 1,
        "further tasks of the same image left out": 1,
    }
    assert result.losses.first["tasks whose image is not found left out"].endswith("task 4: e.jpg")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "must be an export of Label Studio as JSON"),
        ([{"image": "a.jpg", "label": []}], "must be an export of Label Studio as JSON"),
        ([{**task(1, "a.jpg"), "annotations": 5}], "must be an export of Label Studio as JSON"),
        ([task(1, "x.jpg", box("car"))], "--images must be the folder of the images, found none"),
    ],
)
def test_other_files_are_an_error(convert, tasks, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(*tasks)


def test_malformed_regions_are_counted(convert):
    mask = np.ones((HEIGHT, WIDTH), np.uint8)
    huge = {"original_width": 20000, "original_height": 20000}
    content, result = convert(
        task(
            1,
            "a.jpg",
            box("car"),
            {**box("car"), "value": []},
            {**box("car"), "value": {"rectanglelabels": "car"}},
            box("car", x=10**400),
            box("car", rotation="nan"),
            box("car", rotation=1e308),
            box([["car"]]),
            region("brushlabels", "car", rle=[256, -1]),
            {**region("brushlabels", "car", rle=encode_brush(mask)), **huge},
            predictions=5,
        )
    )
    assert len(content["annotations"]) == 1
    assert result.losses.counts["malformed regions left out"] == 8


def test_images_of_equal_names_are_told_apart_by_their_folders(convert, tmp_path):
    for i, folder in enumerate(("x", "y")):
        write_image(tmp_path / f"in/{folder}/s.jpg", 10 + i)
    content, result = convert(
        task(1, "/data/local-files/?d=in%5Cy%5Cs.jpg", box("car")),
        task(2, "s3://bucket/x/s.jpg", box("car")),
        task(3, "/data/upload/1/0a1b2c3d-s.jpg", box("car")),
    )
    assert result.losses.counts["tasks whose image is in several folders left out"] == 1
    assert result.losses.counts["images renamed, as another one has the same name"] == 1
    for image, folder in zip(content["images"], ("y", "x"), strict=True):
        written = tmp_path / "coco/train" / image["file_name"]
        assert written.read_bytes() == (tmp_path / f"in/{folder}/s.jpg").read_bytes()
    with pytest.raises(FileNotFoundError, match="1 tasks whose image is in several folders"):
        convert(task(1, "s.jpg", box("car")), tmp="again")


@pytest.mark.parametrize(
    ("file", "url"),
    [
        ("my photo (1).jpg", "/data/upload/1/0a1b2c3d-my_photo_1.jpg"),
        ("a+b.jpg", "/data/local-files/?d=a%2Bb.jpg"),
        ("a+b.jpg", "/data/local-files/?other=1&d=a+b.jpg"),
        ("50%20.jpg", "/data/local-files/?d=50%2520.jpg"),
        ("50%20.jpg", "s3://bucket/50%20.jpg"),
        ("img#1.jpg", "gs://bucket/img#1.jpg"),
    ],
)
def test_images_are_found_by_their_escaped_names(convert, tmp_path, file, url):
    write_image(tmp_path / "in" / file)
    content, _ = convert({**task(1, "", box("car")), "data": {"title": "a photo", "photo": url}})
    assert [image["file_name"] for image in content["images"]] == [file]
