"""Tests of training runs and their updates."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from flash_internimage.checkpoints import load_checkpoint
from flash_internimage.classification import engine, state
from flash_internimage.classification.cli.train import main
from flash_internimage.classification.config import ConfigError
from flash_internimage.classification.data import TooManyCorruptImages
from flash_internimage.classification.engine import Diverged, Trainer
from flash_internimage.classification.optim import build_criterion
from flash_internimage.classification.training import train
from tests import processes
from tests.classification.helpers import CPU, metrics, without_batch_norm


@pytest.fixture
def no_batch_norm(monkeypatch) -> None:
    monkeypatch.setattr(state, "build_model", without_batch_norm(state.build_model))


@pytest.mark.slow
@pytest.mark.curves
def test_a_run_writes_checkpoints_metrics_and_pictures(config):
    cfg = config(schedule={"epochs": 3}, checkpoints={"every_epochs": 2})
    train(cfg)
    output = Path(cfg.output)
    assert {path.name for path in output.iterdir()} >= {
        "last.pth", "best.pth", "epoch_2.pth", "metrics.csv", "tensorboard", "config.yaml",
        "train.log", "curves.png", "predictions.png",
    }  # fmt: skip
    assert not list(output.glob("*.partial"))
    rows = metrics(output)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    last = load_checkpoint(output / "last.pth")
    assert (last["epoch"], last["update"]) == (3, 0)
    assert last["best_top1"] == max(float(row["ema_top1"]) for row in rows)
    assert last["config"] == cfg.model_dump(mode="json")
    assert yaml.safe_load((output / "config.yaml").read_text()) == last["config"]


@pytest.mark.slow
def test_training_reduces_the_loss(config, deterministic_images):
    cfg = config(augmentation=deterministic_images, schedule={"epochs": 8})
    train(cfg)
    losses = [float(row["train_loss"]) for row in metrics(cfg.output)]
    assert losses[-1] < 0.7 * losses[0]


def test_an_update_with_a_non_finite_loss_is_skipped_and_counted(config, monkeypatch):
    trainer = Trainer(config(), CPU)
    trainer.metrics = None
    batches = [next(iter(trainer.train_loader))]
    assert trainer.train_update(batches) > 0
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    ema = {k: v.clone() for k, v in trainer.ema.module.state_dict().items()}
    batches[0][0][0] = torch.nan
    loss = trainer.train_update(batches)
    trainer._count(loss, seconds=1.0)
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())
    assert all(torch.equal(ema[k], v) for k, v in trainer.ema.module.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.validate_epoch()["skipped_updates"] == 1


def test_an_update_with_an_infinite_gradient_is_skipped(config):
    trainer = Trainer(config(), CPU)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.model.head.bias.register_hook(lambda grad: grad * torch.inf)
    loss = trainer.train_update([next(iter(trainer.train_loader))])
    assert loss != loss
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())


def test_too_many_non_finite_losses_stop_the_run_with_advice(config, monkeypatch):
    loss = nn.Module()
    loss.forward = lambda *_: torch.tensor(torch.nan, requires_grad=True)
    monkeypatch.setattr(engine, "build_criterion", lambda *_: loss)
    with pytest.raises(Diverged, match=r"3 consecutive .*warmup_epochs.*clip_grad.*amp=bf16"):
        train(config(max_nonfinite=3))


def test_too_many_corrupt_images_stop_the_run(config, tmp_path):
    for split in ("train", "val"):
        for i in range(12):
            folder = tmp_path / "broken" / split / str(i % 10)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").write_text("not an image")
    with pytest.raises(TooManyCorruptImages, match=r"data\.max_corrupt=2"):
        train(config(data={"root": str(tmp_path / "broken"), "max_corrupt": 2}))


@pytest.mark.slow
def test_accumulated_batches_equal_one_large_batch(
    config, tmp_path, no_batch_norm, deterministic_images
):
    def weights(name, **changes):
        cfg = config(
            output=str(tmp_path / name),
            augmentation=deterministic_images,
            model={"drop_path_rate": 0.0},
            **changes,
        )
        train(cfg)
        return load_checkpoint(f"{cfg.output}/last.pth")["model"]

    large = weights("large", batch_size=12)
    accumulated = weights("accumulated", batch_size=4, accumulation_steps=3)
    for name, tensor in large.items():
        torch.testing.assert_close(accumulated[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_combined_batch(
    settings, config, tmp_path, no_batch_norm, deterministic_images
):
    # Adam's normalization would amplify rounding errors of near-zero gradients.
    same = {
        "augmentation": deterministic_images,
        "model": {**settings["model"], "drop_path_rate": 0.0},
        "optimizer": {"name": "sgd", "lr": 0.05, "lr_batch": None},
    }
    train(config(output=str(tmp_path / "one"), batch_size=12, **same))
    settings |= same | {"output": str(tmp_path / "two"), "batch_size": 6, "device": "cpu"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    module = "tests.classification.train_without_batch_norm"
    for process in processes.run_distributed("-m", module, tmp_path / "config.yaml"):
        process.checked()
    one, two = (load_checkpoint(tmp_path / name / "last.pth") for name in ("one", "two"))
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-4, atol=1e-5)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), rel=1e-4)
        assert a["val_top1"] == b["val_top1"]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_computes_in_the_chosen_dtype(config, amp):
    trainer = Trainer(config(amp=amp), CPU)
    seen = set()
    trainer.model.head.register_forward_hook(lambda *args: seen.add(args[2].dtype))
    assert trainer.scaler.is_enabled() == (amp == "fp16")
    before = trainer.model.head.weight.clone()
    assert trainer.train_update([next(iter(trainer.train_loader))]) > 0
    assert not torch.equal(trainer.model.head.weight, before)
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]}


def test_gradient_clipping_bounds_the_norm(config):
    cfg = config(optimizer={"clip_grad": 1e-3, "name": "sgd", "lr": 1.0, "weight_decay": 0.0})
    trainer = Trainer(cfg, CPU)
    for group in trainer.optimizer.param_groups:
        group.update(lr=1.0, momentum=0.0)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_update([next(iter(trainer.train_loader))])
    after = [p.detach() for p in trainer.model.parameters()]
    steps = [(a - b).norm() for a, b in zip(after, before, strict=True)]
    assert torch.stack(steps).norm().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.slow
def test_compile_and_gradient_checkpointing_are_enabled(config, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    trainer = Trainer(config(model={"compile": True, "grad_checkpointing": True}), CPU)
    assert isinstance(trainer.parallel, torch._dynamo.OptimizedModule)
    assert all(stage.grad_checkpointing for stage in trainer.model.levels)
    assert trainer.train_update([next(iter(trainer.train_loader))]) > 0
    assert not any("_orig_mod" in name for name in trainer.state_dict()["model"])


@pytest.mark.slow
def test_graphs_are_compiled_for_the_shape_of_their_batches(config, monkeypatch):
    symbolic = []

    def backend(graph, inputs):
        symbolic.append(any(isinstance(value, torch.SymInt) for value in inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    for size, batch_size in ((32, 4), (48, 4), (64, 2)):
        cfg = config(batch_size=batch_size, data={"image_size": size}, model={"compile": True})
        trainer = Trainer(cfg, CPU)
        assert trainer.train_update([next(iter(trainer.train_loader))]) > 0
    assert len(symbolic) >= 3
    assert not any(symbolic)


@pytest.mark.parametrize(
    ("augmentation", "criterion"),
    [
        ({}, SoftTargetCrossEntropy),
        ({"mixup": 0.0, "cutmix": 0.0}, LabelSmoothingCrossEntropy),
        ({"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}, nn.CrossEntropyLoss),
    ],
)
def test_the_loss_depends_on_the_augmentation(config, augmentation, criterion):
    assert type(build_criterion(config(augmentation=augmentation))) is criterion


def test_validation_uses_the_classes_of_training(config, digits, tmp_path, caplog):
    shutil.copytree(digits, tmp_path / "digits")
    shutil.rmtree(tmp_path / "digits" / "val" / "4")
    cfg = config(data={"root": str(tmp_path / "digits")})
    trainer = Trainer(cfg, CPU)
    assert "9 of the 10 classes of data.train_split=train, missing: 4" in caplog.text
    labels = [label for _, y in trainer.val_loader for label in y.tolist()]
    assert labels == sorted([*range(4), *range(5, 10)] * 2)
    (tmp_path / "digits" / "val" / "5").rename(tmp_path / "digits" / "val" / "five")
    message = r"1 class is not in data.train_split=train \(0, 1, 2, .*\): five"
    with pytest.raises(ConfigError, match=message):
        Trainer(cfg, CPU)


def test_overrides_may_follow_options(settings, tmp_path, caplog):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main([str(tmp_path / "config.yaml"), "--resume", "auto", "optimizer.lrr=1"]) == 2
    assert "did you mean 'optimizer.lr'?" in caplog.text
