"""Checkpoints that survive a kill at any moment."""

import math
import os
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, is_distributed, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner

from ....files import require_writable, write_atomically
from ..runner.checkpoint_names import (
    DEFAULT_TEMPLATES,
    check_checkpoint_names,
    checkpoint_number,
)
from ..runner.plain_state import make_plain, restore_histories


class _AtomicBackend(LocalBackend):
    """Write local files atomically, and defer removals until `flush`."""

    def __init__(self) -> None:
        self.unwanted: set[str] = set()

    def put(self, obj: bytes, filepath: str | Path) -> None:
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(filepath, lambda file: file.write(obj))

    def remove(self, filepath: str | Path) -> None:
        self.unwanted.add(str(filepath))

    def flush(self, keep: set[str | None]) -> None:
        for path in self.unwanted - keep:
            super().remove(path)
        self.unwanted.clear()


register_backend("atomic", _AtomicBackend)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook with checkpoints that survive a kill at any moment.

    Files are replaced atomically, and a checkpoint is removed only after its successor has been
    written. If the previous run was killed before or during the validation of its last checkpoint,
    the resumed run first validates it, so that the best checkpoint is the one that an uninterrupted
    run would have kept.
    With several processes, the running statistics of batch norm are averaged before validating and
    saving.

    Checkpoints contain only tensors, numbers, text and containers, which :func:`torch.load` reads
    with its default settings.

    Args:
        args: Arguments of CheckpointHook. `out_dir` must be a local folder.
        kwargs: Keyword arguments of CheckpointHook.
    """

    out_dir: Any
    best_ckpt_path: str | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, backend_args={"backend": "atomic"})
        check_checkpoint_names(self.out_dir, self.filename_tmpl)
        self.out_dir = self.out_dir and os.fspath(self.out_dir)
        self._left_over: list[str] = []

    def before_train(self, runner: Runner) -> None:
        """Restore the state of a resumed run, and catch up on an interrupted validation."""
        info = runner.message_hub.runtime_info
        if "keep_ckpt_ids" in info:  # mmengine derives the names of files to remove from these.
            ids = info["keep_ckpt_ids"]
            numbers = ids if isinstance(ids, Iterable) else ()
            info["keep_ckpt_ids"] = [i for i in numbers if type(i) is int]
        for name in [name for name in info if name.startswith("best_score")]:
            if not (isinstance(info[name], Real) and math.isfinite(info[name])):
                runner.logger.warning(
                    "%s of the checkpoint must be a number, got %.50r", name, info[name]
                )
                runner.message_hub.pop_info(name)
        super().before_train(runner)
        if is_main_process():
            require_writable(Path(self.out_dir), "the checkpoint hook's out_dir")
        # When there is a better checkpoint, mmengine removes whatever path the loaded checkpoint
        # recorded as the best one, so only accept files of this run.
        if getattr(self, "best_ckpt_path", None):
            self.best_ckpt_path = self._of_this_run(self.best_ckpt_path)
        for name, path in getattr(self, "best_ckpt_path_dict", {}).items():
            self.best_ckpt_path_dict[name] = path and self._of_this_run(path)
        if not runner._resume:
            return
        if is_main_process():
            for path in map(self._of_this_run, self._left_over):
                if path and Path(path).is_file():
                    self.file_backend.remove(path)
        self.last_ckpt = self._path(self._step(runner))
        self._remove_unwanted()
        if self._is_due(runner) and info.get("step_validated") != self._step(runner):
            runner.logger.info("validating the checkpoint, which the interrupted run did not")
            runner.val_loop.run()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Restore the log histories, and note the files that remain to be removed."""
        restore_histories(checkpoint, "checkpoint")
        names = checkpoint.get("replaced_files")
        self._left_over = names if isinstance(names, list) else []

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Reduce the checkpoint to plain types, and record the files that it replaces."""
        # They are removed after saving. If the run is killed before, the resumed run does it.
        unwanted = self.file_backend.unwanted if hasattr(self, "file_backend") else ()
        checkpoint["replaced_files"] = [Path(path).name for path in unwanted]
        make_plain(checkpoint)

    def before_val_epoch(self, runner: Runner) -> None:
        """Average the running statistics over the processes."""
        _average_running_statistics(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Save the best checkpoint, and record in the last one that it was validated."""
        step = self._step(runner)
        runner.message_hub.update_info("step_validated", step)
        self._forget_other_best(runner, metrics)
        self._recorded = self.last_ckpt != self._path(step)
        super().after_val_epoch(runner, metrics)
        if not self._recorded:  # mmengine saves it again only for a new best score.
            meta = {"epoch": runner.epoch, "iter": runner.iter}
            self._save_checkpoint_with_step(runner, step, meta)

    def _forget_other_best(self, runner: Runner, metrics: dict) -> None:
        """Drop the best score if `save_best` named another metric before the run was resumed."""
        if not self.save_best:
            return
        names = [next(iter(metrics), "")] if "auto" in self.key_indicators else self.key_indicators
        saved = runner.message_hub.get_info("save_best")
        if saved not in (None, names):
            runner.logger.warning("the best checkpoint is now selected by %s", ", ".join(names))
            for name in [n for n in runner.message_hub.runtime_info if n.startswith("best_score")]:
                runner.message_hub.pop_info(name)
        runner.message_hub.update_info("save_best", [*names])

    def _step(self, runner: Runner) -> int:
        return runner.epoch if self.by_epoch else runner.iter

    def _path(self, step: int) -> str:
        return self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))

    def _is_due(self, runner: Runner) -> bool:
        """Return whether an uninterrupted run would have validated at this point."""
        loop = runner.train_loop
        step, last = loop.epoch, loop.max_epochs
        if not isinstance(loop, EpochBasedTrainLoop):
            step, last = loop.iter, loop.max_iters
        if runner.val_loop is None or step < max(loop.val_begin, 1):
            return False
        loop._decide_current_val_interval()
        return step % loop.val_interval == 0 or step == last

    def _of_this_run(self, path: object) -> str | None:
        name = Path(path).name if isinstance(path, str) else ""
        ends = self.filename_tmpl.rpartition("}")[2], ".pth"
        known = (name.startswith("best_") and name.endswith(ends)) or any(
            checkpoint_number(template, name)
            for template in (self.filename_tmpl, *DEFAULT_TEMPLATES)
        )
        return str(Path(self.out_dir, name)) if known else None

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        _average_running_statistics(runner)
        super()._save_checkpoint_with_step(runner, step, meta)
        self._recorded = True
        self._remove_unwanted()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        wanted = {*getattr(self, "key_indicators", ())} - {"auto"}
        if metrics and not wanted <= metrics.keys():
            raise ValueError(
                f"default_hooks.checkpoint.save_best must be among {', '.join(sorted(metrics))}, "
                f"got {', '.join(sorted(wanted - metrics.keys()))}"
            )
        super()._save_best_checkpoint(runner, metrics)
        self._remove_unwanted()

    def _remove_unwanted(self) -> None:
        best = [*getattr(self, "best_ckpt_path_dict", {}).values()]
        self.file_backend.flush(keep={self.last_ckpt, getattr(self, "best_ckpt_path", None), *best})


def _average_running_statistics(runner: Runner) -> None:
    """Average the batch norm statistics over the processes, including those of an EMA model."""
    averaged = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
    statistics = [
        tensor
        for model in (runner.model, *averaged)
        for name, tensor in model.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    ]
    if not is_distributed() or not statistics:
        return
    flat = torch.cat([tensor.flatten() for tensor in statistics])
    all_reduce(flat, "mean")
    parts = flat.split([tensor.numel() for tensor in statistics])
    for tensor, part in zip(statistics, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
