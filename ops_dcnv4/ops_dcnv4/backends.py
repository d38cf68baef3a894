"""The operators' registration with torch.library, and the choice of what computes them.

The schemas are defined here, so that the operators exist without the compiled libraries too; those
add their kernels for a device type each. What they do not cover comes to `_compute` below.
"""

import contextlib
import functools
import importlib
import itertools
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from . import reference
from .attention import (
    check_levels_lie_in_value,
    check_raw_flash_deform_attn,
    check_raw_ms_deform_attn,
)
from .ops import check_raw_dcnv4, check_raw_grad_output

BACKENDS = ("compiled", "triton", "reference")
ENVIRONMENT_VARIABLE = "OPS_DCNV4_BACKEND"

_WINDOW = (
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "int groups, float offset_scale, bool remove_center"
)
_LEVELS = "Tensor value, Tensor spatial_shapes, Tensor level_start_index"
_SCHEMAS = {
    "dcnv4": f"(Tensor value, Tensor offset_mask, {_WINDOW}) -> Tensor",
    "dcnv4_backward": f"(Tensor grad_output, Tensor value, Tensor offset_mask, {_WINDOW})"
    " -> (Tensor, Tensor)",
    "ms_deform_attn": f"({_LEVELS}, Tensor sampling_locations, Tensor attention_weights) -> Tensor",
    "ms_deform_attn_backward": f"(Tensor grad_output, {_LEVELS}, Tensor sampling_locations, "
    "Tensor attention_weights) -> (Tensor, Tensor, Tensor)",
    "flash_deform_attn": f"({_LEVELS}, Tensor sampling_loc_attn, int n_points) -> Tensor",
    "flash_deform_attn_backward": f"(Tensor grad_output, {_LEVELS}, Tensor sampling_loc_attn, "
    "int n_points) -> (Tensor, Tensor)",
}
DIFFERENTIABLE = tuple(name for name in _SCHEMAS if not name.endswith("_backward"))

