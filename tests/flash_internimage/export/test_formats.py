"""Tests of exported files, run by their own runtimes."""

import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from onnx import load as load_onnx
from sklearn.datasets import load_digits
from torch import nn
from torch.fx import Node
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)

from flash_internimage.export import (
    FORMATS,
    DifferenceError,
    export_model,
    exporting,
    onnx,
    verification,
)
from flash_internimage.export.formats import trace
from flash_internimage.export.models import ExportableClassifier, exportable
from flash_internimage.export.tensors import call_with_arrays
from flash_internimage.inference import load_predictor
from flash_internimage.inference.classifier import Classifier
from tests.nano import CLASSIFIER, DIGITS


@pytest.fixture(autouse=True)
def always_clean(one_thread):
    """Apply to all tests of this module."""


@pytest.fixture(scope="module")
def images():
    """Return images of digits, (8, 8, 3) uint8."""
    gray = np.rint(load_digits().images[:150] * (255 / 16)).astype(np.uint8)
    return [np.repeat(image[..., None], 3, axis=2) for image in gray]


@pytest.fixture(scope="module")
def classifier(weights, images):
    predictor = load_predictor(CLASSIFIER, weights[CLASSIFIER], device="cpu")
    torch.manual_seed(0)
    model = timm.create_model(
        "flash_internimage_nano", depths=(1, 1), groups=(1, 2), num_classes=len(DIGITS)
    ).eval()
    predictor.model = model
    # A head of ridge regression: the logits of random weights are too close to compare classes.
    with torch.no_grad():
        inputs = torch.cat([*map(exportable(predictor, "nano").preprocessing, images)])
        features = model.forward_head(model.forward_features(inputs), pre_logits=True).double()
        features = torch.cat([features, torch.ones(len(images), 1)], 1)
        labels = torch.from_numpy(load_digits().target[: len(images)])
        squares = features.T @ features + 0.03 * torch.eye(features.shape[1])
        targets = features.T @ nn.functional.one_hot(labels).double()
        solution = torch.linalg.solve(squares, targets)
        model.head.weight.copy_(solution[:-1].T)
        model.head.bias.copy_(solution[-1])
    return predictor


@pytest.fixture(scope="module")
def program(classifier):
    return trace(exportable(classifier, "nano"), 32, 32)


