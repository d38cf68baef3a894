import shutil
from pathlib import Path

import pytest

from flash_internimage.classification.config import Config
from tools.make_demo_data import write_digits

SMALL_MODEL = {
    "name": "flash_internimage_nano",
    "num_classes": 10,
    "drop_path_rate": 0.1,
    "args": {"channels": 16, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8]},
}


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    """In all tests of this folder."""


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Real digits as an ImageFolder: 6 per class for training, 2 for evaluation."""
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
    """A short run of a small model with every random ingredient switched on, as plain settings."""
    return {
        "output": str(tmp_path / "run"),
        "batch_size": 12,
        "val_batch_size": 8,
        "amp": "off",
        "ema_decay": 0.9,
        "model": SMALL_MODEL,
        "data": {"root": str(digits), "image_size": 32, "workers": 0},
        "augmentation": {"random_erasing": 0.5},
        "optimizer": {"lr": 1e-3, "lr_batch": None},
        "schedule": {"epochs": 2, "warmup_epochs": 1, "warmup_lr": 1e-4, "min_lr": 1e-5},
    }


@pytest.fixture
def deterministic_images() -> dict:
    """Augmentation that leaves every image alone."""
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
    """Builds a Config from the settings, with whole sections or values changed."""

    def build(**changes) -> Config:
        merged = dict(settings)
        for key, value in changes.items():
            is_section = isinstance(value, dict)
            merged[key] = {**settings.get(key, {}), **value} if is_section else value
        return Config.model_validate(merged)

    return build
