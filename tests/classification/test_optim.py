import json
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import flash_internimage  # noqa: F401  (registers the models)
from flash_internimage.classification.config import Config, ConfigError, load_config
from flash_internimage.classification.optim import (
    build_optimizer,
    build_scheduler,
    lr_scale,
    parameter_groups,
)

GOLDENS = Path("tests/data/optim")


def load(name: str) -> dict:
    return json.loads((GOLDENS / name).read_text())


@pytest.mark.parametrize(("size", "model"), [("T", "tiny"), ("L", "large")])
def test_parameter_groups_match_the_published_ones(size, model):
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
    assert rates == {0.5**i for i in range(5)}  # one rate per block


# Adafactor uses its own schedule unless it gets a learning rate.
@pytest.mark.parametrize("name", ["adamw", "adafactor", "cadafactor", "sgd", "lion"])
def test_an_optimizer_uses_the_learning_rate_of_the_config(name):
    moves = []
    for lr in (0.0, 1e-4, 1e-3):
        model = nn.Linear(4, 4)
        before = [nn.init.ones_(parameter).clone() for parameter in model.parameters()]
        cfg = Config(optimizer={"name": name, "lr": lr, "lr_batch": None, "weight_decay": 0})
        optimizer = build_optimizer(model, cfg, 1)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        pairs = zip(model.parameters(), before, strict=True)
        moves.append(sum((new - old).detach().norm().item() for new, old in pairs))
    assert moves[0] == 0
    assert moves[1] > 0
    assert moves[2] == pytest.approx(10 * moves[1], rel=1e-2)


@pytest.mark.parametrize("lr", [5e-4, 0.1])
@pytest.mark.parametrize(
    ("name", "corrected"),
    [("adamw", "adamc"), ("nadamw", "nadamc"), ("sgdw", "sgdc"), ("lion", "lionc"),
     ("laprop", "lapropc"), ("rmsproptfw", "rmsproptfc"), ("novogradw", "novogradc")],
)  # fmt: skip
def test_corrected_weight_decay_equals_the_usual_one_at_the_peak_learning_rate(name, corrected, lr):
    decayed = []
    for each in (name, corrected):
        model = nn.Linear(4, 4, dtype=torch.float64)
        nn.init.ones_(model.weight).grad = torch.zeros(4, 4, dtype=torch.float64)
        options = {"name": each, "lr": lr, "lr_batch": None, "weight_decay": 0.05}
        build_optimizer(model, Config(optimizer=options), 1).step()
        decayed.append(1 - float(model.weight[0, 0].detach()))
    assert decayed == pytest.approx([0.05 * lr] * 2, rel=1e-6)


@pytest.mark.parametrize(
    "name", ["adamw", "adabelief", "lion", "adopt", "laprop", "adafactor", "sgd"]
)
def test_betas_and_eps_default_to_those_of_the_optimizer(name):
    model = nn.Linear(4, 4)
    own = create_optimizer_v2(model.parameters(), opt=name, lr=1e-3).param_groups[0]
    built = build_optimizer(model, Config(optimizer={"name": name}), 1).param_groups[0]
    for key in own.keys() & {"betas", "eps", "beta", "beta1", "beta2"}:
        assert built[key] == own[key]


def test_adamw_has_the_published_betas_and_eps():
    group = build_optimizer(nn.Linear(4, 4), Config(), 1).param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_the_multiplier_applies_to_the_offsets_of_internimage_as_published(layer_decay):
    with torch.device("meta"):
        model = timm.create_model(
            "internimage_tiny", depths=(1, 1, 2, 1), center_feature_scale=True
        )
    groups = parameter_groups(model, 1.0, 0.05, layer_decay, dcn_lr_multiplier=0.1)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    slowed = r"levels\.(\d)\.blocks\.(\d)\.dcn\.(offset\.|center_feature_scale_proj_)(weight|bias)"
    assert sum(bool(re.fullmatch(slowed, name)) for name in rates) == 5 * 4
    for name, rate in rates.items():
        block = re.match(r"levels\.\d\.blocks\.\d\.", name)
        if block:
            expected = rates[f"{block[0]}norm1.0.weight"]
            expected *= 0.1 if re.fullmatch(slowed, name) else 1
            assert rate == pytest.approx(expected), name


def test_a_multiplier_for_dcnv4_requires_a_dcnv4_model():
    cfg = Config(model={"name": "resnet18"}, optimizer={"dcn_lr_multiplier": 0.1})
    with pytest.raises(ConfigError, match=r"dcn_lr_multiplier must be 1 for resnet18, .* got 0.1"):
        build_optimizer(nn.Linear(4, 4), cfg, 1)


@pytest.mark.parametrize(
    ("name", "at_half", "at_end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("step", 0.1, 0.01)]
)
def test_schedules_decay_as_expected(name, at_half, at_end):
    schedule = {
        "name": name, "epochs": 10, "warmup_epochs": 0, "warmup_lr": 0, "min_lr": 0,
        "decay_epochs": 4,
    }  # fmt: skip
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, Config(schedule=schedule), 1, updates_per_epoch=10)
    for update, expected in ((0, 1.0), (50, at_half), (99, at_end)):
        scheduler.step_update(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=0.011)
