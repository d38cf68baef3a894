"""Tests of deformable attention with torch.library, torch.compile, torch.export and autocast."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.ops_dcnv4.attention_cases import (
    FORMS,
    Inputs,
    Result,
    call,
    pack,
    random_inputs,
    run_operator,
)
from tests.ops_dcnv4.cases import assert_equal

both_forms = pytest.mark.parametrize("form", FORMS)
LEVELS = ((5, 6), (3, 2))


@pytest.mark.usefixtures("deterministic")
@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(form, dtype, device):
    inputs = random_inputs(LEVELS).to(dtype).on(device)
    namespace, name = torch.ops.ops_dcnv4, "ms" if form == "split" else "flash"
    levels = inputs[:3]
    points = inputs[3:5] if form == "split" else (pack(inputs), inputs.locations.shape[4])
    backward = getattr(namespace, f"{name}_deform_attn_backward").default
    torch.library.opcheck(backward, (inputs.grad_output, *levels, *points))
    for tensor in (levels[0], *points[: 2 if form == "split" else 1]):
        tensor.requires_grad_()
    torch.library.opcheck(getattr(namespace, f"{name}_deform_attn").default, (*levels, *points))


def between_other_operators(inputs: Inputs, form: str) -> Tensor:
    return 0.5 * call(inputs._replace(value=inputs.value.tanh()), form)


def output_and_gradients(function, inputs: Inputs, form: str) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs[:1] + inputs[3:5]]
    value, locations, weights = leaves
    output = function(inputs._replace(value=value, locations=locations, weights=weights), form)
    return output.detach(), *torch.autograd.grad(output, leaves, inputs.grad_output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "form"), [("aot_eager", "split"), ("aot_eager", "fused"), ("inductor", "fused")]
)
def test_torch_compile_equals_eager(backend, form, device, assert_near):
    torch._dynamo.reset()
    options = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    compiled = torch.compile(
        between_other_operators,
        fullgraph=True,
        dynamic=True,
        backend=backend,
        options=options if backend == "inductor" else None,
    )
    for sizes in ({"queries": 6}, {"queries": 9, "batch": 3}):
        inputs = random_inputs(LEVELS, **sizes).on(device)
        results = [
            output_and_gradients(function, inputs, form)
            for function in (compiled, between_other_operators)
        ]
        for actual, expected in zip(*results, strict=True):
            assert_near(actual, expected, 1e-12)


def test_levels_as_lists_compile_too(device):
    inputs = random_inputs(LEVELS).on(device)
    in_lists = inputs._replace(spatial_shapes=LEVELS, level_start_index=[0, 30])
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for form in FORMS:
        expected = call(inputs, form)
        torch.testing.assert_close(call(in_lists, form), expected, rtol=0, atol=0)
        torch.testing.assert_close(compiled(in_lists, form), expected, rtol=0, atol=0)


@both_forms
def test_exports_with_dynamic_batch_and_queries(form, device):
    class Layer(torch.nn.Module):
        def forward(self, value, spatial_shapes, level_start_index, locations, weights):
            inputs = Inputs(value, spatial_shapes, level_start_index, locations, weights, None)
            return call(inputs, form)

    inputs = random_inputs(LEVELS).on(device)
    n, queries = torch.export.Dim("n"), torch.export.Dim("queries")
    points = {0: n, 1: queries}
    shapes = ({0: n}, None, None, points, points)
    program = torch.export.export(Layer(), inputs[:5], dynamic_shapes=shapes)
    others = random_inputs(LEVELS, batch=3, queries=11).on(device)
    actual = program.module()(*others[:5])
    torch.testing.assert_close(actual, call(others, form), rtol=0, atol=0)


@both_forms
def test_meta_tensors_get_the_shapes(form):
    inputs = random_inputs().on("meta")
    results = output_and_gradients(call, inputs, form)
    assert all(result.is_meta for result in results)
    expected = (inputs.grad_output, inputs.value, inputs.locations, inputs.weights)
    assert [result.shape for result in results] == [tensor.shape for tensor in expected]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_forms
def test_autocast_rounds_value_and_never_locations(form, dtype, device):
    inputs = random_inputs().to(torch.float32).on(device)

    def under_autocast(*arguments):
        with torch.autocast(device, dtype):
            return call(*arguments)

    grad_output = inputs.grad_output.to(dtype)
    actual = output_and_gradients(under_autocast, inputs._replace(grad_output=grad_output), form)
    expected = run_operator(inputs.to(dtype, points=torch.float32), form, device)
    expected = expected._replace(grad_value=expected.grad_value.float())
    assert_equal(Result(*(t.cpu() for t in actual)), expected)


@both_forms
def test_autocast_keeps_points_of_its_own_dtype(form, device):
    inputs = random_inputs(steps=64).on(device)
    with torch.autocast(device, torch.bfloat16):
        output = call(inputs.to(torch.float32, points=torch.bfloat16), form)
    expected = call(inputs.to(torch.bfloat16), form)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@both_forms
def test_autocast_leaves_float64_alone(form, device):
    inputs = random_inputs().on(device)
    with torch.autocast(device, torch.bfloat16):
        output = call(inputs, form)
    torch.testing.assert_close(output, call(inputs, form), rtol=0, atol=0)


@both_forms
def test_second_derivative_is_rejected(form, device):
    inputs = random_inputs().on(device)
    output = call(inputs._replace(value=inputs.value.requires_grad_()), form)
    (grad,) = torch.autograd.grad(output.sum(), inputs.value, create_graph=True)
    with pytest.raises(RuntimeError, match="deform_attn has no second derivative"):
        grad.sum().backward()


@both_forms
def test_forward_mode_derivatives_are_rejected(form, device):
    inputs = random_inputs().on(device)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        call(inputs._replace(weights=forward_ad.make_dual(inputs.weights, inputs.weights)), form)
