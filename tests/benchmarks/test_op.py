import json
import math
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import dcnv4 as op_competitors
from benchmarks import op as benchmark_op
from benchmarks import record as benchmarking
from benchmarks.competitors import Competitor
from benchmarks.dcnv4 import COMPETITORS, LEAVES, OURS, Shape
from benchmarks.op import parse_shape
from ops_dcnv4 import is_compiled, reference

CPU = torch.device("cpu")
TINY = Shape(2, 7, 14, 64, 16)
SAME = [name for name, competitor in COMPETITORS.items() if not competitor.yardstick]
COMMITTED = list((Path(__file__).parents[2] / "benchmarks/results").glob("op_*.json"))
TINY_RUN = ("--device", "cpu", "--min-time", "1e-6")

# shared/facts/performance.md, fp16: microseconds of forward, its gather in L1, and backward.
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
    """Few input sets, and no copy of hundreds of megabytes."""
    monkeypatch.setattr(benchmarking, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(benchmarking, "copy_bandwidth", lambda device: 1e10)


@pytest.fixture
def publish(monkeypatch):
    """Makes `DCNv4` importable, with the operator of this project times `factor`."""

    def install(factor: float) -> None:
        class DCNv4Function(op_competitors.Reference):
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
        functions.DCNv4Function = DCNv4Function
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
        ("--shapes", "56x56x64", "'56x56x64' must be NxHxWxC or NxHxWxC/D"),
        ("--shapes", "0x56x56x64", "'0x56x56x64' must be NxHxWxC"),
        ("--shapes", "1x7x7x64/48", "a D that divides C, got D = 48 and C = 64"),
        ("--dtypes", "float8", "invalid choice: 'float8'"),
        ("--skip", OURS, "invalid choice: 'ops_dcnv4'"),
        ("--device", "tpu", "'tpu' must be one of auto, cpu"),
        ("--threads", "0", "'0' must be a positive integer"),
        ("--min-time", "soon", "'soon' must be a positive number"),
    ],
)
def test_bad_argument_is_one_error_that_names_it(option, text, expected, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark_op.main([option, text])
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}" in error
    assert expected in error


