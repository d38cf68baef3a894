"""Knowledge distillation from a trained classifier."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.task import DistillationTeacher, LogitDistillationTask
from torch import nn

from ..checkpoints import clean_state_dict, fetch_checkpoint, load_checkpoint, load_weights
from .config import Config, ConfigError, Data, Model
from .data.classes import describe_other_classes, names_of
from .errors import one_line
from .model import check_model, create_model, find_not_finite
from .processes import on_first

_logger = logging.getLogger(__name__)


class Teacher(NamedTuple):
    """A trained classifier.

    Attributes:
        model: The model, with its weights.
        names: Class names in the order of its outputs, if known.
        mean: Mean of its normalization.
        std: Standard deviation of its normalization.
    """

    model: nn.Module
    names: list[str] | None
    mean: Sequence[float]
    std: Sequence[float]


def build_distillation(
    student: nn.Module,
    criterion: nn.Module,
    cfg: Config,
    names: Sequence[str] | None,
    device: torch.device,
) -> LogitDistillationTask | None:
    """Build the loss of knowledge distillation, or return None if there is no teacher.

    The loss is `(1 - alpha) * criterion + alpha * T**2 * KL(teacher || student)` of the softmax of
    the logits divided by the temperature T (Hinton et al., 2015). The teacher gets the images of
    the student, after augmentation, in its own normalization.

    Args:
        student: Model to train, on `device`.
        criterion: Loss of the labels.
        cfg: Configuration of the run.
        names: Class names of the student in the order of its outputs, if known.
        device: Device of this process.

    Returns:
        timm's task. Called with images (N, 3, H, W) and labels, it returns a dict with the `loss`.

    Raises:
        ConfigError: If the teacher cannot be loaded, has other classes, or does not accept the
            images.
    """
    options = cfg.distillation
    if options.teacher is None:
        return None
    with torch.random.fork_rng(devices=[]):  # the weights are first initialized randomly
        teacher = _load(options.teacher, cfg.model.num_classes)
    _check_classes(teacher.names, names, cfg)
    model = teacher.model.to(device).requires_grad_(False).eval()
    for size in {cfg.data.image_size, *cfg.data.image_sizes}:
        check_model(
            model, size, cfg.model.num_classes, name=f"distillation.teacher={options.teacher}"
        )
    task = LogitDistillationTask(
        student,
        DistillationTeacher(model, device=device),
        criterion,
        task_loss_weight=1 - options.alpha,
        temperature=options.temperature,
        device=device,
        verbose=False,
    )
    for name, values in (
        ("student_mean", cfg.data.mean),
        ("student_std", cfg.data.std),
        ("teacher.mean_kd", teacher.mean),
        ("teacher.std_kd", teacher.std),
    ):
        task.get_buffer(name).copy_(torch.tensor(values).view(1, 3, 1, 1))
    return task


def _load(name: str, num_classes: int) -> Teacher:
    if not os.path.exists(name) and timm.is_model(name):
        return _released(name, num_classes)
    try:
        checkpoint = load_checkpoint(fetch_checkpoint(name))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "distillation.teacher must be a timm model or a checkpoint of classification.train, "
            f"got '{name}': {one_line(error)}"
        ) from error
    try:
        return _trained(checkpoint, num_classes)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ConfigError(
            f"distillation.teacher={name} cannot be used: {kind}{one_line(error)}"
        ) from error


def _released(name: str, num_classes: int) -> Teacher:
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    if cfg is None or not cfg.has_weights:
        raise ConfigError(
            f"distillation.teacher must have released weights, got '{name}'; pass a checkpoint of "
            "classification.train"
        )
    _check_number(cfg.num_classes, num_classes, f"distillation.teacher={name}")
    model = create_model(Model(name=name, num_classes=num_classes, drop_path_rate=0), True)
    subset = infer_imagenet_subset({"num_classes": num_classes})
    names = ImageNetInfo(subset).label_names() if subset else None
    return Teacher(model, names, cfg.mean, cfg.std)


def _trained(checkpoint: Mapping[str, Any], num_classes: int) -> Teacher:
    settings = checkpoint.get("config")
    if not isinstance(settings, Mapping):
        raise ConfigError("it must be a checkpoint of classification.train, but has no config")
    options = {key: settings["model"][key] for key in ("name", "num_classes", "args")}
    _check_number(options["num_classes"], num_classes, "it")
    model = create_model(Model(**options, drop_path_rate=0))
    load_weights(model, clean_state_dict(checkpoint))
    if broken := find_not_finite(model):
        raise ConfigError(f"{broken} is not finite")
    data = Data(mean=settings["data"]["mean"], std=settings["data"]["std"])
    return Teacher(model, names_of(checkpoint), data.mean, data.std)


def _check_number(number: int | None, expected: int, source: str) -> None:
    if number != expected:
        raise ConfigError(f"{source} must have the {expected} classes of the model, got {number}")


def _check_classes(teacher: list[str] | None, names: Sequence[str] | None, cfg: Config) -> None:
    """Compare the class names; released models only know those of ImageNet, by synset."""
    source = cfg.distillation.teacher
    is_released = source is not None and timm.is_model(source)
    if not teacher or not names or (is_released and not set(names) <= set(teacher)):
        _logger.log(
            on_first(logging.WARNING),
            "the class names of distillation.teacher=%s cannot be compared with those of the data: "
            "its outputs are used in the order of the classes",
            source,
        )
    elif difference := describe_other_classes(teacher, names):
        difference = difference.replace("the checkpoint", "the teacher")
        raise ConfigError(
            f"distillation.teacher={source} must have the classes of the data in their order, got "
            f"{difference}"
        )
