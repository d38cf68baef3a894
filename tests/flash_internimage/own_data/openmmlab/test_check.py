"""Tests of checking datasets for detection and segmentation."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flash_internimage.own_data.check import Options, check_dataset, draw_sheet
from tests.flash_internimage.own_data.datasets import (
    HEIGHT,
    WIDTH,
    annotation,
    to_coco,
    to_label_maps,
    write_coco,
    write_image,
    write_json,
    write_text,
)

# Configs without the shipped bases, which take a second to read.
DETECTION = """
custom_imports = dict(imports=["flash_internimage.openmmlab.detection"])
default_scope = "mmdet"
model = dict(type="MaskRCNN")
steps = [dict(type="LoadReadableImage")]
steps += [dict(type="LoadAnnotations", with_bbox=True, with_mask=True)]
data = dict(
    type="CheckedCocoDataset",
    data_root="{root}/",
    metainfo=dict(classes={classes}),
    pipeline=[*steps, dict(type="PackDetInputs")],
)
train = dict(filter_cfg=dict(filter_empty_gt=True), **data)
train_dataloader = dict(
    dataset=dict(ann_file="{folder}train.json", data_prefix=dict(img="{train}"), **train)
)
val_dataloader = dict(
    dataset=dict(
        ann_file="{folder}val.json", data_prefix=dict(img="{val}"), test_mode=True, **data
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CheckedCocoMetric", ann_file="{root}/{folder}val.json", metric="segm")
test_evaluator = val_evaluator
"""
SEGMENTATION = """
custom_imports = dict(imports=["flash_internimage.openmmlab.segmentation"])
default_scope = "mmseg"
model = dict(type="EncoderDecoder")
data = dict(
    type="CheckedSegDataset",
    data_root="{root}/",
    metainfo=dict(classes={classes}),
    ignore_index={ignored},
    pipeline=[],
)
folders = dict(img_path="images/train", seg_map_path="annotations/train")
train_dataloader = dict(dataset=dict(data_prefix=folders, **data))
folders = dict(img_path="images/val", seg_map_path="annotations/val")
val_dataloader = dict(dataset=dict(data_prefix=folders, test_mode=True, **data))
"""


@pytest.fixture
def coco(tmp_path):
    """Return a dataset of two training images and one for validation, and its config."""
    for i in (1, 2, 3):
        write_image(tmp_path / f"images/{i}.jpg", i)
    objects = [annotation(1, 1, 2, 3, 10, 10), annotation(1, 2, 20, 3, 10, 10)]
    write_coco(tmp_path / "train.json", ["1.jpg", "2.jpg"], objects)
    write_coco(tmp_path / "val.json", ["3.jpg"], objects[:1])
    text = DETECTION.format(
        root=tmp_path, classes=("a", "b"), folder="", train="images/", val="images/"
    )
    write_text(tmp_path / "config.py", text)
    return tmp_path


def check(root: Path, **options):
    """Return the report on config.py, and its faults as (split, kind, message)."""
    report = check_dataset(root / "config.py", Options(**options)).report
    return report, [(fault.split, fault.kind, fault.message) for fault in report.faults]


def test_a_correct_dataset_is_counted(coco):
    findings = check_dataset(coco / "config.py", Options(pictures=True))
    train, val = findings.report.splits
    assert not findings.report.faults
    assert (train.images, val.images) == (2, 1)
    assert dict(train.counts) == {"a": 1, "b": 1}
    assert dict(val.images_with) == {"a": 1}
    assert (train.empty, val.empty) == (["2.jpg"], [])
    assert train.sizes == {(HEIGHT, WIDTH): 2}
    assert train.notes[0].startswith(f"{coco}/train.json: 1 images, 2 objects and 0 crowds; left")
    assert draw_sheet(findings).shape[2] == 3
    assert [caption for _, caption in findings.pictures] == ["train: 1.jpg (2)", "val: 3.jpg (1)"]


def test_all_malformed_annotations_are_listed_with_the_lines_of_training(coco):
    wrong = [{**annotation(1, 1, 2, 3, 4, 5), "area": None}, annotation(9, 1, 2, 3, 4, 5)]
    write_coco(coco / "train.json", ["1.jpg"], [*wrong, annotation(1, 7, 2, 3, 4, 5)])
    _, faults = check(coco)
    start = f"{coco}/train.json: image"
    assert faults == [
        ("train", "malformed annotations", message)
        for message in (
            f"{start} 1 (1.jpg), annotation 1: area must be a finite number, got None",
            f"{start} 9, annotation 2: image_id must be the id of an image in the file, got 9",
            f"{start} 1 (1.jpg), annotation 3: category_id must be the id of a category in the "
            "file, got 7",
        )
    ]


def test_all_doubtful_boxes_and_files_are_listed(coco):
    objects = [
        annotation(1, 1, 50, 3, 5, 5),  # outside
        annotation(1, 1, 2, 3, 0.5, 5),
        annotation(1, 1, 30, 3, 20, 5),  # ends at 50 of 40
        {**annotation(1, 1, 2, 3, 5, 5), "bbox": [20, 20, 5, 5]},
        {**annotation(1, 1, 2, 3, 5, 5), "area": 1000},
        {**annotation(1, 1, 2, 3, 5, 5), "ignore": 1},
        annotation(2, 1, 2, 3, 5, 5),
        annotation(4, 2, 2, 3, 5, 5),
    ]
    write_coco(coco / "train.json", ["1.jpg", "2.jpg", "4.jpg", "5.jpg"], objects)
    write_image(coco / "images/4.jpg", size=(20, 20))
    write_text(coco / "images/2.jpg", "no image")
    report, faults = check(coco)
    assert [(split, kind) for split, kind, _ in faults] == [
        ("train", "boxes outside of their image"),
        ("train", "annotations without an area or a pixel"),
        ("train", "boxes that extend beyond their image"),
        ("train", "masks that hardly overlap their box"),
        ("train", "areas larger than the box"),
        ("train", "missing images"),
        ("train", "unreadable images"),
        ("train", "unreadable images"),
    ]
    messages = [message for *_, message in faults]
    assert messages[0] == ("image 1 (1.jpg, 40 x 30), annotation 1: bbox [50, 3, 5, 5], area 25")
    assert messages[5] == f"{coco}/images/5.jpg does not exist"
    assert messages[6].startswith(f"cannot read image {coco}/images/2.jpg: ")
    assert messages[7] == (
        f"image {coco}/images/4.jpg has (height, width) (20, 20), but its annotations (30, 40)"
    )
    assert report.splits[0].extra["annotations with ignore=1"] == 1
    _, by_header = check(coco, decode=False)
    assert [kind for _, kind, _ in by_header] == [kind for _, kind, _ in faults]


def test_what_only_evaluation_refuses_is_a_fault_of_the_validation_split(coco):
    (coco / "images/3.jpg").unlink()
    _, faults = check(coco)
    assert faults == [("val", "missing images", f"{coco}/images/3.jpg does not exist")]


def test_classes_and_missing_files_that_training_refuses(coco):
    text = (coco / "config.py").read_text()
    write_text(coco / "config.py", text.replace("('a', 'b')", "('b', 'a')"))
    _, faults = check(coco)
    refused = f"ann_file {coco}/train.json: metainfo['classes'] must list categories of the file in"
    assert faults[0][:2] == ("train", "training refuses")
    assert faults[0][2].startswith(refused)
    write_text(coco / "config.py", text.replace("train.json", "nowhere.json"))
    _, faults = check(coco)
    assert faults == [("train", "training refuses", f"ann_file not found: {coco}/nowhere.json")]


def test_objects_without_masks_are_all_listed(coco):
    boxes = [annotation(1, 1, 2, 3, 4, 5), annotation(1, 1, 2, 3, 6, 5)]
    for box in boxes:
        del box["segmentation"]
    write_coco(coco / "val.json", ["3.jpg"], boxes)
    _, faults = check(coco)
    assert faults == [
        ("val", "objects without a mask",
         f"image 1 (3.jpg), annotation {i}: segmentation must be present")
        for i in (1, 2)
    ]  # fmt: skip


def test_duplicates_across_splits_and_unlisted_images(coco):
    (coco / "images/3.jpg").write_bytes((coco / "images/1.jpg").read_bytes())
    write_image(coco / "images/7.jpg", 7)
    report, faults = check(coco, similar=1)
    path = f"{coco}/images"
    assert faults == [
        ("train and val", "identical images in several splits",
         f"{path}/1.jpg (train) = {path}/3.jpg (val)")
    ]  # fmt: skip
    assert report.splits[1].notes[-1].endswith(f"in no annotation file, the first: {path}/7.jpg")


def test_reports_are_written_as_json_and_csv(coco, tmp_path):
    write_text(coco / "images/2.jpg", "no image")
    report, faults = check(coco)
    report.write(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["task"] == "detection"
    assert content["splits"][0]["counts"] == {"a": 1, "b": 1}
    assert content["splits"][1]["sizes"] == [{"height": HEIGHT, "width": WIDTH, "images": 1}]
    assert content["faults"] == [dict(zip(("split", "kind", "message"), faults[0], strict=True))]
    assert (tmp_path / "classes.csv").read_text() == (
        "class,train objects,train images,val objects,val images\na,1,1,1,1\nb,1,1,0,0\n"
    )
    assert (tmp_path / "faults.csv").read_text().startswith("split,kind,message\ntrain,unreadable")
    text = report.text()
    assert "a                  1             1            1           1\n" in text
    assert "1 fault\nunreadable images (1):\n  train: cannot read image " in text


@pytest.fixture
def maps(tmp_path):
    """Return images and label maps of the classes 0 and 1, 11 being ignored, and their config."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:10], labels[10:15] = 1, 11
    for split, names in (("train", "ab"), ("val", "c")):
        for name in names:
            write_image(tmp_path / f"images/{split}/{name}.jpg", ord(name))
            path = tmp_path / f"annotations/{split}/{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(path)
    text = SEGMENTATION.format(root=tmp_path, classes=("ground", "leaf"), ignored=11)
    write_text(tmp_path / "config.py", text)
    return tmp_path


def test_pixels_of_label_maps_are_counted_without_ignored_ones(maps):
    findings = check_dataset(maps / "config.py", Options(pictures=True))
    train, val = findings.report.splits
    assert not findings.report.faults
    assert dict(train.counts) == {"ground": 2 * 15 * WIDTH, "leaf": 2 * 10 * WIDTH}
    assert dict(val.images_with) == {"ground": 1, "leaf": 1}
    assert (train.unit, train.images, val.images) == ("pixels", 2, 1)
    assert train.sizes == {(HEIGHT, WIDTH): 2}
    assert len(findings.pictures) == 3


def test_all_faults_of_label_maps_are_listed_with_the_lines_of_training(maps):
    train = maps / "annotations/train"
    Image.fromarray(np.full((HEIGHT, WIDTH), 5, np.uint8)).save(train / "a.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(train / "b.png")
    for name in "defg":
        write_image(maps / f"images/train/{name}.jpg", ord(name))
    write_text(maps / "images/train/g.jpg", "no image")
    write_text(train / "d.png", "no image")
    write_image(train / "e.png")
    Image.fromarray(np.ones((HEIGHT, WIDTH), np.uint8)).save(train / "g.png")
    Image.fromarray(np.ones((HEIGHT, WIDTH), np.uint8)).save(train / "z.png")
    _, faults = check(maps)
    other = "unreadable label maps, or of another size than their image"
    assert [(kind, message.split(":")[0].split(" has ")[0]) for _, kind, message in faults] == [
        ("missing label maps", f"{train}/f.png does not exist"),
        ("label maps without an image", f"{train}/z.png"),
        ("label values", f"label map {train}/a.png"),
        (other, f"label map {train}/b.png"),
        (other, f"cannot read image {train}/d.png"),
        ("label values", f"label map {train}/e.png must have one channel that contains class "
         "indices, got an array of shape (30, 40, 3)"),
        ("unreadable images", f"cannot read image {maps}/images/train/g.jpg"),
    ]  # fmt: skip
    assert faults[2][2] == (
        f"label map {train}/a.png has invalid values [5]; with 2 classes and "
        "reduce_zero_label=False, 0 to 1 are classes; ignored: 11, 255"
    )


def test_label_maps_that_are_all_ignored_are_refused(maps):
    for name in "ab":
        full = Image.fromarray(np.full((HEIGHT, WIDTH), 11, np.uint8))
        full.save(maps / f"annotations/train/{name}.png")
    report, faults = check(maps)
    message = f"the label maps of {maps}/images/train contain only ignored pixels"
    assert faults == [("train", "training refuses", message)]
    assert report.splits[0].empty == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("kind", ["yolo", "voc", "labelme", "labelstudio"])
def test_converted_datasets_have_no_faults(kind, tmp_path):
    root = tmp_path / "in"
    for i in range(4):
        write_image(root / f"images/{i}.jpg", i)
    corners = [[25, 20], [75, 20], [75, 80], [25, 80]]  # percent
    if kind == "yolo":
        line = "0 " + " ".join(str(number / 100) for point in corners for number in point)
        for i in range(4):
            write_text(root / f"labels/{i}.txt", line)
        write_text(root / "classes.txt", "leaf\n")
    elif kind == "voc":
        (root / "images").rename(root / "JPEGImages")
        bounds = "<xmin>11</xmin><ymin>7</ymin><xmax>30</xmax><ymax>24</ymax>"
        for i in range(4):
            item = f"<object><name>leaf</name><bndbox>{bounds}</bndbox></object>"
            write_text(root / f"Annotations/{i}.xml", f"<annotation>{item}</annotation>")
    elif kind == "labelme":
        points = [[x * WIDTH / 100, y * HEIGHT / 100] for x, y in corners]
        for i in range(4):
            shapes = [{"label": "leaf", "points": points, "shape_type": "polygon"}]
            write_json(root / f"images/{i}.json", {"shapes": shapes, "imagePath": f"{i}.jpg"})
    else:
        value = {"points": corners, "polygonlabels": ["leaf"]}
        result = [{"type": "polygonlabels", "value": value}]
        tasks = [
            {"id": i, "data": {"image": f"{i}.jpg"}, "annotations": [{"result": result}]}
            for i in range(4)
        ]
        write_json(root / "export.json", tasks)
    options = {"val_fraction": 0.5, "boxes_as_masks": kind == "voc"}
    files, _ = to_coco(kind, root, tmp_path / "coco", **options)
    assert [a["bbox"] for a in files["train"]["annotations"]] == [[10.0, 6.0, 20.0, 18.0]] * 2
    root = tmp_path / "coco"
    text = DETECTION.format(
        root=root, classes=("leaf",), folder="annotations/instances_", train="train/", val="val/"
    )
    write_text(root / "config.py", text)
    report, faults = check(root)
    assert not faults
    assert [dict(split.counts) for split in report.splits] == [{"leaf": 2}, {"leaf": 2}]
    if kind == "voc":
        return  # whose label maps have a test of their own
    to_label_maps(kind, tmp_path / "in", tmp_path / "maps", **options)
    root = tmp_path / "maps"
    text = SEGMENTATION.format(root=root, classes=("background", "leaf"), ignored=255)
    write_text(root / "config.py", text)
    report, faults = check(root)
    assert not faults
    assert dict(report.splits[0].counts) == {"background": 2 * 840, "leaf": 2 * 360}


def test_errors_of_settings_name_the_option(coco):
    with pytest.raises(ValueError, match=r"--set trian_dataloader\.x: unknown key"):
        check(coco, overrides={"trian_dataloader.x": 1})


def test_names_of_several_lines_do_not_break_the_table(coco):
    for split in ("train", "val"):
        content = (coco / f"{split}.json").read_text()
        write_text(coco / f"{split}.json", content.replace('"name": "a"', '"name": "a\\nc"'))
    text = (coco / "config.py").read_text()
    write_text(coco / "config.py", text.replace("('a', 'b')", "('a\\nc', 'b')"))
    report, _ = check(coco)
    assert "\na c                1" in report.text()
