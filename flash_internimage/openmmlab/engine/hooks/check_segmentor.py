"""A hook that checks the settings of a segmentor against each other and the data."""

import random
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmdet.models.dense_heads import MaskFormerHead
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric
from mmseg.models import SegDataPreProcessor
from mmseg.structures import SegDataSample
from torch import nn

from ...datasets.files import require_unique_names
from ...datasets.label_maps import IGNORED
from ...datasets.segmentation import CheckedSegDataset
from ...errors import describe
from ...utils import unwrap_dataset, unwrap_model
from .class_weights import check_mask_loss, check_weights


@HOOKS.register_module()
class CheckSegmentorHook(Hook):
    """Check settings before a run that would otherwise fail late or silently train incorrectly.

    The hook checks the classes of heads, losses and data, the ignore index and the padding of label
    maps (255 in the datasets of this package), the sizes of crops and windows, and the metrics. It
    tries the transforms on one image and, before training, the whole model on a black image.

    It replaces mmdet's NumClassCheckHook, which does not run at test time.

    Raises:
        ValueError: If settings do not match. The message names them.
    """

    def before_run(self, runner: Runner) -> None:
        """Check the model and all datasets that the run uses."""
        model = unwrap_model(runner.model)
        heads = {
            f"model.{name}": head
            for name, head in model.named_modules()
            if re.fullmatch(r"(decode|auxiliary)_head(\.\d+)?", name)
            and not isinstance(head, nn.ModuleList)
        }
        _check_windows(model.test_cfg)
        for name, head in heads.items():
            _check_losses(name, head)
        loops = {split: getattr(runner, f"_{split}_loop") for split in ("train", "val", "test")}
        # Loops that the run does not use are never built.
        loops = {split: loop for split, loop in loops.items() if hasattr(loop, "dataloader")}
        _check_classes({split: loop.dataloader.dataset for split, loop in loops.items()}, heads)
        for split, loop in loops.items():
            _check_data(split, loop, heads, model.data_preprocessor)
            image = _try_transforms(split, loop.dataloader.dataset)
            if split == "train":
                _check_batch(loop.dataloader, heads)
                _check_maps(model, heads, channels=len(image["inputs"]))
        if "train" in loops:
            _check_metrics(runner.hooks, loops.get("val"))


def _check_classes(datasets: dict[str, Any], heads: dict[str, Any]) -> None:
    names = {split: [*dataset.metainfo["classes"]] for split, dataset in datasets.items()}
    first = next(iter(names))
    for split in names:
        if names[split] != names[first]:
            raise ValueError(
                f"metainfo['classes'] of {split}_dataloader must equal those of {first}_dataloader"
                f", {names[first]!s:.500}, got {names[split]!s:.500}"
            )
    for name, head in heads.items():
        if head.num_classes != len(names[first]):
            raise ValueError(
                f"{name}.num_classes must be {len(names[first])}, the number of classes of the "
                f"data, got {head.num_classes}"
            )


def _check_data(split: str, loop: Any, heads: dict[str, Any], preprocessor: nn.Module) -> None:
    used = {**heads, "model.data_preprocessor": preprocessor}
    for metric in loop.evaluator.metrics if hasattr(loop, "evaluator") else ():
        used[f"{type(metric).__name__} of {split}_evaluator"] = metric
        if getattr(metric, "output_dir", None):
            require_unique_names(loop.dataloader.dataset, f"{split}_evaluator.output_dir")
    for dataset in unwrap_dataset(loop.dataloader.dataset):
        transforms = {
            type(transform).__name__: transform for transform in dataset.pipeline.transforms
        }
        used |= {f"{name} of {split}_dataloader": t for name, t in transforms.items()}
        if isinstance(dataset, CheckedSegDataset):
            for name, part in used.items():
                _check_ignored(name, part, len(dataset.metainfo["classes"]))
        if split == "train":
            _check_crops(transforms, preprocessor)
        elif isinstance(dataset, CheckedSegDataset) and not dataset.test_mode:
            raise ValueError(f"{split}_dataloader.dataset.test_mode must be True, got False")


def _check_windows(test_cfg: Mapping | None) -> None:
    test_cfg = test_cfg or {}
    mode = test_cfg.get("mode")
    if mode not in ("whole", "slide"):
        raise ValueError(f"model.test_cfg.mode must be 'whole' or 'slide', got {mode!r}")
    if mode == "whole":
        return
    for name in ("crop_size", "stride"):
        size = test_cfg.get(name)
        if not (
            isinstance(size, list | tuple)
            and len(size) == 2
            and all(type(side) is int and side > 0 for side in size)
        ):
            raise ValueError(
                f"model.test_cfg.{name} must be two positive integers, height and width, got {size}"
            )
    stride, crop = test_cfg["stride"], test_cfg["crop_size"]
    if stride[0] > crop[0] or stride[1] > crop[1]:
        raise ValueError(f"model.test_cfg.stride must be at most crop_size {crop}, got {stride}")


def _check_losses(name: str, head: Any) -> None:
    if hasattr(head, "loss_cls"):  # Mask2Former also weights "no object".
        weights = getattr(head.loss_cls, "class_weight", None)
        check_weights(f"{name}.loss_cls", weights, head.num_classes + 1)
        for part in ("loss_mask", "loss_dice"):
            check_mask_loss(f"{name}.{part}", getattr(head, part, nn.Module()))
        return
    losses = getattr(head, "loss_decode", ())
    for loss in losses if isinstance(losses, nn.ModuleList) else [losses]:
        sigmoid = getattr(loss, "use_sigmoid", getattr(loss, "loss_type", None) == "binary")
        if head.out_channels == 1 and not sigmoid:
            raise ValueError(
                f"{name}.loss_decode must have use_sigmoid=True for a single output channel, whose "
                "softmax is always 1; or set num_classes=2 and use a channel per class"
            )
        weights = getattr(loss, "class_weight", None)
        if weights is not None:
            # Binary cross-entropy would broadcast the weights along the width of the image.
            binary = sigmoid and type(loss).__name__ == "CrossEntropyLoss"
            check_weights(f"{name}.loss_decode", weights, 1 if binary else head.out_channels)