@pytest.mark.parametrize("text", FLOORS)
def test_floors_are_those_derived_for_the_h200(text, monkeypatch):
    h200 = SimpleNamespace(multi_processor_count=132, clock_rate=1_980_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    shape, (forward, gather, backward) = parse_shape(text), FLOORS[text]
    touched = {name: 1e6 * n / 4.3e12 for name, n in shape.bytes_touched(torch.float16).items()}
    assert touched["forward"] == pytest.approx(forward, abs=0.06)
    assert touched["backward"] == pytest.approx(backward, abs=0.06)
    assert touched["forward+backward"] == touched["forward"] + touched["backward"]
    l1_floor = benchmark_op.l1_floor(shape, torch.float16, torch.device("cuda"))
    assert 1e6 * l1_floor == pytest.approx(gather, abs=0.06)


def test_bytes_touched_are_those_of_the_tensors():
    inputs = TINY.random_inputs(torch.float32, CPU)
    value, offset_mask, output = inputs.value, inputs.offset_mask, inputs.grad_output
    touched = TINY.bytes_touched(torch.float32)
    assert touched["forward"] == value.nbytes + offset_mask.nbytes + output.nbytes
    assert touched["backward"] == touched["forward"] + value.nbytes + offset_mask.nbytes


@pytest.mark.parametrize("shape", [TINY, Shape(1, 5, 6, 48, 24), Shape(2, 7, 7, 64, 32)], ids=str)
@pytest.mark.parametrize("name", SAME)
def test_competitor_computes_dcnv4(name, shape, publish):
    publish(factor=1)
    inputs = shape.random_inputs(torch.float32, CPU)
    expected = inputs.shape.expected_results(inputs)
    assert benchmark_op.examine(name, inputs, expected) == ("ok", None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [OURS, "reference", "grid_sample", "tuned grid_sample"])
def test_competitor_computes_dcnv4_in_other_dtypes(name, dtype):
    inputs = TINY.random_inputs(dtype, CPU)
    expected = inputs.shape.expected_results(inputs)
    assert benchmark_op.examine(name, inputs, expected) == ("ok", None)


@pytest.mark.parametrize("what", ["output", "grad_value", "grad_offset_mask"])
def test_wrong_competitor_is_caught(what, monkeypatch):
    def run(inputs):
        changed = {"grad_value": "value", "grad_offset_mask": "offset_mask"}.get(what)
        if changed:
            tensor = getattr(inputs, changed)
            inputs = inputs._replace(**{changed: tensor.detach() + 0 * tensor})
        return op_competitors.run_reference(inputs) * (1.01 if what == "output" else 1)

    monkeypatch.setitem(COMPETITORS, "grid_sample", Competitor(run, LEAVES))
    inputs = TINY.random_inputs(torch.float32, CPU)
    expected = inputs.shape.expected_results(inputs)
    assert benchmark_op.examine("grid_sample", inputs, expected) == ("wrong", None)


def test_gradient_of_the_padding_may_be_anything():
    inputs = Shape(1, 5, 5, 16, 16).random_inputs(torch.float32, CPU)

    def run(inputs):
        return op_competitors.run_reference(inputs) + inputs.offset_mask[..., 27:].sum()

    expected = inputs.shape.expected_results(inputs)
    assert benchmark_op.is_right(Competitor(run, LEAVES), inputs, expected)


@pytest.mark.parametrize("name", ["window attention", "global attention"])
def test_attention_is_that_of_its_definition(name):
    inputs = TINY.random_inputs(torch.float64, CPU)
    n, height, width, channels, _ = TINY
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
    ],
    ids=str,
)
def test_competitor_that_does_not_apply_is_skipped_with_the_reason(name, shape, note, monkeypatch):
    monkeypatch.setitem(sys.modules, "DCNv4", None)  # makes its import fail
    monkeypatch.setitem(sys.modules, "DCNv4.functions", None)
    inputs = shape.random_inputs(torch.float32, CPU)
    assert benchmark_op.examine(name, inputs, {}) == ("skipped", note)


def test_failing_competitor_gets_a_cell_with_the_reason(monkeypatch):
    def run(inputs):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB at /home/someone")

    monkeypatch.setitem(COMPETITORS, "grid_sample", Competitor(run, LEAVES))
    inputs = TINY.random_inputs(torch.float32, CPU)
    expected = TINY.expected_results(inputs)
    names = [OURS, "grid_sample"]
    results = benchmark_op.time_competitors(names, [inputs], expected, 1e-6)
    assert [benchmark_op.cell(r) for r in results[3:]] == ["(out of memory)"] * 3
    assert all("seconds" in r for r in results[:3])


@pytest.mark.parametrize("calls_before", [0, 5])
def test_competitor_that_fails_while_it_is_timed_leaves_the_others_alone(calls_before, monkeypatch):
    calls = iter(range(calls_before))

    def run(inputs):
        if next(calls, None) is None:
            raise RuntimeError("CUDA out of memory")
        return op_competitors.run_reference(inputs)

    monkeypatch.setitem(COMPETITORS, "grid_sample", Competitor(run, LEAVES))
    inputs, names = [TINY.random_inputs(torch.float32, CPU)], ["grid_sample", OURS]
    results = benchmark_op.time_pass(benchmark_op.forward, names, inputs, 1e-6)
    assert results["grid_sample"] == {"status": "failed", "note": "out of memory"}
    assert results[OURS]["calls"] == benchmarking.MIN_CALLS


def test_competitors_take_turns(monkeypatch):
    log = []

    def logging(name):
        return Competitor(lambda inputs: log.append(name), LEAVES)

    for name in (OURS, "reference"):
        monkeypatch.setitem(COMPETITORS, name, logging(name))
    inputs = [TINY.random_inputs(torch.float32, CPU)]
    benchmark_op.time_pass(benchmark_op.forward, [OURS, "reference"], inputs, 1e-9)
    warm_up = 2 * benchmarking.WARM_UP_CALLS
    assert len(log) == warm_up + 2 * benchmarking.MIN_CALLS
    assert log[warm_up:] == [OURS, "reference"] * benchmarking.MIN_CALLS


