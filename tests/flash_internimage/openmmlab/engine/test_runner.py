"""Test checkpoints, hooks and the optimizer wrapper in runs of a small model."""

import logging
import os
import shutil
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.logging import HistoryBuffer
from torch import nn

from flash_internimage.checkpoints import Placeholder
from flash_internimage.openmmlab import AtomicCheckpointHook, safe_loading
from flash_internimage.openmmlab.engine.hooks import curves
from flash_internimage.openmmlab.engine.runner.checkpoint_names import latest_checkpoint
from tests.flash_internimage.openmmlab.small import Model, Score


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.pth*")}


class TestCheckpoints:
    def test_the_last_and_the_best_are_kept(self, runner, tmp_path):
        runner(scores=(0.1, 0.3, 0.2)).train()
        assert files(tmp_path / "run") == {"epoch_3.pth", "best_score_epoch_2.pth"}

    def test_a_checkpoint_exists_at_any_time(self, runner, tmp_path, monkeypatch):
        folder = tmp_path / "run"
        seen = []
        replace = os.replace

        def recorded(source, target):
            if str(target).endswith(".pth"):
                seen.append(files(folder) - {Path(source).name})
            replace(source, target)

        monkeypatch.setattr(os, "replace", recorded)
        runner().train()
        epochs = [{name for name in names if name.startswith("epoch")} for names in seen]
        bests = [{name for name in names if name.startswith("best")} for names in seen]
        # Each epoch writes its checkpoint twice: after the best one is saved, its path is added.
        assert len(seen) == 9
        assert all(epochs[3:])
        assert all(bests[3:])

    def test_a_failed_write_keeps_the_old_file(self, runner, tmp_path, monkeypatch):
        r = runner(train_cfg={"by_epoch": True, "max_epochs": 1})
        r.train()
        path = tmp_path / "run" / "epoch_1.pth"
        before = path.read_bytes()
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            runner(train_cfg={"by_epoch": True, "max_epochs": 1}).train()
        assert path.read_bytes() == before

    def test_a_missing_folder_is_created(self, runner, tmp_path):
        hook = {"type": "AtomicCheckpointHook", "interval": 1, "out_dir": tmp_path / "a" / "b"}
        runner(default_hooks={"checkpoint": hook}).train()
        assert files(tmp_path / "a" / "b" / "run") == {f"epoch_{i}.pth" for i in (1, 2, 3)}

    def test_a_folder_that_cannot_be_created_is_an_error_before_training(self, runner, tmp_path):
        (tmp_path / "a").touch()
        hook = {"type": "AtomicCheckpointHook", "interval": 1, "out_dir": tmp_path / "a"}
        r = runner(default_hooks={"checkpoint": hook})
        with pytest.raises(
            OSError, match=rf"out_dir {tmp_path}/a/run cannot be written: Not a dir"
        ):
            r.train()
        assert r.iter == 0

    @pytest.mark.parametrize("averages", [[], [{"type": "EMAHook", "momentum": 0.3}]])
    def test_torch_and_mmengine_can_load_them(self, averages, runner, tmp_path):
        score = Score([np.float64(0.1), np.float32(0.2), np.int64(3)])
        paramwise = {"custom_keys": {"head": {"lr_mult": np.float64(2)}}}
        sgd = {"type": "SGD", "lr": 0.01, "momentum": 0.9}
        r = runner(
            val_evaluator=Evaluator(score),
            optim_wrapper={"optimizer": sgd, "paramwise_cfg": paramwise},
            param_scheduler=[{"type": "ExponentialLR", "gamma": np.float64(0.5)}],
            custom_hooks=averages,
        )
        r.train()
        for name in ("epoch_3.pth", "best_score_epoch_3.pth"):
            loaded = torch.load(tmp_path / "run" / name, weights_only=True)
            assert loaded["message_hub"]["runtime_info"]["best_score"] == 3
        trained = r.message_hub.log_scalars
        # SafeRunner restores the histories when reading, mmengine's own runner in this hook.
        AtomicCheckpointHook().after_load_checkpoint(r, loaded)
        for checkpoint in (loaded, safe_loading.read_checkpoint(tmp_path / "run" / "epoch_3.pth")):
            histories = checkpoint["message_hub"]["log_scalars"]
            assert {"train/loss", "train/lr"} <= histories.keys()
            for name, history in histories.items():
                assert isinstance(history, HistoryBuffer)
                for array, expected in zip(history.data, trained[name].data, strict=True):
                    assert array.tolist() == expected.tolist()[: len(array)]
                    assert len(array) > 0

    @pytest.mark.curves
    @pytest.mark.parametrize("averages", [[], [{"type": "EMAHook", "momentum": 0.3}]])
    def test_a_resumed_run_equals_an_uninterrupted_one(self, averages, runner, tmp_path):
        torch.manual_seed(0)
        initial = Model().state_dict()
        ends = []
        for name, stops in (("whole", (3,)), ("resumed", (1, 3))):
            for epochs in stops:
                model = Model()
                model.load_state_dict(initial)
                folder = tmp_path / name
                last = latest_checkpoint(folder)
                runner(
                    model,
                    work_dir=str(folder),
                    train_cfg={"by_epoch": True, "max_epochs": epochs},
                    custom_hooks=[*averages, {"type": "CurvesHook"}],
                    **({"resume": True, "load_from": str(last)} if last else {}),
                ).train()
            ends.append(load_state(folder / "epoch_3.pth"))
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in initial)
        assert set(curves.read_scalars(tmp_path / "resumed")["score"]) == {1, 2, 3}
        assert (tmp_path / "resumed" / "curves.png").stat().st_size > 1000

    def test_the_latest_checkpoint_has_the_highest_number(self, tmp_path):
        assert latest_checkpoint(tmp_path) is None
        foreign = ["epoch_11.pth.partial", "best_epoch_12.pth", "epoch_12-1a2b3c4d.pth"]
        for name in ("epoch_9.pth", "epoch_10.pth", *foreign, "epoch_best.pth", "epoch_.pth"):
            (tmp_path / name).touch()
        (tmp_path / "epoch_13.pth").mkdir()
        assert latest_checkpoint(tmp_path).name == "epoch_10.pth"


