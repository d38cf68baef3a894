"""Training state: the contents of checkpoints, saving and resuming."""

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3

from ..checkpoints import check_state_dict, load_checkpoint, save_atomically
from ..nested import flatten
from .config import Config
from .data import (
    build_dataset,
    class_names,
    class_to_index,
    match_classes,
    train_loader,
    val_loader,
    warn_of_shared_images,
)
from .data.classes import describe_other_classes
from .early_stopping import Patience
from .freezing import freeze
from .model import build_model, check_model, find_not_finite
from .optim import build_optimizer, build_scheduler
from .precision import resolve_amp
from .processes import fail_together, gather, rank, world_size
from .random_numbers import rng_state, seed_everything, set_rng_state
from .resume_checks import (
    changed_settings,
    check_entries,
    check_settings,
    restore_optimizer,
    validates_alike,
)


class Diverged(RuntimeError):
    """Raised if too many consecutive steps have no finite loss, or the weights are not finite."""


class Totals(NamedTuple):
    """Running totals of the current epoch.

    Attributes:
        loss: Sum of the finite losses.
        finite: Number of optimizer steps with a finite loss.
        skipped: Number of optimizer steps without a finite loss, which were skipped.
        seconds: Total time of the steps.
    """

    loss: float = 0.0
    finite: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def plus(self, loss: float, seconds: float) -> "Totals":
        """Return the totals after another step."""
        if not math.isfinite(loss):
            return self._replace(skipped=self.skipped + 1, seconds=self.seconds + seconds)
        return Totals(self.loss + loss, self.finite + 1, self.skipped, self.seconds + seconds)


