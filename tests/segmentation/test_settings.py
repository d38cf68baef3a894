"""Test the checks of settings that do not match each other or the data."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import PixelData
from mmseg.registry import DATASETS, HOOKS, METRICS, MODELS
from mmseg.structures import SegDataSample

from flash_internimage.openmmlab.engine.hooks import check_segmentor

pytestmark = pytest.mark.usefixtures("mmseg_scope")

HEADS = "model = dict(decode_head=dict({0}), auxiliary_head=dict({0}))\n"
SIGMOID = 'dict(type="CrossEntropyLoss", use_sigmoid={}, class_weight={})'
REDUCED = 'metainfo=dict(classes=(*"0147", "background"))'

WRONG = [
    # settings, error message
    (
        "model = dict(decode_head=dict(num_classes=7))",
        r"model.decode_head.num_classes must be 5, .* got 7$",
    ),
    (
        "model = dict(auxiliary_head=dict(num_classes=6))",
        r"model.auxiliary_head.num_classes must be 5, .* got 6$",
    ),
    (
        f"val_dataloader = dict(dataset=dict({REDUCED}))",
        r"metainfo\['classes'\] of val_dataloader must equal those of train_dataloader",
    ),
    (
        HEADS.format(f"num_classes=5, out_channels=1, loss_decode={SIGMOID.format(False, None)}"),
        r"model.decode_head.loss_decode must have use_sigmoid=True for a single output channel",
    ),
    (
        "model = dict(decode_head=dict(loss_decode=dict(class_weight=[1.0] * 4)))",
        r"model.decode_head.loss_decode.class_weight must be 5 numbers of at least 0, got \[1.0, ",
    ),
    (
        "model = dict(auxiliary_head=dict(loss_decode=dict(class_weight=[-1.0] * 5)))",
        r"model.auxiliary_head.loss_decode.class_weight must be 5 numbers of at least 0, got \[-1",
    ),
    (
        HEADS.format(f"loss_decode={SIGMOID.format(True, [1.0] * 5)}"),
        r"model.decode_head.loss_decode.class_weight must be 1 numbers of at least 0",
    ),
    (
        HEADS.format(f"loss_decode=[{SIGMOID.format(False, [1.0] * 3)}]"),
        r"model.decode_head.loss_decode.class_weight must be 5 numbers of at least 0",
    ),
    (
        "model = dict(decode_head=dict(ignore_index=200))",
        r"model.decode_head.ignore_index must be 255, .* got 200; set ignore_index only in",
    ),
    (
        "model = dict(auxiliary_head=dict(ignore_index=0))",
        r"model.auxiliary_head.ignore_index must be 255",
    ),
    (
        'loss = dict(_delete_=True, type="DiceLoss", ignore_index=200)\n'
        "model = dict(decode_head=dict(loss_decode=loss))",
        r"model.decode_head.loss_decode.ignore_index must be 255",
    ),
    (
        "model = dict(data_preprocessor=dict(seg_pad_val=200))",
        r"model.data_preprocessor.seg_pad_val must be 255, .* got 200",
    ),
    (
        "val_evaluator = dict(ignore_index=200)",
        r"IoUMetric of val_evaluator.ignore_index must be 255",
    ),
    (
        "_base_.train_pipeline[3].ignore_index = 200\n"
        "train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))",
        r"RandomCrop of train_dataloader.ignore_index must be 255",
    ),
    (
        "_base_.train_pipeline[3].crop_size = (256, 256)\n"
        "train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))",
        r"model.data_preprocessor.size must be at least the crop_size of RandomCrop, \(256, 256\)",
    ),
    (
        'model = dict(test_cfg=dict(mode="slides"))',
        r"model.test_cfg.mode must be 'whole' or 'slide', got 'slides'",
    ),
    ("model = dict(test_cfg=None)", r"model.test_cfg.mode must be 'whole' or 'slide', got None"),
    (
        'model = dict(test_cfg=dict(mode="slide", crop_size=64, stride=(64, 64)))',
        r"model.test_cfg.crop_size must be two positive integers, height and width, got 64",
    ),
    (
        'model = dict(test_cfg=dict(mode="slide", crop_size=(64, 64)))',
        r"model.test_cfg.stride must be two positive integers, height and width, got None",
    ),
    (
        'model = dict(test_cfg=dict(mode="slide", crop_size=(64, 64), stride=(64, 65)))',
        r"model.test_cfg.stride must be at most crop_size \(64, 64\), got \(64, 65\)",
    ),
    (
        "train_dataloader = dict(batch_size=1)",
        r"train_dataloader.batch_size must be at least 2, got 1: .* model.decode_head pools an",
    ),
    (
        "model = dict(data_preprocessor=dict(size=128))",
        r"model.data_preprocessor must have a size \(height, width\) or a size_divisor, got 128",
    ),
    (
        "model = dict(decode_head=dict(in_channels=[16, 32, 64, 127]))",
        r"model.decode_head failed on feature maps of \[16, 32, 64, 128\] channels: .* 127 c",
    ),
    (
        "model = dict(auxiliary_head=dict(in_index=4))",
        r"model.auxiliary_head failed on feature maps of \[16, 32, 64, 128\] channels: tuple",
    ),
    (
        "val_dataloader = dict(dataset=dict(test_mode=False))",
        r"val_dataloader.dataset.test_mode must be True, got False",
    ),
    (
        "_base_.train_pipeline[2].scale = 0\n"
        "train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))",
        r"train_dataloader.dataset.pipeline: NotImplementedError: Do not support sampling function",
    ),
    (
        "val_evaluator = dict(iou_metrics=['mIoU', 'IoU'])",
        r"val_evaluator.iou_metrics must be among mIoU, mDice and mFscore, got \['mIoU', 'IoU'\]",
    ),
    (
        "default_hooks = dict(checkpoint=dict(save_best='mDice', rule='greater'))",
        r"default_hooks.checkpoint.save_best must be among aAcc, mAcc, mIoU, got 'mDice'",
    ),
]


# Serializing the data takes a second.
UNPACKED = {"CheckedSegDataset": {"serialize_data": False}, "ConcatDataset": {}}


@pytest.fixture
def check(write_config, tmp_path) -> Callable[..., None]:
    """Check a config as a run does before it starts."""

    def run(settings: str, family: str = "upernet", synchronized: bool = False) -> None:
        config = Config.fromfile(write_config(tmp_path / "config.py", family, settings))
        metrics = [METRICS.build(config.val_evaluator)]
        runner = SimpleNamespace(model=MODELS.build(config.model), _test_loop=config.test_cfg)
        if not synchronized:
            runner.model = revert_sync_batchnorm(runner.model)
        runner.hooks = [HOOKS.build(config.default_hooks.checkpoint)]
        for split in ("train", "val"):
            dataset = config[f"{split}_dataloader"].dataset
            loader = SimpleNamespace(
                dataset=DATASETS.build({**dataset, **UNPACKED[dataset.type]}),
                batch_size=config[f"{split}_dataloader"].batch_size,
            )
            loop = SimpleNamespace(dataloader=loader)
            if split == "val":
                loop.evaluator = SimpleNamespace(metrics=metrics)
            setattr(runner, f"_{split}_loop", loop)
        HOOKS.build(config.custom_hooks[0]).before_run(runner)

    return run


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[m[:60] for _, m in WRONG])
def test_settings_of_upernet(settings, message, check):
    with pytest.raises(ValueError, match=message):
        check(settings)


def test_a_list_of_auxiliary_heads(check):
    heads = (
        "first = dict(**_base_.model.auxiliary_head)\n"
        "second = dict(**_base_.model.auxiliary_head)\n"
        "second['num_classes'] = {}\n"
        "model = dict(auxiliary_head=[first, second])"
    )
    check(heads.format(5))
    with pytest.raises(ValueError, match=r"^model.auxiliary_head.1.num_classes must be 5, "):
        check(heads.format(6))


CASCADE = """
maps = dict(
    in_channels=[16, 32, 64, 128], in_index=[0, 1, 2, 3], input_transform="resize_concat",
    channels=16, align_corners=False, loss_decode=dict(type="CrossEntropyLoss"))
