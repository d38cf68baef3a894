"""Compiles the kernels against the torch of the environment that the package is installed into.

A library for the CPU and, where nvcc and a CUDA build of torch are found (no GPU is needed), one
for CUDA. What cannot be compiled is left out: the package is installed all the same and runs on its
PyTorch reference there. Environment variables:

    TORCH_CUDA_ARCH_LIST          GPU architectures, as for torch, instead of DEFAULT_ARCHITECTURES
    FORCE_CPU=1                   no CUDA
    OPS_DCNV4_REQUIRE_COMPILED=1  a failing compiler is an error (a missing nvcc is not)
    OPS_DCNV4_SANITIZE=1          GCC's checks of memory accesses and undefined behaviour, for
                                  `make sanitize-cpu`: the library needs libasan in LD_PRELOAD
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

HERE = Path(__file__).parent
CSRC = HERE / "csrc"
REQUIRED = os.environ.get("OPS_DCNV4_REQUIRE_COMPILED") == "1"
# Turing to Blackwell; later GPUs compile the PTX when the library is loaded.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0+PTX", "10.0", "12.0")


def import_cpp_extension():
    """torch.utils.cpp_extension, or None without torch.

    pip's isolated build hides the packages of the environment, but runs its interpreter; the
    kernels must be compiled against that environment's torch and no other.
    """
    site.addsitedir(sysconfig.get_path("purelib"))
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        if REQUIRED:
            raise
        warnings.warn(
            f"no torch to compile against ({error}): installing ops-dcnv4 without compiled "
            "kernels. Install torch first, then run: "
            "pip install --no-build-isolation --no-deps --force-reinstall ./ops_dcnv4",
            stacklevel=1,
        )
        return None
    return cpp_extension


def compiler_flags() -> tuple[list[str], list[str]]:
    """Flags for the compiler and the linker, OpenMP included where torch uses it."""
    if sys.platform == "win32":
        return ["/O2", "/openmp"], []
    if os.environ.get("OPS_DCNV4_SANITIZE") == "1":
        # -O1 keeps the kernels inlined as they are used, and compiles in a fraction of the time.
        # -fno-wrapv: Python passes -fwrapv, which would hide overflows of signed numbers.
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        flags = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", "-Wno-psabi", *sanitize]
        return [*flags, "-fopenmp", "-Wno-unknown-pragmas"], ["-fopenmp", *sanitize]
    # -Wno-psabi: vectors wider than the baseline's registers only pass between inlined functions.
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-g0", "-Wall", "-Wno-psabi"]
    if sys.platform == "darwin":
        return flags, []
    return [*flags, "-fopenmp", "-Wno-unknown-pragmas"], ["-fopenmp"]


def build_ext(cpp_extension):
    """torch's build_ext, whose failure is raised as the error that `optional` forgives."""

    class BuildExt(cpp_extension.BuildExtension):
        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except RuntimeError as error:
                raise CompileError(str(error)) from error

    return BuildExt


def extension(make, name: str, sources: list[Path], compile_args, link_args, **options):
    return make(
        f"ops_dcnv4.{name}",
        sorted(os.path.relpath(source, HERE) for source in sources),
        include_dirs=[str(CSRC)],
        depends=[os.path.relpath(header, HERE) for header in CSRC.rglob("*.*h")],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        py_limited_api=True,
        optional=not REQUIRED,
        **options,
    )


def find_nvcc(cpp_extension) -> str | None:
    """nvcc, if CUDA kernels can and shall be built."""
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
            f"no CUDA kernels: {nvcc} is of CUDA {release and release[0]}, torch was built for "
            f"{torch.version.cuda}. Install a toolkit of that version, then ops-dcnv4 again",
            stacklevel=1,
        )
        return None
    # What lies on the path may be a script that calls the nvcc of a toolkit elsewhere.
    steps = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], stderr=subprocess.PIPE, text=True
    ).stderr
    if top := re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE):
        cpp_extension.CUDA_HOME = os.path.realpath(top[1])
    return nvcc


def choose_architectures(nvcc: str) -> None:
    """Sets TORCH_CUDA_ARCH_LIST, unless the user has, to the defaults that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = {name.removeprefix("sm_") for name in listed.stdout.split()}
    chosen = (a for a in DEFAULT_ARCHITECTURES if a.removesuffix("+PTX").replace(".", "") in known)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(chosen))


def build_arguments() -> dict:
    cpp_extension = import_cpp_extension()
    if cpp_extension is None:
        return {}
    shared = [CSRC / "library.cpp", CSRC / "geometry.cpp", CSRC / "attention.cpp"]
    flags, link_flags = compiler_flags()
    extensions = [
        extension(
            cpp_extension.CppExtension,
            "_C",
            [*shared, CSRC / "autograd.cpp", *CSRC.glob("cpu/*.cpp")],
            flags,
            link_flags,
        )
    ]
    if nvcc := find_nvcc(cpp_extension):
        choose_architectures(nvcc)
        extensions.append(
            extension(
                cpp_extension.CUDAExtension,
                "_C_cuda",
                [*shared, *CSRC.glob("cuda/*.cu")],
                {"cxx": flags, "nvcc": ["-O3", "-Xfatbin", "-compress-all"]},
                link_flags,
                define_macros=[("OPS_DCNV4_CUDA", None)],
            )
        )
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": build_ext(cpp_extension)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**build_arguments())
