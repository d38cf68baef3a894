"""What a resumed run takes from its checkpoint, what from its settings, and what it refuses."""

import csv
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import get_optimizer_info
from torch import nn

from flash_internimage.checkpoints import load_checkpoint, save_atomically
from flash_internimage.classification.cli.train import train
from flash_internimage.classification.config import Config, ConfigError, Section
from flash_internimage.classification.data.classes import describe_other_classes
from flash_internimage.classification.engine import Diverged, Trainer
from flash_internimage.classification.model import pick_device
from flash_internimage.classification.resuming import restore_optimizer

CPU = torch.device("cpu")
EPOCHS = {"epochs": 4, "warmup_epochs": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def checkpoint(config, saved):
    """Returns a checkpoint between epochs 2 and 3 of 4, or within epoch 3."""
    if not (saved / "last.pth").exists():
        trainer = build(config(output=str(saved), schedule=EPOCHS, device="cpu"))
        trainer.train_update([next(iter(trainer.train_loader))])
        trainer.epoch, trainer.update = 2, 3
        trainer.save()
        (saved / "last.pth").rename(saved / "within.pth")
        trainer.update = 0
        trainer.save()
    return {"between": saved / "last.pth", "within": saved / "within.pth"}


@pytest.fixture
def change(config):
    """Builds a Config from dotted keys."""

    def build(**changes) -> Config:
        merged = {"schedule": EPOCHS, "device": "cpu"}
        for key, value in changes.items():
            section, _, name = key.rpartition(".")
            if section:
                merged.setdefault(section, {})
                merged[section] = {**merged[section], name: value}
            else:
                merged[key] = value
        return config(**merged)

    return build


def build(cfg: Config) -> Trainer:
    return Trainer(cfg, pick_device(cfg.device), load_initial=False)


def rates(trainer: Trainer) -> list[float]:
    return [group["lr"] for group in trainer.optimizer.param_groups]


def in_groups(key):
    return lambda trainer, value: {g[key] for g in trainer.optimizer.param_groups} == {value}


def follows_its_schedule(trainer: Trainer, value) -> bool:
    fresh = build(trainer.cfg)
    fresh.scheduler.step_update(2 * fresh.updates_per_epoch - 1)
    return rates(trainer) == rates(fresh)


def in_training_transform(text):
    return lambda trainer, value: text in str(trainer.train_loader.dataset.transform)


def in_evaluation_transform(text):
    return lambda trainer, value: text in str(trainer.val_set.transform)


def of_mixup(name):
    return lambda trainer, value: getattr(trainer.mixup, name) == value


def of_scheduler(name):
    return lambda trainer, value: getattr(trainer.scheduler, name) == value


def computes_in(dtype):
    def check(trainer: Trainer, value) -> bool:
        seen = set()
        trainer.model.head.register_forward_hook(lambda *args: seen.add(args[2].dtype))
        loss = trainer.train_update([next(iter(trainer.train_loader))])
        return seen == {dtype} and loss > 0 and trainer.scaler.is_enabled() == (value == "fp16")

    return check


def clips_at_its_value(trainer: Trainer, value) -> bool:
    clipped = []
    clip, nn.utils.clip_grad_norm_ = nn.utils.clip_grad_norm_, lambda _, norm: clipped.append(norm)
    try:
        with pytest.raises(TypeError):  # the norm is None
            trainer.train_update([next(iter(trainer.train_loader))])
    finally:
        nn.utils.clip_grad_norm_ = clip
    return clipped == [value]


def stops_at_once(trainer: Trainer, value) -> bool:
    with pytest.raises(Diverged, match="1 updates in a row"):
        trainer._count(torch.nan, 1.0)
    return True


def run_of_an_epoch(trainer: Trainer) -> list[tuple]:
    """Trains epoch 3 and returns the update and the further names of each save."""
    saves = []
    trainer.save = lambda *names: saves.append((trainer.update, *names))
    trainer.output.mkdir()
    trainer.cfg.schedule.epochs = 3
    trainer.fit()
    return saves


SMALLER = {"channels": 16, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8]}
NO_MIXUP = {"augmentation.mixup": 0.0, "augmentation.cutmix": 0.0}

