"""Choice of the backend that computes the operators: compiled kernels, Triton or the reference."""

import contextlib
import functools
import importlib.util
import itertools
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from . import reference
from .attention import (
    check_levels,
    check_raw_flash_deform_attn,
    check_raw_ms_deform_attn,
)
from .ops import autocasts, check_raw_dcnv4, check_raw_grad_output, check_size, check_tensor

BACKENDS = ("compiled", "triton", "reference")
ENVIRONMENT_VARIABLE = "OPS_DCNV4_BACKEND"

# For each operator, the function that checks its inputs and returns the shape of its output.
_CHECKS: dict[str, Callable[..., tuple[int, ...]]] = {
    "dcnv4": check_raw_dcnv4,
    "ms_deform_attn": check_raw_ms_deform_attn,
    "flash_deform_attn": check_raw_flash_deform_attn,
}


_LIBRARIES = {"cpu": "_C", "cuda": "_C_cuda"}


def _find_library(device_type: str) -> str | None:
    spec = importlib.util.find_spec(f"ops_dcnv4.{_LIBRARIES[device_type]}")
    return None if spec is None else spec.origin


def _load_library(device_type: str) -> str | None:
    """Load a compiled library, which registers its kernels; return the error message if any."""
    path = _find_library(device_type)
    if path is None:
        return f"there is no ops_dcnv4.{_LIBRARIES[device_type]}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return str(error)
    return None


_why_not_compiled = {device: _load_library(device) for device in _LIBRARIES}
_forced: str | None = None
_forced_by = ""
_overrides: Library | None = None


def is_compiled(device: str | torch.device = "cpu") -> bool:
    """Return whether compiled kernels were found for a device; the device index is ignored."""
    return _why_not_compiled.get(torch.device(device).type, "") is None


def library_path(device: str | torch.device = "cpu") -> Path:
    """Return the path of the shared library with the compiled kernels for a device.

    A C++ program that loads it has the operators too, without Python. The library for the CPU also
    defines the operators, so it is needed on GPUs as well.

    Args:
        device: "cpu" or "cuda"; the device index is ignored.

    Raises:
        RuntimeError: If there is none; the message contains the reason.
    """
    device_type = torch.device(device).type
    if not is_compiled(device_type):
        raise RuntimeError(_why_slow(device_type))
    return Path(str(_find_library(device_type)))


@functools.cache
def has_triton() -> bool:
    """Return whether Triton and the host C compiler that it requires are available."""
    compilers = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compilers and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        importlib.import_module("ops_dcnv4.triton_kernels")
    except ImportError:
        return False
    return True


def choose_backend(device: str | torch.device) -> str:
    """Return the backend that is used on a device: "compiled", "triton" or "reference".

    The backend selected by :func:`use_backend` or OPS_DCNV4_BACKEND takes precedence, followed by
    the compiled kernels, Triton (CUDA only) and the PyTorch reference.
    """
    if _forced is not None:
        return _forced
    if is_compiled(device):
        return "compiled"
    if torch.device(device).type == "cuda" and has_triton():
        return "triton"
    return "reference"


def explain_backend(
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    shape: Sequence[int] | None = None,
) -> str:
    """Describe in words which backend a call would use, and why.

    The backend depends on the device alone. Dtype and shape determine whether the call is
    accepted, and the dtype also determines the precision.

    Args:
        device: Device of the tensors.
        dtype: Dtype of `value`.
        shape: Shape of `value`: (N, H, W, C), or (N, S, M, D) for attention.

    Returns:
        A line with the name of the backend, and an indented line for each argument. Where the call
        would fail, these lines say so and contain the reason.

    Example:
        >>> print(explain_backend("cpu", torch.bfloat16))
        compiled
          device cpu: the compiled kernels were found (ops_dcnv4._C, instruction set avx2)
          dtype torch.bfloat16: computes and accumulates in float32
    """
    device = torch.device(device)
    backend = choose_backend(device)
    explanations: list[tuple[str, Callable[[], str]]] = [
        (f"device {device}", lambda: _explain_device(backend, device.type)),
        (f"dtype {dtype}", lambda: _explain_dtype(dtype, backend, device.type)),
    ]
    if shape is not None:
        explanations.append((f"shape {tuple(shape)}", lambda: _explain_shape(shape)))
    # Meta tensors only have shapes, which are computed without a backend.
    lines = ["none" if device.type == "meta" else backend]
    for subject, explain in explanations:
        try:
            lines.append(f"  {subject}: {explain()}")
        except (RuntimeError, TypeError, ValueError) as error:
            lines[0] = f"{backend}, but the call would fail"
            lines.append(f"  {subject}: {error}")
    return "\n".join(lines)