class TestScaledLearningRates:
    """Learning rates scale linearly with the effective batch size."""

    # The batch size is 2, the base batch size 4.
    @pytest.mark.parametrize(("accumulated", "rate"), [(1, 0.5), (2, 1.0), (8, 4.0), (3, 1.5)])
    def test_accumulated_batches_count_towards_the_batch_size(
        self, accumulated, rate, runner, caplog
    ):
        r = runner(
            optim_wrapper={
                "optimizer": {"type": "SGD", "lr": 1.0},
                "accumulative_counts": accumulated,
                "paramwise_cfg": {"custom_keys": {"head": {"lr_mult": 0.1}}},
            },
            auto_scale_lr={"enable": True, "base_batch_size": 4},
            log_level="INFO",
        )
        r.logger.addHandler(caplog.handler)
        r.train()
        rates = r.optim_wrapper.get_lr()
        assert sorted({*rates["lr"]}) == pytest.approx([rate / 10, rate])
        assert rates["base_lr"] == [rate]
        assert (
            f"scaling learning rates by {rate:g}: the total batch size is {2 * accumulated} "
            in caplog.text
        )

    def test_learning_rates_are_not_scaled_by_default(self, runner):
        r = runner(auto_scale_lr={"base_batch_size": 4})
        r.train()
        assert r.optim_wrapper.get_lr()["lr"] == [0.01]

    def test_the_base_batch_size_is_required(self, runner):
        with pytest.raises(ValueError, match=r"auto_scale_lr\.base_batch_size must be"):
            runner(auto_scale_lr={"enable": True}).train()


