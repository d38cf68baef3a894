import json
import sys
from types import SimpleNamespace

import pytest
import timm
import torch

from benchmarks import charts, dcnv3, model, op, paper, timing
from benchmarks.competitors import bytes_touched, expected_results
from ops_dcnv4 import reference

CPU = torch.device("cpu")
TINY = dcnv3.Shape(2, 5, 6, 48, 24)
COMPETITORS = dcnv3.Shape.competitors
TINY_RUN = ("--device", "cpu", "--threads", "1", "--min-time", "1e-6", "--batch-size", "1")


@pytest.fixture
def publish(monkeypatch):
    """Return a function that installs a fake library `DCNv3` with scaled outputs."""

    def pack(offset, mask, groups):
        parts = (tensor.unflatten(3, (groups, -1)) for tensor in (offset, mask))
        return torch.cat(tuple(parts), dim=4).flatten(3)

    def check(value, parameters, images_per_step, remove_center):
        *window, groups, group_channels, offset_scale = parameters
        assert window == [3, 3, 1, 1, 1, 1, 1, 1]
        assert (value.shape[3], offset_scale) == (groups * group_channels, 1.0)
        assert (images_per_step, remove_center) == (256, 0)
        return (3, 3), (1, 1), (1, 1), (1, 1), groups, offset_scale, False

    def install(factor):
        def forward(value, offset, mask, *rest):
            window = check(value, rest[:11], *rest[11:])
            return factor * reference.dcnv4(value, pack(offset, mask, window[4]), *window)

        def backward(value, offset, mask, *rest):
            window = check(value, rest[:11], *rest[12:])
            packed = pack(offset, mask, window[4])
            grad_value, grad = reference.dcnv4_backward(rest[11], value, packed, *window)
            parts = grad.unflatten(3, (window[4], -1)).split([18, 9], dim=4)
            return grad_value, *(part.flatten(3) for part in parts)

        library = SimpleNamespace(dcnv3_forward=forward, dcnv3_backward=backward)
        monkeypatch.setitem(sys.modules, "DCNv3", library)

    return install


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["DCNv4", "DCNv3"])
def test_competitor_computes_the_same(name, dtype):
    inputs = TINY.random_inputs(getattr(torch, dtype), CPU)
    status = op.examine(COMPETITORS[name], inputs, expected_results(inputs))
    assert status == {"status": "ok", "note": None}


@pytest.mark.parametrize(("factor", "status"), [(1, "ok"), (1.1, "wrong")])
def test_published_dcnv3_is_called_with_the_published_arguments(factor, status, publish):
    publish(factor)
    inputs = TINY.random_inputs(torch.float32, CPU)
    result = op.examine(COMPETITORS["published DCNv3"], inputs, expected_results(inputs))
    assert result == {"status": status, "note": None}


def test_published_dcnv3_is_skipped_with_the_reason(publish, monkeypatch):
    publish(factor=1)
    competitor = COMPETITORS["published DCNv3"]
    result = op.examine(competitor, TINY.random_inputs(torch.bfloat16, CPU), {})
    assert result == {"status": "skipped", "note": "not for bfloat16"}
    monkeypatch.setitem(sys.modules, "DCNv3", None)  # makes importing it fail
    result = op.examine(competitor, TINY.random_inputs(torch.float32, CPU), {})
    assert result == {"status": "skipped", "note": "not installed"}


def test_the_modulation_of_dcnv4_is_the_softmax_of_the_logits():
    inputs = TINY.random_inputs(torch.float64, CPU)
    assert bytes_touched(inputs)["forward"] == (2 * inputs.value.nbytes + inputs.offset_mask.nbytes)
    groups = inputs.packed[..., 18:]
    torch.testing.assert_close(groups, inputs.logits.unflatten(3, (2, 9)).softmax(-1))
    torch.testing.assert_close(inputs.packed[..., :18].flatten(3), inputs.offset)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("internimage_tiny", "flash_internimage_tiny"),
        ("internimage_large", "flash_internimage_large"),
        ("internimage_huge", None),
        ("flash_internimage_tiny", None),
        ("convnext_base", "convnext_base_dcnv4"),
        ("convnext_atto", "convnext_atto+dcnv4"),
        ("vit_base_patch16_224", "vit_base_dcnv4"),
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224+dcnv4"),
        ("resnet50", None),
    ],
)
def test_models_are_compared_with_those_that_have_dcnv4(name, expected):
    assert paper.counterpart(name) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_images_of_both_models_have_the_same_size(device):
    for name in paper.MODELS[device]:
        ours = str(paper.counterpart(name)).removesuffix(model.DROPIN)
        sizes = (timm.models.get_pretrained_cfg(n) for n in (name, ours))
        assert len({cfg.input_size for cfg in sizes if cfg}) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--shapes", "1x7x7"], "argument --shapes: must be NxHxWxC or NxHxWxC/D"),
        (["--models", "internimage_tony"], "did you mean 'internimage_tiny'?"),
        (
            ["--models", "resnet50"],
            "argument --models: must be internimage_tiny, internimage_small, internimage_base, "
            "internimage_large, or a ConvNeXt or vision transformer of timm, got 'resnet50'",
        ),
        (["--models", "--shapes"], "argument --models: must name a model if --shapes names none"),
        (["--batch-size", "-1"], "argument --batch-size: must be a positive integer, got '-1'"),
    ],
)
def test_one_error_names_the_bad_argument(options, expected, capsys):
    with pytest.raises(SystemExit, match="2"):
        paper.main(options)
    assert expected in capsys.readouterr().err.splitlines()[-1]


