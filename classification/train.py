"""Trains a classifier.

python -m classification.train CONFIG.yaml [key=value ...] [--resume auto|FILE]
torchrun --nproc-per-node 8 -m classification.train CONFIG.yaml
"""

import argparse
import contextlib
import itertools
import logging
import math
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import yaml
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from flash_internimage.checkpoint import check_optimizer, load_checkpoint, save_atomically

from .config import Config, ConfigError, check_output, load_config
from .data import (
    TooManyCorruptImages,
    build_dataset,
    build_mixup,
    class_names,
    eval_transform,
    set_epoch,
    start,
    train_loader,
    val_loader,
)
from .model import build_model, check_model, pick_device
from .optim import build_optimizer, build_scheduler
from .report import Metrics, save_curves, save_predictions
from .validate import autocast, evaluate

_logger = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """Too many updates in a row without a finite loss."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state has been saved."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def build_criterion(cfg: Config) -> nn.Module:
    if cfg.augmentation.mixes:
        return SoftTargetCrossEntropy()
    if cfg.augmentation.label_smoothing > 0:
        return LabelSmoothingCrossEntropy(cfg.augmentation.label_smoothing)
    return nn.CrossEntropyLoss()


def seed_everything(*numbers: int) -> None:
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """The state of every random number generator, in types that a checkpoint may hold."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    _, keys, position, *_ = state["numpy"]
    if len(keys) != 624 or not 0 <= position <= 624:  # numpy reads memory at any position
        raise ValueError(f"numpy's random state has {len(keys)} keys and position {position}")
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class Totals(NamedTuple):
    """Of the updates of an epoch so far."""

    loss: float = 0.0
    finite: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def plus(self, loss: float, seconds: float) -> "Totals":
        if not math.isfinite(loss):
            return self._replace(skipped=self.skipped + 1, seconds=self.seconds + seconds)
        return Totals(self.loss + loss, self.finite + 1, self.skipped, self.seconds + seconds)


def _flat(config: dict, prefix: str = "") -> dict:
    """Nested sections as one level of dotted keys."""
    flat = {}
    for key, value in config.items():
        is_section = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return flat


