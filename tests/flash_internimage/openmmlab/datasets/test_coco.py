"""Test COCO datasets with flawed annotations and images."""

import json
import logging
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from flash_internimage.images import UnreadableImage
from flash_internimage.openmmlab.detection import CheckedCocoDataset, CheckedCocoMetric

CLASSES = ("cat", "dog")
CATEGORIES = ((7, "cow"), (1, "cat"), (2, "dog"))
SIDE = 20
PIPELINE = [{"type": "LoadReadableImage"}]


def both_modes(function):
    return pytest.mark.parametrize("test_mode", [False, True], ids=["train", "test"])(function)


def box(image_id: int, bbox: list[float], category: int = 1, **kwargs) -> dict:
    area = bbox[2] * bbox[3]
    return {"image_id": image_id, "bbox": bbox, "category_id": category, "area": area, **kwargs}


@pytest.fixture
def write(tmp_path):
    """Write images 1 to n and annotations, and return the arguments of the dataset."""

    def write(annotations: list[dict], images: int = 3, **kwargs) -> dict:
        for i in range(1, images + 1):
            Image.fromarray(np.full((SIDE, SIDE, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE}
                for i in range(1, images + 1)
            ],
            "annotations": [{"id": i, "iscrowd": 0, **a} for i, a in enumerate(annotations, 1)],
            "categories": [
                {"id": 7, "name": "cow"},
                {"id": 1, "name": "cat"},
                {"id": 2, "name": "dog"},
            ],
            **kwargs,
        }
        (tmp_path / "annotations.json").write_text(json.dumps(content))
        return {
            "ann_file": "annotations.json",
            "data_root": str(tmp_path),
            "data_prefix": {"img": ""},
            "metainfo": {"classes": CLASSES},
            "filter_cfg": {"filter_empty_gt": True, "min_size": 8},
            "pipeline": PIPELINE,
        }

    return write


def test_unusable_objects_are_left_out_and_counted(write, log):
    arguments = write(
        [
            box(1, [2, 2, 5, 5]),
            box(1, [2, 2, 9, 9], category=2, iscrowd=1),
            box(1, [2, 2, 0, 5]),  # no area
            box(1, [25, 2, 5, 5]),  # outside
            box(1, [2, 2, 5, 5], category=7),  # unknown category
            box(1, [2, 2, 5, 5], ignore=1),
            box(2, [-3, 2, 5, 5]),  # partly outside
        ]
    )
    dataset = CheckedCocoDataset(**arguments)
    assert [info["img_id"] for info in dataset] == [1, 2]
    labels = [(i["bbox_label"], i["ignore_flag"]) for i in dataset[0]["instances"]]
    assert labels == [(0, 0), (1, 1)]
    message = (
        "2 images, 2 objects and 1 crowds; left out: 0 missing images, 0 with too many objects, 1 "
        "without objects and 0 smaller than min_size; 1 annotations "
        "outside their image, 1 without an area or a pixel, 1 of other categories and 1 with "
        "ignore=1"
    )
    assert message in log.text
    assert "1 of the 7 annotations extend beyond their image" in log.text


def test_missing_images_are_left_out_of_training(write, tmp_path, log):
    arguments = write([box(i, [2, 2, 5, 5]) for i in (1, 2, 3)])
    (tmp_path / "2.png").unlink()
    assert [info["img_id"] for info in CheckedCocoDataset(**arguments)] == [1, 3]
    assert "left out: 1 missing images" in log.text
    (record,) = [r for r in log.records if "left out: " in r.getMessage()]
    assert record.levelno == logging.WARNING


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_a_test_requires_all_images(content, write, tmp_path):
    arguments = write([box(i, [2, 2, 5, 5]) for i in (1, 2, 3)])
    (tmp_path / "2.png").unlink()
    if content is not None:
        (tmp_path / "2.png").write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 images .*first: .*2\.png"):
        CheckedCocoDataset(**arguments, test_mode=True)


def test_a_wrong_image_folder_is_an_error_in_training_too(write):
    arguments = write([box(1, [2, 2, 5, 5])]) | {"data_prefix": {"img": "nowhere/"}}
    with pytest.raises(FileNotFoundError, match=r"3 of the 3 images"):
        CheckedCocoDataset(**arguments)


