"""Tests of the configs that `dataset config` writes, as text."""

import ast
import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from flash_internimage.own_data.config_coco import coco_config
from flash_internimage.own_data.config_folder import folder_config
from flash_internimage.own_data.config_label_maps import label_map_config
from flash_internimage.own_data.models import find_base_model, list_base_models
from flash_internimage.own_data.schedules import (
    classification_epochs,
    detection_schedule,
    segmentation_schedule,
)

from .datasets import annotation, write_coco, write_image, write_json, write_text

MASK_RCNN, DINO = (find_base_model(name, "detection") for name in ("mask_rcnn-t", "dino-t"))
UPERNET = find_base_model("upernet-t", "segmentation")


def literals(text: str) -> dict:
    """Return the top-level settings of a config that are literals."""
    found = {}
    for node in ast.parse(text).body:
        try:
            found[node.targets[0].id] = ast.literal_eval(node.value)
        except ValueError:
            continue
    return found


@pytest.fixture
def coco(tmp_path):
    """Return a dataset with 2 training and 1 validation images of the classes nut and bolt."""
    for split, images in (("train", ["1.jpg", "2.jpg"]), ("val", ["3.jpg"])):
        for name in images:
            write_image(tmp_path / f"images/{name}")
        objects = [annotation(1, 1, 2, 3, 10, 10), annotation(1, 2, 2, 3, 10, 10)]
        write_coco(tmp_path / f"{split}.json", images, objects, ("nut", 'a "bolt"'))
    return tmp_path


def test_models_are_named_by_architecture_and_size():
    names = {*list_base_models("detection"), *list_base_models("segmentation")}
    assert {"cascade_mask_rcnn-l", "dino-s", "mask2former-b", "mask_rcnn-nano"} <= names
    assert {"mask_rcnn-internimage-b", "dino-internimage-l", "upernet-internimage-h"} <= names
    assert MASK_RCNN.config == "detection/mask_rcnn_flash_internimage_t_fpn_1x_coco.py"
    assert MASK_RCNN.weights.endswith("/mask_rcnn_flash_internimage_t_fpn_1x_coco.pth")
    assert (MASK_RCNN.batch_size, DINO.batch_size) == (2, 4)
    assert find_base_model("dino-nano", "detection").is_demo
    with pytest.raises(
        ValueError, match=r"--model must be one of .* got upernet-x; did you mean up"
    ):
        find_base_model("upernet-x", "segmentation")


def test_every_released_model_has_weights():
    models = [*list_base_models("detection").values(), *list_base_models("segmentation").values()]
    assert [model.name for model in models if model.is_demo] == [
        "dino-nano", "mask_rcnn-nano", "mask2former-nano", "upernet-nano",
    ]  # fmt: skip


def test_classes_are_in_the_order_of_the_file(coco):
    settings = literals(coco_config(coco, MASK_RCNN))
    assert settings["classes"] == ("nut", 'a "bolt"')
    assert settings["data_root"] == f"{coco}/"
    assert settings["load_from"] == MASK_RCNN.weights
    assert settings["_base_"] == f"flash_internimage::{MASK_RCNN.config}"
    assert 'ann_file="train.json",\n        data_prefix=dict(img="images/")' in coco_config(
        coco, DINO
    )


@pytest.mark.parametrize(
    ("ann_file", "image", "found"),
    [
        ("annotations/instances_{}.json", "{}/1.jpg",
         ("annotations/instances_train.json", "train/")),
        ("annotations/instances_{}2017.json", "{}2017/1.jpg",
         ("annotations/instances_train2017.json", "train2017/")),
        ("{}/_annotations.coco.json", "{}/1.jpg", ("train/_annotations.coco.json", "train/")),
        ("{}.json", "1.jpg", ("train.json", "")),
        ("annotations/{}.json", "images/{}/1.jpg", ("annotations/train.json", "images/train/")),
    ],
)  # fmt: skip
def test_usual_layouts_are_found(tmp_path, ann_file, image, found):
    for split in ("train", "val"):
        write_image(tmp_path / image.format(split))
        write_coco(tmp_path / ann_file.format(split), ["1.jpg"], [annotation(1, 1, 2, 3, 4, 5)])
    text = coco_config(tmp_path, MASK_RCNN)
    assert f'ann_file="{found[0]}",\n        data_prefix=dict(img="{found[1]}")' in text


def test_annotation_files_can_be_named(coco):
    (coco / "train.json").rename(coco / "march.json")
    with pytest.raises(FileNotFoundError, match=r"must contain train\.json .*got march\.json, val"):
        coco_config(coco, MASK_RCNN)
    assert 'ann_file="march.json"' in coco_config(coco, MASK_RCNN, train=coco / "march.json")


def test_annotation_files_can_be_elsewhere(coco, tmp_path_factory):
    other = (coco / "val.json").rename(tmp_path_factory.mktemp("other") / "val.json")
    text = coco_config(coco, MASK_RCNN, val=other)
    assert text.count(f'ann_file="{other}"') == 2
    assert literals(text.replace("dict(ann_file=", "("))["val_evaluator"] == str(other)


