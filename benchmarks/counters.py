"""Read hardware counters of the two main kernels with Nsight Compute.

python -m benchmarks.counters

The forward and backward pass of DCNv4 run in float16 at one shape. Predictions of instructions and
sectors come from the emulator (see benchmarks.predict); they should be exact. The exit status is 77
if Nsight Compute cannot read the counters, for example without permission.
"""

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import predict, record
from benchmarks.competitors import bytes_touched
from benchmarks.dcnv4 import Shape
from benchmarks.record import write
from ops_dcnv4 import dcnv4

SHAPES = {"cpu": Shape(1, 7, 7, 32), "cuda": Shape(64, 56, 56, 128)}
DTYPE = torch.float16
UNAVAILABLE = 77
SHARE = "avg.pct_of_peak_sustained_elapsed"
METRICS = {
    "time in ns": "gpu__time_duration.sum",
    "instructions": "smsp__inst_executed.sum",
    "% of issue slots": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "% of warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "L1 wavefronts": "l1tex__data_pipe_lsu_wavefronts.sum",
    "% of L1": f"l1tex__throughput.{SHARE}",
    "% of L1 hits": "l1tex__t_sector_hit_rate.pct",
    "L2 sectors": "lts__t_sectors.sum",
    "L2 sectors reduced": "lts__t_sectors_op_red.sum",
    "% of L2": f"lts__throughput.{SHARE}",
    "% of L2 hits": "lts__t_sector_hit_rate.pct",
    "DRAM bytes": "dram__bytes.sum",
    "% of DRAM": f"dram__throughput.{SHARE}",
}


def launch(shape: Shape, device: torch.device) -> None:
    """Run the forward and the backward pass once."""
    torch.manual_seed(0)
    inputs = shape.random_inputs(DTYPE, device)
    output = dcnv4(*inputs.arguments)
    torch.autograd.grad(output, (inputs.value, inputs.offset_mask), inputs.grad_output)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(ncu: str, device: str, log: Path) -> Iterator[dict[str, str]]:
    """Run :func:`launch` in Nsight Compute, and yield the rows of its table.

    Raises:
        SystemExit: If Nsight Compute fails, after its last line.
    """
    command = [ncu, "--csv", "--print-units", "base", "--log-file", str(log)]
    command += ["--clock-control", "none", "--kernel-name", "regex:forward|backward"]
    command += ["--metrics", ",".join(METRICS.values()), "--target-processes", "all"]
    program = [sys.executable, "-m", "benchmarks.counters", "--launch", "--device", device]
    process = subprocess.run([*command, *program], capture_output=True, text=True)
    lines = log.read_text().splitlines() if log.exists() else []
    table = [line for line in lines if line.startswith('"')]
    if process.returncode or not table:
        said = [*process.stdout.splitlines(), *process.stderr.splitlines(), *lines]
        write(f"ncu failed: {said[-1] if said else f'exit status {process.returncode}'}")
        raise SystemExit(UNAVAILABLE)
    yield from csv.DictReader(table)


def predictions(shape: Shape, way: str) -> dict[str, float]:
    """Return the predicted counters of the forward or backward kernel."""
    inputs = shape.random_inputs(DTYPE, torch.device("meta"))
    touched, output_bytes = bytes_touched(inputs)[way], inputs.grad_output.nbytes
    kernel = predict.kernel_name("DCNv4", way, "float16", shape.group_channels)
    instructions, sectors = predict.counts()[kernel]
    number = output_bytes / predict.WARP_BYTES
    seconds = predict.kernel_seconds(kernel, output_bytes, touched)
    assert seconds
    return {
        "time in ns": 1e9 * seconds,
        "instructions": number * instructions,
        "% of issue slots": 100 * predict.EFFICIENCY,
        "L2 sectors reduced": number * sectors,
        "DRAM bytes": touched,
        "% of DRAM": 100 * touched / seconds / predict.BYTES,
    }


def read(rows: Iterator[dict[str, str]], shape: Shape) -> list[dict]:
    """Return the counters of both kernels, with predictions, from the rows of a table."""
    names = {metric: name for name, metric in METRICS.items()}
    results = []
    for row in rows:
        way = "backward" if "backward" in row["Kernel Name"] else "forward"
        if name := names.get(row["Metric Name"]):
            result = {"name": f"{way}: {name}", "predicted": predictions(shape, way).get(name)}
            value = row["Metric Value"].replace(",", "")
            is_number = value.replace(".", "", 1).isdigit()
            results.append(result | {"measured": float(value) if is_number else None, "unit": ""})
    return results


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counters", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--launch", action="store_true", help="run the kernels, without counting")
    parser.add_argument("--ncu", default=shutil.which("ncu"), help="default: the one in the path")
    record.add_common_options(parser, min_time=1)
    args = parser.parse_args(argv)
    if not args.launch and not args.ncu:
        parser.error("argument --ncu: there is no ncu in the path; it comes with CUDA")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse_arguments(argv)
    device, shape = torch.device(args.device), SHAPES[args.device]
    if args.launch:
        return launch(shape, device)
    run = record.start("counters", device, {"shape": str(shape), "dtype": "float16"})
    with tempfile.TemporaryDirectory() as folder:
        run["results"] = read(profile(args.ncu, args.device, Path(folder, "log")), shape)
    write(f"\n{shape}, float16{'':24}measured   predicted")
    for result in run["results"]:
        numbers = (result["measured"], result["predicted"])
        write(
            f"{result['name']:32}" + "".join(f"{n:12.4g}" if n else f"{'-':>12}" for n in numbers)
        )
    write(f"\nresults: {record.save(run, args.output)}")
    return None


if __name__ == "__main__":
    main()
