"""Time DCNv4's CUDA kernels with other block sizes and tiles.

    python -m benchmarks.tune --build --variants 64x4 256x8
    python -m benchmarks.tune --variants 64x4 256x8

A variant such as 256x8 has 256 threads per block and tiles 8 pixels wide. `--build` compiles each
into a folder of its own; without it, the variants that are there are verified and timed. The
constants of the source need no build.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import ops_dcnv4
from benchmarks import record
from benchmarks.record import write

ROOT = Path(__file__).parents[1]
HEADER = Path("csrc/cuda/units.cuh")
CONSTANTS = {
    "block_threads": r"(constexpr int block_threads = )(\d+)(;)",
    "square_tiles": r"(constexpr int square_tiles = )(\d+)(,)",
}
VARIANTS = ("64x4", "64x8", "128x2", "128x8", "256x4", "256x8")
SHAPES = {
    "cpu": ("1x7x7x32",),
    "cuda": ("64x56x56x128", "64x56x56x128/32", "64x14x14x256", "64x7x7x512"),
}


def parse_variant(text: str) -> str:
    """Check the form of a variant."""
    if not re.fullmatch(r"(64|128|256)x(2|4|8)", text):
        raise argparse.ArgumentTypeError(
            f"must be threads (64, 128 or 256) x tile width (2, 4 or 8), got {text!r}"
        )
    return text


def constants(header: str) -> dict[str, str]:
    """Return the values of the constants in the source.

    Raises:
        ValueError: If a constant is not defined exactly once.
    """
    values = {}
    for name, pattern in CONSTANTS.items():
        found = re.findall(pattern, header)
        if len(found) != 1:
            raise ValueError(f"{name} must be defined once in {HEADER}, got {len(found)}")
        values[name] = found[0][1]
    return values


def default_variant() -> str:
    """Return the variant that the source defines."""
    return "x".join(constants((ROOT / "ops_dcnv4" / HEADER).read_text()).values())


def with_constants(header: str, variant: str) -> str:
    """Return the source with the constants of a variant."""
    constants(header)
    for pattern, value in zip(CONSTANTS.values(), variant.split("x"), strict=True):
        header = re.sub(pattern, rf"\g<1>{value}\g<3>", header)
    return header


def start_build(variant: str, folder: Path, jobs: int) -> subprocess.Popen:
    """Start compiling a variant into `folder`/lib; the CPU library is copied, not compiled."""
    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "ops_dcnv4", folder / "source", ignore=ignore)
    header = folder / "source" / HEADER
    header.write_text(with_constants(header.read_text(), variant))
    target = folder / "lib" / "ops_dcnv4"
    target.mkdir(parents=True)
    shutil.copyfile(ops_dcnv4.library_path("cpu"), target / "_C.abi3.so")
    command = [sys.executable, "setup.py", "--quiet", "build"]
    command += ["--build-base", str(folder / "build"), "--build-lib", str(folder / "lib")]
    env = os.environ | {"OPS_DCNV4_REQUIRE_COMPILED": "1", "OPS_DCNV4_SKIP_CPU": "1"}
    env["MAX_JOBS"] = str(jobs)
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            command, cwd=folder / "source", env=env, stdout=log, stderr=subprocess.STDOUT
        )


def build(variants: Sequence[str], folder: Path) -> None:
    """Compile variants at the same time.

    Raises:
        SystemExit: If one of them has no CUDA library afterwards.
    """
    jobs = max((os.cpu_count() or 1) // max(len(variants), 1), 1)
    processes = {variant: start_build(variant, folder / variant, jobs) for variant in variants}
    failed = []
    for variant, process in processes.items():
        process.wait()
        built = list((folder / variant / "lib" / "ops_dcnv4").glob("_C_cuda.*"))
        if process.returncode or not built:
            failed.append(variant)
        write(f"{variant}: {'failed, see its log' if variant in failed else 'built'}")
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} could not be built in {folder}")


def measure(variant: str, lib: Path | None, args: argparse.Namespace) -> list[dict]:
    """Return the results of `benchmarks.op` in a process that uses a variant.

    Args:
        variant: Name of the variant.
        lib: Folder to import the operators from, or None for the installed ones.
        args: The command line.

    Raises:
        SystemExit: If it fails, such as on wrong results.
    """
    output = args.output / variant
    command = [sys.executable, "-m", "benchmarks.op", "--dtypes", *args.dtypes]
    command += ["--shapes", *args.shapes, "--device", args.device, "--threads", str(args.threads)]
    command += ["--min-time", str(args.min_time), "--output", str(output), "--skip", "all"]
    path = [str(lib)] * (lib is not None) + list(filter(None, [os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise SystemExit(f"error: {variant}: {lines[-1].removeprefix('error: ')}")
    (file,) = output.glob("op_*.json")
    return json.loads(file.read_text())["results"]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    text = f"default: {' '.join(VARIANTS)}; the constants of the source are always timed"
    option("--variants", nargs="*", type=parse_variant, default=VARIANTS, metavar="TxW", help=text)
    option("--build", action="store_true", help="compile the variants, without timing them")
    folder, default = Path("build/tune"), "default: %(default)s"
    option("--builds", type=Path, default=folder, help=f"folder of the builds, {default}")
    option("--shapes", nargs="+", metavar="SHAPE", help="as for benchmarks.op")
    option("--dtypes", nargs="+", metavar="DTYPE", default=["float16"], help=default)
    record.add_common_options(parser, min_time=0.1)
    args = parser.parse_args(argv)
    args.shapes = args.shapes or SHAPES[args.device]
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse_arguments(argv)
    default = default_variant()
    variants = [variant for variant in args.variants if variant != default]
    if args.build:
        return build(variants, args.builds.resolve())
    settings = {"shapes": list(args.shapes), "dtypes": args.dtypes, "default": default}
    run = record.start("tune", torch.device(args.device), settings)
    failed = []
    for variant in (default, *variants):
        lib = None if variant == default else args.builds.resolve() / variant / "lib"
        if lib and not lib.exists():
            failed.append(variant)
            write(f"{variant}: no build")
            continue
        write(f"\n{variant}{' (default)' * (lib is None)}")
        try:
            results = measure(variant, lib, args)
        except SystemExit as error:
            failed.append(variant)
            write(error)
            continue
        for result in results:
            write(f"{result['shape']:24}{result['pass']:18}{1e6 * result['seconds']:10.1f} us")
        run["results"] += [{"variant": variant, **result} for result in results]
        file = record.save(run, args.output)
    if failed:
        raise SystemExit(f"error: not measured: {', '.join(failed)}")
    write(f"\nresults: {file}")
    return None


if __name__ == "__main__":
    main()
