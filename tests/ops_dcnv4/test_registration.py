"""Tests of DCNv4 with torch.library, torch.compile, torch.export and autocast."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from ops_dcnv4 import dcnv4, registration
from ops_dcnv4.registration import SCHEMAS
from tests.ops_dcnv4.cases import (
    VARIED,
    Parameters,
    Result,
    Tensors,
    assert_equal,
    random_tensors,
    run_operator,
)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("p", VARIED.values(), ids=VARIED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(p, dtype, device):
    value, offset_mask, grad_output = random_tensors(p, size=(5, 6)).to(dtype).to(device)
    namespace = torch.ops.ops_dcnv4
    torch.library.opcheck(namespace.dcnv4_backward.default, (grad_output, value, offset_mask, *p))
    inputs = value.requires_grad_(), offset_mask.requires_grad_()
    torch.library.opcheck(namespace.dcnv4.default, (*inputs, *p))


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_compiled_library_and_python_define_the_same_schemas(name):
    operator = getattr(torch.ops.ops_dcnv4, name).default
    assert not operator._defined_in_python
    assert operator._schema == torch._C.parse_schema(f"ops_dcnv4::{name}{SCHEMAS[name]}")


def test_gradients_follow_the_setting_for_deterministic_algorithms():
    p = Parameters()
    value, offset_mask, grad_output = random_tensors(p)
    value.requires_grad_()

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "dcnv4_backward" in function.name():
                recorded.append(kwargs)
            return function(*args, **kwargs or {})

    recorded = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            with Recorder():
                torch.autograd.grad(dcnv4(value, offset_mask, *p), value, grad_output)
                torch.ops.ops_dcnv4.dcnv4_backward(grad_output, value.detach(), offset_mask, *p)
        finally:
            torch.use_deterministic_algorithms(False)
    assert recorded == [{}, {}, {"deterministic": True}, {"deterministic": True}]


def raise_from(error: Exception, device: str) -> None:
    p = Parameters()
    with FakeTensorMode():
        tensors = [tensor.to(device) for tensor in random_tensors(p)[:2]]
    registration._raise_from(error, "dcnv4", (*tensors, *p))


def test_failed_allocations_on_gpus_are_out_of_memory_errors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    error = RuntimeError("failed to allocate a tensor, which may be out of memory")
    with pytest.raises(torch.OutOfMemoryError, match="failed to allocate"):
        raise_from(error, "cuda")
    raise_from(error, "cpu")


def test_the_fault_of_an_earlier_kernel_is_no_lack_of_memory(monkeypatch):
    def synchronize(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        raise_from(RuntimeError("out of memory"), "cuda")


def between_other_operators(value: Tensor, offset_mask: Tensor, *parameters) -> Tensor:
    return dcnv4(value.tanh(), offset_mask * 0.5, *parameters)


def assert_compiled_equals_eager(compiled, size, device, assert_near) -> None:
    p = Parameters(stride=(2, 1))
    *inputs, grad_output = random_tensors(p, size=size).to(device)
    inputs = [t.requires_grad_() for t in inputs]
    outputs = [function(*inputs, *p) for function in (compiled, between_other_operators)]
    assert_near(outputs[0], outputs[1].detach(), 1e-12)
    grads = [torch.autograd.grad(output, inputs, grad_output) for output in outputs]
    for actual, expected in zip(*grads, strict=True):
        assert_near(actual, expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_equals_eager(dynamic, device, assert_near):
    torch._dynamo.reset()
    compiled = torch.compile(
        between_other_operators, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    assert_compiled_equals_eager(compiled, (7, 6), device, assert_near)
    assert_compiled_equals_eager(compiled, (8, 9), device, assert_near)


@pytest.mark.slow
def test_torch_compile_with_inductor_equals_eager(device, assert_near):
    torch._dynamo.reset()
    quick = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    compiled = torch.compile(between_other_operators, fullgraph=True, options=quick)
    assert_compiled_equals_eager(compiled, (7, 6), device, assert_near)


def test_torch_compile_under_autocast(device):
    p = Parameters()
    value, offset_mask, _ = random_tensors(p).to(torch.float32).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(dcnv4, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.bfloat16):
        actual, expected = compiled(value, offset_mask, *p), dcnv4(value, offset_mask, *p)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_exports_with_dynamic_batch_and_image_size(device):
    p = Parameters()

    class Layer(torch.nn.Module):
        def forward(self, value, offset_mask):
            return dcnv4(value, offset_mask, *p)

    dims = dict(enumerate(torch.export.dims("n", "h", "w")))
    inputs = random_tensors(p).to(device)[:2]
    program = torch.export.export(Layer(), inputs, dynamic_shapes=(dims, dims))
    others = random_tensors(p, batch=3, size=(4, 11)).to(device)[:2]
    torch.testing.assert_close(program.module()(*others), dcnv4(*others, *p), rtol=0, atol=0)


def test_meta_tensors_get_the_shapes():
    p = Parameters(kernel_size=(2, 3), stride=(2, 1), padding=(0, 2))
    tensors = random_tensors(p)
    value, offset_mask, grad_output = tensors.to("meta")
    inputs = value.requires_grad_(), offset_mask.requires_grad_()
    output = dcnv4(*inputs, *p)
    results = (*torch.autograd.grad(output, inputs, grad_output), output)
    assert all(result.is_meta for result in results)
    assert [result.shape for result in results] == [tensor.shape for tensor in tensors]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs(dtype, device):
    p = Parameters()
    value, offset_mask, grad_output = random_tensors(p).to(torch.float32).to(device)
    inputs = value.requires_grad_(), offset_mask.to(torch.bfloat16).requires_grad_()
    with torch.autocast(device, dtype):
        output = dcnv4(*inputs, *p)
    grads = torch.autograd.grad(output, inputs, grad_output.to(dtype))
    in_dtype = run_operator(Tensors(*inputs, grad_output).to(dtype), p, device)
    expected = Result(
        in_dtype.output, in_dtype.grad_value.float(), in_dtype.grad_offset_mask.bfloat16()
    )
    assert_equal(Result(*(tensor.detach().cpu() for tensor in (output, *grads))), expected)


def test_autocast_leaves_float64_alone(device):
    value, offset_mask, _ = random_tensors(Parameters()).to(device)
    with torch.autocast(device, torch.bfloat16):
        output = dcnv4(value, offset_mask, *Parameters())
    expected = dcnv4(value, offset_mask, *Parameters())
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_second_derivative_is_rejected(device):
    value, offset_mask, _ = random_tensors(Parameters()).to(device)
    output = dcnv4(value.requires_grad_(), offset_mask, *Parameters())
    (grad,) = torch.autograd.grad(output.sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_derivatives_are_rejected(requires_grad, device):
    value, offset_mask, _ = random_tensors(Parameters()).to(device)
    value.requires_grad_(requires_grad)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        dcnv4(forward_ad.make_dual(value, value), offset_mask, *Parameters())
