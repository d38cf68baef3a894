"""Compile CUDA sources as C++ for the serial CUDA emulator.

Objects and libraries are cached in .cache/cuda_model under a hash of their inputs.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

HERE = Path(__file__).parent
HEADERS = HERE / "include"  # replacements for headers of CUDA and PyTorch
ROOT = HERE.parents[1]
CSRC = ROOT / "ops_dcnv4" / "csrc"
CACHE = ROOT / ".cache" / "cuda_model"
TORCH = Path(torch.__file__).parent
JOBS = 2

CXX = os.environ.get("CXX", "g++")
COMPILE = [CXX, "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
COMPILE += ["-Wno-unknown-pragmas", "-fno-strict-aliasing", "-fsanitize=alignment"]
COMPILE += [f"-I{HEADERS}", f"-I{HERE}", f"-I{CSRC}"]
COMPILE += ["-isystem", str(TORCH / "include"), "-x", "c++", "-c"]
AVAILABLE = sys.platform == "linux" and shutil.which(CXX) is not None
INCLUDE = re.compile(r'^#include ["<](.+)[">]', re.MULTILINE)
LINK = [CXX, "-shared", "-Wl,-z,defs"]
LINK_TORCH = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]


def load_operators() -> Path:
    """Define torch.ops.ops_dcnv4_cuda_model, the CUDA operators for CPU tensors.

    Returns:
        The library that contains them.
    """
    sources = [HERE / "model.cpp", HERE / "library.cpp"]
    sources += [CSRC / "geometry.cpp", CSRC / "attention.cpp", *sorted(CSRC.glob("cuda/*.cu"))]
    library = build_library(sources, LINK_TORCH)
    torch.ops.load_library(library)
    return library


def build_library(sources: Sequence[Path], link_flags: Sequence[str] = ()) -> Path:
    """Build a shared library; objects that are up to date are not recompiled."""
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(_compile, sources))
    command = [*LINK, *map(str, objects), *link_flags]
    return _cached(f"{sources[-1].stem}.so", command, objects)


def _compile(source: Path) -> Path:
    return _cached(f"{source.stem}.o", [*COMPILE, str(source)], _with_headers(source))


def _with_headers(source: Path) -> set[Path]:
    """Return the source and all files of this repository that it includes."""
    files, new = set(), {source}
    while new:
        files |= new
        new = {
            folder / name
            for file in new
            for name in INCLUDE.findall(file.read_text())
            for folder in (file.parent, HEADERS, HERE, CSRC)
            if (folder / name).exists()
        } - files
    return files


def _cached(name: str, command: Sequence[str], inputs: Iterable[Path]) -> Path:
    """Return the output file of a command, from the cache if its inputs have not changed."""
    key = hashlib.sha256(repr([command, torch.__version__, _compiler_version()]).encode())
    for path in sorted(inputs):
        key.update(str(path).encode() + path.read_bytes())
    output = CACHE / f"{key.hexdigest()[:16]}-{name}"
    CACHE.mkdir(parents=True, exist_ok=True)
    # Only one of several processes runs the command; the others wait.
    with FileLock(output.with_suffix(".lock")):
        if not output.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                partial = Path(folder) / name
                _run([*command, "-o", str(partial)])
                partial.rename(output)
    return output


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    if result.stderr:
        warnings.warn(f"{' '.join(command)}:\n{result.stderr}", stacklevel=2)


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__" and AVAILABLE:
    load_operators()
