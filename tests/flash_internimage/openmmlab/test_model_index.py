"""Test the names of configs and models in mmengine."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.hub import get_config
from mmengine.infer import BaseInferencer
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from mmseg.apis import MMSegInferencer

import flash_internimage.openmmlab.detection
import flash_internimage.openmmlab.segmentation  # noqa: F401  both may be imported
from flash_internimage import registry
from flash_internimage.checkpoints import read_zoo
from flash_internimage.configs import find_config
from tests.recipes import plain

MASK_RCNN = "mask_rcnn_flash_internimage_t_fpn_1x_coco"
UPERNET = "upernet_flash_internimage_t_512_160k_ade20k"
DEMOS = [
    "detection/mask_rcnn_flash_internimage_nano_fpn_digits_scenes.py",
    "detection/dino-4scale_flash_internimage_nano_digits_scenes.py",
    "segmentation/upernet_flash_internimage_nano_digits_scenes.py",
    "segmentation/mask2former_flash_internimage_nano_digits_scenes.py",
]


def classes_of_modules(cfg: Config) -> dict[str, type]:
    with torch.device("meta"), DefaultScope.overwrite_default_scope(cfg.default_scope):
        return {name: type(module) for name, module in MODELS.build(cfg.model).named_modules()}


@pytest.fixture
def own_config(tmp_path):
    """Write a config outside the repository with the given base."""

    def write(base: str, settings: str = "") -> Path:
        path = tmp_path / "own.py"
        path.write_text(f"_base_ = {base}\n{settings}")
        return path

    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMOS)
def test_configs_and_models_of_a_shipped_base_equal_the_shipped_ones(name, own_config):
    own = Config.fromfile(own_config(f"'flash_internimage::{name}'"))
    shipped = Config.fromfile(find_config(name))
    assert plain(own.to_dict()) == plain(shipped.to_dict())
    assert classes_of_modules(own) == classes_of_modules(shipped)


@pytest.mark.slow
@pytest.mark.parametrize("name", [DEMOS[1], DEMOS[2]])
def test_variables_of_a_shipped_base_can_be_used(name, own_config):
    settings = (
        "pipeline = _base_.train_pipeline\n"
        "train_dataloader = dict(dataset=dict(pipeline=pipeline))\n"
        "model = dict(backbone=dict(**_base_.backbone))\n"
    )
    cfg = Config.fromfile(own_config(f"'flash_internimage::{name}'", settings))
    assert cfg.train_dataloader.dataset.pipeline[0]._scope_ == "flash_internimage"
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        steps = [type(TRANSFORMS.build(step)).__name__ for step in cfg.pipeline]
    assert steps == [step.type for step in cfg.pipeline]
    assert classes_of_modules(cfg) == classes_of_modules(Config.fromfile(find_config(name)))


def test_types_are_those_of_the_only_imported_library_without_a_scope_of_mmdet_or_mmseg(
    monkeypatch,
):
    with pytest.raises(RuntimeError, match=r"default_scope must be mmdet or mmseg .*, got \[\]"):
        registry._library()
    with DefaultScope.overwrite_default_scope("mmseg"):
        with DefaultScope.overwrite_default_scope("flash_internimage"):
            assert registry._library() == "mmseg"
    with DefaultScope.overwrite_default_scope("somebodys"):
        monkeypatch.delitem(sys.modules, "flash_internimage.openmmlab.segmentation")
        assert registry._library() == "mmdet"


def test_dotted_types_are_still_found():
    name = "flash_internimage.openmmlab.models.backbone.FlashInternImageBackbone"
    with DefaultScope.overwrite_default_scope("mmdet"):
        assert MODELS.get(name) is MODELS.get("flash_internimage.FlashInternImage")
        assert MODELS.get("flash_internimage.MaskRCNN") is MODELS.get("mmdet.MaskRCNN")
        assert MODELS.get("flash_internimage.Nothing") is None


def test_hub_finds_configs_and_weights():
    cfg = get_config(f"flash_internimage::detection/{MASK_RCNN}.py", pretrained=True)
    assert cfg.model_path == read_zoo()[MASK_RCNN].addresses[0]


@pytest.mark.parametrize(("library", "task"), [("mmdet", "detection"), ("mmseg", "segmentation")])
def test_our_models_follow_those_of_the_library(library, task):
    folder = BaseInferencer._get_repo_or_mim_dir(library)
    theirs = []
    for path in yaml.safe_load(Path(folder, "model-index.yml").read_text())["Import"]:
        theirs += [model["Name"] for model in load(str(Path(folder, path)))["Models"]]
    ours = [name for name, entry in read_zoo().items() if entry.task == task]
    listed = [model["Name"] for model in BaseInferencer._get_models_from_metafile(folder)]
    assert listed == theirs + ours
    assert len(set(ours)) > 5
    assert not set(ours) & set(theirs)


@pytest.mark.parametrize(
    ("inferencer", "name"), [(DetInferencer, MASK_RCNN), (MMSegInferencer, UPERNET)]
)
def test_inferencers_find_released_models_by_name(inferencer, name):
    inferencer = inferencer.__new__(inferencer)
    inferencer.scope = "mmdet" if name == MASK_RCNN else "mmseg"
    cfg, weights = inferencer._load_model_from_metafile(name)
    assert Path(cfg.filename).samefile(find_config(name))
    assert weights == read_zoo()[name].addresses[0]