def test_a_pair_that_fails_has_no_ratio(monkeypatch, capsys):
    def measure(case, args):
        if case.model == "convnext_atto":
            return {"status": "failed", "note": "out of memory"}
        times = {"seconds": 1.0, "low": 1.0, "high": 1.0, "images_per_second": 1.0}
        sizes = {"parameters": 10**6, "image_size": 224, "peak_bytes": None}
        return {"status": "ok", "predicted_images_per_second": None, **times, **sizes}

    monkeypatch.setattr(model, "measure_isolated", measure)
    pair = paper.Pair("training", "float32", "eager", "convnext_atto+dcnv4", "convnext_atto")
    result = paper.compare(pair, paper.parse_arguments(list(TINY_RUN)))
    assert result.keys() == {*paper.Pair._fields, "models"}
    assert result["models"]["convnext_atto+dcnv4"]["status"] == "ok"
    assert "(out of memory)" in capsys.readouterr().out


def test_failure_of_the_interleaved_timing_is_reported_for_both(monkeypatch, capsys):
    def measure(case, args, function=model.measure):
        if function is paper.time_pair:
            return {"status": "failed", "note": "killed, or over 600 s"}
        return {"status": "ok", "seconds": 1.0}

    monkeypatch.setattr(model, "measure_isolated", measure)
    pair = paper.Pair("training", "float32", "eager", "convnext_atto+dcnv4", "convnext_atto")
    result = paper.compare(pair, paper.parse_arguments(list(TINY_RUN)))
    assert {r["status"] for r in result["models"].values()} == {"failed"}
    assert capsys.readouterr().out.count("(killed, or over 600 s)") == 2


def test_both_models_of_a_pair_are_timed_in_turns(monkeypatch):
    built = []

    def build(case, device, batch_size, memory_format):
        built.append((case, batch_size, memory_format))
        return torch.nn.Linear(4, 10), torch.randn(batch_size, 4)

    monkeypatch.setattr(model, "build", build)
    pair = paper.Pair("training", "float32", "eager", "ours", "other")
    times = paper.time_pair(pair, paper.parse_arguments(list(TINY_RUN)))
    kind = "training", "float32", "eager"
    assert built == [(model.Case(*kind, name), 1, "channels_last") for name in ("ours", "other")]
    assert list(times) == ["ours", "other"]
    assert all(result["calls"] >= timing.MIN_TURNS for result in times.values())


@pytest.mark.slow
def test_run_writes_table_json_and_chart(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device, min_time: 1e10)
    options = ["--shapes", "1x7x7x32", "--models", "convnext_atto", "--output", str(tmp_path)]
    paper.main([*TINY_RUN, "--tasks", "inference", *options])
    table = capsys.readouterr().out
    (json_file,), (chart,) = tmp_path.glob("paper_*.json"), tmp_path.glob("*.png")
    record = json.loads(json_file.read_text())
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert record["settings"]["models"] == ["convnext_atto"]
    *operators, pair = record["results"]
    assert [r["competitor"] for r in operators[: len(COMPETITORS)]] == list(COMPETITORS)
    assert all(r["status"] == "ok" for r in operators if r["competitor"] in paper.OURS)
    ours, other = pair["models"]["convnext_atto+dcnv4"], pair["models"]["convnext_atto"]
    assert pair["ratio"] == other["seconds"] / ours["seconds"]
    assert pair["memory_ratio"] == other["peak_bytes"] / ours["peak_bytes"]
    assert ours["images_per_second"] == 1 / ours["seconds"]
    assert ours["parameters"] != other["parameters"]
    assert f"{pair['ratio']:.2f}x time, {pair['memory_ratio']:.2f}x memory" in table
    rows = {label: ratio for label, kind, _, ratio in charts.relative_times(record)}
    assert rows.keys() == {"DCNv3, 1x7x7x32/16", "convnext_atto"}
    assert rows["convnext_atto"] == pair["ratio"]


def test_run_fails_if_an_operator_of_this_project_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device, min_time: 1e10)
    right = COMPETITORS["DCNv3"]
    wrong = right._replace(run=lambda inputs: 1.1 * right.run(inputs))
    monkeypatch.setitem(COMPETITORS, "DCNv3", wrong)
    options = ["--shapes", "1x7x7x32", "--models", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="error: DCNv3 at 1x7x7x32/16, float32: failed or wrong"):
        paper.main([*TINY_RUN, *options])