def test_a_missing_annotation_file(write, tmp_path):
    arguments = write([]) | {"ann_file": "none.json"}
    with pytest.raises(FileNotFoundError, match=rf"ann_file not found: {tmp_path}/none.json"):
        CheckedCocoDataset(**arguments)


DAMAGED = ["", "{", "[]", "{}", '{"images": [{"id": 1}]}', "[" * 100_000, '{"images": \udcff}']


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_annotation_file(content, write, tmp_path):
    arguments = write([])
    (tmp_path / "annotations.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"^ann_file .*annotations.json: .+$"):
        CheckedCocoDataset(**arguments)
    with pytest.raises(ValueError, match=r"^ann_file of the evaluator .*annotations.json: .+$"):
        CheckedCocoMetric(str(tmp_path / "annotations.json"))


@both_modes
def test_annotations_are_checked_at_the_start(test_mode, write):
    arguments = write([box(1, [2, 2, 5, 5]), {"image_id": 2, "category_id": 1, "area": 1}])
    message = r"annotations.json: image 2 \(2.png\), annotation 2: bbox must be .*, got nothing"
    with pytest.raises(ValueError, match=message):
        CheckedCocoDataset(**arguments, test_mode=test_mode)


@pytest.mark.parametrize("first", [0, "a"])
def test_ids_that_the_evaluation_does_not_support(first, write, tmp_path):
    arguments = write([box(1, [2, 2, 5, 5], id=first)])
    message = rf"annotation {first!r}: id must be a unique integer of at least 1"
    with pytest.raises(ValueError, match=message):
        CheckedCocoDataset(**arguments, test_mode=True)
    with pytest.raises(ValueError, match=message):
        CheckedCocoMetric(str(tmp_path / "annotations.json"))


def test_duplicate_image_ids(write):
    arguments = write([box(1, [2, 2, 5, 5])], images=2)
    path = f"{arguments['data_root']}/annotations.json"
    with open(path) as file:
        content = json.load(file)
    content["images"][1]["id"] = 1
    with open(path, "w") as file:
        json.dump(content, file)
    with pytest.raises(ValueError, match=r"image 1 \(2.png\): id must be unique, got 1 again"):
        CheckedCocoDataset(**arguments)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([box(i, [2, 2, 5, 5]) for i in (1, 2, 3)], None),
        ([box(i, [0, 0, SIDE, SIDE], area=1) for i in (1, 2, 3)], None),
        ([box(i, [12, 12, 17, 17]) for i in (1, 2, 3)], "3 of the 3 annotations extend beyond"),
        (
            [box(i, [2, 2, 5, 5], area=SIDE**2) for i in (1, 2, 3)],
            "3 of the 3 annotations have an area larger than their box",
        ),
        ([box(1, [2, 2, 5, 5])], "2 without objects and 0 smaller"),
        ([box(i, [2, 2, 5, 5], category=i + i // 3 * 4) for i in (1, 2, 3)], "1 of other categ"),
    ],
)
def test_many_unusable_objects_are_a_warning(annotations, message, write, log):
    CheckedCocoDataset(**write(annotations))
    warnings = [r.getMessage() for r in log.records if r.levelno == logging.WARNING]
    assert len(warnings) == (message is not None)
    assert (message or "") in "".join(warnings)


def test_few_unusable_objects_are_not_a_warning(write, log):
    objects = [box(i % 3 + 1, [2, 2, 5, 5]) for i in range(200)]
    CheckedCocoDataset(**write([*objects, box(1, [2, 2, 0, 5]), box(1, [15, 2, 9, 5])]))
    assert "1 without an area or a pixel" in log.text
    assert not [r for r in log.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("name", ["{folder}/1.png", "sub/1.png", "sub/../1.png", "./1.png"])
def test_file_names_may_contain_folders(name, write, tmp_path):
    arguments = write([box(1, [2, 2, 5, 5])], images=1)
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "sub" / "1.png")
    path = tmp_path / "annotations.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = name.format(folder=tmp_path)
    path.write_text(json.dumps(content))
    for test_mode in (False, True):
        assert len(CheckedCocoDataset(**arguments, test_mode=test_mode)) == 1


def unusable_objects() -> list[list[dict]]:
    return [
        [],
        [box(1, [2, 2, 5, 5], category=7)],
        [box(1, [2, 2, 0, 5])],
        [box(1, [2, 2, 5, 5], iscrowd=1)],
    ]


@pytest.mark.parametrize("filter_cfg", [None, {"filter_empty_gt": True}])
@pytest.mark.parametrize("annotations", unusable_objects())
def test_nothing_to_train_on(annotations, filter_cfg, write):
    arguments = write(annotations) | {"filter_cfg": filter_cfg}
    message = r"nothing to train on in .*annotations.json: \d images, 0 objects .*left out: "
    with pytest.raises(ValueError, match=message):
        CheckedCocoDataset(**arguments)
    assert len(CheckedCocoDataset(**arguments, test_mode=True)) == 3


def test_all_images_too_small(write):
    arguments = write([box(1, [2, 2, 5, 5])]) | {"filter_cfg": {"min_size": SIDE + 1}}
    with pytest.raises(ValueError, match=r"nothing to train on .* and 3 smaller than min_size"):
        CheckedCocoDataset(**arguments)


def test_class_names_are_saved_in_checkpoints(write):
    dataset = CheckedCocoDataset(**write([box(1, [2, 2, 5, 5])]))
    assert dataset.metainfo["classes"] == CLASSES


MASK = {"segmentation": [[2, 2, 7, 2, 7, 7, 2, 7]]}
WITH_MASKS = {"pipeline": [*PIPELINE, {"type": "mmdet.LoadAnnotations", "with_mask": True}]}


@pytest.mark.parametrize("second", [{}, {"segmentation": []}])
def test_objects_without_masks_are_an_error_if_masks_are_loaded(second, write):
    arguments = write([box(1, [2, 2, 5, 5], **MASK), box(2, [2, 2, 5, 5], **second)])
    assert len(CheckedCocoDataset(**arguments)) == 2
    message = r"annotations.json: image 2 \(2\.png\), annotation 2: segmentation must be present"
    with pytest.raises(ValueError, match=message):
        CheckedCocoDataset(**arguments | WITH_MASKS)


def row_lengths(mask: np.ndarray) -> list[int]:
    """Return the row-wise run lengths of a mask, zeros first; of `mask.T` as COCO stores them."""
    edges = np.flatnonzero(np.diff(mask.ravel(), prepend=0, append=0))
    return np.diff([0, *edges, mask.size]).tolist()


WIDE = np.zeros((SIDE, SIDE), np.uint8)
WIDE[2:4, 4:18] = 1  # the box [4, 2, 14, 2]
OUTLINE = np.array([4, 2, 18, 2, 18, 4, 4, 4])


@pytest.mark.parametrize(
    ("segmentation", "fits"),
    [
        ([OUTLINE.tolist()], True),
        ([[4.5, 2.5, 17.5, 2.5, 17.5, 3.5]], True),
        ([[4, 2, 8, 2, 8, 4], [12, 2, 18, 2, 18, 4], [0, 0]], True),
        ([[4, 2, 6, 2, 6, 4]], True),  # mostly hidden
        ({"size": [SIDE, SIDE], "counts": row_lengths(WIDE.T)}, True),
        ([(OUTLINE / SIDE).tolist()], False),
        ([OUTLINE.reshape(4, 2)[:, ::-1].ravel().tolist()], False),
        ([(OUTLINE + np.tile([0, 9], 4)).tolist()], False),
        ({"size": [SIDE, SIDE], "counts": row_lengths(WIDE)}, False),
        ({"size": [SIDE, SIDE], "counts": row_lengths(0 * WIDE)}, False),
    ],
)
def test_masks_that_do_not_fit_their_box_are_counted(segmentation, fits, write, log):
    masks = [segmentation]
    if isinstance(segmentation, dict):
        rle = coco_mask.frPyObjects(segmentation, SIDE, SIDE)
        masks.append({**rle, "counts": rle["counts"].decode()})
    for mask in masks:
        arguments = write([box(i, [4, 2, 14, 2], segmentation=mask) for i in (1, 2, 3)])
        log.clear()
        CheckedCocoDataset(**arguments)
        assert not [r for r in log.records if r.levelno == logging.WARNING]
        CheckedCocoDataset(**arguments | WITH_MASKS)
        message = "3 of the 3 annotations have a mask that hardly overlaps their box: are its"
        warnings = [r.getMessage() for r in log.records if r.levelno == logging.WARNING]
        assert [message in warning for warning in warnings] == [True] * (not fits)


@pytest.mark.parametrize(
    "segmentation", [[2, 2, 7, 2, 7, 7], [[2, 2, 7, 2]], {"size": [9, 9], "counts": [81]}]
)
def test_malformed_masks(segmentation, write, tmp_path):
    wrong = box(2, [2, 2, 5, 5], segmentation=segmentation)
    arguments = write([box(1, [2, 2, 5, 5], **MASK), wrong])
    path = str(tmp_path / "annotations.json")
    assert len(CheckedCocoDataset(**arguments)) == 2
    assert CheckedCocoMetric(path).metrics == ["bbox"]
    message = r"annotations.json: image 2 \(2\.png\), annotation 2: segmentation must be "
    with pytest.raises(ValueError, match=message):
        CheckedCocoDataset(**arguments | WITH_MASKS)
    with pytest.raises(ValueError, match=message):
        CheckedCocoMetric(path, ["bbox", "segm"])


LIMITS = [
    ({"max_objects": 3}, False),
    ({"max_objects": 3}, True),
    ({"max_mask_bytes": 3 * SIDE**2}, True),
]


@pytest.mark.parametrize(("limits", "masks"), LIMITS)
def test_images_with_too_many_objects(limits, masks, write, log):
    annotations = [box(1, [2, 2, 5, 5], **MASK)] * 4 + [box(2, [2, 2, 5, 5], **MASK)] * 3
    arguments = write(annotations) | (WITH_MASKS if masks else {})
    assert len(CheckedCocoDataset(**arguments)) == 2
    log.clear()
    dataset = CheckedCocoDataset(**arguments, **limits)
    assert [info["img_id"] for info in dataset] == [2]
    assert "1 images have more objects than max_objects=" in log.text
    assert "1.png with 4 objects, 20 x 20 pixels" in log.text
    assert "1 with too many objects" in log.text
    assert len([r for r in log.records if r.levelno == logging.WARNING]) == 2
    if masks:
        with pytest.raises(ValueError, match=r"1 images have .* remove LoadAnnotations from the"):
            CheckedCocoDataset(**arguments, **limits, test_mode=True)
    else:
        assert len(CheckedCocoDataset(**arguments, **limits, test_mode=True)) == 3


def test_twenty_thousand_objects(write, log):
    crowded = [box(1, [2, 2, 5, 5], **MASK)] * 20_000
    arguments = write([*crowded, box(2, [2, 2, 5, 5], **MASK)]) | WITH_MASKS
    assert [info["img_id"] for info in CheckedCocoDataset(**arguments)] == [2]
    assert "1.png with 20000 objects" in log.text


@pytest.mark.parametrize("name", ["max_objects", "max_mask_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "9", True, None])
def test_invalid_limits(name, value, write):
    with pytest.raises(ValueError, match=rf"{name} must be a positive integer, got {value!r}"):
        CheckedCocoDataset(**write([]), **{name: value})


def test_masks_are_loaded(write):
    arguments = write([box(1, [2, 2, 5, 5], **MASK), box(1, [2, 2, 0, 5])])  # one is left out
    assert len(CheckedCocoDataset(**arguments | WITH_MASKS)[0]["gt_masks"]) == 1


@pytest.mark.parametrize(
    "classes", [("cat", "horse"), ("dog", "cat"), ("cat", "dog", "owl"), ("cat"), 5, None]
)
def test_classes_that_differ_from_those_of_the_file(classes, write):
    arguments = write([box(1, [2, 2, 5, 5])]) | {"metainfo": {"classes": classes}}
    message = r"metainfo\['classes'\] must list .* \('cow', 'cat', 'dog'\), got " + re.escape(
        repr(classes)
    )
    with pytest.raises(ValueError, match=message):
        CheckedCocoDataset(**arguments)


@pytest.mark.parametrize("key", ["height", "width"])
def test_image_size_that_differs_from_the_annotations(key, write, tmp_path, log):
    arguments = write([box(i, [2, 2, 5, 5]) for i in (1, 2)])
    path = tmp_path / "annotations.json"
    content = json.loads(path.read_text())
    content["images"][0][key] += 1
    path.write_text(json.dumps(content))
    declared = {"height": SIDE, "width": SIDE, key: SIDE + 1}
    message = (
        f"image {tmp_path}/1.png has (height, width) ({SIDE}, {SIDE}), but its annotations "
        f"({declared['height']}, {declared['width']})"
    )
    dataset = CheckedCocoDataset(**arguments)
    assert {dataset[0]["img_id"] for _ in range(5)} == {2}
    assert log.text.count(f"left out: {message}; 1 so far") == 1
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"of another size, the first: {message}")
    ):
        CheckedCocoDataset(**arguments, test_mode=True)


@pytest.mark.parametrize("name", ["ann_file", "data_root", "data_prefix"])
def test_invalid_paths(name, write):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got 3$"):
        CheckedCocoDataset(**write([box(1, [2, 2, 5, 5])]) | {name: 3})


@pytest.mark.parametrize("metric", [3, None])
def test_invalid_metrics(metric, write, tmp_path):
    write([box(1, [2, 2, 5, 5])])
    with pytest.raises(
        ValueError, match=rf"^metric must be a string or a list of strings, got {metric}$"
    ):
        CheckedCocoMetric(str(tmp_path / "annotations.json"), metric)


@pytest.mark.parametrize("thresholds", ["a", ["0.5"], [50], [float("nan")]])
def test_invalid_thresholds(thresholds, write, tmp_path):
    write([box(1, [2, 2, 5, 5])])
    with pytest.raises(ValueError, match=r"^iou_thrs must be numbers from 0 to 1, got "):
        CheckedCocoMetric(str(tmp_path / "annotations.json"), iou_thrs=thresholds)


def test_unreadable_images_are_replaced_in_training(write, tmp_path, log):
    arguments = write([box(i, [2, 2, 5, 5]) for i in (1, 2)])
    dataset = CheckedCocoDataset(**arguments)
    (tmp_path / "1.png").write_bytes(b"no image")
    assert {dataset[0]["img_id"] for _ in range(5)} == {2}
    assert log.text.count(f"left out: cannot read image {tmp_path}/1.png: ") == 1
    assert "; 1 so far in process" in log.text


def test_training_without_a_readable_image_is_an_error(write, tmp_path):
    dataset = CheckedCocoDataset(**write([box(i, [2, 2, 5, 5]) for i in (1, 2)]))
    for i in (1, 2):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    message = r"^.*annotations.json: none of 1001 images in a row can be used; see the warnings .*$"
    with pytest.raises(ValueError, match=message):
        dataset[0]


@pytest.mark.parametrize("loader", ["LoadReadableImage", "LoadImageFromFile"])
def test_an_unreadable_image_is_named_in_a_test(loader, write, tmp_path):
    arguments = write([box(i, [2, 2, 5, 5]) for i in (1, 2)]) | {"pipeline": [{"type": loader}]}
    dataset = CheckedCocoDataset(**arguments, test_mode=True)
    assert dataset[0]["img"].shape == (SIDE, SIDE, 3)
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[:45])  # only the header
    dataset = CheckedCocoDataset(**arguments, test_mode=True)
    with pytest.raises(UnreadableImage, match=rf"^cannot read image {tmp_path}/1.png: .+$"):
        dataset[0]


def test_other_errors_of_a_test_pipeline_are_unchanged(write):
    resize = {"type": "mmdet.Resize"}
    arguments = write([box(1, [2, 2, 5, 5])])
    arguments["pipeline"] = [{"type": "LoadImageFromFile"}, resize | {"scale": (0, 0)}]
    with pytest.raises(Exception, match=r"(?i)size|zero|scale") as error:
        CheckedCocoDataset(**arguments, test_mode=True)[0]
    assert not isinstance(error.value, UnreadableImage)


def test_remote_data(write, tmp_path, memory):
    arguments = write([box(i, [2, 2, 5, 5], **MASK) for i in (1, 2)]) | WITH_MASKS
    for path in tmp_path.iterdir():
        memory[f"memory://{path.name}"] = path.read_bytes()
    (tmp_path / "annotations.json").unlink()
    remote = {"ann_file": "memory://annotations.json", "data_prefix": {"img": "memory://"}}
    for test_mode in (False, True):
        dataset = CheckedCocoDataset(**arguments | remote | {"data_root": ""}, test_mode=test_mode)
        assert [info["img_id"] for info in dataset] == [1, 2, 3][: 2 + test_mode]
    assert CheckedCocoMetric("memory://annotations.json")._coco_api.getImgIds() == [1, 2, 3]
