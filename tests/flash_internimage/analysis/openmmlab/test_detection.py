"""Test that the report of a detector has the figures of mmdet's metric."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import METRICS
from mmengine.registry import init_default_scope
from PIL import Image

import flash_internimage.openmmlab.detection  # noqa: F401  registers the metric
from flash_internimage.analysis.detection import write_report
from flash_internimage.analysis.report import Report
from flash_internimage.openmmlab.datasets.coco import LABELS_FOLLOW_CLASSES

CLASSES = [f"class{i}" for i in range(12)]  # more than a chart shows; the last one has no objects
PICTURES = {"missed.png", "false.png"}


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """Report on detections, some of them wrong; return the folder and mmdet's metrics."""
    init_default_scope("mmdet")
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("report")
    images, annotations, samples = [], [], []
    for i in range(8):
        Image.new("RGB", (64, 48), (90, 30 * i, 90)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
        corners = random.uniform(0, 20, (i, 2))  # none in the first image
        boxes = np.hstack([corners, corners + random.uniform(8, 25, (i, 2))])
        labels = random.integers(0, 11, i)
        for box, label in zip(boxes, labels, strict=True):
            width, height = box[2:] - box[:2]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": int(label) + 1,
                    "bbox": [*box[:2].tolist(), width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        guesses = np.where(random.uniform(size=i) < 0.3, (labels + 1) % 12, labels)
        instances = {
            "bboxes": torch.tensor(boxes + random.normal(0, 1, boxes.shape)),
            "scores": torch.tensor(random.uniform(0.2, 1, i)),
            "labels": torch.tensor(guesses),
        }
        sample = {"img_id": i, "img_path": str(folder / f"{i}.png"), "ori_shape": (48, 64)}
        samples.append({**sample, "pred_instances": instances})
    truth = {"images": images, "annotations": annotations}
    truth["categories"] = [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)]
    (folder / "truth.json").write_text(json.dumps(truth))
    metric = METRICS.build(
        {
            "type": "CheckedCocoMetric",
            "ann_file": str(folder / "truth.json"),
            "classwise": True,
            "outfile_prefix": str(folder / "predictions"),
        }
    )
    metric.dataset_meta = {"classes": tuple(CLASSES), LABELS_FOLLOW_CLASSES: True}
    metric.process({}, samples)
    figures = metric.evaluate(len(samples))
    write_report(
        folder,
        figures,
        truth,
        {"bbox": json.loads((folder / "predictions.bbox.json").read_text())},
        categories={k + 1: name for k, name in enumerate(CLASSES)},
        images=list(range(8)),
        paths={i: str(folder / f"{i}.png") for i in range(8)},
        title="model_x",
        pictures=3,
    )
    return folder, figures


def test_the_summary_has_the_metrics_of_the_evaluation(report):
    folder, figures = report
    summary = json.loads((folder / "summary.json").read_text())
    given = {name: None if np.isnan(value) else value for name, value in figures.items()}
    assert summary == pytest.approx(given)
    assert 0.1 < summary["coco/bbox_mAP"] < 0.9


def test_the_precision_of_a_class_is_that_of_the_metric(report):
    folder, figures = report
    rows = {row["class"]: row for row in read(folder / "classes.csv")}
    assert sorted(rows) == sorted(CLASSES)
    for name in CLASSES[:-1]:
        expected = 100 * figures[f"coco/{name}_precision"]
        assert float(rows[name]["bbox AP (%)"]) == pytest.approx(expected, abs=0.051)
    means = [float(rows[name]["bbox AP (%)"]) for name in CLASSES[:-1]]
    assert np.mean(means) == pytest.approx(100 * figures["coco/bbox_mAP"], abs=0.051)
    assert rows["class11"]["bbox AP (%)"] == ""
    assert sum(int(row["objects"]) for row in rows.values()) == sum(range(8))


def test_images_are_sorted_by_their_errors(report):
    rows = read(report[0] / "images.csv")
    errors = [int(row["missed"]) + int(row["false"]) for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert len(rows) == 8
    by_class = read(report[0] / "classes.csv")
    for name in ("missed", "false"):
        assert sum(int(r[name]) for r in rows) == sum(int(r[name]) for r in by_class) > 0


def test_pictures_and_charts_are_in_the_report(report):
    folder, _ = report
    text = (folder / "report.md").read_text()
    charts = {
        "bbox_class_ap.png", "bbox_class_precision_recall.png", "bbox_precision_recall.png",
    }  # fmt: skip
    for name in charts | PICTURES:
        assert f"]({name})" in text
        assert Image.open(folder / name).width > 400
    assert "1 of the 12 classes have no objects" in text
    rows = read(folder / "bbox_precision_recall.csv")
    assert len(rows) == 11 * 10 * 101


def test_an_unreadable_image_is_not_drawn(report, tmp_path, monkeypatch):
    monkeypatch.setattr(Report, "add_chart", lambda *_: None)
    folder, figures = report
    truth = json.loads((folder / "truth.json").read_text())
    write_report(
        tmp_path,
        figures,
        truth,
        {"bbox": []},
        categories={k + 1: name for k, name in enumerate(CLASSES)},
        images=list(range(8)),
        paths={i: str(tmp_path / "missing.png") for i in range(8)},
        title="model_x",
    )
    assert not PICTURES & {path.name for path in tmp_path.iterdir()}
    assert "No image has false boxes" in (tmp_path / "report.md").read_text()
