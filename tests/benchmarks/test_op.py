import json
import math
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import attention, competitors, op, timing
from benchmarks.competitors import Competitor, bytes_touched, expected_results
from benchmarks.dcnv4 import LEAVES, Shape
from benchmarks.op import parse_shape
from ops_dcnv4 import choose_backend, reference

CPU = torch.device("cpu")
OURS, COMPETITORS = "ops_dcnv4", Shape.competitors
TINY = Shape(2, 7, 14, 64, 16)
OTHER_DEVICES = ("triton",)
SAME = [
    name
    for name, competitor in COMPETITORS.items()
    if not competitor.baseline and name not in OTHER_DEVICES
]
ATTENTION = attention.Shape(1, "tiny", ((3, 5),), heads=2, head_channels=16, points=3)
TINY_RUN = ("--device", "cpu", "--min-time", "1e-6")

# Microseconds in float16 of forward, its gather in L1, and backward (shared/facts/performance.md).
FLOORS = {
    "64x56x56x64": (22.4, 27.6, 38.8),
    "64x28x28x128": (11.0, 13.8, 19.0),
    "64x14x14x256": (5.5, 6.9, 9.5),
    "64x7x7x512": (2.8, 3.5, 4.8),
    "64x56x56x128": (44.1, 55.3, 76.2),
    "64x56x56x128/32": (34.4, 55.3, 56.8),
    "64x28x28x256/32": (17.0, 27.6, 28.0),
    "1x200x320x128": (14.1, 17.6, 24.3),
    "1x200x320x128/32": (11.0, 17.6, 18.1),
}


