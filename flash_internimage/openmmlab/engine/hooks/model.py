"""Hooks that change the computation of a model before a run."""

import re
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...models.attention import use_flash_attention


@HOOKS.register_module()
class FlashAttentionHook(Hook):
    """Switch a runner's model to `FlashMultiScaleDeformableAttention`.

    Example::

        custom_hooks = [dict(type='FlashAttentionHook')]
    """

    def before_run(self, runner: Runner) -> None:
        """Switch the attention layers and log their number."""
        count = use_flash_attention(runner.model)
        log = runner.logger.info if count else runner.logger.warning
        log(f"switched {count} MultiScaleDeformableAttention layers to ops_dcnv4")


def convert_outputs_to_float32(model: nn.Module) -> None:
    """Make the necks and heads of a model return float32 under autocast.

    In bfloat16, boxes are up to 4 pixels off at the border of an image of 1333 pixels, and mmcv's
    RoIAlign and NMS do not support it.
    """
    for name, module in model.named_modules():
        if re.search(r"(neck|head)(\.\d+)?$", name):
            module.register_forward_hook(_to_float32)


def _to_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, outputs)


@HOOKS.register_module()
class Float32OutputsHook(Hook):
    """Convert the outputs of necks and heads to float32 under autocast.

    See :func:`convert_outputs_to_float32`.
    """

    def before_run(self, runner: Runner) -> None:
        """Register the conversion on all necks and heads."""
        convert_outputs_to_float32(runner.model)


@HOOKS.register_module()
class CompileBackboneHook(Hook):
    """Compile the backbone with torch.compile.

    Heads are not compiled: their computation depends on the contents of the images.

    Args:
        kwargs: Arguments of :func:`torch.compile`. By default one graph serves images of all sizes,
            and tensors keep the memory layout that they have without compilation.
    """

    priority = "VERY_LOW"

    def __init__(self, **kwargs: Any) -> None:
        if not kwargs.keys() & {"backend", "mode", "options"}:
            # On the CPU, inductor prefers channels-last for convolutions. With varying sizes, torch
            # 2.12 then recompiles the backward pass for each of them, or fails (pytorch#185510).
            kwargs["options"] = {"layout_optimization": False}
        self.kwargs = {"dynamic": True, **kwargs}

    def before_run(self, runner: Runner) -> None:
        """Compile the backbone in place."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.backbone.compile(**self.kwargs)
