"""Registration of the operators with torch.library: schemas, shapes, gradients, vmap and autocast.

The compiled library for the CPU defines the operators, so that C++ programs have them too. Where it
is missing, they are defined here. Each compiled library registers its kernels for one device type;
all other calls reach `backends.compute`.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.library import Library, register_fake, register_vmap

from .backends import check, compute, is_compiled

_WINDOW = (
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "int groups, float offset_scale, bool remove_center"
)
_LEVELS = "Tensor value, Tensor spatial_shapes, Tensor level_start_index"
_PAIR, _TRIPLE = "(Tensor, Tensor)", "(Tensor, Tensor, Tensor)"
# The inputs of each operator, and the gradients that its backward operator returns.
# csrc/registration.h has the same schemas.
_SIGNATURES = {
    "dcnv4": (f"Tensor value, Tensor offset_mask, {_WINDOW}", _PAIR),
    "ms_deform_attn": (f"{_LEVELS}, Tensor sampling_locations, Tensor attention_weights", _TRIPLE),
    "flash_deform_attn": (f"{_LEVELS}, Tensor sampling_loc_attn, int n_points", _PAIR),
}
DIFFERENTIABLE = tuple(_SIGNATURES)

SCHEMAS: dict[str, str] = {}
for _name, (_inputs, _gradients) in _SIGNATURES.items():
    SCHEMAS[_name] = f"({_inputs}) -> Tensor"
    SCHEMAS[f"{_name}_backward"] = (
        f"(Tensor grad_output, {_inputs}, *, bool deterministic=False) -> {_gradients}"
    )

_library = Library("ops_dcnv4", "FRAGMENT")


def _define(name: str, fake: Callable) -> None:
    if not is_compiled("cpu"):
        _library.define(f"{name}{SCHEMAS[name]}")
    register_fake(f"ops_dcnv4::{name}", functools.partial(fake, name), lib=_library)
    # No backend supports nested tensors; registering the key lets the argument check reject them.
    for key in ("CompositeExplicitAutograd", "AutogradNestedTensor"):
        _library.impl(name, functools.partial(compute, name), key)


def _fake(operator: str, *arguments: Any) -> Tensor:
    return arguments[0].new_empty(check(operator, arguments))


def _fake_backward(
    operator: str, *arguments: Any, deterministic: bool = False
) -> tuple[Tensor, ...]:
    check(operator, arguments)
    return tuple(t.new_empty(t.shape) for t in arguments[1:] if _is_differentiable(t))


def _is_differentiable(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def _register_autograd(name: str, gradients: Callable[..., tuple]) -> None:
    """Register the derivative of an operator.

    A call costs less than with :func:`torch.library.register_autograd`, which also ignores the
    tangents of forward-mode derivatives instead of raising an error.

    Args:
        name: Name of the operator.
        gradients: Function of the gradients of the outputs and the inputs that returns the
            gradients of the differentiable inputs.
    """
    operator = getattr(torch.ops.ops_dcnv4, name).default

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, options: dict[str, bool], *inputs: Any) -> Any:
            tensors = [argument for argument in inputs if isinstance(argument, Tensor)]
            ctx.save_for_backward(*tensors)
            ctx.parameters = inputs[len(tensors) :]
            if not torch._C._are_functorch_transforms_active():
                return below_autograd(options, *inputs)
            # The transforms around this one may differentiate too.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return below_autograd(options, *inputs)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
            inputs = (*ctx.saved_tensors, *ctx.parameters)
            grads = iter(gradients(*grad_outputs, *inputs))
            return (None, *(next(grads) if _is_differentiable(t) else None for t in inputs))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> NoReturn:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative (jvp): call torch.func.jacrev or vjp "
                "instead of jacfwd, jvp or hessian"
            )

    # `Function.apply` would go through all transforms of torch.func. Here, the dispatcher has
    # already chosen one.
    apply = super(torch.autograd.Function, Function).apply

    def apply_under_transform(*arguments: Any) -> Any:
        with enable_single_level_autograd_function():
            return apply(*arguments)

    def below_autograd(options: dict[str, bool], *inputs: Any) -> Any:
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*inputs, **options)
        except (RuntimeError, ValueError) as error:
            _raise_from(error, name, inputs)
            raise

    def kernel(*inputs: Any, **options: bool) -> Any:
        if name.endswith("_backward") and torch.are_deterministic_algorithms_enabled():
            options["deterministic"] = True
        tensors = [argument for argument in inputs if isinstance(argument, Tensor)]
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        # Function has no forward-mode derivative, so it rejects dual tensors.
        if needs_grad or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            if torch._C._are_functorch_transforms_active():
                return apply_under_transform(options, *inputs)
            return apply(options, *inputs)
        return below_autograd(options, *inputs)

    _library.impl(name, kernel, "Autograd")


def _raise_from(error: Exception, name: str, inputs: tuple) -> None:
    """Raise the error that Python's checks find, if any; compiled kernels only raise ValueError."""
    check(name, inputs)
    if "out of memory" in str(error) and inputs[0].device.type == "cuda":
        torch.cuda.synchronize(inputs[0].device)  # raises the fault of an earlier kernel instead
        raise torch.OutOfMemoryError(str(error)) from error


