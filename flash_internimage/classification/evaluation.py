"""Evaluate models and checkpoints, or measure throughput."""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data.loader import PrefetchLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..checkpoints import clean_state_dict, fetch_checkpoint, load_checkpoint, load_weights
from .config import Config, ConfigError, Data, Model, load_config
from .data import SKIPPED, build_dataset, share_unreadable, start, val_loader
from .data.classes import names_of, set_labels
from .model import build_model, check_model, create_model, find_not_finite, pick_device
from .precision import autocast, resolve_amp
from .processes import fail_together, join_processes, on_first, raise_once, rank, world_size

_logger = logging.getLogger(__name__)

# Settings that affect the output of a model and should match those of its training.
_MODEL_SETTINGS = {
    "data": ("image_size", "crop_pct", "interpolation", "mean", "std"),
    "model": ("name", "args"),
}

# Settings that can be overridden; the others are arguments or have no effect.
_OVERRIDES = (
    "data.kind", "data.max_corrupt", "model.num_classes",
    *(f"{section}.{key}" for section, keys in _MODEL_SETTINGS.items() for key in keys),
)  # fmt: skip


@dataclass
class Result:
    """Results of an evaluation.

    Attributes:
        top1: Top-1 accuracy in percent of `images`.
        top5: Top-5 accuracy in percent of `images`.
        loss: Mean cross-entropy.
        images: Number of images that were read.
        corrupt: Number of images that could not be read.
        nonfinite: Number of `images` with a logit that is not finite, which count as wrong.
        images_per_second: Throughput including data loading.
    """

    top1: float
    top5: float
    loss: float
    images: int
    corrupt: int
    nonfinite: int
    images_per_second: float


# Receives the images (N, 3, H, W) and labels (N,) of each batch, and the logits (M, classes) of the
# M readable images. The labels of the others are `SKIPPED`.
Observer = Callable[[Tensor, Tensor, Tensor], None]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader | PrefetchLoader,
    device: torch.device,
    amp: str = "off",
    observe: Observer | None = None,
) -> Result:
    """Evaluate a model on a dataset, together with all other processes.

    Args:
        model: Classifier on `device`; its training mode is preserved.
        loader: Loader of this process's share of the images, from :func:`~.data.val_loader`.
        device: Device of this process.
        amp: Mixed-precision mode: 'off', 'bf16' or 'fp16'.
        observe: Receives every batch of this process, in the order of the loader.

    Returns:
        Results over the images of all processes.

    Raises:
        ValueError: If no image can be read, or a label is not a class of the model.
        TooManyCorruptImages: If more images than `data.max_corrupt` cannot be read.
    """
    was_training = model.training
    model.eval()
    began = time.perf_counter()
    with fail_together(device):
        totals = _totals(model, loader, device, amp, observe)
    seconds = time.perf_counter() - began  # of the slowest process
    model.train(was_training)
    share_unreadable(loader)
    if dist.is_initialized():
        totals = totals.to(device)
        dist.all_reduce(totals)
    loss, top1, top5, images, corrupt, nonfinite = totals.tolist()
    if not images:
        raise_once(ValueError("no image of the split could be read"))
    if nonfinite:
        _logger.log(
            on_first(logging.WARNING),
            "%d of %d images have non-finite logits and count as wrong", nonfinite, images,
        )  # fmt: skip
    return Result(
        top1=100 * top1 / images,
        top5=100 * top5 / images,
        loss=loss / images,
        images=int(images),
        corrupt=int(corrupt),
        nonfinite=int(nonfinite),
        images_per_second=(images + corrupt) / seconds,
    )


