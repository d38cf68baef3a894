"""Tests of the operators and layers under the transforms of torch.func."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vjp, vmap

from ops_dcnv4 import DCNv4, FlashDeformAttn, dcnv4, flash_deform_attn, ms_deform_attn
from tests.ops_dcnv4.attention_cases import pack, random_inputs
from tests.ops_dcnv4.cases import VARIED, random_tensors

SAMPLES = 3
LEVELS = ((3, 2), (2, 1))


class Case(NamedTuple):
    """A function of the differentiable inputs, which have the samples in the first dimension."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    grad_output: Tensor
    backward: Callable[..., tuple[Tensor, ...]]  # of grad_output and the inputs


def dcnv4_case(device: str) -> Case:
    p = VARIED["strided"]
    *inputs, grad = (
        t.unflatten(0, (SAMPLES, 2))
        for t in random_tensors(p, batch=2 * SAMPLES, size=(4, 3), group_channels=2).to(device)
    )
    operator = torch.ops.ops_dcnv4.dcnv4_backward
    return Case(lambda *t: dcnv4(*t, *p), tuple(inputs), grad, lambda *t: operator(*t, *p))


def attention_case(form: str, device: str) -> Case:
    sizes = {"points": 2, "head_channels": 3, "queries": 2, "batch": 2 * SAMPLES}
    inputs = random_inputs(LEVELS, **sizes).on(device)
    points = (inputs.locations, inputs.weights) if form == "split" else (pack(inputs),)
    tensors = (t.unflatten(0, (SAMPLES, 2)) for t in (inputs.value, *points, inputs.grad_output))
    *floats, grad_output = tensors
    levels, namespace = inputs[1:3], torch.ops.ops_dcnv4
    if form == "split":
        return Case(
            lambda value, *points: ms_deform_attn(value, *levels, *points),
            tuple(floats),
            grad_output,
            lambda g, value, *points: namespace.ms_deform_attn_backward(g, value, *levels, *points),
        )
    return Case(
        lambda value, packed: flash_deform_attn(value, *levels, packed, 2),
        tuple(floats),
        grad_output,
        lambda g, value, packed: namespace.flash_deform_attn_backward(g, value, *levels, packed, 2),
    )


@pytest.fixture(params=["dcnv4", "split", "fused"])
def case(request, device):
    return dcnv4_case(device) if request.param == "dcnv4" else attention_case(request.param, device)


