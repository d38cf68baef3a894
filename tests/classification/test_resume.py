"""Tests that interrupted runs resume from their checkpoints and equal uninterrupted ones."""

import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import yaml

from flash_internimage.checkpoints import load_checkpoint
from flash_internimage.classification.config import ConfigError
from flash_internimage.classification.engine import Trainer
from flash_internimage.classification.interruption import Interrupted
from flash_internimage.classification.training import train
from tests import processes
from tests.classification.helpers import assert_equal, assert_same_weights, build, metrics
from tests.kills import run_until_killed


@pytest.fixture
def stop_after(monkeypatch):
    """Return a function that sends SIGTERM during the n-th optimizer step of the run."""

    def arm(updates: int) -> None:
        train_update, done = Trainer.train_update, 0

        def count_and_stop(self, batches):
            nonlocal done
            done += 1
            if done == updates:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_update(self, batches)

        monkeypatch.setattr(Trainer, "train_update", count_and_stop)

    return arm


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("updates", [3, 5])  # within an epoch of 5 steps, and at its end
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(
    config, tmp_path, stop_after, updates, workers
):
    whole = config(output=str(tmp_path / "whole"), data={"workers": workers})
    train(whole)
    stopped = config(output=str(tmp_path / "stopped"), data={"workers": workers})
    stop_after(updates)
    with pytest.raises(Interrupted, match="SIGTERM"):
        train(stopped)
    train(stopped, resume="auto")
    assert_same_weights(*(f"{c.output}/last.pth" for c in (whole, stopped)))
    assert metrics(whole.output) == metrics(stopped.output)


