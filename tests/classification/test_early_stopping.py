"""Tests that a run stops when its validation metric no longer improves."""

import math

import pytest

from flash_internimage.classification.config import EarlyStopping
from flash_internimage.classification.early_stopping import Patience
from flash_internimage.classification.engine import Trainer
from flash_internimage.classification.training import train
from tests.classification.helpers import build, metrics


@pytest.fixture
def scores(monkeypatch):
    """Return a function that replaces the epochs of the following runs by validation scores."""

    def set_scores(*scores: float, name: str = "ema_top1") -> None:
        def validate_epoch(self):
            row = dict.fromkeys(("val_loss", "val_top1", "val_top5", "ema_loss", "ema_top1"), 0.0)
            row |= {"train_loss": 0.0, "images_per_second": 1.0, "epoch": self.epoch + 1}
            return row | {name: scores[self.epoch]}

        monkeypatch.setattr(Trainer, "train_epoch", lambda self: None)
        monkeypatch.setattr(Trainer, "validate_epoch", validate_epoch)
        monkeypatch.setattr(Trainer, "report", lambda self: None)

    return set_scores


def epochs(cfg) -> int:
    """Train or resume, and return the number of epochs done."""
    train(cfg, resume="auto")
    return len(metrics(cfg.output))


@pytest.fixture
def stopping(config):
    def build_config(epochs: int = 9, **options):
        return config(
            early_stopping={"patience": 2, **options},
            schedule={"epochs": epochs, "warmup_epochs": 0},
        )

    return build_config


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({}, [50, 60, 60, 59, 70], 4),  # an equal score is no improvement
        ({}, [50, 49, 51, 50, 52, 51, 53], 7),
        ({"patience": 3}, [50, 49, 48, 47, 90], 4),
        ({"min_delta": 1.0}, [50, 50.5, 51, 70], 3),
        ({"min_delta": 1.0}, [50, 50.6, 51.2, 51.3, 52.3], 5),  # gains add up
        ({"patience": None}, [50, 40, 30], 3),
        ({}, [math.nan, math.nan, 50], 2),
        ({}, [50, math.nan, 51, 50, 49], 5),
        ({"metric": "loss"}, [2, 1, 1.5, 1.1, 0], 4),
        ({"metric": "loss", "min_delta": 0.1}, [2, 1.95, 1.91, 1], 3),
    ],
)
def test_patience(options, values, expected):
    patience = Patience(EarlyStopping(**{"patience": 2, **options}))
    done = 0
    for value in values:
        if not patience.is_exhausted:
            name = f"ema_{patience.options.metric}"
            patience.update({"val_top1": 0.0, "val_loss": 0.0, name: value})
            done += 1
    assert done == expected


def test_without_an_ema_the_model_is_judged():
    patience = Patience(EarlyStopping(patience=1))
    patience.update({"val_top1": 50.0})
    assert patience.best == 50


def test_a_run_stops_at_the_expected_epoch(stopping, scores, caplog):
    caplog.set_level("INFO")
    scores(50, 60, 55, 60, 90)
    assert epochs(stopping()) == 4
    assert "stopped early: the best validation top1 is that of epoch 2 of 4; " in caplog.text


def test_a_resumed_run_remembers_its_patience(stopping, scores):
    scores(50, 60, 55, 60, 90)
    assert epochs(stopping(epochs=3)) == 3  # the run ends within its patience
    assert epochs(stopping()) == 4
    assert epochs(stopping()) == 4  # stopped early, it is not trained again
    assert epochs(stopping(epochs=5, patience=3)) == 5  # with more patience, it continues


def test_another_metric_starts_again(stopping, scores):
    scores(50, 40, name="ema_loss")
    assert epochs(stopping(epochs=2)) == 2
    trainer = build(stopping(metric="loss"))
    trainer.resume(trainer.last)
    assert (trainer.patience.best, trainer.patience.waited) == (None, 0)


def test_other_validation_data_start_again(config, stopping, scores):
    scores(50, 40)
    cfg = stopping(epochs=2)
    assert epochs(cfg) == 2
    trainer = build(cfg)
    trainer.resume(trainer.last)
    assert (trainer.patience.best, trainer.patience.waited) == (50, 1)
    trainer = build(cfg.model_copy(update={"data": cfg.data.model_copy(update={"crop_pct": 0.5})}))
    trainer.resume(trainer.last)
    assert (trainer.patience.best, trainer.patience.waited) == (None, 0)


def test_other_weights_start_again(stopping, scores):
    scores(50, 40)
    cfg = stopping(epochs=2)
    assert cfg.ema_decay is not None
    assert epochs(cfg) == 2
    trainer = build(cfg.model_copy(update={"ema_decay": None}))
    changes = trainer.resume(trainer.last)
    assert (trainer.patience.best, trainer.patience.waited) == (None, 0)
    assert changes[-1] == "early stopping counts from 0: it no longer judges the EMA weights"


def test_without_early_stopping_checkpoints_do_not_mention_it(config):
    assert "early_stopping" not in build(config()).state_dict()
