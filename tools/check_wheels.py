"""Install the wheels into empty environments outside the checkout, and test them there.

    python -m tools.check_wheels [--torch VERSION ...] [--python INTERPRETER ...]
                                 [--extras EXTRA ...] [-- TEST ...]

Every version of PyTorch is combined with every interpreter, one after the other. Each environment
takes about 6 GB while it exists. The versions of all other packages are those in the requirements
files. A copy of the checkout without the packages provides the tests, by default
those of the operators and the outputs of the published backbones. The table printed at the end
identifies the CPU library by its SHA-256.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TESTS = ["tests/ops_dcnv4", "tests/flash_internimage/test_backbone.py"]
# The wheels provide these.
PACKAGES = ("ops_dcnv4/ops_dcnv4/", "flash_internimage/", "flash_internimage_")
# Both packages must come from the wheels, and the kernels be found.
DESCRIBE = """
import hashlib, json, pathlib, platform, sys, sysconfig
import torch, ops_dcnv4, flash_internimage
for package in (ops_dcnv4, flash_internimage):
    if not pathlib.Path(package.__file__).is_relative_to(sysconfig.get_path("purelib")):
        sys.exit(f"{package.__name__} was imported from {package.__file__}")
if not ops_dcnv4.is_compiled("cpu"):
    sys.exit(ops_dcnv4.explain_backend("cpu"))
library, = pathlib.Path(ops_dcnv4.__file__).parent.glob("_C.*")
digest = hashlib.sha256(library.read_bytes()).hexdigest()
print(json.dumps([torch.__version__, platform.python_version(), digest[:12]]))
"""


class Result(NamedTuple):
    """Outcome of one environment, a row of the table."""

    torch: str
    python: str
    library: str = "-"
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0
    problem: str = ""


def find_wheels(dist: Path) -> list[Path]:
    """Return the wheels of both packages in a folder.

    Raises:
        FileNotFoundError: If there is not exactly one of each.
    """
    wheels = []
    for name in ("ops_dcnv4", "flash_internimage"):
        found = sorted(dist.glob(f"{name}-*.whl"))
        if len(found) != 1:
            raise FileNotFoundError(f"{dist} must contain one wheel of {name}, got {len(found)}")
        wheels += found
    return wheels


def copy_tests(target: Path) -> None:
    """Copy the tracked files except the packages, so that tests can only import the wheels."""
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.split("\0"):
        source = ROOT / name
        if name.startswith(PACKAGES) or not source.is_file():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target / name)


def read_pins(torch: str | None) -> list[str]:
    """Return the tested versions of the core's requirements, with another torch if one is given."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    if torch is not None:
        lines = [line for line in lines if not line.startswith(("torch==", "torchvision=="))]
        lines.append(f"torch=={torch}")
    return lines


def install_steps(
    pip: list[str], wheels: list[Path], extras: list[str], pins: Path
) -> list[tuple[str, list[str]]]:
    """Return the commands that install the wheels with extras, and the tests' requirements."""
    operators, package = map(str, wheels)
    steps = []
    constraints = ["-c", str(pins)]
    if "openmmlab" in extras:
        file = ROOT / "requirements-openmmlab.txt"
        constraints += ["-c", str(file)]
        [mmcv] = [line for line in file.read_text().splitlines() if line.startswith("onedl-mmcv=")]
        # pip's cache may have an mmcv that was compiled against another torch.
        steps.append(("installing mmcv", [*pip, "--no-cache-dir", "--no-deps", mmcv]))
    if extras:
        package += f"[{','.join(extras)}]"
    development = str(ROOT / "requirements-dev.txt")
    return [
        *steps,
        ("installing the wheels", [*pip, *constraints, operators, package]),
        (
            "installing the tests' requirements",
            [*pip, *constraints, "-r", str(pins), "-r", development],
        ),
    ]


