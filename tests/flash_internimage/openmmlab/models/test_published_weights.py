"""Test published weights in the inference functions of mmdet and mmseg."""

import importlib
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from PIL import Image

from flash_internimage.checkpoints import to_published_checkpoint

CONFIGS = Path(__file__).parents[4] / "configs"
DINO = "detection/dino-4scale_flash_internimage_nano_digits_scenes.py"
MASK_RCNN = "detection/mask_rcnn_flash_internimage_nano_fpn_digits_scenes.py"
MASK2FORMER = "segmentation/mask2former_flash_internimage_nano_digits_scenes.py"
UPERNET = "segmentation/upernet_flash_internimage_nano_digits_scenes.py"
CLASSES = tuple("0123456789")


def build(config: str) -> torch.nn.Module:
    cfg = Config.fromfile(CONFIGS / config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    for parameter in model.parameters():  # mmdet leaves some of them uninitialized
        torch.nn.init.normal_(parameter)
    return model


def by_init_detector(config: str, path: str) -> torch.nn.Module:
    return importlib.import_module("mmdet.apis").init_detector(config, path, "random", "cpu")


def by_det_inferencer(config: str, path: str) -> torch.nn.Module:
    apis = importlib.import_module("mmdet.apis")
    return apis.DetInferencer(config, path, "cpu", palette="random").model


def by_init_model(config: str, path: str) -> torch.nn.Module:
    return importlib.import_module("mmseg.apis").init_model(config, path, "cpu")


def by_seg_inferencer(config: str, path: str) -> torch.nn.Module:
    apis = importlib.import_module("mmseg.apis")
    return apis.MMSegInferencer(config, path, device="cpu").model


WAYS = [
    (DINO, by_init_detector),
    (DINO, by_det_inferencer),
    (MASK_RCNN, by_init_detector),
    (MASK2FORMER, by_init_model),
    (MASK2FORMER, by_seg_inferencer),
    (UPERNET, by_init_model),
]


@pytest.mark.parametrize(("config", "load"), WAYS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_inference_functions_load_published_files(config, load, prefix, tmp_path, log):
    model = build(config)
    checkpoint = {"state_dict": model.state_dict(), "meta": {}}
    published = to_published_checkpoint(checkpoint)["state_dict"]
    published = {prefix + name: tensor for name, tensor in published.items()}
    meta = {"CLASSES": CLASSES, "PALETTE": [[0, 0, 0]] * 11}
    torch.save({"state_dict": published, "meta": meta}, tmp_path / "published.pth")
    loaded = load(str(CONFIGS / config), str(tmp_path / "published.pth")).state_dict()
    torch.testing.assert_close(loaded, model.state_dict(), rtol=0, atol=0)
    assert "tensors" not in log.text


@pytest.mark.parametrize("config", [DINO, MASK2FORMER])
def test_load_state_dict_accepts_published_names(config):
    model, other = build(config), build(config)
    published = to_published_checkpoint({"state_dict": model.state_dict()})["state_dict"]
    other.load_state_dict(published, strict=True)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    other.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("config", [DINO, MASK2FORMER])
def test_tensors_that_do_not_fit_are_logged(config, tmp_path, log, capsys):
    model = build(config)
    state_dict = model.state_dict()
    part = "bbox_head.cls_branches.0" if config == DINO else "decode_head.cls_embed"
    state_dict[f"{part}.weight"] = torch.zeros(1)
    state_dict[f"{part}.other"] = torch.zeros(1)
    del state_dict[f"{part}.bias"], state_dict["backbone.patch_embed.conv1.bias"]
    torch.save({"state_dict": state_dict}, tmp_path / "other.pth")
    load_checkpoint(model, str(tmp_path / "other.pth"), "cpu", logger=logging.getLogger("other"))
    part = part if config == DINO else "cls_embed"
    for text in (
        f"1 are not in the checkpoint ({part}.bias)",
        f"1 have another shape in it ({part}.weight)",
        f"1 of the checkpoint are not used ({part}.other)",
        "1 are not in the checkpoint (patch_embed.conv1.bias)",
    ):
        assert text in log.text


def test_loading_a_classifier_into_a_detector_is_logged(tmp_path, log):
    model = build(MASK_RCNN)
    names = [f"levels.{i}.weight" for i in range(7)]
    torch.save({"state_dict": dict.fromkeys(names, torch.zeros(1))}, tmp_path / "classifier.pth")
    load_checkpoint(model, str(tmp_path / "classifier.pth"), "cpu", logger=logging.getLogger("x"))
    count = len(model.backbone.state_dict())
    assert f"FlashInternImageBackbone has {count} tensors; {count} are not in the" in log.text


@pytest.mark.parametrize(
    ("config", "library", "scores"),
    [
        (MASK_RCNN, "mmdet", lambda found: found.pred_instances.scores),
        (UPERNET, "mmseg", lambda found: found.seg_logits.data),
    ],
)
def test_inference_on_paths_and_arrays(config, library, scores, tmp_path, safe_loading):
    apis = importlib.import_module(f"{library}.apis")
    if library == "mmdet":
        model = apis.init_detector(str(CONFIGS / config), None, "random", "cpu")
        infer = apis.inference_detector
    else:
        model = apis.init_model(str(CONFIGS / config), None, "cpu")
        infer = apis.inference_model
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = str(tmp_path / "1.png")
    Image.fromarray(pixels[..., ::-1]).save(path)
    expected = scores(infer(model, path))
    assert len(expected) > 0
    for images in ([pixels, path], [path, pixels], path, Path(path)):  # arrays switch the loader
        found = infer(model, images)
        for each in found if isinstance(images, list) else [found]:
            torch.testing.assert_close(scores(each), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"^img must be a path or an array, .*, got Image$"):
        infer(model, Image.new("RGB", (64, 64)))
