"""Helpers for OpenMMLab's loggers, models and datasets."""

import copy
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

log_debug = partial(print_log, logger="current", level=logging.DEBUG)
log_info = partial(print_log, logger="current", level=logging.INFO)
log_warning = partial(print_log, logger="current", level=logging.WARNING)


def build_without_memory(cfg: Config) -> nn.Module:
    """Build the model of a config on the meta device, in the scope of the config."""
    with torch.device("meta"), DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(copy.deepcopy(cfg.model))  # Building modifies the config.


def unwrap_model(model: Any) -> Any:
    """Return the model inside wrappers for distributed training and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def unwrap_dataset(dataset: Any) -> Iterator[Any]:
    """Yield the datasets inside wrappers such as ConcatDataset."""
    if hasattr(dataset, "datasets"):
        for part in dataset.datasets:
            yield from unwrap_dataset(part)
    elif hasattr(dataset, "dataset"):
        yield from unwrap_dataset(dataset.dataset)
    else:
        yield dataset