def test_inputs_take_turns_and_preparation_precedes_each_round():
    log = []

    def prepare(name):
        log.append(f"prepare {name}")
        return lambda: log.append(f"run {name}")

    timing = benchmarking.measure(prepare, "ab", CPU, min_time=1e-9)
    assert timing.calls == 5
    assert timing.low <= timing.seconds <= timing.high
    warm_up = 2 * benchmarking.WARM_UP_CALLS
    assert log[warm_up : warm_up + 4] in (
        ["prepare a", "prepare b", "run a", "run b"],
        ["prepare b", "prepare a", "run b", "run a"],
    )


def test_steps_on_a_gpu_are_timed_between_events(monkeypatch):
    clock = iter([1.0, 4.0, 10.0, 30.0])  # milliseconds

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = next(clock)

        def elapsed_time(self, end):
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    times = benchmarking.time_each([lambda: None] * 2, torch.device("cuda"))
    assert times == pytest.approx([0.003, 0.020])


def test_input_sets_together_exceed_the_cache_twice(monkeypatch):
    monkeypatch.setattr(benchmarking, "cache_bytes", lambda device: 10**6)
    sets = benchmark_op.input_sets(TINY, torch.float32, CPU)
    assert len(sets) * TINY.bytes_touched(torch.float32)["forward"] >= 2 * 10**6


def test_run_writes_table_json_and_chart(quick, publish, tmp_path, capsys):
    publish(factor=2)
    arguments = ["--shapes", "2x7x7x32", "1x8x7x32/32", "--dtypes", "float32", "bfloat16"]
    benchmark_op.main([*TINY_RUN, *arguments, "--threads", "1", "--output", str(tmp_path)])
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
    assert record["settings"]["compiled"] == is_compiled()
    assert len(record["results"]) == 2 * 2 * 3 * len(COMPETITORS)
    for text in (socket.gethostname(), str(Path.cwd()), str(Path.home())):
        assert text not in json_file.read_text()

    results = {(r["shape"], r["dtype"], r["pass"], r["competitor"]): r for r in record["results"]}
    at = ("1x8x7x32/32", "float32", "backward")
    floor = Shape(1, 8, 7, 32, 32).bytes_touched(torch.float32)["backward"] / 1e10
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


def test_skipped_competitors_are_left_out(quick, tmp_path, capsys):
    skip = ["--skip", *COMPETITORS.keys() - {OURS}]
    benchmark_op.main([*TINY_RUN, "--shapes", "1x7x7x32", *skip, "--output", str(tmp_path)])
    (json_file,) = tmp_path.glob("*.json")
    assert {r["competitor"] for r in json.loads(json_file.read_text())["results"]} == {OURS}


def test_run_ends_where_our_own_operator_is_wrong(quick, monkeypatch, tmp_path):
    wrong = Competitor(lambda inputs: 2 * op_competitors.run_ops_dcnv4(inputs), LEAVES)
    monkeypatch.setitem(COMPETITORS, OURS, wrong)
    with pytest.raises(SystemExit, match="ops_dcnv4 is wrong at 1x7x7x32/16"):
        benchmark_op.main([*TINY_RUN, "--shapes", "1x7x7x32", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_file_names_carry_the_machine_without_trademarks():
    machine = {"cpu": "Intel(R) Xeon(R) CPU @ 2.50GHz", "threads": 2}
    json_file, chart = benchmarking.output_files({"benchmark": "op", "machine": machine}, Path("b"))
    assert json_file == Path("b/op_intel-xeon-2-50ghz-2-threads.json")
    assert chart == json_file.with_suffix(".png")
    assert benchmarking.machine_name({**machine, "gpu": "NVIDIA H200"}) == "NVIDIA H200"


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_chart_of_committed_results_can_be_drawn(file, tmp_path):
    benchmark_op.draw(json.loads(file.read_text()), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
