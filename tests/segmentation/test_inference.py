"""Test that mmseg's inference functions give what the programs of this project give."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import DefaultScope
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.registry import MODELS
from PIL import Image

from flash_internimage.checkpoints import Entry, to_published_checkpoint
from flash_internimage.openmmlab import SafeRunner, model_index, safe_loading
from flash_internimage.openmmlab.cli.test import prepare_evaluation
from tests.servers import serve, use_own_caches

CLASSES = ("background", *"0147")
PALETTE = [[i, 2 * i, 3 * i] for i in range(5)]


class Predictions(BaseMetric):
    """Metric that keeps the logits by image."""

    def process(self, data_batch, data_samples) -> None:
        self.results += [
            (sample["img_path"], sample["seg_logits"]["data"]) for sample in data_samples
        ]

    def compute_metrics(self, results: list) -> dict:
        return dict(results)


def logits_of_the_runner(config: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    cfg = Config.fromfile(config)
    cfg.update(work_dir=str(config.parent / "run"), launcher="none")
    runner = SafeRunner.from_cfg(prepare_evaluation(cfg, str(checkpoint)))
    runner.test_evaluator.metrics = [Predictions()]
    return runner.test()


def published(config: Path, path: Path) -> Path:
    """Write a model in the published format: former names, and mmseg 0's meta data."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(Config.fromfile(config).model)
    weights = to_published_checkpoint({"state_dict": model.state_dict()})["state_dict"]
    torch.save({"state_dict": weights, "meta": {"CLASSES": CLASSES, "PALETTE": PALETTE}}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("family", "safe"), [("upernet", True), ("mask2former", False)])
def test_inference_equals_that_of_the_runner(
    family, safe, write_config, tmp_path, monkeypatch, request
):
    config = write_config(tmp_path / "small.py", family)
    checkpoint = published(config, tmp_path / "published.pth")
    expected = logits_of_the_runner(config, checkpoint)
    assert len(expected) == 4
    if safe:
        request.getfixturevalue("enabled_safe_loading")

    def check(result, path: str) -> None:
        torch.testing.assert_close(result.seg_logits.data, expected[path])
        assert result.pred_sem_seg.data.equal(expected[path].argmax(0, keepdim=True))
        assert expected[path].std(dim=(1, 2)).min() > 1e-3  # they depend on the image

    paths = list(expected)
    segmentor = init_model(config, str(checkpoint), device="cpu")
    assert segmentor.dataset_meta == {"classes": CLASSES, "palette": PALETTE}
    for path in paths:
        check(inference_model(segmentor, path), path)
    check(inference_model(segmentor, np.asarray(Image.open(paths[0]))[..., ::-1]), paths[0])

    use_own_caches(monkeypatch, str(tmp_path))
    with serve({"/published.pth": checkpoint.read_bytes()}) as server:
        entry = Entry(
            task="segmentation",
            architecture="a segmentor",
            backbone="T",
            pretraining="none",
            config=str(config),
            addresses=[f"{server.address}/published.pth"],
            resolution=128,
            parameters=1,
        )
        monkeypatch.setattr(model_index, "read_zoo", lambda: {"small_segmentor": entry})
        inferencer = MMSegInferencer("small_segmentor", device="cpu", show_progress=False)
    assert inferencer.model.dataset_meta == segmentor.dataset_meta
    results = inferencer(paths, return_datasamples=True)
    for path, result in zip(paths, results, strict=True):
        check(result, path)


@pytest.fixture
def enabled_safe_loading():
    with safe_loading.safe_loading():
        yield
