"""FLOP counts of the operators.

A sample counts as five multiply-adds per channel, four for the bilinear interpolation and one for
the weight, as InternImage's authors count DCNv3. Coordinates and softmax are not counted. Backward
operators count twice as much as forward operators, as for PyTorch's convolutions.

Importing this package registers the operators with `torch.utils.flop_counter`, which counts two
operations per multiply-add. fvcore and mmengine count one and use :data:`HANDLES`::

    FlopCountAnalysis(model, inputs).set_op_handle(**ops_dcnv4.flops.HANDLES).total()
"""

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from .registration import DIFFERENTIABLE
from .window import Window

MULTIPLY_ADDS_PER_SAMPLE = 5

Shape = Sequence[int]


def dcnv4_multiply_adds(value: Shape, offset_mask: Shape, *parameters: Any) -> int:
    """Return the multiply-adds of `dcnv4` for tensors of these shapes."""
    taps = Window(*parameters).taps()
    return MULTIPLY_ADDS_PER_SAMPLE * math.prod(offset_mask[:3]) * value[3] * taps


def ms_deform_attn_multiply_adds(
    value: Shape,
    spatial_shapes: Shape,
    level_start_index: Shape,
    sampling_locations: Shape,
    attention_weights: Shape,
) -> int:
    """Return the multiply-adds of `ms_deform_attn` for tensors of these shapes."""
    return MULTIPLY_ADDS_PER_SAMPLE * math.prod(attention_weights) * value[3]


def flash_deform_attn_multiply_adds(
    value: Shape,
    spatial_shapes: Shape,
    level_start_index: Shape,
    sampling_loc_attn: Shape,
    n_points: int,
) -> int:
    """Return the multiply-adds of `flash_deform_attn` for tensors of these shapes."""
    return MULTIPLY_ADDS_PER_SAMPLE * math.prod(sampling_loc_attn) // 3 * value[3]


_MULTIPLY_ADDS: dict[str, Callable[..., int]] = {
    "dcnv4": dcnv4_multiply_adds,
    "ms_deform_attn": ms_deform_attn_multiply_adds,
    "flash_deform_attn": flash_deform_attn_multiply_adds,
}


def _argument(value: torch._C.Value) -> Any:
    """Return the shape of a tensor in a traced graph, or the value of a constant."""
    if isinstance(kind := value.type(), torch._C.TensorType):
        return kind.sizes()
    if value.node().kind() == "prim::ListConstruct":
        return [number.toIValue() for number in value.node().inputs()]
    return value.toIValue()


def _handle(multiply_adds: Callable[..., int]) -> Callable[[list, list], int]:
    return lambda inputs, outputs: multiply_adds(*map(_argument, inputs))


#: Handles for `set_op_handle` of fvcore's FlopCountAnalysis and mmengine's FlopAnalyzer.
HANDLES = {f"ops_dcnv4::{name}": _handle(count) for name, count in _MULTIPLY_ADDS.items()}


def _activations(inputs: list, outputs: list) -> int:
    return math.prod(outputs[0].type().sizes())


#: Handles for `set_op_handle` of fvcore's ActivationCountAnalysis and mmengine's
#: ActivationAnalyzer, which count the elements of outputs.
ACTIVATION_HANDLES = dict.fromkeys(HANDLES, _activations)


def _import_flop_counter() -> ModuleType:
    """Import torch's FLOP counter without its warning about missing Triton."""
    logger = logging.getLogger("torch.utils.flop_counter")
    disabled, logger.disabled = logger.disabled, True
    try:
        return importlib.import_module("torch.utils.flop_counter")
    finally:
        logger.disabled = disabled


def _register(name: str, multiply_adds: Callable[..., int]) -> None:
    register = _import_flop_counter().register_flop_formula

    @register(getattr(torch.ops.ops_dcnv4, name))
    def forward(*shapes: Any, out_shape: Any = None) -> int:
        return 2 * multiply_adds(*shapes)

    @register(getattr(torch.ops.ops_dcnv4, f"{name}_backward"))
    def backward(grad_output: Any, *shapes: Any, out_shape: Any = None) -> int:
        return 2 * 2 * multiply_adds(*shapes)


for _name in DIFFERENTIABLE:
    _register(_name, _MULTIPLY_ADDS[_name])
