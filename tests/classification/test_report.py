"""Tests of the pictures and log messages of reports."""

import pytest
import torch
from matplotlib.axes import Axes
from torch import nn
from torch.utils.data import IterableDataset

from flash_internimage.classification.config import Data
from flash_internimage.classification.data import SKIPPED
from flash_internimage.classification.report import save_predictions, speed


class Model(nn.Module):
    """Classifier that predicts the value of the first pixel."""

    def __init__(self, classes: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.classes = classes

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), self.classes) * self.scale


def samples(labels) -> list:
    return [(torch.full((3, 8, 8), float(max(label, 0))), label) for label in labels]


@pytest.fixture
def titles(monkeypatch) -> list[str]:
    found, set_title = [], Axes.set_title

    def record(self, label, **settings):
        found.append(label)
        return set_title(self, label, **settings)

    monkeypatch.setattr(Axes, "set_title", record)
    return found


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(
    "name",
    ["$x^", "$a$ _ $\\frac$", "_", "^_^", "\\", "a\nb", "\udcff", "\x00", "x" * 300, "犬", "%", ""],
)
def test_class_names_are_drawn_verbatim(tmp_path, titles, name):
    (right, wrong) = samples([0, 0])
    dataset = [right, (wrong[0], 1)]
    save_predictions(Model(2), dataset, Data(), [name, name], tmp_path / "predictions.png")
    assert (tmp_path / "predictions.png").stat().st_size > 0
    if name.isprintable() and len(name) < 24:
        assert titles == [f"{name} (73 %)", f"{name} (73 %)\nis {name}"]
    assert all(len(line) < 40 for title in titles for line in title.splitlines())


def test_unreadable_images_are_not_drawn(tmp_path, titles):
    dataset = samples([0, SKIPPED, 1])
    save_predictions(Model(2), dataset, Data(), ["a", "b"], tmp_path / "predictions.png")
    assert [title[0] for title in titles] == ["a", "b"]


@pytest.mark.parametrize(
    ("images_per_second", "text"),
    [
        (0.004, "0.004"),
        (0.0456, "0.046"),
        (0.94, "0.94"),
        (1, "1.0"),
        (1234.56, "1234.6"),
        (0, "0"),
    ],
)
def test_low_speeds_are_shown_with_enough_digits(images_per_second, text):
    assert speed(images_per_second) == text


def test_nothing_is_drawn_without_readable_images(tmp_path, caplog):
    to = tmp_path / "predictions.png"
    save_predictions(Model(2), samples([SKIPPED, SKIPPED]), Data(), ["a", "b"], to)
    assert not to.exists()
    assert "no image could be read" in caplog.text


def test_the_first_images_of_a_stream_are_drawn(tmp_path, titles):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(samples([1, 0, 1, 0]))

    to = tmp_path / "predictions.png"
    save_predictions(Model(2), Stream(), Data(), ["a", "b"], to, count=3)
    assert [title[0] for title in titles] == ["b", "a", "b"]
