"""Test the zoo's evaluation command on a segmentor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.apis import inference_model, init_model
from mmseg.registry import MODELS
from PIL import Image

from flash_internimage.checkpoints import Entry
from flash_internimage.cli import zoo as tool
from flash_internimage.cli import zoo_evaluation

NAME = "upernet_small"


@pytest.fixture
def config(write_config, tmp_path, monkeypatch) -> Path:
    """Write the config of a zoo entry whose data are only given on the command line."""
    config = write_config(tmp_path / "small.py", root="nowhere")
    entry = Entry(
        task="segmentation",
        architecture="UPerNet",
        backbone="T",
        pretraining="ImageNet-1K",
        config=str(config),
        addresses=["https://example.org/never-asked.pth"],
        resolution=128,
        parameters=1,
        published={"miou": 50.0, "miou_several_scales": 60.0},
    )
    monkeypatch.setattr(tool, "read_zoo", lambda: {NAME: entry})
    monkeypatch.setitem(zoo_evaluation.IMAGES, "segmentation", 4)
    return config


@pytest.fixture
def checkpoint(config, tmp_path) -> Path:
    """Save a model that predicts only background, in the published format."""
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope("mmseg"):
        weights = MODELS.build(cfg.model).state_dict()
    weights["decode_head.conv_seg.weight"].zero_()
    weights["decode_head.conv_seg.bias"].zero_()[0] = 9.0
    contents = {"state_dict": weights, "meta": {"CLASSES": ("background", *"0147")}}
    torch.save(contents, tmp_path / "background.pth")
    return tmp_path / "background.pth"


def miou_of_background(root: Path, pictures: slice) -> float:
    """Return the mIoU in percent of predicting only background, from the label maps."""
    maps = sorted((root / "annotations" / "validation").glob("*.png"))[pictures]
    values = np.concatenate([np.asarray(Image.open(path)).ravel() for path in maps])
    values = values[values > 0]  # 0 is ignored, 1 the background
    return 100 * (values == 1).mean() / len(np.unique(values))


@pytest.mark.parametrize(
    ("arguments", "pictures", "figure", "published"),
    [
        ([], slice(None), "miou", 50.0),
        (["--limit", "2"], slice(0, None, 2), "miou", 50.0),
        (["--tta"], slice(None), "miou_several_scales", 60.0),
    ],
    ids=["whole", "limit", "multi-scale"],
)
def test_the_miou_is_measured(
    checkpoint, scenes, tmp_path, capsys, arguments, pictures, figure, published
):
    arguments = ["--device", "cpu", "--work-dir", str(tmp_path / "run"), *arguments]
    data = ["--data", str(scenes), "--checkpoint", str(checkpoint)]
    assert tool.main(["evaluate", NAME, *data, *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    [(name, row)] = result["figures"].items()
    assert (name, row["published"]) == (figure, published)
    assert row["measured"] == pytest.approx(miou_of_background(scenes, pictures), abs=0.01)
    assert row["difference"] == pytest.approx(row["measured"] - published)
    assert row["reproduced"] == (None if "--limit" in arguments else False)


def test_mmseg_loads_converted_checkpoints(config, checkpoint, scenes, tmp_path):
    converted = tmp_path / "converted.pth"
    assert tool.main(["convert", str(checkpoint), "-o", str(converted)]) == 0
    model = init_model(str(config), str(converted), device="cpu")
    assert model.dataset_meta["classes"] == ("background", *"0147")
    image = next((scenes / "images" / "validation").glob("*.jpg"))
    assert inference_model(model, str(image)).pred_sem_seg.data.eq(0).all()


def test_missing_data_are_a_single_error(checkpoint, tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    data = ["--data", str(tmp_path / "empty"), "--checkpoint", str(checkpoint)]
    for limit in ([], ["--limit", "2"]):
        arguments = [*data, "--work-dir", str(tmp_path / "run"), *limit]
        assert tool.main(["evaluate", NAME, *arguments]) == 2
        assert f"{tmp_path}/empty/images/validation" in caplog.records[-1].getMessage()
