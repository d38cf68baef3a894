"""Measure the rates of a machine on which the predictions of benchmarks.predict are based.

python -m benchmarks.rates
"""

import argparse
import functools
from collections.abc import Callable

import torch

from benchmarks import predict, record, timing
from benchmarks.record import write

SIZES = {"cpu": (128, 2**10), "cuda": (8192, 2**18)}  # of matrices, and rows to add
ROW = 32  # numbers of four bytes: four sectors of memory
TARGETS = 2**14  # rows to which rows are added: 2 MB, which are in the L2 cache


def products(dtype: str, device: torch.device, min_time: float) -> float:
    """Return the operations per second of matrix products."""
    size = SIZES[device.type][0]
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * size**3 / timing.measure(lambda: a @ b, min_time)["seconds"]


def sectors(device: torch.device, min_time: float) -> float:
    """Return the memory sectors per second to which random rows are added."""
    rows = SIZES[device.type][1]
    target = torch.zeros(TARGETS, ROW, device=device)
    source = torch.randn(rows, ROW, device=device)
    index = torch.randint(TARGETS, (rows,), device=device)
    seconds = timing.measure(lambda: target.index_add_(0, index, source), min_time)["seconds"]
    return rows * ROW / 8 / seconds


def launches(device: torch.device, min_time: float) -> float:
    """Return the kernels per second that PyTorch can launch."""
    small = torch.zeros(1, device=device)
    return 1 / timing.measure(lambda: small.add_(1), min_time)["seconds"]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rates", description=__doc__.splitlines()[0]
    )
    record.add_common_options(parser, min_time=0.2)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse_arguments(argv)
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rates: dict[str, tuple[Callable[..., float], float]] = {
        "bytes copied": (timing.copy_bandwidth, predict.BYTES),
        "sectors added to": (sectors, predict.SECTORS),
        "kernels launched": (launches, 1 / predict.LAUNCH),
    }
    for name in predict.SHORT:
        predicted = predict.TENSOR_CORES.get(name, predict.CUDA_CORES)
        rates[f"operations, {name}"] = functools.partial(products, name), predicted
    run = record.start("rates", device, {"min_time": args.min_time})
    write("\nRate per second, and the rate that is assumed for an NVIDIA H200")
    for name, (measure, predicted) in rates.items():
        result = {
            "name": name,
            "measured": measure(device, args.min_time),
            "predicted": predicted,
            "unit": "1/s",
        }
        write(f"{name:34}{result['measured']:12.3g}{predicted:12.3g}")
        run["results"].append(result)
        file = record.save(run, args.output)
    write(f"\nresults: {file}")


if __name__ == "__main__":
    main()
