"""Test the report of a classifier against scikit-learn."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score

from flash_internimage.analysis import classification
from flash_internimage.analysis.charts import palette
from flash_internimage.analysis.classification import Predictions, write_report
from flash_internimage.analysis.report import Report
from flash_internimage.classification.config import Data
from flash_internimage.classification.data import SKIPPED

NAMES = ["a|b", "$c$", "d", "e", "f", "g", "never"]  # the last one has no images
PIXEL = np.zeros((1, 1, 3), np.uint8)
DATA = Data(mean=(0, 0, 0), std=(1, 1, 1))


@pytest.fixture
def without_charts(monkeypatch) -> None:
    """Leave out the charts, which take most of the time."""
    monkeypatch.setattr(Report, "add_chart", lambda *_: None)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def predict(labels, logits, batch: int = 7, count: int = 3) -> Predictions:
    """Collect predictions of images whose first pixel is their number / 255."""
    predictions = Predictions(DATA, count)
    labels, logits = torch.tensor(labels), torch.tensor(logits)
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 255
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        readable = labels[part] != SKIPPED
        predictions(images[part], labels[part], logits[part][readable])
    return predictions


def report(folder: Path, predictions: Predictions, names=NAMES, **figures) -> None:
    positions, *arrays = predictions.arrays()
    files = [f"{i}.png" for i in positions]
    write_report(folder, {"model": "m", **figures}, names, files, arrays, predictions.mistakes)


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    """Return labels (n,), some of them of unreadable images, and logits (n, classes)."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 6, 100)
    logits = random.normal(size=(100, 7))
    logits[np.arange(100), labels] += 1.5
    labels[[3, 50]] = SKIPPED
    return labels, logits


def test_accuracies_are_those_of_scikit_learn(data, tmp_path, without_charts):
    labels, logits = data
    report(tmp_path, predict(labels, logits), top1=12.5)
    used = labels != SKIPPED
    truth, predicted = labels[used], logits[used].argmax(1)
    rows = {row["class"]: row for row in read(tmp_path / "classes.csv")}
    for i, name in enumerate(NAMES[:-1]):
        here = truth == i
        top1 = 100 * accuracy_score(truth[here], predicted[here])
        top5 = 100 * top_k_accuracy_score(truth[here], logits[used][here], k=5, labels=range(7))
        assert float(rows[name]["top-1 (%)"]) == pytest.approx(top1)
        assert float(rows[name]["top-5 (%)"]) == pytest.approx(top5)
        assert int(rows[name]["images"]) == here.sum()
    assert rows["never"]["top-1 (%)"] == ""
    summary = json.loads((tmp_path / "summary.json").read_text())
    mean = 100 * balanced_accuracy_score(truth, predicted)
    assert summary == {
        "model": "m", "top1": 12.5, "mean_class_accuracy": pytest.approx(mean, abs=1e-4),
    }  # fmt: skip


def test_mistakes_are_sorted_by_confidence_and_shown_with_their_image(
    data, tmp_path, without_charts
):
    labels, logits = data
    predictions = predict(labels, logits)
    report(tmp_path, predictions)
    scores = torch.tensor(logits).softmax(1).numpy()
    wrong = np.flatnonzero((labels != SKIPPED) & (logits.argmax(1) != labels))
    wrong = wrong[np.argsort(-scores.max(1)[wrong])]
    rows = read(tmp_path / "mistakes.csv")
    assert [row["image"] for row in rows] == [f"{i}.png" for i in wrong]
    assert [float(row["confidence (%)"]) for row in rows] == pytest.approx(
        100 * scores.max(1)[wrong]
    )
    assert [m.image[0, 0, 0] for m in predictions.mistakes] == wrong[:3].tolist()
    assert [(m.label, m.predicted) for m in predictions.mistakes] == [
        (labels[i], logits[i].argmax()) for i in wrong[:3]
    ]


def test_captions_tell_the_true_from_the_predicted_class(tmp_path, without_charts, monkeypatch):
    captions = []
    monkeypatch.setattr(
        classification, "contact_sheet", lambda _, texts, **__: captions.extend(texts) or PIXEL
    )
    report(tmp_path, predict([0], 9.0 * np.eye(7)[[1]]), [f"class {i}" for i in range(7)])
    assert captions == ["true: class 0\npredicted (100 %): class 1"]


def test_confusions_and_the_matrix_count_the_same_images(data, tmp_path, without_charts):
    labels, logits = data
    report(tmp_path, predict(labels, logits))
    counts = [int(row["images"]) for row in read(tmp_path / "confusions.csv")]
    assert counts == sorted(counts, reverse=True)
    with open(tmp_path / "confusion_matrix.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["true class", *NAMES]
    matrix = np.array([row[1:] for row in rows], dtype=int)
    assert matrix.sum() == 98
    assert matrix.sum() - np.trace(matrix) == sum(counts) == len(read(tmp_path / "mistakes.csv"))


def test_perfect_predictions_have_no_mistakes(tmp_path, without_charts):
    report(tmp_path, predict([0, 1, 1], 9.0 * np.eye(7)[[0, 1, 1]]))
    assert [row["top-1 (%)"] for row in read(tmp_path / "classes.csv")] == ["100.0"] * 2 + [""] * 5
    assert read(tmp_path / "mistakes.csv") == read(tmp_path / "confusions.csv") == []
    assert not (tmp_path / "mistakes.png").exists()
    assert "5 of the 7 classes have no images" in (tmp_path / "report.md").read_text()


def test_swapped_classes_are_confused_with_each_other(tmp_path, without_charts):
    report(tmp_path, predict([0, 1, 1], 9.0 * np.eye(7)[[1, 0, 0]]))
    rows = [tuple(row.values()) for row in read(tmp_path / "confusions.csv")]
    assert rows == [("$c$", "a|b", "2", "100.0"), ("a|b", "$c$", "1", "100.0")]
    assert "a\\|b" in (tmp_path / "report.md").read_text()


def test_lines_are_seen_on_white():
    assert (palette(8) @ [0.2126, 0.7152, 0.0722] < 0.66).all()
    assert len(np.unique(palette(8), axis=0)) == 8


def test_charts_of_many_classes_stay_small(tmp_path):
    random = np.random.default_rng(0)
    labels = random.integers(0, 1000, 3000)
    logits = np.zeros((3000, 1000), np.float32)
    logits[np.arange(3000), np.where(random.uniform(size=3000) < 0.3, 7, labels)] = 5
    report(tmp_path, predict(labels, logits, batch=1000), [f"class {i}" for i in range(1000)])
    for name in ("class_accuracy.png", "confusion_matrix.png"):
        assert max(Image.open(tmp_path / name).size) < 1600
    assert len(read(tmp_path / "classes.csv")) == len(read(tmp_path / "confusion_matrix.csv"))
    assert len((tmp_path / "report.md").read_text().splitlines()) < 100
