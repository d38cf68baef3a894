"""The runner for detection and segmentation, with safe checkpoint loading."""

import itertools
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIMIZERS, RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch import nn

from ....checkpoints import check_optimizer, check_state_dict, convert_checkpoint, is_finite
from ....checkpoints.conversion import EXECUTED
from ....checkpoints.downloads import hide_secrets
from ....files import disk_full_error, write_atomically
from ....mmcv_ops import SUMMARY, Operators
from ...datasets.splits import warn_of_shared_images
from ...errors import describe, end_in_one_line, is_from_this_package, is_users
from ...safe_loading import read_checkpoint, safe_loading
from ...utils import unwrap_model
from ..vis_backends import close_backends, start_backends
from .resume import (
    adapt_checkpoint,
    compare_classes,
    describe_run,
    replay_schedules,
    set_sampler_seed,
)

_earlier_runs = itertools.count()


@contextmanager
def _building_loop(dataloader: str) -> Iterator[None]:
    """Enable safe loading, and prefix errors about a dataset with the name of its data loader."""
    try:
        with safe_loading():
            yield
    except (FileNotFoundError, ValueError) as error:
        message = describe(error)
        if "of the evaluator" in message or not is_from_this_package(error):
            raise
        # Most messages start with the name of an argument.
        joint = "." if re.match(r"[a-z]+_[a-z_]+ ", message) else ": "
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{dataloader}.dataset{joint}{message}") from error


def _raise_file_errors(record: logging.LogRecord) -> None:
    """Make an unwritable log end the run, instead of printing a traceback for every line."""
    # Handlers call this while handling the exception.
    raise


