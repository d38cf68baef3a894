"""Data loaders with timm's transforms."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import Mixup, ScheduledBatchSampler, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Sampler
from torch.utils.data.distributed import DistributedSampler

from ..config import Augmentation, Config, ConfigError, Data
from ..errors import one_line
from .datasets import ImageSet, SkippingImageDataset, SkippingStream


def spread(length: int, limit: int | None) -> list[int]:
    """Return at most `limit` evenly spaced indices, as datasets are often sorted by class."""
    limit = length if limit is None else min(limit, length)
    return [i * length // limit for i in range(limit)]


class EveryNth(Sampler[int]):
    """Sampler that distributes indices over processes without repeating any.

    Args:
        indices: Indices to distribute.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(self, indices: Sequence[int], rank: int, world_size: int) -> None:
        self.indices = indices[rank::world_size]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def _erasing(augmentation: Augmentation) -> dict[str, Any]:
    return {
        "re_prob": augmentation.random_erasing,
        "re_mode": augmentation.random_erasing_mode,
        "re_count": augmentation.random_erasing_count,
    }


def train_transform(
    data: Data, augmentation: Augmentation, for_prefetcher: bool, size: int | None = None
) -> Callable[[Image.Image], Any]:
    """Build the transform that augments training images.

    Args:
        data: Settings of the data.
        augmentation: Settings of the augmentation.
        for_prefetcher: Leave normalization and random erasing to timm's prefetcher.
        size: Height and width of the results; None for `data.image_size`.

    Raises:
        ConfigError: If timm does not accept a setting.
    """
    try:
        return create_transform(
            size or data.image_size,
            is_training=True,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter or None,  # type: ignore[arg-type]
            auto_augment=augmentation.auto_augment,
            interpolation=data.interpolation,
            mean=data.mean,
            std=data.std,
            use_prefetcher=for_prefetcher,
            **_erasing(augmentation),
        )
    except Exception as error:
        raise ConfigError(
            f"timm rejects the augmentation with auto_augment={augmentation.auto_augment}: "
            f"{one_line(error)}"
        ) from error


def eval_transform(data: Data, for_prefetcher: bool = False) -> Callable[[Image.Image], Any]:
    """Build the transform that resizes the shorter side and takes the center crop.

    Args:
        data: Settings of the data.
        for_prefetcher: Leave normalization to timm's prefetcher.
    """
    return create_transform(
        data.image_size,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        mean=data.mean,
        std=data.std,
        use_prefetcher=for_prefetcher,
    )


def _uses_prefetcher(device: torch.device) -> bool:
    # timm's prefetcher copies bytes to the GPU, and normalizes and erases there. On the CPU, the
    # dataset does all of this, so that a resumed run repeats it exactly.
    return device.type == "cuda"


def _init_worker(worker_id: int) -> None:
    # Terminals and batch systems signal every process of a run. Workers that exit would end the
    # main process within an optimizer step, before it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # identifies the sender of a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent() -> None:
    parent = multiprocessing.parent_process()  # os.getppid() may be that of a fork server
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def start(loader: DataLoader | PrefetchLoader) -> Iterator:
    """Return an iterator over a loader whose workers block SIGINT and SIGTERM from the start."""
    if not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    # Workers inherit the mask, so that no signal ends one that has not run `_init_worker` yet.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _loader(
    dataset: ImageSet,
    data: Data,
    batch_size: int,
    device: torch.device,
    sampler: Sampler[Any] | None,
    drop_last: bool,
    **erasing: Any,
) -> DataLoader | PrefetchLoader:
    if isinstance(dataset, SkippingStream):
        sampler = None  # the reader shuffles and distributes
        dataset.set_loader_cfg(num_workers=data.workers)
    batches: dict[str, Any] = {
        "batch_size": batch_size,
        "sampler": sampler,
        "drop_last": drop_last,
    }
    if isinstance(sampler, ScheduledBatchSampler):
        batches = {"batch_sampler": sampler}
    prefetch = _uses_prefetcher(device)
    loader = DataLoader(
        dataset,
        **batches,
        num_workers=data.workers,
        collate_fn=fast_collate if prefetch else None,
        pin_memory=prefetch,
        worker_init_fn=_init_worker,
    )
    return (
        PrefetchLoader(loader, data.mean, data.std, device=device, **erasing)
        if prefetch
        else loader
    )


