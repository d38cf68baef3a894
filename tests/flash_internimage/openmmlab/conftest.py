import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from torch import nn

from flash_internimage.openmmlab.runtime import FlashRunner
from tests.flash_internimage.openmmlab.small import Model, Score


@pytest.fixture(autouse=True)
def always_restore_scope(restore_scope):
    """In all tests of this folder."""


@pytest.fixture
def log(caplog, request):
    """What the engine's current logger says."""
    logger = MMLogger.get_instance(request.module.__name__)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def runner(tmp_path, request):
    """Builds runners of three epochs with two batches each."""
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
        return FlashRunner(model or Model(), **{**arguments, **kwargs})

    return build