def trained(runner, folder: Path) -> Path:
    """Train three epochs and return the last checkpoint, which has the best score."""
    runner().train()
    return folder / "run" / "epoch_3.pth"


def resume(runner, path: Path) -> None:
    """Train a fourth epoch, which has an even better score."""
    cfg = {"by_epoch": True, "max_epochs": 4}
    runner(scores=[0.4], train_cfg=cfg, resume=True, load_from=str(path)).train()


def load_state(path: Path) -> dict:
    return safe_loading.read_checkpoint(path)["state_dict"]


class TestLoading:
    """A runner loads published and other checkpoints."""

    @pytest.fixture
    def save(self, tmp_path):
        def save(state_dict: dict, **kwargs) -> str:
            torch.save({"state_dict": state_dict, **kwargs}, tmp_path / "c.pth")
            return str(tmp_path / "c.pth")

        return save

    @pytest.fixture
    def tester(self, runner):
        def build(**kwargs):
            nothing = dict.fromkeys(("train_dataloader", "train_cfg", "optim_wrapper"))
            return runner(**nothing, **kwargs)

        return build

    def test_published_checkpoint(self, tester, save):
        expected = Model().state_dict()
        averaged = {
            "ema_" + name.replace(".", "_"): tensor + 1 for name, tensor in expected.items()
        }
        meta = {"CLASSES": ("a", "b"), "epoch": 12}
        path = save(OrderedDict(expected | averaged), meta=meta, optimizer={"state": {}})
        r = tester()
        checkpoint = r.load_checkpoint(path)
        assert all(torch.equal(r.model.state_dict()[name], expected[name]) for name in expected)
        assert checkpoint["meta"]["dataset_meta"] == {"classes": ("a", "b")}

    def test_a_checkpoint_of_a_classifier_is_rejected(self, tester, save):
        path = save({})
        torch.save({"model": Model().state_dict()}, path)
        message = rf"{path} is not a checkpoint of a detector .*got the entries model .*init_cfg"
        with pytest.raises(ValueError, match=message):
            tester().load_checkpoint(path)

    @pytest.mark.parametrize("state_dict", [None, [1], 3])
    @pytest.mark.parametrize("who", ["tester", "runner"])
    def test_an_invalid_state_dict_is_rejected(self, who, state_dict, save, request):
        path = save(state_dict, message_hub={})
        with pytest.raises(ValueError, match=rf"^{path} has no state_dict$"):
            request.getfixturevalue(who)().load_checkpoint(path)

    def test_entries_that_are_not_tensors_are_ignored(self, runner, save, caplog):
        r = runner(load_from=save(Model().state_dict() | {"head.bias": 3}, message_hub={}))
        r.logger.addHandler(caplog.handler)
        r.load_or_resume()
        assert "1 tensors stay randomly initialized: head.bias" in caplog.text

    @pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
    def test_a_test_rejects_weights_of_another_model(self, tester, save, change):
        state = Model(classes=3 if change == "shape" else 2).state_dict()
        if change == "missing":
            del state["head.bias"]
        elif change == "unexpected":
            state["other"] = torch.zeros(1)
        with pytest.raises(ValueError, match=rf"does not match the model: {change}"):
            tester().load_checkpoint(save(state))

    def test_a_head_of_another_shape_keeps_its_initial_values(self, runner, save, caplog):
        source = Model(classes=3)
        r = runner(load_from=save(source.state_dict()))
        r.logger.addHandler(caplog.handler)
        head = r.model.head.weight.clone()
        r.load_or_resume()
        assert torch.equal(r.model.backbone.weight, source.backbone.weight)
        assert torch.equal(r.model.head.weight, head)
        assert "2 tensors stay randomly initialized: head.bias, head.weight" in caplog.text
        assert "2 tensors of the checkpoint are not used: head.bias, head.weight" in caplog.text

    def test_weights_that_match_nothing_are_rejected(self, runner, save):
        path = save({"levels.0.weight": torch.zeros(3)})
        message = rf"^{path}: none of its 1 tensors matches .* with levels, .* with backbone, head$"
        with pytest.raises(ValueError, match=message):
            runner(load_from=path).load_or_resume()

    def test_resuming_rejects_weights_of_another_model(self, runner, save):
        r = runner(load_from=save(Model(classes=3).state_dict()), resume=True)
        with pytest.raises(ValueError, match=r"does not match the model: shape of head\.weight"):
            r.load_or_resume()

    @pytest.mark.parametrize(
        "calls",
        [
            lambda marker: (shutil.copytree, (".", marker)),
            lambda marker: (getattr, (np.ndarray, "tofile")),
            lambda marker: (getattr, (HistoryBuffer, "__init__")),
        ],
    )
    def test_nothing_is_executed(self, tester, save, tmp_path, calls):
        class Hostile:
            def __reduce__(self):
                return calls(str(tmp_path / "executed"))

        state_dict = Model().state_dict()
        path = save(state_dict, meta={"x": Hostile()}, message_hub={})
        checkpoint = tester().load_checkpoint(path)
        assert isinstance(checkpoint["meta"]["x"], Placeholder)
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("name", ["cfg", "config"])
    def test_a_config_in_the_file_is_not_executed(self, runner, tmp_path, name):
        path, marker = trained(runner, tmp_path), tmp_path / "executed"
        checkpoint = torch.load(path, weights_only=False)
        checkpoint["meta"][name] = f"import os\nos.mkdir({str(marker)!r})\n"
        torch.save(checkpoint, path)
        resume(runner, path)
        assert not marker.exists()

    @pytest.mark.parametrize("who", ["function", "runner"])
    def test_nothing_is_executed_when_init_cfg_loads_a_checkpoint(
        self, who, runner, save, tmp_path
    ):
        class Hostile:
            def __reduce__(self):
                return shutil.copytree, (".", str(tmp_path / "executed"))

        source = Model(classes=3)
        path = save(source.state_dict(), meta={"x": Hostile()})
        model = Model(classes=3)
        model.init_cfg = {"type": "Pretrained", "checkpoint": path}
        if who == "function":
            with safe_loading.safe_loading():
                model.init_weights()
        else:
            runner(model, train_cfg={"by_epoch": True, "max_epochs": 0}).train()
        assert torch.equal(model.head.weight, source.head.weight)
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.pop("meta"), "KeyError: 'meta'"),
            (lambda c: c.pop("state_dict"), "has no state_dict"),
            (lambda c: c.update(optimizer=[]), "TypeError"),
            (
                lambda c: c["meta"].update(iter=-1),
                "meta.iter must be a non-negative integer, got -1",
            ),
            (lambda c: c.pop("optimizer"), "no optimizer state; to start from its weights"),
            (
                lambda c: c["meta"].update(epoch=-1),
                "meta.epoch must be a non-negative integer, got -1",
            ),
            (
                lambda c: c["meta"].update(epoch="1"),
                "meta.epoch must be a non-negative integer, got '1'",
            ),
        ],
    )
    def test_a_checkpoint_that_cannot_be_resumed_is_an_error(
        self, runner, tmp_path, change, message
    ):
        path = trained(runner, tmp_path)
        checkpoint = torch.load(path, weights_only=False)
        change(checkpoint)
        torch.save(checkpoint, path)
        with pytest.raises(ValueError, match=rf"cannot resume from {path}: .*{message}"):
            resume(runner, path)

    def test_resuming_keeps_the_kernel_flags_of_this_run(self, runner, tmp_path):
        path = trained(runner, tmp_path)
        checkpoint = torch.load(path, weights_only=False)
        checkpoint["optimizer"]["param_groups"][0].update(fused=True, foreach=False)
        torch.save(checkpoint, path)
        r = runner(resume=True, load_from=str(path))
        r.train()
        group = r.optim_wrapper.optimizer.param_groups[0]
        assert (group["fused"], group["foreach"]) == (None, None)

    def test_the_best_checkpoints_of_several_metrics_are_in_the_work_folder(self, tmp_path):
        info = {"best_ckpt_a": "/before/best_a_epoch_1.pth", "best_ckpt_b": str(tmp_path)}
        fake = SimpleNamespace(
            message_hub=SimpleNamespace(runtime_info=info, get_info=info.get),
            work_dir=str(tmp_path),
            _resume=False,
            logger=logging.getLogger(__name__),
        )
        hook = AtomicCheckpointHook(save_best=["a", "b"], rule="greater")
        hook.before_train(fake)
        expected = {"a": str(tmp_path / "best_a_epoch_1.pth"), "b": None}
        assert hook.best_ckpt_path_dict == expected

    @pytest.mark.parametrize(
        ("hook", "message"),
        [
            ({"type": "AtomicCheckpointHook", "save_best": "score"}, "save_best of AtomicCheckp"),
            (
                {"type": "AtomicCheckpointHook", "save_best": ["own/score", "score"]},
                "save_best of AtomicCheckpointHook",
            ),
            ({"type": "EarlyStoppingHook", "monitor": "score"}, "monitor of EarlyStoppingHook"),
        ],
    )
    def test_metric_names_require_the_prefix_of_the_evaluator(self, hook, message, runner):
        metric = Score([0.1])
        metric.prefix = "own"
        r = runner(
            val_evaluator=Evaluator(metric),
            default_hooks={"checkpoint": {"rule": "greater", **hook}},
        )
        with pytest.raises(ValueError, match=rf"{message}.* starts with own/, got 'score'"):
            r.train()

    def test_save_best_rejects_unknown_metrics(self, runner):
        hook = {"type": "AtomicCheckpointHook", "save_best": "scores", "rule": "greater"}
        with pytest.raises(ValueError, match=r"save_best must be among score, got scores$"):
            runner(default_hooks={"checkpoint": hook}).train()

    def test_resuming_a_finished_run_is_logged(self, runner, tmp_path, caplog):
        path = trained(runner, tmp_path)
        r = runner(resume=True, load_from=str(path))
        r.logger.addHandler(caplog.handler)
        r.train()
        assert f"training is already complete in {path}" in caplog.text

    @pytest.mark.parametrize(
        ("numbers", "kept"), [(["X/../../elsewhere", 3], set()), (3, {"epoch_3.pth"})]
    )
    def test_invalid_checkpoint_numbers_in_the_file_are_ignored(
        self, numbers, kept, runner, tmp_path
    ):
        path = trained(runner, tmp_path)
        (tmp_path / "run" / "epoch_X").mkdir()
        (tmp_path / "elsewhere.pth").mkdir()
        checkpoint = torch.load(path, weights_only=False)
        checkpoint["message_hub"]["runtime_info"]["keep_ckpt_ids"] = numbers
        torch.save(checkpoint, path)
        resume(runner, path)
        assert (tmp_path / "elsewhere.pth").is_dir()
        assert files(tmp_path / "run") == {"best_score_epoch_4.pth", "epoch_4.pth"} | kept

    @pytest.mark.parametrize("victim", ["elsewhere", "elsewhere/best_score.pth", "run/.."])
    def test_a_best_checkpoint_outside_the_work_folder_is_not_removed(
        self, runner, tmp_path, victim
    ):
        path = trained(runner, tmp_path)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "best_score.pth").touch()
        checkpoint = torch.load(path, weights_only=False)
        checkpoint["message_hub"]["runtime_info"]["best_ckpt"] = str(tmp_path / victim)
        torch.save(checkpoint, path)
        resume(runner, path)
        assert (tmp_path / "elsewhere" / "best_score.pth").is_file()
        assert "best_score_epoch_4.pth" in files(tmp_path / "run")

    @pytest.mark.parametrize("score", ["high", None, [0.9], float("nan"), float("inf")])
    def test_a_best_score_that_is_not_a_finite_number_is_ignored(self, score, runner, tmp_path):
        path = trained(runner, tmp_path)
        checkpoint = torch.load(path, weights_only=False)
        checkpoint["message_hub"]["runtime_info"]["best_score"] = score
        torch.save(checkpoint, path)
        resume(runner, path)
        assert "best_score_epoch_4.pth" in files(tmp_path / "run")

    def test_the_best_of_a_moved_run_is_replaced(self, runner, tmp_path):
        path = trained(runner, tmp_path)
        checkpoint = torch.load(path, weights_only=False)
        checkpoint["message_hub"]["runtime_info"]["best_ckpt"] = "/before/best_score_epoch_3.pth"
        torch.save(checkpoint, path)
        resume(runner, path)
        assert files(tmp_path / "run") == {"best_score_epoch_4.pth", "epoch_4.pth"}

    def test_a_restored_history_does_not_change_other_histories(self, save, monkeypatch):
        history = HistoryBuffer([1.0, 3.0], [1, 1])
        with monkeypatch.context() as patch:
            patch.setitem(HistoryBuffer._statistics_methods, "mean", HistoryBuffer.max)
            path = save({}, message_hub={"log_scalars": {"loss": history}})
        loaded = safe_loading.read_checkpoint(path)["message_hub"]["log_scalars"]["loss"]
        loaded.update(5.0)
        assert loaded.statistics("mean") == 3
        assert HistoryBuffer._statistics_methods["mean"] is HistoryBuffer.mean

    @pytest.mark.parametrize(
        "state",
        [
            {"_log_history": np.ones(2), "_count_history": np.ones(3), "max_length": 9},
            {"_log_history": np.ones(2), "_count_history": np.ones(2), "max_length": 1},
            {"_log_history": np.array([True]), "_count_history": np.ones(1), "max_length": 9},
            {"_log_history": [1], "_count_history": [1], "max_length": 9},
            None,
        ],
    )
    def test_an_invalid_history_is_rejected(self, save, state):
        history = HistoryBuffer()
        history.__dict__ = state or {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HistoryBuffer, "__getstate__", lambda self: state, raising=False)
            path = save({}, message_hub={"log_scalars": {"loss": history}})
        with pytest.raises(ValueError, match=r"c\.pth: log_scalars\.loss must be two arrays"):
            safe_loading.read_checkpoint(path)

    def test_missing_checkpoint(self, tester):
        with pytest.raises(FileNotFoundError, match=r"checkpoint not found: none\.pth"):
            tester().load_checkpoint("none.pth")


