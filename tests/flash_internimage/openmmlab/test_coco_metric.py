"""Figures of predictions that equal the annotations, for files as they come in practice."""

import json

import pytest
import torch
from mmdet.registry import METRICS
from mmengine.registry import init_default_scope

import flash_internimage.openmmlab.detection  # noqa: F401  registers the metrics

BOX = [5, 5, 20, 20]
both_metrics = pytest.mark.parametrize("kind", ["FasterCocoMetric", "CocoMetric"])


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmdet")


@pytest.fixture
def evaluate(tmp_path):
    """Evaluate perfect predictions of some classes; return the figures without their prefix."""

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
        metric.dataset_meta = {"classes": classes}
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
    assert next(iter(figures)) == "bbox_mAP"  # what save_best="auto" takes


@both_metrics
@pytest.mark.parametrize("classes", [("cat", "dog"), ("dog", "cat")])
@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_figures_of_a_class_have_its_name(kind, classes, order, evaluate):
    figures = evaluate(kind, found=("cat",), classes=classes, order=order)
    assert (figures["cat_precision"], figures["dog_precision"]) == (1, 0)
    assert figures["bbox_mAP"] == 0.5


@both_metrics
def test_one_class_of_several(kind, evaluate):
    figures = evaluate(kind, found=("dog",), classes=("dog",), order=(2, 1))
    assert (figures["dog_precision"], figures["bbox_mAP"]) == (1, 1)


@both_metrics
@pytest.mark.parametrize("classes", [("cat", "cow"), "cat", None])
def test_classes_that_the_file_does_not_have(kind, classes, evaluate):
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
        ({"iscrowd": 1}, "annotations must have objects that are no crowds"),
    ],
)
def test_annotations_that_an_evaluation_cannot_use(kind, change, message, tmp_path):
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


@both_metrics
def test_an_image_of_another_file(kind, evaluate, tmp_path):
    evaluate(kind)
    path = str(tmp_path / "annotations.json")
    metric = METRICS.build({"type": kind, "ann_file": path})
    with pytest.raises(ValueError, match=r"annotations\.json has no image 7, which the data have"):
        metric.process({}, [{"img_id": 7}])
