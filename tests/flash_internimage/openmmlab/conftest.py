from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.fileio import BaseStorageBackend, io, register_backend
from mmengine.fileio.backends import backends, prefix_to_backends
from mmengine.logging import MMLogger
from PIL import Image
from torch import nn

from flash_internimage.openmmlab import SafeRunner, safe_loading
from tests.flash_internimage.openmmlab.label_maps import HEIGHT, WIDTH, label_map, write_labels
from tests.flash_internimage.openmmlab.small import Model, Score


@pytest.fixture(autouse=True)
def always_restore_scope(restore_scope):
    """Apply to all tests of this folder."""


@pytest.fixture(name="safe_loading")
def enable_safe_loading():
    """Enable safe loading for one test."""
    with safe_loading.safe_loading():
        yield


@pytest.fixture
def log(caplog, request):
    """Capture the messages of mmengine's current logger."""
    logger = MMLogger.get_instance(request.module.__name__)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def runner(tmp_path, request):
    """Build runners of three epochs with two batches each."""
    number = 0

    def build(model: nn.Module | None = None, scores=(0.1, 0.2, 0.3), max_keep=1, **kwargs):
        nonlocal number
        number += 1
        data = {
            "dataset": [{"inputs": torch.full((3,), float(i))} for i in range(4)],
            "batch_size": 2,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "num_workers": 0,
        }
        hook = {
            "type": "AtomicCheckpointHook",
            "interval": 1,
            "max_keep_ckpts": max_keep,
            "save_best": "score",
            "rule": "greater",
        }
        arguments = {
            "work_dir": str(tmp_path / "run"),
            "train_dataloader": data,
            "val_dataloader": data,
            "train_cfg": {"by_epoch": True, "max_epochs": 3},
            "val_cfg": {},
            "val_evaluator": Evaluator(Score(scores)),
            "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
            "default_hooks": {"checkpoint": hook},
            "custom_hooks": [{"type": "CurvesHook"}],
            "experiment_name": f"{request.node.name}_{number}",
            "log_level": "WARNING",
        }
        return SafeRunner(model or Model(), **{**arguments, **kwargs})

    return build


@pytest.fixture
def memory(tmp_path) -> Iterator[dict[str, bytes]]:
    """Register a storage backend, and return its files by URL (`memory://...`)."""
    files: dict[str, bytes] = {}

    class Memory(BaseStorageBackend):
        def get(self, filepath: str) -> bytes:
            return files[filepath]

        def get_text(self, filepath: str, encoding: str = "utf-8") -> str:
            return files[filepath].decode(encoding)

        @contextmanager
        def get_local_path(self, filepath: str) -> Iterator[Path]:
            (tmp_path / "local").write_bytes(files[filepath])
            yield tmp_path / "local"

    register_backend("memory", Memory, prefixes="memory")
    yield files
    del backends["memory"], prefix_to_backends["memory"]
    for key in [key for key in io.backend_instances if "memory" in key]:
        del io.backend_instances[key]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with images 1 to 4 and their label maps."""
    rng = np.random.default_rng(0)
    for i in range(1, 5):
        (tmp_path / "images").mkdir(exist_ok=True)
        image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.jpg")
        write_labels(tmp_path, i, label_map(0, 1, 2, 255))
    return tmp_path
