import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import tune

SOURCE = (tune.ROOT / "ops_dcnv4" / tune.HEADER).read_text()


def test_the_constants_of_the_source_are_replaced():
    changed = tune.with_constants(SOURCE, "256x8")
    assert tune.constants(changed) == {"block_threads": "256", "square_tiles": "8"}
    pairs = list(zip(SOURCE.splitlines(), changed.splitlines(), strict=True))
    assert sum(before != after for before, after in pairs) == 2
    assert tune.with_constants(changed, tune.default_variant()) == SOURCE


def test_a_source_without_the_constants_is_rejected():
    with pytest.raises(ValueError, match=r"square_tiles must be defined once in .*, got 0"):
        tune.with_constants(SOURCE.replace("square_tiles", "tiles"), "64x4")


def test_variants_have_a_form(capsys):
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--variants", "64x3"])
    assert "must be threads (64, 128 or 256) x tile width" in capsys.readouterr().err


@pytest.fixture
def compile_with(monkeypatch):
    """Return a function that replaces the compiler by code, and returns the environments."""
    environments = []

    def install(code):
        def start(command, **options):
            assert command[1:4] == ["setup.py", "--quiet", "build"]
            environments.append(options["env"])
            return subprocess.Popen([sys.executable, "-c", code, command[-1]], **options)

        fake = SimpleNamespace(Popen=start, STDOUT=subprocess.STDOUT)
        monkeypatch.setattr(tune, "subprocess", fake)
        return environments

    return install


BUILDS = "import pathlib, sys; pathlib.Path(sys.argv[1], 'ops_dcnv4/_C_cuda.abi3.so').touch()"


def test_each_variant_is_compiled_from_its_source(compile_with, tmp_path):
    environments = compile_with(BUILDS)
    default = tune.default_variant()
    tune.main(["--build", "--builds", str(tmp_path), "--variants", "64x4", "256x8", default])
    assert {path.name for path in tmp_path.iterdir()} == {"64x4", "256x8"}
    header = (tmp_path / "64x4" / "source" / tune.HEADER).read_text()
    assert header == tune.with_constants(SOURCE, "64x4")
    libraries = {path.name for path in (tmp_path / "64x4/lib/ops_dcnv4").iterdir()}
    assert libraries == {"_C.abi3.so", "_C_cuda.abi3.so"}
    assert {env["OPS_DCNV4_SKIP_CPU"] for env in environments} == {"1"}
    assert not list((tmp_path / "64x4" / "source").rglob("*.so"))


@pytest.mark.parametrize("code", ["", f"{BUILDS}; raise SystemExit(1)"])
def test_a_variant_that_is_not_built_is_an_error(code, compile_with, tmp_path):
    compile_with(code)
    with pytest.raises(SystemExit, match="64x4 could not be built"):
        tune.main(["--build", "--builds", str(tmp_path), "--variants", "64x4"])


def test_variants_are_timed_with_their_own_library(monkeypatch, tmp_path, capsys):
    builds, paths = tmp_path / "builds", []
    for variant in ("64x4", "64x8"):
        (builds / variant / "lib").mkdir(parents=True)

    def run(command, env, **options):
        paths.append(env["PYTHONPATH"].split(os.pathsep))
        if paths[-1][0] == str(builds / "64x8" / "lib"):
            return SimpleNamespace(returncode=1, stderr="error: wrong results\n")
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(parents=True)
        result = {"shape": "1x7x7x32/16", "pass": "forward", "seconds": 1.0}
        (folder / "op_machine.json").write_text(json.dumps({"results": [result]}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setattr(tune, "subprocess", SimpleNamespace(run=run))
    options = ["--device", "cpu", "--builds", str(builds), "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="not measured: 64x8, 256x4"):
        tune.main([*options, "--variants", "64x4", "64x8", "256x4"])
    assert paths[0] == ["elsewhere"]
    assert paths[1] == [str(builds / "64x4" / "lib"), "elsewhere"]
    (file,) = tmp_path.glob("tune_*.json")
    results = json.loads(file.read_text())["results"]
    assert [result["variant"] for result in results] == [tune.default_variant(), "64x4"]
    output = capsys.readouterr().out
    assert "64x8: wrong results" in output
    assert "256x4: no build" in output