def test_splits_must_have_the_same_categories(coco):
    write_coco(coco / "val.json", ["3.jpg"], [annotation(1, 1, 2, 3, 4, 5)], ("bolt", "nut"))
    with pytest.raises(ValueError, match=r"val\.json must have the categories of train\.json"):
        coco_config(coco, MASK_RCNN)


def test_boxes_without_masks_need_a_detector_without_masks(coco):
    boxes = [{**annotation(1, 1, 2, 3, 4, 5), "segmentation": []}] * 2
    write_coco(coco / "train.json", ["1.jpg"], boxes, ("nut", 'a "bolt"'))
    with pytest.raises(ValueError, match=r"without masks, such as dino-t, .* 2 annotations 2 have"):
        coco_config(coco, MASK_RCNN)
    assert "bbox_head=dict(num_classes=2)" in coco_config(coco, DINO)


def test_images_that_do_not_exist_are_an_error(coco):
    (coco / "images").rename(coco / "pictures")
    with pytest.raises(FileNotFoundError, match=r"train\.json: image 1\.jpg not found in "):
        coco_config(coco, MASK_RCNN)


def test_schedules_of_small_datasets_have_more_epochs_and_a_shorter_warm_up():
    assert detection_schedule(118_287, 2, "mask_rcnn") is None
    text = detection_schedule(200, 2, "mask_rcnn")
    assert "max_epochs=30, val_interval=2" in text
    assert "milestones=[20, 28]" in text
    assert "end=300)" in text
    assert "milestones=[28]" in detection_schedule(200, 2, "dino")
    assert "max_epochs=100" in detection_schedule(10, 2, "dino")
    assert "max_iters=20000, val_interval=2000" in segmentation_schedule(400, 2)
    assert "end=501)" in segmentation_schedule(400, 2)
    assert "interval=200" in segmentation_schedule(10, 2)
    assert "max_iters=160000" in segmentation_schedule(20_210, 2)
    assert [classification_epochs(n, 64) for n in (100, 4000, 10**6)] == [100, 48, 30]


@pytest.fixture
def maps(tmp_path):
    """Write label maps with these values in columns of ten pixels, and return the root."""

    def write(*values: int, layout="images/{0} annotations/{0}", image="{}.jpg", label="{}.png"):
        labels = np.repeat(np.array(values, np.uint8), 10)[None].repeat(30, 0)
        images, annotations = layout.split()
        for split in ("train", "val"):
            name = image.format(split)
            write_image(tmp_path / images.format(split) / name, size=labels.shape)
            folder = tmp_path / annotations.format(split)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(folder / label.format(split))
        return tmp_path

    return write


def test_classes_are_named_after_the_values_or_by_a_file(maps, caplog):
    root = maps(0, 2, 255)
    assert literals(label_map_config(root, UPERNET))["classes"] == ("class 0", "class 1", "class 2")
    assert "3 classes are named after the values" in caplog.text
    assert "no pixels of class 1" in caplog.text
    write_text(root / "classes.txt", "ground\nleaf\nstem\n")
    assert literals(label_map_config(root, UPERNET))["classes"] == ("ground", "leaf", "stem")
    given = label_map_config(root, UPERNET, ["a", "b", "c", "d"])
    assert literals(given)["classes"] == ("a", "b", "c", "d")
    assert given.count("num_classes=4") == 2


def test_another_ignore_index_is_one_setting(maps):
    text = label_map_config(maps(0, 1, 11), UPERNET, ["a", "b"], ignore_index=11)
    assert text.count("11") == 1
    assert "    ignore_index=11,\n" in text
    assert "ignore_index=" not in label_map_config(maps(0, 1, 255), UPERNET, ["a", "b"])
    with pytest.raises(
        ValueError, match=r"0 to 1 of the 2 classes or 255 .*--ignore-index.* got 11"
    ):
        label_map_config(maps(0, 1, 11), UPERNET, ["a", "b"])
    with pytest.raises(ValueError, match="--ignore-index must not be the index of a class, got 1"):
        label_map_config(maps(0, 1), UPERNET, ["a", "b"], ignore_index=1)


def test_labels_that_start_at_1_need_an_option(maps):
    root = maps(0, 1, 2)
    with pytest.raises(ValueError, match="got 2; --reduce-zero-label if 1 is the first class"):
        label_map_config(root, UPERNET, ["a", "b"])
    text = label_map_config(root, UPERNET, ["a", "b"], reduce_zero_label=True)
    assert "    reduce_zero_label=True,\n" in text


@pytest.mark.parametrize("values", [(0, 255), (255,), (7,)])
def test_fewer_than_two_classes_are_an_error(maps, values):
    with pytest.raises(ValueError, match="must contain the indices of at least 2 classes, got"):
        label_map_config(maps(*values), UPERNET)


def test_colored_label_maps_are_an_error(maps):
    root = maps(0, 1)
    write_image(root / "annotations/train/train.png")
    with pytest.raises(ValueError, match=r"train\.png must have one channel"):
        label_map_config(root, UPERNET)