def run_tests(python: Path, checkout: Path, arguments: list[str], cuda: bool) -> Result:
    """Run pytest in an environment, and return its counts."""
    report = checkout / "report.xml"
    command = [str(python), "-m", "pytest", "-q", "-p", "no:randomly", f"--junitxml={report}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if cuda else {"FORCE_CPU": "1"})
    start = time.monotonic()
    status = subprocess.run([*command, *arguments], cwd=checkout, env=environment).returncode
    seconds = time.monotonic() - start
    problem = f"pytest exited with {status}" if status else ""
    result = Result("", "", seconds=seconds, problem=problem)
    if not report.exists():
        return result
    suite = ElementTree.parse(report).getroot()[0].attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    return result._replace(passed=passed, failed=failed, skipped=skipped)


def check_environment(
    interpreter: str,
    torch: str | None,
    wheels: list[Path],
    extras: list[str],
    arguments: list[str],
) -> Result:
    """Create an environment, install the wheels, run the tests and remove the environment."""
    result = Result(torch or "pinned", interpreter)
    with tempfile.TemporaryDirectory(prefix="check-wheels-") as folder:
        checkout, environment = Path(folder, "checkout"), Path(folder, "environment")
        pins = Path(folder, "pins.txt")
        pins.write_text("\n".join(read_pins(torch)))
        copy_tests(checkout)
        python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
        has_cuda = any("_C_cuda" in name for name in _contents(wheels[0]))
        smoke = str(checkout / "tests" / "packaging" / "smoke.py")
        steps: list[tuple[str, list[str]]] = [
            ("creating the environment", [interpreter, "-m", "venv", str(environment)]),
            *install_steps(pip, wheels, extras, pins),
            ("smoke.py", [str(python), smoke, "--require", *extras]),
        ]
        if sys.platform != "win32":
            audit = str(python.with_name("torch-abi-audit"))
            steps.append(("torch-abi-audit", [audit, "--check", "both", "ops_dcnv4"]))
        for step, command in steps:
            if subprocess.run(command, cwd=folder).returncode:
                return result._replace(problem=f"{step} failed")
        about = subprocess.run(
            [python, "-c", DESCRIBE], cwd=folder, stdout=subprocess.PIPE, text=True
        )
        if about.returncode:
            return result._replace(problem="importing the packages failed")
        version, release, library = json.loads(about.stdout)
        tested = run_tests(python, checkout, arguments or TESTS, has_cuda)
        return tested._replace(torch=version, python=release, library=library)


def _contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def format_table(results: list[Result]) -> str:
    """Return the results as a table of aligned columns."""
    rows = [("torch", "Python", "library", "passed", "failed", "skipped", "seconds", "result")]
    for r in results:
        counts = (str(r.passed), str(r.failed), str(r.skipped), f"{r.seconds:.0f}")
        rows.append((r.torch, r.python, r.library, *counts, r.problem or "ok"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def main() -> int:
    """Test the wheels in every environment named on the command line."""
    parser = argparse.ArgumentParser(description="Test the wheels in empty environments.")
    parser.add_argument("--dist", type=Path, default=Path("dist"), help="folder of the wheels")
    parser.add_argument(
        "--torch", nargs="+", default=[None], help="versions (default: that in requirements.txt)"
    )
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument(
        "--extras", nargs="+", default=[], choices=("train", "openmmlab"), help="extras to install"
    )
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    options = parser.parse_args()
    try:
        wheels = [wheel.resolve() for wheel in find_wheels(options.dist)]
    except FileNotFoundError as error:
        parser.error(f"{error}; run make wheel")
    if missing := [name for name in options.python if shutil.which(name) is None]:
        parser.error(f"--python: no such interpreter: {', '.join(missing)}")
    results = [
        check_environment(python, torch, wheels, options.extras, options.arguments)
        for python in options.python
        for torch in options.torch
    ]
    sys.stdout.write(format_table(results) + "\n")
    return int(any(result.problem for result in results))


if __name__ == "__main__":
    sys.exit(main())
