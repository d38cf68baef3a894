"""Compile the kernels against the PyTorch of the environment that the package is installed into.

The libraries use only PyTorch's stable ABI, so other versions from MINIMUM_TORCH on can load them.

Builds one library for the CPU and, if nvcc and a CUDA build of PyTorch are found, one for CUDA; no
GPU is needed. If a library cannot be compiled, the package is installed without it and falls back
to Triton or the PyTorch reference. Environment variables:

    TORCH_CUDA_ARCH_LIST          GPU architectures, as for PyTorch (default: DEFAULT_ARCHITECTURES)
    FORCE_CPU=1                   do not build the CUDA library
    OPS_DCNV4_SKIP_CPU=1          do not build the CPU library, for `benchmarks.tune`
    OPS_DCNV4_REQUIRE_COMPILED=1  fail if the compiler fails (a missing nvcc is not a failure)
    OPS_DCNV4_SANITIZE=1          build with GCC's address and undefined-behavior sanitizers, for
                                  `make sanitize-cpu`; the library needs libasan in LD_PRELOAD
"""

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from setuptools import Command, Extension, setup
from setuptools.errors import CompileError

HERE = Path(__file__).parent
CSRC = HERE / "csrc"
REQUIRED = os.environ.get("OPS_DCNV4_REQUIRE_COMPILED") == "1"
MINIMUM_TORCH = (2, 11)
TORCH_TARGET = f"0x{MINIMUM_TORCH[0]:02x}{MINIMUM_TORCH[1]:02x}000000000000"
HIDDEN = "-fvisibility=hidden"
# Turing to Blackwell. Later GPUs compile the PTX when the library is loaded.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0+PTX", "10.0", "12.0")


def import_cpp_extension() -> Any:
    """Return torch.utils.cpp_extension, or None if PyTorch is not installed."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        if REQUIRED:
            raise
        warnings.warn(
            f"torch cannot be imported ({error}): installing ops-dcnv4 without compiled "
            "kernels. Install torch first, then run: "
            "pip install --no-build-isolation --no-deps --force-reinstall ./ops_dcnv4",
            stacklevel=1,
        )
        return None
    return cpp_extension


def compiler_flags() -> tuple[list[str], list[str]]:
    """Return the compiler and linker flags. OpenMP is not needed: PyTorch starts the threads."""
    if sys.platform == "win32":
        return ["/O2"], []
    if os.environ.get("OPS_DCNV4_SANITIZE") == "1":
        # -O1 inlines the kernels as release builds do, and compiles in a fraction of the time.
        # -fno-wrapv: Python passes -fwrapv, which would hide signed overflows.
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        flags = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", "-Wno-psabi", *sanitize]
        return [*flags, HIDDEN], sanitize
    # -Wno-psabi: vectors wider than the baseline's registers are only passed to inlined functions.
    flags = ["-O3", HIDDEN, "-fno-math-errno", "-fno-trapping-math", "-g0", "-Wall", "-Wno-psabi"]
    return flags, []


def build_ext(cpp_extension: Any) -> type[Command]:
    """Return a build_ext whose compile errors setuptools tolerates for optional extensions."""

    class BuildExt(cpp_extension.BuildExtension):
        def build_extension(self, ext: Extension) -> None:
            try:
                super().build_extension(ext)
            except RuntimeError as error:
                raise CompileError(str(error)) from error

        def get_export_symbols(self, ext: Extension) -> list[str]:
            return []  # The libraries are not Python modules, and register themselves when loaded.

    return BuildExt


def extension(
    make: Callable[..., Extension],
    name: str,
    sources: list[Path],
    compile_args: list[str] | dict[str, list[str]],
    link_args: list[str],
    macros: Sequence[tuple[str, str | None]] = (),
) -> Extension:
    """Return a torch extension, which is optional unless OPS_DCNV4_REQUIRE_COMPILED is set."""
    return make(
        f"ops_dcnv4.{name}",
        sorted(os.path.relpath(source, HERE) for source in sources),
        include_dirs=[str(CSRC)],
        depends=[os.path.relpath(header, HERE) for header in CSRC.rglob("*.*h")],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), *macros],
        py_limited_api=True,
        optional=not REQUIRED,
    )


def find_nvcc(cpp_extension: Any) -> str | None:
    """Return the path of nvcc, or None if the CUDA library cannot or must not be built."""
    import torch

    home = cpp_extension.CUDA_HOME
    if os.environ.get("FORCE_CPU") == "1" or torch.version.cuda is None or home is None:
        return None
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc is None:
        return None
    about = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.\d+", about)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        warnings.warn(
            f"not compiling CUDA kernels: {nvcc} is from CUDA {release and release[0]}, but torch "
            f"was built for {torch.version.cuda}. Install that toolkit and reinstall ops-dcnv4",
            stacklevel=1,
        )
        return None
    # The nvcc found may be a wrapper script for a toolkit in another folder.
    steps = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], stderr=subprocess.PIPE, text=True
    ).stderr
    if top := re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE):
        cpp_extension.CUDA_HOME = os.path.realpath(top[1])
    return nvcc


def choose_architectures(nvcc: str) -> None:
    """Set TORCH_CUDA_ARCH_LIST, unless already set, to the defaults that this nvcc supports."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = {name.removeprefix("sm_") for name in listed.stdout.split()}
    chosen = (a for a in DEFAULT_ARCHITECTURES if a.removesuffix("+PTX").replace(".", "") in known)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(chosen))


def build_arguments() -> dict[str, Any]:
    """Return the arguments of `setup` that depend on the environment."""
    cpp_extension = import_cpp_extension()
    if cpp_extension is None:
        return {}
    shared = [*CSRC.glob("*.cpp")]
    flags, link_flags = compiler_flags()
    extensions = []
    if os.environ.get("OPS_DCNV4_SKIP_CPU") != "1":
        extensions.append(
            extension(
                cpp_extension.CppExtension,
                "_C",
                [*shared, *CSRC.glob("cpu/*.cpp")],
                flags,
                link_flags,
            )
        )
    if nvcc := find_nvcc(cpp_extension):
        choose_architectures(nvcc)
        nvcc_flags = ["-O3", "-Xfatbin", "-compress-all"]
        nvcc_flags += [] if sys.platform == "win32" else ["-Xcompiler", HIDDEN]
        extensions.append(
            extension(
                cpp_extension.CUDAExtension,
                "_C_cuda",
                [*shared, *CSRC.glob("cuda/*.cu")],
                {"cxx": flags, "nvcc": nvcc_flags},
                link_flags,
                [("OPS_DCNV4_CUDA", None), ("USE_CUDA", None)],
            )
        )
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": build_ext(cpp_extension)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**build_arguments())
