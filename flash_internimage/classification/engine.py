"""The training loop."""

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Sequence
from typing import cast

import torch
from timm.utils.distributed import distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from tqdm import tqdm

from ..nested import flatten
from .data import (
    TooManyCorruptImages,
    balanced_weights,
    build_mixup,
    class_to_index,
    eval_transform,
    set_epoch,
    start,
)
from .data.datasets import ImageSet
from .distillation import build_distillation
from .evaluation import evaluate
from .interruption import Interrupted
from .optim import build_criterion
from .precision import autocast
from .processes import all_agree, fail_together, maximum, raise_once
from .random_numbers import seed_everything, set_rng_state
from .report import Metrics, save_curves, save_predictions, speed
from .state import Diverged, Totals, TrainingState

_logger = logging.getLogger(__name__)


class Trainer(TrainingState):
    """Training run: its state, and the loop over epochs and optimizer steps.

    An optimizer step uses `accumulation_steps` batches. At the start of each epoch, the random
    number generators are seeded from the seed, the epoch and the rank, so that a run resumed there
    repeats exactly.
    """

    def __post_init__(self, load_initial: bool) -> None:
        super().__post_init__(load_initial)
        self.mixup = build_mixup(self.cfg.augmentation, self.cfg.model.num_classes)
        self.signal_number = 0
        self.parallel: nn.Module = self.model
        if self.cfg.model.compile:
            # Batches have few shapes, one per image size, and evaluation is not compiled. By
            # default, a second one would be compiled for symbolic shapes, which fails on the CPU
            # (pytorch#185510).
            self.parallel = torch.compile(self.model, dynamic=False)  # type: ignore[assignment]
        if self.world_size > 1:
            device_ids = [self.device] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                self.parallel, device_ids=device_ids, broadcast_buffers=False
            )
        with fail_together(self.device):
            self._build_loss()
        self.set_training_mode()

    def _build_loss(self) -> None:
        cfg, dataset = self.cfg, cast(ImageSet, self.train_loader.dataset)
        weights: Sequence[float] | None
        if cfg.class_weights == "balanced":
            weights = balanced_weights(dataset, cfg.model.num_classes)
        else:
            weights = cfg.class_weights
        self.criterion = build_criterion(cfg, weights).to(self.device)
        names = self.names if class_to_index(dataset) else None
        self.distillation = build_distillation(
            self.parallel, self.criterion, cfg, names, self.device
        )

    def set_training_mode(self) -> None:
        """Set the model to training mode, except for its frozen parts."""
        self.parallel.train()
        for module in self.frozen:
            module.eval()

    def fit(self) -> None:
        """Train until the last epoch, or until early stopping.

        Raises:
            Interrupted: If a signal arrived; last.pth contains the state.
            Diverged: If `max_nonfinite` consecutive steps were skipped or a weight is not finite.
            TooManyCorruptImages: If more images than `data.max_corrupt` cannot be read.
        """
        with contextlib.ExitStack() as stack:
            metrics = None
            with fail_together(self.device):
                if self.rank == 0:
                    opened = Metrics(
                        self.output,
                        self.epoch,
                        self.cfg.loggers,
                        flatten(self.cfg.model_dump(mode="json")),
                        resumed=self.epoch + self.update > 0,
                    )
                    metrics = stack.enter_context(contextlib.closing(opened))
            while self.epoch < self.cfg.schedule.epochs and not self.patience.is_exhausted:
                self._fit_epoch(metrics)
                self._stop_on_signal()
        if self.patience.is_exhausted and self.rank == 0:
            _logger.info(
                "stopped early: the best validation %s is that of epoch %d of %d; to continue, "
                "resume with a higher early_stopping.patience",
                self.cfg.early_stopping.metric, self.epoch - self.patience.waited, self.epoch,
            )  # fmt: skip

    def _fit_epoch(self, metrics: Metrics | None) -> None:
        """Train, validate and save; only the first process has `metrics`."""
        self.train_epoch()
        with fail_together(self.device):
            self.check_weights()
        row = self.validate_epoch()
        top1 = row["ema_top1"] if self.ema is not None else row["val_top1"]
        with fail_together(self.device):
            if metrics is not None:
                metrics.add(row)
                _logger.info(
                    "epoch %d/%d  loss %.4f  top-1 %.2f %%  top-5 %.2f %%%s  %s images/s",
                    row["epoch"], self.cfg.schedule.epochs, row["train_loss"], row["val_top1"],
                    row["val_top5"], f"  EMA top-1 {top1:.2f} %" if self.ema is not None else "",
                    speed(row["images_per_second"]),
                )  # fmt: skip
        self.epoch, self.update, self.totals = self.epoch + 1, 0, Totals()
        self.patience.update(row)
        extra = []
        if top1 > self.best_top1:
            self.best_top1 = top1
            extra.append("best.pth")
        every = self.cfg.checkpoints.every_epochs
        if every and self.epoch % every == 0:
            extra.append(f"epoch_{self.epoch}.pth")
        self.save(*extra)

    def train_epoch(self) -> None:
        """Train for one epoch, or for the rest of an epoch that was resumed."""
        self.set_training_mode()
        seed_everything(self.cfg.seed, self.epoch, self.rank)
        set_epoch(self.train_loader, self.epoch)
        batches = start(self.train_loader)
        accumulation = self.cfg.accumulation_steps
        if self.update:  # skip the batches of steps that are done
            skip = self.update * accumulation
            with fail_together(self.device):
                next(itertools.islice(batches, skip - 1, skip), None)
            set_rng_state(self.resumed_rng)
        bar = tqdm(
            desc=f"epoch {self.epoch + 1}/{self.cfg.schedule.epochs}",
            total=self.updates_per_epoch,
            initial=self.update,
            disable=None if self.rank == 0 else True,
            leave=False,
        )
        every = self.cfg.checkpoints.every_updates
        images = self.cfg.batch_size * accumulation * self.world_size
        logged = time.monotonic()  # without a terminal, the log replaces the bar
        with bar:
            while self.update < self.updates_per_epoch:
                began = time.perf_counter()
                with fail_together(self.device):
                    group = list(itertools.islice(batches, accumulation))
                if self._is_exhausted(group):
                    break
                loss = self.train_update(group)
                seconds = time.perf_counter() - began
                self._count(loss, seconds)
                self.update += 1
                self.scheduler.step_update(self.epoch * self.updates_per_epoch + self.update - 1)
                bar.set_postfix(
                    loss=f"{loss:.4f}",
                    lr=f"{self._lr():.2e}",
                    images_per_s=speed(images / seconds),
                    refresh=False,
                )
                bar.update()
                if bar.disable and self.rank == 0 and time.monotonic() - logged > 60:
                    logged = time.monotonic()
                    _logger.info(
                        "epoch %d/%d  step %d/%d  loss %.4f  lr %.2e  %s images/s",
                        self.epoch + 1, self.cfg.schedule.epochs, self.update,
                        self.updates_per_epoch, loss, self._lr(), speed(images / seconds),
                    )  # fmt: skip
                if every and self.update % every == 0 and self.update < self.updates_per_epoch:
                    self.save()
                self._stop_on_signal()

    def _is_exhausted(self, group: list) -> bool:
        """Return whether any process has run out of images, as streams can.

        Raises:
            TooManyCorruptImages: If there are not enough for the first optimizer step.
        """
        is_short = len(group) < self.cfg.accumulation_steps
        if isinstance(self.train_loader.dataset, IterableDataset):
            is_short = not all_agree(not is_short, self.device)
        if is_short and not self.update:
            raise_once(
                TooManyCorruptImages("the training stream ended before the first optimizer step")
            )
        if is_short and self.rank == 0:
            _logger.warning(
                "epoch %d: the training stream ended after %d of %d optimizer steps",
                self.epoch + 1, self.update, self.updates_per_epoch,
            )  # fmt: skip
        return is_short

    def train_update(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """Run one optimizer step.

        Args:
            batches: Images (N, 3, H, W) and labels (N,) of each accumulation step.

        Returns:
            Mean loss, or NaN if the step was skipped because the loss or its gradient is not
            finite.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        total = 0.0
        for i, (images, targets) in enumerate(batches):
            images, targets = images.to(self.device), targets.to(self.device)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            sync: contextlib.AbstractContextManager = contextlib.nullcontext()
            if isinstance(self.parallel, DistributedDataParallel) and i + 1 < len(batches):
                sync = self.parallel.no_sync()
            with sync:
                with autocast(self.device, self.amp):
                    loss = self._loss(images, targets) / len(batches)
                if not all_agree(bool(torch.isfinite(loss)), self.device):
                    return self._skip_update(buffers)
                self.scaler.scale(loss).backward()
            total += loss.item()
        self.scaler.unscale_(self.optimizer)
        clip = self.cfg.optimizer.clip_grad or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        # A scaler handles overflows itself: it skips the step and reduces the scale.
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            return self._skip_update(buffers)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.world_size > 1:
            # Processes see different images. With equal batch-norm statistics after every step,
            # any process may save and validate, and a resumed run continues as if it never stopped.
            distribute_bn(self.model, self.world_size, reduce=True)
        if self.ema is not None:
            self.ema.update(self.model)
        return total

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        if self.distillation is not None:
            return self.distillation(images, targets)["loss"]
        return self.criterion(self.parallel(images), targets)

    def _skip_update(self, buffers: list[Tensor]) -> float:
        self.optimizer.zero_grad()
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        return math.nan

    def _count(self, loss: float, seconds: float) -> None:
        finite = math.isfinite(loss)
        self.totals = self.totals.plus(loss, seconds)
        self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1
        if finite:
            return
        if self.rank == 0:
            _logger.warning(
                "epoch %d, step %d: the loss or its gradient is not finite, step skipped",
                self.epoch + 1, self.update + 1,
            )  # fmt: skip
        if self.nonfinite_in_a_row >= self.cfg.max_nonfinite:
            error = Diverged(
                f"the loss or its gradient was not finite in {self.nonfinite_in_a_row} consecutive "
                f"optimizer steps (max_nonfinite). {self.advice()}"
            )
            raise_once(error)

    def validate_epoch(self) -> dict[str, float]:
        """Evaluate the model and its EMA, and return the metrics of the epoch just trained."""
        result = evaluate(self.model, self.val_loader, self.device, self.amp)
        totals = self.totals
        updates = totals.finite + totals.skipped
        images = self.cfg.batch_size * self.cfg.accumulation_steps * self.world_size
        row = {
            "epoch": self.epoch + 1,
            "lr": self._lr(),
            "train_loss": totals.loss / totals.finite if totals.finite else math.nan,
            "val_loss": result.loss,
            "val_top1": result.top1,
            "val_top5": result.top5,
        }
        if self.ema is not None:
            ema = evaluate(self.ema.module, self.val_loader, self.device, self.amp)
            row |= {"ema_loss": ema.loss, "ema_top1": ema.top1, "ema_top5": ema.top5}
        return row | {
            "images_per_second": images * updates / totals.seconds if updates else 0.0,
            "skipped_updates": totals.skipped,
            "corrupt_images": getattr(self.train_loader.dataset, "corrupt", 0) + result.corrupt,
        }

    def report(self) -> None:
        """Draw curves.png and, with the EMA weights if there are any, predictions.png."""
        save_curves(self.output / "metrics.csv", self.output / "curves.png")
        model = self.ema.module if self.ema is not None else self.model
        self.val_set.transform = eval_transform(self.cfg.data)
        try:
            save_predictions(
                model, self.val_set, self.cfg.data, self.names, self.output / "predictions.png"
            )
        except TooManyCorruptImages as error:  # streams that cannot be read twice
            _logger.warning("cannot draw predictions.png: %s", error)

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _stop_on_signal(self) -> None:
        number = maximum(self.signal_number, self.device)  # all stop after the same step
        if number:
            self.save()
            raise Interrupted(number)
