"""Compiles the kernels against the torch of the environment that the package is installed into.

Without a torch to compile against, or without a working C++ compiler, the package is installed all
the same and runs on its PyTorch reference; `OPS_DCNV4_REQUIRE_COMPILED=1` makes either an error.
"""

import os
import site
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

HERE = Path(__file__).parent
REQUIRED = os.environ.get("OPS_DCNV4_REQUIRE_COMPILED") == "1"


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


def build_arguments() -> dict:
    cpp_extension = import_cpp_extension()
    if cpp_extension is None:
        return {}
    compile_args, link_args = compiler_flags()
    sources = sorted([*HERE.glob("csrc/*.cpp"), *HERE.glob("csrc/cpu/*.cpp")])
    extension = cpp_extension.CppExtension(
        "ops_dcnv4._C",
        [os.path.relpath(source, HERE) for source in sources],
        include_dirs=[str(HERE / "csrc")],
        depends=[os.path.relpath(header, HERE) for header in (HERE / "csrc").rglob("*.h")],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        py_limited_api=True,
        optional=not REQUIRED,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": build_ext(cpp_extension)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**build_arguments())
