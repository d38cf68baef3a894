"""Tests that output folders have one owner and survive full disks."""

import errno
import logging
import os
import re
import resource
import shutil
from logging.handlers import MemoryHandler
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from flash_internimage.checkpoints import load_checkpoint
from flash_internimage.classification import output, report, training
from flash_internimage.classification.cli.train import main
from flash_internimage.classification.config import Config, ConfigError
from flash_internimage.classification.engine import Diverged, Trainer
from flash_internimage.classification.errors import describe
from flash_internimage.classification.output import (
    LogFile,
    log_start,
    suitable_ema_decay,
)
from flash_internimage.classification.report import Metrics
from flash_internimage.classification.training import train
from flash_internimage.files import own_folder
from flash_internimage.tracking import events
from tests.classification.helpers import CPU

FULL = "/dev/full"  # Opening succeeds, and the first write fails as on a full disk.


@pytest.fixture
def limited_files():
    """Make writing more than 100 kB to a file, such as a checkpoint, fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_two_runs_in_one_output_are_rejected(config, monkeypatch):
    cfg = config()
    monkeypatch.setattr(output, "own_folder", lambda path: own_folder(path, 0.1))
    monkeypatch.setattr(training, "find_checkpoint", pytest.fail)  # would read the output
    with own_folder(cfg.output):
        with pytest.raises(OSError, match=r"another run is writing to .*run"):
            train(cfg, resume="auto")
        assert [path.name for path in Path(cfg.output).iterdir()] == [".lock"]


def test_a_run_owns_its_output_until_its_end(config, monkeypatch):
    cfg = config(schedule={"epochs": 1})
    trials = []

    def try_to_own(*_) -> None:
        with pytest.raises(OSError, match="another run is writing"), own_folder(cfg.output, 0):
            pass
        trials.append(1)

    monkeypatch.setattr(Trainer, "report", try_to_own)
    train(cfg)
    assert trials
    with own_folder(cfg.output, 0):
        pass


@pytest.mark.parametrize(
    ("decay", "epochs", "message"),
    [
        (0.9999, 4, r"of 4 optimizer steps: .* retain 100 % .*; consider ema_decay=0\.32"),
        (0.9, 20, r"of 20 optimizer steps: .* retain 12\.2 % .*; consider ema_decay=0\.79"),
        (0.9999, 20_000, r"retain 13\.5 % of .*; consider ema_decay=0\.99977"),
        (0.99999, 200_000, r"retain 13\.5 % of .*; consider ema_decay=0\.999977"),
        (0.9, 22, None),
        (0.9999, 24_000, None),
        (0, 1, None),
        (None, 1, None),
    ],
)
def test_an_ema_dominated_by_the_initial_weights_is_a_warning(
    config, caplog, decay, epochs, message
):
    trainer = SimpleNamespace(
        cfg=config(ema_decay=decay, schedule={"epochs": epochs}), model=torch.nn.Linear(1, 1),
        world_size=1, device=CPU, amp="off", updates_per_epoch=1,
    )  # fmt: skip
    log_start(trainer, None, [])
    (line,) = [r.getMessage() for r in caplog.records if "ema_decay=" in r.getMessage()] or [None]
    assert re.match(rf"ema_decay={decay} is high .*{message}$", line) if message else line is None


@pytest.mark.parametrize("updates", [1, 2, 3, 7, 40, 999, 12_345, 3_000_000])
def test_the_suggested_decay_forgets_the_initial_weights(updates):
    assert float(suitable_ema_decay(updates)) ** updates == pytest.approx(0.01, rel=0.3)


@pytest.mark.slow
def test_a_full_disk_is_a_one_line_error_and_the_run_is_resumable(
    settings, tmp_path, caplog, capfd, limited_files
):
    settings["schedule"]["epochs"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main([str(tmp_path / "config.yaml")]) == 2
    message = f"{os.strerror(errno.EFBIG)} while writing {tmp_path}/run/best.pth: free some space"
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [message in record.getMessage() for record in errors] == [True]
    assert (tmp_path / "run" / "train.log").read_text().count(message) == 1
    assert "Traceback" not in capfd.readouterr().err + (tmp_path / "run/train.log").read_text()
    assert not list((tmp_path / "run").glob(".*.partial"))
    assert not (tmp_path / "run" / "last.pth").exists()
    limited_files()
    assert main([str(tmp_path / "config.yaml"), "--resume", "auto"]) == 0
    assert load_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == 1


@pytest.mark.slow
def test_warnings_from_before_the_run_are_in_the_log(settings, digits, tmp_path):
    """Overrides, data and initial weights are checked before the log is opened."""
    root = shutil.copytree(digits, tmp_path / "digits")
    (root / "train" / "3" / "notes.txt").write_text("no image")
    settings |= {"schedule": {"epochs": 1, "warmup_epochs": 0}, "ema_decay": None}
    settings["data"] |= {"root": str(root)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    train(Config.model_validate(settings | {"output": str(tmp_path / "first")}))
    (root / "train" / "3").rename(root / "train" / "three")
    overrides = [
        "seed=1", "seed=2", "data.val_split=train",
        f"model.initial_checkpoint={tmp_path}/first/last.pth",
    ]  # fmt: skip
    assert main([str(tmp_path / "config.yaml"), *overrides]) == 0
    expected = [
        "override seed=1 is replaced by the later seed=2",
        "60 images; other files: 1 .txt",
        "data.train_split and data.val_split contain the same images",
        "head stays randomly initialized, as model.initial_checkpoint was trained on other classes",
    ]

    def counts() -> list[int]:
        log = (tmp_path / "run" / "train.log").read_text()
        return [log.count(message) for message in expected]

    assert counts() == [1, 2, 1, 1]  # Both splits are train, which has the .txt.
    assert main([str(tmp_path / "config.yaml"), *overrides]) == 2  # rejected without --resume
    assert counts() == [1, 2, 1, 1]
    assert main([str(tmp_path / "config.yaml"), *overrides, "--resume", "auto"]) == 0
    assert counts() == [2, 4, 2, 1]
    assert not any(isinstance(h, MemoryHandler) for h in logging.getLogger().handlers)


@pytest.mark.parametrize("override", ["model.num_classes=3", "data.val_split=none", "device=x"])
def test_a_rejected_run_leaves_no_output(settings, digits, tmp_path, override):
    root = shutil.copytree(digits, tmp_path / "digits")
    (root / "train" / "3" / "notes.txt").write_text("no image")
    settings["data"] |= {"root": str(root)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main([str(tmp_path / "config.yaml"), override]) == 2
    assert not (tmp_path / "run").exists()


def test_a_log_on_a_full_disk_is_a_one_line_error(capfd):
    handler = LogFile(Path(FULL))
    for message in ("one", "two"):
        handler.handle(logging.makeLogRecord({"msg": message}))
    handler.close()
    assert capfd.readouterr().err == f"WARNING cannot write {FULL}: No space left on device\n"


def test_errors_in_log_calls_are_still_shown(tmp_path, capfd):
    handler = LogFile(tmp_path / "train.log")
    handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("text",)}))
    handler.close()
    assert "--- Logging error ---" in capfd.readouterr().err


def test_tensorboard_on_a_full_disk_raises_one_error_in_this_thread(tmp_path, monkeypatch, capfd):
    full = Path(FULL).open("wb")  # noqa: SIM115  (Events closes it)
    monkeypatch.setattr(events, "open", lambda *_: full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device while writing .*tfevents"):
        events.Events(tmp_path / "tensorboard", purge_step=1)
    assert capfd.readouterr().err == ""


def test_tensorboard_reads_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The second run resumes after one epoch.
    for start, losses in ((0, (4.0, 3.0, 2.0)), (1, (2.5,))):
        metrics = Metrics(tmp_path, start)
        for i, loss in enumerate(losses, start + 1):
            metrics.add({"epoch": i, "val_loss": loss})
        metrics.close()
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("val_loss")
    assert [(event.step, event.value) for event in scalars] == [(1, 4.0), (2, 2.5)]


@pytest.mark.curves
@pytest.mark.parametrize(
    ("text", "epochs"),
    [
        ("epoch,val_loss\n1,0.5\n2,0.4\n3,0.3\n", ["1", "2"]),
        ("epoch,val_loss\n1,0.5\n2", ["1", "2"]),
        ("epoch,val_loss\n1,0.5\n,0.4\n", ["1"]),
        ("epoch,val_loss\n1,0.5,7\nx,0.4\n", []),
        ("val_loss\n0.5\n", []),
        ("\0\0", []),
        ("", []),
    ],
)
def test_a_damaged_metrics_file_does_not_end_a_resume(tmp_path, text, epochs):
    (tmp_path / "metrics.csv").write_text(text)
    metrics = Metrics(tmp_path, 2)
    assert [row["epoch"] for row in metrics.rows] == epochs
    metrics.add({"epoch": 3, "val_loss": 0.1, "train_loss": 0.2})
    metrics.close()
    report.save_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert (tmp_path / "metrics.csv").read_text().splitlines()[-1].count(",") >= 2


@pytest.mark.parametrize("where", ["weight", "buffer", "ema"])
def test_non_finite_weights_are_never_saved(config, where):
    trainer = Trainer(config(), CPU)
    trainer.output.mkdir()
    trainer.save()
    model = trainer.ema.module if where == "ema" else trainer.model
    tensor = next(iter(model.buffers() if where == "buffer" else model.parameters()))
    tensor.data.flatten()[0] = torch.nan
    with pytest.raises(
        Diverged, match=r"is not finite after an optimizer step\. Try more schedule"
    ):
        trainer.save("best.pth")
    assert not (trainer.output / "best.pth").exists()
    state = load_checkpoint(trainer.last)
    for weights in (state["model"], state["model_ema"]):
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_an_error_in_a_loader_worker_is_reported_in_one_line(config, tmp_path):
    text = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "x.py", line 1\nflash_internimage.images.UnreadableImage: a.png: damaged\n'
    )
    assert describe(ValueError(text)) == "a.png: damaged"
    assert describe(ValueError("as it is: all")) == "as it is: all"


def test_unexpected_errors_are_logged_with_their_traceback(config, monkeypatch):
    def fail(self) -> None:
        raise ZeroDivisionError("a defect")

    cfg = config()
    monkeypatch.setattr(Trainer, "fit", fail)
    with pytest.raises(ZeroDivisionError):
        train(cfg)
    log = (Path(cfg.output) / "train.log").read_text()
    assert "ERROR a defect" in log
    assert "in fail" in log


def test_a_wrong_resume_does_not_create_the_output(config, tmp_path):
    for name in ("none.pth", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises((OSError, ConfigError), match=f"checkpoint not found: .*{name}"):
            train(config(), resume=str(tmp_path / name))
        assert not (tmp_path / "run").exists()
