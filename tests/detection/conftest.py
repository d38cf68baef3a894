from collections.abc import Callable
from pathlib import Path

import pytest

import flash_internimage.openmmlab  # noqa: F401  needed before mmdet.models can be imported
from flash_internimage.cli.demo_data import write_digits_scenes

CONFIGS = Path(__file__).parents[2] / "configs" / "detection"
DEMOS = {
    "mask_rcnn": "mask_rcnn_flash_internimage_nano_fpn_digits_scenes.py",
    "dino": "dino-4scale_flash_internimage_nano_digits_scenes.py",
}
BACKBONE = (
    "dict(_delete_=True, type='FlashInternImage', channels=16, depths=(1, 1, 1, 1), "
    "groups=(1, 2, 4, 8), drop_path_rate=0.1, out_indices={})"
)
SMALL = {
    "mask_rcnn": f"""
model = dict(
    backbone={BACKBONE.format((0, 1, 2, 3))},
    neck=dict(in_channels=[16, 32, 64, 128]),
    test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=20)),
)
""",
    "dino": f"""
model = dict(
    backbone={BACKBONE.format((1, 2, 3))},
    neck=dict(in_channels=[32, 64, 128]),
    num_queries=20,
    test_cfg=dict(max_per_img=20),
)
""",
}
RUN = """
train_cfg = dict(max_epochs=2, val_interval=1)
default_hooks = dict(logger=dict(interval=1))
loader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root="{root}"))
train_dataloader = dict(batch_size=4, **loader)
val_dataloader = loader
test_dataloader = loader
val_evaluator = dict(ann_file="{root}/annotations/instances_val.json")
test_evaluator = val_evaluator
"""


@pytest.fixture(autouse=True)
def always_clean(one_thread, restore_scope):
    """Apply to all tests of this folder."""


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Write twelve scenes for training, one of them without objects, and four for evaluation."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_digits_scenes(root, train=12, val=4)
    return root


@pytest.fixture(scope="session")
def write_config(scenes) -> Callable[..., Path]:
    """Write the config of a demo with a small model and additional settings."""

    def write(path: Path, family: str = "mask_rcnn", settings: str = "", root=scenes) -> Path:
        small = path.with_name(f"small_{path.name}")
        base = f"_base_ = {str(CONFIGS / DEMOS[family])!r}\n"
        small.write_text(base + SMALL[family] + RUN.replace("{root}", str(root)))
        path.write_text(f"_base_ = {small.name!r}\n{settings}")
        return path

    return write
