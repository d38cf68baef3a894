"""Datasets of timm, torchvision, folders and tar files that skip unreadable images."""

import importlib.util
import itertools
import logging
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers import set_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from ...images import (
    MAX_ASPECT_RATIO,
    UnreadableImage,
    image_suffixes,
    read_image,
    to_rgb,
)
from ..config import ConfigError, Data
from ..errors import one_line
from ..processes import fail_together, rank, world_size
from .folders import (
    FolderReader,
    check_class_folders,
    check_listing,
    count_shared,
    drop_hidden,
    folders_in_tar,
    list_folder,
    list_tar,
    printable,
    start_of_file,
)

_logger = logging.getLogger(__name__)

SKIPPED = -1  # label of unreadable images in evaluation

# Module that timm needs for each prefix of `data.kind`, and the packages that provide it.
_PACKAGES = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
    "wds": ("webdataset", "webdataset"),
}

# torchvision's datasets that timm supports. For those with a training and a test split, timm would
# return the test split for every name that is not in `_TRAIN_NAMES`.
_TRAIN_AND_TEST = ("cifar10", "cifar100", "fashion_mnist", "kmnist", "mnist", "qmnist")
_TORCHVISION = (
    *_TRAIN_AND_TEST, "folder", "image_folder", "imagenet", "inat", "inaturalist", "places365",
)  # fmt: skip
_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = ("test", "val", "valid", "validation", "eval", "evaluation")

# First bytes of files that are often passed instead of uncompressed tar files.
_ARCHIVES = (
    (b"\x1f\x8b", "it is compressed by gzip"),
    (b"BZh", "it is compressed by bzip2"),
    (b"\xfd7zXZ", "it is compressed by xz"),
    (b"\x28\xb5\x2f\xfd", "it is compressed by zstd"),
    (b"PK\x03\x04", "it is a zip file"),
)


class TooManyCorruptImages(RuntimeError):
    """Raised if unreadable images stop the run.

    More files than `data.max_corrupt`, or all files of a split, cannot be read, or a stream fails
    or ends before the first optimizer step.
    """

    def __init__(self, message: str) -> None:
        # DataLoader re-raises errors of its workers with their traceback as the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class WrongLabel(ValueError):
    """Raised for an image without a class, as in test splits that are published without labels."""


def _checked_label(label: Any) -> int:
    try:
        number = index(label)
    except TypeError:  # None, text, or several labels
        number = -1
    if number < 0:
        raise WrongLabel(
            f"labels must be integers >= 0, got {label!r:.50}; every image of the split needs one"
        )
    return number


