"""Patching of models: their layers get a class whose forward calls the operators."""

import dataclasses
import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from . import attention
from .deform_conv import deform_conv2d
from .rebinding import rebind

# For each library, the functions that its layers call, by the global name under which they do.
_FUNCTIONS: dict[str, dict[str, Any]] = {
    "transformers": {
        "multi_scale_deformable_attention": attention.multi_scale_deformable_attention,
        "multi_scale_deformable_attention_v2": attention.multi_scale_deformable_attention_v2,
    },
    "mmcv": {
        "multi_scale_deformable_attn_pytorch": attention.multi_scale_deformable_attention,
        "MultiScaleDeformableAttnFunction": attention.MultiScaleDeformableAttnFunction,
    },
    "torchvision": {"deform_conv2d": deform_conv2d},
}
_LAYER = "MultiScaleDeformableAttention"  # transformers' layer that only computes the attention
# D-FINE's layers have the function as an attribute.
_ATTRIBUTE, _ATTRIBUTE_FUNCTION = "ms_deformable_attn_core", "multi_scale_deformable_attention_v2"
_CHECK = "torch_compilable_check"  # transformers' function


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`patch` did to a model.

    Attributes:
        patched: Class of each layer that calls the operators now, by its name in the model.
        skipped: Reason for each layer that cannot, by its name in the model.
    """

    patched: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"patched {len(self.patched)} layers, skipped {len(self.skipped)}"]
        lines += [f"  {name or 'model'}: {layer}" for name, layer in self.patched.items()]
        lines += [f"  {name}: skipped, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def patch(model: Module) -> Report:
    """Let a model of another library compute with the operators of this package.

    Layers of transformers, mmcv and torchvision are patched in place; weights, buffers and the
    names in the state dict stay, and so does everything outside of the model. Patching a model
    again changes nothing. Patch before `torch.compile` and before libraries that replace the
    forward of layers themselves (accelerate, kernels).

    Args:
        model: Model, or a single layer.

    Returns:
        The layers that were patched, including those patched before, and those that cannot be,
        with reasons. A warning counts the latter.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If no layer can be patched. The message contains the reasons, if any.

    Example:
        >>> model = transformers.AutoModelForObjectDetection.from_pretrained(name)
        >>> print(ops_dcnv4.integrations.patch(model))
    """
    patched, skipped = {}, {}
    for name, layer in _modules(model):
        if not _is_patched(layer):
            if not _can_patch(layer):
                continue
            if reason := _why_not(layer):
                skipped[name] = reason
                continue
            _patch_layer(layer)
        patched[name] = type(layer).__name__
    reasons = "; ".join(f"{name or 'the layer'}: {why}" for name, why in skipped.items())
    if not patched:
        found = f"only layers that cannot be patched ({reasons})" if skipped else "none"
        raise ValueError(
            "model must have multi-scale deformable attention of transformers or mmcv, or a "
            f"depth-wise DeformConv2d of torchvision, got {found} in {type(model).__name__}"
        )
    if skipped:
        warnings.warn(f"patch left {len(skipped)} layers unchanged: {reasons}", stacklevel=2)
    return Report(patched, skipped)


def unpatch(model: Module) -> tuple[str, ...]:
    """Undo :func:`patch`.

    Args:
        model: Model, or a single layer.

    Returns:
        The names of the layers that were restored; none if the model was not patched.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If the class of a patched layer was changed since.
    """
    restored = []
    for name, layer in _modules(model):
        if not _is_patched(layer):
            continue
        original = layer._original
        if type(layer) is not _patched_class(original):
            raise ValueError(
                f"model must have the classes that patch gave its layers, got {type(layer)} "
                f"for {name or 'the layer'}; first undo what changed it"
            )
        if _ATTRIBUTE in vars(layer):
            setattr(layer, _ATTRIBUTE, _original_function(layer))
        layer.__class__ = original
        restored.append(name)
    return tuple(restored)


def _modules(model: Module) -> list[tuple[str, Any]]:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


def _is_patched(layer: Any) -> bool:
    return isinstance(layer, _Patched)


def _can_patch(layer: Any) -> bool:
    if _has_function_attribute(layer) or _new_forward(_class(layer)) is not None:
        return True
    owner = _owner(type(layer))
    return _library(owner) == "transformers" and owner.__name__ == _LAYER


def _has_function_attribute(layer: Any) -> bool:
    return hasattr(layer, _ATTRIBUTE) and getattr(layer, _ATTRIBUTE) is _original_function(layer)


def _original_function(layer: Any) -> Callable | None:
    for owner in type(layer).__mro__:
        if owner.__module__.startswith("transformers."):
            return getattr(sys.modules.get(owner.__module__), _ATTRIBUTE_FUNCTION, None)
    return None


def _why_not(layer: Any) -> str | None:
    """Return why a known layer cannot be patched, if so."""
    if "forward" in vars(layer):
        return "another library has replaced its forward already; patch the model before"
    method = getattr(layer, "method", getattr(layer, "decoder_method", "default"))
    if method != "default":
        return f"its sampling method must be 'default' (bilinear), got {method!r}"
    owner = _owner(type(layer))
    if owner.__name__ == _LAYER and _new_forward(_class(layer)) is None:
        parameters = ", ".join(_parameters(owner.forward))
        return f"its forward must have the parameters of transformers 5, got {parameters}"
    if _library(owner) == "torchvision":
        return _why_not_convolution(layer)
    return None


def _why_not_convolution(layer: Any) -> str | None:
    if not layer.groups == layer.in_channels == layer.out_channels:
        return (
            "it must be depth-wise (groups == in_channels == out_channels), got "
            f"{layer.in_channels} and {layer.out_channels} channels in {layer.groups} groups"
        )
    if layer.weight.requires_grad:
        return "its weight must be frozen (requires_grad_(False)), as DCNv4 has no gradient for it"
    if layer.weight.is_meta or _shares_weight(layer.weight):
        return None
    return "its weight must be equal over the channels of an offset group"


def _shares_weight(weight: torch.Tensor) -> bool:
    """Return whether there can be offset groups of several channels with the same weight."""
    channels = len(weight)
    sizes = (size for size in range(2, channels + 1) if channels % size == 0)
    blocks = (weight.unflatten(0, (-1, size)) for size in sizes)
    return channels == 1 or any(torch.equal(b, b[:, :1].expand_as(b)) for b in blocks)


def _patch_layer(layer: Any) -> None:
    if _has_function_attribute(layer):
        setattr(layer, _ATTRIBUTE, attention.multi_scale_deformable_attention_v2)
    layer.__class__ = _patched_class(_class(layer))


class _Patched:
    """Base of the classes of patched layers. Their instances are copied and pickled by it."""

    _original: type

    def __reduce_ex__(self, protocol: Any) -> tuple:
        _, (_, *arguments), *rest = tuple(super().__reduce_ex__(max(2, protocol)))
        return _new, (self._original, *arguments), *rest


def _new(original: type, *arguments: Any) -> Module:
    cls = _patched_class(original)
    return cls.__new__(cls, *arguments)


@functools.cache
def _patched_class(original: type) -> type:
    """Return a subclass, under the same name, whose forward calls the operators."""
    owner = _owner(original)
    forward = _new_forward(original) or owner.forward
    if check := getattr(sys.modules.get(owner.__module__), _CHECK, None):
        forward = rebind(forward, {_CHECK: attention.compilable_check(check)}) or forward
    members = {
        "_original": original,
        "forward": forward,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (_Patched, original), members)


@functools.cache
def _new_forward(cls: type) -> Callable | None:
    """Return the forward of a layer's class with our operators in it, or None if it has none."""
    owner = _owner(cls)
    functions = _FUNCTIONS.get(_library(owner))
    if functions is None:
        return None
    if owner.__name__ == _LAYER and _parameters(owner.forward) == _parameters(
        attention.layer_forward
    ):
        return attention.layer_forward
    return rebind(owner.forward, functions)


def _class(layer: Any) -> Any:  # mypy takes no type[Module] for hashable
    return type(layer)


def _owner(cls: type) -> Any:
    """Return the class that defines the forward of a class."""
    return next(owner for owner in cls.__mro__ if "forward" in vars(owner))


def _library(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)
