"""Test that mmdet's inference functions give what the programs of this project give."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import DefaultScope
from PIL import Image

from flash_internimage.checkpoints import Entry, to_published_checkpoint
from flash_internimage.openmmlab import SafeRunner, model_index, safe_loading
from flash_internimage.openmmlab.cli.test import prepare_evaluation
from tests.servers import serve, use_own_caches

CLASSES = tuple("0123456789")


class Predictions(BaseMetric):
    """Metric that keeps the predictions by image."""

    def process(self, data_batch, data_samples) -> None:
        self.results += [(sample["img_path"], sample["pred_instances"]) for sample in data_samples]

    def compute_metrics(self, results: list) -> dict:
        return dict(results)


def predictions_of_the_runner(config: Path, checkpoint: Path) -> dict[str, dict]:
    cfg = Config.fromfile(config)
    cfg.update(work_dir=str(config.parent / "run"), launcher="none")
    runner = SafeRunner.from_cfg(prepare_evaluation(cfg, str(checkpoint)))
    runner.test_evaluator.metrics = [Predictions()]
    return runner.test()


def published(config: Path, path: Path) -> Path:
    """Write a model in the published format: former names, and mmdet 2's meta data."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(Config.fromfile(config).model)
    weights = to_published_checkpoint({"state_dict": model.state_dict()})["state_dict"]
    torch.save({"state_dict": weights, "meta": {"CLASSES": CLASSES}}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("family", "safe"), [("mask_rcnn", True), ("dino", False)])
def test_inference_equals_that_of_the_runner(
    family, safe, write_config, tmp_path, tmp_path_factory, monkeypatch, request
):
    config = write_config(tmp_path / "small.py", family)
    checkpoint = published(config, tmp_path / "published.pth")
    expected = predictions_of_the_runner(config, checkpoint)
    assert len(expected) == 4
    if safe:
        request.getfixturevalue("enabled_safe_loading")

    def check(result, path: str) -> None:
        found = result.pred_instances
        assert len(found) == len(expected[path]["scores"]) == 20
        for name in found.keys():
            actual, wanted = (torch.as_tensor(values[name]) for values in (found, expected[path]))
            torch.testing.assert_close(actual, wanted)

    paths = list(expected)
    detector = init_detector(config, str(checkpoint), device="cpu")
    assert tuple(detector.dataset_meta["classes"]) == CLASSES
    for path, result in zip(paths, inference_detector(detector, paths), strict=True):
        check(result, path)
    check(inference_detector(detector, np.asarray(Image.open(paths[0]))[..., ::-1]), paths[0])

    use_own_caches(monkeypatch, str(tmp_path))
    with serve({"/published.pth": checkpoint.read_bytes()}) as server:
        entry = Entry(
            task="detection",
            architecture="a detector",
            backbone="T",
            pretraining="none",
            config=str(config),
            addresses=[f"{server.address}/published.pth"],
            resolution=128,
            parameters=1,
        )
        monkeypatch.setattr(model_index, "read_zoo", lambda: {"small_detector": entry})
        inferencer = DetInferencer("small_detector", device="cpu", show_progress=False)
    assert inferencer.visualizer.dataset_meta == detector.dataset_meta
    output = inferencer(paths, return_datasamples=True, no_save_vis=True)
    for path, result in zip(paths, output["predictions"], strict=True):
        check(result, path)


@pytest.fixture
def enabled_safe_loading():
    with safe_loading.safe_loading():
        yield