class TestCurves:
    def test_the_latest_attempt_is_read_and_a_truncated_last_line_ignored(self, tmp_path):
        for attempt, lines in (
            ("1", '{"loss": 4.0, "step": 1}\n{"loss": 3.0, "step": 2}\n{"loss": 9.0, "st'),
            ("2", '{"loss": 2.0, "step": 2}\n{"loss": 1.0, "lr": 0.1, "step": 3}\n'),
        ):
            folder = tmp_path / attempt / "vis_data"
            folder.mkdir(parents=True)
            (folder / "scalars.json").write_text(lines)
        expected = {"loss": {1: 4.0, 2: 2.0, 3: 1.0}, "lr": {3: 0.1}}
        assert curves.read_scalars(tmp_path) == expected

    @pytest.mark.parametrize(
        ("validation", "count"),
        [({}, 3), ({"val_dataloader": None, "val_cfg": None, "val_evaluator": None}, 1)],
    )
    def test_curves_are_drawn_after_every_validation_and_at_the_end(
        self, validation, count, runner, tmp_path, monkeypatch
    ):
        drawn = []
        monkeypatch.setattr(curves, "save_curves", drawn.append)
        runner(**validation).train()
        assert drawn == [tmp_path / "run"] * count

    def test_a_run_without_scalars_has_no_curves(self, tmp_path):
        curves.save_curves(tmp_path)
        assert not list(tmp_path.iterdir())


