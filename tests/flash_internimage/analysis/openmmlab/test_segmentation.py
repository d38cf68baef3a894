"""Test the report of a segmentor against scikit-learn, mmseg's metric and cases done by hand."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmseg.evaluation import IoUMetric
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

from flash_internimage.analysis.report import Report
from flash_internimage.analysis.segmentation import PixelConfusion, count_pixels, write_report

CLASSES = ("sky", "tree", "road", "boat")  # no boat anywhere
LEFT_TREE = np.repeat([[1, 0]], 2, 0)  # columns of trees and sky


@pytest.fixture
def without_charts(monkeypatch) -> None:
    """Leave out the charts, which take most of the time."""
    monkeypatch.setattr(Report, "add_chart", lambda *_: None)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def evaluate(folder: Path, truths, predictions) -> tuple[PixelConfusion, dict]:
    """Evaluate label maps with the metric of the report and mmseg's; write the report."""
    confusion, iou = PixelConfusion(255, count=2), IoUMetric()
    samples = []
    for i, (truth, predicted) in enumerate(zip(truths, predictions, strict=True)):
        Image.new("RGB", truth.shape[::-1], "gray").save(folder / f"{i}.png")
        labels = {
            "gt_sem_seg": {"data": torch.tensor(truth)[None]},
            "pred_sem_seg": {"data": torch.tensor(predicted)[None]},
        }
        samples.append({**labels, "img_path": str(folder / f"{i}.png")})
    for metric in (confusion, iou):
        metric.dataset_meta = {"classes": CLASSES}
        metric.process({}, samples)
    figures = iou.evaluate(len(samples))
    assert confusion.evaluate(len(samples)) == {}
    write_report(folder, figures, confusion, 255, "model_x")
    return confusion, figures


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Report on random label maps with ignored pixels: folder, metric, mmseg's figures, maps."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("report")
    truths = random.integers(0, 3, (4, 30, 40))
    truths[:, :5] = 255
    wrong = random.uniform(size=truths.shape) < np.array([0.1, 0.5, 0.3, 0.2])[:, None, None]
    predictions = np.where(wrong | (truths == 255), random.integers(0, 3, truths.shape), truths)
    return folder, *evaluate(folder, truths, predictions), truths, predictions


def test_the_confusion_matrix_is_that_of_scikit_learn(report):
    _, confusion, _, truths, predictions = report
    counted = truths != 255
    expected = confusion_matrix(truths[counted], predictions[counted], labels=range(4))
    np.testing.assert_array_equal(confusion.matrix, expected)


def test_the_figures_are_those_of_mmseg_and_scikit_learn(report):
    folder, _, figures, truths, predictions = report
    assert json.loads((folder / "summary.json").read_text()) == figures
    rows = {row["class"]: row for row in read(folder / "classes.csv")}
    means = [float(rows[name]["IoU (%)"]) for name in CLASSES[:3]]
    assert np.mean(means) == pytest.approx(figures["mIoU"], abs=0.0051)
    counted = truths != 255
    expected = jaccard_score(
        truths[counted], predictions[counted], labels=range(3), average=None, zero_division=0
    )
    assert means == pytest.approx(100 * expected)
    assert rows["boat"]["IoU (%)"] == ""
    assert [row["class"] for row in read(folder / "classes.csv")][-1] == "boat"


def test_the_worst_images_come_first(report):
    folder, confusion, *_ = report
    rows = read(folder / "images.csv")
    assert [Path(row["image"]).name for row in rows] == ["1.png", "2.png", "3.png", "0.png"]
    assert [Path(one.result.path).name for one in confusion.worst] == ["1.png", "2.png"]
    text = (folder / "report.md").read_text()
    for name in ("worst.png", "class_iou.png", "confusion_matrix.png"):
        assert f"]({name})" in text
        assert Image.open(folder / name).width > 300
    assert "1 of the 4 classes are in no image" in text


def test_perfect_label_maps_have_full_iou_and_no_confusions(tmp_path, without_charts):
    _, figures = evaluate(tmp_path, [LEFT_TREE], [LEFT_TREE])
    assert figures["mIoU"] == 100
    shares = {row["class"]: row["IoU (%)"] for row in read(tmp_path / "classes.csv")}
    assert shares == {"sky": "100.0", "tree": "100.0", "road": "", "boat": ""}
    assert read(tmp_path / "confusions.csv") == []


def test_swapped_classes_are_confused_with_each_other(tmp_path, without_charts):
    evaluate(tmp_path, [LEFT_TREE], [1 - LEFT_TREE])
    shares = {row["class"]: row["IoU (%)"] for row in read(tmp_path / "classes.csv")}
    assert (shares["sky"], shares["tree"]) == ("0.0", "0.0")
    rows = [tuple(row.values()) for row in read(tmp_path / "confusions.csv")]
    assert rows == [("sky", "tree", "2", "100.0"), ("tree", "sky", "2", "100.0")]


def test_an_image_without_labels_has_no_iou(tmp_path, without_charts):
    nothing = np.full((2, 2), 255)
    confusion, _ = evaluate(tmp_path, [nothing, LEFT_TREE], [LEFT_TREE, LEFT_TREE])
    assert [row["mean IoU (%)"] for row in read(tmp_path / "images.csv")] == ["100.0", ""]
    assert [Path(one.result.path).name for one in confusion.worst] == ["1.png"]


def test_a_single_pixel_is_counted_once():
    matrix = count_pixels(np.array([[2]]), np.array([[1]]), 3, 255)
    assert matrix.tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]
