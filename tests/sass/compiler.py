"""Compilation of kernels with nvcc, for sm_90, and disassembly.

Listings are cached in .cache/sass under a hash of their inputs.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.cuda_model.build import CSRC, ROOT, TORCH
from tests.sass.program import Program, parse_listing

CACHE = ROOT / ".cache" / "sass"
SITE = Path(sysconfig.get_path("purelib"))
TOOLKIT = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
NVCC = Path(os.environ.get("NVCC", TOOLKIT))
CUOBJDUMP = (
    NVCC.with_name("cuobjdump"),
    SITE / "triton/backends/nvidia/bin/cuobjdump",  # part of PyTorch for CUDA
)

# The flags of setup.py, and those that torch.utils.cpp_extension adds.
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-cubin"]
FLAGS += ["-gencode=arch=compute_90,code=sm_90"]
FLAGS += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
FLAGS += ["-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__"]
FLAGS += ["-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__"]
FLAGS += [f"-I{CSRC}", f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]


def cuobjdump() -> Path | None:
    """Return the disassembler's path, or None if it is not installed."""
    return next((path for path in CUOBJDUMP if path.exists()), None)


AVAILABLE = NVCC.exists() and cuobjdump() is not None


def run(command: Sequence[str]) -> str:
    """Return the output of a command."""
    headers = os.pathsep.join(map(str, SITE.glob("nvidia/cu*/include")))  # cusparse.h and others
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "CPATH": headers}
    )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


@functools.cache
def compiler_version() -> str:
    """Return e.g. `13.0.88`."""
    match = re.search(r"release .*, V([\d.]+)", run([str(NVCC), "--version"]))
    return match[1] if match else "unknown"


@functools.cache
def demangled(name: str) -> str:
    return run(["c++filt", name]).strip()


def instantiation(name: str) -> str:
    """Return a kernel with its template arguments, e.g. `f<int>`, given its mangled name."""
    signature, depth = demangled(name).removeprefix("void "), 0
    for end, character in enumerate(signature):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return signature[:end]
    raise ValueError(f"{name} is not the mangled name of a function")


def headers() -> list[Path]:
    return sorted(CSRC.glob("cuda/*.cuh"))


@functools.cache
def kernel(name: str) -> Program:
    """Return the machine code of one of the project's kernels."""
    source = "".join(f'#include "{header.relative_to(CSRC)}"\n' for header in headers())
    source += f'extern "C" void* kernel = (void*)&{instantiation(name)};\n'
    return programs(source, sorted(CSRC.rglob("*.*h")))[name]


def programs(source: str, depends: Sequence[Path] = ()) -> dict[str, Program]:
    """Return the kernels of a CUDA source, which includes the files that it depends on."""
    key = hashlib.sha256(repr([source, FLAGS, compiler_version()]).encode())
    for path in depends:
        key.update(path.read_bytes())
    listing = CACHE / f"{key.hexdigest()[:16]}.sass"
    if not listing.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            code, binary = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
            code.write_text(source)
            run([str(NVCC), *FLAGS, "-o", str(binary), str(code)])
            partial = Path(folder, "listing")
            partial.write_text(run([str(cuobjdump()), "-sass", str(binary)]))
            partial.rename(listing)
    return parse_listing(listing.read_text())
