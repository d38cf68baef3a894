"""Tests of matching initial weights with the classes of the data."""

import math
import re
import shutil

import pytest
import torch

from flash_internimage.checkpoints import load_checkpoint, save_atomically
from flash_internimage.classification.config import ConfigError
from flash_internimage.classification.data.classes import describe_other_classes
from flash_internimage.classification.engine import Trainer
from flash_internimage.classification.training import train
from tests.classification.helpers import (
    CPU,
    build,
)


def test_error_names_non_finite_initial_weights(config, tmp_path):
    weights = build(config()).model.state_dict()
    weights["head.weight"].fill_(math.nan)
    save_atomically({"model": weights}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"head\.weight of .*weights\.pth is not finite"):
        Trainer(config(model={"initial_checkpoint": str(tmp_path / "weights.pth")}), CPU)


@pytest.mark.parametrize(
    ("checkpoint", "data", "difference"),
    [
        ("abc", "abc", None),
        ("abc", "abd", "only in the checkpoint: c; only in the data: d"),
        ("abc", "ab2", "only in the checkpoint: c; only in the data: 2"),
        ("abc", "acb", "class 1 is b in the checkpoint and c in the data"),
        ("abc", "ab", "only in the checkpoint: c"),
        ("ab", "abc", "only in the data: c"),
        ("abcdefgh", "", "only in the checkpoint: a, b, c, d, e, ..."),
        ("aab", "ab", "class 1 is a in the checkpoint and b in the data"),
        ("ab", "abb", "2 in the checkpoint and 3 in the data"),
    ],
)
def test_classes_are_compared_in_order(checkpoint, data, difference):
    assert describe_other_classes(checkpoint, data) == difference


@pytest.mark.parametrize(
    ("names", "class_map", "rows", "warning"),
    [
        ("0123456789", None, "0123456789", None),
        (
            "z123456789",
            None,
            None,
            "head stays randomly initialized, .*only in the checkpoint: 0; ",
        ),
        ("qrstuvwxyz", None, None, "head stays .* only in the data: q, r, s, t, u, ..."),
        ("q123456789", "1 2 3 4 5 6 7 8 9 0", "1234567890", "class_map assigns .*data: q"),
        ("0123456789", "1 2 3 4 5 6 7 8 9 0", "1234567890", "class_map assigns .*class 0 is 1 in"),
    ],
)
def test_the_classifier_is_loaded_only_for_the_same_classes(
    change, checkpoint, digits, tmp_path, caplog, names, class_map, rows, warning
):
    root = shutil.copytree(digits, tmp_path / "digits")
    for old, new in enumerate(names):
        for split in ("train", "val"):
            (root / split / str(old)).rename(root / split / f"_{new}")
    for folder in root.glob("*/*"):
        folder.rename(folder.with_name(folder.name[1:]))
    settings = {"data.root": str(root)}
    if class_map:
        (tmp_path / "map.txt").write_text(class_map)
        settings["model.class_map"] = str(tmp_path / "map.txt")
    fresh = Trainer(change(**{"data.root": str(root)}), CPU).model.head.weight
    caplog.clear()
    initial = str(checkpoint["between"])
    head = Trainer(change(**{"model.initial_checkpoint": initial, **settings}), CPU).model.head
    loaded = load_checkpoint(checkpoint["between"])["model_ema"]["head.weight"]
    assert torch.equal(head.weight, loaded[[int(i) for i in rows]] if rows else fresh)
    found = [r.getMessage() for r in caplog.records if "checkpoint" in r.getMessage()]
    assert len(found) == (warning is not None)
    assert warning is None or re.search(warning, found[0])


def test_initial_weights_are_reordered_to_match_the_classes(change, checkpoint, tmp_path, caplog):
    state = load_checkpoint(checkpoint["between"])
    state["classes"] = list("9876543210")
    save_atomically(state, tmp_path / "initial.pth")
    options = change(**{"model.initial_checkpoint": str(tmp_path / "initial.pth")})
    head = Trainer(options, CPU).model.head
    assert torch.equal(head.weight, state["model_ema"]["head.weight"].flip(0))
    assert torch.equal(head.bias, state["model_ema"]["head.bias"].flip(0))
    assert "are reordered to match the data (class 0 is 9 in the checkpoint" in caplog.text


@pytest.mark.slow
def test_a_resumed_run_does_not_need_its_initial_weights(config, checkpoint, tmp_path):
    shutil.copy(checkpoint["between"], tmp_path / "initial.pth")
    cfg = config(
        model={"initial_checkpoint": str(tmp_path / "initial.pth")}, schedule={"epochs": 1}
    )
    train(cfg)
    (tmp_path / "initial.pth").unlink()
    train(cfg, resume="auto")