class SkippingImageDataset(ImageDataset):
    """timm ImageDataset that skips unreadable images, logs their paths and counts them.

    In training, they are replaced by the next readable image; in evaluation, by a black image
    labeled `SKIPPED`, so that no image counts twice.

    Args:
        reader: Reader of timm, or dataset of torchvision.
        is_training: Whether the images are used for training.
        max_corrupt: Number of unreadable images that are tolerated.
    """

    def __init__(self, reader: Any, is_training: bool, max_corrupt: int) -> None:
        super().__init__(root=None, reader=reader)
        self.is_training = is_training
        self.max_corrupt = max_corrupt
        self.transforms: Sequence[Callable[[Image.Image], Any]] = ()
        # One flag per image, shared with the loader's worker processes.
        self._unreadable = torch.zeros(len(reader), dtype=torch.bool).share_memory_()

    @property
    def corrupt(self) -> int:
        """Number of distinct images that could not be read so far."""
        return int(self._unreadable.sum())

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Any, int]:
        """Return a transformed image and its label.

        Args:
            index: Number of the image; or this and the number of one of `transforms`, as yielded by
                timm's ScheduledBatchSampler.
        """
        transform = self.transform
        if isinstance(index, tuple):
            index, choice = index
            transform = self.transforms[choice]
        for i in range(index, index + len(self)):
            try:
                image, target = self.read(i % len(self))
                break
            except UnreadableImage as error:
                self._count(i % len(self), error)
            if not self.is_training:
                image, target = _placeholder(), SKIPPED
                break
        else:
            raise TooManyCorruptImages(f"none of the {len(self)} images of the split can be read")
        if target != SKIPPED and self.target_transform is not None:
            target = self.target_transform(target)
        return transform(image), target

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image in RGB and its label.

        Raises:
            UnreadableImage: If the image cannot be used.
            WrongLabel: If the image has no class.
        """
        name = self.name_of(index)
        try:
            if isinstance(self.reader, ReaderImageFolder):
                # The reader would open the file and block forever if it is a FIFO.
                source, target = self.reader.samples[index]
                return to_rgb(read_image(source, name)), target
            source, target = self.reader[index]
            with source:
                # torchvision's datasets return images, all others binary streams.
                is_image = isinstance(source, Image.Image)
                image = source if is_image else read_image(source, name)
                return to_rgb(image), _checked_label(target)
        except (UnreadableImage, WrongLabel):
            raise
        except Exception as error:  # of the tar file or the conversion
            raise UnreadableImage(f"cannot read image {name}: {one_line(error)}") from error

    def name_of(self, index: int) -> str:
        """Return the path of an image, or its number if it has none."""
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
                f"found {corrupt} unreadable images, more than data.max_corrupt={self.max_corrupt}"
                f"{detail}"
            )

    def share_unreadable(self, device: torch.device) -> None:
        """Share the unreadable images among all processes; every process must call this.

        Args:
            device: Device for the communication.

        Raises:
            TooManyCorruptImages: If there are too many together, on the first process.
            EndedByAnother: In this case, on the other processes.
        """
        flags = self._unreadable.to(device, torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        self._unreadable.copy_(flags)
        with fail_together(device):
            self._check_count()


class SkippingStream(IterableImageDataset):
    """timm IterableImageDataset that skips unusable images; its reader decodes them.

    Images that cannot be resized within bounded memory or converted to RGB are skipped in training
    and labeled `SKIPPED` in evaluation. In training, the reader distributes the images over the
    processes. In evaluation, each process reads all images and yields its share, none twice.

    Args:
        reader: Reader of timm.
        is_training: Whether the images are used for training.
        kind: Value of `data.kind`, for error messages.
    """

    def __init__(self, reader: Any, is_training: bool, kind: str) -> None:
        super().__init__(root=None, reader=reader)
        self.is_training = is_training
        self.kind = kind
        self.rank, self.world_size = (0, 1) if is_training else (rank(), world_size())
        if self.world_size > 1:  # timm's readers would repeat or miss some images
            reader.dist_rank, reader.dist_num_replicas = 0, 1

    def __len__(self) -> int:
        return len(range(self.rank, super().__len__(), self.world_size))

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        images = itertools.islice(iter(self.reader), self.rank, None, self.world_size)
        while True:
            try:
                image, target = next(images)
            except StopIteration:
                return
            except Exception as error:
                # Readers skip what they can, and cannot continue after any other error.
                raise TooManyCorruptImages(
                    f"data.kind={self.kind}: cannot read the stream: "
                    f"{type(error).__name__}: {one_line(error)}"
                ) from error
            target = _checked_label(target)
            try:
                if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                    raise ValueError(f"one side is more than {MAX_ASPECT_RATIO} times the other")
                image = to_rgb(image)
            except Exception as error:
                _logger.warning(
                    "skipped: image of %d x %d pixels in a stream: %s",
                    *image.size, one_line(error),
                )  # fmt: skip
                if self.is_training:
                    continue
                image, target = _placeholder(), SKIPPED
            yield self.transform(image), target


ImageSet = SkippingImageDataset | SkippingStream


def _placeholder() -> Image.Image:
    return Image.new("RGB", (256, 256))


def build_dataset(data: Data, split: str, is_training: bool, batch_size: int) -> ImageSet:
    """Build the dataset of a split, without a transform.

    Args:
        data: Settings of the data.
        split: Name of the split.
        is_training: Whether the images are used for training.
        batch_size: Images per batch, which some of timm's readers need.

    Raises:
        ConfigError: If the folder or split does not exist, contains no images or a loop of links,
            or is a damaged tar file; if a class folder of a training split is empty; or if a
            package is not installed.
    """
    root, source = Path(data.root), source_of(data, split)
    if _is_folder_kind(data) and not os.path.exists(root):
        raise ConfigError(f"data.root not found: {root}")
    if source != root and not os.path.exists(source):
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:10]) or "nothing"
        tar = f"{split}.tar"
        hint = f"; for the tar file, set the split to '{tar}'" * os.path.exists(root / tar)
        raise ConfigError(f"data.root={root} must contain a folder '{split}', got {found}{hint}")
    _check_package(data.kind)
    _check_torchvision(data.kind, split)
    try:
        dataset = _build(data, split, is_training, batch_size)
    except Exception as error:  # timm, tarfile and other packages raise errors of any type
        raise ConfigError(
            f"data.root={source} cannot be read as a dataset"
            f"{f' of data.kind={data.kind}' if data.kind else ''}: {one_line(error)}"
        ) from error
    if isinstance(dataset, IterableImageDataset):
        return SkippingStream(dataset.reader, is_training, data.kind)
    return SkippingImageDataset(dataset, is_training, data.max_corrupt)


def _build(data: Data, split: str, is_training: bool, batch_size: int) -> Any:
    """Return a map-style reader of images, or the dataset of a stream."""
    source = source_of(data, split)
    if _is_folder_kind(data):
        if data.kind or source.is_dir():
            return _folder_reader(source, is_training, outermost=bool(data.kind))
        return _tar_reader(source, is_training)
    dataset = create_dataset(
        data.kind,
        root=str(source),
        split=split,
        is_training=is_training,
        batch_size=batch_size,
        search_split=False,
        # Readers of other streams return images in their own mode, for to_rgb.
        input_img_mode="RGB" if data.kind.lower().startswith("tfds/") else "",
    )
    if hasattr(dataset, "loader"):  # datasets of torchvision that read files
        dataset.loader = read_image
    if hasattr(dataset, "wnid_to_idx"):  # ImageNet, where each class has several names
        dataset.class_to_idx = dataset.wnid_to_idx
    return dataset.reader if type(dataset) is ImageDataset else dataset


def source_of(data: Data, split: str) -> Path:
    """Return the path of a split, which is `data.root` for single tar files and most kinds."""
    root = Path(data.root)
    # Methods of Path raise errors for names that are too long.
    return root / split if _is_folder_kind(data) and os.path.isdir(root) else root


def _is_folder_kind(data: Data) -> bool:
    return not data.kind or _torchvision_name(data.kind) in ("folder", "image_folder")


def _torchvision_name(kind: str) -> str | None:
    """Return the name of a torchvision dataset as timm parses it; None for other kinds."""
    return kind.split("/", 2)[-1].lower() if kind.lower().startswith("torch/") else None


def _check_torchvision(kind: str, split: str) -> None:
    name = _torchvision_name(kind)
    if name is None:
        return
    if name not in _TORCHVISION:
        known = ", ".join(sorted(_TORCHVISION))
        raise ConfigError(f"data.kind must be torch/ followed by one of {known}, got '{kind}'")
    if name in _TRAIN_AND_TEST and split not in (*_TRAIN_NAMES, *_TEST_NAMES):
        raise ConfigError(
            f"a split of data.kind={kind} must be one of {', '.join(_TRAIN_NAMES)} for the "
            f"training images or {', '.join(_TEST_NAMES)} for the test images, got '{split}'"
        )


def _check_package(kind: str) -> None:
    module, packages = _PACKAGES.get(kind.partition("/")[0].lower(), (None, None))
    if module is not None and importlib.util.find_spec(module) is None:
        raise ConfigError(f"data.kind={kind} requires a package: pip install {packages}")


def _folder_reader(folder: Path, is_training: bool, outermost: bool) -> FolderReader:
    listing = list_folder(folder)
    if outermost:  # folders within a class may be empty
        listing = listing._replace(empty=[name for name in listing.empty if os.sep not in name])
    else:
        check_class_folders(map(os.path.dirname, listing.images))
    check_listing(listing, is_training)
    return FolderReader(str(folder), listing, outermost)


def _tar_reader(path: Path, is_training: bool) -> ReaderImageInTar:
    if path.suffix.lower() != ".tar":
        raise ValueError("it must be a folder or an uncompressed .tar file")
    _check_tar(path)
    listing = list_tar(path)
    check_listing(listing, is_training)
    set_img_extensions(sorted(image_suffixes()))
    reader = ReaderImageInTar(str(path))
    drop_hidden(reader)
    if len(reader) != len(listing.images):
        raise ValueError(
            f"timm reads {len(reader)} of its {len(listing.images)} images: nested tar files must "
            "not contain further tar files"
        )
    check_class_folders(folders_in_tar(reader))
    return reader


def _check_tar(path: Path) -> None:
    with open(path, "rb") as file:
        try:
            tarfile.open(fileobj=file, mode="r:").close()
        except tarfile.ReadError as error:
            file.seek(0)
            start = file.read(8)
            found = next((name for magic, name in _ARCHIVES if start.startswith(magic)), error)
            raise ValueError(f"it must be an uncompressed tar file: {found}") from error
        # tarfile accepts a file that is truncated between two members.
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1024, 0))
        if size < 1024 or file.read().strip(b"\0"):
            raise ValueError("the tar file is truncated, its end marker is missing")


def warn_of_shared_images(data: Data, train_set: ImageSet, val_set: ImageSet) -> None:
    """Warn if the validation split contains training images.

    Folders are compared image by image. For tar files and other map-style datasets, a sample is
    compared, which detects identical splits. For streams, only the names are compared.

    Args:
        data: Settings of the data.
        train_set: Dataset of the training split.
        val_set: Dataset of the validation split.
    """
    train, val = (source_of(data, split) for split in (data.train_split, data.val_split))
    readers = [dataset.reader for dataset in (train_set, val_set)]
    are_folders = all(isinstance(reader, FolderReader) for reader in readers)
    if (
        data.train_split == data.val_split
        or (_is_folder_kind(data) and os.path.realpath(train) == os.path.realpath(val))
        or (not are_folders and _are_alike(train_set, val_set))
    ):
        _logger.warning(
            "data.train_split and data.val_split contain the same images (%s): the accuracy does "
            "not measure generalization",
            val,
        )
    elif are_folders:
        shared, compared = count_shared(*([path for path, _ in r.samples] for r in readers))
        if shared:
            _logger.warning(
                "%d of the %d validation images that were compared are also training images: the "
                "accuracy overestimates generalization",
                shared, compared,
            )  # fmt: skip


def _are_alike(one: ImageSet, other: ImageSet) -> bool:
    """Return whether two datasets appear to contain the same images in the same order."""
    tars = [d.reader.root for d in (one, other) if isinstance(d.reader, ReaderImageInTar)]
    if tars:  # Reading images would open files that worker processes must not share.
        return len(tars) == 2 and start_of_file(tars[0]) == start_of_file(tars[1])
    if isinstance(one, SkippingStream) or isinstance(other, SkippingStream):
        return False
    if len(one) != len(other):
        return False
    some = range(0, len(one), max(1, len(one) // 8))
    try:
        return all(one.read(i)[0].tobytes() == other.read(i)[0].tobytes() for i in some)
    except UnreadableImage:
        return False