def _check_ignored(name: str, part: Any, classes: int) -> None:
    """Check the labels that a part of the model or of the pipeline ignores or pads with."""
    modules = part.named_modules() if isinstance(part, nn.Module) else [("", part)]
    for inner, module in modules:
        values = {"ignore_index": getattr(module, "ignore_index", None)}
        padding = getattr(module, "pad_val", None)  # an attribute of mmcv's Pad
        values["seg_pad_val"] = getattr(module, "seg_pad_val", None)
        values["pad_val['seg']"] = padding.get("seg") if isinstance(padding, dict) else None
        for key, value in values.items():
            if value in (None, IGNORED) or (key != "ignore_index" and value in range(classes)):
                continue
            raise ValueError(
                f"{'.'.join(filter(None, (name, inner, key)))} must be {IGNORED}, which the data "
                f"sets use for ignored pixels, got {value}; set ignore_index only in the datasets"
            )


def _check_crops(transforms: dict[str, Any], preprocessor: nn.Module) -> None:
    """Check that images smaller than the crop are padded, because batches need equal sizes."""
    if not isinstance(preprocessor, SegDataPreProcessor):
        return
    size, divisor = preprocessor.size, preprocessor.size_divisor
    pair = isinstance(size, list | tuple) and len(size) == 2
    if (size is None) == (divisor is None) or not (size is None or pair):
        raise ValueError(
            "model.data_preprocessor must have a size (height, width) or a size_divisor, got "
            f"{size} and {divisor}"
        )
    if size is None or "RandomCrop" not in transforms or "Pad" in transforms:
        return
    crop = transforms["RandomCrop"].crop_size
    if crop[0] > size[0] or crop[1] > size[1]:
        raise ValueError(
            f"model.data_preprocessor.size must be at least the crop_size of RandomCrop, {crop}, "
            f"got {size}: smaller images are padded to it"
        )


def _try_transforms(split: str, dataset: Any) -> dict:
    """Read one image like the run, without changing the state of random number generators."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            return dataset[0]
    except (OSError, ValueError):
        raise
    except Exception as error:  # Transforms raise all kinds of exceptions.
        reason = f"{type(error).__name__}: {describe(error)}"
        raise ValueError(f"{split}_dataloader.dataset.pipeline: {reason}") from error
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _check_batch(loader: Any, heads: dict[str, Any]) -> None:
    for name, head in heads.items():
        pooled = getattr(head, "psp_modules", nn.Module()).modules()
        norms = [module for module in pooled if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if get_world_size() > 1:
            norms = [norm for norm in norms if not isinstance(norm, nn.SyncBatchNorm)]
        if loader.batch_size == 1 and norms and 1 in head.psp_modules.pool_scales:
            raise ValueError(
                "train_dataloader.batch_size must be at least 2, got 1: batch norm cannot be "
                f"trained on the single pixel to which {name} pools an image"
            )


@torch.no_grad()
def _check_maps(model: Any, heads: dict[str, Any], channels: int) -> None:
    """Run the model on a black image to check that the heads match the backbone."""
    preprocessor = model.data_preprocessor
    image = torch.zeros(1, channels, *(getattr(preprocessor, "size", None) or (256, 256)))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    part, shapes, result = "model.backbone", "", None
    try:
        maps = model.extract_feat(image.to(preprocessor.device))
        shapes = f" on feature maps of {[each.shape[1] for each in maps]} channels"
        for name, head in heads.items():
            part = name
            if isinstance(head, MaskFormerHead):
                # A pixel decoder with fewer levels would silently ignore the last maps.
                levels = getattr(head.pixel_decoder, "num_input_levels", len(maps))
                assert levels == len(maps), f"pixel_decoder expects {levels} maps"
                head(maps, [SegDataSample()])
            elif re.search(r"decode_head\.[1-9]", name):  # of a CascadeEncoderDecoder
                result = head(maps, result)
            else:
                result = head(maps)
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"{part} failed{shapes}: {describe(error)}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_metrics(hooks: list[Hook], loop: Any) -> None:
    """Check the names of the metrics, and that `save_best` is one of them."""
    metrics = loop.evaluator.metrics if loop else ()
    known = set()
    for metric in metrics:
        if not isinstance(metric, IoUMetric) or metric.prefix:
            return
        names = [metric.metrics] if isinstance(metric.metrics, str) else metric.metrics
        if not names or not {*names} <= {"mIoU", "mDice", "mFscore"}:
            raise ValueError(
                f"val_evaluator.iou_metrics must be among mIoU, mDice and mFscore, got {names}"
            )
        areas = [torch.ones(1)] * 4
        figures = metric.total_area_to_metrics(*areas, metric.metrics)
        known |= {name if name == "aAcc" else f"m{name}" for name in figures}
    for hook in hooks:
        wanted = getattr(hook, "save_best", None)
        for name in [wanted] if isinstance(wanted, str) else wanted or ():
            if known and name not in {*known, "auto"}:
                raise ValueError(
                    f"default_hooks.checkpoint.save_best must be among {', '.join(sorted(known))}, "
                    f"got {name!r}"
                )