def _totals(
    model: nn.Module,
    loader: DataLoader | PrefetchLoader,
    device: torch.device,
    amp: str,
    observe: Observer | None,
) -> Tensor:
    """Sum the results over the images of this process.

    Returns:
        float64 tensor (6,) of the loss and the numbers of top-1 hits, top-5 hits, images,
        unreadable images and images without finite logits.
    """
    totals = torch.zeros(6, dtype=torch.float64)
    bar = tqdm(
        start(loader),
        desc="validate",
        total=len(loader) or None,
        leave=False,
        disable=None if rank() == 0 else True,
    )
    for images, targets in bar:
        images, targets = images.to(device), targets.to(device)
        readable = targets != SKIPPED
        with autocast(device, amp):
            logits = model(images)[readable].float()
        if observe is not None:
            observe(images, targets, logits)
        targets = targets[readable]
        wrong = (targets < 0) | (targets >= logits.shape[1])
        if wrong.any():
            raise ValueError(
                f"labels must be from 0 to {logits.shape[1] - 1}, the classes of the model, got "
                f"{int(targets[wrong][0])}"
            )
        finite = torch.isfinite(logits).all(1)
        ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        ranked &= finite[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums = [loss, ranked[:, 0].sum(), ranked.sum(), readable.sum()]
        sums += [(~readable).sum(), (~finite).sum()]
        totals += torch.stack(sums).to("cpu", torch.float64)
    return totals


class Evaluation(NamedTuple):
    """What :func:`prepare_evaluation` has prepared.

    Attributes:
        name: Name of the timm model.
        model: The model with its weights.
        settings: Settings of the data.
        loader: Loader of this process's share of the images.
        names: Class names of the model, in the order of its outputs.
        device: Device of this process.
        amp: Mixed-precision mode: 'off', 'bf16' or 'fp16'.
    """

    name: str
    model: nn.Module
    settings: Data
    loader: DataLoader | PrefetchLoader
    names: list[str]
    device: torch.device
    amp: str


def evaluate_checkpoint(
    model: str | os.PathLike,
    overrides: Sequence[str] = (),
    *,
    checkpoint: str | os.PathLike | None = None,
    weights: str = "ema",
    data: str | os.PathLike | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: str | torch.device = "auto",
    amp: str = "off",
) -> dict[str, Any]:
    """Evaluate a checkpoint on a dataset; every process of torchrun must call this.

    Args:
        model: Name of a timm model, or path of a training configuration (`*.yaml`).
        overrides: `key=value` overrides of a configuration, such as `data.crop_pct=0.9`.
        checkpoint: Path or URL of the checkpoint; None for the released weights of the model.
        weights: 'ema' or 'model', for checkpoints that contain both.
        data: Root of the dataset; None for that of the configuration.
        split: Split of the dataset; None for the validation split of the configuration.
        limit: Maximum number of images, evenly spaced; None for all.
        batch_size: Images per batch and process.
        workers: Data loader workers per process.
        device: Device to use; 'auto' selects the accelerator if there is one.
        amp: Mixed-precision mode: 'auto', 'off', 'bf16' or 'fp16'.

    Returns:
        `model`, `checkpoint`, `data`, `image_size`, and the fields of :class:`Result` except
        `nonfinite`.

    Raises:
        ValueError: If an argument, model or dataset cannot be used, or a result is not finite.
        OSError: If a file cannot be read.
        TooManyCorruptImages: If more images than `data.max_corrupt` cannot be read.
        EndedByAnother: If one of the above was raised on another process.

    Example:
        >>> evaluate_checkpoint(
        ...     "configs/classification/flash_internimage_nano_digits.yaml",
        ...     checkpoint="output/digits/best.pth",
        ... )["top1"]
        98.3333
    """
    prepared = prepare_evaluation(
        model,
        overrides,
        checkpoint=checkpoint,
        weights=weights,
        data=data,
        split=split,
        limit=limit,
        batch_size=batch_size,
        workers=workers,
        device=device,
        amp=amp,
    )
    return run_evaluation(prepared, checkpoint)


def prepare_evaluation(
    model: str | os.PathLike,
    overrides: Sequence[str] = (),
    *,
    checkpoint: str | os.PathLike | None = None,
    weights: str = "ema",
    data: str | os.PathLike | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: str | torch.device = "auto",
    amp: str = "off",
) -> Evaluation:
    """Load the model and data of an evaluation; see :func:`evaluate_checkpoint`."""
    device = join_processes(pick_device(str(device)))
    with fail_together(device):
        if weights not in ("ema", "model"):
            raise ConfigError(f"weights must be 'ema' or 'model', got {weights!r}")
        if split == "":  # timm would select all splits together
            raise ConfigError("split must not be empty, got ''")
        amp = resolve_amp(amp, device)
        cfg = _load_settings(model, overrides)
        updates = {"root": data and str(data), "val_split": split, "workers": workers}
        settings = cfg.data.model_copy(update={k: v for k, v in updates.items() if v is not None})
        dataset = build_dataset(settings, settings.val_split, False, batch_size)
        source = cfg.model.name if checkpoint is None else str(checkpoint)
        net, contents = _load_model(cfg.model, checkpoint, weights)
        warn_about_changes(cfg, contents)
        net = net.to(device)
        if name := find_not_finite(net):
            raise ValueError(f"{name} of {source} is not finite")
        names = set_labels(dataset, names_of(contents), source, cfg.model.num_classes)
        check_model(net, settings.image_size, cfg.model.num_classes)
        loader = val_loader(dataset, settings, batch_size, device, rank(), world_size(), limit)
    return Evaluation(cfg.model.name, net, settings, loader, names, device, amp)


def run_evaluation(
    prepared: Evaluation,
    checkpoint: str | os.PathLike | None = None,
    observe: Observer | None = None,
) -> dict[str, Any]:
    """Run a prepared evaluation; every process of torchrun must call this.

    Args:
        prepared: Result of :func:`prepare_evaluation`.
        checkpoint: Path or URL of the checkpoint; None for the released weights of the model.
        observe: Receives every batch of this process, in the order of the loader.

    Returns:
        See :func:`evaluate_checkpoint`.

    Raises:
        ValueError: If a result is not finite, or no image can be read.
        TooManyCorruptImages: If more images than `data.max_corrupt` cannot be read.
        EndedByAnother: If one of the above was raised on another process.
    """
    amp = prepared.amp
    result = evaluate(prepared.model, prepared.loader, prepared.device, amp, observe)
    if result.nonfinite or not math.isfinite(result.loss):
        raise_once(
            ValueError(
                f"logits and loss must be finite, got non-finite logits for {result.nonfinite} of "
                f"{result.images} images and loss {result.loss} (amp={amp})"
            )
        )
    figures = asdict(result)
    del figures["nonfinite"]
    return {
        "model": prepared.name,
        "checkpoint": "released" if checkpoint is None else str(checkpoint),
        "data": prepared.settings.root,
        "image_size": prepared.settings.image_size,
        **{key: round(value, 4) for key, value in figures.items()},
        "images_per_second": float(f"{result.images_per_second:.4g}"),
    }


def _load_settings(model: str | os.PathLike, overrides: Sequence[str]) -> Config:
    """Return the configuration of a YAML file, or of a timm model with its data settings."""
    name = os.fspath(model)
    for override in overrides:
        key = override.partition("=")[0]
        if key not in _OVERRIDES and not key.startswith("model.args."):
            raise ConfigError(f"key=value must set one of {', '.join(_OVERRIDES)}, got {override}")
    if name.endswith((".yaml", ".yml")):
        return load_config(name, list(overrides))
    if overrides:
        raise ConfigError(
            f"key=value must be used with a CONFIG.yaml, got {overrides[0]} with model '{name}'"
        )
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None:
        raise ConfigError(f"model must be a timm model or a .yaml file, got '{name}'")
    if not cfg.num_classes:
        raise ConfigError(f"model must be a classifier, got '{name}'")
    return Config(
        model=Model(name=name, num_classes=cfg.num_classes, drop_path_rate=0),
        data=Data(
            image_size=cfg.input_size[-1],
            crop_pct=cfg.crop_pct,
            interpolation=cfg.interpolation,
            mean=cfg.mean,
            std=cfg.std,
        ),
    )


def _load_model(
    options: Model, checkpoint: str | os.PathLike | None, weights: str
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return a model with its weights, and the contents of the checkpoint."""
    options = options.without_initial().model_copy(update={"grad_checkpointing": False})
    if checkpoint is None:
        released = timm.get_pretrained_cfg(options.name, allow_unregistered=False)
        if released is None or not released.has_weights:
            raise ConfigError(f"{options.name} has no released weights: pass a checkpoint")
        return create_model(options, pretrained=True), {}
    model = build_model(options)
    contents = load_checkpoint(fetch_checkpoint(checkpoint))
    state_dict = clean_state_dict(contents, use_ema=weights == "ema")
    head = state_dict.get("head.weight")
    if head is not None and head.shape[0] != options.num_classes:
        raise ConfigError(
            f"the checkpoint must have the model's {options.num_classes} classes, got "
            f"{head.shape[0]} in {checkpoint}; to evaluate a run of your own, pass its config.yaml "
            "instead of a model name"
        )
    load_weights(model, state_dict)
    return model, contents


def warn_about_changes(cfg: Config, checkpoint: Mapping[str, Any]) -> None:
    """Warn about settings that affect the results and differ from those of the training."""
    trained = checkpoint.get("config")
    differences = []
    for section, keys in _MODEL_SETTINGS.items():
        before = trained.get(section) if isinstance(trained, dict) else None
        if not isinstance(before, dict):
            continue
        now = getattr(cfg, section).model_dump(mode="json")
        differences += [
            f"{section}.{key} is {now[key]}, was {before[key]} in training"
            for key in keys
            if before.get(key, now[key]) != now[key]
        ]
    if differences:
        _logger.log(
            on_first(logging.WARNING),
            "settings differ from those of the training: %s; its output folder contains the "
            "original config.yaml",
            ", ".join(differences),
        )


def measure_throughput(
    model: str | os.PathLike,
    overrides: Sequence[str] = (),
    *,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    amp: str = "off",
) -> dict[str, Any]:
    """Measure the throughput of a model with random weights on random images.

    It is the median of repeated runs after a warm-up.

    Args:
        model: Name of a timm model, or path of a training configuration (`*.yaml`).
        overrides: `key=value` overrides of a configuration.
        batch_size: Images per batch.
        device: Device to measure; 'auto' selects the accelerator if there is one.
        amp: Mixed-precision mode: 'auto', 'off', 'bf16' or 'fp16'.

    Returns:
        `model`, `image_size`, `batch_size`, `device`, `threads`, `amp` and `images_per_second`.

    Raises:
        ConfigError: If an argument cannot be used.
    """
    device = pick_device(str(device))
    amp = resolve_amp(amp, device)
    cfg = _load_settings(model, overrides)
    size = cfg.data.image_size
    net = build_model(cfg.model.without_initial()).to(device).eval()
    check_model(net, size, cfg.model.num_classes)
    seconds = _time(net, torch.randn(batch_size, 3, size, size, device=device), amp)
    return {
        "model": cfg.model.name,
        "image_size": size,
        "batch_size": batch_size,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "amp": amp,
        "images_per_second": float(f"{batch_size / seconds:.4g}"),
    }


@torch.inference_mode()
def _time(model: nn.Module, images: Tensor, amp: str) -> float:
    """Return the median time of repeated runs after a warm-up, in seconds."""

    def run() -> float:
        began = time.perf_counter()
        with autocast(images.device, amp):
            model(images)
        if images.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - began

    for _ in range(3):
        run()
    times: list[float] = []
    while len(times) < 5 or sum(times) < 5:
        times.append(run())
    return sorted(times)[len(times) // 2]
