"""Tests of matching the labels of evaluation data with the classes of a checkpoint."""

import json
import re
import tarfile

import pytest
from PIL import Image
from torch import nn
from torchvision.datasets import FakeData

from flash_internimage.backbones import FlashInternImage
from flash_internimage.checkpoints import load_checkpoint, save_atomically
from flash_internimage.classification.cli.test import main
from flash_internimage.classification.config import Data
from flash_internimage.classification.data import build_dataset
from flash_internimage.classification.data.classes import set_labels


@pytest.fixture
def right(monkeypatch):
    """Make every model predict the red value of an image, divided by 10."""

    def forward(self, images):
        red = (images[:, 0].mean((1, 2)) * Data().std[0] + Data().mean[0]) * 25.5
        red = red.round().long().clamp(0, self.num_classes - 1)
        return nn.functional.one_hot(red, self.num_classes).float()

    monkeypatch.setattr(FlashInternImage, "forward", forward)


def colored(root, split: str, classes: dict[str, int]):
    """Write plain images whose color determines the prediction of `right`, by class folder."""
    for name, output in classes.items():
        (root / split / name).mkdir(parents=True)
        for i in range(2):
            image = Image.new("RGB", (32, 32), (10 * output, 0, 0))
            image.save(root / split / name / f"{i}.png")
    return root


DIGITS = {str(i): i for i in range(10)}


@pytest.mark.slow
@pytest.mark.parametrize("as_tar", [False, True])
@pytest.mark.parametrize(
    ("lacking", "warning"),
    [
        ([], ""),
        (["3"], "9 of the 10 classes of .*last.pth, missing: 3"),
        (["0", "1", "2", "3", "4", "5"], "4 of the 10 .* missing: 0, 1, 2, 3, 4, ..."),
    ],
)
def test_labels_follow_the_class_names_of_the_checkpoint(
    run, right, tmp_path, capsys, caplog, lacking, warning, as_tar
):
    root = colored(tmp_path, "few", {k: v for k, v in DIGITS.items() if k not in lacking})
    for name in lacking:
        (root / "few" / name).mkdir()
    data, options = root, ["--split", "few"]
    if as_tar:
        data, options = tmp_path / "few.tar", []
        with tarfile.open(data, "w") as tar:
            tar.add(root / "few", arcname="few")
    arguments = ["--checkpoint", str(run / "last.pth"), "--data", str(data), *options]
    assert main([str(run / "config.yaml"), *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["top1"], result["images"]) == (100, 2 * (10 - len(lacking)))
    assert re.search(warning, caplog.text)
    assert ("classes" in caplog.text) == bool(lacking)


def test_classes_are_matched_by_name_not_by_order(run, right, tmp_path, capsys):
    """Folders are sorted (b, k); the checkpoint has another order (k, b)."""
    state = load_checkpoint(run / "last.pth")
    state["classes"] = list("kbcdefghij")
    save_atomically(state, tmp_path / "last.pth")
    root = colored(tmp_path, "val", {"b": 1, "k": 0, "d": 3})
    arguments = ["--checkpoint", str(tmp_path / "last.pth"), "--data", str(root)]
    assert main([str(run / "config.yaml"), *arguments]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == 100


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            DIGITS | {"three": 3},
            r"1 class is not in .*last.pth \(0, 1, .*\): three",
        ),
        ({"a": 1, "b": 2}, r"2 classes are not in .*last.pth \(0, 1, .*\): a, b"),
    ],
)
def test_classes_unknown_to_the_checkpoint_are_rejected(run, tmp_path, caplog, classes, message):
    arguments = ["--checkpoint", str(run / "last.pth")]
    arguments += ["--data", str(colored(tmp_path, "val", classes))]
    assert main([str(run / "config.yaml"), *arguments]) == 2
    assert re.search(message, caplog.text)


def test_weights_without_names_need_all_classes_or_indices(run, right, tmp_path, capsys, caplog):
    save_atomically(load_checkpoint(run / "last.pth")["model"], tmp_path / "weights.pth")
    command = [str(run / "config.yaml"), "--checkpoint", str(tmp_path / "weights.pth")]
    colored(tmp_path, "all", {name: i for i, name in enumerate("abcdefghij")})
    colored(tmp_path, "numbered", {"3": 3, "7": 7})
    for split in ("all", "numbered"):
        assert main([*command, "--data", str(tmp_path), "--split", split]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == 100
    colored(tmp_path, "few", {"a": 0, "b": 1})
    assert main([*command, "--data", str(tmp_path), "--split", "few"]) == 2
    assert "must have all 10 classes of" in caplog.text


@pytest.mark.parametrize(
    ("kind", "names", "warning"),
    [
        ("", [str(i) for i in range(1, 11)], "natural .* class 1 is 2; in lexicographic .* be 10"),
        (
            "torch/image_folder", [str(i) for i in range(1, 11)],
            "lexicographic order, so that class 1 is 10; in natural order it would be 2",
        ),
        ("", list("Bacdefghij"), "natural order, so that class 0 is a; in lexicographic .* be B"),
        ("", list("abcdefghij"), None),
        ("", [f"{i:02}" for i in range(1, 11)], None),
    ],
)  # fmt: skip
def test_an_ambiguous_order_of_classes_is_a_warning(tmp_path, caplog, kind, names, warning):
    colored(tmp_path, "val", dict.fromkeys(names, 0))
    dataset = build_dataset(Data(root=str(tmp_path), kind=kind), "val", False, 2)
    set_labels(dataset, None, "weights.pth", 10)
    (line,) = [record.getMessage() for record in caplog.records] or [None]
    assert line is None if warning is None else re.search(warning, line)


def test_a_subset_of_imagenet_is_labeled_by_synsets():
    dataset = FakeData(size=1)
    dataset.class_to_idx = {"n01443537": 0, "n02102040": 1}  # goldfish and English springer
    set_labels(dataset, None, "flash_internimage_tiny", 1000)
    assert [dataset.target_transform(i) for i in (0, 1)] == [1, 217]
