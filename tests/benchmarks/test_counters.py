import json
import sys

import pytest
import torch

from benchmarks import counters, predict

HEADER = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
TABLE = f"""==PROF== Connected to process 1
{HEADER}
"0","window_forward","Command line profiler metrics","smsp__inst_executed.sum","inst","68,038,656"
"0","window_forward","Command line profiler metrics","dram__bytes.sum","byte","1,234.5"
"1","backward","Command line profiler metrics","lts__t_sectors_op_red.sum","sector","n/a"
"1","backward","Command line profiler metrics","unknown__metric.sum","","1"
"""

# Writes the file TABLE to the log file, or ends with an error.
NCU = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
if not pathlib.Path({table!r}).exists():
    print("==ERROR== no permission")
    raise SystemExit(1)
assert arguments[arguments.index("--clock-control") + 1] == "none"
assert arguments[-5:] == ["-m", "benchmarks.counters", "--launch", "--device", "cpu"]
log = arguments[arguments.index("--log-file") + 1]
pathlib.Path(log).write_text(pathlib.Path({table!r}).read_text())
"""


@pytest.fixture
def run(tmp_path):
    """Return a function that runs the benchmark with a fake ncu, given its table or None."""

    def run(table):
        file, program = tmp_path / "table", tmp_path / "ncu"
        if table is not None:
            file.write_text(table)
        program.write_text(NCU.format(python=sys.executable, table=str(file)))
        program.chmod(0o755)
        output = tmp_path / "output"
        options = ["--device", "cpu", "--ncu", str(program), "--output", str(output)]
        counters.main(options)
        (json_file,) = output.glob("counters_*.json")
        return json.loads(json_file.read_text())["results"]

    return run


def test_counters_are_read_and_compared_with_predictions(run, monkeypatch, capsys):
    shape = counters.SHAPES["cuda"]
    monkeypatch.setitem(counters.SHAPES, "cpu", shape)
    instructions, dram, sectors = run(TABLE)
    per_warp, _ = predict.counts()["DCNv4 forward fp16 D16"]
    warps = 64 * 56 * 56 * 128 * 2 / 512
    assert instructions["name"] == "forward: instructions"
    assert instructions["measured"] == 68038656
    assert instructions["predicted"] == warps * per_warp
    assert (dram["name"], dram["measured"]) == ("forward: DRAM bytes", 1234.5)
    assert (sectors["name"], sectors["measured"]) == ("backward: L2 sectors reduced", None)
    assert sectors["predicted"] > 0
    assert "6.804e+07" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "message"),
    [(None, "ncu failed: ==ERROR== no permission"), ("==ERROR== no kernels\n", "no kernels")],
)
def test_a_failure_of_ncu_is_reported(table, message, run, capsys):
    with pytest.raises(SystemExit, match="77"):
        run(table)
    assert capsys.readouterr().out.endswith(f"{message}\n")


def test_a_missing_ncu_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="2"):
        counters.main(["--device", "cpu"])
    assert "argument --ncu: there is no ncu in the path" in capsys.readouterr().err


def test_both_kernels_are_launched(monkeypatch):
    with torch.profiler.profile() as profile:
        counters.main(["--launch", "--device", "cpu"])
    names = {event.name for event in profile.events()}
    assert {"ops_dcnv4::dcnv4", "ops_dcnv4::dcnv4_backward"} <= names
