"""Test that class weights of a detector are checked before it is trained."""

from operator import attrgetter
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from flash_internimage.configs import find_config
from flash_internimage.openmmlab.detection import CheckDetectorHook
from tests.nano import DETECTOR


@pytest.fixture(scope="module")
def model() -> nn.Module:
    cfg = Config.fromfile(find_config(DETECTOR))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


def check(model: nn.Module, monkeypatch, loss: str, weights: object) -> None:
    monkeypatch.setattr(attrgetter(loss)(model), "class_weight", weights)
    CheckDetectorHook().before_run(SimpleNamespace(model=model))


@pytest.mark.parametrize(
    ("loss", "weights", "message"),
    [
        (
            "roi_head.bbox_head.loss_cls",
            [1.0] * 10,
            r"11 .* \(10 classes and the background\)",
        ),
        ("roi_head.bbox_head.loss_cls", 1.0, r"11 numbers of at least 0 .*, got 1.0$"),
        ("roi_head.bbox_head.loss_cls", [-1.0] * 11, "11 numbers of at least 0 .*, got"),
        ("rpn_head.loss_cls", [1.0, 1.0], r"1 numbers of at least 0 \(1 classes\), got"),
        ("roi_head.mask_head.loss_mask", [1.0] * 28, "None for a loss of masks, got"),
    ],
)
def test_wrong_class_weights_are_named(model, monkeypatch, loss, weights, message):
    with pytest.raises(ValueError, match=rf"^model\.{loss}\.class_weight must be {message}"):
        check(model, monkeypatch, loss, weights)


@pytest.mark.parametrize("weights", [None, [1.0] * 10 + [0.0]])
def test_a_weight_per_class_and_one_for_the_background_are_accepted(model, monkeypatch, weights):
    check(model, monkeypatch, "roi_head.bbox_head.loss_cls", weights)
