"""Test the zoo's evaluation command on a detector."""

import json
from pathlib import Path

import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope

from detection import test as test_program
from flash_internimage.checkpoints import Entry
from flash_internimage.cli import zoo as tool
from flash_internimage.cli import zoo_evaluation
from flash_internimage.openmmlab import SafeRunner
from tests import runs

NAME = "mask_rcnn_small"


@pytest.fixture
def config(write_config, tmp_path, monkeypatch) -> Path:
    """Write the config of a zoo entry whose data are only given on the command line."""
    config = write_config(tmp_path / "elsewhere.py", root="nowhere")
    entry = Entry(
        task="detection",
        architecture="Mask R-CNN",
        backbone="T",
        pretraining="ImageNet-1K",
        config=str(config),
        addresses=["https://example.org/never-asked.pth"],
        resolution=800,
        parameters=1,
        published={"box_ap": 48.0, "mask_ap": 43.1},
    )
    monkeypatch.setattr(tool, "read_zoo", lambda: {NAME: entry})
    monkeypatch.setitem(zoo_evaluation.IMAGES, "detection", 4)
    return config


@pytest.fixture
def checkpoint(config, tmp_path) -> Path:
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        weights = MODELS.build(Config.fromfile(config).model).state_dict()
    torch.save(
        {"state_dict": weights, "meta": {"CLASSES": tuple("0123456789")}}, tmp_path / "model.pth"
    )
    return tmp_path / "model.pth"


@pytest.fixture
def measured(checkpoint, scenes, tmp_path, capsys):
    def measured(*arguments: str) -> dict[str, dict]:
        data = ["--data", str(scenes), "--checkpoint", str(checkpoint)]
        where = ["--device", "cpu", "--work-dir", str(tmp_path / "run")]
        assert tool.main(["evaluate", NAME, *data, *where, *arguments]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]

    return measured


def test_the_metrics_equal_those_of_the_test_program(measured, write_config, checkpoint, tmp_path):
    figures = measured()
    config = write_config(tmp_path / "here.py")
    expected = runs.evaluate(test_program, config, checkpoint, "--work-dir", tmp_path / "other")
    assert figures["box_ap"]["measured"] == round(100 * expected["coco/bbox_mAP"], 2)
    assert figures["mask_ap"]["measured"] == round(100 * expected["coco/segm_mAP"], 2)
    assert [row["published"] for row in figures.values()] == [48.0, 43.1]
    assert not any(row["reproduced"] for row in figures.values())


def test_metrics_are_compared_with_the_published_ones_in_percent(measured, monkeypatch):
    # The untrained model of the other tests has an AP of 0, which is the same in any unit.
    metrics = {"coco/bbox_mAP": 0.481, "coco/segm_mAP": 0.42}
    monkeypatch.setattr(SafeRunner, "test", lambda runner: metrics)
    box = {"measured": 48.1, "published": 48.0, "difference": 0.1, "reproduced": True}
    mask = {"measured": 42.0, "published": 43.1, "difference": -1.1, "reproduced": False}
    assert measured() == {"box_ap": box, "mask_ap": mask}


def test_a_quick_evaluation_uses_only_its_images(measured, scenes, tmp_path):
    figures = measured("--limit", "2")
    assert [row["reproduced"] for row in figures.values()] == [None, None]
    [truth] = (tmp_path / "run").glob("limit_2_*.json")
    truth, whole = (
        json.loads(path.read_text())
        for path in (truth, scenes / "annotations" / "instances_val.json")
    )
    assert [image["id"] for image in truth["images"]] == [1, 3]  # of four
    assert truth["annotations"] == [a for a in whole["annotations"] if a["image_id"] in (1, 3)]
    assert truth["categories"] == whole["categories"]


def test_mmdet_loads_converted_checkpoints(config, checkpoint, scenes, tmp_path):
    converted = tmp_path / "converted.pth"
    assert tool.main(["convert", str(checkpoint), "-o", str(converted)]) == 0
    model = init_detector(str(config), str(converted), device="cpu")
    assert model.dataset_meta["classes"] == tuple("0123456789")
    weights = torch.load(checkpoint)["state_dict"]
    assert all(tensor.equal(weights[name]) for name, tensor in model.state_dict().items())
    found = inference_detector(model, str(scenes / "val" / "000001.jpg"))
    assert len(found.pred_instances) == 20


def test_missing_data_are_a_single_error(checkpoint, tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    data = ["--data", str(tmp_path / "empty"), "--checkpoint", str(checkpoint)]
    for limit in ([], ["--limit", "2"]):
        arguments = [*data, "--work-dir", str(tmp_path / "run"), *limit]
        assert tool.main(["evaluate", NAME, *arguments]) == 2
        assert "empty/annotations/instances_val.json" in caplog.records[-1].getMessage()