@pytest.fixture
def quick(monkeypatch):
    """Use few input sets, and skip the bandwidth measurement."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device, min_time: 1e10)


@pytest.fixture
def publish(monkeypatch):
    """Return a function that installs a fake package `DCNv4` with scaled outputs."""

    def install(factor: float) -> None:
        class DCNv4Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value, offset_mask, *args):
                kernel, stride, padding, dilation = zip(args[0:8:2], args[1:8:2], strict=True)
                groups, group_channels, offset_scale, _, remove_center = args[8:]
                assert groups * group_channels == value.shape[3]
                assert offset_mask.shape[3] % 8 == 0
                ctx.save_for_backward(value, offset_mask)
                ctx.parameters = (kernel, stride, padding, dilation, groups, offset_scale, False)
                assert remove_center == 0
                return factor * reference.dcnv4(value, offset_mask, *ctx.parameters)

            @staticmethod
            def backward(ctx, grad_output):
                grads = reference.dcnv4_backward(grad_output, *ctx.saved_tensors, *ctx.parameters)
                return *grads, *[None] * 13

        functions = ModuleType("DCNv4.functions")
        monkeypatch.setattr(functions, "DCNv4Function", DCNv4Function, raising=False)
        monkeypatch.setitem(sys.modules, "DCNv4", ModuleType("DCNv4"))
        monkeypatch.setitem(sys.modules, "DCNv4.functions", functions)

    return install


def test_shape_is_parsed_with_16_channels_per_group_by_default():
    assert parse_shape("64x56x48x128") == Shape(64, 56, 48, 128, 16)
    assert parse_shape("64x56x48x128/32") == Shape(64, 56, 48, 128, 32)
    assert str(parse_shape("1x2x3x32")) == "1x2x3x32/16"


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("--shapes", "56x56x64", "must be NxHxWxC or NxHxWxC/D"),
        ("--shapes", "0x56x56x64", "got '0x56x56x64'"),
        ("--shapes", "1x7x7x64/48", "C must be divisible by D, got '1x7x7x64/48' with C = 64"),
        ("--dtypes", "float8", "invalid choice: 'float8'"),
        ("--skip", OURS, "invalid choice: 'ops_dcnv4'"),
        ("--device", "tpu", "invalid choice: 'tpu'"),
        ("--threads", "0", "must be a positive integer, got '0'"),
        ("--min-time", "soon", "must be a positive number, got 'soon'"),
    ],
)
def test_one_error_names_the_bad_argument(option, text, expected, capsys):
    with pytest.raises(SystemExit, match="2"):
        op.main([option, text])
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}" in error
    assert expected in error


@pytest.mark.parametrize("text", FLOORS)
def test_bandwidth_bounds_equal_those_derived_for_the_h200(text, monkeypatch):
    h200 = SimpleNamespace(multi_processor_count=132, clock_rate=1_980_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    shape, (forward, gather, backward) = parse_shape(text), FLOORS[text]
    meta = shape.random_inputs(torch.float16, torch.device("meta"))
    touched = {name: 1e6 * size / 4.3e12 for name, size in bytes_touched(meta).items()}
    assert touched["forward"] == pytest.approx(forward, abs=0.06)
    assert touched["backward"] == pytest.approx(backward, abs=0.06)
    assert touched["forward+backward"] == touched["forward"] + touched["backward"]
    value = SimpleNamespace(device=torch.device("cuda"))
    assert 1e6 * op.l1_floor(replace(meta, value=value)) == pytest.approx(gather, abs=0.06)


def test_expected_results_equal_the_whole_batch_in_float64():
    inputs = TINY.random_inputs(torch.float64, CPU)
    output = COMPETITORS["reference"].run(inputs)
    value, offset_mask = COMPETITORS["reference"].gradients(inputs, output)
    expected = expected_results(inputs)
    torch.testing.assert_close(expected["output"], output)
    torch.testing.assert_close(expected["value"], value)
    torch.testing.assert_close(expected["offset_mask"], offset_mask[..., : 3 * 9 * 4])


@pytest.mark.parametrize("shape", [TINY, Shape(1, 5, 6, 48, 24), Shape(2, 7, 7, 64, 32)], ids=str)
@pytest.mark.parametrize("name", SAME)
def test_competitor_computes_dcnv4(name, shape, publish):
    publish(factor=1)
    inputs = shape.random_inputs(torch.float32, CPU)
    expected = expected_results(inputs)
    assert op.examine(COMPETITORS[name], inputs, expected) == {"status": "ok", "note": None}


@pytest.mark.parametrize("inputs", [TINY, ATTENTION], ids=str)
def test_triton_is_called_like_the_reference(inputs, monkeypatch):
    monkeypatch.setattr(competitors, "load", lambda module: reference)
    monkeypatch.setattr(competitors, "require", lambda condition, reason: None)  # a GPU
    inputs = inputs.random_inputs(torch.float32, CPU)
    triton = inputs.shape.competitors["triton"]
    assert op.examine(triton, inputs, expected_results(inputs)) == {"status": "ok", "note": None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [OURS, "reference", "grid_sample", "tuned grid_sample"])
def test_competitor_computes_dcnv4_in_other_dtypes(name, dtype):
    inputs = TINY.random_inputs(dtype, CPU)
    expected = expected_results(inputs)
    assert op.examine(COMPETITORS[name], inputs, expected) == {"status": "ok", "note": None}


@pytest.mark.parametrize("wrong", ["output", *LEAVES])
def test_wrong_competitor_is_detected(wrong):
    def run(inputs):
        if wrong in LEAVES:
            tensor = getattr(inputs, wrong)
            inputs = replace(inputs, **{wrong: tensor.detach() + 0 * tensor})
        return COMPETITORS["reference"].run(inputs) * (1.01 if wrong == "output" else 1)

    inputs = TINY.random_inputs(torch.float32, CPU)
    result = op.examine(Competitor(run, LEAVES), inputs, expected_results(inputs))
    assert result == {"status": "wrong", "note": None}


def test_gradient_of_the_padding_is_ignored():
    inputs = Shape(1, 5, 5, 16, 16).random_inputs(torch.float32, CPU)

    def run(inputs):
        return COMPETITORS["reference"].run(inputs) + inputs.offset_mask[..., 27:].sum()

    assert op.is_right(Competitor(run, LEAVES), inputs, expected_results(inputs))


@pytest.mark.parametrize("name", ["window attention", "global attention"])
def test_attention_matches_its_definition(name):
    inputs = TINY.random_inputs(torch.float64, CPU)
    n, height, width, channels = inputs.value.shape
    row, column = (torch.arange(size) // 7 for size in (height, width))
    window = (row[:, None] * width + column).flatten()
    visible = window == window[:, None]
    if name == "global attention":
        visible = torch.ones_like(visible)
    q, k, v = inputs.qkv.view(n, height * width, 3, 2, 32).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(2, 3) / math.sqrt(32)).masked_fill(~visible, -math.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, height, width, channels)
    torch.testing.assert_close(COMPETITORS[name].run(inputs), expected)


@pytest.mark.parametrize(
    ("name", "shape", "note"),
    [
        ("window attention", Shape(1, 8, 7, 64), "windows of 7x7"),
        ("window attention", Shape(1, 7, 7, 16), "heads of 32 channels"),
        ("global attention", Shape(1, 65, 64, 32), "over 4096 tokens"),
        ("published DCNv4", TINY, "not installed"),
        ("triton", TINY, "CUDA only"),
    ],
    ids=str,
)
def test_inapplicable_competitor_is_skipped_with_the_reason(name, shape, note, monkeypatch):
    monkeypatch.setitem(sys.modules, "DCNv4", None)  # makes importing it fail
    monkeypatch.setitem(sys.modules, "DCNv4.functions", None)
    inputs = shape.random_inputs(torch.float32, CPU)
    assert op.examine(COMPETITORS[name], inputs, {}) == {"status": "skipped", "note": note}


def test_cell_of_a_failing_competitor_gives_the_reason():
    def run(inputs):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB at /home/someone")

    inputs = TINY.random_inputs(torch.float32, CPU)
    competitors = {OURS: COMPETITORS[OURS], "fails": Competitor(run, LEAVES)}
    floors = dict.fromkeys(op.PASSES, 1e-6)
    results = op.time_competitors(competitors, [inputs], floors, min_time=1e-6)
    cells = {result["competitor"]: op.cell(result) for result in results}
    assert cells["fails"] == "(out of memory)"
    assert "1.00x" in cells[OURS]


def test_input_sets_exceed_twice_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 10**6)
    sets = op.input_sets(TINY, torch.float32, CPU)
    assert len(sets) * bytes_touched(sets[0])["forward"] >= 2 * 10**6


@pytest.mark.slow
def test_run_writes_table_json_and_chart(quick, publish, tmp_path, capsys):
    publish(factor=2)
    arguments = ["--shapes", "2x7x7x32", "1x8x7x32/32", "--dtypes", "float32", "bfloat16"]
    op.main([*TINY_RUN, *arguments, "--threads", "1", "--output", str(tmp_path)])
    table = capsys.readouterr().out
    (json_file,), (chart,) = tmp_path.glob("op_*-1-thread.json"), tmp_path.glob("*.png")
    record = json.loads(json_file.read_text())

    assert chart.stem == json_file.stem
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert record["benchmark"] == "op"
    assert record["machine"]["threads"] == 1
    assert record["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert record["date"].endswith("+00:00")
    assert record["settings"]["copy_bandwidth"] == 1e10
    assert record["settings"]["backend"] == choose_backend("cpu")
    assert len(record["results"]) == 2 * 2 * 3 * len(COMPETITORS)
    for text in (socket.gethostname(), str(Path.cwd()), str(Path.home())):
        assert text not in json_file.read_text()

    results = {(r["shape"], r["dtype"], r["pass"], r["competitor"]): r for r in record["results"]}
    at = ("1x8x7x32/32", "float32", "backward")
    touched = bytes_touched(Shape(1, 8, 7, 32, 32).random_inputs(torch.float32, CPU))
    floor = touched["backward"] / 1e10
    ours = results[*at, OURS]
    assert ours["status"] == "ok"
    assert ours["ratio"] == 1
    assert ours["share_of_floor"] == pytest.approx(floor / ours["seconds"])
    assert results[*at, "published DCNv4"]["status"] == "wrong"
    assert "seconds" in results[*at, "published DCNv4"]
    assert results[*at, "window attention"]["note"] == "windows of 7x7"
    assert "share_of_floor" not in results[*at, "depth-wise 7x7"]
    assert "wrong" in table
    assert "(windows of 7x7)" in table


def test_skipped_competitors_are_omitted(quick, tmp_path, capsys):
    skip = ["--skip", *COMPETITORS.keys() - {OURS}]
    op.main([*TINY_RUN, "--shapes", "1x7x7x32", *skip, "--output", str(tmp_path)])
    (json_file,) = tmp_path.glob("*.json")
    assert {r["competitor"] for r in json.loads(json_file.read_text())["results"]} == {OURS}


def test_run_fails_but_continues_if_our_operator_is_wrong(quick, monkeypatch, tmp_path):
    run = COMPETITORS[OURS].run
    wrong = Competitor(lambda inputs: (1 + (inputs.shape.n == 1)) * run(inputs), LEAVES)
    monkeypatch.setitem(COMPETITORS, OURS, wrong)
    skip = ["--skip", *COMPETITORS.keys() - {OURS}]
    shapes = ["--shapes", "1x7x7x32", "2x7x7x32"]
    with pytest.raises(SystemExit, match="ops_dcnv4 at 1x7x7x32/16, float32: wrong results"):
        op.main([*TINY_RUN, *shapes, *skip, "--output", str(tmp_path)])
    (json_file,) = tmp_path.glob("*.json")
    results = json.loads(json_file.read_text())["results"]
    assert [result["status"] for result in results] == ["wrong"] * 3 + ["ok"] * 3
    assert ["seconds" in result for result in results] == [False] * 3 + [True] * 3
