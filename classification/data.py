"""Data sets and loaders: timm's readers and transforms, unreadable images skipped and counted."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import (
    ImageDataset,
    IterableImageDataset,
    Mixup,
    create_dataset,
    create_transform,
)
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from .config import Augmentation, Config, ConfigError, Data

_logger = logging.getLogger(__name__)

SKIPPED = -1  # the label of an image that could not be read, in evaluation


class TooManyCorruptImages(RuntimeError):
    """More images than `data.max_corrupt` could not be read."""


class SkippingImageDataset(ImageDataset):
    """A timm ImageDataset that survives unreadable images, logs their paths and counts them.

    In training the next readable image takes the place; in evaluation a black image labelled
    `SKIPPED`, so that no image counts twice.
    """

    def __init__(self, reader, is_training: bool, max_corrupt: int):
        super().__init__(root=None, reader=reader)
        self.is_training = is_training
        self.max_corrupt = max_corrupt
        # Shared with the loader's worker processes.
        self._corrupt = multiprocessing.Value("l", 0)

    @property
    def corrupt(self) -> int:
        """Unreadable images met so far, an image counting each time that it is met."""
        return self._corrupt.value

    def __getitem__(self, index: int):
        while True:
            try:
                stream, target = self.reader[index]
                with Image.open(stream) as image:
                    image = image.convert("RGB")
                break
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                self._count(index, error)
            if not self.is_training:
                image, target = Image.new("RGB", (256, 256)), SKIPPED
                break
            index = (index + 1) % len(self)
        return self.transform(image), target

    def _count(self, index: int, error: Exception) -> None:
        with self._corrupt.get_lock():
            self._corrupt.value += 1
            corrupt = self._corrupt.value
        path = self.reader.filename(index, absolute=True)
        _logger.warning("skipped an unreadable image: %s (%s)", path, error)
        if corrupt > self.max_corrupt:
            raise TooManyCorruptImages(
                f"{corrupt} unreadable images are more than data.max_corrupt={self.max_corrupt}; "
                f"the last one was {path}"
            )


def spread(length: int, limit: int | None) -> list[int]:
    """At most `limit` indices, evenly spaced, for data sets that are sorted by class."""
    limit = length if limit is None else min(limit, length)
    return [i * length // limit for i in range(limit)]


class EveryNth(Sampler[int]):
    """The part of a data set that one of several processes evaluates: nothing twice."""

    def __init__(self, indices: Sequence[int], rank: int, world_size: int):
        self.indices = indices[rank::world_size]

    def __iter__(self):
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def build_dataset(data: Data, split: str, is_training: bool, batch_size: int) -> Dataset:
    """The `split` of a data set, without its transform.

    Raises:
        ConfigError: there is no such folder, or no images in it.
    """
    root = Path(data.root)
    if not data.kind and not root.exists():
        raise ConfigError(f"data.root not found: {root}")
    if not data.kind and root.is_dir() and not (root / split).exists():
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:10]) or "nothing"
        raise ConfigError(f"data.root={root} must have a folder '{split}', it holds: {found}")
    source = root / split if not data.kind and root.is_dir() else root
    try:
        dataset = create_dataset(
            data.kind,
            root=str(source),
            split=split,
            is_training=is_training,
            batch_size=batch_size,
            search_split=False,
        )
    except (RuntimeError, ValueError, OSError, AssertionError) as error:
        raise ConfigError(f"data.root={source} cannot be read as a data set: {error}") from error
    if type(dataset) is not ImageDataset:
        return dataset
    return SkippingImageDataset(dataset.reader, is_training, data.max_corrupt)


def class_names(dataset: Dataset, num_classes: int) -> list[str]:
    """Names of the classes, their numbers where the data set has none.

    Raises:
        ConfigError: the data set has more classes than the model.
    """
    class_to_idx = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    if len(class_to_idx) > num_classes:
        raise ConfigError(
            f"model.num_classes={num_classes} is too small for the data set's "
            f"{len(class_to_idx)} classes"
        )
    if class_to_idx and len(class_to_idx) < num_classes:
        _logger.warning(
            "the data set has %d classes, which count as the first of the model's %d",
            len(class_to_idx), num_classes,
        )  # fmt: skip
    names = {index: name for name, index in class_to_idx.items()}
    return [names.get(i, str(i)) for i in range(num_classes)]


def has_class_names(dataset: Dataset) -> bool:
    """Return whether a data set knows its classes by name, as folders do and streams do not."""
    return bool(getattr(getattr(dataset, "reader", None), "class_to_idx", None))


def _erasing(augmentation: Augmentation) -> dict:
    return {
        "re_prob": augmentation.random_erasing,
        "re_mode": augmentation.random_erasing_mode,
        "re_count": augmentation.random_erasing_count,
    }


def train_transform(data: Data, augmentation: Augmentation, for_prefetcher: bool):
    return create_transform(
        data.image_size,
        is_training=True,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter or None,
        auto_augment=augmentation.auto_augment,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
        use_prefetcher=for_prefetcher,
        **_erasing(augmentation),
    )


def eval_transform(data: Data, for_prefetcher: bool = False):
    """Resize of the shorter side and centre crop."""
    return create_transform(
        data.image_size,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        mean=data.mean,
        std=data.std,
        use_prefetcher=for_prefetcher,
    )


def _uses_prefetcher(device: torch.device) -> bool:
    # On a GPU, timm's prefetcher moves bytes and normalises and erases there. On the CPU all of it
    # happens in the data set, where a resumed run repeats it exactly.
    return device.type == "cuda"


def _stop_only_with_the_main_process(worker_id: int) -> None:
    # Terminals and batch systems signal every process of a run. A worker that died of it would take
    # the main process down within an update, before that has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # tells who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_the_main_process_asks, daemon=True).start()


def _exit_when_the_main_process_asks() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def start(loader: DataLoader | PrefetchLoader) -> Iterator:
    """An iterator over a loader, its worker processes safe from SIGTERM from their start on."""
    if not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # workers inherit it
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _loader(
    dataset: Dataset,
    data: Data,
    batch_size: int,
    device: torch.device,
    sampler: Sampler,
    drop_last: bool,
    **erasing,
) -> DataLoader | PrefetchLoader:
    if isinstance(dataset, IterableImageDataset):
        sampler = None  # its reader shuffles and shares out
        dataset.set_loader_cfg(num_workers=data.workers)
    prefetch = _uses_prefetcher(device)
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=data.workers,
        collate_fn=fast_collate if prefetch else None,
        pin_memory=prefetch,
        worker_init_fn=_stop_only_with_the_main_process,
        drop_last=drop_last,
    )
    return (
        PrefetchLoader(loader, data.mean, data.std, device=device, **erasing)
        if prefetch
        else loader
    )


def train_loader(
    dataset: Dataset, cfg: Config, device: torch.device, rank: int, world_size: int
) -> DataLoader | PrefetchLoader:
    """Shuffled, augmented, complete batches. `set_epoch` draws the order of the next epoch.

    Raises:
        ConfigError: the data set is smaller than one update.
    """
    images = cfg.batch_size * cfg.accumulation_steps * world_size
    if len(dataset) < images:
        raise ConfigError(
            f"the training split has {len(dataset)} images, fewer than the {images} of one update"
        )
    dataset.transform = train_transform(cfg.data, cfg.augmentation, _uses_prefetcher(device))
    sampler = DistributedSampler(dataset, world_size, rank, seed=cfg.seed, drop_last=True)
    erasing = _erasing(cfg.augmentation)
    return _loader(dataset, cfg.data, cfg.batch_size, device, sampler, drop_last=True, **erasing)


def set_epoch(loader: DataLoader | PrefetchLoader, epoch: int) -> None:
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    if isinstance(loader.sampler, DistributedSampler):
        loader.sampler.set_epoch(epoch)


def val_loader(
    dataset: Dataset,
    data: Data,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
) -> DataLoader | PrefetchLoader:
    """Every image, or `limit` of them, once, resized and centre-cropped.

    Raises:
        ConfigError: a data set that is read as a stream has no limit.
    """
    if limit is not None and isinstance(dataset, IterableImageDataset):
        raise ConfigError(f"data.kind={data.kind} is read as a stream and takes no limit")
    dataset.transform = eval_transform(data, _uses_prefetcher(device))
    sampler = EveryNth(spread(len(dataset), limit), rank, world_size)
    return _loader(dataset, data, batch_size, device, sampler, drop_last=False)


def build_mixup(augmentation: Augmentation, num_classes: int) -> Mixup | None:
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
    """(3, H, W), normalised -> (H, W, 3) in [0, 1]."""
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (data.mean, data.std))
    return (image.cpu().float() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