class Trainer:
    """One training run: everything that a checkpoint holds, and the loop over epochs and updates.

    An update is one optimizer step on `accumulation_steps` batches. Each epoch starts from random
    numbers that its seed, number and rank determine, so a run resumed there repeats itself.
    """

    def __init__(self, cfg: Config, device: torch.device, rank: int = 0, world_size: int = 1):
        self.cfg, self.device, self.rank, self.world_size = cfg, device, rank, world_size
        self.output = Path(cfg.output)
        self.epoch, self.update = 0, 0  # the next ones to do; update counts within the epoch
        self.totals = Totals()
        self.best_top1 = -math.inf
        self.nonfinite_in_a_row = 0
        self.signal_number = 0
        self.resumed_rng: dict | None = None  # of a run resumed within an epoch
        seed_everything(cfg.seed)
        self._build_data()
        self._build_model()

    def _build_data(self) -> None:
        data = self.cfg.data
        train_set = build_dataset(data, data.train_split, True, self.cfg.batch_size)
        self.val_set = build_dataset(data, data.val_split, False, self.cfg.val_batch_size)
        self.names = class_names(train_set, self.cfg.model.num_classes)
        if class_names(self.val_set, self.cfg.model.num_classes) != self.names:
            raise ConfigError(
                f"the class folders of data.train_split={data.train_split} and "
                f"data.val_split={data.val_split} differ"
            )
        self.train_loader = train_loader(
            train_set, self.cfg, self.device, self.rank, self.world_size
        )
        self.val_loader = val_loader(
            self.val_set, data, self.cfg.val_batch_size, self.device, self.rank, self.world_size
        )
        self.mixup = build_mixup(self.cfg.augmentation, self.cfg.model.num_classes)
        self.updates_per_epoch = len(self.train_loader) // self.cfg.accumulation_steps

    def _build_model(self) -> None:
        cfg = self.cfg
        self.model = build_model(cfg.model).to(self.device)
        check_model(self.model, cfg.data.image_size, cfg.model.num_classes)
        self.criterion = build_criterion(cfg)
        self.optimizer = build_optimizer(self.model, cfg, self.world_size)
        self.scheduler = build_scheduler(
            self.optimizer, cfg, self.world_size, self.updates_per_epoch
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.amp == "fp16")
        self.ema = ModelEmaV3(self.model, cfg.ema_decay) if cfg.ema_decay is not None else None
        self.parallel = torch.compile(self.model) if cfg.model.compile else self.model
        if self.world_size > 1:
            device_ids = [self.device] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                self.parallel, device_ids=device_ids, broadcast_buffers=False
            )

    # --- state -------------------------------------------------------------------------------

    @property
    def last(self) -> Path:
        return self.output / "last.pth"

    def state_dict(self) -> dict:
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
            "rng": self._all_rng_states(),
            "classes": self.names,
            "config": self.cfg.model_dump(mode="json"),
        }
        if self.ema is not None:
            state["model_ema"] = self.ema.module.state_dict()
        return state

    def _all_rng_states(self) -> list[dict]:
        states = [rng_state()]
        if self.world_size > 1:
            states = [None] * self.world_size
            dist.all_gather_object(states, rng_state())
        return states

    def save(self, *extra: str) -> None:
        """Writes last.pth, and the same under further names."""
        state = self.state_dict()
        if self.rank == 0:
            for name in (*extra, self.last.name):
                save_atomically(state, self.output / name)

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint of the same model and data.

        Raises:
            ValueError: the checkpoint is damaged, or of another kind of run.
        """
        state = load_checkpoint(path)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            check_optimizer(self.optimizer)
            self.scaler.load_state_dict(state["scaler"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["model_ema"])
            self.epoch, self.update = state["epoch"], state["update"]
            self.totals, self.best_top1 = Totals(*state["totals"]), state["best_top1"]
            self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
            updates, rng = state["updates_per_epoch"], list(state["rng"])
            before = _flat(state["config"])
            if self.epoch < 0 or not 0 <= self.update <= updates:
                raise ValueError(
                    f"it is from epoch {self.epoch}, update {self.update} of {updates}"
                )
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"cannot resume from {path}: {type(error).__name__}: {error!s:.2000}"
            ) from error
        if self.update and (updates, len(rng)) != (self.updates_per_epoch, self.world_size):
            raise ValueError(
                f"cannot resume from {path}: it stopped within an epoch of {updates} updates on "
                f"{len(rng)} processes, this run has {self.updates_per_epoch} on {self.world_size}"
            )
        self.resumed_rng = rng[self.rank] if self.update else None
        if path.resolve().parent != self.output.resolve():
            self.best_top1 = -math.inf  # that best.pth is not in this output
        # Sets the learning rate of the next update, whatever the config has become since.
        done = self.epoch * self.updates_per_epoch + self.update
        if done:
            self.scheduler.step_update(done - 1)
        now = _flat(self.cfg.model_dump(mode="json"))
        for key in now:
            if before.get(key) != now[key]:
                _logger.warning("%s was %s, is now %s", key, before.get(key), now[key])

    # --- the loop ----------------------------------------------------------------------------

    def fit(self) -> None:
        """Trains to the last epoch.

        Raises:
            Interrupted: a signal arrived; last.pth holds the state.
            Diverged: see `max_nonfinite`.
            TooManyCorruptImages: see `data.max_corrupt`.
        """
        self.metrics = Metrics(self.output, self.epoch) if self.rank == 0 else None
        while self.epoch < self.cfg.schedule.epochs:
            self.train_epoch()
            row = self.validate_epoch()
            top1 = row["ema_top1"] if self.ema is not None else row["val_top1"]
            if self.metrics is not None:
                self.metrics.add(row)
                _logger.info(
                    "epoch %d/%d  loss %.4f  top-1 %.2f %%  top-5 %.2f %%%s  %.1f images/s",
                    row["epoch"],
                    self.cfg.schedule.epochs,
                    row["train_loss"],
                    row["val_top1"],
                    row["val_top5"],
                    f"  EMA top-1 {row['ema_top1']:.2f} %" if self.ema is not None else "",
                    row["images_per_second"],
                )
            self.epoch, self.update, self.totals = self.epoch + 1, 0, Totals()
            extra = []
            if top1 > self.best_top1:
                self.best_top1 = top1
                extra.append("best.pth")
            every = self.cfg.checkpoints.every_epochs
            if every and self.epoch % every == 0:
                extra.append(f"epoch_{self.epoch}.pth")
            self.save(*extra)
            self._stop_if_asked()

    def train_epoch(self) -> None:
        self.parallel.train()
        seed_everything(self.cfg.seed, self.epoch, self.rank)
        set_epoch(self.train_loader, self.epoch)
        batches = start(self.train_loader)
        accumulation = self.cfg.accumulation_steps
        if self.update:  # read and drop what was done before the stop
            skip = self.update * accumulation
            next(itertools.islice(batches, skip - 1, skip))
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
        logged = time.monotonic()  # the log stands in for the bar where there is no terminal
        with bar:
            while self.update < self.updates_per_epoch:
                began = time.perf_counter()
                group = list(itertools.islice(batches, accumulation))
                if len(group) < accumulation:  # an iterable data set may end early
                    break
                loss = self.train_update(group)
                seconds = time.perf_counter() - began
                self._count(loss, seconds)
                self.update += 1
                self.scheduler.step_update(self.epoch * self.updates_per_epoch + self.update - 1)
                bar.set_postfix(
                    loss=f"{loss:.4f}",
                    lr=f"{self._lr():.2e}",
                    images_per_s=f"{images / seconds:.1f}",
                    refresh=False,
                )
                bar.update()
                if bar.disable and self.rank == 0 and time.monotonic() - logged > 60:
                    logged = time.monotonic()
                    _logger.info(
                        "epoch %d/%d  update %d/%d  loss %.4f  lr %.2e  %.1f images/s",
                        self.epoch + 1, self.cfg.schedule.epochs, self.update,
                        self.updates_per_epoch, loss, self._lr(), images / seconds,
                    )  # fmt: skip
                if every and self.update % every == 0 and self.update < self.updates_per_epoch:
                    self.save()
                self._stop_if_asked()

    def train_update(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """One optimizer step. Returns the mean loss, or nan after a step skipped for it."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        total = 0.0
        for i, (images, targets) in enumerate(batches):
            images, targets = images.to(self.device), targets.to(self.device)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            accumulating = self.world_size > 1 and i + 1 < len(batches)
            with self.parallel.no_sync() if accumulating else contextlib.nullcontext():
                with autocast(self.device, self.cfg.amp):
                    loss = self.criterion(self.parallel(images), targets) / len(batches)
                if not self._all_agree(bool(torch.isfinite(loss))):
                    return self._skip_update(buffers)
                self.scaler.scale(loss).backward()
            total += loss.item()
        self.scaler.unscale_(self.optimizer)
        clip = self.cfg.optimizer.clip_grad or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        # With a scaler, an overflow is its cue to scale less: it skips the step itself.
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            return self._skip_update(buffers)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
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
        _logger.warning(
            "epoch %d, update %d: the loss or its gradient is not finite, update skipped",
            self.epoch + 1, self.update + 1,
        )  # fmt: skip
        if self.nonfinite_in_a_row >= self.cfg.max_nonfinite:
            raise Diverged(
                f"{self.nonfinite_in_a_row} updates in a row had no finite loss or gradient "
                "(max_nonfinite). Try more schedule.warmup_epochs, a lower optimizer.lr, a smaller "
                f"optimizer.clip_grad (now {self.cfg.optimizer.clip_grad}), or amp=bf16 or amp=off "
                f"(now {self.cfg.amp})"
            )

    def validate_epoch(self) -> dict[str, float]:
        """The row of metrics of the epoch that was just trained."""
        amp = self.cfg.amp
        result = evaluate(self.model, self.val_loader, self.device, amp)
        totals = self.totals
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
            ema = evaluate(self.ema.module, self.val_loader, self.device, amp)
            row |= {"ema_loss": ema.loss, "ema_top1": ema.top1, "ema_top5": ema.top5}
        return row | {
            "images_per_second": images * (totals.finite + totals.skipped) / totals.seconds,
            "skipped_updates": totals.skipped,
            "corrupt_images": getattr(self.train_loader.dataset, "corrupt", 0) + result.corrupt,
        }

    def report(self) -> None:
        """Draws curves.png and predictions.png, the latter with the evaluated weights."""
        save_curves(self.output / "metrics.csv", self.output / "curves.png")
        model = self.ema.module if self.ema is not None else self.model
        self.val_set.transform = eval_transform(self.cfg.data)
        save_predictions(
            model, self.val_set, self.cfg.data, self.names, self.output / "predictions.png"
        )

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    # --- agreement between processes -----------------------------------------------------------

    def _all_agree(self, yes: bool) -> bool:
        if self.world_size == 1:
            return yes
        flag = torch.tensor(float(yes), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def _stop_if_asked(self) -> None:
        number = self.signal_number
        if self.world_size > 1:  # all processes stop after the same update
            flag = torch.tensor(number, device=self.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            number = int(flag)
        if number:
            self.save()
            raise Interrupted(number)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m classification.train", description="Train a classifier."
    )
    parser.add_argument("config", help="a YAML file, see configs/classification")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.lr=1e-3")
    parser.add_argument(
        "--resume",
        metavar="auto|FILE",
        help="continue from FILE; 'auto': from the output's last.pth if there is one",
    )
    return parser.parse_intermixed_args(argv)


def find_checkpoint(resume: str | None, last: Path) -> Path | None:
    """The checkpoint to resume from, if any.

    Raises:
        ConfigError: the output belongs to a run that this one would overwrite.
    """
    if resume == "auto":
        return last if last.exists() else None
    continues = resume is not None and Path(resume).resolve().parent == last.resolve().parent
    if last.exists() and not continues:
        raise ConfigError(
            f"{last} exists: pass --resume auto to continue that run, or output=... for another"
        )
    return Path(resume) if resume else None


@contextlib.contextmanager
def stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """Within it, SIGINT and SIGTERM make the trainer save and stop after the running update."""

    def on_signal(number: int, frame) -> None:
        trainer.signal_number = number

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def output_folder(cfg: Config) -> Iterator[None]:
    """Makes the output with the run's configuration; within it, train.log takes the log."""
    output = Path(cfg.output)
    output.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)
    (output / "config.yaml").write_text(text)
    handler = logging.FileHandler(output / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def train(cfg: Config, resume: str | None = None) -> None:
    """Runs a configuration from start, or from a checkpoint, to its end."""
    env = init_distributed_device_so(device=str(pick_device(cfg.device)))
    device, rank, world_size = torch.device(env["device"]), env["global_rank"], env["world_size"]
    if rank != 0:
        logging.getLogger().setLevel(logging.WARNING)
    if rank == 0:
        check_output(cfg.output)
    checkpoint = find_checkpoint(resume, Path(cfg.output) / "last.pth")
    trainer = Trainer(cfg, device, rank, world_size)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    with output_folder(cfg) if rank == 0 else contextlib.nullcontext():
        _logger.info(
            "%s, %.1f M parameters; %d x %d images per update on %s; %d updates per epoch",
            cfg.model.name, parameters / 1e6, world_size, cfg.batch_size * cfg.accumulation_steps,
            device, trainer.updates_per_epoch,
        )  # fmt: skip
        if checkpoint is not None:
            _logger.info(
                "continuing from %s: %d epochs and %d updates of %d are done",
                checkpoint, trainer.epoch, trainer.update, trainer.updates_per_epoch,
            )  # fmt: skip
        try:
            with stopped_by_signals(trainer):
                trainer.fit()
        except Interrupted as interruption:
            _logger.warning("stopped by %s; --resume auto continues", interruption)
            raise
        except (Diverged, TooManyCorruptImages) as error:
            _logger.error("%s", error)
            raise
        if rank == 0:
            trainer.report()
        _logger.info(
            "done: best top-1 %.2f %%; metrics, curves, predictions and checkpoints are in %s",
            trainer.best_top1, cfg.output,
        )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    arguments = parse_arguments(argv)
    try:
        with logging_redirect_tqdm():
            train(load_config(arguments.config, arguments.overrides), arguments.resume)
    except Interrupted as interruption:
        return 128 + interruption.signal_number
    except (Diverged, TooManyCorruptImages):
        return 2
    except (ValueError, OSError) as error:
        _logger.error("%s", error)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