@pytest.mark.slow
def test_a_fine_tuning_run_resumes_exactly(config, checkpoint, tmp_path, stop_after, monkeypatch):
    monkeypatch.setattr(Trainer, "report", lambda self: None)
    changes = {
        "class_weights": [1.0] * 5 + [2.0] * 5,
        "model": {"freeze": ["patch_embed", "levels.0", "conv_head"]},
        "data": {"image_sizes": [24, 32]},
        "early_stopping": {"patience": 9},
        "distillation": {"teacher": str(checkpoint["between"])},
        "augmentation": {"auto_augment": None},  # for speed
    }
    whole = config(output=str(tmp_path / "whole"), **changes)
    train(whole)
    stopped = config(output=str(tmp_path / "stopped"), **changes)
    stop_after(8)  # within the second epoch
    with pytest.raises(Interrupted, match="SIGTERM"):
        train(stopped)
    train(stopped, resume="auto")
    assert_same_weights(*(f"{c.output}/last.pth" for c in (whole, stopped)))
    assert metrics(whole.output) == metrics(stopped.output)
    one, other = (load_checkpoint(f"{c.output}/last.pth") for c in (whole, stopped))
    assert one["early_stopping"] == other["early_stopping"]
    assert one["early_stopping"]["best"] == one["best_top1"]


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(
    settings, config, tmp_path
):
    train(config(output=str(tmp_path / "whole")))
    settings |= {"output": str(tmp_path / "killed"), "checkpoints": {"every_updates": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    program = "classification.train", tmp_path / "config.yaml", "--resume", "auto"
    run_until_killed(*program, writes=1)
    run_until_killed(*program, writes=2)
    processes.run("-m", *program).checked()
    assert_same_weights(tmp_path / "whole" / "last.pth", tmp_path / "killed" / "last.pth")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_cleanly(settings, tmp_path, number):
    settings["schedule"]["epochs"] = 1000
    settings["data"]["workers"] = 2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    process = processes.start("-m", "classification.train", tmp_path / "config.yaml")
    while not (tmp_path / "run" / "last.pth").exists():
        assert process.is_running()
        time.sleep(0.05)
    os.killpg(process.pid, number)  # Like a terminal, also signal the loader's workers.
    ended = process.wait()
    assert ended.returncode == 128 + number
    assert "Traceback" not in ended.stderr
    assert f"stopped by {number.name}; continue with --resume auto" in ended.stderr
    assert load_checkpoint(tmp_path / "run" / "last.pth")["epoch"] >= 1


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(config, monkeypatch):
    cfg = config()
    train(cfg)
    monkeypatch.delattr(Trainer, "train_epoch")
    train(cfg, resume="auto")


@pytest.mark.slow
def test_a_new_run_does_not_overwrite_an_old_one(config):
    train(config())
    with pytest.raises(ConfigError, match=r"last.pth exists: pass --resume auto"):
        train(config())


@pytest.mark.slow
def test_resuming_another_model_is_rejected(config, tmp_path):
    train(config())
    other = config(output=str(tmp_path / "other"), model={"args": {}})
    with pytest.raises(ValueError, match=r"cannot resume from .*last.pth"):
        train(other, resume=str(tmp_path / "run" / "last.pth"))


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_run_killed_between_any_two_files_equals_an_uninterrupted_one(
    config, tmp_path, monkeypatch
):
    whole, killed = config(output=str(tmp_path / "whole")), config(output=str(tmp_path / "killed"))
    train(whole)
    replace = os.replace
    # The file that is not moved into place, and the number of epochs in last.pth at that time.
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
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    assert (tmp_path / "killed" / "predictions.png").exists()
    assert not list((tmp_path / "killed").glob(".*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(None, 0.9), (0.9, None)])
def test_ema_can_be_switched_when_resuming(config, before, after):
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
    columns = [bool(row["ema_top1"]) for row in metrics(cfg.output)]
    assert columns == [before is not None, after is not None]
    assert (trainer.output / "curves.png").exists()


@pytest.mark.parametrize(("before", "after"), [("fp16", "off"), ("off", "fp16"), ("fp16", "bf16")])
def test_amp_can_change_when_resuming(config, tmp_path, before, after):
    trainer = build(config(amp=before))
    trainer.output.mkdir()
    trainer.epoch = 1
    trainer.save()
    resumed = build(config(amp=after))
    resumed.resume(trainer.last)
    assert resumed.scaler.is_enabled() == (after == "fp16")
    assert resumed.train_update([next(iter(resumed.train_loader))]) > 0


def test_error_names_a_class_that_became_empty_before_resuming(change, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "digits")
    for split in ("train", "val"):
        for image in (tmp_path / "digits" / split / "3").iterdir():
            image.unlink()
    cfg = change(**{"data.root": str(tmp_path / "digits")})
    with pytest.raises(ConfigError, match=r"train cannot be read .*1 class folders .*: 3 \("):
        build(cfg)


@pytest.mark.slow
def test_two_processes_resume_a_run_of_one_process(settings, config, tmp_path):
    """Batch-norm statistics are averaged over processes; only one process reports an error."""
    trainer = build(config())
    trainer.output.mkdir()
    trainer.epoch = 1
    trainer.save()
    settings |= {"batch_size": 6, "device": "cpu", "checkpoints": {"every_updates": 2}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        second_port = {"SECOND_PORT": str(free.getsockname()[1])}
    module = "tests.classification.train_on_two_processes"
    ended = processes.run_distributed(
        "-m", module, tmp_path / "config.yaml", environments=[second_port] * 2
    )
    (first, first_log), (second, second_log) = ((end.stdout, end.stderr) for end in ended)
    assert first == "{'EndedByAnother'} [0, 2]\n", first_log
    assert second == "{'ZeroDivisionError'} [0, 2]\n", second_log
    assert first_log.count("last.pth exists: pass --resume auto") == 1
    assert "ERROR" not in second_log
    assert "Traceback" not in first_log + second_log
    state = load_checkpoint(trainer.last)
    assert (state["epoch"], len(state["rng"])) == (2, 2)
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == ["2"]


@pytest.mark.slow
def test_a_checkpoint_of_another_run_resumes_in_a_new_output(config, tmp_path, caplog):
    train(config())
    checkpoint = str(tmp_path / "run" / "last.pth")
    longer = config(output=str(tmp_path / "longer"), schedule={"epochs": 3})
    train(longer, resume=checkpoint)
    assert (tmp_path / "longer" / "best.pth").exists()
    assert [row["epoch"] for row in metrics(longer.output)] == ["3"]
    assert "schedule.epochs was 2, is now 3" in caplog.text
    with pytest.raises(ConfigError, match=r"last\.pth exists"):
        train(longer, resume=checkpoint)
