"""Tests that unusable models and devices raise one-line errors before work starts."""

import pytest
import torch
from torch import nn

from flash_internimage.classification.config import Config, ConfigError, Model
from flash_internimage.classification.model import (
    build_model,
    check_model,
    find_not_finite,
    pick_device,
)
from flash_internimage.classification.optim import build_optimizer
from tests.classification.helpers import SMALL

SMALL_MODEL = {"name": "flash_internimage_nano", "num_classes": 10, "args": SMALL}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "flash_internimage_tinny"}, "did you mean 'flash_internimage_tiny'"),
        ({"class_map": "a"}, "class_map must be null without model.initial_checkpoint, got 'a'"),
        ({"name": "nonsense/model"}, "model.name must be a timm model, got 'nonsense/model'"),
        ({"args": {"chanels": 3}}, r"model\.args=.*chanels"),
        ({"args": {"depths": "many"}}, r"model\.args=.*depths"),
        ({"args": {"depths": [1]}}, r"model\.args=.*depths"),
        ({"args": {"groups": [3, 3, 3, 3]}}, r"model\.args=.*cannot be used"),
        (
            {"name": "resnet10t", "args": {"block_args": 3}},
            r"model\.args=.* cannot be used with model\.name=resnet10t",
        ),
        ({"name": "vgg11", "drop_path_rate": 0.1}, "model.drop_path_rate must be 0 for vgg11"),
        ({"name": "ghostnet_050", "drop_path_rate": 0, "grad_checkpointing": True}, None),
    ],
)
def test_a_model_that_cannot_be_built_is_a_one_line_error(options, message):
    options = Model(**{**SMALL_MODEL, "args": {}, **options})
    if message is None:
        assert build_model(options).grad_checkpointing
        return
    with pytest.raises(ConfigError, match=message) as error:
        build_model(options)
    assert "\n" not in str(error.value)


def test_unsupported_gradient_checkpointing_is_a_one_line_error(monkeypatch):
    def refuse(self, enable=True):
        assert not enable, "gradient checkpointing not supported"

    monkeypatch.setattr("timm.models.resnet.ResNet.set_grad_checkpointing", refuse)
    with pytest.raises(ConfigError, match=r"model\.grad_checkpointing must be false for test_res"):
        build_model(Model(name="test_resnet", num_classes=2, grad_checkpointing=True))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("vit_tiny_patch16_224", {"depth": 1}, r"data\.image_size=32 with 3 channels: .*32.*224"),
        ("test_resnet", {"in_chans": 1}, r"data\.image_size=32 with 3 channels: .*channels"),
    ],
)
def test_a_model_that_does_not_accept_the_images_is_a_one_line_error(name, args, message):
    model = build_model(Model(name=name, num_classes=10, drop_path_rate=0, args=args)).train()
    with pytest.raises(ConfigError, match=message) as error:
        check_model(model, 32, 10)
    assert "\n" not in str(error.value)
    assert model.training


def test_a_model_that_does_not_return_logits_is_a_one_line_error():
    with pytest.raises(ConfigError, match=r"must return \(N, 10\) logits .* got \(1, 10, 32, 32\)"):
        check_model(nn.Conv2d(3, 10, 1), 32, 10)


def test_checking_a_classifier_does_not_change_it():
    model = build_model(Model(**SMALL_MODEL)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    check_model(model, 32, 10)
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "", "cpu:x", "0"])
def test_a_missing_device_is_a_one_line_error(name):
    with pytest.raises(ConfigError, match=rf"^device must be 'auto' or .*cpu.*, got '{name}'$"):
        pick_device(name)


def test_an_accelerator_is_used_if_available(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: cuda)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [pick_device(n) for n in ("auto", "cuda", "cuda:1")] == [
        cuda,
        cuda,
        torch.device("cuda:1"),
    ]
    with pytest.raises(ConfigError, match="one of cpu, cuda:0, cuda:1, got 'cuda:7'"):
        pick_device("cuda:7")


def test_the_cpu_is_used_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device must be 'auto' or one of cpu, got 'cuda'"):
        pick_device("cuda")


def test_error_names_a_non_finite_weight():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert find_not_finite(model) is None
    model[1].running_var[0] = torch.inf  # some buffers are masks
    assert find_not_finite(model) is None
    model[1].running_var[0] = torch.nan
    assert find_not_finite(model) == "1.running_var"
    model[0].weight.data[0, 0] = torch.inf
    assert find_not_finite(model) == "0.weight"


@pytest.mark.parametrize("layer_decay", [None, 0.9])
def test_layer_decay_requires_a_model_with_ordered_layers(layer_decay):
    cfg = Config(optimizer={"layer_decay": layer_decay})
    if layer_decay is None:
        assert len(build_optimizer(nn.Linear(2, 2), cfg, 1).param_groups) == 2
        return
    with pytest.raises(ConfigError, match=r"optimizer.layer_decay must be null .* got 0.9"):
        build_optimizer(nn.Linear(2, 2), cfg, 1)


@pytest.mark.parametrize("name", ["fusedadamw", "bnbadam8bit"])
def test_an_optimizer_that_is_not_installed_is_a_one_line_error(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"optimizer\.name={name} cannot be used: "):
        build_optimizer(nn.Linear(2, 2), Config(optimizer={"name": name}), 1)
