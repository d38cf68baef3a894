"""Test the operators in ONNX, computed by onnxruntime."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ops_dcnv4
from ops_dcnv4 import DCNv4Conv2d, FlashDeformAttn, reference
from tests.ops_dcnv4 import attention_cases
from tests.ops_dcnv4.cases import VARIED, Parameters, random_tensors

onnxruntime = pytest.importorskip("onnxruntime")
translation_table = pytest.importorskip("ops_dcnv4.onnx").translation_table

FORMS = ("deform_conv", "gather")


class Call(nn.Module):
    """A function as a module, with inputs and outputs of another dtype than its computation."""

    def __init__(self, function: Callable, dtype: torch.dtype):
        super().__init__()
        self.function = function
        self.dtype = dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        converted = (t.to(self.dtype) if t.is_floating_point() else t for t in inputs)
        return self.function(*converted).to(inputs[0].dtype)


def export(
    path: Path, model: nn.Module, inputs: tuple, form: str, opset: int = 19, **options
) -> Callable:
    """Export a model, and return a function that runs it in onnxruntime."""
    torch.onnx.export(
        model, inputs, path, dynamo=True, opset_version=opset, verbose=False,
        custom_translation_table=translation_table(form), optimize=False, **options,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        arrays = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", VARIED.values(), ids=VARIED)
def test_dcnv4(p, form, tmp_path, assert_near):
    value, offset_mask, _ = random_tensors(p, spread=3.0)
    model = Call(lambda *tensors: ops_dcnv4.dcnv4(*tensors, *p), torch.float64)
    run = export(tmp_path / "m.onnx", model, (value, offset_mask), form)
    expected = reference.dcnv4(value, offset_mask, *p)
    assert_near(run(value, offset_mask), expected, 1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_a_window_without_taps(form, tmp_path):
    p = Parameters(kernel_size=(1, 1), padding=(0, 0), remove_center=True)
    value, offset_mask, _ = random_tensors(p, padding_channels=0)
    model = Call(lambda *tensors: ops_dcnv4.dcnv4(*tensors, *p), torch.float64)
    run = export(tmp_path / "m.onnx", model, (value, offset_mask), form)
    assert run(value, offset_mask).equal(reference.dcnv4(value, offset_mask, *p))


@pytest.mark.parametrize("form", attention_cases.FORMS)
def test_attention(form, tmp_path, assert_near):
    inputs = attention_cases.random_inputs(spread=2.0)
    tensors = tuple(inputs)[:-1]
    model = Call(
        lambda *tensors: attention_cases.call(inputs._replace(**named(tensors)), form),
        torch.float64,
    )

    def named(tensors: tuple) -> dict:
        return dict(zip(inputs._fields, tensors, strict=False))

    batch = {0: torch.export.Dim.DYNAMIC}
    shapes = (tuple(batch if t.is_floating_point() else {} for t in tensors),)
    run = export(
        tmp_path / "m.onnx", model, tensors, "deform_conv", opset=18, dynamic_shapes=shapes
    )
    expected = attention_cases.run_reference(inputs, form).output
    assert_near(run(*tensors), expected, 1e-13)
    empty = run(*(t[:0] if t.is_floating_point() else t for t in tensors))
    assert empty.shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_are_computed_in_float32(dtype, form, tmp_path, assert_near):
    p = Parameters()
    inputs = tuple(t.to(dtype).float() for t in random_tensors(p)[:2])
    model = Call(lambda *tensors: ops_dcnv4.dcnv4(*tensors, *p), dtype)
    run = export(tmp_path / "m.onnx", model, inputs, form)
    expected = reference.dcnv4(*(t.double() for t in inputs), *p)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert_near(run(*inputs).double(), expected, tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_sizes_are_dynamic(form, tmp_path, assert_near):
    torch.manual_seed(0)
    model = DCNv4Conv2d(32, 32, 3, stride=2, padding=1).double().requires_grad_(False)
    nn.init.normal_(model.offset_mask.weight, std=0.5)
    dynamic = torch.export.Dim.DYNAMIC
    image = torch.randn(2, 32, 8, 6, dtype=torch.float64)
    run = export(
        tmp_path / "m.onnx",
        model,
        (image,),
        form,
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
    )
    for shape in ((1, 32, 5, 9), (3, 32, 16, 7), (0, 32, 5, 9)):
        image = torch.randn(shape, dtype=torch.float64)
        assert_near(run(image), model(image), 1e-13)


class TwoLevels(nn.Module):
    """Attention of some queries to two feature maps."""

    def __init__(self):
        super().__init__()
        self.attention = FlashDeformAttn(16, n_levels=2, n_heads=2, n_points=2)

    def forward(self, queries: Tensor, *maps: Tensor) -> Tensor:
        pixels = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        points = queries[..., :2].sigmoid().unsqueeze(2).expand(-1, -1, 2, -1)
        return self.attention(queries, points, pixels, [tuple(x.shape[2:]) for x in maps])


def test_levels_are_dynamic(tmp_path, assert_near):
    torch.manual_seed(0)
    model = TwoLevels().double().requires_grad_(False)

    def inputs(batch: int, queries: int, *sizes: tuple[int, int]) -> tuple[Tensor, ...]:
        shapes = (batch, queries, 16), *((batch, 16, *size) for size in sizes)
        return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)

    dynamic = torch.export.Dim.DYNAMIC
    size = {0: dynamic, 2: dynamic, 3: dynamic}
    shapes = ({0: dynamic, 1: dynamic}, (size, size))
    example = inputs(2, 5, (6, 7), (3, 4))
    run = export(tmp_path / "m.onnx", model, example, "deform_conv", dynamic_shapes=shapes)
    for tensors in (
        inputs(3, 4, (8, 5), (4, 3)),
        inputs(1, 9, (5, 5), (2, 6)),
        inputs(0, 4, (5, 5), (2, 6)),
    ):
        assert_near(run(*tensors), model(*tensors), 1e-13)


def test_deform_conv_needs_opset_19(tmp_path):
    p = Parameters()
    model = Call(lambda *tensors: ops_dcnv4.dcnv4(*tensors, *p), torch.float32)
    with pytest.raises(torch.onnx.OnnxExporterError) as raised:
        export(tmp_path / "m.onnx", model, random_tensors(p)[:2], "deform_conv", opset=18)
    cause: BaseException = raised.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert str(cause).startswith("opset_version must be at least 19 for the form 'deform_conv'")
    assert not [*tmp_path.iterdir()]


def test_an_unknown_form():
    with pytest.raises(ValueError, match="form must be one of deform_conv, gather, got 'grid'"):
        translation_table("grid")
