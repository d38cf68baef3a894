"""Test that runs killed between two writes can be resumed."""

import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook

from flash_internimage.openmmlab.engine.runner.checkpoint_names import (
    checkpoint_folder,
    latest_checkpoint,
)
from flash_internimage.openmmlab.safe_loading import read_checkpoint
from tests.flash_internimage.openmmlab.small import Model

LOOPS = {
    "epochs": {"by_epoch": True, "max_epochs": 4, "val_interval": 1},
    "iterations": {"by_epoch": False, "max_iters": 8, "val_interval": 2},
}


class Killed(BaseException):
    pass


class Wave(BaseMetric):
    """Metric that rises and falls with the weights, and counts its evaluations."""

    asked = 0

    def process(self, data_batch, data_samples) -> None:
        self.results += [sample.sum().item() for sample in data_samples]

    def compute_metrics(self, results: list) -> dict:
        Wave.asked += 1
        return {"score": math.sin(20 * sum(results))}


class KillHook(Hook):
    """Kill the run at the nth call of a stage."""

    def __init__(self, stage: str, number: int):
        self.left = number
        setattr(self, stage, self._count)

    def _count(self, *args, **kwargs) -> None:
        self.left -= 1
        if not self.left:
            raise Killed


@pytest.fixture
def run(runner, tmp_path):
    """Start or resume a run of four epochs or the same number of iterations."""
    torch.manual_seed(0)
    initial = Model().state_dict()

    def run(folder: str, unit: str, hooks=(), averages=(), **names):
        model = Model()
        model.load_state_dict(initial)
        saved = Path(checkpoint_folder(tmp_path / folder, names.get("out_dir")))
        last = latest_checkpoint(saved, names.get("filename_tmpl"))
        hook = {"type": "AtomicCheckpointHook", "by_epoch": unit == "epochs", "max_keep_ckpts": 1}
        hook |= {"interval": 1 if unit == "epochs" else 2, "save_best": "score", "rule": "greater"}
        hook |= names
        r = runner(
            model,
            work_dir=str(tmp_path / folder),
            train_cfg=LOOPS[unit],
            val_evaluator=Evaluator(Wave()),
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9}},
            default_hooks={"checkpoint": hook},
            custom_hooks=[*averages, *hooks],
            **({"resume": True, "load_from": str(last)} if last else {}),
        )
        r.train()
        return saved

    return run


def contents(folder: Path) -> dict:
    """Return the weights and the best score of each checkpoint in a work folder."""
    found = {}
    for path in [*folder.glob("*.pth"), *folder.glob("*.ckpt")]:
        checkpoint = read_checkpoint(path)
        info = checkpoint["message_hub"]["runtime_info"]
        weights = {name: tensor.tolist() for name, tensor in checkpoint["state_dict"].items()}
        found[path.name] = weights, info["best_score"]
    return found


class TestValidation:
    """A checkpoint whose validation was interrupted is validated when resuming."""

    @pytest.mark.parametrize("unit", LOOPS)
    @pytest.mark.parametrize("stage", ["before_val", "after_val_iter"])
    @pytest.mark.parametrize("number", [2, 4])
    def test_the_best_equals_that_of_an_uninterrupted_run(self, unit, stage, number, run):
        whole = run("whole", unit)
        with pytest.raises(Killed):
            run("killed", unit, [KillHook(stage, number * (2 if "iter" in stage else 1))])
        assert contents(run("killed", unit)) == contents(whole)

    @pytest.mark.parametrize("unit", LOOPS)
    def test_no_checkpoint_is_validated_twice(self, unit, run, monkeypatch):
        monkeypatch.setattr(Wave, "asked", 0)
        with pytest.raises(Killed):
            run("killed", unit, [KillHook("before_train_iter", 5)])
        run("killed", unit)
        assert Wave.asked == 4

    def test_with_averaged_weights(self, run):
        averages = [{"type": "EMAHook", "momentum": 0.3}]
        whole = run("whole", "epochs", averages=averages)
        with pytest.raises(Killed):
            run("killed", "epochs", [KillHook("before_val", 2)], averages)
        assert contents(run("killed", "epochs", averages=averages)) == contents(whole)


def _kill_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """Kill the run at the nth file that it replaces or removes."""
    calls = {"replace": os.replace, "remove": os.remove}
    left = number

    def counted(name, *args):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return calls[name](*args)

    for name in calls:
        patch.setattr(os, name, partial(counted, name))


@pytest.mark.parametrize("number", range(4, 11))
def test_a_run_killed_at_a_write_ends_like_an_uninterrupted_one(number, run, monkeypatch):
    whole = contents(run("whole", "epochs"))
    with monkeypatch.context() as patch:
        _kill_at(number, patch)
        with pytest.raises(Killed):
            run("killed", "epochs")
    assert contents(run("killed", "epochs")) == whole


@pytest.mark.parametrize("number", range(4, 9))
def test_custom_names(number, run, tmp_path, monkeypatch):
    names = {"out_dir": tmp_path / "saved", "filename_tmpl": "m{:04d}.ckpt"}
    whole = contents(run("whole", "epochs", **names))
    assert whole.keys() == {"m0004.ckpt", *(name for name in whole if name.startswith("best_"))}
    with monkeypatch.context() as patch:
        _kill_at(number, patch)
        with pytest.raises(Killed):
            run("killed", "epochs", **names)
    assert contents(run("killed", "epochs", **names)) == whole


def test_another_metric_resets_the_best_score(runner, tmp_path, caplog):
    runner().train()
    hook = {"type": "AtomicCheckpointHook", "interval": 1, "save_best": "other", "rule": "less"}

    class Other(BaseMetric):
        def process(self, data_batch, data_samples) -> None:
            self.results.append(0)

        def compute_metrics(self, results: list) -> dict:
            return {"other": 5.0}

    path = tmp_path / "run" / "epoch_3.pth"
    r = runner(
        default_hooks={"checkpoint": hook},
        val_evaluator=Evaluator(Other()),
        train_cfg={"by_epoch": True, "max_epochs": 4},
        load_from=str(path),
        resume=True,
    )
    r.logger.addHandler(caplog.handler)
    r.train()
    assert "the best checkpoint is now selected by other" in caplog.text
    assert (tmp_path / "run" / "best_other_epoch_4.pth").is_file()