@dataclass(eq=False, repr=False)
class TrainingState:
    """Data, model, optimizer and progress of a training run, which checkpoints save and restore.

    Args:
        cfg: Configuration of the run.
        device: Device of this process.
        load_initial: Load `model.initial_checkpoint`, which a resumed run does not need.
    """

    cfg: Config
    device: torch.device
    load_initial: InitVar[bool] = True

    def __post_init__(self, load_initial: bool) -> None:
        self.rank, self.world_size = rank(), world_size()
        self.amp = resolve_amp(self.cfg.amp, self.device)
        self.output = Path(self.cfg.output)
        self.epoch, self.update = 0, 0  # next epoch, and next step within it
        self.totals = Totals()
        self.best_top1 = -math.inf
        self.nonfinite_in_a_row = 0
        self.resumed_rng: dict[str, Any] = {}  # set when resuming within an epoch
        self.patience = Patience(self.cfg.early_stopping)
        seed_everything(self.cfg.seed)
        with fail_together(self.device):
            self._build_data()
            self._build_model(load_initial)

    def _build_data(self) -> None:
        data = self.cfg.data
        train_set = build_dataset(data, data.train_split, True, self.cfg.batch_size)
        self.val_set = build_dataset(data, data.val_split, False, self.cfg.val_batch_size)
        self.names = class_names(train_set, self.cfg.model.num_classes)
        if known := class_to_index(train_set):
            source = f"data.train_split={data.train_split}"
            match_classes(self.val_set, sorted(known, key=known.__getitem__), source)
        if self.rank == 0:
            warn_of_shared_images(data, train_set, self.val_set)
        self.train_loader = train_loader(
            train_set, self.cfg, self.device, self.rank, self.world_size
        )
        self.val_loader = val_loader(
            self.val_set, data, self.cfg.val_batch_size, self.device, self.rank, self.world_size
        )
        self.updates_per_epoch = len(self.train_loader) // self.cfg.accumulation_steps

    def _build_model(self, load_initial: bool) -> None:
        cfg = self.cfg
        options = cfg.model if load_initial else cfg.model.without_initial()
        named = class_to_index(self.train_loader.dataset)
        self.model = build_model(options, self.names if named else None).to(self.device)
        check_model(self.model, cfg.data.image_size, cfg.model.num_classes)
        for size in cfg.data.image_sizes:
            check_model(self.model, size, cfg.model.num_classes, setting="data.image_sizes")
        self.frozen = freeze(self.model, cfg.model.freeze)
        self.optimizer = build_optimizer(self.model, cfg, self.world_size)
        self.scheduler = build_scheduler(
            self.optimizer, cfg, self.world_size, self.updates_per_epoch
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        self.ema = ModelEmaV3(self.model, cfg.ema_decay) if cfg.ema_decay is not None else None

    @property
    def last(self) -> Path:
        """Path of the last checkpoint."""
        return self.output / "last.pth"

    def state_dict(self) -> dict[str, Any]:
        """Return the contents of a checkpoint; every process must call this."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "update": self.update,
            "updates_per_epoch": self.updates_per_epoch,
            "totals": tuple(self.totals),
            "best_top1": self.best_top1,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "rng": gather(rng_state()),
            "classes": self.names,
            "config": self.cfg.model_dump(mode="json"),
        }
        if self.ema is not None:
            state["model_ema"] = self.ema.module.state_dict()
        if self.cfg.early_stopping.patience is not None:
            state["early_stopping"] = self.patience.state_dict()
        return state

    def save(self, *extra: str) -> None:
        """Save the state under additional names, and then as last.pth.

        In this order, a run that is killed in between resumes from the previous last.pth and writes
        the other files again.

        Args:
            *extra: Names of additional files in the output folder.

        Raises:
            Diverged: If a weight is not finite.
            OSError: If a file cannot be written; the previous last.pth then remains.
        """
        state = self.state_dict()
        with fail_together(self.device):
            self.check_weights()
            if self.rank == 0:
                for name in (*extra, self.last.name):
                    save_atomically(state, self.output / name)

    def _find_not_finite(self) -> str | None:
        models = (self.model, *([self.ema.module] if self.ema is not None else []))
        return next(filter(None, map(find_not_finite, models)), None)

    def check_weights(self) -> None:
        """Check that all weights are finite.

        Raises:
            Diverged: If a weight is not finite.
        """
        if name := self._find_not_finite():
            raise Diverged(f"{name} is not finite after an optimizer step. {self.advice()}")

    def resume(self, path: Path) -> list[str]:
        """Restore the state from a checkpoint of the same model and classes.

        Args:
            path: Checkpoint written by :meth:`save`.

        Returns:
            A line for each setting that has changed since.

        Raises:
            ValueError: If the checkpoint is damaged or not from training, or a fixed setting has
                changed.
        """
        state = load_checkpoint(path)
        try:
            check_entries(state)
            changes = self._restore(state)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            message = " ".join(f"{error!s:.2000}".split())
            raise ValueError(f"cannot resume from {path}: {kind}{message}") from error
        if path.resolve().parent != self.output.resolve():
            self.best_top1 = -math.inf  # its best.pth is in another folder
        return changes

    def _restore(self, state: dict) -> list[str]:
        epoch, update, updates = map(
            index, (state["epoch"], state["update"], state["updates_per_epoch"])
        )
        if epoch < 0 or not 0 <= update <= updates:
            raise ValueError(
                f"its progress must be valid, got epoch {epoch}, step {update} of {updates}"
            )
        now = flatten(self.cfg.model_dump(mode="json"))
        # Checkpoints of earlier versions lack settings that were added since.
        before = flatten(Config().model_dump(mode="json")) | flatten(state["config"])
        check_settings(before, now, within_epoch=update > 0)
        if difference := describe_other_classes(state["classes"], self.names):
            raise ValueError(
                f"the class folders of data.root={self.cfg.data.root} must be those of the "
                f"checkpoint, got {difference}"
            )
        epochs = self.cfg.schedule.epochs
        if epoch + (update > 0) > epochs:
            raise ValueError(
                f"schedule.epochs must be at least {epoch + (update > 0)}, the number of epochs "
                f"finished or started, got {epochs}"
            )
        rng = list(state["rng"])
        if update and (updates, len(rng)) != (self.updates_per_epoch, self.world_size):
            raise ValueError(
                f"it was saved within an epoch of {updates} optimizer steps on {len(rng)} "
                f"processes, got {self.updates_per_epoch} optimizer steps on {self.world_size} "
                "processes"
            )
        check_state_dict(self.model.state_dict(), state["model"])
        self.model.load_state_dict(state["model"])
        restore_optimizer(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:  # empty without fp16
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:  # enabled on resuming, it starts from the current weights
            self.ema.module.load_state_dict(state.get("model_ema", state["model"]))
        if broken := self._find_not_finite():
            raise ValueError(f"{broken} is not finite")
        self.epoch, self.update = epoch, update
        loss, finite, skipped, seconds = state["totals"]
        self.totals = Totals(float(loss), int(finite), int(skipped), float(seconds))
        self.nonfinite_in_a_row = int(state["nonfinite_in_a_row"])
        best, are_comparable = float(state["best_top1"]), validates_alike(before, now)
        self.best_top1 = best if best <= 100 and are_comparable else -math.inf
        restart = self._restore_patience(state, before) if are_comparable else []
        if update:
            set_rng_state(rng[self.rank])  # only a check, as train_epoch sets it again
            self.resumed_rng = rng[self.rank]
        # This sets the learning rate of the next step from the schedule of this run.
        if done := epoch * self.updates_per_epoch + update:
            self.scheduler.step_update(done - 1)
        return [*changed_settings(before, now), *restart]

    def _restore_patience(self, state: dict, before: Mapping[str, Any]) -> list[str]:
        """Restore early stopping, or return why it counts from 0."""
        if "early_stopping" not in state or self.cfg.early_stopping.patience is None:
            return []
        if (before["ema_decay"] is None) != (self.ema is None):
            change = "no longer" if self.ema is None else "now"
            return [f"early stopping counts from 0: it {change} judges the EMA weights"]
        self.patience.load_state_dict(state["early_stopping"])
        return []

    def advice(self) -> str:
        """Return suggestions for a run that diverges."""
        return (
            "Try more schedule.warmup_epochs, a lower optimizer.lr, a smaller optimizer.clip_grad "
            f"(now {self.cfg.optimizer.clip_grad}), or amp=bf16 or amp=off (now {self.amp})"
        )
