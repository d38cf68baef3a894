"""mmengine's runner, hooks and optimizer wrapper as detection and segmentation use them."""

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import (
    BaseTTAModel,
    MMDistributedDataParallel,
    is_model_wrapper,
    revert_sync_batchnorm,
)
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, RUNNERS
from mmengine.runner import CheckpointLoader, Runner
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..checkpoint import (
    check_optimizer,
    fetch_checkpoint,
    load_checkpoint,
    require_fit,
)
from ..conversion import EXECUTED, convert_checkpoint
from ..files import write_atomically

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


# For what the engine itself reads: the weights that any module's init_cfg names, a model of
# mmdet's and mmseg's inference.
CheckpointLoader.register_scheme(("", "http://", "https://"), read_checkpoint, force=True)


@RUNNERS.register_module()
class FlashRunner(Runner):
    """mmengine's Runner with checkpoints that are read safely, converted, and that fit.

    Nothing from a file is executed; the names of the published checkpoints become current ones. To
    resume and to test, all names and shapes must agree. A model that is about to be trained keeps
    its initial values where the checkpoint has none, and the log names them.
    """

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | torch.device | Callable = "cpu",
        strict: bool = False,
        revise_keys: list | None = None,
    ) -> dict:
        """
        Args:
            filename: a path, an address or the name of released weights.
            map_location: of :func:`torch.load`.
            strict: require all names and shapes to agree in training as well.
            revise_keys: not used; published names are recognised.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it is damaged or does not fit the model.
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
        if not (strict or self._resume or self._train_loop is None):
            checkpoint["state_dict"] = self._fill_in(checkpoint["state_dict"], model.state_dict())
        require_fit(model.state_dict(), checkpoint["state_dict"])
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        self._has_loaded = True
        self.logger.info("loaded %s", filename)
        return checkpoint

    def resume(self, filename: str, *args, **kwargs) -> None:
        """As the engine does.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it is damaged, or of another model or run.
        """
        try:
            super().resume(filename, *args, **kwargs)
            check_optimizer(self.optim_wrapper.optimizer)
            done = {
                "epoch": (self.epoch, self.max_epochs),
                "iteration": (self.iter, self.max_iters),
            }
            for what, (number, last) in done.items():
                if type(number) is not int or number < 0 or (last is not None and number > last):
                    raise ValueError(f"it is from {what} {number!r:.20}, this run has {last}")
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"cannot resume from {filename}: {type(error).__name__}: {error!s:.2000}"
            ) from error
        if self.iter == self.max_iters:
            self.logger.warning("%s is from the end of this run: nothing is trained", filename)

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


class _AtomicBackend(LocalBackend):
    """Local files that appear whole or not at all; what is to be removed stays until `flush`."""

    def __init__(self) -> None:
        self._unwanted: set[str] = set()

    def put(self, obj: bytes, filepath: str | Path) -> None:
        write_atomically(filepath, lambda file: file.write(obj))

    def remove(self, filepath: str | Path) -> None:
        self._unwanted.add(str(filepath))

    def flush(self, keep: set[str | None]) -> None:
        for path in self._unwanted - keep:
            super().remove(path)
        self._unwanted.clear()


register_backend("atomic", _AtomicBackend)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, safe against being killed at any moment.

    A file is the old one or the new one, whole, and a checkpoint is removed only after its
    successor has been written. Arguments are those of CheckpointHook, for local files.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, backend_args={"backend": "atomic"})

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

    def _of_this_run(self, path: object) -> str | None:
        name = Path(path).name if isinstance(path, str) else ""
        return str(Path(self.out_dir, name)) if re.fullmatch(r"best_.*\.pth", name) else None

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        self._remove_unwanted()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._remove_unwanted()

    def _remove_unwanted(self) -> None:
        self.file_backend.flush(keep={self.last_ckpt, getattr(self, "best_ckpt_path", None)})


@HOOKS.register_module()
class CheckFiniteHook(Hook):
    """Stops a training whose loss or weights are no longer finite, before they reach a checkpoint.

    Raises:
        FloatingPointError: they are not.
    """

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
