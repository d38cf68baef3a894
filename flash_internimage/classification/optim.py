"""Loss, optimizer and learning-rate schedule of the published classification recipes."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from .config import Config, ConfigError
from .errors import one_line

# Parameters of DCNv4, and those of DCNv3 in InternImage to which the published code applies its
# factor. That of the modulation of DCNv3 is not among them.
_PREDICTS_OFFSETS = re.compile(r"offset_mask|\bdcn\.(offset\.|center_feature_scale_proj)")


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    dcn_lr_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate and weight decay, in the order of the model.

    Unlike timm's groups, which contain a scale, these contain the learning rate itself, as the
    published warm-up and minimum learning rates are the same for all groups.

    Args:
        model: Model to train.
        lr: Base learning rate.
        weight_decay: Weight decay of parameters with at least two dimensions; others have none.
        layer_decay: Factor on the learning rate from each layer to the one before it, starting at
            the last. The layers are those of the model's `group_matcher`. None disables it.
        dcn_lr_multiplier: Factor on the learning rate of the parameters that predict DCNv4's
            offsets and modulation, or DCNv3's offsets, as published for InternImage.

    Returns:
        Groups with `params`, `names` of the parameters, `lr` and `weight_decay`.
    """
    layers = {}
    if layer_decay is not None:
        matcher = model.group_matcher(coarse=False)  # type: ignore[operator]
        layers = group_parameters(model, matcher, reverse=True)
    last = max(layers.values(), default=0)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_decay ** (last - layers[name]) if layer_decay is not None else 1.0
        if _PREDICTS_OFFSETS.search(name):
            scale *= dcn_lr_multiplier
        decay = weight_decay if parameter.ndim > 1 else 0.0
        key = (scale, decay)
        if key not in groups:
            groups[key] = {"params": [], "names": [], "lr": lr * scale, "weight_decay": decay}
        groups[key]["params"].append(parameter)
        groups[key]["names"].append(name)
    return list(groups.values())


def lr_scale(cfg: Config, world_size: int) -> float:
    """Return total batch size / `optimizer.lr_batch`, the factor on lr, warmup_lr and min_lr."""
    if cfg.optimizer.lr_batch is None:
        return 1.0
    return cfg.batch_size * cfg.accumulation_steps * world_size / cfg.optimizer.lr_batch


def build_optimizer(model: nn.Module, cfg: Config, world_size: int) -> Optimizer:
    """Build the timm optimizer of a configuration with the groups of :func:`parameter_groups`.

    Raises:
        ConfigError: If the optimizer is not installed or does not accept a setting, or
            `optimizer.layer_decay` or `optimizer.dcn_lr_multiplier` does not apply to the model.
    """
    options = cfg.optimizer
    if options.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ConfigError(
            f"optimizer.layer_decay must be null for {cfg.model.name}, which has no group_matcher, "
            f"got {options.layer_decay}"
        )
    multiplier = options.dcn_lr_multiplier
    if multiplier != 1 and not any(map(_PREDICTS_OFFSETS.search, dict(model.named_parameters()))):
        raise ConfigError(
            f"optimizer.dcn_lr_multiplier must be 1 for {cfg.model.name}, which has neither DCNv4 "
            f"nor DCNv3, got {multiplier}"
        )
    lr = options.lr * lr_scale(cfg, world_size)
    groups = parameter_groups(model, lr, options.weight_decay, options.layer_decay, multiplier)
    known = get_optimizer_info(options.name)
    extra: dict[str, Any] = {"betas": options.betas} if known.has_betas and options.betas else {}
    extra |= {"eps": options.eps} if known.has_eps and options.eps else {}
    try:
        # The groups contain learning rates, but lr is still needed: without it, Adafactor would
        # replace them, and corrected weight decay is relative to it.
        return create_optimizer_v2(
            groups, opt=options.name, lr=lr, weight_decay=options.weight_decay, **extra
        )
    except Exception as error:  # optimizers raise errors of any type
        raise ConfigError(
            f"optimizer.name={options.name} cannot be used: {one_line(error)}"
        ) from error


def build_scheduler(
    optimizer: Optimizer, cfg: Config, world_size: int, updates_per_epoch: int
) -> Scheduler:
    """Build the learning-rate schedule of a configuration.

    As in the published code, call `step_update(i)` after step i. The first two steps therefore
    share `warmup_lr`, and the decay runs from step 0 instead of the end of the warm-up.

    Args:
        optimizer: Optimizer with the groups of :func:`parameter_groups`.
        cfg: Configuration of the run.
        world_size: Number of processes.
        updates_per_epoch: Number of optimizer steps per epoch.
    """
    schedule, scale = cfg.schedule, lr_scale(cfg, world_size)
    common: dict[str, Any] = {
        "warmup_t": round(schedule.warmup_epochs * updates_per_epoch),
        "warmup_lr_init": schedule.warmup_lr * scale,
        "t_in_epochs": False,
    }
    total = schedule.epochs * updates_per_epoch
    if schedule.name == "step":
        decay_t = max(1, round(schedule.decay_epochs * updates_per_epoch))
        return StepLRScheduler(optimizer, decay_t, decay_rate=schedule.decay_rate, **common)
    common["lr_min"] = schedule.min_lr * scale
    if schedule.name == "cosine":
        return CosineLRScheduler(optimizer, total, **common)
    return PolyLRScheduler(optimizer, total, power=1.0, **common)


def build_criterion(cfg: Config, class_weights: Sequence[float] | None = None) -> nn.Module:
    """Build the cross-entropy loss for mixed labels, or with or without label smoothing.

    Args:
        cfg: Configuration of the run.
        class_weights: Weight of each class, as in :class:`torch.nn.CrossEntropyLoss`; None for
            equal weights.
    """
    smoothing = cfg.augmentation.label_smoothing
    if class_weights is not None:
        # Mixup and CutMix smooth the labels themselves.
        smoothing = 0.0 if cfg.augmentation.mixes else smoothing
        return nn.CrossEntropyLoss(torch.tensor(class_weights), label_smoothing=smoothing)
    if cfg.augmentation.mixes:
        return SoftTargetCrossEntropy()
    if smoothing > 0:
        return LabelSmoothingCrossEntropy(smoothing)
    return nn.CrossEntropyLoss()
