"""Test the backends that continue the run of a resumed training."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.config import Config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flash_internimage.openmmlab.cli.config import load_config
from flash_internimage.openmmlab.engine import vis_backends
from flash_internimage.openmmlab.engine.vis_backends import (
    RunTensorboardVisBackend,
    RunTrackerVisBackend,
)

CONFIGS = Path(__file__).parents[4] / "configs"
DEMO = CONFIGS / "segmentation" / "upernet_flash_internimage_nano_digits_scenes.py"


class Run:
    """A runner that has done some iterations and records through a backend.

    Args:
        folder: Work folder.
        iteration: Iterations done when the attempt starts.
        backend: Backend of the visualizer.
    """

    def __init__(self, folder: Path, iteration: int, backend) -> None:
        self.runner = SimpleNamespace(
            iter=iteration, work_dir=str(folder), cfg=Config({"model": {"depth": 4, "x": [1]}})
        )
        self.backend = backend
        backend.add_scalars({"before": 1.0, "iter": 1}, 1)  # not in training
        backend.start(self.runner)

    def train(self, last: int) -> "Run":
        for i in range(self.runner.iter + 1, last + 1):
            row = {"loss": float(i), "lr": np.float64(0.1), "time": 1.0, "iter": i, "epoch": 1}
            self.backend.add_scalars(row, i)
        self.runner.iter = last
        return self

    def validate(self, value: float) -> "Run":
        self.backend.add_scalars({"coco/bbox_mAP": value, "time": 5.0}, 1)  # mmengine's epoch
        return self


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_shows_each_iteration_of_a_resumed_run_once(tmp_path):
    first = RunTensorboardVisBackend(str(tmp_path / "20260101" / "vis_data"))
    Run(tmp_path, 0, first).train(2).validate(0.25).train(4).validate(0.5)  # killed
    second = RunTensorboardVisBackend(str(tmp_path / "20260102" / "vis_data"))
    Run(tmp_path, 2, second).train(4).validate(0.75).train(5)
    second.close()
    scalars = read(tmp_path)
    assert scalars["loss"] == [(i, i) for i in (1, 2, 3, 4, 5)]
    assert scalars["coco/bbox_mAP"] == [(2, 0.25), (4, 0.75)]
    assert scalars["time"] == [(i, 1) for i in (1, 2, 3, 4, 5)]
    assert scalars["val/time"] == [(2, 5), (4, 5)]
    assert scalars.keys() == {"loss", "lr", "time", "coco/bbox_mAP", "val/time"}


def test_images_are_recorded_in_training_only(tmp_path):
    backend = RunTensorboardVisBackend(str(tmp_path / "20260101" / "vis_data"))
    pixels = np.zeros((4, 6, 3), np.uint8)
    backend.add_image("before", pixels, 1)
    assert not (tmp_path / "tensorboard").exists()
    Run(tmp_path, 0, backend).train(3)
    backend.add_image("val_img", pixels, 1)
    backend.close()
    backend.add_image("after", pixels, 1)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["val_img"]
    [image] = events.Images("val_img")
    assert (image.step, image.height, image.width) == (3, 4, 6)


def test_trackers_get_the_config_and_whether_the_run_was_resumed(tmp_path, monkeypatch):
    opened = []

    def open_tracker(*arguments, **keywords):
        opened.append((*arguments, keywords))
        return SimpleNamespace(log=lambda *row: opened.append(row), close=lambda: None)

    monkeypatch.setattr(vis_backends, "open_tracker", open_tracker)
    for iteration in (0, 2):
        backend = RunTrackerVisBackend(str(tmp_path / "a" / "vis_data"), "wandb")
        Run(tmp_path, iteration, backend).validate(0.5)
    settings = {"model.depth": 4, "model.x": [1]}
    row = {"coco/bbox_mAP": 0.5, "val/time": 5.0}
    assert opened == [
        ("wandb", tmp_path, settings, {"resumed": False}),
        (row, 0),
        ("wandb", tmp_path, settings, {"resumed": True}),
        (row, 2),
    ]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("wandb", ["wandb"]),
        (["wandb", "mlflow"], ["wandb", "mlflow"]),
        (["wandb", "wandb"], ["wandb"]),
        ([], []),
        (None, []),
    ],
)
def test_loggers_of_a_config_become_backends(value, names):
    cfg = load_config(DEMO, {"loggers": value})
    assert [backend.get("tracker") for backend in cfg.visualizer.vis_backends[2:]] == names
    kinds = [backend["type"] for backend in cfg.visualizer.vis_backends[:2]]
    assert kinds == ["LocalVisBackend", "RunTensorboardVisBackend"]


@pytest.mark.parametrize("value", ["wndb", ["wandb", "x"]])
def test_unknown_loggers_are_errors(value):
    with pytest.raises(ValueError, match=r"loggers must be among wandb, mlflow, got '(wndb|x)'"):
        load_config(DEMO, {"loggers": value})


def test_loggers_must_be_names():
    with pytest.raises(ValueError, match="loggers must be a list of names, got 5"):
        load_config(DEMO, {"loggers": 5})