class NonFiniteModel(Model):
    """Model whose loss, or only its gradient, is not finite in one iteration."""

    def __init__(self, iteration: int, what: str):
        super().__init__()
        self.iteration, self.what = iteration, what

    def forward(self, inputs, mode="tensor"):
        outputs = super().forward(inputs, mode)
        if mode == "loss":
            self.iteration -= 1
        if self.iteration == 0 and mode == "loss":
            zero = (self.head.bias - self.head.bias.detach()).sum()
            broken = zero.abs().sqrt() if self.what == "gradient" else zero / zero
            outputs["loss_broken"] = broken
        return outputs


class TestNonFiniteValues:
    HOOKS = ({"type": "CheckFiniteHook"},)

    def test_a_non_finite_loss_stops_the_training(self, runner, tmp_path):
        message = r"loss is not finite in iteration 4: .*loss_broken nan"
        with pytest.raises(FloatingPointError, match=message):
            runner(NonFiniteModel(4, "loss"), custom_hooks=[*self.HOOKS]).train()
        assert "epoch_1.pth" in files(tmp_path / "run")
        assert "epoch_2.pth" not in files(tmp_path / "run")

    def test_non_finite_weights_are_not_saved(self, runner, tmp_path):
        message = r"1 weights are not finite after iteration 4 .*not saved: head\.bias"
        with pytest.raises(FloatingPointError, match=message):
            runner(NonFiniteModel(4, "gradient"), custom_hooks=[*self.HOOKS]).train()
        assert "epoch_2.pth" not in files(tmp_path / "run")

    def test_finite_values_do_not_stop_the_training(self, runner, tmp_path):
        runner(custom_hooks=[*self.HOOKS]).train()
        assert "epoch_3.pth" in files(tmp_path / "run")


