"""Classify images with a model of timm."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import Tensor, nn

from ..images import check_rgb
from ..predictions import Classification
from .sources import read_rgb


def classify(
    model: nn.Module | str,
    images: Sequence[str | os.PathLike | np.ndarray | Image.Image],
    top_k: int = 5,
    transform: Callable[[Image.Image], Tensor] | None = None,
) -> list[Classification]:
    """Return the most probable classes of images, by a model of timm.

    The class names are those in the model's pretrained config, as for models that were loaded from
    the Hugging Face Hub; otherwise those of ImageNet, by the number of classes; otherwise
    `class_0`, `class_1` and so on.

    Args:
        model: Model, or name of one, whose released weights are loaded.
        images: Paths, arrays (H, W, 3) of dtype uint8 in RGB, or images of Pillow.
        top_k: Number of classes per image, at most.
        transform: Preprocessing of an image of Pillow, which returns a tensor (3, H, W). By
            default, it is that of `timm.data.resolve_model_data_config`.

    Raises:
        UnreadableImage: If an image cannot be read.
        ValueError: If `images` is a single image, an array has another shape or dtype, or `top_k`
            is below 1.

    Example::

        model = timm.create_model("flash_internimage_tiny.in1k", pretrained=True)
        [result] = classify(model, ["image.jpg"])
        print(result.names, result.scores)
    """
    if isinstance(images, str | os.PathLike | np.ndarray | Image.Image):
        raise ValueError(f"images must be a list of images, got a {type(images).__name__}")
    if not images:
        return []
    if isinstance(model, str):
        model = timm.create_model(model, pretrained=True)
    if transform is None:
        data = timm.data.resolve_model_data_config(model)
        transform = create_transform(**data, is_training=False)
    inputs = torch.stack([transform(_open(image, i)) for i, image in enumerate(images)])
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits = model(inputs.to(parameter.device, parameter.dtype))
    finally:
        model.train(was_training)
    return most_probable(logits, class_names(model, logits.shape[1]), top_k)


def _open(image: str | os.PathLike | np.ndarray | Image.Image, index: int) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, np.ndarray):
        return Image.fromarray(read_rgb(image))
    check_rgb(image, f"images[{index}]")
    return Image.fromarray(image)


def class_names(model: nn.Module, num_classes: int) -> tuple[str, ...]:
    """Return the class names of a model of timm; see :func:`classify`."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("label_names")
    if names and len(names) == num_classes:
        names = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
        descriptions = cfg.get("label_descriptions") or {}
        return describe_synsets([str(descriptions.get(name, name)) for name in names])
    if subset := infer_imagenet_subset({"num_classes": num_classes}):
        return tuple(ImageNetInfo(subset).label_descriptions())
    return tuple(f"class_{i}" for i in range(num_classes))


def describe_synsets(names: Sequence[str]) -> tuple[str, ...]:
    """Replace the synsets of ImageNet, such as n01440764, by their descriptions."""
    info = ImageNetInfo("imagenet-22k") if any(_is_synset(name) for name in names) else None
    if info is None or not {*names} <= {*info.label_names()}:
        return tuple(names)
    return tuple(info.label_name_to_description(name) for name in names)


def _is_synset(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


def most_probable(logits: Tensor, names: Sequence[str], top_k: int) -> list[Classification]:
    """Return the most probable classes of each image.

    Args:
        logits: (N, classes).
        names: Names of the classes.
        top_k: Number of classes per image, at most.

    Raises:
        ValueError: If `top_k` is below 1 or a logit is not finite.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    logits = logits.float().cpu()
    if not logits.isfinite().all():
        raise ValueError("the logits must be finite, got NaN or infinity")
    scores, labels = logits.softmax(1).topk(min(top_k, logits.shape[1]))
    return [
        Classification(s.numpy(), i.numpy(), tuple(names[k] for k in i.tolist()))
        for s, i in zip(scores, labels, strict=True)
    ]
