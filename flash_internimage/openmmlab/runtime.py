"""mmengine's runner, hooks and optimizer wrapper as detection and segmentation use them."""

import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cv2
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.dist import all_reduce, is_distributed, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import (
    BaseTTAModel,
    MMDistributedDataParallel,
    is_model_wrapper,
    revert_sync_batchnorm,
)
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, OPTIMIZERS, RUNNERS, TRANSFORMS
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..checkpoint import (
    check_optimizer,
    fetch_checkpoint,
    load_checkpoint,
    require_fit,
)
from ..conversion import EXECUTED, convert_checkpoint
from ..files import disk_full_error, write_atomically
from .errors import describe, is_users
from .files import LeftOutFiles
from .resume import (
    adapt_checkpoint,
    compare_classes,
    describe_run,
    replay_schedules,
    set_sampler_seed,
)

CHECKPOINT_NAME = re.compile(r"(?:epoch|iter)_(\d+)\.pth")

# What the engine's own checkpoints hold beside tensors and plain containers.
_ENGINE_TYPES = {"mmengine.logging.history_buffer.HistoryBuffer": HistoryBuffer}


def read_checkpoint(source: str | os.PathLike, map_location: Any = "cpu") -> dict:
    """The contents of a checkpoint, of the engine or not; nothing from the file is executed.

    Args:
        source: see :func:`flash_internimage.checkpoint.fetch_checkpoint`.
        map_location: of :func:`torch.load`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged or no checkpoint.
    """
    return load_checkpoint(fetch_checkpoint(source), map_location, _ENGINE_TYPES)


def use_safe_checkpoint_reader() -> None:
    """Let mmengine read every checkpoint with :func:`read_checkpoint`, in the whole process.

    This covers what mmengine reads itself: the weights in a module's `init_cfg`, and the models of
    mmdet's and mmseg's inference. :class:`FlashRunner` does so while it works, and only then.
    """
    CheckpointLoader.register_scheme(("", "http://", "https://"), read_checkpoint, force=True)


@contextmanager
def _safe_checkpoint_reader() -> Iterator[None]:
    before = dict(CheckpointLoader._schemes)
    use_safe_checkpoint_reader()
    try:
        yield
    finally:
        CheckpointLoader._schemes = before


def _raise_file_errors(record: logging.LogRecord) -> None:
    """Let a log that cannot be written end the run, instead of a traceback for every line."""
    # Handlers call this while they handle the error.
    raise


