"""Test early stopping in runs of a small model."""

import math

import pytest
import torch
from mmengine.hooks import EarlyStoppingHook

from flash_internimage.openmmlab.safe_loading import read_checkpoint


def stopping(**options) -> list[dict]:
    hook = {"type": "ResumableEarlyStoppingHook", "monitor": "score", "rule": "greater"}
    return [{**hook, "patience": 2, "min_delta": 0.0, **options}]


@pytest.fixture
def stopped(runner, tmp_path):
    """Return a function that trains, or resumes with the last checkpoint, and counts the epochs."""
    epochs = 0

    def train(*scores: float, epochs_at_most: int = 20, resume: bool = False, **options) -> int:
        nonlocal epochs
        last = str(tmp_path / "run" / f"epoch_{epochs}.pth")
        r = runner(
            scores=scores,
            train_cfg={"by_epoch": True, "max_epochs": epochs_at_most},
            custom_hooks=options.pop("hooks", stopping(**options)),
            **({"resume": True, "load_from": last} if resume else {}),
        )
        r.train()
        epochs = r.epoch
        return epochs

    return train


@pytest.mark.parametrize(
    ("options", "scores", "expected"),
    [
        ({}, [0.5, 0.6, 0.5, 0.5, 0.9], 4),
        ({}, [0.5, 0.4, 0.6, 0.5, 0.7, 0.6, 0.6, 0.9], 7),
        ({"patience": 3}, [0.5, 0.4, 0.4, 0.4, 0.9], 4),
        ({"min_delta": 0.1}, [0.5, 0.55, 0.59, 0.9], 3),
        ({"rule": "less"}, [0.5, 0.4, 0.45, 0.5, 0.1], 4),
    ],
)
def test_a_run_stops_after_the_expected_epoch(stopped, options, scores, expected):
    assert stopped(*scores, **options) == expected


def test_a_resumed_run_remembers_its_patience(stopped):
    assert stopped(0.6, 0.5, epochs_at_most=2) == 2
    assert stopped(0.55, 0.9, resume=True) == 3


def test_mmengines_own_hook_forgets_it(stopped):
    """If this fails, mmengine has learned to resume, and the hook of this package is obsolete."""
    own = [{**stopping()[0], "type": EarlyStoppingHook}]
    assert stopped(0.6, 0.5, epochs_at_most=2, hooks=own) == 2
    assert stopped(0.55, 0.5, 0.4, 0.9, resume=True, hooks=own) == 5


def test_a_run_that_stopped_early_is_not_trained_again(stopped):
    assert stopped(0.6, 0.5, 0.5) == 3
    assert stopped(0.9, resume=True) == 3
    assert stopped(0.5, 0.9, resume=True, patience=3) == 4


@pytest.mark.parametrize("changes", [{"rule": "less"}, {"monitor": "other"}])
def test_another_metric_starts_again(runner, stopped, changes, tmp_path):
    stopped(0.6, 0.5, epochs_at_most=2)
    r = runner(custom_hooks=stopping(**changes))
    (hook,) = (h for h in r.hooks if isinstance(h, EarlyStoppingHook))
    r.message_hub.load_state_dict(read_checkpoint(tmp_path / "run" / "epoch_2.pth")["message_hub"])
    hook.before_train(r)
    assert (abs(hook.best_score), hook.wait_count) == (math.inf, 0)


def test_other_weights_start_again(runner, stopped, tmp_path):
    stopped(0.6, 0.5, epochs_at_most=2)
    hub = read_checkpoint(tmp_path / "run" / "epoch_2.pth")["message_hub"]
    for hooks, waited in (([], 1), ([{"type": "EMAHook"}], 0)):
        r = runner(custom_hooks=[*stopping(), *hooks])
        (hook,) = (h for h in r.hooks if isinstance(h, EarlyStoppingHook))
        r.message_hub.load_state_dict(hub)
        hook.before_train(r)
        assert hook.wait_count == waited


@pytest.mark.parametrize(
    "state", [5, {}, {"best": "x", "waited": 1}, {"best": 1.0, "waited": 1.5}, {"best": 1.0}]
)
def test_a_damaged_state_is_ignored(runner, state):
    r = runner(custom_hooks=stopping())
    (hook,) = (h for h in r.hooks if isinstance(h, EarlyStoppingHook))
    if isinstance(state, dict):
        state |= {"monitor": "score", "rule": "greater"}
    r.message_hub.update_info("early_stopping", state)
    hook.before_train(r)
    assert (hook.best_score, hook.wait_count) == (-math.inf, 0)


def test_checkpoints_remain_plain(stopped, tmp_path):
    stopped(0.6, 0.5, epochs_at_most=2)
    loaded = torch.load(tmp_path / "run" / "epoch_2.pth", weights_only=True)
    state = loaded["message_hub"]["runtime_info"]["early_stopping"]
    expected = {"monitor": "score", "rule": "greater", "averages": False}
    assert state == {**expected, "best": 0.6, "waited": 1}
