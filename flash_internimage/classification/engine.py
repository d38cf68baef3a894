"""The training loop."""

import contextlib
import itertools
import logging
import math
import time
from operator import index
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from timm.utils.distributed import distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from tqdm import tqdm

from ..checkpoint import load_checkpoint, require_fit, save_atomically
from .config import Config
from .data import (
    TooManyCorruptImages,
    build_dataset,
    build_mixup,
    class_names,
    class_to_index,
    eval_transform,
    match_classes,
    set_epoch,
    start,
    train_loader,
    val_loader,
    warn_of_shared_images,
)
from .evaluation import autocast, evaluate, resolve_amp
from .interruption import Interrupted
from .model import build_model, check_model, find_not_finite
from .optim import build_criterion, build_optimizer, build_scheduler
from .processes import all_agree, fail_together, gather, maximum, raise_once
from .report import Metrics, save_curves, save_predictions, speed
from .state import (
    Totals,
    changed_settings,
    check_entries,
    check_settings,
    describe_other_classes,
    flatten,
    restore_optimizer,
    rng_state,
    seed_everything,
    set_rng_state,
    validates_alike,
)

_logger = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """Raised if too many consecutive updates have no finite loss, or the weights are not finite."""


class Trainer:
    """Training run: everything that a checkpoint contains, and the loop over epochs and updates.

    An update is one optimizer step on `accumulation_steps` batches. At the start of each epoch, the
    random number generators are seeded from the seed, the epoch and the rank, so that a run resumed
    there repeats exactly.

    Args:
        cfg: Configuration of the run.
        device: Device of this process.
        rank: Rank of this process.
        world_size: Number of processes.
        load_initial: Load `model.initial_checkpoint`, which a resumed run does not need.
    """

    def __init__(
        self,
        cfg: Config,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        load_initial: bool = True,
    ) -> None:
        self.cfg, self.device, self.rank, self.world_size = cfg, device, rank, world_size
        self.amp = resolve_amp(cfg.amp, device)
        self.output = Path(cfg.output)
        self.epoch, self.update = 0, 0  # next epoch, and next update within it
        self.totals = Totals()
        self.best_top1 = -math.inf
        self.nonfinite_in_a_row = 0
        self.signal_number = 0
        self.resumed_rng: dict | None = None  # set when resuming within an epoch
        seed_everything(cfg.seed)
        with fail_together(device):
            self._build_data()
            self._build_model(load_initial)
        # All batches have the same shape, and evaluation is not compiled. By default, a second run
        # in the process would compile for symbolic shapes and fail on the CPU (pytorch#185510).
        self.parallel = (
            torch.compile(self.model, dynamic=False) if cfg.model.compile else self.model
        )
        if world_size > 1:
            device_ids = [device] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                self.parallel, device_ids=device_ids, broadcast_buffers=False
            )

    def _build_data(self) -> None:
        data = self.cfg.data
        train_set = build_dataset(data, data.train_split, True, self.cfg.batch_size)
        self.val_set = build_dataset(data, data.val_split, False, self.cfg.val_batch_size)
        self.names = class_names(train_set, self.cfg.model.num_classes)
        if known := class_to_index(train_set):
            source = f"data.train_split={data.train_split}"
            match_classes(self.val_set, sorted(known, key=known.get), source)
        if self.rank == 0:
            warn_of_shared_images(data, train_set, self.val_set)
        self.train_loader = train_loader(
            train_set, self.cfg, self.device, self.rank, self.world_size
        )
        self.val_loader = val_loader(
            self.val_set, data, self.cfg.val_batch_size, self.device, self.rank, self.world_size
        )
        self.mixup = build_mixup(self.cfg.augmentation, self.cfg.model.num_classes)
        self.updates_per_epoch = len(self.train_loader) // self.cfg.accumulation_steps

    def _build_model(self, load_initial: bool) -> None:
        cfg = self.cfg
        options = cfg.model
        if not load_initial:
            options = options.model_copy(update={"initial_checkpoint": None, "class_map": None})
        named = class_to_index(self.train_loader.dataset)
        self.model = build_model(options, self.names if named else None).to(self.device)
        check_model(self.model, cfg.data.image_size, cfg.model.num_classes)
        self.criterion = build_criterion(cfg)
        self.optimizer = build_optimizer(self.model, cfg, self.world_size)
        self.scheduler = build_scheduler(
            self.optimizer, cfg, self.world_size, self.updates_per_epoch
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        self.ema = ModelEmaV3(self.model, cfg.ema_decay) if cfg.ema_decay is not None else None

    # --- state -------------------------------------------------------------------------------

    @property
    def last(self) -> Path:
        """Path of the last checkpoint."""
        return self.output / "last.pth"

    def state_dict(self) -> dict:
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
            self._check_weights()
            if self.rank == 0:
                for name in (*extra, self.last.name):
                    save_atomically(state, self.output / name)

    def _find_not_finite(self) -> str | None:
        models = (self.model, *([self.ema.module] if self.ema is not None else []))
        return next(filter(None, map(find_not_finite, models)), None)

    def _check_weights(self) -> None:
        if name := self._find_not_finite():
            raise Diverged(f"{name} is not finite after an update. {self._advice()}")

    def resume(self, path: Path) -> list[str]:
        """Restore the state from a checkpoint of the same model and classes.

        Args:
            path: Checkpoint written by :meth:`save`.

        Returns:
            A line for each setting that has changed since.

        Raises:
            ValueError: If the checkpoint is damaged or from another kind of run, or a fixed setting
                has changed.
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
            raise ValueError(f"it is from epoch {epoch}, update {update} of {updates}")
        before, now = flatten(state["config"]), flatten(self.cfg.model_dump(mode="json"))
        check_settings(before, now, within_epoch=update > 0)
        if difference := describe_other_classes(state["classes"], self.names):
            raise ValueError(
                f"the class folders of data.root={self.cfg.data.root} are not those of the "
                f"checkpoint ({difference})"
            )
        epochs = self.cfg.schedule.epochs
        if epoch + (update > 0) > epochs:
            raise ValueError(
                f"schedule.epochs must be at least {epoch + (update > 0)}, the number of epochs "
                f"that are done or begun, got {epochs}"
            )
        rng = list(state["rng"])
        if update and (updates, len(rng)) != (self.updates_per_epoch, self.world_size):
            raise ValueError(
                f"it stopped within an epoch of {updates} updates on {len(rng)} processes, this "
                f"run has {self.updates_per_epoch} on {self.world_size}"
            )
        require_fit(self.model.state_dict(), state["model"])
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
        best = float(state["best_top1"])
        is_valid = best <= 100 and validates_alike(before, now)
        self.best_top1 = best if is_valid else -math.inf
        if update:
            set_rng_state(rng[self.rank])  # only a check, as train_epoch sets it again
            self.resumed_rng = rng[self.rank]
        # This sets the learning rate of the next update from the schedule of this run.
        if done := epoch * self.updates_per_epoch + update:
            self.scheduler.step_update(done - 1)
        return changed_settings(before, now)

    # --- the loop ----------------------------------------------------------------------------

    def fit(self) -> None:
        """Train until the last epoch.

        Raises:
            Interrupted: If a signal arrived; last.pth contains the state.
            Diverged: If `max_nonfinite` consecutive updates were skipped or a weight is not finite.
            TooManyCorruptImages: If more images than `data.max_corrupt` cannot be read.
        """
        with contextlib.ExitStack() as stack:
            metrics = None
            with fail_together(self.device):
                if self.rank == 0:
                    metrics = stack.enter_context(
                        contextlib.closing(Metrics(self.output, self.epoch))
                    )
            while self.epoch < self.cfg.schedule.epochs:
                self._fit_epoch(metrics)
                self._stop_if_asked()

    def _fit_epoch(self, metrics: Metrics | None) -> None:
        """Train, validate and save; only the first process has `metrics`."""
        self.train_epoch()
        with fail_together(self.device):
            self._check_weights()
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
        self.parallel.train()
        seed_everything(self.cfg.seed, self.epoch, self.rank)
        set_epoch(self.train_loader, self.epoch)
        batches = start(self.train_loader)
        accumulation = self.cfg.accumulation_steps
        if self.update:  # skip the batches of updates that are done
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
                if self._ends(group):
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
                        "epoch %d/%d  update %d/%d  loss %.4f  lr %.2e  %s images/s",
                        self.epoch + 1, self.cfg.schedule.epochs, self.update,
                        self.updates_per_epoch, loss, self._lr(), speed(images / seconds),
                    )  # fmt: skip
                if every and self.update % every == 0 and self.update < self.updates_per_epoch:
                    self.save()
                self._stop_if_asked()

    def _ends(self, group: list) -> bool:
        """Return whether any process has run out of images, as can happen with streams.

        Raises:
            TooManyCorruptImages: If there are too few for the first update.
        """
        is_short = len(group) < self.cfg.accumulation_steps
        if isinstance(self.train_loader.dataset, IterableDataset):
            is_short = not all_agree(not is_short, self.device)
        if is_short and not self.update:
            raise_once(TooManyCorruptImages("the training images ended before the first update"))
        if is_short and self.rank == 0:
            _logger.warning(
                "epoch %d: the training images ended after %d of %d updates",
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
            accumulating = self.world_size > 1 and i + 1 < len(batches)
            with self.parallel.no_sync() if accumulating else contextlib.nullcontext():
                with autocast(self.device, self.amp):
                    loss = self.criterion(self.parallel(images), targets) / len(batches)
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
            # Processes see different images. With equal batch-norm statistics after every update,
            # any process may save and validate, and a resumed run continues as if it never stopped.
            distribute_bn(self.model, self.world_size, reduce=True)
        if self.ema is not None:
            self.ema.update(self.model)
        return total

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
                "epoch %d, update %d: the loss or its gradient is not finite, update skipped",
                self.epoch + 1, self.update + 1,
            )  # fmt: skip
        if self.nonfinite_in_a_row >= self.cfg.max_nonfinite:
            error = Diverged(
                f"{self.nonfinite_in_a_row} updates in a row had no finite loss or gradient "
                f"(max_nonfinite). {self._advice()}"
            )
            raise_once(error)

    def _advice(self) -> str:
        return (
            "Try more schedule.warmup_epochs, a lower optimizer.lr, a smaller optimizer.clip_grad "
            f"(now {self.cfg.optimizer.clip_grad}), or amp=bf16 or amp=off (now {self.amp})"
        )

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
            _logger.warning("predictions.png is not drawn: %s", error)

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _stop_if_asked(self) -> None:
        number = maximum(self.signal_number, self.device)  # all stop after the same update
        if number:
            self.save()
            raise Interrupted(number)