@RUNNERS.register_module()
class FlashRunner(Runner):
    """mmengine's Runner with checkpoints that are read safely, converted, and that fit.

    Nothing from a file is executed; the names of the published checkpoints become current ones. To
    resume and to test, all names and shapes must agree. A model that is about to be trained keeps
    its initial values where the checkpoint has none, and the log names them. A resumed run uses
    its own settings with the state of its checkpoint, see :mod:`.resume`.
    """

    def __init__(self, *args, **kwargs):
        self._resuming = False
        with self._working():
            super().__init__(*args, **kwargs)
        # mmengine changes it at a resume, and it may be the default of all runs of the process.
        self._randomness_cfg = dict(self._randomness_cfg)

    def train(self) -> nn.Module:
        """Train as mmengine does."""
        with self._working():
            return super().train()

    def val(self) -> dict:
        """Validate as mmengine does."""
        with self._working():
            return super().val()

    def test(self) -> dict:
        """Test as mmengine does."""
        with self._working():
            return super().test()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Read checkpoints safely, explain a full disk, and log what ends the run.

        Raises:
            OSError: The disk is full.
        """
        try:
            with _safe_checkpoint_reader():
                yield
        except Exception as error:
            full = disk_full_error(error, getattr(self, "_work_dir", "a log"))
            if full and not (isinstance(error, OSError) and "while writing" in str(error)):
                error = full
            if is_users(error) and hasattr(self, "logger"):
                with suppress(OSError):  # The log may be on the full disk.
                    self.logger.error(describe(error))
            raise error

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """Build a logger that raises an error if its file cannot be written."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = _raise_file_errors
        return logger

    def dump_config(self) -> None:
        """Write the configuration into the work folder, that of an evaluation to its log."""
        folder = self.log_dir if self._train_loop is None else self.work_dir
        name = Path(self.cfg.filename or f"{self.timestamp}.py").name
        if is_main_process():
            text = self.cfg.pretty_text.encode()
            write_atomically(Path(folder, name), lambda file: file.write(text))

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        """Build the optimizer.

        Raises:
            ValueError: It is unknown, or needs a closure or sparse gradients.
        """
        settings = optim_wrapper.get("optimizer") if isinstance(optim_wrapper, dict) else None
        name = settings.get("type") if isinstance(settings, dict) else None
        if isinstance(name, str) and OPTIMIZERS.get(name) is None:
            raise ValueError(
                f"optim_wrapper.optimizer.type must be a registered optimizer, got {name!r}"
            )
        built = super().build_optim_wrapper(optim_wrapper)
        optimizer = getattr(built, "optimizer", None)
        if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
            raise ValueError(
                "optim_wrapper.optimizer must take dense gradients and no closure, "
                f"got {type(optimizer).__name__}"
            )
        return built

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | torch.device | Callable = "cpu",
        strict: bool = False,
        revise_keys: list | None = None,
    ) -> dict:
        """Load weights into the model.

        Args:
            filename: Path, address or name of released weights.
            map_location: See :func:`torch.load`.
            strict: Require all names and shapes to agree in training as well.
            revise_keys: Not used; published names are recognised.

        Raises:
            FileNotFoundError: There is no such checkpoint.
            ValueError: It is damaged, does not fit the model, holds weights that are not finite, or
                has the classes of the data at other positions.
        """
        checkpoint = read_checkpoint(filename, map_location)
        if isinstance(meta := checkpoint.get("meta"), dict):
            for name in EXECUTED:
                meta.pop(name, None)
        if "message_hub" not in checkpoint:  # not one of the engine's
            try:
                checkpoint = convert_checkpoint(checkpoint)
            except ValueError as error:
                raise ValueError(
                    f"{filename} is no checkpoint of a detector or segmentor: {error} (that of a "
                    "classifier is for model.backbone.init_cfg)"
                ) from error
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        if not (strict or self._resuming or self._train_loop is None):
            checkpoint["state_dict"] = self._fill_in(checkpoint["state_dict"], model.state_dict())
        require_fit(model.state_dict(), checkpoint["state_dict"])
        if self._resuming:
            self._other_schedule = adapt_checkpoint(self, checkpoint)
        elif self._train_loop is None:
            self._check_classes(filename, checkpoint)
        _require_finite(filename, checkpoint["state_dict"])
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        self._has_loaded = True
        self.logger.info("loaded %s", filename)
        return checkpoint

    def resume(self, filename: str, *args, **kwargs) -> None:
        """Resume a run with the settings of this one.

        Raises:
            FileNotFoundError: There is no such checkpoint.
            ValueError: It is damaged, or of another model, optimizer, data set or run.
        """
        self._resume = self._resuming = True
        try:
            super().resume(filename, *args, **kwargs)
            check_optimizer(self.optim_wrapper.optimizer)
        except ValueError as error:
            raise ValueError(f"cannot resume from {filename}: {error!s:.2000}") from error
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"cannot resume from {filename}: {type(error).__name__}: {error!s:.2000}"
            ) from error
        finally:
            self._resuming = False
        set_sampler_seed(self)
        if self._other_schedule:
            replay_schedules(self)
        if self.iter == self.max_iters:
            self.logger.warning("%s is from the end of this run: nothing is trained", filename)

    def save_checkpoint(self, *args, meta: dict | None = None, **kwargs) -> None:
        """Save a checkpoint that records what a resumed run needs to know."""
        super().save_checkpoint(*args, meta={**(meta or {}), **describe_run(self)}, **kwargs)

    def _check_classes(self, filename: str, checkpoint: dict) -> None:
        """Compare the classes of the checkpoint with those of the data that are evaluated."""
        loop = self._test_loop or self._val_loop
        dataset = getattr(getattr(loop, "dataloader", None), "dataset", None)
        difference, shifted = compare_classes(checkpoint, dataset)
        if shifted:
            raise ValueError(f"{filename} has other classes than the data: {difference}")
        if difference:
            self.logger.warning("%s has other classes than the data: %s", filename, difference)

    def _fill_in(self, state_dict: dict, own: dict) -> dict:
        """`own` with the values of `state_dict` where a name is known and its shape agrees."""
        fitting = {
            name: tensor
            for name, tensor in state_dict.items()
            if name in own and own[name].shape == tensor.shape
        }
        for what, names in (
            ("start anew", own.keys() - fitting.keys()),
            ("of the checkpoint are not used", state_dict.keys() - fitting.keys()),
        ):
            if names:
                self.logger.warning("%d tensors %s: %s", len(names), what, ", ".join(sorted(names)))
        return own | fitting

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """As the engine does; the CPU has no synchronised batch norm and no device number."""
        if self.distributed and not torch.cuda.is_available() and not model_wrapper_cfg:
            find_unused = self.cfg.get("find_unused_parameters", False)
            return MMDistributedDataParallel(
                revert_sync_batchnorm(model),
                broadcast_buffers=False,
                find_unused_parameters=find_unused,
            )
        return super().wrap_model(model_wrapper_cfg, model)


