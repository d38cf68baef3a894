"""Test the configs of a wheel, outside the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flash_internimage.cli.demo_data import write_digits_scenes
from flash_internimage.configs import list_configs

pytestmark = [pytest.mark.mm, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
BASE = "flash_internimage::detection/mask_rcnn_flash_internimage_nano_fpn_digits_scenes.py"
# mmdet's script reads a config before it imports anything, and mmengine evaluates `_base_`.
OWN_CONFIG = f"""
_base_ = __import__("flash_internimage.openmmlab") and "{BASE}"
loader = dict(dataset=dict(data_root="scenes"))
train_dataloader = dict(batch_size=2, **loader)
val_dataloader = loader
test_dataloader = loader
val_evaluator = dict(ann_file="scenes/annotations/instances_val.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1, val_interval=1)
"""
PROGRAM = """
import runpy, sys
from pathlib import Path

import mmdet

# mmdet's own script, which imports this package only because the config does
sys.argv = ["train.py", "own_config.py", "--work-dir", "run"]
tools = Path(mmdet.__file__).parent / ".mim" / "tools"
runpy.run_path(str(tools / "train.py"), run_name="__main__")

import flash_internimage
from flash_internimage.configs import find_config
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmseg.apis import MMSegInferencer

installed = Path(flash_internimage.__file__).parent
assert installed.is_relative_to(Path.cwd()), installed
assert find_config("flash_internimage_tiny_in1k_224").is_relative_to(installed)
for kind, scope, task, name in (
    (DetInferencer, "mmdet", "detection", "mask_rcnn_flash_internimage_t_fpn_1x_coco"),
    (MMSegInferencer, "mmseg", "segmentation", "upernet_flash_internimage_t_512_160k_ade20k"),
):
    inferencer = kind.__new__(kind)
    inferencer.scope = scope
    cfg, weights = inferencer._load_model_from_metafile(name)
    assert weights.endswith(f"/{name}.pth"), weights
    shipped = find_config(name)
    assert shipped.is_relative_to(installed / ".mim" / "configs"), shipped
    assert cfg.filename == str(shipped), cfg.filename
    Path("own.py").write_text(f"_base_ = 'flash_internimage::{task}/{name}.py'")
    assert Config.fromfile("own.py").model.backbone == cfg.model.backbone
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy of the sources."""
    source = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for folder in ("configs", "flash_internimage"):
        shutil.copytree(ROOT / folder, source / folder)
    program = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, source / "dist"],
        cwd=source,
        check=True,
        capture_output=True,
    )
    [wheel] = (source / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> Path:
    """Return a folder outside the repository in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "installed")
    write_digits_scenes(folder / "scenes", train=2, val=1)
    (folder / "own_config.py").write_text(OWN_CONFIG)
    return folder


def test_wheel_contains_all_configs_and_no_caches(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    configs = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.*")}
    wanted = {str(path) for path in configs if path.suffix in (".py", ".yaml", ".yml")}
    folder = "flash_internimage/.mim/"
    shipped = {name.removeprefix(folder) for name in names if name.startswith(folder)}
    assert shipped == wanted | {"model-index.yml"}
    assert len(shipped) > len(list_configs())
    assert not [name for name in names if "__pycache__" in name or "egg-info" in name]


def test_configs_are_found_outside_the_repository(elsewhere):
    environment = {**os.environ, "PYTHONPATH": str(elsewhere / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (elsewhere / "run" / "epoch_1.pth").is_file()
    assert "coco/bbox_mAP: " in done.stdout
