"""Data sets and loaders: timm's readers and transforms, unreadable images skipped and counted."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import (
    ImageDataset,
    IterableImageDataset,
    Mixup,
    create_dataset,
    create_transform,
)
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from flash_internimage.files import check_no_loops
from flash_internimage.images import MAX_ASPECT_RATIO, UnreadableImage, read_image

from .config import Augmentation, Config, ConfigError, Data, one_line

_logger = logging.getLogger(__name__)

SKIPPED = -1  # the label of an image that could not be read, in evaluation


class TooManyCorruptImages(RuntimeError):
    """Unreadable images stop the run: more files than `data.max_corrupt`, all, or a stream's."""

    def __init__(self, message: str):
        # A DataLoader re-raises errors of its workers with their traceback as the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class SkippingImageDataset(ImageDataset):
    """A timm ImageDataset that survives unreadable images, logs their paths and counts them.

    In training the next readable image takes the place; in evaluation a black image labelled
    `SKIPPED`, so that no image counts twice.
    """

    def __init__(self, reader, is_training: bool, max_corrupt: int):
        super().__init__(root=None, reader=reader)
        self.is_training = is_training
        self.max_corrupt = max_corrupt
        # One flag per image, shared with the loader's worker processes.
        self._unreadable = torch.zeros(len(reader), dtype=torch.bool).share_memory_()

    @property
    def corrupt(self) -> int:
        """Number of different images that could not be read so far."""
        return int(self._unreadable.sum())

    def __getitem__(self, index: int):
        for i in range(index, index + len(self)):
            try:
                image, target = self._read(i % len(self))
                break
            except UnreadableImage as error:
                self._count(i % len(self), error)
            if not self.is_training:
                image, target = _placeholder(), SKIPPED
                break
        else:
            raise TooManyCorruptImages(f"none of the {len(self)} images of a split can be read")
        return self.transform(image), target

    def _read(self, index: int) -> tuple[Image.Image, int]:
        name = self._name(index)
        try:
            if isinstance(self.reader, ReaderImageFolder):
                # The reader would open the file, and wait for ever if it is a FIFO.
                source, target = self.reader.samples[index]
                return read_image(source, name).convert("RGB"), target
            stream, target = self.reader[index]
            with stream:
                return read_image(stream, name).convert("RGB"), target
        except UnreadableImage:
            raise
        except Exception as error:  # of a tar file or of the conversion
            raise UnreadableImage(f"cannot read image {name}: {one_line(error)}") from error

    def _name(self, index: int) -> str:
        if isinstance(self.reader, ReaderImageInTar):
            return printable(f"{self.reader.root}:{self.reader.filename(index)}")
        try:
            return printable(str(self.reader.filename(index, absolute=True) or f"number {index}"))
        except Exception:
            return f"number {index}"

    def _count(self, index: int, error: UnreadableImage) -> None:
        if self._unreadable[index]:
            return
        self._unreadable[index] = True
        _logger.warning("skipped: %s", error)
        self._check_count(f"; the last one: {error}")

    def _check_count(self, detail: str = "") -> None:
        if (corrupt := self.corrupt) > self.max_corrupt:
            raise TooManyCorruptImages(
                f"{corrupt} unreadable images are more than data.max_corrupt={self.max_corrupt}"
                f"{detail}"
            )

    def share_unreadable(self, device: torch.device) -> None:
        """Count what other processes could not read; every process must call this.

        Raises:
            TooManyCorruptImages: They are too many together, in every process.
        """
        flags = self._unreadable.to(device, torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        self._unreadable.copy_(flags)
        self._check_count()


class SkippingStream(IterableImageDataset):
    """A timm IterableImageDataset, whose reader decodes images itself.

    Images that could not be resized within bounded memory are skipped in training, and labelled
    `SKIPPED` in evaluation.
    """

    def __init__(self, reader, is_training: bool, kind: str):
        super().__init__(root=None, reader=reader)
        self.is_training = is_training
        self.kind = kind

    def __iter__(self):
        images = iter(self.reader)
        while True:
            try:
                image, target = next(images)
            except StopIteration:
                return
            except Exception as error:
                # Readers skip what they can; after another error they cannot continue.
                raise TooManyCorruptImages(
                    f"data.kind={self.kind}: cannot read the stream: "
                    f"{type(error).__name__}: {one_line(error)}"
                ) from error
            if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                _logger.warning("skipped: an image of %d x %d pixels in a stream", *image.size)
                if self.is_training:
                    continue
                image, target = _placeholder(), SKIPPED
            yield self.transform(image), target


def _placeholder() -> Image.Image:
    return Image.new("RGB", (256, 256))


def printable(text: str) -> str:
    """Return text that any log or picture can show, for names of files that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


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
    """Build the `split` of a data set, without its transform.

    Raises:
        ConfigError: There is no such folder, no images in it, a loop of links or a damaged tar.
    """
    root = Path(data.root)
    if not data.kind and not os.path.exists(root):  # Path.exists raises an error for long names
        raise ConfigError(f"data.root not found: {root}")
    if not data.kind and root.is_dir() and not (root / split).exists():
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:10]) or "nothing"
        raise ConfigError(f"data.root={root} must have a folder '{split}', it holds: {found}")
    source = root / split if not data.kind and root.is_dir() else root
    try:
        if not data.kind and source.is_dir():
            check_no_loops(source)
        dataset = create_dataset(
            data.kind,
            root=str(source),
            split=split,
            is_training=is_training,
            batch_size=batch_size,
            search_split=False,
        )
        reader = getattr(dataset, "reader", None)
        if isinstance(reader, ReaderImageInTar):
            _check_end_of_tar(source)
        if isinstance(reader, ReaderImageFolder) and "" in reader.class_to_idx:
            # timm would make them a class of their own, the first one.
            raise ValueError("it must hold a folder per class, but has images outside of them")
    except Exception as error:  # timm, tarfile and packages of data sets raise any kind
        raise ConfigError(
            f"data.root={source} cannot be read as a data set"
            f"{f' of data.kind={data.kind}' if data.kind else ''}: {one_line(error)}"
        ) from error
    if isinstance(dataset, IterableImageDataset):
        return SkippingStream(dataset.reader, is_training, data.kind)
    if type(dataset) is not ImageDataset:
        return dataset
    return SkippingImageDataset(dataset.reader, is_training, data.max_corrupt)


def _check_end_of_tar(path: Path) -> None:
    # tarfile takes a file that ends between two members for a whole one.
    with open(path, "rb") as file:
        file.seek(-1024, os.SEEK_END)
        if file.read().strip(b"\0"):
            raise ValueError("the tar file is truncated, its end marker is missing")


def class_to_index(dataset: Dataset) -> dict[str, int]:
    """Return the indices of a data set's classes by their names; empty if it has no names."""
    source = getattr(dataset, "reader", dataset)
    for name in ("class_to_idx", "class_name_to_idx"):  # the latter is that of tar files
        if getattr(source, name, None):
            return getattr(source, name)
    return {}


def class_names(dataset: Dataset, num_classes: int) -> list[str]:
    """Return the names of the classes, their numbers where the data set has none.

    Raises:
        ConfigError: The data set has more classes than the model.
    """
    class_to_idx = class_to_index(dataset)
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
    return bool(class_to_index(dataset))


def _erasing(augmentation: Augmentation) -> dict:
    return {
        "re_prob": augmentation.random_erasing,
        "re_mode": augmentation.random_erasing_mode,
        "re_count": augmentation.random_erasing_count,
    }


def train_transform(data: Data, augmentation: Augmentation, for_prefetcher: bool):
    """Build the augmentation of training images.

    Raises:
        ConfigError: timm does not accept a setting.
    """
    try:
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
    except Exception as error:
        raise ConfigError(
            f"augmentation: timm cannot build it with auto_augment={augmentation.auto_augment}: "
            f"{one_line(error)}"
        ) from error


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


def share_unreadable(loader: DataLoader | PrefetchLoader) -> None:
    """Count the unreadable images of all processes together; every process must call this.

    Raises:
        TooManyCorruptImages: They are more than `data.max_corrupt`.
    """
    if dist.is_initialized() and isinstance(loader.dataset, SkippingImageDataset):
        loader.dataset.share_unreadable(getattr(loader, "device", torch.device("cpu")))


def set_epoch(loader: DataLoader | PrefetchLoader, epoch: int) -> None:
    """Draw the order of an epoch's images; with several processes, all of them must call this.

    Raises:
        TooManyCorruptImages: The processes together have met too many.
    """
    share_unreadable(loader)
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