def loop(function: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Stack the results of all samples, which are tensors or tuples of tensors."""
    results = [function(*sample) for sample in zip(*inputs, strict=True)]
    if isinstance(results[0], Tensor):
        return (torch.stack(results),)
    return tuple(torch.stack(tensors) for tensors in zip(*results, strict=True))


def assert_all_near(actual, expected, assert_near) -> None:
    actual = (actual,) if isinstance(actual, Tensor) else actual
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, 1e-12)


def squares(function: Callable) -> Callable[..., Tensor]:
    return lambda *inputs: function(*inputs).square().sum()


def test_vmap_equals_a_loop(case, assert_near):
    expected = loop(case.function, *case.inputs)
    assert_all_near(vmap(case.function)(*case.inputs), expected, assert_near)
    gradients = vmap(case.backward)(case.grad_output, *case.inputs)
    expected = loop(case.backward, case.grad_output, *case.inputs)
    assert_all_near(gradients, expected, assert_near)


def test_vmap_takes_any_dimension_and_shared_inputs(case, assert_near):
    for shared in range(len(case.inputs)):
        inputs = list(case.inputs)
        inputs[shared] = inputs[shared][:1].expand_as(inputs[shared])
        expected = loop(case.function, *inputs)
        in_dims = [None if i == shared else 2 for i in range(len(inputs))]
        moved = [
            t[0] if dim is None else t.movedim(0, dim)
            for t, dim in zip(inputs, in_dims, strict=True)
        ]
        actual = vmap(case.function, tuple(in_dims), out_dims=1)(*moved)
        assert_all_near(actual.movedim(1, 0), expected, assert_near)


def test_nested_vmap_equals_nested_loops(case, assert_near):
    images = [t.unsqueeze(2) for t in case.inputs]  # a batch of one image for each sample
    actual = vmap(vmap(case.function))(*images)
    assert_near(actual.squeeze(2), loop(case.function, *case.inputs)[0], 1e-12)


def test_gradients_of_vmap_reach_shared_inputs(case, assert_near):
    shared, *others = case.inputs
    in_dims = (None, *(0 for _ in others))

    def total(value: Tensor) -> Tensor:
        return vmap(case.function, in_dims)(value, *others).square().sum()

    values = shared[0].expand_as(shared)
    (expected,) = loop(grad(squares(case.function)), values, *others)
    assert_near(grad(total)(shared[0]), expected.sum(0), 1e-12)


def test_per_sample_gradients_equal_a_loop(case, assert_near):
    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        return torch.autograd.grad(squares(case.function)(*leaves), leaves)

    expected = loop(gradients, *case.inputs)
    argnums = tuple(range(len(case.inputs)))
    per_sample = grad(squares(case.function), argnums)
    assert_all_near(loop(per_sample, *case.inputs), expected, assert_near)
    assert_all_near(vmap(per_sample)(*case.inputs), expected, assert_near)


def test_jacobians_equal_a_loop(case, assert_near):
    sample = tuple(t[0] for t in case.inputs)
    expected = torch.autograd.functional.jacobian(case.function, sample)
    actual = jacrev(case.function, argnums=tuple(range(len(sample))))(*sample)
    assert_all_near(actual, expected, assert_near)


def test_outer_transforms_differentiate_through_inner_ones(case, assert_near):
    value, *points = (t[0] for t in case.inputs)

    def inner(*points: Tensor) -> Tensor:
        return vjp(lambda v: case.function(v, *points), value)[0].square().sum()

    expected = grad(squares(case.function), argnums=1)(value, *points)
    assert_near(grad(inner)(*points), expected, 1e-12)
    leaf = points[0].clone().requires_grad_()
    assert_near(torch.autograd.grad(inner(leaf, *points[1:]), leaf)[0], expected, 1e-12)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jacfwd(inner)(*points)


@pytest.mark.parametrize("transform", [jacfwd, hessian])
def test_forward_mode_derivatives_are_rejected(transform, case):
    sample = tuple(t[0] for t in case.inputs)
    message = r"(dcnv4|deform_attn) has no forward-mode derivative .* call torch.func.jacrev"
    with pytest.raises(NotImplementedError, match=message):
        transform(lambda *t: case.function(*t).sum())(*sample)


def test_second_derivatives_are_rejected(case):
    sample = tuple(t[0] for t in case.inputs)
    gradient = grad(squares(case.function))
    with pytest.raises(RuntimeError, match="do not nest torch"):
        grad(lambda *t: gradient(*t).sum())(*sample)


@pytest.mark.parametrize("given", [0, 1])
def test_mapped_levels_are_rejected(given, device):
    inputs = random_inputs(LEVELS, queries=2).on(device)
    value, *levels = inputs[:3]
    points = inputs[3:5]

    def function(level: Tensor) -> Tensor:
        levels[given] = level
        return ms_deform_attn(value, *levels, *points)

    name = ("spatial_shapes", "level_start_index")[given]
    with pytest.raises(ValueError, match=f"{name} must be the same for all samples of torch.vmap"):
        vmap(function)(torch.stack([levels[given]] * 2))


def test_levels_may_be_arguments_of_a_differentiated_function(device, assert_near):
    inputs = random_inputs(LEVELS, queries=2).on(device)
    total = squares(ms_deform_attn)
    expected = torch.autograd.grad(total(inputs.value.requires_grad_(), *inputs[1:5]), inputs.value)
    assert_near(grad(total)(inputs.value.detach(), *inputs[1:5]), expected[0], 1e-12)


def layers(device: str) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    tokens = (torch.rand(SAMPLES, 2, n, 16).double().to(device) for n in (5, 20))
    points = torch.rand(SAMPLES, 2, 5, 2, 2).double().to(device)
    queries, maps = tokens
    images = torch.rand(SAMPLES, 2, 4, 5, 16).double().to(device)
    shapes = torch.tensor([(4, 4), (2, 2)])

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = FlashDeformAttn(16, n_levels=2, n_heads=4, n_points=2)

        def forward(self, *tensors: Tensor) -> Tensor:
            return self.layer(*tensors, shapes)

    dcn = DCNv4(16, stride=2, group=2, initial_modulation=0.2, dw_kernel_size=3)
    return {"dcnv4": (dcn, (images,)), "attention": (Attention(), (queries, points, maps))}


@pytest.mark.parametrize("name", ["dcnv4", "attention"])
def test_per_sample_gradients_of_layers_equal_a_loop(name, device, assert_near):
    layer, inputs = layers(device)[name]
    layer = layer.double().to(device)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return functional_call(layer, parameters, sample).square().mean()

    in_dims = (None, *(0 for _ in inputs))
    actual = vmap(grad(loss), in_dims)(parameters, *inputs)
    for i in range(SAMPLES):
        layer.zero_grad()
        layer(*(t[i] for t in inputs)).square().mean().backward()
        for name, parameter in layer.named_parameters():
            assert_near(actual[name][i], parameter.grad, 1e-12)


@pytest.mark.slow
def test_compiled_per_sample_gradients_equal_eager_ones(device, assert_near):
    case = dcnv4_case(device)
    per_sample = vmap(grad(squares(case.function), argnums=(0, 1)))
    torch._dynamo.reset()
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    assert_all_near(compiled(*case.inputs), per_sample(*case.inputs), assert_near)
