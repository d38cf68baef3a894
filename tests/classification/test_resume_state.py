"""Tests that the state of a run is restored from a checkpoint, or rejected with one error."""

import math

import pytest
import torch
from timm.optim import get_optimizer_info

from flash_internimage.checkpoints import load_checkpoint, save_atomically
from flash_internimage.classification.engine import Trainer
from flash_internimage.classification.random_numbers import rng_state, set_rng_state
from flash_internimage.classification.resume_checks import restore_optimizer
from flash_internimage.classification.training import train
from tests.classification.helpers import CPU, assert_equal, build


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": [1]}, "weights must be a dict of tensors, got list"),
        ({"epoch": "1"}, "TypeError"),
        ({"epoch": -1}, "its progress must be valid, got epoch -1"),
        ({"update": 10**12}, "step 1000000000000 of"),
        ({"config": 5}, "config must be a dict, got 5"),
        ({"config": None}, "config must be a dict, got None"),
        ({"config": {"model": {}}}, "config must contain all settings .* missing: model.name"),
        ({"rng": None}, "rng must be a list, got None"),
        ({"rng": []}, r"rng must contain a dict per process, got \[\]"),
        ({"rng": [1]}, r"rng must contain a dict per process, got \[1\]"),
        ({"optimizer": []}, r"optimizer must be a dict, got \[\]"),
        ({"classes": "abc"}, "classes must be a list, got 'abc'"),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_raises_one_error(config, tmp_path, changes, message):
    trainer = Trainer(config(), CPU)
    trainer.output.mkdir()
    trainer.epoch = 1
    trainer.save()
    last = tmp_path / "run" / "last.pth"
    torch.save(load_checkpoint(last) | changes, last)
    with pytest.raises(ValueError, match=rf"cannot resume from {last}: .*{message}"):
        train(config(), resume="auto")


@pytest.mark.slow
def test_a_resumed_run_keeps_its_own_optimizer_kernels(config, tmp_path):
    train(config())
    last = tmp_path / "run" / "last.pth"
    state = load_checkpoint(last)
    for group in state["optimizer"]["param_groups"]:
        group["maximize"] = True
    torch.save(state, last)
    trainer = Trainer(config(), CPU)
    trainer.resume(last)
    assert not any(group["maximize"] for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize("change", [{"position": 2_000_000_000}, {"position": -1}, {"keys": [1]}])
def test_a_random_state_that_would_crash_numpy_is_rejected(change):
    state = rng_state()
    name, keys, position, *rest = state["numpy"]
    keys, position = change.get("keys", keys), change.get("position", position)
    with pytest.raises(ValueError, match="NumPy's random state must have 624 keys"):
        set_rng_state({**state, "numpy": (name, keys, position, *rest)})


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion"])
def test_the_state_of_an_optimizer_is_restored_by_name(config, name):
    """The resumed run has other parameter groups because of layer decay."""
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


def test_weights_without_the_state_of_a_run_are_rejected(config, tmp_path):
    save_atomically({"model": build(config()).model.state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"cannot resume from .*missing: optimizer, scaler"):
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
        (lambda s: _first_entry(s)["exp_avg"].fill_(math.nan), "exp_avg contains NaN"),
        (
            lambda s: _first_entry(s).update(exp_avg=torch.zeros(7)),
            r"state exp_avg of .* must be a tensor of shape \(8, 3, 3, 3\), got .* \(7,\)",
        ),
        (lambda s: _first_entry(s).update(step="2"), "state step of .* must be a number"),
        (
            lambda s: _first_entry(s).pop("exp_avg_sq"),
            "contain step, exp_avg, exp_avg_sq, got",
        ),
        (
            lambda s: s["model"].update({"head.weight": _weight(s).to(torch.int8)}),
            r"dtype of head\.weight: torch\.int8, expected torch\.float32",
        ),
    ],
)
def test_error_names_damaged_values_before_work_starts(config, tmp_path, damage, message):
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
def test_the_best_accuracy_is_kept_only_for_unchanged_validation(config, changes, best):
    trainer = build(config())
    trainer.output.mkdir()
    save_atomically(trainer.state_dict() | {"best_top1": 30.0}, trainer.last)
    resumed = build(config(**changes))
    resumed.resume(trainer.last)
    assert resumed.best_top1 == best


@pytest.mark.parametrize("best", [math.nan, math.inf])
def test_a_non_finite_best_accuracy_is_discarded(config, tmp_path, best):
    trainer = build(config())
    trainer.train_epoch()
    trainer.output.mkdir()
    save_atomically(trainer.state_dict() | {"best_top1": best}, trainer.last)
    resumed = build(config())
    resumed.resume(trainer.last)
    assert resumed.best_top1 == -math.inf


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "adan", "lars", "muon"])
def test_a_state_of_another_shape_is_rejected_for_any_optimizer(config, name):
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
    with pytest.raises(ValueError, match=rf"state {key} of .* a tensor of shape .*\(1, 99\)"):
        restore_optimizer(other.optimizer, saved)
