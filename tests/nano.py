"""Checkpoints of nano models with random weights, as the training programs write them."""

import copy
from pathlib import Path

import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from flash_internimage.configs import find_config

CLASSIFIER = "flash_internimage_nano"
DETECTOR = "mask_rcnn_flash_internimage_nano_fpn_digits_scenes"
SEGMENTOR = "upernet_flash_internimage_nano_digits_scenes"
DIGITS = tuple("0123456789")
# Unlike those of the configs, so that tests notice which ones are used.
LETTERS = {DETECTOR: tuple("abcdefghij"), SEGMENTOR: tuple("abcde")}


def write_classifier(path: Path, **contents: object) -> Path:
    """Write a checkpoint of `classification.train` for images of 32 pixels."""
    torch.manual_seed(0)
    model = timm.create_model(CLASSIFIER, num_classes=10)
    config = {
        "model": {"name": CLASSIFIER, "num_classes": 10, "args": {}},
        "data": {"image_size": 32, "crop_pct": 1.0, "root": "data/digits"},
    }
    contents = {"classes": list(DIGITS), "config": config, **contents}
    torch.save({"state_dict": model.state_dict(), **contents}, path)
    return path


def write_openmmlab_model(name: str, path: Path) -> Path:
    """Write a checkpoint of DETECTOR or SEGMENTOR."""
    cfg = Config.fromfile(find_config(name))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.manual_seed(0)
        model = MODELS.build(copy.deepcopy(cfg.model))
    if name == DETECTOR:  # mmdet leaves some parameters uninitialized
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    else:  # Otherwise, one class has the highest logits everywhere.
        torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=10)
    meta = {"dataset_meta": {"classes": LETTERS[name]}}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, path)
    return path
