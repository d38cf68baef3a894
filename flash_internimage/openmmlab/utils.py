"""Helpers for OpenMMLab's loggers, models and datasets."""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper

log_debug = partial(print_log, logger="current", level=logging.DEBUG)
log_info = partial(print_log, logger="current", level=logging.INFO)
log_warning = partial(print_log, logger="current", level=logging.WARNING)


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
