"""Datasets, the classes of their images, and loaders with timm's transforms."""

from .classes import balanced_weights, class_names, class_to_index, match_classes
from .datasets import (
    SKIPPED,
    SkippingImageDataset,
    SkippingStream,
    TooManyCorruptImages,
    build_dataset,
    warn_of_shared_images,
)
from .loaders import (
    build_mixup,
    denormalize,
    eval_transform,
    set_epoch,
    share_unreadable,
    spread,
    start,
    train_loader,
    train_transform,
    val_loader,
)

__all__ = [
    "SKIPPED",
    "SkippingImageDataset",
    "SkippingStream",
    "TooManyCorruptImages",
    "balanced_weights",
    "build_dataset",
    "build_mixup",
    "class_names",
    "class_to_index",
    "denormalize",
    "eval_transform",
    "match_classes",
    "set_epoch",
    "share_unreadable",
    "spread",
    "start",
    "train_loader",
    "train_transform",
    "val_loader",
    "warn_of_shared_images",
]
