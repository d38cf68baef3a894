"""Tests of the exported form of models, in eager PyTorch, against the models' own libraries."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from flash_internimage.configs import find_config
from flash_internimage.export.models import exportable
from flash_internimage.export.verification import make_batch, sample_images
from flash_internimage.inference import load_predictor
from tests.nano import CLASSIFIER, DETECTOR, SEGMENTOR

DINO = "dino-4scale_flash_internimage_nano_digits_scenes"
MASK2FORMER = "mask2former_flash_internimage_nano_digits_scenes"


@pytest.fixture(autouse=True)
def always_clean(one_thread, restore_scope):
    """Apply to all tests of this module."""


def write_initial(name: str, path: Path) -> Path:
    """Write a checkpoint with the weights from which training starts."""
    cfg = Config.fromfile(find_config(name))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.manual_seed(0)
        model = MODELS.build(copy.deepcopy(cfg.model))
        model.init_weights()
    torch.save({"state_dict": model.state_dict(), "meta": {}}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", [SEGMENTOR, MASK2FORMER, DINO, DETECTOR])
def test_outputs_are_those_of_openmmlab(name, weights, tmp_path):
    checkpoint = weights.get(name) or write_initial(name, tmp_path / "model.pth")
    model = exportable(load_predictor(name, checkpoint, device="cpu"), name)
    images = make_batch(model, sample_images(), (70, 97), 2 if model.dynamic_batch else 1)
    expected = model.run(images)
    with torch.inference_mode():
        actual = dict(zip(model.outputs, model(images), strict=True))
    for output, tensor in expected.items():
        scale = max(1.0, tensor.abs().max().item()) if tensor.is_floating_point() else 1.0
        torch.testing.assert_close(actual[output], tensor, rtol=0, atol=1e-5 * scale)
    assert expected["scores"].numel() > 0


def test_feature_maps_are_those_of_timm(weights):
    predictor = load_predictor(CLASSIFIER, weights[CLASSIFIER], device="cpu")
    model = exportable(predictor, CLASSIFIER, features=True)
    images = make_batch(model, sample_images(), (40, 33), 2)
    maps = predictor.model.forward_intermediates(images, intermediates_only=True)
    assert model.outputs == ("stage1", "stage2", "stage3", "stage4")
    for output, expected in zip(model(images), maps, strict=True):
        assert output.equal(expected)


@pytest.mark.parametrize("option", ["features", "with_preprocessing"])
def test_options_of_classifiers_are_refused_for_other_models(option, weights):
    predictor = load_predictor(SEGMENTOR, weights[SEGMENTOR], device="cpu")
    with pytest.raises(ValueError, match=f"must be classification for {option}, got segmentation"):
        exportable(predictor, SEGMENTOR, **{option: True})