# For each setting: another value, and what shows after a resume that it is used.
USED = {
    "output": ("elsewhere", lambda t, v: t.last == Path(v, "last.pth") and t.best_top1 < 0),
    "seed": (7, lambda t, v: t.train_loader.sampler.seed == v),
    "device": ("auto", lambda t, v: {p.device.type for p in t.model.parameters()}
               == {pick_device(v).type}),
    "batch_size": (6, lambda t, v: (t.updates_per_epoch, t.train_loader.batch_size) == (10, v)
                   and follows_its_schedule(t, v)),
    "val_batch_size": (4, lambda t, v: t.val_loader.batch_size == v),
    "accumulation_steps": (5, lambda t, v: t.updates_per_epoch == 1
                           and follows_its_schedule(t, v)),
    "amp": ("bf16", computes_in(torch.bfloat16)),
    "ema_decay": (0.5, lambda t, v: t.ema.decay == v),
    "max_nonfinite": (1, stops_at_once),
    "model.drop_path_rate": (0.3, lambda t, v: v in {
        round(getattr(m, "drop_prob", None) or 0.0, 6) for m in t.model.modules()}),
    "model.args": (SMALLER | {"drop_rate": 0.5}, lambda t, v: t.model.drop_rate == 0.5),
    "model.grad_checkpointing": (True, lambda t, v: t.model.levels[0].grad_checkpointing),
    "model.compile": (True, lambda t, v: isinstance(t.parallel, torch._dynamo.OptimizedModule)),
    "data.train_split": ("val", lambda t, v: len(t.train_loader.dataset) == 20),
    "data.val_split": ("train", lambda t, v: len(t.val_set) == 60),
    "data.image_size": (64, lambda t, v: next(iter(t.val_loader))[0].shape[-1] == v),
    "data.crop_pct": (0.5, in_evaluation_transform("size=64")),
    "data.interpolation": ("nearest", in_evaluation_transform("nearest")),
    "data.mean": ((0.1, 0.1, 0.1), in_evaluation_transform("mean=tensor([0.1000, 0.1000")),
    "data.std": ((0.1, 0.1, 0.1), in_evaluation_transform("std=tensor([0.1000, 0.1000")),
    "data.workers": (1, lambda t, v: t.train_loader.num_workers == v),
    "data.max_corrupt": (3, lambda t, v: t.val_set.max_corrupt == v),
    "augmentation.scale": ((0.3, 0.4), in_training_transform("scale=(0.3, 0.4)")),
    "augmentation.ratio": ((0.5, 0.6), in_training_transform("ratio=(0.5, 0.6)")),
    "augmentation.hflip": (0.1, in_training_transform("RandomHorizontalFlip(p=0.1)")),
    "augmentation.auto_augment": ("rand-m9-n5", in_training_transform("n=5")),
    "augmentation.color_jitter": (0.1, in_training_transform("brightness=(0.9, 1.1)"),
                                  {"augmentation.auto_augment": None}),
    "augmentation.random_erasing": (0.2, in_training_transform("RandomErasing(p=0.2")),
    "augmentation.random_erasing_mode": ("const", in_training_transform("mode=const")),
    "augmentation.random_erasing_count": (3, in_training_transform("count=(1, 3)")),
    "augmentation.mixup": (0.0, lambda t, v: t.mixup is None
                           and isinstance(t.criterion, LabelSmoothingCrossEntropy), NO_MIXUP),
    "augmentation.cutmix": (0.5, of_mixup("cutmix_alpha")),
    "augmentation.mixup_prob": (0.5, of_mixup("mix_prob")),
    "augmentation.mixup_switch_prob": (0.3, of_mixup("switch_prob")),
    "augmentation.mixup_mode": ("elem", of_mixup("mode")),
    "augmentation.label_smoothing": (0.3, of_mixup("label_smoothing")),
    "optimizer.lr": (0.5, follows_its_schedule),
    "optimizer.lr_batch": (24, follows_its_schedule),
    "optimizer.weight_decay": (0.3, lambda t, v: {
        g["weight_decay"] for g in t.optimizer.param_groups} == {0.0, v}),
    "optimizer.betas": ((0.5, 0.6), in_groups("betas")),
    "optimizer.eps": (1e-3, in_groups("eps")),
    "optimizer.clip_grad": (0.125, clips_at_its_value),
    "optimizer.layer_decay": (0.5, follows_its_schedule),
    "optimizer.dcn_lr_multiplier": (0.1, follows_its_schedule),
    "schedule.name": ("linear", follows_its_schedule),
    "schedule.epochs": (8, follows_its_schedule),
    "schedule.warmup_epochs": (3, follows_its_schedule),
    "schedule.warmup_lr": (1e-5, follows_its_schedule, {"schedule.warmup_epochs": 3}),
    "schedule.min_lr": (1e-4, follows_its_schedule),
    "schedule.decay_epochs": (1.0, follows_its_schedule, {"schedule.name": "step"}),
    "schedule.decay_rate": (0.5, follows_its_schedule,
                            {"schedule.name": "step", "schedule.decay_epochs": 1.0}),
    "checkpoints.every_epochs": (1, lambda t, v: "epoch_3.pth" in run_of_an_epoch(t)[-1]),
    "checkpoints.every_updates": (2, lambda t, v: [s[0] for s in run_of_an_epoch(t)] == [2, 4, 0]),
}  # fmt: skip