@pytest.mark.parametrize(
    ("layout", "prefix"),
    [
        ("img_dir/{0} ann_dir/{0}", 'img_path="img_dir/val", seg_map_path="ann_dir/val"'),
        ("{0}/images {0}/masks", 'img_path="val/images", seg_map_path="val/masks"'),
        ("images/{0} labels/{0}", 'img_path="images/val", seg_map_path="labels/val"'),
    ],
)
def test_usual_folders_of_label_maps_are_found(maps, layout, prefix):
    text = label_map_config(maps(0, 1, layout=layout), UPERNET)
    assert f"dict({prefix}), **data)" in text
    assert "_suffix=" not in text


def test_suffixes_are_those_of_the_files(maps):
    root = maps(0, 1, image="{}_left.png", label="{}_left_ids.png")
    text = label_map_config(root, UPERNET)
    assert 'img_suffix=".png",\n    seg_map_suffix="_ids.png"' in text


def test_two_suffixes_are_an_error(maps):
    maps(0, 1)
    root = maps(0, 1, image="{}2.png", label="{}2.png")
    with pytest.raises(ValueError, match=r"must have one suffix each, got 1 of \.jpg and \.png, 1"):
        label_map_config(root, UPERNET)


def test_folders_that_are_not_found_are_an_error(tmp_path):
    write_image(tmp_path / "pictures/1.jpg")
    message = r"must contain images/train and annotations/train, .* got the folders pictures"
    with pytest.raises(FileNotFoundError, match=message):
        label_map_config(tmp_path, UPERNET)


def test_class_folders(tmp_path):
    for split, count in (("training", 3), ("validation", 1)):
        for name in ("rose", "tulip"):
            for i in range(count):
                write_image(tmp_path / f"{split}/{name}/{i}.jpg", i)
    text = folder_config(tmp_path, "flash_internimage_large.in22k_ft_in1k_384", "flowers")
    content = yaml.safe_load(text)
    assert text.startswith("# 6 images of 2 classes\n")
    assert content["output"] == "output/flowers"
    assert content["model"] == {
        "name": "flash_internimage_large",
        "num_classes": 2,
        "initial_checkpoint": "flash_internimage_large.in22k_ft_in1k_384",
    }
    assert content["data"] == {
        "root": str(tmp_path), "train_split": "training", "val_split": "validation",
        "image_size": 384,
    }  # fmt: skip
    assert content["batch_size"] == 6
    assert "initial_checkpoint" not in folder_config(tmp_path, "flash_internimage_nano", "x")
    with pytest.raises(FileNotFoundError, match="must contain the folder train with a folder for"):
        folder_config(tmp_path / "training", "flash_internimage_nano", "x")


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("internimge_tiny.in1k", "; did you mean internimage_tiny.in1k?"),
        ("mask_rcnn_internimage_t_fpn_1x_coco", ""),
        ("convnext_tiny.fb_in1k", ""),  # weights that no recipe loads
        ("flash_internimage_tny", "; did you mean flash_internimage_tiny?"),
    ],
)
def test_other_classifiers_are_an_error(model, hint, tmp_path):
    message = r"--model must be flash_internimage_tiny\.in1k, .*, or an architecture of timm, got "
    with pytest.raises(ValueError, match=message + re.escape(model + hint)):
        folder_config(tmp_path, model, "x")


def test_names_that_mmengine_would_substitute_are_kept(coco):
    names = ("{{ fileDirname }}", "{{_base_.model}}", "{{{x", "é\"'")
    for split, image in (("train", "1.jpg"), ("val", "3.jpg")):
        write_coco(coco / f"{split}.json", [image], [annotation(1, 1, 2, 3, 10, 10)], names)
    text = coco_config(coco, MASK_RCNN)
    assert literals(text)["classes"] == names
    assert "{{" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"categories": [{"id": 1, "name": "a\nb"}]}, "must be text without control characters"),
        ({"categories": [{"id": 1, "name": "\ud800"}]}, "must be text without control characters"),
        ({"images": [{"id": 1, "file_name": "x" * 5000}]}, "image x{100} not found in "),
    ],
)
def test_names_that_cannot_be_written_are_an_error(coco, content, message):
    for split in ("train", "val"):
        path = coco / f"{split}.json"
        write_json(path, {**json.loads(path.read_text()), **content})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        coco_config(coco, DINO)


def test_annotation_files_that_training_cannot_read_are_an_error(coco):
    text = (coco / "train.json").read_text()
    (coco / "train.json").write_text(text, "utf-8-sig")
    with pytest.raises(ValueError, match=r"train\.json must be a JSON file in UTF-8"):
        coco_config(coco, DINO)


def test_more_classes_than_values_of_a_byte_are_an_error(maps):
    with pytest.raises(ValueError, match=r"classes must be at most 255, .* got 256"):
        label_map_config(maps(0, 1), UPERNET, [str(i) for i in range(256)])
