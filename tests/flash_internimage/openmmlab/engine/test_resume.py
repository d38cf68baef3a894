"""Test resuming runs with changed settings."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.dataset import BaseDataset

from flash_internimage.openmmlab import SafeRunner
from flash_internimage.openmmlab.engine.runner import resume
from flash_internimage.openmmlab.safe_loading import read_checkpoint
from tests.flash_internimage.openmmlab.small import Model

ADAMW = {"type": "AdamW", "lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.1}
COSINE = {"type": "CosineAnnealingLR", "T_max": 4, "begin": 0, "end": 4, "by_epoch": True}
WARM_UP = {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 3}
EMA = {"type": "EMAHook", "momentum": 0.3}


class Numbers(BaseDataset):
    def __init__(self, classes: tuple[str, ...] = ("a", "b"), number: int = 4):
        self.number = number
        super().__init__(metainfo={"classes": classes})

    def load_data_list(self) -> list[dict]:
        return [{"value": float(i)} for i in range(self.number)]

    def __getitem__(self, index: int) -> dict:
        return {"inputs": torch.full((3,), self.get_data_info(index)["value"])}


def settings(**changes: Any) -> dict:
    """Return the arguments of a run of four epochs with two batches each, without validation."""
    loader = {
        "dataset": Numbers(changes.pop("classes", ("a", "b")), changes.pop("images", 4)),
        "batch_size": changes.pop("batch_size", 2),
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "num_workers": 0,
    }
    optimizer = {**ADAMW, **changes.pop("optimizer", {})}
    return {
        "train_dataloader": loader,
        "val_dataloader": None,
        "val_cfg": None,
        "val_evaluator": None,
        "train_cfg": {"by_epoch": True, "max_epochs": 4},
        "optim_wrapper": {"optimizer": optimizer, **changes.pop("wrapper", {})},
        "param_scheduler": [WARM_UP, COSINE],
        "default_hooks": {"checkpoint": {"type": "AtomicCheckpointHook", "interval": 1}},
        "custom_hooks": [],
        **changes,
    }


@pytest.fixture
def interrupted(runner, tmp_path) -> Callable[..., Path]:
    """Train two epochs, and return their checkpoint."""

    def train(**changes: Any) -> Path:
        cfg = changes.pop("train_cfg", {"by_epoch": True, "max_epochs": 2})
        runner(work_dir=str(tmp_path / "before"), **settings(train_cfg=cfg, **changes)).train()
        return tmp_path / "before" / f"{'epoch_2' if 'max_epochs' in cfg else 'iter_4'}.pth"

    return train


def resumed(runner, path: Path, **changes: Any) -> SafeRunner:
    r = runner(load_from=str(path), resume=True, **settings(**changes))
    r.train()
    return r


def rates(r: SafeRunner) -> list[float]:
    return [group["lr"] for group in r.optim_wrapper.optimizer.param_groups]


# Changed settings, and the expected values in the optimizer's groups.
USED = {
    "weight decay": ({"optimizer": {"weight_decay": 0.3}}, {"weight_decay": 0.3}),
    "betas": ({"optimizer": {"betas": (0.5, 0.9)}}, {"betas": (0.5, 0.9)}),
    "eps": ({"optimizer": {"eps": 1e-3}}, {"eps": 1e-3}),
    "learning rate": ({"optimizer": {"lr": 0.2}}, {"initial_lr": 0.2}),
    "accumulation": ({"wrapper": {"accumulative_counts": 2}}, {}),
    "gradient clipping": ({"wrapper": {"clip_grad": {"max_norm": 0.1}}}, {}),
    "mixed precision": ({"wrapper": {"type": "BFloat16OptimWrapper"}}, {}),
    "longer schedule": ({"param_scheduler": [WARM_UP, {**COSINE, "T_max": 8, "end": 8}]}, {}),
    "other schedule": ({"param_scheduler": [{"type": "ExponentialLR", "gamma": 0.5}]}, {}),
    "no schedule": ({"param_scheduler": None}, {"lr": 0.1}),
    "larger batches": ({"batch_size": 4}, {}),
    "smaller batches": ({"batch_size": 1}, {}),
    "more images": ({"images": 8}, {}),
    "other groups": (
        {"wrapper": {"paramwise_cfg": {"custom_keys": {"head": {"lr_mult": 0.5}}}}},
        {},
    ),
    "EMA on": ({"custom_hooks": [EMA]}, {}),
}


class TestSettings:
    @pytest.mark.parametrize("name", USED)
    def test_the_new_value_is_used(self, name, runner, interrupted, tmp_path):
        changes, expected = USED[name]
        r = resumed(runner, interrupted(), **changes)
        group = r.optim_wrapper.optimizer.param_groups[0]
        assert {key: group[key] for key in expected} == expected
        whole = runner(work_dir=str(tmp_path / "whole"), **settings(**changes))
        whole.train()
        assert rates(r) == rates(whole)
        assert (r.epoch, r.iter) == (whole.epoch, whole.iter)

    def test_without_changes_the_run_equals_an_uninterrupted_one(
        self, runner, interrupted, tmp_path
    ):
        torch.manual_seed(0)
        initial = Model().state_dict()
        ends = []
        for stops in ((4,), (2, 4)):
            folder = tmp_path / str(len(stops))
            for start, stop in itertools.pairwise((0, *stops)):
                model = Model()
                model.load_state_dict(initial)
                arguments = settings(train_cfg={"by_epoch": True, "max_epochs": stop})
                if start:
                    arguments |= {"load_from": str(folder / f"epoch_{start}.pth"), "resume": True}
                r = runner(model, work_dir=str(folder), **arguments)
                r.train()
            ends.append((rates(r), read_checkpoint(folder / "epoch_4.pth")["state_dict"]))
        assert ends[0][0] == ends[1][0]
        assert all(torch.equal(ends[0][1][name], ends[1][1][name]) for name in initial)

    def test_moments_follow_their_parameters_into_other_groups(self, runner, interrupted):
        path = interrupted()
        saved = read_checkpoint(path)
        names = saved["meta"]["optimizer_names"]
        by_type = {"custom_keys": {"backbone": {"decay_mult": 0.5}}, "norm_decay_mult": 0.0}
        arguments = settings(wrapper={"paramwise_cfg": by_type})
        arguments["train_cfg"] = {"by_epoch": True, "max_epochs": 2}
        r = runner(load_from=str(path), resume=True, **arguments)
        r.train()
        optimizer = r.optim_wrapper.optimizer
        assert len(optimizer.param_groups) == 4
        for name, parameter in r.model.named_parameters():
            moments = saved["optimizer"]["state"][names.index(name)]
            assert torch.equal(optimizer.state[parameter]["exp_avg"], moments["exp_avg"])

    def test_previously_frozen_parameters_start_without_moments(self, runner, interrupted):
        model = Model()
        model.backbone.requires_grad_(False)
        path = interrupted(wrapper={"paramwise_cfg": {"bypass_duplicate": True}}, model=model)
        r = resumed(runner, path)
        assert len(r.optim_wrapper.optimizer.state) == 4

    def test_without_ema_the_trained_weights_are_resumed(self, runner, interrupted):
        path = interrupted(custom_hooks=[EMA])
        trained = read_checkpoint(path)["ema_state_dict"]
        r = resumed(runner, path, train_cfg={"by_epoch": True, "max_epochs": 2})
        for name, tensor in r.model.state_dict().items():
            assert torch.equal(tensor, trained[f"module.{name}"])

    def test_the_seed_in_the_config_takes_precedence(self, runner, interrupted):
        path = interrupted(randomness={"seed": 1})
        assert resumed(runner, path, randomness={"seed": 2}).seed == 2
        r = resumed(runner, path)
        assert r.seed == r.train_dataloader.sampler.seed == 1

    @pytest.mark.parametrize(
        ("before", "after", "message"),
        [
            ({}, {"optimizer": {"type": "Adam"}}, "trained with AdamW, but this run uses Adam"),
            ({}, {"optimizer": {"amsgrad": True}}, "AdamW require max_exp_avg_sq for backbone"),
            (
                {},
                {"train_cfg": {"by_epoch": True, "max_epochs": 1}},
                "is at epoch 2, but max_epochs is 1",
            ),
            (
                {},
                {"train_cfg": {"by_epoch": False, "max_iters": 9}},
                "an epoch-based run, but this run is iteration-based",
            ),
            (
                {"train_cfg": {"by_epoch": False, "max_iters": 4}},
                {"train_cfg": {"by_epoch": False, "max_iters": 3}},
                "is at iteration 4, but max_iters is 3",
            ),
            ({}, {"classes": ("b", "a")}, "its class 0 is 'a', but 'b' in the data"),
            ({}, {"classes": ("a", "c")}, "its class 1 is 'b', but 'c' in the data"),
            ({}, {"classes": ("a",)}, "it has 2 classes, the data 1"),
        ],
    )
    def test_incompatible_settings_are_an_error(self, before, after, message, runner, interrupted):
        hook = {"type": "AtomicCheckpointHook", "by_epoch": "train_cfg" not in before}
        hooks = {"default_hooks": {"checkpoint": {**hook, "interval": 1}}}
        path = interrupted(**before, **hooks)
        with pytest.raises(ValueError, match=rf"^cannot resume from {path}: .*{message}"):
            resumed(runner, path, **after)

    def test_without_metadata_the_parameter_groups_are_compared(self, runner, interrupted):
        path = interrupted()
        checkpoint = torch.load(path, weights_only=False)
        for name in ("optimizer_type", "optimizer_names"):
            del checkpoint["meta"][name]
        torch.save(checkpoint, path)
        resumed(runner, path)
        sgd = {"type": "SGD", "lr": 0.1}
        arguments = settings() | {"optim_wrapper": {"optimizer": sgd}}
        with pytest.raises(ValueError, match="its optimizer is not SGD"):
            runner(load_from=str(path), resume=True, **arguments).train()
        wrapper = {"paramwise_cfg": {"norm_decay_mult": 0.0}}
        with pytest.raises(ValueError, match="its parameter groups differ"):
            resumed(runner, path, wrapper=wrapper)


class TestCompareClasses:
    @pytest.mark.parametrize(
        ("saved", "own", "expected"),
        [
            (["a", "b"], ("a", "b"), (None, False)),
            (["a", "b"], ("a", "c"), ("its class 1 is 'b', but 'c' in the data", False)),
            (["a", "b"], ("b", "c"), ("its class 0 is 'a', but 'b' in the data", True)),
            (["a"], None, (None, False)),
            ("ab", ("a", "b"), (None, False)),
        ],
    )
    def test_names_and_positions(self, saved, own, expected):
        dataset = type("Data", (), {"metainfo": {"classes": own}})
        checkpoint = {"meta": {"dataset_meta": {"classes": saved}}}
        assert resume.compare_classes(checkpoint, dataset) == expected

    @pytest.mark.parametrize("meta", [None, [], {"dataset_meta": 3}])
    def test_files_without_class_names(self, meta):
        dataset = type("Data", (), {"metainfo": {"classes": ("a",)}})
        assert resume.compare_classes({"meta": meta}, dataset) == (None, False)