def _refuse_second_derivative(name: str, *arguments: Any) -> NoReturn:
    raise RuntimeError(
        f"{name} has no second derivative: call backward or autograd.grad without "
        "create_graph=True, and do not nest torch.func.grad, vjp or jacrev"
    )


def _register_vmap(name: str) -> None:
    """Register the rule of torch.vmap, which makes the mapped dimension a part of the batch."""
    operator = getattr(torch.ops.ops_dcnv4, name).default
    schema = operator._schema
    names = [argument.name for argument in schema.arguments if not argument.kwarg_only]

    def rule(info: Any, in_dims: tuple, *inputs: Any, **options: bool) -> Any:
        size = info.batch_size
        folded = []
        for argument, value, dim in zip(names, inputs, in_dims, strict=True):
            if _is_differentiable(value):
                value = _fold(value, dim, size)
            elif isinstance(value, Tensor) and dim is not None:
                raise ValueError(
                    f"{argument} must be the same for all samples of torch.vmap (in_dims=None), "
                    f"got a tensor that is mapped over dimension {dim}"
                )
            folded.append(value)
        outputs = operator(*folded, **options)
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (size, -1)), 0
        return tuple(t.unflatten(0, (size, -1)) for t in outputs), (0,) * len(outputs)

    register_vmap(operator, rule, lib=_library)


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Return a tensor of batch size N with N * `size` images; `dim` is the mapped dimension."""
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1)


def _register_autocast(name: str, device_type: str, key: str) -> None:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    operator = getattr(torch.ops.ops_dcnv4, name).default

    def kernel(*inputs: Any) -> Tensor:
        casted = _cast(name, inputs, torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return operator(*casted)

    _library.impl(name, kernel, key)


def _cast(name: str, inputs: tuple, dtype: torch.dtype) -> list:
    """Cast the inputs to the autocast dtype; float64 inputs are left unchanged.

    For attention, only `value` is cast to 16 bits: rounding the locations would shift them by
    fractions of a pixel.
    """
    if inputs[0].dtype == torch.float64:
        return list(inputs)
    others = dtype if name == "dcnv4" else torch.float32
    kept = (dtype, torch.float64)
    casted = [t.to(others) if _is_differentiable(t) and t.dtype not in kept else t for t in inputs]
    casted[0] = inputs[0].to(dtype)
    return casted


for _name in _SIGNATURES:
    _backward = f"{_name}_backward"
    _define(_name, _fake)
    _define(_backward, _fake_backward)
    _register_autograd(_name, getattr(torch.ops.ops_dcnv4, _backward).default)
    _register_autograd(_backward, functools.partial(_refuse_second_derivative, _name))
    _register_vmap(_name)
    _register_vmap(_backward)
    _register_autocast(_name, "cpu", "AutocastCPU")
    _register_autocast(_name, "cuda", "AutocastCUDA")
