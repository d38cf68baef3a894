import importlib
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import attention, op, timing
from benchmarks.attention import SEPARATE, SHAPES, Shape
from benchmarks.competitors import (
    Competitor,
    Explicit,
    Unavailable,
    bytes_touched,
    expected_results,
)
from benchmarks.op import parse_shape
from ops_dcnv4 import reference

OURS, COMPETITORS = "ms_deform_attn", Shape.competitors
CPU = torch.device("cpu")
LEVELS = ((7, 9), (3, 5))
ENCODER = Shape(2, "tiny-encoder", LEVELS, heads=2, head_channels=16, points=3)
DECODER = replace(ENCODER, name="tiny-decoder", decoder_queries=5)
MMCV = "mmcv.ops.multi_scale_deform_attn"
GPU = SimpleNamespace(type="cuda")


@pytest.fixture
def mmcv():
    pytest.importorskip("mmcv")
    importlib.import_module("flash_internimage.openmmlab")
    return importlib.import_module(MMCV)


def on_gpu(dtype):
    return SimpleNamespace(value=SimpleNamespace(device=GPU, dtype=dtype))


def test_shapes_of_dino_are_parsed_with_one_image_by_default():
    assert parse_shape("dino-encoder") == SHAPES["dino-encoder"]
    assert parse_shape("16xdino-decoder") == replace(SHAPES["dino-decoder"], n=16)
    assert str(parse_shape("dino-encoder")) == "1xdino-encoder"
    assert parse_shape("dino-encoder").queries == 17821
    assert parse_shape("dino-decoder").queries == 900


@pytest.mark.parametrize("text", ["0xdino-encoder", "dino", "2x2xdino-encoder", "dino-encoder/16"])
def test_error_of_a_bad_shape_names_both_forms(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        op.main(["--shapes", text])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "must be NxHxWxC or NxHxWxC/D" in error
    assert f"or [Nx]dino-encoder or [Nx]dino-decoder, such as 2xdino-encoder, got '{text}'" in error


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_shapes_include_those_of_dino(device):
    assert {"dino-encoder", "dino-decoder"} <= set(op.SHAPES[device])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [ENCODER, DECODER], ids=str)
def test_bytes_touched_equal_the_sizes_of_the_tensors(shape, dtype):
    inputs = shape.random_inputs(dtype, CPU)
    read = inputs.value.nbytes + inputs.locations.nbytes + inputs.weights.nbytes
    touched = bytes_touched(inputs)
    assert touched["forward"] == read + inputs.grad_output.nbytes
    assert touched["backward"] == touched["forward"] + read
    assert touched["forward+backward"] == touched["forward"] + touched["backward"]
    assert inputs.packed.nbytes == inputs.locations.nbytes + inputs.weights.nbytes


@pytest.mark.parametrize("shape", [ENCODER, DECODER], ids=str)
def test_points_avoid_integer_positions(shape):
    inputs = shape.random_inputs(torch.float64, CPU)
    sizes = torch.tensor([[width, height] for height, width in LEVELS])[:, None]
    positions = inputs.locations * sizes - 0.5
    assert (positions - positions.round()).abs().min() > 0.0999


def test_points_of_the_encoder_surround_the_pixels():
    shape = replace(ENCODER, n=200)
    around = shape.random_inputs(torch.float64, CPU).locations.mean((0, 2, 4))  # (Lq, L, 2)
    corner = torch.tensor([0.5 / 9, 0.5 / 7], dtype=torch.float64)
    torch.testing.assert_close(around[0], corner.expand(2, 2), atol=0.1, rtol=0)
    torch.testing.assert_close(around[7 * 9 - 1], (1 - corner).expand(2, 2), atol=0.1, rtol=0)
    torch.testing.assert_close(shape.reference_points(CPU)[0, 7 * 9], torch.tensor([0.1, 1 / 6]))


def test_points_are_float32_for_16_bit_values():
    inputs = ENCODER.random_inputs(torch.bfloat16, CPU)
    assert inputs.value.dtype == inputs.grad_output.dtype == torch.bfloat16
    assert {t.dtype for t in (inputs.locations, inputs.weights, inputs.packed)} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [ENCODER, DECODER], ids=str)
@pytest.mark.parametrize("name", [OURS, "flash_deform_attn", "reference", "mmcv PyTorch"])
def test_competitor_computes_deformable_attention(name, shape, dtype, request):
    if name.startswith("mmcv"):
        request.getfixturevalue("mmcv")
    inputs = shape.random_inputs(getattr(torch, dtype), CPU)
    expected = expected_results(inputs)
    assert op.examine(COMPETITORS[name], inputs, expected) == {"status": "ok", "note": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cuda_operator_of_mmcv_is_called_as_in_its_layer(dtype, monkeypatch, mmcv):
    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, spatial_shapes, start, locations, weights, im2col_step):
            assert im2col_step == 64
            tensors = value, spatial_shapes, start, locations.type_as(value), weights.type_as(value)
            return Explicit.forward(ctx, reference, "ms_deform_attn", *tensors)

        @staticmethod
        def backward(ctx, grad_output):
            return *Explicit.backward(ctx, grad_output)[2:], None

    monkeypatch.setattr(mmcv, "MultiScaleDeformableAttnFunction", Operator)
    monkeypatch.setattr(attention, "require", lambda condition, reason: None)  # a GPU
    inputs = ENCODER.random_inputs(dtype, CPU)
    assert op.is_right(COMPETITORS["mmcv CUDA"], inputs, expected_results(inputs))


