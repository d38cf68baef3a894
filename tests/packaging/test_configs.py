"""Test the configs of a wheel, outside the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mmcv
import pytest

from flash_internimage.cli.demo_data import write_digits_scenes
from flash_internimage.configs import list_configs

pytestmark = [pytest.mark.mm, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
BASE = "flash_internimage::detection/mask_rcnn_flash_internimage_nano_fpn_digits_scenes.py"
OWN_CONFIG = f"""
_base_ = "{BASE}"
loader = dict(dataset=dict(data_root="scenes"))
train_dataloader = dict(batch_size=2, **loader)
val_dataloader = loader
test_dataloader = loader
val_evaluator = dict(ann_file="scenes/annotations/instances_val.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1, val_interval=1)
"""
PROGRAM = """
import os, runpy, site, sys
from pathlib import Path

del os.environ["FLASH_INTERNIMAGE_STARTUP"]
site.addsitedir("installed")  # as when Python starts
assert not any(name in sys.modules for name in ("flash_internimage", "mmengine", "torch"))

# MMDetection imports the first for language models, mmengine formats configs with the second;
# together they take half of the time.
sys.modules["transformers"] = None
import yapf.yapflib.yapf_api
yapf.yapflib.yapf_api.FormatCode = lambda text, **_: (text, True)

import mmdet.apis, mmdet.models  # needs mmcv's operators
from mmengine.config.utils import MODULE2PACKAGE

assert MODULE2PACKAGE["flash_internimage"] == "flash_internimage"
assert "flash_internimage.openmmlab" not in sys.modules

# mmdet's own scripts, which import this package only because the config's base does
tools = Path(mmdet.__file__).parent / ".mim" / "tools"
for script, arguments in (("train.py", []), ("test.py", ["run/epoch_1.pth"])):
    sys.argv = [script, "own_config.py", *arguments, "--work-dir", "run"]
    runpy.run_path(str(tools / script), run_name="__main__")

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
    """Return a folder outside the repository with the wheel, and mmcv without operators."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "installed")
    (folder / "installed" / "mmcv").mkdir()
    for path in Path(mmcv.__file__).parent.iterdir():
        if not path.name.startswith("_ext"):
            (folder / "installed" / "mmcv" / path.name).symlink_to(path)
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
    # The hook is that of the wheel, not that of this environment.
    environment = {"PYTHONPATH": str(elsewhere / "installed"), "FLASH_INTERNIMAGE_STARTUP": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=elsewhere,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (elsewhere / "run" / "epoch_1.pth").is_file()
    assert "Epoch(val) [1][1/1]    coco/bbox_mAP: " in done.stdout
    assert "Epoch(test) [1/1]    coco/bbox_mAP: " in done.stdout
