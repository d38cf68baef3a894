"""Compare the metric of the configs with pycocotools, the reference implementation."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import COCOeval_faster
from mmdet.registry import METRICS
from mmengine.config import Config
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

CONFIGS = Path(__file__).parents[2] / "configs" / "detection"
CONFIG = CONFIGS / "mask_rcnn_flash_internimage_nano_fpn_digits_scenes.py"
SIDE = 160
CATEGORIES = {7: "cow", 1: "cat", 2: "dog"}


def ellipse(x: float, y: float, width: float, height: float) -> np.ndarray:
    """Return a mask, (SIDE, SIDE), of the ellipse that fills a box."""
    rows, columns = np.ogrid[:SIDE, :SIDE]
    across = (columns + 0.5 - x - width / 2) / (width / 2)
    down = (rows + 0.5 - y - height / 2) / (height / 2)
    return np.asfortranarray(across**2 + down**2 <= 1, dtype=np.uint8)


def uncompressed(mask: np.ndarray) -> dict:
    """Return the run lengths of a mask, zeros first, in the format of crowds in COCO."""
    pixels = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(pixels, prepend=0, append=0)).tolist()
    counts = np.diff([0, *edges, pixels.size]).tolist()
    return {"size": [SIDE, SIDE], "counts": counts}


@pytest.fixture(scope="module")
def annotations(tmp_path_factory) -> Path:
    """Write images 1 to 12 with objects of all sizes, some of them crowds; image 4 is empty."""
    rng = np.random.default_rng(0)
    objects = []
    for image in set(range(1, 13)) - {4}:
        for _ in range(5):
            sides = rng.uniform(8, 140, 2)
            box = [*rng.uniform(0, SIDE - sides), *sides]
            mask = ellipse(*box)
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image,
                    "category_id": int(rng.choice(list(CATEGORIES))),
                    "bbox": box,
                    "area": int(mask.sum()),
                    "iscrowd": int(rng.random() < 0.1),
                    "segmentation": uncompressed(mask),
                }
            )
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": SIDE, "width": SIDE} for i in range(1, 13)
        ],
        "annotations": objects,
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()],
    }
    path = tmp_path_factory.mktemp("metric") / "annotations.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def predictions(annotations) -> list[dict]:
    """Return duplicate, displaced and misclassified objects; none in image 5."""
    rng = np.random.default_rng(1)
    objects = json.loads(annotations.read_text())["annotations"]
    samples = []
    for image in range(1, 13):
        found = [] if image == 5 else [o for o in objects if o["image_id"] in (image, 12)] * 4
        corners = np.array([o["bbox"] for o in found]).reshape(-1, 4)
        sides = corners[:, 2:]
        corners = corners + np.hstack([rng.normal(0, 0.1, sides.shape) * sides, 0 * sides])
        labels = [list(CATEGORIES).index(o["category_id"]) for o in found]
        other = rng.random(len(found)) < 0.2
        instances = {
            "bboxes": torch.tensor(np.hstack([corners[:, :2], corners[:, :2] + sides])),
            "scores": torch.tensor(rng.random(len(found)).round(1)),  # with many ties
            "labels": torch.tensor((labels + other) % 3, dtype=torch.int64),
            "masks": [coco_mask.encode(ellipse(*box)) for box in corners],
        }
        samples.append({"img_id": image, "ori_shape": (SIDE, SIDE), "pred_instances": instances})
    return samples


@pytest.fixture
def evaluate(annotations, monkeypatch) -> Callable:
    """Evaluate, and return the metrics and the details for boxes and for masks.

    The details are COCO's twelve statistics and the precision by threshold, recall, category, area
    and number of detections.
    """

    def evaluate(cfg: dict, evaluator: type, samples: list[dict]) -> tuple[dict, list]:
        details = []
        summarize = evaluator.summarize

        def recorded(self) -> None:
            summarize(self)
            details.append((self.stats[:12], self.eval["precision"]))

        with monkeypatch.context() as patch:
            patch.setattr(evaluator, "summarize", recorded)
            metric = METRICS.build({**cfg, "ann_file": str(annotations), "classwise": True})
            metric.dataset_meta = {"classes": tuple(CATEGORIES.values())}
            metric.process({}, copy.deepcopy(samples))
            return metric.evaluate(len(samples)), details

    return evaluate


def test_metrics_equal_those_of_pycocotools(evaluate, predictions):
    cfg = Config.fromfile(CONFIG).test_evaluator
    figures, details = evaluate(cfg, COCOeval_faster, predictions)
    expected, expected_details = evaluate(
        {**cfg, "type": "CheckedPycocotoolsMetric"}, COCOeval, predictions
    )
    assert figures == expected
    assert 0.2 < figures["coco/bbox_mAP"] < 0.9
    assert 0.2 < figures["coco/segm_mAP"] < 0.9
    assert figures["coco/bbox_mAP"] != figures["coco/segm_mAP"]
    for kind, (_, precision) in zip(("bbox", "segm"), expected_details, strict=True):
        for i, category in enumerate(sorted(CATEGORIES)):
            of_class = precision[:, :, i, 0, -1]
            name = f"coco/{kind}_{CATEGORIES[category]}_precision"
            assert figures[name] == pytest.approx(of_class[of_class > -1].mean(), abs=6e-4)
    names = list(figures)
    assert names[0] == "coco/bbox_mAP"  # selected by save_best="auto"
    assert sum(name.endswith("_precision") for name in names) == 6
    assert all(name.endswith("_precision") for name in names[-6:])
    for (stats, precision), reference in zip(details, expected_details, strict=True):
        np.testing.assert_allclose(stats, reference[0], rtol=0, atol=1e-9)
        np.testing.assert_allclose(precision, reference[1], rtol=0, atol=1e-9)
        assert -1 not in stats  # objects of every size
