from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mmengine.registry import DefaultScope

import flash_internimage.openmmlab  # noqa: F401  needed before mmdet.models can be imported
from flash_internimage.cli.demo_data import write_digits_scenes_ade20k

CONFIGS = Path(__file__).parents[2] / "configs" / "segmentation"
SMALL = {
    "upernet": """
head = dict(channels=16, dropout_ratio=0.0, loss_decode=dict(class_weight=None))
backbone = dict(
    _delete_=True, type="FlashInternImage", channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8)
)
model = dict(
    backbone=backbone,
    decode_head=dict(in_channels=[16, 32, 64, 128], **head),
    auxiliary_head=dict(in_channels=64, **head),
)
""",
    "mask2former": """
backbone = dict(
    _delete_=True, type="FlashInternImage", channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8)
)
model = dict(
    backbone=backbone,
    decode_head=dict(in_channels=[16, 32, 64, 128], train_cfg=dict(num_points=256)),
)
""",
}
RUN = """
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
train_dataloader = dict(batch_size=4, dataset=dict(data_root="{root}"))
val_dataloader = dict(dataset=dict(data_root="{root}"))
test_dataloader = val_dataloader
"""


@pytest.fixture(autouse=True)
def always_clean(one_thread, restore_scope):
    """Apply to all tests of this folder."""


@pytest.fixture
def mmseg_scope() -> Iterator[None]:
    """Build models and data in the scope that a runner sets."""
    with DefaultScope.overwrite_default_scope("mmseg"):
        yield


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Write twelve scenes for training and four for evaluation."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_digits_scenes_ade20k(root, train=12, val=4)
    return root


@pytest.fixture(scope="session")
def write_config(scenes) -> Callable[..., Path]:
    """Write the config of a demo with a small model and additional settings."""

    def write(path: Path, family: str = "upernet", settings: str = "", root=scenes) -> Path:
        small = path.with_name(f"small_{path.name}")
        demo = CONFIGS / f"{family}_flash_internimage_nano_digits_scenes.py"
        base = f"_base_ = {str(demo)!r}\n"
        small.write_text(base + SMALL[family] + RUN.replace("{root}", str(root)))
        path.write_text(f"_base_ = {small.name!r}\n{settings}")
        return path

    return write