@pytest.fixture(scope="module")
def onnx_file(classifier, program, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    onnx.write(program, exportable(classifier, "nano").metadata, path)
    return path


@pytest.fixture
def traced(program, onnx_file, monkeypatch):
    """Trace the classifier once for all formats, and time it briefly."""
    monkeypatch.setattr(exporting, "trace", lambda *_: program)
    monkeypatch.setattr(onnx, "write", lambda _, __, path: shutil.copy(onnx_file, path))
    monkeypatch.setattr(verification, "_SECONDS", 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_file_of_a_classifier(format, classifier, traced, tmp_path):
    path = tmp_path / f"model{FORMATS[format].suffix}"
    report = export_model(classifier, path, format, name="nano")
    assert [*tmp_path.iterdir()] == [path]
    assert report.size == path.stat().st_size
    shapes = {comparison.shape for comparison in report.comparisons}
    assert len(shapes) == len({shape[0] for shape in shapes}) == 3
    assert max(comparison.largest["logits"] for comparison in report.comparisons) < 1e-5
    assert all(timing.eager > 0 and timing.exported > 0 for timing in report.timings)
    metadata = FORMATS[format].load_module().read_metadata(path)
    assert (metadata["model"], metadata["task"]) == ("nano", "classification")
    assert (metadata["classes"], metadata["input_size"]) == ([*DIGITS], 32)
    assert metadata["images"].startswith("(N, 3, H, W) float32, RGB")
    assert metadata["mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert metadata["std"] == pytest.approx([58.395, 57.12, 57.375])


@pytest.mark.slow
def test_int8_file(classifier, traced, onnx_file, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "MIN_AGREEMENT_INT8", 0.0)  # the images are noise
    generator = np.random.default_rng(0)
    images = [generator.integers(256, size=(40, 32, 3), dtype=np.uint8) for _ in range(4)]
    path = tmp_path / "int8.onnx"
    report = export_model(classifier, path, calibration=images, timing=False)
    assert [*tmp_path.iterdir()] == [path]
    assert report.size < 0.6 * onnx_file.stat().st_size
    assert report.agreement is not None
    assert 1e-4 < max(comparison.largest["logits"] for comparison in report.comparisons) < 0.5
    assert onnx.read_metadata(path) == onnx.read_metadata(onnx_file)
    nodes = load_onnx(path).graph.node
    quantized = {output for n in nodes if n.op_type == "DequantizeLinear" for output in n.output}
    inputs = {
        kind: [n.input for n in nodes if n.op_type == kind] for kind in ("Conv", "DeformConv")
    }
    assert all(quantized.intersection(names) for names in inputs["Conv"])
    assert inputs["DeformConv"]
    assert not any(quantized.intersection(names) for names in inputs["DeformConv"])


RUN_INT8 = """
import sys
import ops_dcnv4
import torch
import torch.ao.quantization.quantize_fx
program = torch.export.load(sys.argv[1])
(logits,) = program.module()(torch.load(sys.argv[2]))
torch.save(logits, sys.argv[3])
"""


def kinds(nodes):
    return {node.target.__name__.split(".")[0] for node in nodes if node.op == "call_function"}


@pytest.mark.slow
def test_int8_program(classifier, program, images, tmp_path, monkeypatch):
    earlier = [program]
    monkeypatch.setattr(exporting, "trace", lambda *a: earlier.pop() if earlier else trace(*a))
    path = tmp_path / "int8.pt2"
    report = export_model(classifier, path, "torch-export", calibration=images, timing=False)
    assert [*tmp_path.iterdir()] == [path]
    assert report.agreement >= 0.98
    assert 1e-4 < max(comparison.largest["logits"] for comparison in report.comparisons) < 0.2
    quantized = torch.export.load(path)
    layers = [n for n in quantized.graph.nodes if kinds([n]) & {"linear", "conv2d"}]
    for layer in layers:
        operands = [argument for argument in layer.args[:2] if isinstance(argument, Node)]
        assert kinds(operands) == {"dequantize_per_tensor", "dequantize_per_channel"}
    samplings = [n for n in quantized.graph.nodes if kinds([n]) == {"dcnv4"}]
    assert (len(layers), len(samplings)) == (15, 2)
    assert all(kinds(sampling.all_input_nodes) == {"linear"} for sampling in samplings)
    assert {t.dtype for t in quantized.state_dict.values() if t.dim() > 1} == {torch.int8}

    # In another process, without torchao.
    model = exportable(classifier, "nano")
    inputs = torch.cat([model.preprocessing(image) for image in images])
    torch.save(inputs, tmp_path / "images")
    arguments = [path, tmp_path / "images", tmp_path / "logits"]
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUN_INT8, *arguments], check=True)
    [expected] = model(inputs)
    equal = torch.load(tmp_path / "logits").argmax(1) == expected.argmax(1)
    assert equal.double().mean() >= 0.98


def test_runtimes_of_pytorch_get_contiguous_images():
    strides = []
    run = call_with_arrays(lambda images: strides.append(images.stride()) or (), (), None)
    run(np.zeros((2, 4, 5, 3), np.float32).transpose(0, 3, 1, 2))
    assert strides == [(60, 20, 5, 1)]


@pytest.mark.slow
def test_sizes_of_images_are_named_in_onnx_files(onnx_file):
    graph = load_onnx(onnx_file).graph
    [images], [logits] = (
        [[size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]]
        for [value] in (graph.input, graph.output)
    )
    assert images == ["batch", 3, "height", "width"]
    assert logits == ["batch", len(DIGITS)]


def test_int8_with_other_classes_is_not_kept(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "trace", lambda *_: None)
    monkeypatch.setattr(exporting, "quantize_file", lambda *_: None)
    monkeypatch.setattr("flash_internimage.export.formats.Format.load_module", lambda _: Wrong())
    images = [np.full((32, 32, 3), level, np.uint8) for level in (0, 255)]
    with pytest.raises(DifferenceError, match="calibration images must agree by at least 95%"):
        export_model(classifier, tmp_path / "model.onnx", calibration=images)
    assert not [*tmp_path.iterdir()]


def test_dtype_is_that_of_the_traced_weights(classifier, tmp_path, monkeypatch):
    def refuse(model, *_):
        traced.append(model)
        raise RuntimeError

    traced = []
    monkeypatch.setattr(exporting, "trace", refuse)
    with pytest.raises(ValueError, match="cannot be traced"):
        export_model(classifier, tmp_path / "model.pt2", "torch-export", dtype="bfloat16")
    [model] = traced
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in classifier.model.parameters()} == {torch.float32}
    images = torch.rand(2, 3, 32, 32)
    [actual], [expected] = model(images), exportable(classifier, "nano")(images)
    assert actual.dtype == torch.float32
    assert 0 < (actual - expected).abs().max() < 0.05 * expected.abs().max()
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .*, got 'int4'"):
        export_model(classifier, tmp_path / "model.pt2", "torch-export", dtype="int4")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 33, 5), (3, 3, 96, 64)])
def test_a_traced_program_takes_images_of_any_size(shape, classifier, program):
    images = torch.rand(shape)
    [logits] = program.module()(images)
    torch.testing.assert_close(logits, exportable(classifier, "nano")(images)[0])


