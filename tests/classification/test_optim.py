import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import flash_internimage  # noqa: F401  (registers the models)
from classification.config import Config, load_config
from classification.optim import build_optimizer, build_scheduler, lr_scale, parameter_groups

GOLDENS = Path("tests/data/optim")


def load(name: str) -> dict:
    return json.loads((GOLDENS / name).read_text())


@pytest.mark.parametrize(("size", "model"), [("T", "tiny"), ("L", "large")])
def test_parameter_groups_are_the_published_ones(size, model):
    golden = load(f"cls_{size}_recipe.json")
    args = golden["args"]
    with torch.device("meta"):
        net = timm.create_model(f"flash_internimage_{model}")
    groups = parameter_groups(
        net,
        args["base_lr"],
        args["weight_decay"],
        args["lr_layer_decay_ratio"] if args["lr_layer_decay"] else None,
        args["dcn_lr_mul"] or 1.0,
    )
    found = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    assert found == {
        name: (pytest.approx(lr, rel=1e-12), decay) for name, lr, decay, _ in golden["groups"]
    }


def test_learning_rates_follow_the_published_curve():
    golden = load("lr_T_8gpu.json")
    cfg = load_config("configs/classification/flash_internimage_tiny_in1k_224.yaml")
    scale = lr_scale(cfg, golden["world_size"])
    assert cfg.optimizer.lr * scale == golden["scaled_base_lr"]
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in golden["group_base_lrs"]
    ]
    optimizer = torch.optim.AdamW(groups)
    scheduler = build_scheduler(optimizer, cfg, golden["world_size"], golden["iters_per_epoch"])
    for update, expected in golden["lr_after_step_update"]:
        if update != "init":
            scheduler.step_update(update)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(expected, rel=1e-12)


def test_lr_scales_with_the_images_per_update():
    cfg = Config(batch_size=64, accumulation_steps=2)
    assert lr_scale(cfg, world_size=8) == 2.0
    cfg.optimizer.lr_batch = None
    assert lr_scale(cfg, world_size=8) == 1.0


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_any_timm_optimizer_is_built_with_the_groups(name):
    model = timm.create_model("flash_internimage_nano", num_classes=10)
    cfg = Config(optimizer={"name": name, "layer_decay": 0.5, "lr_batch": None, "lr": 1.0})
    rates = {group["lr"] for group in build_optimizer(model, cfg, 1).param_groups}
    assert rates == {0.5**i for i in range(5)}  # one per block


@pytest.mark.parametrize(
    ("name", "at_half", "at_end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("step", 0.1, 0.01)]
)
def test_schedules_fall(name, at_half, at_end):
    schedule = {
        "name": name, "epochs": 10, "warmup_epochs": 0, "warmup_lr": 0, "min_lr": 0,
        "decay_epochs": 4,
    }  # fmt: skip
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, Config(schedule=schedule), 1, updates_per_epoch=10)
    for update, expected in ((0, 1.0), (50, at_half), (99, at_end)):
        scheduler.step_update(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=0.011)
