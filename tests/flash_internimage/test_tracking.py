"""Test the loggers of training runs, whose resumed attempts record every step once."""

import json
import logging
import struct
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from flash_internimage.classification.config import Config, ConfigError, load_config
from flash_internimage.classification.report import Metrics
from flash_internimage.classification.training import train
from flash_internimage.nested import flatten
from flash_internimage.tracking import TRACKERS, check_packages, open_tracker, trackers

HEADER, BLOCK = 7, 32768  # of a .wandb file and its blocks, in bytes
WHOLE, LAST = 1, 4  # types of fragments that end a record


def read_wandb(path: Path) -> list[Record]:
    """Read the records of a .wandb file, which has the format of LevelDB's log."""
    content, records, parts = path.read_bytes(), [], b""
    position = HEADER
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:  # padding
            position += BLOCK - position % BLOCK
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + HEADER])
        position += HEADER + length
        parts += content[position - length : position]
        if kind in (WHOLE, LAST):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_runs(folder: Path) -> list[tuple[str, list[dict]]]:
    """Return the id and the history of each attempt."""
    wandb.teardown()  # waits until its service has written everything
    attempts = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        records = read_wandb(path)
        ids = {record.run.run_id for record in records if record.HasField("run")}
        rows = [
            {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for record in records
            if record.HasField("history")
        ]
        attempts.append((*ids, rows))
    return attempts


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """Return the folder of a run, with both trackers recording in files."""
    for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_NAME", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    folder = tmp_path / "digits"
    folder.mkdir()
    return folder


@pytest.fixture
def recorded(monkeypatch) -> list[tuple[int, dict]]:
    """Replace Weights & Biases by a tracker whose rows are returned; each start adds its id."""
    rows: list = []

    class Recorder(trackers.Tracker):
        name = "wandb"

        def _start(self, run_id, settings):
            rows.append(run_id)
            return run_id or "new"

        def _log(self, scalars, step):
            rows.append((step, scalars))

        def add_image(self, name, pixels, step): ...

        def close(self): ...

    monkeypatch.setitem(TRACKERS, "wandb", Recorder)
    return rows


def record(folder: Path, first: int, last: int, resumed: bool, name: str) -> None:
    tracker = open_tracker(name, folder, {"model.name": "nano", "lr": 0.1}, resumed)
    for step in range(first, last + 1):
        tracker.log({"loss": 1 / step, "coco/{cat}": step, "text": "a"}, step)
    tracker.add_image("picture", np.zeros((4, 4, 3), np.uint8), last)
    tracker.close()


@pytest.mark.slow
def test_weights_and_biases_continues_its_run(offline):
    record(offline, 1, 5, False, "wandb")  # killed after a checkpoint at step 3
    record(offline, 4, 7, True, "wandb")
    (first, before), (second, after) = wandb_runs(offline)
    assert first == second
    rows = [row for row in before + after if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["loss"] for row in rows] == [1 / step for step in range(1, 8)]
    [path, _] = sorted(offline.glob("wandb/offline-run-*/*.wandb"))
    [run] = [r.run for r in read_wandb(path) if r.HasField("run")][:1]
    assert (run.project, run.display_name) == ("flash-internimage", "digits")
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["model.name"] == "nano"


@pytest.mark.slow
def test_mlflow_continues_its_run(offline):
    record(offline, 1, 5, False, "mlflow")
    record(offline, 4, 7, True, "mlflow")
    [run] = mlflow.search_runs(output_format="list", search_all_experiments=True)
    assert (run.info.run_name, run.info.status) == ("digits", "FINISHED")
    assert run.data.params == {"model.name": "nano", "lr": "0.1"}
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(i, 1 / i) for i in range(1, 8)]
    assert run.data.metrics["coco/_cat_"] == 7
    assert [file.name for file in offline.parent.rglob("picture_*.png")] == [
        "picture_5.png", "picture_7.png",
    ]  # fmt: skip


def test_a_scalar_that_a_killed_attempt_has_not_recorded_is_not_lost(tmp_path, recorded):
    first = open_tracker("wandb", tmp_path, {}, False)
    first.log({"loss": 3.0}, 9)
    first.log({"loss": 2.0}, 10)  # killed before the validation at this step
    second = open_tracker("wandb", tmp_path, {}, True)
    second.log({"loss": 2.0}, 10)
    second.log({"mIoU": 0.5}, 10)
    second.log({"loss": 1.0}, 11)
    rows = [(9, {"loss": 3.0}), (10, {"loss": 2.0})]
    assert recorded == [None, *rows, "new", (10, {"mIoU": 0.5}), (11, {"loss": 1.0})]