first = dict(type="FCNHead", num_convs=1, num_classes=5, **maps)
second = dict(type="OCRHead", ocr_channels=8, num_classes={}, **maps)
model = dict(
    type="CascadeEncoderDecoder", num_stages=2, decode_head=[first, second], auxiliary_head=None)
"""


def test_heads_in_a_cascade(check):
    check(CASCADE.format(5))
    with pytest.raises(ValueError, match=r"^model.decode_head.1.num_classes must be 5, .* got 7"):
        check(CASCADE.format(7))


def test_levels_of_mask2former(check):
    settings = (
        "model = dict(decode_head=dict(in_channels=[16, 32, 64], strides=[4, 8, 16],"
        " num_transformer_feat_level=2, pixel_decoder=dict(num_outs=2, encoder=dict(layer_cfg=dict("
        "self_attn_cfg=dict(num_levels=2))))))"
    )
    message = r"model.decode_head failed on feature maps of \[16, 32, 64, 128\] .* expects 3 maps$"
    with pytest.raises(ValueError, match=message):
        check(settings, "mask2former")


@pytest.mark.parametrize("weights", ["[1.0] * 5", "None", "[1.0] * 7", "1.0"])
def test_class_weights_of_mask2former(weights, check):
    message = r"model.decode_head.loss_cls.class_weight must be 6 numbers of at least 0, got "
    with pytest.raises(ValueError, match=message):
        check(
            f"model = dict(decode_head=dict(loss_cls=dict(class_weight={weights})))", "mask2former"
        )


def test_masks_of_mask2former_have_no_class_weights(check):
    message = r"model.decode_head.loss_mask.class_weight must be None for a loss of masks, got \[1"
    with pytest.raises(ValueError, match=message):
        check("model = dict(decode_head=dict(loss_mask=dict(class_weight=[1.0])))", "mask2former")


RIGHT = {
    "as it is": "",
    "windows": 'model = dict(test_cfg=dict(mode="slide", crop_size=(64, 96), stride=(64, 48)))',
    "two losses": HEADS.format(
        'loss_decode=[dict(type="LovaszLoss", reduction="none"), dict(type="DiceLoss")]'
    ),
    "sigmoid": HEADS.format(f"loss_decode={SIGMOID.format(True, None)}"),
    "padding of class 0": "model = dict(data_preprocessor=dict(seg_pad_val=0))",
    "another metric": "val_evaluator = dict(iou_metrics='mFscore')\n"
    "default_hooks = dict(checkpoint=dict(save_best='mPrecision', rule='greater'))",
    "concatenated": "first = _base_.train_dataloader.dataset\n"
    'train_dataloader = dict(dataset=dict(_delete_=True, type="ConcatDataset", '
    'datasets=[first, dict(type="RepeatDataset", dataset=first, times=2)]))',
}


@pytest.mark.parametrize("settings", RIGHT.values(), ids=RIGHT)
def test_valid_settings_pass_without_drawing_random_numbers(settings, check):
    before = np.random.get_state()[1].copy()
    check(settings)

    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(
    ("processes", "synchronized", "accepted"),
    [(2, True, True), (1, True, False), (2, False, False)],
)
def test_synchronized_batch_norm_needs_one_image_in_each_of_two_processes(
    processes, synchronized, accepted, check, monkeypatch
):
    monkeypatch.setattr(check_segmentor, "get_world_size", lambda: processes)
    refused = pytest.raises(ValueError, match=r"batch_size must be at least 2, got 1")
    with nullcontext() if accepted else refused:
        check("train_dataloader = dict(batch_size=1)", synchronized=synchronized)


def test_wrapped_data_sets_are_checked(check):
    with pytest.raises(ValueError, match=r"model.decode_head.ignore_index must be 255"):
        check(RIGHT["concatenated"] + "\nmodel = dict(decode_head=dict(ignore_index=0))")


@pytest.mark.parametrize("family", ["upernet", "mask2former"])
def test_labels_that_are_not_classes(family, write_config, tmp_path):
    config = Config.fromfile(write_config(tmp_path / "config.py", family, ""))
    model = revert_sync_batchnorm(MODELS.build(config.model)).train()
    labels = torch.arange(7).repeat(64, 10)[:, :64].contiguous()
    labels[labels == 5] = 255
    message = r"must contain classes from 0 to 4, or 255 .*, got \[-1, 6\]; "
    for right in (False, True):
        labels[labels == 6] = 4 if right else 6
        labels[0, 0] = 0 if right else -1
        metainfo = {"img_shape": (64, 64), "ori_shape": (64, 64), "batch_input_shape": (64, 64)}
        sample = SegDataSample(metainfo=metainfo, gt_sem_seg=PixelData(data=labels[None]))
        inputs = torch.zeros(2, 3, 64, 64)
        if right:
            assert all(loss.isfinite() for loss in model.loss(inputs, [sample] * 2).values())
        else:
            with pytest.raises(ValueError, match=message):
                model.loss(inputs, [sample] * 2)
