"""Test of an AOTInductor package in a C++ program, which loads the compiled library."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ops_dcnv4

TORCH = Path(torch.__file__).parent
SOURCE = Path(__file__).parent / "aoti" / "run_package.cpp"
CXX = shutil.which("g++")


def build_program(folder: Path) -> Path:
    program, libraries = folder / "run_package", TORCH / "lib"
    command = [CXX, "-std=c++20", "-O0", SOURCE, "-o", program, f"-I{TORCH / 'include'}"]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run([*command, "-ldl"], check=True)
    return program


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or CXX is None, reason="needs Linux and g++")
@torch.no_grad()
def test_a_package_runs_in_a_program_without_python(tmp_path):
    torch.manual_seed(0)
    model, value = ops_dcnv4.DCNv4(32, group=2), torch.randn(2, 5, 6, 32)
    for parameter in model.parameters():  # offsets and modulation start from zero
        parameter.normal_(std=0.3)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (value,)),
        package_path=str(tmp_path / "model.pt2"),
        inductor_configs={
            "aot_inductor.compile_wrapper_opt_level": "O0",
            "aot_inductor.precompile_headers": False,
            "cpp.vec_isa_ok": False,
            "cpp_cache_precompile_headers": False,
        },
    )
    input, output = tmp_path / "input", tmp_path / "output"
    input.write_bytes(value.numpy().tobytes())
    command = [build_program(tmp_path), ops_dcnv4.library_path(), package, input, output]
    subprocess.run([*command, *map(str, value.shape)], check=True)
    actual = torch.frombuffer(bytearray(output.read_bytes()), dtype=value.dtype).view_as(value)
    torch.testing.assert_close(actual, model(value), rtol=1e-5, atol=1e-6)
