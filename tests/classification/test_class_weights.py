"""Tests of class weights in the loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from flash_internimage.classification.config import Config, ConfigError
from flash_internimage.classification.data import balanced_weights
from flash_internimage.classification.optim import build_criterion
from tests.classification.helpers import build

WEIGHTS = [0.5, 1.0, 4.0]


def criterion(weights=None, **augmentation) -> torch.nn.Module:
    cfg = Config.model_validate({"augmentation": {"mixup": 0.0, "cutmix": 0.0, **augmentation}})
    return build_criterion(cfg, weights)


def test_weights_change_the_loss_as_in_pytorch():
    logits, labels = torch.randn(8, 3), torch.arange(8) % 3
    for smoothing in (0.0, 0.1):
        loss = criterion(WEIGHTS, label_smoothing=smoothing)(logits, labels)
        expected = F.cross_entropy(logits, labels, torch.tensor(WEIGHTS), label_smoothing=smoothing)
        assert loss == expected
        assert loss != criterion(label_smoothing=smoothing)(logits, labels)


def test_mixed_labels_are_weighted_and_smoothed_once():
    logits, labels = torch.randn(8, 3), torch.rand(8, 3).softmax(1)
    loss = criterion(WEIGHTS, mixup=0.8, label_smoothing=0.1)(logits, labels)
    expected = -(labels * logits.log_softmax(1) * torch.tensor(WEIGHTS)).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_equal_weights_change_nothing():
    logits, labels = torch.randn(8, 3), torch.arange(8) % 3
    for smoothing in (0.0, 0.1):
        loss = criterion([2.0] * 3, label_smoothing=smoothing)(logits, labels)
        expected = criterion(label_smoothing=smoothing)(logits, labels)
        torch.testing.assert_close(loss, expected)


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.repeat(np.arange(4), [1, 5, 2, 8])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    for reader in (
        SimpleNamespace(samples=[("name", label) for label in labels.tolist()]),
        SimpleNamespace(targets=labels),
        SimpleNamespace(targets=torch.tensor(labels)),
        SimpleNamespace(targets=labels.tolist()),
    ):
        weights = balanced_weights(SimpleNamespace(reader=reader), 4)
        assert weights == pytest.approx(expected)


def test_a_class_without_images_has_no_weight():
    dataset = SimpleNamespace(reader=SimpleNamespace(targets=[0, 0, 0, 2]))
    assert balanced_weights(dataset, 4) == pytest.approx([4 / 6, 0, 4 / 2, 0])


def test_unknown_labels_cannot_be_balanced():
    with pytest.raises(ConfigError, match=r"class_weights must be a list .* got 'balanced'"):
        balanced_weights(SimpleNamespace(reader=SimpleNamespace()), 4)


@pytest.mark.parametrize("weights", ["balanced", [1.0] * 9 + [5.0]])
def test_training_uses_the_weights(config, deterministic_images, weights):
    model = {"drop_path_rate": 0.0}
    trainer = build(config(class_weights=weights, augmentation=deterministic_images, model=model))
    expected = [1.0] * 10 if weights == "balanced" else weights  # 6 images of each class
    images, labels = next(iter(trainer.train_loader))
    logits = trainer.model(images)
    loss = F.cross_entropy(logits, labels, torch.tensor(expected), label_smoothing=0.1).item()
    assert trainer.train_update([(images, labels)]) == pytest.approx(loss, rel=1e-5)