_library = Library("ops_dcnv4", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# What computes


def _import_library(module: str) -> str | None:
    """Imports a compiled library, which registers its kernels; the reason if there is none."""
    try:
        importlib.import_module(f"ops_dcnv4.{module}")
    except (ImportError, OSError) as error:
        return str(error)
    return None


_LIBRARIES = {"cpu": "_C", "cuda": "_C_cuda"}
_why_not_compiled = {device: _import_library(module) for device, module in _LIBRARIES.items()}
_forced: str | None = None
_overrides: Library | None = None


def is_compiled(device: str | torch.device = "cpu") -> bool:
    """Whether the compiled kernels for a device were found; "cuda" stands for any of its GPUs."""
    return _why_not_compiled.get(torch.device(device).type, "") is None


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported, and has the C compiler that it needs (not for CUDA code)."""
    compilers = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compilers and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        importlib.import_module("ops_dcnv4.triton_kernels")
    except ImportError:
        return False
    return True


def choose_backend(device: str | torch.device) -> str:
    """What computes on tensors of a device: "compiled", "triton" or "reference".

    The order is: what :func:`use_backend` or OPS_DCNV4_BACKEND names, the compiled kernels, Triton
    for CUDA, the PyTorch reference.
    """
    if _forced is not None:
        return _forced
    if is_compiled(device):
        return "compiled"
    if torch.device(device).type == "cuda" and has_triton():
        return "triton"
    return "reference"


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Context in which one backend computes all operators, for tests and comparisons.

    Holds for every thread and device, gradients included, until the context is left. The variable
    OPS_DCNV4_BACKEND of the environment does the same from the import on. The Triton kernels run on
    the CPU only in Triton's interpreter (TRITON_INTERPRET=1).

    Args:
        name: "compiled", "triton" or "reference".

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend is not there: at the call of an operator for compiled kernels,
            which may be there for one device and not for another, at once for Triton.
    """
    _check_backend(name, "name")
    return _use_backend(name)


@contextlib.contextmanager
def _use_backend(name: str) -> Iterator[None]:
    before = _forced
    _force(name)
    try:
        yield
    finally:
        _force(before)


def _check_backend(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton" and not has_triton():
        raise RuntimeError("the backend 'triton' needs the package triton and a C compiler")


def _force(name: str | None) -> None:
    """Puts `_compute` in the place of compiled kernels, or these back where `name` wants them."""
    global _forced, _overrides
    if _overrides is not None:
        _overrides._destroy()
        _overrides = None
    _forced = name
    if name in (None, "compiled"):
        return
    _overrides = Library("ops_dcnv4", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for device_type, operator in itertools.product(filter(is_compiled, _LIBRARIES), _SCHEMAS):
            kernel = functools.partial(_compute, operator)
            _overrides.impl(operator, kernel, device_type.upper(), allow_override=True)


def _compute(operator: str, *arguments):
    """An operator on tensors of a device that no compiled kernel is registered for, or forced."""
    _check(operator, arguments)
    if "deform_attn" in operator:
        check_levels_lie_in_value(*_inputs(operator, arguments)[:3])
    device_type = arguments[0].device.type
    return getattr(_module(choose_backend(device_type), device_type), operator)(*arguments)


_CHECKS = {
    "dcnv4": check_raw_dcnv4,
    "ms_deform_attn": check_raw_ms_deform_attn,
    "flash_deform_attn": check_raw_flash_deform_attn,
}


def _check(operator: str, arguments: tuple) -> tuple[int, ...]:
    """Check the arguments as the compiled kernels do, and return the shape of the output."""
    inputs = _inputs(operator, arguments)
    shape = _CHECKS[operator.removesuffix("_backward")](*inputs)
    if operator.endswith("_backward"):
        check_raw_grad_output(arguments[0], inputs[0], shape)
    return shape


def _inputs(operator: str, arguments: tuple) -> tuple:
    """Return the arguments of the forward operator, which those of its backward end with."""
    return arguments[1:] if operator.endswith("_backward") else arguments


def _module(backend: str, device_type: str) -> ModuleType:
    """Where a backend's functions are; one name and one signature for each operator."""
    if backend == "triton":
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                "the backend 'triton' computes on CUDA tensors, and elsewhere only in Triton's "
                f"interpreter (TRITON_INTERPRET=1 in the environment), got device '{device_type}'"
            )
        return importlib.import_module("ops_dcnv4.triton_kernels")
    if backend == "compiled":
        raise RuntimeError(f"the backend 'compiled' was asked for, but {_why_slow(device_type)}")
    if _forced is None:
        _warn_reference(device_type)
    return reference


@functools.cache
def _warn_reference(device_type: str) -> None:
    warnings.warn(
        f"ops_dcnv4 runs on its slow PyTorch reference: {_why_slow(device_type)}", stacklevel=2
    )


def _why_slow(device_type: str) -> str:
    why = _why_not_compiled.get(device_type)
    if why is None:
        return f"there are no kernels for device type '{device_type}'"
    needed = "torch and " + ("nvcc" if device_type == "cuda" else "a C++ compiler")
    instead = " (or, to do without, triton and a C compiler)" if device_type == "cuda" else ""
    return (
        f"the compiled kernels are missing ({why}). Install {needed}{instead}, then run: "
        "pip install --no-build-isolation --no-deps --force-reinstall ./ops_dcnv4"
    )


for _name in _SCHEMAS:
    _kernel = functools.partial(_compute, _name)
    # Nested tensors are in no backend: they get as far as the check of the arguments.
    for _key in ("CompositeExplicitAutograd", "AutogradNestedTensor"):
        _library.impl(_name, _kernel, _key)


# Shapes of results


def _fake(operator: str, *arguments) -> Tensor:
    return arguments[0].new_empty(_check(operator, arguments))


def _fake_backward(operator: str, *arguments) -> tuple[Tensor, ...]:
    _check(operator, arguments)
    return tuple(t.new_empty(t.shape) for t in arguments[1:] if _is_differentiable(t))


def _is_differentiable(argument) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


for _name in DIFFERENTIABLE:
    _backward = f"{_name}_backward"
    register_fake(f"ops_dcnv4::{_name}", functools.partial(_fake, _name), lib=_library)
    register_fake(
        f"ops_dcnv4::{_backward}", functools.partial(_fake_backward, _backward), lib=_library
    )


# Gradients and autocast


def _save_for_backward(ctx, inputs, output) -> None:
    tensors = [argument for argument in inputs if isinstance(argument, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.parameters = inputs[len(tensors) :]


def _backward_of(name: str) -> Callable:
    operator = getattr(torch.ops.ops_dcnv4, f"{name}_backward")

    def backward(ctx, grad_output: Tensor):
        inputs = (*ctx.saved_tensors, *ctx.parameters)
        grads = iter(operator(grad_output, *inputs))
        return tuple(next(grads) if _is_differentiable(t) else None for t in inputs)

    return backward


def _refuse_second_derivative(name: str) -> Callable:
    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{name} has no second derivative: call backward or autograd.grad without "
            "create_graph=True"
        )

    return refuse


def _cast(name: str, inputs: tuple, dtype: torch.dtype) -> list:
    """Inputs in the dtype of the surrounding linear layers; float64 stays as it is.

    Only the value of attention is cast to 16 bits: rounded locations would be fractions of a pixel
    off.
    """
    if inputs[0].dtype == torch.float64:
        return list(inputs)
    others = dtype if name == "dcnv4" else torch.float32
    kept = (dtype, torch.float64)
    casted = [t.to(others) if _is_differentiable(t) and t.dtype not in kept else t for t in inputs]
    casted[0] = inputs[0].to(dtype)
    return casted


def _register_autocast(name: str, device_type: str, key: str) -> None:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    operator = getattr(torch.ops.ops_dcnv4, name)

    def autocast(*inputs) -> Tensor:
        casted = _cast(name, inputs, torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return operator(*casted)

    _library.impl(name, autocast, key)


def _register_autograd_and_autocast() -> None:
    for name in DIFFERENTIABLE:
        qualified = f"ops_dcnv4::{name}"
        register_autograd(
            qualified, _backward_of(name), setup_context=_save_for_backward, lib=_library
        )
        register_autograd(f"{qualified}_backward", _refuse_second_derivative(name), lib=_library)
        _register_autocast(name, "cpu", "AutocastCPU")
        _register_autocast(name, "cuda", "AutocastCUDA")


if not is_compiled():  # csrc/autograd.cpp has the same, at less cost per call
    _register_autograd_and_autocast()

if _name := os.environ.get(ENVIRONMENT_VARIABLE):
    _check_backend(_name, ENVIRONMENT_VARIABLE)
    _force(_name)
