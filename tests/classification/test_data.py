import shutil
import signal
import subprocess
import tarfile
import traceback

import pytest
import torch
from PIL import Image
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, AugmentOp
from torch.utils.data import DataLoader

from flash_internimage.classification.config import ConfigError, Data
from flash_internimage.classification.data import (
    TooManyCorruptImages,
    build_dataset,
    class_names,
    set_epoch,
    spread,
    start,
    train_loader,
    val_loader,
)
from tests.classification.helpers import CPU


@pytest.fixture
def damaged(digits, tmp_path):
    """Copy the digits and damage two images of each split: one is truncated, one is text."""
    root = tmp_path / "damaged"
    shutil.copytree(digits, root)
    for split in ("train", "val"):
        whole = next((root / split / "3").iterdir())
        whole.write_bytes(whole.read_bytes()[:100])
        next((root / split / "7").iterdir()).write_text("not an image")
    return root


@pytest.mark.slow
def test_every_image_is_evaluated_once_by_any_number_of_processes(digits):
    data = Data(root=str(digits), image_size=32, workers=0)
    dataset = build_dataset(data, "val", False, 8)

    def labels(world_size):
        loaders = [val_loader(dataset, data, 8, CPU, r, world_size) for r in range(world_size)]
        return sorted(label for loader in loaders for _, y in loader for label in y.tolist())

    assert labels(1) == labels(3) == sorted(list(range(10)) * 2)


def test_processes_share_an_epoch_and_epochs_differ(config):
    cfg = config()

    def order(epoch, rank=0, world_size=1):
        dataset = build_dataset(cfg.data, "train", True, cfg.batch_size)
        loader = train_loader(dataset, cfg, CPU, rank, world_size)
        set_epoch(loader, epoch)
        return list(loader.sampler)

    assert sorted(order(0)) == list(range(60))
    assert order(0) == order(0) != order(1)
    assert (order(1, 0, 2), order(1, 1, 2)) == (order(1)[::2], order(1)[1::2])


def test_unreadable_images_are_skipped_counted_and_logged(damaged, caplog):
    data = Data(root=str(damaged), image_size=32, workers=0)
    dataset = build_dataset(data, "val", False, 8)
    targets = torch.cat([y for _, y in val_loader(dataset, data, 8, CPU)])
    assert (targets == -1).sum() == dataset.corrupt == 2
    named = [record.getMessage() for record in caplog.records]
    assert [str(damaged / "val" / "3") in named[0], str(damaged / "val" / "7") in named[1]]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_an_unreadable_image_by_the_next_one(config, damaged, workers):
    cfg = config(data={"root": str(damaged), "workers": workers})
    dataset = build_dataset(cfg.data, "train", True, cfg.batch_size)
    batches = list(train_loader(dataset, cfg, CPU, 0, 1))
    assert [len(y) for _, y in batches] == [12] * 5
    assert all((y >= 0).all() for _, y in batches)
    assert dataset.corrupt == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_stop_the_run(config, damaged, workers):
    cfg = config(data={"root": str(damaged), "workers": workers, "max_corrupt": 1})
    dataset = build_dataset(cfg.data, "train", True, cfg.batch_size)
    with pytest.raises(TooManyCorruptImages, match=r"found 2 unreadable .*max_corrupt=1") as error:
        list(train_loader(dataset, cfg, CPU, 0, 1))
    traceback.clear_frames(error.tb)  # ends the workers now; a later garbage collection waits 10 s


def test_an_error_of_the_augmentation_is_not_treated_as_a_corrupt_image(digits):
    dataset = build_dataset(Data(root=str(digits)), "train", True, 8)

    def broken(image):
        raise ValueError("a bug")

    dataset.transform = broken
    with pytest.raises(ValueError, match="a bug"):
        dataset[0]
    assert dataset.corrupt == 0


@pytest.mark.parametrize("name", _RAND_INCREASING_TRANSFORMS)
def test_the_published_policy_works_at_its_strongest(digits, name):
    with Image.open(next((digits / "train" / "3").iterdir())) as image:
        augmented = AugmentOp(name, prob=1.0, magnitude=10)(image.convert("RGB"))
    assert augmented.size == (32, 32)


def test_error_names_the_missing_folder_or_split(digits, tmp_path):
    with pytest.raises(ConfigError, match=r"data.root not found: .*nowhere"):
        build_dataset(Data(root=str(tmp_path / "nowhere")), "train", True, 8)
    with pytest.raises(ConfigError, match=r"must contain a folder 'test', got train, val"):
        build_dataset(Data(root=str(digits)), "test", False, 8)
    (tmp_path / "val.tar").touch()
    with pytest.raises(
        ConfigError, match=r"got val\.tar; for the tar file, set the split to 'val\.tar'$"
    ):
        build_dataset(Data(root=str(tmp_path)), "val", False, 8)
    (tmp_path / "train").mkdir()
    with pytest.raises(ConfigError, match="cannot be read as a dataset"):
        build_dataset(Data(root=str(tmp_path)), "train", True, 8)


def test_a_tar_of_images_is_read_in_place(digits, tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(digits / "val", arcname="val")
    data = Data(root=str(tmp_path / "val.tar"), image_size=32, workers=0)
    dataset = build_dataset(data, "val", False, 8)
    assert len(dataset) == 20
    assert class_names(dataset, 10) == [str(i) for i in range(10)]


def test_more_classes_than_the_model_has_are_an_error(digits):
    dataset = build_dataset(Data(root=str(digits)), "val", False, 8)
    with pytest.raises(ConfigError, match=r"model.num_classes must be at least 10, .*, got 5"):
        class_names(dataset, 5)


def test_a_data_set_smaller_than_one_update_is_an_error(config):
    cfg = config(batch_size=32, accumulation_steps=2)
    dataset = build_dataset(cfg.data, "train", True, cfg.batch_size)
    with pytest.raises(ConfigError, match="at least the 64 images of one optimizer step, got 60"):
        train_loader(dataset, cfg, CPU, 0, 1)


@pytest.mark.parametrize(
    ("length", "limit", "indices"),
    [(4, None, [0, 1, 2, 3]), (4, 9, [0, 1, 2, 3]), (20, 4, [0, 5, 10, 15]), (7, 3, [0, 2, 4])],
)
def test_a_subset_is_spread_over_all_images(length, limit, indices):
    assert spread(length, limit) == indices


def test_a_subset_contains_all_classes(digits):
    data = Data(root=str(digits), image_size=32, workers=0)
    dataset = build_dataset(data, "val", False, 8)
    loader = val_loader(dataset, data, 8, CPU, limit=10)
    assert torch.cat([targets for _, targets in loader]).tolist() == list(range(10))


class BlockedSignals:
    """A dataset of the signals that its worker blocks."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[int]:
        return [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())]


def test_workers_block_the_signals_of_terminals_before_they_are_initialized():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    loader = DataLoader(BlockedSignals(), batch_size=None, num_workers=1)
    for blocked in start(loader):
        assert {signal.SIGINT, signal.SIGTERM} <= {*blocked}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.slow
def test_workers_ignore_signals_of_others_and_obey_the_process_that_started_them(digits):
    data = Data(root=str(digits), image_size=32, workers=1)
    loader = val_loader(build_dataset(data, "val", False, 8), data, 8, CPU)
    loader.multiprocessing_context = "forkserver"  # which is the parent in `os.getppid()`
    batches = start(loader)
    next(batches)
    (worker,) = batches._workers
    for name in ("INT", "TERM"):
        subprocess.run(["kill", "-s", name, str(worker.pid)], check=True)
    worker.join(0.1)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0
