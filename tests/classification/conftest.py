import shutil
from pathlib import Path

import pytest

from flash_internimage.classification.config import Config
from flash_internimage.classification.training import train
from flash_internimage.cli.demo_data import write_digits
from tests.classification.helpers import EPOCHS, SMALL, build


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    """Use one thread in all tests of this folder."""


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Write the digits dataset as an ImageFolder: 6 per class for training, 2 for evaluation."""
    everything, few = tmp_path_factory.mktemp("all") / "d", tmp_path_factory.mktemp("few")
    write_digits(everything)
    for split, count in (("train", 6), ("val", 2)):
        for label in map(str, range(10)):
            (few / split / label).mkdir(parents=True)
            for image in sorted((everything / split / label).iterdir())[:count]:
                shutil.copy(image, few / split / label)
    return few


@pytest.fixture
def settings(digits, tmp_path):
    """Return the settings of a short run of a small model with all random augmentation enabled."""
    return {
        "output": str(tmp_path / "run"),
        "batch_size": 12,
        "val_batch_size": 8,
        "amp": "off",
        "ema_decay": 0.9,
        "model": {
            "name": "flash_internimage_nano",
            "num_classes": 10,
            "drop_path_rate": 0.1,
            "args": SMALL,
        },
        "data": {"root": str(digits), "image_size": 32, "workers": 0},
        "augmentation": {"random_erasing": 0.5},
        "optimizer": {"lr": 1e-3, "lr_batch": None},
        "schedule": {"epochs": 2, "warmup_epochs": 1, "warmup_lr": 1e-4, "min_lr": 1e-5},
    }


@pytest.fixture
def deterministic_images() -> dict:
    """Return augmentation settings that leave images unchanged."""
    return {
        "scale": [1.0, 1.0],
        "ratio": [1.0, 1.0],
        "hflip": 0.0,
        "auto_augment": None,
        "color_jitter": 0.0,
        "random_erasing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
    }


@pytest.fixture
def config(settings):
    """Return a function that builds a Config from the settings with changed sections or values."""

    def build(**changes) -> Config:
        merged = dict(settings)
        for key, value in changes.items():
            is_section = isinstance(value, dict)
            merged[key] = {**settings.get(key, {}), **value} if is_section else value
        return Config.model_validate(merged)

    return build


@pytest.fixture
def change(config):
    """Return a function that builds a Config from dotted keys."""

    def build_config(**changes) -> Config:
        merged = {"schedule": EPOCHS, "device": "cpu"}
        for key, value in changes.items():
            section, _, name = key.rpartition(".")
            if section:
                merged[section] = {**merged.get(section, {}), name: value}
            else:
                merged[key] = value
        return config(**merged)

    return build_config


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def run(config, trained) -> Path:
    """Return the output folder of a short finished run."""
    if not (trained / "last.pth").exists():
        train(config(output=str(trained)))
    return trained


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def checkpoint(config, saved) -> dict[str, Path]:
    """Return checkpoints between epochs 2 and 3 of 4, and within epoch 3."""
    if not (saved / "last.pth").exists():
        trainer = build(config(output=str(saved), schedule=EPOCHS, device="cpu"))
        trainer.train_update([next(iter(trainer.train_loader))])
        trainer.epoch, trainer.update = 2, 3
        trainer.save()
        (saved / "last.pth").rename(saved / "within.pth")
        trainer.update = 0
        trainer.save()
    return {"between": saved / "last.pth", "within": saved / "within.pth"}