@pytest.mark.parametrize("name", [OURS, "flash_deform_attn"])
@pytest.mark.parametrize("what", ["output", "gradient of value", "gradient of the points"])
def test_wrong_competitor_is_detected(name, what):
    run, leaves, *_ = COMPETITORS[name]

    def run_wrongly(inputs):
        changed = {"gradient of value": leaves[0], "gradient of the points": leaves[1]}.get(what)
        if changed:
            tensor = getattr(inputs, changed)
            inputs = replace(inputs, **{changed: tensor.detach() + 0 * tensor})
        return run(inputs) * (1.01 if what == "output" else 1)

    inputs = DECODER.random_inputs(torch.float32, CPU)
    result = op.examine(Competitor(run_wrongly, leaves), inputs, expected_results(inputs))
    assert result == {"status": "wrong", "note": None}


def test_competitor_without_a_gradient_fails():
    def run(inputs):
        return COMPETITORS["reference"].run(replace(inputs, weights=inputs.weights.detach()))

    inputs = DECODER.random_inputs(torch.float32, CPU)
    result = op.examine(Competitor(run, SEPARATE), inputs, expected_results(inputs))
    assert result == {"status": "failed", "note": "RuntimeError"}


@pytest.mark.parametrize("name", ["mmcv PyTorch", "mmcv CUDA"])
@pytest.mark.parametrize("module", [MMCV, "mmcv.ops", "mmcv"])
def test_mmcv_that_cannot_be_imported_is_skipped_with_the_reason(name, module, monkeypatch):
    for absent in {MMCV, module}:
        monkeypatch.setitem(sys.modules, absent, None)  # makes importing it fail
    inputs = DECODER.random_inputs(torch.float32, CPU)
    result = op.examine(COMPETITORS[name], inputs, {})
    assert result == {"status": "skipped", "note": "not installed"}


@pytest.mark.parametrize(
    ("version", "dtype", "reason"),
    [
        ("not available", torch.float32, "built without CUDA"),
        ("12.6", torch.bfloat16, "not for bfloat16"),
    ],
)
def test_missing_cuda_operator_of_mmcv_is_skipped(version, dtype, reason, monkeypatch, mmcv):
    operators = importlib.import_module("mmcv.ops")
    monkeypatch.setattr(operators, "get_compiling_cuda_version", lambda: version)
    run = COMPETITORS["mmcv CUDA"].run
    with pytest.raises(Unavailable, match=reason):
        run(on_gpu(dtype))
    with pytest.raises(Unavailable, match="CUDA only"):
        run(DECODER.random_inputs(torch.float32, CPU))


@pytest.mark.slow
def test_run_accepts_both_kinds_of_shape(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device, min_time: 1e10)
    monkeypatch.setitem(SHAPES, "tiny-encoder", ENCODER)
    arguments = ["--shapes", "1x7x7x32", "3xtiny-encoder", "--skip", "mmcv PyTorch"]
    run = ["--device", "cpu", "--threads", "1", "--min-time", "1e-6", "--output", str(tmp_path)]
    op.main([*arguments, *run])
    table = capsys.readouterr().out
    (json_file,), (chart,) = tmp_path.glob("*.json"), tmp_path.glob("*.png")
    record = json.loads(json_file.read_text())

    assert record["settings"]["shapes"] == ["1x7x7x32/16", "3xtiny-encoder"]
    assert chart.read_bytes().startswith(b"\x89PNG")
    rows = {
        (r["competitor"], r["pass"]): r for r in record["results"] if r["shape"] == "3xtiny-encoder"
    }
    assert {name for name, _ in rows} == COMPETITORS.keys() - {"mmcv PyTorch"}
    touched = bytes_touched(replace(ENCODER, n=3).random_inputs(torch.float32, CPU))
    floor = touched["backward"] / 1e10
    fused, ours = rows["flash_deform_attn", "backward"], rows[OURS, "backward"]
    assert ours["ratio"] == 1
    assert fused["ratio"] == fused["seconds"] / ours["seconds"]
    assert fused["share_of_floor"] == pytest.approx(floor / fused["seconds"])
    assert rows["mmcv CUDA", "forward"]["status"] == "skipped"
    assert "3xtiny-encoder" in table
