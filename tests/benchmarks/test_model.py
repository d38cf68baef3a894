import contextlib
import json
import os
import socket
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from benchmarks import model
from benchmarks.model import Case
from ops_dcnv4 import DCNv4

TINY_RUN = ("--models", "flash_internimage_nano", "--device", "cpu", "--min-time", "1e-6")
INFERENCE = Case("inference", "float32", "eager", "flash_internimage_nano")
CPU = torch.device("cpu")


def arguments(*options):
    return model.parse_arguments([*TINY_RUN, "--batch-size", "2", "--threads", "1", *options])


def test_a_size_selects_a_model_of_each_family():
    args = model.parse_arguments(["--models", "tiny", "flash_internimage_nano"])
    assert args.models == [*model.SIZES["tiny"], "flash_internimage_nano"]
    assert all(timm.is_model(name) for names in model.SIZES.values() for name in names)


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("--models", "flash_internimage_tony", "did you mean 'flash_internimage_tiny'?"),
        ("--models", "?", "must be tiny, small, base or the name of a timm model, got '?'"),
        (
            "--models",
            "resnet50+dcnv4",
            "must be a ConvNeXt or vision transformer before +dcnv4, got 'resnet50+dcnv4'",
        ),
        ("--dtypes", "float8", "invalid choice: 'float8'"),
        ("--batch-size", "0", "must be a positive integer, got '0'"),
        pytest.param(
            "--modes",
            "graph",
            "graph needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_one_error_names_the_bad_argument(option, text, expected, capsys):
    with pytest.raises(SystemExit, match="2"):
        model.main([option, text])
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}" in error
    assert expected in error


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_a_suffix_replaces_layers_by_dcnv4(name):
    with torch.device("meta"):
        network = model.create(name + model.DROPIN)
        original = model.create(name)
    layers = [any(isinstance(m, DCNv4) for m in n.modules()) for n in (network, original)]
    assert layers == [True, False]
    assert model.parse_model(name + model.DROPIN) == (name + model.DROPIN,)


@pytest.mark.parametrize("task", model.TASKS)
def test_inference_casts_the_model_and_training_autocasts(task):
    case = Case(task, "bfloat16", "eager", "flash_internimage_nano")
    network, images = model.build(case, CPU, batch_size=2)
    logits = []
    network.register_forward_hook(lambda module, inputs, output: logits.append(output))
    model.make_step(case, network, images)()
    weights = torch.bfloat16 if task == "inference" else torch.float32
    assert {p.dtype for p in network.parameters()} == {images.dtype} == {weights}
    assert logits[0].dtype == torch.bfloat16
    assert network.training == all(p.grad is not None for p in network.parameters())
    assert network.training == (task == "training")
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_the_memory_format_can_be_contiguous():
    network, images = model.build(INFERENCE, CPU, 2, "contiguous")
    assert images.is_contiguous()
    assert all(p.is_contiguous() for p in network.parameters())


def test_a_graph_is_captured_after_warm_up_and_replayed(monkeypatch):
    """Tests of real graphs need a GPU; here, the order of events counts."""
    events = []

    class Graph:
        def replay(self):
            events.append("replay")

    class Stream:
        def wait_stream(self, stream):
            events.append("wait")

    @contextlib.contextmanager
    def capture(graph):
        events.append("begin")
        yield
        events.append("end")

    fakes = {"CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream, "graph": capture}
    for name, fake in (fakes | {"stream": contextlib.nullcontext}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    step = model.Replay(lambda: events.append("step"))
    step()
    warm_up = ["wait", *["step"] * model.WARM_UP, "wait"]
    assert events == [*warm_up, "begin", "step", "end", "replay"]


def test_peak_memory_includes_weights_and_activations(monkeypatch):
    def create(name):
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 4096))  # 192 MiB
        network.pretrained_cfg = {"input_size": (3, 64, 64)}
        return network

    monkeypatch.setattr(timm, "create_model", create)
    result = model.measure(INFERENCE._replace(model="linear"), arguments())
    assert result["parameters"] == 3 * 64 * 64 * 4096 + 4096
    assert result["peak_bytes"] == pytest.approx(192 * 2**20, rel=0.4)


@pytest.mark.slow
def test_run_writes_table_json_and_chart(tmp_path, capsys):
    model.main([*TINY_RUN, "--batch-size", "2", "--output", str(tmp_path)])
    table = capsys.readouterr().out
    (json_file,), (chart,) = tmp_path.glob("model_*.json"), tmp_path.glob("model_*.png")
    record = json.loads(json_file.read_text())
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert record["settings"]["batch_size"] == 2
    assert "timm" in record["versions"]
    assert [result["task"] for result in record["results"]] == ["inference", "training"]
    for result in record["results"]:
        assert result["status"] == "ok"
        assert result["image_size"] == 64
        assert result["images_per_second"] == pytest.approx(2 / result["seconds"])
        assert f"{result['images_per_second']:.1f} images/s" in table
    for text in (socket.gethostname(), str(Path.cwd()), str(Path.home())):
        assert text not in json_file.read_text()


@pytest.mark.slow
def test_cell_of_a_failing_measurement_gives_the_reason(tmp_path, capsys):
    model.main([*TINY_RUN, "--batch-size", "1000000000000", "--output", str(tmp_path)])
    assert capsys.readouterr().out.count("(can't allocate memory)") == 2
    (json_file,) = tmp_path.glob("*.json")
    assert all(r["status"] == "failed" for r in json.loads(json_file.read_text())["results"])


def die(*arguments):
    os._exit(9)


def test_cell_of_a_killed_measurement_gives_the_reason(monkeypatch):
    monkeypatch.setattr(model, "measure_or_explain", die)
    result = model.measure_isolated(INFERENCE, arguments())
    assert result == {"status": "failed", "note": "killed, or over 600 s"}


def test_measurement_that_takes_too_long_is_abandoned():
    result = model.measure_isolated(INFERENCE, arguments("--timeout", "1e-3"))
    assert result == {"status": "failed", "note": "killed, or over 0.001 s"}
