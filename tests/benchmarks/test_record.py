import json
from pathlib import Path

import pytest
import torch

from benchmarks import charts, record

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def test_file_names_contain_the_machine_without_trademarks(tmp_path):
    machine = {"cpu": "Intel(R) Xeon(R) CPU @ 2.50GHz", "threads": 2}
    file = record.save({"benchmark": "op", "machine": machine}, tmp_path / "results")
    assert file == tmp_path / "results/op_intel-xeon-2-50ghz-2-threads.json"
    assert json.loads(file.read_text())["machine"] == machine
    assert record.machine_name({**machine, "gpu": "NVIDIA H200"}) == "NVIDIA H200"


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_chart_of_published_results_can_be_drawn(file, tmp_path):
    copy = tmp_path / file.name
    copy.write_bytes(file.read_bytes())
    charts.main([str(copy)])
    assert copy.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(("benchmark", "count"), [("op", 30), ("model", 4), ("paper", 30)])
def test_chart_of_an_interrupted_run_can_be_drawn(benchmark, count, tmp_path):
    results = json.loads(next(RESULTS.glob(f"{benchmark}_*.json")).read_text())
    del results["results"][count:]
    file = tmp_path / "interrupted.json"
    file.write_text(json.dumps(results))
    assert charts.draw(file).stat().st_size > 0


def test_machine_has_the_name_of_the_cpu():
    assert record.describe_machine(torch.device("cpu"))["cpu"] in Path("/proc/cpuinfo").read_text()
