"""Run the Python code of docs/inference.md as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from flash_internimage.checkpoints import Entry
from flash_internimage.configs import find_config
from flash_internimage.inference import predictor
from flash_internimage.openmmlab import model_index, safe_loading
from tests.nano import CLASSIFIER, DETECTOR, SEGMENTOR

PAGE = Path(__file__).parents[3] / "docs" / "inference.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
# The nano models that stand in for the released ones.
STAND_INS = {
    "mask_rcnn_flash_internimage_t_fpn_1x_coco": ("detection", DETECTOR),
    "upernet_flash_internimage_t_512_160k_ade20k": ("segmentation", SEGMENTOR),
}


@pytest.fixture
def run(weights, tmp_path, monkeypatch, one_thread, restore_scope):
    """Return a function that runs the block with a text, and returns its variables."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save("image.jpg")
    create = timm.create_model

    def create_model(name: str, pretrained: bool) -> object:
        assert pretrained
        assert name in timm.list_pretrained("flash_internimage*")
        return create(CLASSIFIER)

    zoo, entries, models = predictor.read_zoo(), {}, []
    for name, (task, stand_in) in STAND_INS.items():
        assert zoo[name].task == task
        path, config = weights[stand_in], f"configs/{task}/{stand_in}.py"
        values = vars(zoo[name]) | {"config": config, "addresses": [str(path)]}
        entries[name] = Entry(**values)
        models.append({"Name": name, "Config": str(find_config(stand_in)), "Weights": str(path)})
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(predictor, "read_zoo", lambda: entries)
    monkeypatch.setattr(model_index, "_models", lambda task: iter(models))

    def run(text: str) -> dict:
        [code] = [block for block in BLOCKS if text in block]
        namespace: dict = {}
        exec(code, namespace)
        return namespace

    yield run
    safe_loading._process.close()


def test_every_block_is_run():
    others = ("transform=transform", "loadRes")  # continues another block, reads results
    tested = ("top_k=3", "DetInferencer(", "MMSegInferencer(", "load_predictor(")
    for block in BLOCKS:
        assert sum(text in block for text in (*tested, *others)) == 1
    assert len(BLOCKS) == len(tested) + len(others)


def test_classification(run):
    found = run("top_k=3")
    assert len(found["result"].names) == 3
    [code] = [block for block in BLOCKS if "transform=transform" in block]
    exec(code, found)
    assert len(found["result"].names) == 5


@pytest.mark.slow
def test_detection(run):
    result = run("DetInferencer(")["result"]
    assert len(result["scores"]) == len(result["labels"]) == len(result["bboxes"]) > 0


def test_segmentation(run):
    label_map = run("MMSegInferencer(")["label_map"]
    assert label_map.shape == (40, 60)
    assert len(np.unique(label_map)) > 1


@pytest.mark.slow
def test_predictor(run):
    found = run("load_predictor(")
    assert found["predictor"].task == "detection"
    assert len(found["result"].scores) == 0  # random weights are not as sure as the threshold