def _require_finite(source: str, state_dict: dict) -> None:
    wrong = [name for name, tensor in state_dict.items() if not tensor.isfinite().all()]
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights of {source} are not finite: {', '.join(wrong[:10])}"
        )


class _AtomicBackend(LocalBackend):
    """Local files that appear whole or not at all; what is to be removed stays until `flush`."""

    def __init__(self) -> None:
        self.unwanted: set[str] = set()

    def put(self, obj: bytes, filepath: str | Path) -> None:
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
    """mmengine's CheckpointHook, safe against being killed at any moment.

    A file is the old one or the new one, whole, and a checkpoint is removed only after its
    successor has been written. A resumed run first validates its checkpoint if the run before was
    killed before or during that validation, so that the best checkpoint is the one that an
    uninterrupted run would keep. With several processes, the running statistics of batch norm are
    averaged before they are validated or saved.

    Arguments are those of CheckpointHook, for local files.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, backend_args={"backend": "atomic"})
        self._left_over: list[str] = []

    def before_train(self, runner: Runner) -> None:
        info = runner.message_hub.runtime_info
        numbers = [i for i in info.get("keep_ckpt_ids", ()) if type(i) is int]
        if "keep_ckpt_ids" in info:  # of which the engine makes the names of what it removes
            info["keep_ckpt_ids"] = numbers
        super().before_train(runner)
        # As soon as there is a better one, the engine removes what the checkpoint calls the best
        # one, be it a file or a folder, and wherever.
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
        if self._is_due(runner) and info.get("validated_step") != self._step(runner):
            runner.logger.info("validating the checkpoint, which the run before did not")
            runner.val_loop.run()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        names = checkpoint.get("replaced_files")
        self._left_over = names if isinstance(names, list) else []

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # Their removal follows. A run that is killed before leaves it to the resumed one.
        unwanted = self.file_backend.unwanted if hasattr(self, "file_backend") else ()
        checkpoint["replaced_files"] = [Path(path).name for path in unwanted]

    def before_val_epoch(self, runner: Runner) -> None:
        _average_running_statistics(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        step = self._step(runner)
        runner.message_hub.update_info("validated_step", step)
        self._forget_other_best(runner, metrics)
        self._recorded = self.last_ckpt != self._path(step)
        super().after_val_epoch(runner, metrics)
        if not self._recorded:  # no better one, with which the engine saves the last one again
            meta = {"epoch": runner.epoch, "iter": runner.iter}
            self._save_checkpoint_with_step(runner, step, meta)

    def _forget_other_best(self, runner: Runner, metrics: dict) -> None:
        """Drop a best score of another metric, which `save_best` named before the run resumed."""
        if not self.save_best:
            return
        names = [next(iter(metrics), "")] if "auto" in self.key_indicators else self.key_indicators
        saved = runner.message_hub.get_info("save_best")
        if saved not in (None, names):
            runner.logger.warning("the best checkpoint is now that of %s", ", ".join(names))
            for name in [n for n in runner.message_hub.runtime_info if n.startswith("best_score")]:
                runner.message_hub.pop_info(name)
        runner.message_hub.update_info("save_best", [*names])

    def _step(self, runner: Runner) -> int:
        return runner.epoch if self.by_epoch else runner.iter

    def _path(self, step: int) -> str:
        return self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))

    def _is_due(self, runner: Runner) -> bool:
        """Whether an uninterrupted run would have validated at this point."""
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
        known = rf"best_.*\.pth|{CHECKPOINT_NAME.pattern}"
        return str(Path(self.out_dir, name)) if re.fullmatch(known, name) else None

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        _average_running_statistics(runner)
        super()._save_checkpoint_with_step(runner, step, meta)
        self._recorded = True
        self._remove_unwanted()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._remove_unwanted()

    def _remove_unwanted(self) -> None:
        best = [*getattr(self, "best_ckpt_path_dict", {}).values()]
        self.file_backend.flush(keep={self.last_ckpt, getattr(self, "best_ckpt_path", None), *best})


def _average_running_statistics(runner: Runner) -> None:
    """Average what batch norm has gathered in each process, also in an averaged model."""
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


@HOOKS.register_module()
class CheckFiniteHook(Hook):
    """Stop a training whose loss or weights are no longer finite, before they reach a checkpoint.

    Metrics that are not finite are named in the log.

    Raises:
        FloatingPointError: The loss or weights are not finite.
    """

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        wrong = [
            name
            for name, value in (metrics or {}).items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        if wrong:
            runner.logger.warning(
                "not finite: %s; the data may have no such objects", ", ".join(wrong)
            )

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.after_val_epoch(runner, metrics)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        losses = {name: value.item() for name, value in outputs.items() if "loss" in name}
        if not all(map(math.isfinite, losses.values())):
            values = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise FloatingPointError(
                f"the loss is not finite in iteration {runner.iter + 1}: {values}. Go on from the "
                "last checkpoint with a smaller learning rate, a longer warm-up or clip_grad"
            )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        weights = checkpoint["state_dict"].items()
        wrong = [name for name, tensor in weights if not tensor.isfinite().all()]
        if wrong:
            raise FloatingPointError(
                f"{len(wrong)} weights are not finite after iteration {runner.iter} and are not "
                f"saved: {', '.join(wrong[:10])}"
            )


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Training with autocast to bfloat16, on any device; gradients need no scaling."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield


@HOOKS.register_module()
class Float32OutputsHook(Hook):
    """Gives what necks and heads return in float32, however autocast computed it.

    Boxes of bfloat16 are up to 4 pixels off at the border of an image of 1333, and mmcv's RoIAlign
    and NMS do not take them.
    """

    def before_run(self, runner: Runner) -> None:
        for name, module in runner.model.named_modules():
            if re.search(r"(neck|head)(\.\d+)?$", name):
                module.register_forward_hook(self._to_float32)

    @staticmethod
    def _to_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, outputs)


@HOOKS.register_module()
class CompileBackboneHook(Hook):
    """Compiles the backbone of the model with torch.compile; heads depend on the images' contents.

    Args:
        kwargs: of torch.compile. Unless given, one graph serves images of all sizes, and tensors
            keep the layout that they have without compilation.
    """

    priority = "VERY_LOW"

    def __init__(self, **kwargs):
        if not kwargs.keys() & {"backend", "mode", "options"}:
            # On the CPU inductor prefers channels-last for convolutions. Where sizes vary, torch
            # 2.12 then compiles the backward pass anew for each, or fails (pytorch#185510).
            kwargs["options"] = {"layout_optimization": False}
        self.kwargs = {"dynamic": True, **kwargs}

    def before_run(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.backbone.compile(**self.kwargs)


@TRANSFORMS.register_module()
class LoadReadableImage(LoadImageFromFile):
    """mmcv's LoadImageFromFile for training: an image that cannot be read is left out, with a
    warning, and the data set draws another one.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.left_out = LeftOutFiles()

    def transform(self, results: dict) -> dict | None:
        path = results["img_path"]
        try:
            return super().transform(results)
        except (OSError, AssertionError, cv2.error) as error:
            self.left_out.add(path, f"image {path} cannot be read ({error})")
            return None
