"""Test the metrics of perfect predictions on annotation files found in practice."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.datasets import ConcatDataset
from mmdet.registry import DATASETS, METRICS
from mmengine.dataset import BaseDataset, RepeatDataset
from mmengine.registry import init_default_scope
from PIL import Image
from torch import nn

import flash_internimage.openmmlab.detection  # noqa: F401  registers the metrics
from flash_internimage.openmmlab.datasets.coco import LABELS_FOLLOW_CLASSES

pytestmark = pytest.mark.usefixtures("safe_loading")
BOX = [5, 5, 20, 20]
both_metrics = pytest.mark.parametrize("kind", ["FasterCocoMetric", "CocoMetric"])


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmdet")


@pytest.fixture
def evaluate(tmp_path):
    """Evaluate perfect predictions of some classes, and return the metrics without prefix."""

    def evaluate(kind: str, found=("cat", "dog"), classes=("cat", "dog"), **ids) -> dict:
        cat, dog, image, annotation = (
            ids.get(name, default)
            for name, default in (("cat", 1), ("dog", 2), ("image", 1), ("annotation", 1))
        )
        names = {cat: "cat", dog: "dog"}
        objects = [
            {"id": annotation + i, "image_id": image + i, "category_id": category}
            for i, category in enumerate((cat, dog, cat))
        ]
        content = {
            "images": [
                {"id": image + i, "file_name": f"{i}.png", "height": 40, "width": 40}
                for i in range(3)
            ],
            "annotations": [{**o, "bbox": BOX, "area": 400} for o in objects],
            "categories": [{"id": i, "name": names[i]} for i in ids.get("order", (cat, dog))],
        }
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(content))
        metric = METRICS.build({"type": kind, "ann_file": str(path), "classwise": True})
        metric.dataset_meta = {"classes": classes, LABELS_FOLLOW_CLASSES: True}
        for o in objects:
            labels = [classes.index(n) for n in [names[o["category_id"]]] if n in found]
            instances = {
                "bboxes": torch.tensor([[5.0, 5.0, 25.0, 25.0]] * len(labels)).reshape(-1, 4),
                "scores": torch.full((len(labels),), 0.9),
                "labels": torch.tensor(labels, dtype=torch.long),
            }
            sample = {"img_id": o["image_id"], "ori_shape": (40, 40), "pred_instances": instances}
            metric.process({}, [sample])
        figures = metric.evaluate(3)
        return {name.removeprefix("coco/"): value for name, value in figures.items()}

    return evaluate


@both_metrics
@pytest.mark.parametrize(
    "ids",
    [
        {},
        {"annotation": 2**63 - 3},
        {"image": 0, "cat": 0},
        {"image": 2**53 - 3, "cat": 2**53 - 1},
    ],
)
def test_ids_of_any_size(kind, ids, evaluate):
    figures = evaluate(kind, **ids)
    assert [figures[n] for n in ("bbox_mAP", "cat_precision", "dog_precision")] == [1, 1, 1]
    assert next(iter(figures)) == "bbox_mAP"  # selected by save_best="auto"


@both_metrics
@pytest.mark.parametrize("classes", [("cat", "dog"), ("dog", "cat")])
@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_metrics_of_a_class_have_its_name(kind, classes, order, evaluate):
    figures = evaluate(kind, found=("cat",), classes=classes, order=order)
    assert (figures["cat_precision"], figures["dog_precision"]) == (1, 0)
    assert figures["bbox_mAP"] == 0.5


@both_metrics
def test_subset_of_the_classes(kind, evaluate):
    figures = evaluate(kind, found=("dog",), classes=("dog",), order=(2, 1))
    assert (figures["dog_precision"], figures["bbox_mAP"]) == (1, 1)


@both_metrics
@pytest.mark.parametrize("classes", [("cat", "cow"), "cat", None])
def test_classes_missing_from_the_file(kind, classes, evaluate):
    with pytest.raises(ValueError, match=r"evaluator .*annotations\.json: metainfo\['classes'\]"):
        evaluate(kind, classes=classes)


@both_metrics
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[
            ({"id": first}, f"annotation {first!r}: id must be a unique integer")
            for first in (0, "a", 1.0)
        ],
        ({"iscrowd": 1}, "annotations must contain objects that are not crowds"),
    ],
)
def test_annotations_that_the_evaluation_does_not_support(kind, change, message, tmp_path):
    path = tmp_path / "annotations.json"
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": BOX, "area": 400}
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": 40, "width": 40}],
        "annotations": [entry | change],
        "categories": [{"id": 1, "name": "cat"}],
    }
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"annotations\.json: .*{message}"):
        METRICS.build({"type": kind, "ann_file": str(path)})


@pytest.fixture
def write(tmp_path):
    """Write images in subfolders and their annotations, after applying a change to them."""

    def write(name: str = "a.json", change=None, images: int = 4) -> str:
        content = {
            "images": [
                {"id": i, "file_name": f"part/{i}.png", "height": 40, "width": 48}
                for i in range(images)
            ],
            "annotations": [
                {"id": 1 + i, "image_id": i, "category_id": c, "bbox": [5 * i, 5, 20, 20]}
                for i, c in zip(range(images), (1, 1, 2, 1), strict=False)
            ],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        }
        for annotation in content["annotations"]:
            annotation["area"] = 400
        (tmp_path / "part").mkdir(exist_ok=True)
        for image in content["images"]:
            pixels = np.zeros((image["height"], image["width"], 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / image["file_name"])
        if change:
            change(content)
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    return write


def data(ann_file: str, kind: str = "CheckedCocoDataset", classes=("cat", "dog"), **settings):
    """Build a dataset for evaluation."""
    folder = Path(ann_file).parent
    settings = {"data_root": str(folder), "data_prefix": {"img": ""}, "pipeline": []} | settings
    cfg = {"type": kind, "ann_file": ann_file, "metainfo": {"classes": classes}, "test_mode": True}
    return DATASETS.build(cfg | settings)


def perfect(dataset: BaseDataset, found=None) -> list[dict]:
    """Return predictions equal to the annotations of some labels of the dataset."""
    samples = []
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        instances = info["instances"]
        if found is not None:
            labels = [dataset.cat2label[category] for category in found]
            instances = [o for o in instances if o["bbox_label"] in labels]
        boxes = torch.tensor([o["bbox"] for o in instances], dtype=torch.float64).reshape(-1, 4)
        predictions = {
            "bboxes": boxes,
            "scores": torch.full((len(boxes),), 0.9),
            "labels": torch.tensor([o["bbox_label"] for o in instances], dtype=torch.long),
        }
        sample = {"img_id": info["img_id"], "img_path": info["img_path"], "ori_shape": (40, 48)}
        samples.append({**sample, "pred_instances": predictions})
    return samples


def warnings(log) -> list[str]:
    return [r.getMessage() for r in log.records if r.levelno == logging.WARNING]


def figures(kind: str, ann_file: str | None, dataset, samples: list[dict], **settings) -> dict:
    """Return the metrics without their prefix."""
    cfg = {"type": kind, "ann_file": ann_file, "classwise": True, **settings}
    metric = METRICS.build(cfg)
    metric.dataset_meta = dataset.metainfo
    metric.check_run(nn.Identity(), dataset)
    metric.process({}, samples)
    found = metric.evaluate(len(samples))
    return {name.removeprefix("coco/"): value for name, value in found.items()}


@both_metrics
@pytest.mark.parametrize(
    ("source", "classes"),
    [
        ("CheckedCocoDataset", ("cat", "dog")),
        ("CocoDataset", ("cat", "dog")),
        ("CocoDataset", ("dog", "cat")),
        ("CocoDataset", ["dog", "cat"]),
    ],
)
def test_labels_follow_the_data_set(kind, source, classes, write, tmp_path, log):
    path = write()
    dataset = data(path, source, classes)
    found = figures(kind, path, dataset, perfect(dataset))
    assert [found[n] for n in ("bbox_mAP", "cat_precision", "dog_precision")] == [1, 1, 1]
    found = figures(kind, path, dataset, perfect(dataset, found=[1]))
    assert [found[n] for n in ("bbox_mAP", "cat_precision", "dog_precision")] == [0.5, 1, 0]
    assert ("labels are assumed to follow the file, as in mmdet's CocoDataset" in log.text) == (
        tuple(classes) == ("dog", "cat")
    )
    prefix = str(tmp_path / "results")
    settings = {"format_only": True, "outfile_prefix": prefix}
    assert figures(kind, path, dataset, perfect(dataset), **settings) == {}
    written = json.loads(Path(f"{prefix}.bbox.json").read_text())
    assert [(r["image_id"], r["category_id"]) for r in written] == [(0, 1), (1, 1), (2, 2), (3, 1)]


@both_metrics
def test_categories_in_another_order(kind, write):
    dataset = data(write())
    path = write("b.json", lambda content: content["categories"].reverse())
    found = figures(kind, path, dataset, perfect(dataset, found=[1]))
    assert [found[n] for n in ("bbox_mAP", "cat_precision", "dog_precision")] == [0.5, 1, 0]


@both_metrics
def test_images_missing_from_the_data_are_left_out_with_a_warning(kind, write, log):
    path = write()
    dataset = data(path, indices=[3, 1])
    samples = perfect(dataset)
    samples[0]["pred_instances"]["bboxes"] += 8  # misses the object of image 3
    found = figures(kind, path, dataset, samples, metric=["bbox", "proposal_fast"])
    (message,) = warnings(log)
    assert message.startswith(f"2 of the 4 images of {path} are not in the data")

    def keep(content: dict) -> None:
        for name, key in (("images", "id"), ("annotations", "image_id")):
            content[name] = [entry for entry in content[name] if entry[key] in (1, 3)]

    cut = write("cut.json", keep)
    dataset = data(cut)
    samples = perfect(dataset)
    samples[1]["pred_instances"]["bboxes"] += 8
    expected = figures(kind, cut, dataset, samples, metric=["bbox", "proposal_fast"])
    assert str(found) == str(expected)  # true for NaN, too
    assert found["bbox_mAP"] == 0.505  # 51 of 101 recall thresholds
    assert found["AR@100"] == 0.5


@both_metrics
@pytest.mark.parametrize("with_file", [True, False])
@pytest.mark.parametrize("wrapper", ["repeat", "concatenate"])
def test_images_evaluated_twice_are_an_error(kind, wrapper, with_file, write):
    path = write()
    dataset = data(path)
    if wrapper == "repeat":
        wrapped = RepeatDataset(dataset, times=2)
    else:
        wrapped = ConcatDataset([dataset, data(path, indices=[2])])
    metric = METRICS.build({"type": kind, "ann_file": path if with_file else None})
    metric.dataset_meta = dataset.metainfo
    image = 0 if wrapper == "repeat" else 2
    file = rf"\S*part/{image}\.png"
    with pytest.raises(ValueError, match=rf"^image {image} must be evaluated once, got {file} and"):
        metric.check_run(nn.Identity(), wrapped)
    samples = perfect(dataset)
    for sample in samples:
        sample["instances"] = []
        sample["gt_instances"] = {"bboxes": [], "labels": []}
    metric.process({}, [*samples, samples[image]])
    with pytest.raises(ValueError, match=f"^image {image} must be evaluated once, got 2 results"):
        metric.evaluate(5)


@both_metrics
def test_concatenated_data_sets_of_two_types(kind, write):
    path = write()
    parts = [data(path, indices=[0, 2]), data(path, "CocoDataset", indices=[1, 3])]
    joined = ConcatDataset(parts)
    samples = [*perfect(parts[0]), *perfect(parts[1])]
    assert figures(kind, path, joined, samples)["bbox_mAP"] == 1
    # Training hooks read a single metainfo dict.
    kinds = ("CheckedCocoDataset", "CocoDataset")
    joined = ConcatDataset([data(path, source, test_mode=False) for source in kinds])
    assert joined.metainfo["classes"] == ("cat", "dog")


def rename(name: str):
    return lambda content: content["images"][1].update(file_name=name)


def resize(content: dict) -> None:
    content["images"][1].update(height=48, width=40)


@both_metrics
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename("part/7.png"), r"image 1 is part/7\.png, but \S*part/1\.png in the data"),
        (rename("other/1.png"), r"image 1 is other/1\.png, but \S*part/1\.png in the data"),
        (rename("part/11.png"), r"image 1 is part/11\.png, but \S*part/1\.png in the data"),
        (rename("t/1.png"), r"image 1 is t/1\.png, but \S*part/1\.png in the data"),
        (resize, r"has \(height, width\) \(48, 40\), but \(40, 48\) in the data"),
        (lambda content: content["images"][1].update(id=7), "has no image 1, but the data do"),
    ],
)
def test_images_that_differ_from_the_data(kind, change, message, write):
    dataset = data(write())

    def changed(content: dict) -> None:
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]
        change(content)

    path = write("b.json", changed)
    metric = METRICS.build({"type": kind, "ann_file": path})
    with pytest.raises(ValueError, match=rf"^ann_file of the evaluator \S*b\.json:? .*{message}"):
        metric.check_run(nn.Identity(), dataset)
    with pytest.raises(ValueError, match=rf"^ann_file of the evaluator \S*b\.json:? .*{message}"):
        metric.process({}, perfect(dataset))


@both_metrics
@pytest.mark.parametrize("name", ["1.png", "./part/1.png", "part/1.jpg", "../part/1.png"])
def test_equivalent_file_names(kind, name, write):
    dataset = data(write())
    path = write("b.json", rename(name))
    assert figures(kind, path, dataset, perfect(dataset))["bbox_mAP"] == 1


@both_metrics
def test_objects_that_differ_from_the_data(kind, write, log):
    def move(number: int):
        def change(content: dict) -> None:
            for annotation in content["annotations"][:number]:
                annotation["bbox"][1] += 5

        return change

    path = write()
    dataset = data(path)
    metric = METRICS.build({"type": kind, "ann_file": write("b.json", move(4))})
    message = r"b\.json lacks boxes of 4 of the 4 images with objects in the data: both must use"
    with pytest.raises(ValueError, match=message):
        metric.check_run(nn.Identity(), dataset)
    assert not warnings(log)
    metric = METRICS.build({"type": kind, "ann_file": write("b.json", move(1))})
    metric.check_run(nn.Identity(), dataset)
    (message,) = warnings(log)
    assert "lacks boxes of 1 of the 4 images" in message


@both_metrics
def test_mask_metrics_require_predicted_masks(kind, write):
    def outline(content: dict) -> None:
        for annotation in content["annotations"]:
            annotation["segmentation"] = [[5, 5, 25, 5, 25, 25]]

    path = write(change=outline)
    metric = METRICS.build({"type": kind, "ann_file": path, "metric": ["bbox", "segm"]})
    message = r"^metric of the evaluator must not contain 'segm' .*, got \['bbox', 'segm'\]"
    with pytest.raises(ValueError, match=message):
        metric.process({}, perfect(data(path)))
