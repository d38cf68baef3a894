"""Test which weights a run with an EMA validates, saves, resumes and tests."""

from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from torch import Tensor

from flash_internimage.openmmlab.safe_loading import read_checkpoint

MOMENTUM = 0.3
EMA = {"type": "EMAHook", "momentum": MOMENTUM}
Weights = dict[str, Tensor]


def copy(state_dict: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in state_dict.items()}


def assert_near(actual: Weights, expected: Weights) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor)


class Recorder(Hook):
    """Averages the trained weights itself, and records those that are validated and tested."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.average: Weights = {}
        self.averages: list[Weights] = []
        self.evaluated: list[Weights] = []

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        trained = runner.model.state_dict()
        if not self.average:  # mmengine's average starts with the first step
            self.average = copy(trained)
        for name, tensor in self.average.items():
            self.average[name] = (1 - MOMENTUM) * tensor + MOMENTUM * trained[name]

    def before_val_epoch(self, runner) -> None:
        self.averages.append(copy(self.average))
        self.evaluated.append(copy(runner.model.state_dict()))

    def before_test_epoch(self, runner) -> None:
        self.evaluated.append(copy(runner.model.state_dict()))


@pytest.fixture
def run(runner, tmp_path) -> tuple[Recorder, Weights, Path]:
    """Train three epochs; return the recorded weights, the trained ones and the checkpoint."""
    recorder = Recorder()
    r = runner(custom_hooks=[EMA, recorder])
    r.train()
    return recorder, r.model.state_dict(), tmp_path / "run" / "epoch_3.pth"


def test_the_averaged_weights_are_validated(run):
    recorder, trained, _ = run
    assert len(recorder.evaluated) == 3
    for evaluated, average in zip(recorder.evaluated, recorder.averages, strict=True):
        assert_near(evaluated, average)
    assert not torch.equal(recorder.evaluated[-1]["head.weight"], trained["head.weight"])


@pytest.mark.parametrize("name", ["epoch_3.pth", "best_score_epoch_3.pth"])
def test_checkpoints_contain_both_weights(run, name):
    recorder, trained, path = run
    checkpoint = read_checkpoint(path.with_name(name))
    assert_near(checkpoint["state_dict"], recorder.average)
    for key, tensor in trained.items():
        assert torch.equal(checkpoint["ema_state_dict"][f"module.{key}"], tensor)


@pytest.mark.parametrize("hooks", [[], [EMA]])
def test_the_averaged_weights_are_tested(run, runner, hooks):
    recorder, _, path = run
    tested = Recorder()
    unused = ("train_dataloader", "train_cfg", "optim_wrapper", "val_dataloader", "val_cfg")
    settings = dict.fromkeys((*unused, "val_evaluator"))
    source = runner()
    r = runner(
        test_dataloader=source._val_dataloader,
        test_evaluator=source._val_evaluator,
        test_cfg={},
        load_from=str(path),
        custom_hooks=[*hooks, tested],
        **settings,
    )
    r.test()
    assert_near(tested.evaluated[0], recorder.average)


def test_a_resumed_run_continues_with_both_weights(run, runner):
    recorder, trained, path = run
    started = {}

    class Start(Hook):
        priority = "LOWEST"

        def before_train(self, runner) -> None:
            (hook,) = (hook for hook in runner.hooks if type(hook).__name__ == "EMAHook")
            started["trained"] = copy(runner.model.state_dict())
            started["average"] = copy(hook.ema_model.module.state_dict())
            started["steps"] = int(hook.ema_model.steps)

    cfg = {"by_epoch": True, "max_epochs": 4}
    hooks = [EMA, Start()]
    runner(
        scores=[0.4], train_cfg=cfg, resume=True, load_from=str(path), custom_hooks=hooks
    ).train()
    for name, tensor in trained.items():
        assert torch.equal(started["trained"][name], tensor)
    assert_near(started["average"], recorder.average)
    assert started["steps"] == 6