@RUNNERS.register_module()
class SafeRunner(Runner):
    """mmengine's Runner with safe loading, and resuming under changed settings.

    While it works, safe loading is enabled as by
    :func:`~flash_internimage.openmmlab.enable_safe_loading`: nothing in a checkpoint is executed.
    Published parameter names are converted. When resuming and testing, all names and shapes must
    agree. In a model to be trained, weights that the checkpoint lacks stay randomly initialized,
    and the log names them. A resumed run combines its own settings with the state of its
    checkpoint.

    Args:
        args: Arguments of Runner.
        kwargs: Keyword arguments of Runner.
    """

    _randomness_cfg: dict

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._resuming = False
        # mmengine's name of a run ends with the time in seconds. A run with the name of an earlier
        # one of this process would continue its averages, and write to its folder.
        if earlier := next(_earlier_runs):
            file = getattr(kwargs.get("cfg"), "filename", None)
            name = kwargs.get("experiment_name") or Path(file or "run").stem
            kwargs["experiment_name"] = f"{name}_{earlier}"
        with self._working():
            super().__init__(*args, **kwargs)
        if isinstance(sys.modules.get("mmcv._ext"), Operators):
            self.logger.info(SUMMARY)
        # mmengine modifies it on resume, and it may be the default shared by all runners.
        self._randomness_cfg = dict(self._randomness_cfg)

    def train(self) -> nn.Module:
        """Train the model and return it."""
        with self._working():
            try:
                return super().train()
            finally:
                close_backends(self)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call a method of all hooks; before training, start the loggers of the run."""
        if fn_name == "before_train":
            start_backends(self)
        super().call_hook(fn_name, **kwargs)

    def val(self) -> dict:
        """Validate the model and return the metrics."""
        with self._working():
            return super().val()

    def test(self) -> dict:
        """Test the model and return the metrics."""
        with self._working():
            return super().test()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Read checkpoints safely, and log the error that ends the run.

        Raises:
            OSError: If the disk is full.
        """
        try:
            with safe_loading():
                yield
        except Exception as error:
            full = disk_full_error(error, getattr(self, "_work_dir", "a log"))
            if full and not (isinstance(error, OSError) and "while writing" in str(error)):
                error = full
            if is_users(error):
                end_in_one_line(error)
                if hasattr(self, "logger"):
                    with suppress(OSError):  # The log may be on a full disk.
                        self.logger.error(describe(error))
            raise error

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Build the logger, which raises an error if its file cannot be written."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = _raise_file_errors  # type: ignore[method-assign]
        return logger

    def dump_config(self) -> None:
        """Write the config to the work folder or, when testing, to the folder of the log."""
        folder = self.log_dir if self._train_loop is None else self.work_dir
        name = Path(self.cfg.filename or f"{self.timestamp}.py").name
        if is_main_process():
            text = self.cfg.pretty_text.encode()
            write_atomically(Path(folder, name), lambda file: file.write(text))

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the training loop, naming the data loader in errors."""
        with _building_loop("train_dataloader"):
            return super().build_train_loop(loop)

    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the validation loop, and warn about images that are also trained on."""
        with _building_loop("val_dataloader"):
            built = super().build_val_loop(loop)
        self._check_evaluator(built)
        if isinstance(self._train_loop, BaseLoop) and is_main_process():
            warn_of_shared_images(
                self._train_loop.dataloader.dataset, getattr(built.dataloader, "dataset", None)
            )
        return built

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the test loop, naming the data loader in errors."""
        with _building_loop("test_dataloader"):
            built = super().build_test_loop(loop)
        self._check_evaluator(built)
        return built

    def _check_evaluator(self, loop: BaseLoop) -> None:
        """Run the checks of metrics that can validate the model and the data in advance."""
        for metric in getattr(getattr(loop, "evaluator", None), "metrics", ()):
            if hasattr(metric, "check_run"):
                metric.check_run(self.model, loop.dataloader.dataset)
        self._check_names_of_metrics(loop)

    def _check_names_of_metrics(self, loop: BaseLoop) -> None:
        """Check that hooks refer to metrics by their full names, such as `coco/bbox_mAP`."""
        metrics = getattr(getattr(loop, "evaluator", None), "metrics", ())
        prefixes = tuple(f"{metric.prefix}/" for metric in metrics if metric.prefix)
        if not prefixes or len(prefixes) < len(metrics):
            return
        for hook in self.hooks:
            for setting in ("save_best", "monitor"):
                wanted = getattr(hook, setting, None) or ()
                for name in [wanted] if isinstance(wanted, str) else wanted:
                    if name != "auto" and not name.startswith(prefixes):
                        raise ValueError(
                            f"{setting} of {type(hook).__name__} must be a metric that starts with "
                            f"{' or '.join(prefixes)}, got {name!r}"
                        )

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        """Build the optimizer and its wrapper.

        Raises:
            ValueError: If the optimizer is unknown, its settings are invalid, or it requires a
                closure or sparse gradients.
        """
        given = isinstance(optim_wrapper, dict) and "optimizer" in optim_wrapper
        settings = optim_wrapper["optimizer"] if given else {}
        if not isinstance(settings, dict | torch.optim.Optimizer):
            raise ValueError(f"optim_wrapper.optimizer must be a dict, got {settings!r:.200}")
        name = settings.get("type") if isinstance(settings, dict) else None
        known = callable(name) or (isinstance(name, str) and OPTIMIZERS.get(name))
        if name is not None and not known:
            raise ValueError(
                f"optim_wrapper.optimizer.type must be a registered optimizer, got {name!r}"
            )
        try:
            built = super().build_optim_wrapper(optim_wrapper)
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            if is_from_this_package(error):
                raise
            raise ValueError(f"optim_wrapper: {describe(error)}") from error
        optimizer = getattr(built, "optimizer", None)
        if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
            raise ValueError(
                "optim_wrapper.optimizer must work with dense gradients and without a closure, "
                f"got {type(optimizer).__name__}"
            )
        return built

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scale the learning rates with the total batch size.

        Unlike in mmengine, it includes accumulated batches.

        Args:
            optim_wrapper: Optimizer wrapper whose schedules have not been built yet.
            auto_scale_lr: A dict with `enable` (default: False) and `base_batch_size`, the total
                batch size that the learning rates are tuned for.

        Raises:
            ValueError: If `base_batch_size` is missing.
        """
        if not (auto_scale_lr and auto_scale_lr.get("enable")):
            return
        base = auto_scale_lr.get("base_batch_size")
        if base is None:
            raise ValueError(
                "auto_scale_lr.base_batch_size must be set to the total batch size that lr is "
                "tuned for, got None"
            )
        loader = self._train_dataloader
        batch = loader["batch_size"] if isinstance(loader, dict) else loader.batch_size
        together = isinstance(optim_wrapper, OptimWrapperDict)
        for wrapper in optim_wrapper.values() if together else [optim_wrapper]:
            accumulated = wrapper._accumulative_counts
            images = batch * self.world_size * accumulated
            self.logger.info(
                "scaling learning rates by %g: the total batch size is %d (batch size %d x "
                "processes %d x accumulative_counts %d), base_batch_size is %d",
                images / base, images, batch, self.world_size, accumulated, base,
            )  # fmt: skip
            for group in wrapper.param_groups:
                group["lr"] *= images / base

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | torch.device | Callable = "cpu",
        strict: bool = False,
        revise_keys: list | None = None,
    ) -> dict:
        """Load weights into the model.

        Args:
            filename: Path, URL or name of released weights.
            map_location: See :func:`torch.load`.
            strict: Whether names and shapes must agree in training, too.
            revise_keys: Unused; published names are recognized and converted.

        Returns:
            The contents of the checkpoint, as loaded into the model.

        Raises:
            FileNotFoundError: If the checkpoint does not exist.
            ValueError: If the checkpoint is damaged, does not match the model, contains weights
                that are not finite, or is tested on data whose classes are in another order.
        """
        checkpoint = read_checkpoint(filename, map_location)
        if isinstance(meta := checkpoint.get("meta"), dict):
            for name in EXECUTED:
                meta.pop(name, None)
        if "message_hub" not in checkpoint:  # not written by mmengine
            try:
                checkpoint = convert_checkpoint(checkpoint)
            except ValueError as error:
                raise ValueError(
                    f"{filename} is not a checkpoint of a detector or segmentor: {error} (pass the "
                    "checkpoint of a classifier to model.backbone.init_cfg)"
                ) from error
        elif not isinstance(checkpoint.get("state_dict"), dict):
            raise ValueError(f"{filename} has no state_dict")
        model = unwrap_model(self.model)
        if not (strict or self._resuming or self._train_loop is None):
            try:
                filled = self._fill_in(checkpoint["state_dict"], model.state_dict())
            except ValueError as error:
                raise ValueError(f"{filename}: {error}") from error
            checkpoint["state_dict"] = filled
        check_state_dict(model.state_dict(), checkpoint["state_dict"])
        if self._resuming:
            self._other_schedule = adapt_checkpoint(self, checkpoint)
        elif self._train_loop is None:
            self._check_classes(filename, checkpoint)
        wrong = [name for name, tensor in checkpoint["state_dict"].items() if not is_finite(tensor)]
        if wrong:
            raise ValueError(
                f"{len(wrong)} weights of {filename} are not finite: {', '.join(wrong[:10])}"
            )
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        self._has_loaded = True
        self.logger.info("loaded %s", hide_secrets(str(filename)))
        return checkpoint

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resume from a checkpoint with the settings of this run.

        Raises:
            FileNotFoundError: If the checkpoint does not exist.
            ValueError: If the checkpoint is damaged, belongs to another model, optimizer, dataset
                or kind of loop, or is past the end of this run.
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
            self.logger.warning("training is already complete in %s", filename)

    def save_checkpoint(self, *args: Any, meta: dict | None = None, **kwargs: Any) -> None:
        """Save a checkpoint, including what is needed to resume with other settings."""
        super().save_checkpoint(*args, meta={**(meta or {}), **describe_run(self)}, **kwargs)

    def _check_classes(self, filename: str, checkpoint: dict) -> None:
        """Compare the classes of a checkpoint with those of the evaluated data."""
        loop = self._test_loop or self._val_loop
        dataset = getattr(getattr(loop, "dataloader", None), "dataset", None)
        difference, shifted = compare_classes(checkpoint, dataset)
        if shifted:
            raise ValueError(f"classes of {filename} do not match the data: {difference}")
        if difference:
            self.logger.warning("classes of %s do not match the data: %s", filename, difference)

    def _fill_in(self, state_dict: dict, own: dict) -> dict:
        """Return `own` with the tensors of `state_dict` that have a known name and its shape."""
        matching = {
            name: tensor
            for name, tensor in state_dict.items()
            if name in own and own[name].shape == getattr(tensor, "shape", None)
        }
        if not matching:
            raise ValueError(
                f"none of its {len(state_dict)} tensors matches the model: their names start with "
                f"{', '.join(sorted({name.split('.')[0] for name in state_dict})[:5])}, the "
                f"model's with {', '.join(sorted({name.split('.')[0] for name in own}))}"
            )
        for what, names in (
            ("stay randomly initialized", own.keys() - matching.keys()),
            ("of the checkpoint are not used", state_dict.keys() - matching.keys()),
        ):
            if names:
                self.logger.warning("%d tensors %s: %s", len(names), what, ", ".join(sorted(names)))
        return own | matching

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for distributed training; on CPUs, replace SyncBN by batch norm."""
        if self.distributed and not torch.cuda.is_available() and not model_wrapper_cfg:
            find_unused = self.cfg.get("find_unused_parameters", False)
            return MMDistributedDataParallel(
                revert_sync_batchnorm(model),
                broadcast_buffers=False,
                find_unused_parameters=find_unused,
            )
        return super().wrap_model(model_wrapper_cfg, model)