def _explain_device(backend: str, device_type: str) -> str:
    if device_type == "meta":
        return "meta tensors have no data; only the shape of the result is computed"
    if _forced is not None:
        _require_available(backend, device_type)
        return f"selected by {_forced_by}"
    if backend == "compiled":
        library = f"ops_dcnv4.{_LIBRARIES[device_type]}"
        why = f"the compiled kernels were found ({library}"
        if device_type == "cpu":
            why += f", instruction set {torch.ops.ops_dcnv4.instruction_set()}"
        why += ")"
    elif backend == "triton":
        missing = _why_not_compiled[device_type]
        why = f"the compiled kernels are missing ({missing}); Triton and a C compiler were found"
    else:
        why = _why_slow(device_type)
    if device_type == "cuda" and not torch.cuda.is_available():
        why += "; PyTorch finds no GPU here"
    return why


def _explain_dtype(dtype: torch.dtype, backend: str, device_type: str) -> str:
    value = torch.empty(0, 0, 0, 0, dtype=dtype, device="meta")
    check_tensor("value", value, ("N", "H", "W", "C"))
    why = ""
    if device_type in _LIBRARIES and autocasts(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        why = f"autocast converts to {dtype}, which "
    computed = reference.compute_dtype(dtype)
    name = str(computed).removeprefix("torch.")
    why += f"computes in {name}" if computed == dtype else f"computes and accumulates in {name}"
    is_16_bit = computed == torch.float32 != dtype
    if (backend, device_type) == ("compiled", "cuda") and is_16_bit:
        why += (
            "; where the width of a group or head is even, the forward pass may interpolate "
            f"between pixels in {str(dtype).removeprefix('torch.')}"
        )
    return why


def _explain_shape(shape: Sequence[int]) -> str:
    if len(shape) != 4:
        raise ValueError(f"value must be (N, H, W, C), or (N, S, M, D), got shape {tuple(shape)}")
    if shape[1] < 1:
        raise ValueError(f"value must have at least one pixel, got shape {tuple(shape)}")
    for size in shape[1:]:
        check_size("each size of value", size)
    if 0 in shape:
        return "accepted; there is nothing to compute"
    return "accepted; all shapes use the same backend"


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that runs all operators on one backend.

    Meant for tests and comparisons. Applies to all threads and devices, and to gradients. The
    environment variable OPS_DCNV4_BACKEND selects a backend from import on. On the CPU, the Triton
    kernels run only in Triton's interpreter (TRITON_INTERPRET=1).

    Args:
        name: "compiled", "triton" or "reference".

    Raises:
        ValueError: If there is no backend of that name.
        RuntimeError: If the backend is not available. For Triton, this is raised immediately; for
            compiled kernels, which may exist for some devices only, when an operator is called.
    """
    _check_backend(name, "name")
    return _use_backend(name)


@contextlib.contextmanager
def _use_backend(name: str) -> Iterator[None]:
    before = _forced, _forced_by
    _force(name, f"use_backend({name!r})")
    try:
        yield
    finally:
        _force(*before)


def _check_backend(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton" and not has_triton():
        raise RuntimeError("the backend 'triton' requires the package triton and a C compiler")


def _force(name: str | None, by: str) -> None:
    """Select a backend: override the compiled kernels with `compute`, or restore them.

    Args:
        name: Backend, or None to choose one for each call.
        by: What selects it, for :func:`explain_backend`.
    """
    global _forced, _forced_by, _overrides
    if _overrides is not None:
        _overrides._destroy()
        _overrides = None
    _forced, _forced_by = name, by
    if name in (None, "compiled"):
        return
    _overrides = Library("ops_dcnv4", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for device_type, operator, suffix in itertools.product(
            filter(is_compiled, _LIBRARIES), _CHECKS, ("", "_backward")
        ):
            kernel = functools.partial(compute, operator + suffix)
            _overrides.impl(operator + suffix, kernel, device_type.upper(), allow_override=True)


def compute(
    operator: str, *arguments: Any, deterministic: bool = False
) -> Tensor | tuple[Tensor, ...]:
    """Run an operator that has no compiled kernel, or whose compiled kernel is overridden."""
    check(operator, arguments)
    if "deform_attn" in operator:
        check_levels(*_inputs(operator, arguments)[:3])
    device_type = arguments[0].device.type
    backend = choose_backend(device_type)
    # The reference is as deterministic as PyTorch's own operators.
    options = {"deterministic": True} if deterministic and backend == "triton" else {}
    return getattr(_module(backend, device_type), operator)(*arguments, **options)


def check(operator: str, arguments: tuple) -> tuple[int, ...]:
    """Check the arguments as the compiled kernels do; return the shape of the forward output."""
    inputs = _inputs(operator, arguments)
    shape = _CHECKS[operator.removesuffix("_backward")](*inputs)
    if operator.endswith("_backward"):
        check_raw_grad_output(arguments[0], inputs[0], shape)
    return shape


def _inputs(operator: str, arguments: tuple) -> tuple:
    """Return the forward operator's arguments; backward operators take grad_output before them."""
    return arguments[1:] if operator.endswith("_backward") else arguments


def _module(backend: str, device_type: str) -> ModuleType:
    """Return the Python module that implements a backend, with one function per operator."""
    _require_available(backend, device_type)
    if backend == "triton":
        return importlib.import_module("ops_dcnv4.triton_kernels")
    if backend == "compiled":
        raise RuntimeError("the compiled kernels do not cover this call")
    if _forced is None:
        _warn_reference(device_type)
    return reference


def _require_available(backend: str, device_type: str) -> None:
    """Raise RuntimeError if a backend that was selected cannot compute on a device."""
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton" and device_type != "cuda" and not interprets:
        raise RuntimeError(
            "the backend 'triton' computes on CUDA tensors, and elsewhere only in Triton's "
            f"interpreter (TRITON_INTERPRET=1 in the environment), got device '{device_type}'"
        )
    if backend == "compiled" and not is_compiled(device_type):
        raise RuntimeError(f"the backend 'compiled' was selected, but {_why_slow(device_type)}")


@functools.cache
def _warn_reference(device_type: str) -> None:
    warnings.warn(
        f"ops_dcnv4 uses its slow PyTorch reference: {_why_slow(device_type)}", stacklevel=2
    )


def _why_slow(device_type: str) -> str:
    why = _why_not_compiled.get(device_type)
    if why is None:
        return f"there are no kernels for device type '{device_type}'"
    needed = "torch and " + ("nvcc" if device_type == "cuda" else "a C++ compiler")
    instead = " (or triton and a C compiler instead)" if device_type == "cuda" else ""
    return (
        f"the compiled kernels are missing ({why}). Install {needed}{instead}, then run: "
        "pip install --no-build-isolation --no-deps --force-reinstall ./ops_dcnv4"
    )


if _selected := os.environ.get(ENVIRONMENT_VARIABLE):
    _check_backend(_selected, ENVIRONMENT_VARIABLE)
    _force(_selected, f"the environment variable {ENVIRONMENT_VARIABLE}")