# For each setting that cannot change: another value, and the message.
REFUSED = {
    "model.name": ("flash_internimage_tiny", "model.name must be 'flash_internimage_nano' as in"),
    "model.num_classes": (12, "model.num_classes must be 10 as in the checkpoint, got 12"),
    "model.initial_checkpoint": ("other.pth", "model.initial_checkpoint must be None as in"),
    "model.class_map": ("other.txt", "model.class_map must be None as in"),
    "optimizer.name": ("sgd", "optimizer.name must be 'adamw' as in the checkpoint, got 'sgd'"),
    "model.args": (SMALLER | {"channels": 32}, "does not fit the model: .*shape of patch_embed"),
    "schedule.epochs": (1, "schedule.epochs must be at least 2, .* got 1"),
    "data.root": ("renamed", r"only in the checkpoint: 3; only in the data: three"),
    # The digits of each split are in two folders, which are the classes for torchvision.
    "data.kind": ("torch/image_folder", r"only in the checkpoint: 0, 1; only in the data: a, b"),
}
REFUSED_WITHIN_AN_EPOCH = {
    "seed": (7, "seed must be 0 as in the checkpoint, which was saved within an epoch, got 7"),
    "batch_size": (6, "batch_size must be 12 as in"),
    "accumulation_steps": (5, "accumulation_steps must be 1 as in"),
    "data.train_split": ("val", "an epoch of 5 updates on 1 processes, this run has 1 on 1"),
}


def leaves(section: type[Section], prefix: str = "") -> set[str]:
    keys = set()
    for name, field in section.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        keys |= leaves(field.annotation, f"{prefix}{name}.") if is_section else {prefix + name}
    return keys


def test_every_setting_is_known_to_be_used_or_refused():
    assert USED.keys() | REFUSED.keys() == leaves(Config)


@pytest.mark.parametrize("key", USED)
def test_a_changed_setting_is_used(key, change, checkpoint, tmp_path):
    value, check, *others = USED[key]
    if key == "output":
        value = str(tmp_path / value)
    trainer = build(change(**{key: value, **(others[0] if others else {})}))
    changes = trainer.resume(checkpoint["between"])
    if key not in ("output", "model.args"):
        assert any(line.startswith(f"{key} was ") for line in changes)
    assert trainer.epoch == 2
    assert check(trainer, value)
    state = load_checkpoint(checkpoint["between"])
    if key not in ("amp", "optimizer.clip_grad") and not key.startswith("checkpoints."):
        assert torch.equal(trainer.model.head.weight.cpu(), state["model"]["head.weight"])
        moments = trainer.optimizer.state[trainer.model.head.weight]["exp_avg"]
        names = [name for group in state["optimizer"]["param_groups"] for name in group["names"]]
        saved = state["optimizer"]["state"][names.index("head.weight")]["exp_avg"]
        assert saved.any()
        assert torch.equal(moments.cpu(), saved)