def test_a_new_run_in_the_folder_has_a_new_id(tmp_path, recorded):
    open_tracker("wandb", tmp_path, {}, False).log({"loss": 3.0}, 9)
    open_tracker("wandb", tmp_path, {}, False).log({"loss": 3.0}, 1)
    assert recorded == [None, (9, {"loss": 3.0}), None, (1, {"loss": 3.0})]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_id": "a", "steps": {"loss": "x"}}'])
def test_a_damaged_record_starts_a_new_run(tmp_path, recorded, caplog, text):
    (tmp_path / "wandb.json").write_text(text)
    open_tracker("wandb", tmp_path, {}, True)
    assert recorded == [None]
    assert "wandb.json is damaged: starting a new run" in caplog.text


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("wandb.init", lambda **_: 1 / 0)
    with pytest.raises(ValueError, match=r"^loggers: wandb cannot start: division by zero$"):
        open_tracker("wandb", tmp_path, {}, False)


def test_a_run_that_cannot_start_is_not_left_open(offline, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "log_params", lambda _: 1 / 0)
        with pytest.raises(ValueError, match=r"^loggers: mlflow cannot start: division by zero$"):
            open_tracker("mlflow", offline, {"lr": 0.1}, False)
    assert mlflow.active_run() is None


def test_a_logger_that_cannot_start_closes_the_others(tmp_path, recorded, monkeypatch):
    closed = []
    monkeypatch.setattr(TRACKERS["wandb"], "close", lambda self: closed.append(self.name))
    monkeypatch.setattr(mlflow, "start_run", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=r"^loggers: mlflow cannot start: division by zero$"):
        Metrics(tmp_path, 0, ("wandb", "mlflow"))
    assert closed == ["wandb"]


def test_a_server_that_fails_while_training_is_reported_once(offline, monkeypatch, caplog):
    tracker = open_tracker("mlflow", offline, {}, False)

    def fail(*_, **__):
        raise mlflow.MlflowException("no\nconnection")

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(mlflow, "log_metrics", fail)
        for step in (1, 2, 3):
            tracker.log({"loss": 1.0}, step)
        tracker.close()
    assert caplog.messages[-2:] == [
        "MLflow cannot record: no connection", "MLflow could not record 3 rows or images",
    ]  # fmt: skip


def test_classifiers_record_each_epoch(tmp_path, recorded):
    metrics = Metrics(tmp_path, 0, ("wandb",), {"seed": 0})
    metrics.add({"epoch": 1, "val_top1": 50.0})
    metrics.close()
    metrics = Metrics(tmp_path, 1, ("wandb",), {"seed": 0}, resumed=True)
    metrics.add({"epoch": 2, "val_top1": 75.0})
    metrics.close()
    rows = [(i, {"epoch": float(i), "val_top1": 25.0 + 25 * i}) for i in (1, 2)]
    assert recorded == [None, rows[0], "new", rows[1]]


def test_a_missing_package_is_named_before_the_run_starts(tmp_path, monkeypatch):
    missing = SimpleNamespace(find_spec=lambda name: None)
    monkeypatch.setattr(trackers.importlib, "util", missing)
    message = "^loggers: wandb requires a package: pip install wandb$"
    with pytest.raises(ValueError, match=message):
        check_packages(["wandb"])
    with pytest.raises(ValueError, match=message):
        train(Config(output=str(tmp_path / "run"), loggers=("wandb",), device="cpu"))
    assert not (tmp_path / "run").exists()


def test_loggers_are_a_name_or_a_list_of_names(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("loggers: wandb\n")
    assert load_config(path).loggers == ("wandb",)
    assert load_config(path, ["loggers=[mlflow, wandb]"]).loggers == ("mlflow", "wandb")
    assert load_config(path, ["loggers=mlflow"]).loggers == ("mlflow",)
    assert Config().loggers == ()
    with pytest.raises(ConfigError, match=r"loggers\.0: Input should be 'wandb' or 'mlflow'"):
        load_config(path, ["loggers=[wndb]"])


def test_nested_settings_become_dotted_keys():
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": (1, "x")}
    assert flatten(nested) == {"a.b": 1, "a.c.d": None, "e": (1, "x")}


def test_secrets_in_addresses_are_left_out(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setitem(TRACKERS, "wandb", lambda folder, settings, resumed: seen.update(settings))
    address = "https://user:password@example.org/best.pth?token=secret"
    settings = {"model.initial_checkpoint": address, "lr": 0.1, "x": [1]}
    open_tracker("wandb", tmp_path, settings, False)
    public = "https://...@example.org/best.pth?..."
    assert seen == {"model.initial_checkpoint": public, "lr": 0.1, "x": "[1]"}


def test_a_logger_is_started_once():
    assert Config(loggers=["wandb", "mlflow", "wandb"]).loggers == ("wandb", "mlflow")
