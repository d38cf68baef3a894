"""Checks of the class weights of losses, which PyTorch reports late or broadcasts silently."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from mmdet.models.losses import CrossEntropyLoss
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ...utils import unwrap_model


def check_weights(name: str, weights: Any, number: int, meaning: str = "") -> None:
    """Check the class weights of a loss.

    Args:
        name: Name of the loss in the config.
        weights: Its class weights.
        number: Expected number of weights.
        meaning: What the weights are for, in parentheses after their number.

    Raises:
        ValueError: If `weights` are not as many finite numbers of at least 0.
    """
    given = weights.tolist() if isinstance(weights, torch.Tensor) else weights
    values = [*given] if isinstance(given, Iterable) and not isinstance(given, str) else [None]
    valid = (isinstance(v, int | float) and math.isfinite(v) and v >= 0 for v in values)
    if len(values) != number or not all(valid):
        raise ValueError(
            f"{name}.class_weight must be {number} numbers of at least 0{meaning}, got {weights}"
        )


def check_mask_loss(name: str, loss: nn.Module) -> None:
    """Check that the loss of masks has no class weights, which would weigh columns of pixels.

    Raises:
        ValueError: If it has.
    """
    if (weights := getattr(loss, "class_weight", None)) is not None:
        raise ValueError(f"{name}.class_weight must be None for a loss of masks, got {weights}")


@HOOKS.register_module()
class CheckDetectorHook(Hook):
    """Check the class weights of a detector before a run.

    Raises:
        ValueError: If a loss has class weights of another number than its head has outputs. The
            message names it.
    """

    def before_run(self, runner: Runner) -> None:
        """Check the cross-entropy losses of all heads."""
        for name, head in unwrap_model(runner.model).named_modules():
            losses = {
                part: loss
                for part, loss in head.named_children()
                if isinstance(loss, CrossEntropyLoss) and loss.class_weight is not None
            }
            if "loss_mask" in losses:
                check_mask_loss(f"model.{name}.loss_mask", losses["loss_mask"])
            classes = getattr(head, "num_classes", None)
            if "loss_cls" in losses and isinstance(classes, int):
                # Heads of R-CNNs have no such attribute, and always an output for the background.
                outputs = getattr(head, "cls_out_channels", classes + 1)
                meaning = f" ({classes} classes{' and the background' * (outputs > classes)})"
                check_weights(
                    f"model.{name}.loss_cls", losses["loss_cls"].class_weight, outputs, meaning
                )