@pytest.mark.parametrize("key", REFUSED)
def test_a_setting_that_cannot_change_is_refused(key, change, checkpoint, digits, tmp_path):
    (value, message), others = REFUSED[key], {}
    if key == "data.kind":
        others = {"data.root": str(tmp_path)}
        for folder in digits.glob("*/*"):
            outer = "a" if int(folder.name) < 5 else "b"
            shutil.copytree(folder, tmp_path / folder.parent.name / outer / folder.name)
        build(change(**others)).resume(checkpoint["between"])
    if key == "data.root":
        value = str(tmp_path / value)
        shutil.copytree(digits, value)
        for split in ("train", "val"):
            Path(value, split, "3").rename(Path(value, split, "three"))
    with pytest.raises(ValueError, match=f"cannot resume from .*{message}") as error:
        build(change(**{key: value}, **others)).resume(checkpoint["between"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", REFUSED_WITHIN_AN_EPOCH)
def test_a_setting_that_cannot_change_within_an_epoch_is_refused(key, change, checkpoint):
    value, message = REFUSED_WITHIN_AN_EPOCH[key]
    trainer = build(change(**{key: value}))
    with pytest.raises(ValueError, match=f"cannot resume from .*{message}"):
        trainer.resume(checkpoint["within"])


def rows_of(folder) -> list[dict]:
    """The rows of metrics.csv, without the measured speed."""
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if k != "images_per_second"}
            for row in csv.DictReader(file)
        ]