def train_loader(
    dataset: ImageSet, cfg: Config, device: torch.device, rank: int, world_size: int
) -> DataLoader | PrefetchLoader:
    """Build the training loader, which yields full batches of shuffled and augmented images.

    Call :func:`set_epoch` before every epoch to shuffle the images. With `data.image_sizes`, the
    images of a batch have one of these sizes, the same on all processes.

    Args:
        dataset: Training split; its transform is set.
        cfg: Configuration of the run.
        device: Device of the model.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ConfigError: If the dataset is smaller than the total batch size or is a stream of unknown
            length, if `data.workers` is 0 for `tfds/` on several processes, or if
            `data.image_sizes` is used with a stream.
    """
    is_stream = isinstance(dataset, SkippingStream)
    if is_stream and cfg.data.image_sizes:
        raise ConfigError(
            f"data.image_sizes must be empty for data.kind={cfg.data.kind}, which is read as a "
            f"stream, got {list(cfg.data.image_sizes)}"
        )
    if is_stream and not len(dataset):
        raise ConfigError(f"data.kind={cfg.data.kind} must provide the number of training images")
    if cfg.data.kind.lower().startswith("tfds/") and world_size > 1 and not cfg.data.workers:
        # Without workers, timm's reader would give every process the same images.
        raise ConfigError("data.workers must be at least 1 for tfds/ on several processes, got 0")
    images = cfg.batch_size * cfg.accumulation_steps * (1 if is_stream else world_size)
    if len(dataset) < images:
        raise ConfigError(
            f"the training split must have at least the {images} images of one optimizer step"
            f"{' per process' * is_stream}, got {len(dataset)}"
        )
    prefetch = _uses_prefetcher(device)
    dataset.transform = train_transform(cfg.data, cfg.augmentation, prefetch)
    sampler: Sampler[Any] = DistributedSampler(
        dataset, world_size, rank, seed=cfg.seed, drop_last=True
    )
    if isinstance(dataset, SkippingImageDataset) and cfg.data.image_sizes:
        sizes = cfg.data.image_sizes
        dataset.transforms = [
            train_transform(cfg.data, cfg.augmentation, prefetch, size) for size in sizes
        ]
        sampler = _scheduled(sampler, cfg)
    erasing = _erasing(cfg.augmentation)
    return _loader(dataset, cfg.data, cfg.batch_size, device, sampler, drop_last=True, **erasing)


def _scheduled(sampler: Sampler[int], cfg: Config) -> ScheduledBatchSampler:
    """Return batches of a sampler, each with the number of one of `data.image_sizes`."""
    sizes = cfg.data.image_sizes
    progressive = cfg.data.size_schedule == "progressive" and len(sizes) > 1
    schedule: dict[str, Any] = {}
    if progressive:
        schedule = {
            "choice_schedule": "progressive",
            "schedule_epochs": cfg.schedule.epochs,
            "schedule_spread": 0.0,
            "schedule_random_mix": 0.0,
        }
    return ScheduledBatchSampler(
        sampler,
        [cfg.batch_size] * len(sizes),
        seed=cfg.seed,
        num_batches=len(sampler) // cfg.batch_size,  # type: ignore[arg-type]
        **schedule,
    )


def share_unreadable(loader: DataLoader | PrefetchLoader) -> None:
    """Share the unreadable images among all processes; every process must call this.

    Raises:
        TooManyCorruptImages: If there are more than `data.max_corrupt`.
    """
    if dist.is_initialized() and isinstance(loader.dataset, SkippingImageDataset):
        loader.dataset.share_unreadable(getattr(loader, "device", torch.device("cpu")))


def set_epoch(loader: DataLoader | PrefetchLoader, epoch: int) -> None:
    """Shuffle the images for an epoch; with several processes, all of them must call this.

    Raises:
        TooManyCorruptImages: If the processes together have found more than `data.max_corrupt`.
    """
    share_unreadable(loader)
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    for sampler in (loader.sampler, getattr(loader, "batch_sampler", None)):
        if isinstance(sampler, DistributedSampler | ScheduledBatchSampler):
            sampler.set_epoch(epoch)


def val_loader(
    dataset: ImageSet,
    data: Data,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
) -> DataLoader | PrefetchLoader:
    """Build the evaluation loader, which yields every image, or `limit` of them, exactly once.

    Images are resized and center-cropped.

    Args:
        dataset: Split to evaluate; its transform is set.
        data: Settings of the data.
        batch_size: Images per batch and process.
        device: Device of the model.
        rank: Rank of this process.
        world_size: Number of processes.
        limit: Maximum number of images, evenly spaced; None for all.

    Raises:
        ConfigError: If there is a limit for a dataset that is read as a stream.
    """
    if limit is not None and isinstance(dataset, SkippingStream):
        raise ConfigError(
            f"limit must not be used with data.kind={data.kind}, which is read as a stream"
        )
    dataset.transform = eval_transform(data, _uses_prefetcher(device))
    sampler = EveryNth(spread(len(dataset), limit), rank, world_size)
    return _loader(dataset, data, batch_size, device, sampler, drop_last=False)


def build_mixup(augmentation: Augmentation, num_classes: int) -> Mixup | None:
    """Build timm's mixup and CutMix, or return None if both are disabled."""
    if not augmentation.mixes:
        return None
    return Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        prob=augmentation.mixup_prob,
        switch_prob=augmentation.mixup_switch_prob,
        mode=augmentation.mixup_mode,
        label_smoothing=augmentation.label_smoothing,
        num_classes=num_classes,
    )


def denormalize(image: torch.Tensor, data: Data) -> np.ndarray:
    """Convert a normalized image (3, H, W) to an array (H, W, 3) with values in [0, 1]."""
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (data.mean, data.std))
    return (image.cpu().float() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
