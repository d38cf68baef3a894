"""Tests that settings changed when resuming are either used or rejected."""

import shutil
from pathlib import Path

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn

from flash_internimage.checkpoints import load_checkpoint
from flash_internimage.classification.config import Config, Section
from flash_internimage.classification.engine import Diverged, Trainer
from flash_internimage.classification.model import pick_device
from tests.classification.helpers import SMALL, build


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
        with pytest.raises(TypeError):  # The norm is None.
            trainer.train_update([next(iter(trainer.train_loader))])
    finally:
        nn.utils.clip_grad_norm_ = clip
    return clipped == [value]


def stops_at_once(trainer: Trainer, value) -> bool:
    with pytest.raises(Diverged, match="in 1 consecutive optimizer steps"):
        trainer._count(torch.nan, 1.0)
    return True


def run_of_an_epoch(trainer: Trainer) -> list[tuple]:
    """Train epoch 3 and return the update and the additional names of each save."""
    saves = []
    trainer.save = lambda *names: saves.append((trainer.update, *names))
    trainer.output.mkdir()
    trainer.cfg.schedule.epochs = 3
    trainer.fit()
    return saves


NO_MIXUP = {"augmentation.mixup": 0.0, "augmentation.cutmix": 0.0}


# For each setting: a changed value, and a check that the resumed run uses it.
USED = {
    "loggers": (["mlflow"], lambda t, v: t.cfg.loggers == tuple(v)),
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
    "class_weights": ((1.0, 2.0) * 5, lambda t, v: t.criterion.weight.tolist() == [*v]),
    "model.drop_path_rate": (0.3, lambda t, v: v in {
        round(getattr(m, "drop_prob", None) or 0.0, 6) for m in t.model.modules()}),
    "model.args": (SMALL | {"drop_rate": 0.5}, lambda t, v: t.model.drop_rate == 0.5),
    "model.grad_checkpointing": (True, lambda t, v: t.model.levels[0].grad_checkpointing),
    "model.compile": (True, lambda t, v: isinstance(t.parallel, torch._dynamo.OptimizedModule)),
    "data.train_split": ("val", lambda t, v: len(t.train_loader.dataset) == 20),
    "data.val_split": ("train", lambda t, v: len(t.val_set) == 60),
    "data.image_size": (64, lambda t, v: next(iter(t.val_loader))[0].shape[-1] == v),
    "data.image_sizes": ((24, 40), lambda t, v: {
        images.shape[-1] for images, _ in t.train_loader} == {*v}),
    "data.size_schedule": ("progressive", lambda t, v: {
        images.shape[-1] for images, _ in t.train_loader} == {24}, {"data.image_sizes": (24, 40)}),
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
    "early_stopping.patience": (3, lambda t, v: t.patience.options.patience == v),
    "early_stopping.metric": ("loss", lambda t, v: t.patience.options.metric == v),
    "early_stopping.min_delta": (0.5, lambda t, v: t.patience.options.min_delta == v),
    # The test uses the checkpoint itself as the teacher.
    "distillation.teacher": (None, lambda t, v: t.distillation.task_loss_weight == 0.5),
    "distillation.alpha": (0.25, lambda t, v: t.distillation.distill_loss_weight == v),
    "distillation.temperature": (4.0, lambda t, v: t.distillation.temperature == v),
}  # fmt: skip


# For each setting that cannot change: a changed value, and the error message.
REFUSED = {
    "model.name": ("flash_internimage_tiny", "model.name must be 'flash_internimage_nano' as in"),
    "model.num_classes": (12, "model.num_classes must be 10 as in the checkpoint, got 12"),
    "model.initial_checkpoint": ("other.pth", "model.initial_checkpoint must be None as in"),
    "model.class_map": ("other.txt", "model.class_map must be None as in"),
    "optimizer.name": ("sgd", "optimizer.name must be 'adamw' as in the checkpoint, got 'sgd'"),
    "model.freeze": (
        ("levels.0",),
        r"model.freeze must be \[\] as in the checkpoint, got \['levels",
    ),
    "model.args": (SMALL | {"channels": 32}, "does not match the model: .*shape of patch_embed"),
    "schedule.epochs": (1, "schedule.epochs must be at least 2, .* got 1"),
    "data.root": ("renamed", r"only in the checkpoint: 3; only in the data: three"),
    # The test copies the digits into two outer folders, which torchvision reads as classes.
    "data.kind": ("torch/image_folder", r"only in the checkpoint: 0, 1; only in the data: a, b"),
}


REFUSED_WITHIN_AN_EPOCH = {
    "seed": (7, "seed must be 0 as in the checkpoint, which was saved within an epoch, got 7"),
    "batch_size": (6, "batch_size must be 12 as in"),
    "accumulation_steps": (5, "accumulation_steps must be 1 as in"),
    "data.train_split": ("val", "of 5 optimizer steps on 1 processes, got 1 optimizer steps on 1"),
}


def leaves(section: type[Section], prefix: str = "") -> set[str]:
    keys = set()
    for name, field in section.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        keys |= leaves(field.annotation, f"{prefix}{name}.") if is_section else {prefix + name}
    return keys


def test_every_setting_is_tested_as_used_or_rejected():
    assert USED.keys() | REFUSED.keys() == leaves(Config)


@pytest.mark.parametrize("key", USED)
def test_a_changed_setting_is_used(key, change, checkpoint, tmp_path):
    value, check, *others = USED[key]
    if key == "output":
        value = str(tmp_path / value)
    if key.startswith("distillation."):
        others = [{"distillation.teacher": str(checkpoint["between"])}]
        value = others[0].get(key, value)
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
def test_a_setting_that_cannot_change_is_rejected(key, change, checkpoint, digits, tmp_path):
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
def test_a_setting_that_cannot_change_within_an_epoch_is_rejected(key, change, checkpoint):
    value, message = REFUSED_WITHIN_AN_EPOCH[key]
    trainer = build(change(**{key: value}))
    with pytest.raises(ValueError, match=f"cannot resume from .*{message}"):
        trainer.resume(checkpoint["within"])


def test_the_case_of_an_optimizer_name_can_change(change, checkpoint):
    build(change(**{"optimizer.name": "AdamW"})).resume(checkpoint["between"])


def test_checkpoints_of_earlier_versions_can_be_resumed(change, checkpoint, tmp_path):
    """Settings that they lack count as unchanged if they have their default."""
    state = load_checkpoint(checkpoint["within"])
    config = state["config"]
    for key in ("class_weights", "early_stopping", "distillation"):
        del config[key]
    del config["model"]["freeze"], config["data"]["image_sizes"], config["data"]["size_schedule"]
    torch.save(state, tmp_path / "old.pth")
    trainer = build(change())
    changes = trainer.resume(tmp_path / "old.pth")
    assert [line.partition(" ")[0] for line in changes] == ["output"]
    changes = build(change(class_weights="balanced")).resume(tmp_path / "old.pth")
    assert "class_weights was None, is now balanced" in changes
    with pytest.raises(ValueError, match=r"model\.freeze must be \[\] as in the checkpoint"):
        build(change(**{"model.freeze": ["backbone"]})).resume(tmp_path / "old.pth")