def assert_equal(a, b) -> None:
    """Compares checkpoints exactly, tensor by tensor."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


class Killed(BaseException):
    pass


def test_a_run_killed_between_any_two_files_ends_as_an_uninterrupted_one(
    config, tmp_path, monkeypatch
):
    whole, killed = config(output=str(tmp_path / "whole")), config(output=str(tmp_path / "killed"))
    train(whole)
    replace = os.replace
    # The file that is never put in place, and how many epochs last.pth holds at that time.
    for name, epochs in (
        ("metrics.csv", 0), ("best.pth", 0), ("last.pth", 0), ("metrics.csv", 1), ("last.pth", 1),
        ("curves.png", 2),
    ):  # fmt: skip
        done = 0

        def kill(source, target, name=name, epochs=epochs):
            nonlocal done
            if Path(target).name == name and done == epochs:
                raise Killed
            replace(source, target)
            if Path(target).name == "last.pth":
                done = load_checkpoint(target)["epoch"]

        last = tmp_path / "killed" / "last.pth"
        done = load_checkpoint(last)["epoch"] if last.exists() else 0
        monkeypatch.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            train(killed, resume="auto")
    monkeypatch.setattr(os, "replace", replace)
    train(killed, resume="auto")
    for name in ("last.pth", "best.pth"):
        one, other = (load_checkpoint(tmp_path / f / name) for f in ("whole", "killed"))
        assert one["config"].pop("output") != other["config"].pop("output")
        assert_equal(one, other)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "killed")
    assert (tmp_path / "killed" / "predictions.png").exists()
    assert not list((tmp_path / "killed").glob(".*.partial"))


@pytest.mark.parametrize(("before", "after"), [(None, 0.9), (0.9, None)])
def test_ema_may_be_switched_at_a_resume(config, before, after):
    train(config(ema_decay=before, schedule={"epochs": 1}))
    cfg = config(ema_decay=after)
    trainer = build(cfg)
    trainer.resume(trainer.last)
    state = load_checkpoint(trainer.last)
    assert (trainer.ema is None) == (after is None)
    if after:
        assert_equal(dict(trainer.ema.module.state_dict()), dict(state["model"]))
    train(cfg, resume="auto")
    assert ("model_ema" in load_checkpoint(trainer.last)) == (after is not None)
    columns = [bool(row["ema_top1"]) for row in rows_of(cfg.output)]
    assert columns == [before is not None, after is not None]
    assert (trainer.output / "curves.png").exists()


@pytest.mark.parametrize(("before", "after"), [("fp16", "off"), ("off", "fp16"), ("fp16", "bf16")])
def test_amp_may_change_at_a_resume(config, tmp_path, before, after):
    trainer = build(config(amp=before))
    trainer.output.mkdir()
    trainer.epoch = 1
    trainer.save()
    resumed = build(config(amp=after))
    resumed.resume(trainer.last)
    assert resumed.scaler.is_enabled() == (after == "fp16")
    assert resumed.train_update([next(iter(resumed.train_loader))]) > 0


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion"])
def test_the_state_of_an_optimizer_is_restored_by_name(config, name):
    """Also where layer decay divides the parameters into other groups."""
    settings = {"name": name, "weight_decay": 0.05}
    trainer = build(config(optimizer=settings))
    trainer.output.mkdir()
    batches = [next(iter(trainer.train_loader))]
    for _ in range(2):
        trainer.train_update(batches)
    trainer.epoch = 1
    trainer.save()
    resumed = build(config(optimizer={**settings, "layer_decay": 0.5}))
    resumed.resume(trainer.last)
    assert len(resumed.optimizer.param_groups) > len(trainer.optimizer.param_groups)
    parameters = dict(resumed.model.named_parameters())
    for key, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state[parameter]
        assert_equal(dict(state), dict(resumed.optimizer.state[parameters[key]]))
    before, after = (
        {int(g["step"]) for g in t.optimizer.param_groups if "step" in g}
        for t in (trainer, resumed)
    )
    assert before == after
    assert resumed.train_update(batches) > 0


def test_weights_without_the_state_of_a_run_are_refused(config, tmp_path):
    save_atomically({"model": build(config()).model.state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"cannot resume from .*it lacks optimizer, scaler"):
        train(config(), resume=str(tmp_path / "weights.pth"))
    assert not (tmp_path / "run").exists()


def _weight(state: dict) -> torch.Tensor:
    return state["model"]["head.weight"]


def _first_entry(state: dict) -> dict:
    return state["optimizer"]["state"][0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: _weight(s).fill_(math.nan), "head.weight is not finite"),
        (lambda s: s["model_ema"]["head.weight"].fill_(math.inf), "head.weight is not finite"),
        (lambda s: _first_entry(s)["exp_avg"].fill_(math.nan), "exp_avg .*holds NaN"),
        (
            lambda s: _first_entry(s).update(exp_avg=torch.zeros(7)),
            r"exp_avg of the optimizer must be of shape \(8, 3, 3, 3\) for .*, got of shape \(7,\)",
        ),
        (lambda s: _first_entry(s).update(step="2"), "step of the optimizer must be a number for"),
        (lambda s: _first_entry(s).pop("exp_avg_sq"), "must be step, exp_avg, exp_avg_sq, got"),
        (
            lambda s: s["model"].update({"head.weight": _weight(s).to(torch.int8)}),
            r"dtype of head\.weight: torch\.int8, expected torch\.float32",
        ),
    ],
)
def test_damaged_numbers_are_named_before_work_starts(config, tmp_path, damage, message):
    trainer = build(config())
    trainer.train_epoch()
    state = trainer.state_dict()
    damage(state)
    save_atomically(state, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=rf"cannot resume from .*{message}"):
        build(config()).resume(tmp_path / "damaged.pth")


@pytest.mark.parametrize(
    ("changes", "best"),
    [
        ({"data": {"val_split": "train"}}, -math.inf),
        ({"data": {"crop_pct": 0.9}}, -math.inf),
        ({"data": {"workers": 1}, "val_batch_size": 4}, 30.0),
    ],
)
def test_the_best_accuracy_counts_while_validation_stays_the_same(config, changes, best):
    trainer = build(config())
    trainer.output.mkdir()
    save_atomically(trainer.state_dict() | {"best_top1": 30.0}, trainer.last)
    resumed = build(config(**changes))
    resumed.resume(trainer.last)
    assert resumed.best_top1 == best


@pytest.mark.parametrize("best", [math.nan, math.inf])
def test_an_impossible_best_accuracy_is_forgotten(config, tmp_path, best):
    trainer = build(config())
    trainer.train_epoch()
    trainer.output.mkdir()
    save_atomically(trainer.state_dict() | {"best_top1": best}, trainer.last)
    resumed = build(config())
    resumed.resume(trainer.last)
    assert resumed.best_top1 == -math.inf


def test_initial_weights_that_are_not_finite_are_named(config, tmp_path):
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
def test_classes_are_compared_in_their_order(checkpoint, data, difference):
    assert describe_other_classes(checkpoint, data) == difference


def test_an_emptied_class_is_named_before_a_resume(change, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "digits")
    for split in ("train", "val"):
        for image in (tmp_path / "digits" / split / "3").iterdir():
            image.unlink()
    cfg = change(**{"data.root": str(tmp_path / "digits")})
    with pytest.raises(ConfigError, match=r"train cannot be read .*1 of its class .* images: 3 \("):
        build(cfg)


def test_the_case_of_an_optimizer_s_name_may_change(change, checkpoint):
    build(change(**{"optimizer.name": "AdamW"})).resume(checkpoint["between"])


@pytest.mark.parametrize("name", ["adafactor", "adan", "lars", "muon"])
def test_a_state_of_another_shape_is_refused_for_any_optimizer(config, name):
    betas = [0.9, 0.9, 0.9][: get_optimizer_info(name).num_betas]
    trainer, other = (
        build(config(optimizer={"name": name} | ({"betas": betas} if betas else {})))
        for _ in range(2)
    )
    trainer.train_update([next(iter(trainer.train_loader))])
    saved = trainer.optimizer.state_dict()
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    settings = [dict(group) for group in other.optimizer.param_groups]
    restore_optimizer(other.optimizer, saved)
    assert_equal(other.optimizer.state_dict()["state"], saved["state"])
    assert_equal(dict(other.model.state_dict()), before)
    for group, values in zip(other.optimizer.param_groups, settings, strict=True):
        assert all(group[key] == values[key] for key in values.keys() - {"params", "step"})
    entry = next(iter(saved["state"].values()))
    key = next(key for key, value in entry.items() if getattr(value, "ndim", 0))
    entry[key] = entry[key].new_zeros(1, 99)
    with pytest.raises(ValueError, match=rf"^{key} of the optimizer must be of shape .*\(1, 99\)"):
        restore_optimizer(other.optimizer, saved)


@pytest.mark.parametrize(
    ("names", "class_map", "rows", "warning"),
    [
        ("0123456789", None, "0123456789", None),
        ("z123456789", None, None, "head keeps its initial values, .*only in the checkpoint: 0; "),
        ("qrstuvwxyz", None, None, "head keeps .* only in the data: q, r, s, t, u, ..."),
        ("q123456789", "1 2 3 4 5 6 7 8 9 0", "1234567890", "class_map assigns .*data: q"),
        ("0123456789", "1 2 3 4 5 6 7 8 9 0", "1234567890", "class_map assigns .*class 0 is 1 in"),
    ],
)
def test_the_classifier_of_initial_weights_is_that_of_the_same_names(
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


def test_initial_weights_of_the_same_names_in_another_order_are_put_in_order(
    change, checkpoint, tmp_path, caplog
):
    state = load_checkpoint(checkpoint["between"])
    state["classes"] = list("9876543210")
    save_atomically(state, tmp_path / "initial.pth")
    options = change(**{"model.initial_checkpoint": str(tmp_path / "initial.pth")})
    head = Trainer(options, CPU).model.head
    assert torch.equal(head.weight, state["model_ema"]["head.weight"].flip(0))
    assert torch.equal(head.bias, state["model_ema"]["head.bias"].flip(0))
    assert "are put in the order of the data's (class 0 is 9 in the checkpoint" in caplog.text


def test_a_resumed_run_does_not_need_its_initial_weights(config, checkpoint, tmp_path):
    shutil.copy(checkpoint["between"], tmp_path / "initial.pth")
    cfg = config(
        model={"initial_checkpoint": str(tmp_path / "initial.pth")}, schedule={"epochs": 1}
    )
    train(cfg)
    (tmp_path / "initial.pth").unlink()
    train(cfg, resume="auto")


def test_two_processes_continue_a_run_of_one_with_equal_statistics_and_errors(
    settings, config, tmp_path
):
    """Batch norm averages its statistics over the processes; only one of them reports an error."""
    trainer = build(config())
    trainer.output.mkdir()
    trainer.epoch = 1
    trainer.save()
    settings |= {"batch_size": 6, "device": "cpu", "checkpoints": {"every_updates": 2}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with socket.socket() as one, socket.socket() as two:
        one.bind(("localhost", 0))
        two.bind(("localhost", 0))
        ports = [str(free.getsockname()[1]) for free in (one, two)]
    script = Path(__file__).with_name("train_on_two_processes.py")
    processes = []
    for rank in ("0", "1"):
        environment = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
            "MASTER_PORT": ports[0], "SECOND_PORT": ports[1], "PYTHONPATH": os.getcwd(),
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, script, tmp_path / "config.yaml"],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    (first, first_log), (second, second_log) = (p.communicate(timeout=300) for p in processes)
    assert first == "{'EndedByAnother'} [0, 2]\n", first_log
    assert second == "{'ZeroDivisionError'} [0, 2]\n", second_log
    assert first_log.count("last.pth exists: pass --resume auto") == 1
    assert "ERROR" not in second_log
    assert "Traceback" not in first_log + second_log
    state = load_checkpoint(trainer.last)
    assert (state["epoch"], len(state["rng"])) == (2, 2)
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == ["2"]