class Traced(ExportableClassifier):
    """A classifier whose trace is that of a copy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.traced = copy.deepcopy(model)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.traced(images),)


def test_a_program_contains_the_weights_that_it_reads():
    model = Traced(nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))).eval()
    model.requires_grad_(False)
    program = trace(model, 8, 8)
    assert {key.split(".")[0] for key in program.state_dict} == {"traced"}
    images = torch.rand(1, 3, 9, 7)
    torch.testing.assert_close(program.module()(images), model(images))


def test_a_program_with_pooling_takes_maps_of_odd_and_even_sizes():
    model = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 2, ceil_mode=True), nn.Flatten(2))
    wrapped = ExportableClassifier(model).eval()
    program = trace(wrapped, 130, 132)
    for size in ((65, 66), (67, 68), (1, 3)):
        images = torch.rand(1, 3, *size)
        assert program.module()(images)[0].equal(wrapped(images)[0])


class OneSize(nn.Module):
    """A model for images of one size, whose logits are the mean colors."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[2:] == (32, 32), "images must have 32 x 32 pixels"
        return images.mean((2, 3))


def test_a_model_for_one_size_is_refused_without_preprocessing(tmp_path):
    steps = [Resize(32), ToTensor(), Normalize((0.5,) * 3, (0.2,) * 3)]
    predictor = Classifier(OneSize(), Compose(steps), ("red", "green", "blue"))
    message = (
        "model must accept images of any size or be exported with preprocessing, but one fails for "
        "24 x 40 pixels: AssertionError: images must have 32 x 32 pixels"
    )
    with pytest.raises(ValueError, match=message):
        export_model(predictor, tmp_path / "model.pt2", "torch-export", name="one")
    assert not [*tmp_path.iterdir()]


class Colors(nn.Module):
    """A model whose logits are the mean colors."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.mark.slow
def test_onnx_file_with_preprocessing(tmp_path):
    colors = Normalize((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    steps = [Resize(40, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(), colors]
    predictor = Classifier(Colors(), Compose(steps), ("red", "green", "blue"))
    path = tmp_path / "model.onnx"
    report = export_model(predictor, path, with_preprocessing=True, timing=False)
    assert {comparison.shape[3] for comparison in report.comparisons} == {3}
    assert max(comparison.largest["logits"] for comparison in report.comparisons) < 1e-3
    assert onnx.read_metadata(path)["images"] == "(N, H, W, 3) uint8, RGB"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": CLASSIFIER}, "predictor must be one that load_predictor returns, got str"),
        ({"tolerance": float("nan")}, "tolerance must be a positive number, got nan"),
        ({"images": ["a.png"]}, r"images must be arrays \(H, W, 3\) of uint8, got str"),
        ({"images": np.zeros((1, 0, 0, 3), np.uint8)}, r"got one of uint8 with the shape \(0, 0"),
        ({"calibration": [np.zeros((4, 4, 3))]}, "calibration must be .* got one of float64 with"),
    ],
)
def test_wrong_arguments_are_named(options, message, classifier, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model(**{"predictor": classifier, "path": tmp_path / "model.onnx", **options})


def test_an_error_of_the_exporter_is_that_of_its_cause(classifier, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("step 2 of 3\nNext steps:") from KeyError("the cause")

    monkeypatch.setattr(exporting, "trace", fail)
    with pytest.raises(ValueError, match="cannot be traced for onnx: KeyError: 'the cause'"):
        export_model(classifier, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left"), "^the model cannot be traced for onnx: No space left$"),
        (OSError(13, "Permission denied", "a.onnx"), r"^\[Errno 13\] Permission denied: 'a.onnx'$"),
    ],
)
def test_errors_of_the_system_name_a_file_or_a_step(
    error, message, classifier, tmp_path, monkeypatch
):
    def fail(*_):
        raise error

    monkeypatch.setattr(exporting, "trace", fail)
    with pytest.raises(OSError, match=message):
        export_model(classifier, tmp_path / "model.onnx")


class Wrong:
    """A format whose files compute zeros."""

    def write(self, program, metadata, path) -> None:
        path.write_text(json.dumps(metadata.task))

    def load(self, path, threads=None):
        assert json.loads(path.read_text()) == "classification"
        return lambda images: {"logits": np.zeros((len(images), 10), np.float32)}


class OtherShape(Wrong):
    """A format whose files compute an output of another shape."""

    def load(self, path, threads=None):
        return lambda images: {"logits": np.zeros((len(images), 11), np.float32)}


@pytest.mark.parametrize("wrong", [Wrong, OtherShape])
def test_a_file_that_computes_something_else_is_not_kept(wrong, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "trace", lambda *_: None)
    monkeypatch.setattr("flash_internimage.export.formats.Format.load_module", lambda _: wrong())
    path = tmp_path / "model.onnx"
    path.write_text("earlier")
    with pytest.raises(DifferenceError, match="must "):
        export_model(classifier, path)
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_text() == "earlier"