def test_bfloat16_autocasts_the_loss_and_keeps_weights_in_float32(runner):
    wrapper = {"type": "BFloat16OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.01}}
    model = Model()
    before = model.head.weight.clone()
    runner(model, optim_wrapper=wrapper).train()
    assert model.dtypes == {torch.bfloat16, torch.float32}  # in training, in validation
    assert model.head.weight.dtype == torch.float32
    assert not torch.equal(model.head.weight, before)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"dynamic": True, "options": {"layout_optimization": False}}),
        ({"dynamic": False}, {"dynamic": False, "options": {"layout_optimization": False}}),
        ({"mode": "max-autotune"}, {"dynamic": True, "mode": "max-autotune"}),
        ({"backend": "eager"}, {"dynamic": True, "backend": "eager"}),
    ],
)
def test_only_the_backbone_is_compiled(runner, monkeypatch, given, expected):
    compiled = []
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **kwargs: compiled.append((self, kwargs))
    )
    r = runner(custom_hooks=[{"type": "CompileBackboneHook", **given}])
    names = list(r.model.state_dict())
    r.call_hook("before_run")
    assert compiled == [(r.model.backbone, expected)]
    assert list(r.model.state_dict()) == names


def test_runs_of_the_same_second_have_names_of_their_own(runner, monkeypatch):
    monkeypatch.setattr("mmengine.runner.runner.time.strftime", lambda *_: "20261130_065542")
    one, other = (runner(experiment_name="run") for _ in range(2))
    assert one.timestamp == other.timestamp
    assert one.experiment_name != other.experiment_name
    one.message_hub.update_scalar("train/loss", 1.0)
    assert "train/loss" not in other.message_hub.log_scalars
    assert one.visualizer is not other.visualizer
