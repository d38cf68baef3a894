"""Times DCNv4 against what else computes it, and against a 7x7 depth-wise convolution as yardstick.

Every competitor's output and gradients are checked before they are timed:

    python -m tools.benchmark_op --threads 2 --shapes 1x56x56x64 8x14x14x256
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from ops_dcnv4 import dcnv4, reference

GROUP_CHANNELS, TAPS = 16, 9
SHAPES = ("1x56x56x64", "1x56x56x128", "1x28x28x128", "1x14x14x256", "1x7x7x512")
INPUT_SETS = 4
# Of outputs and gradients, relative to the largest expected magnitude.
TOLERANCES = {"float32": 1e-4, "float64": 1e-10, "float16": 1e-2, "bfloat16": 5e-2}


class Inputs(NamedTuple):
    value: Tensor  # (N, H, W, C)
    offset_mask: Tensor  # (N, H, W, 3 * groups * taps)
    weight: Tensor  # (C, 1, 7, 7), of the depth-wise convolution
    grad_output: Tensor  # (N, H, W, C)

    @property
    def parameters(self) -> tuple:
        """The operator's other arguments: a 3x3 window that keeps the image size."""
        return (3, 3), (1, 1), (1, 1), (1, 1), self.value.shape[3] // GROUP_CHANNELS, 1.0, False


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    *size, channels = shape
    packed = torch.randn(*size, channels // GROUP_CHANNELS, 3 * TAPS)
    offsets = 0.5 * packed[..., : 2 * TAPS]
    # Away from integer positions, where the gradient jumps and rounding decides its side.
    packed[..., : 2 * TAPS] = offsets.floor() + 0.1 + 0.8 * (offsets - offsets.floor())
    leaves = torch.randn(shape), packed.flatten(3), torch.randn(channels, 1, 7, 7) / 7
    return Inputs(
        *(leaf.to(device, dtype).requires_grad_() for leaf in leaves),
        torch.randn(shape).to(device, dtype),
    )


def run_compiled(inputs: Inputs) -> Tensor:
    return dcnv4(inputs.value, inputs.offset_mask, *inputs.parameters)


def run_reference(inputs: Inputs) -> Tensor:
    return reference.dcnv4(inputs.value, inputs.offset_mask, *inputs.parameters)


@functools.cache
def regular_grid(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normalised positions (x, y) of the taps without offsets, (H, TAPS, W, 2)."""
    rows, columns = (torch.arange(n, dtype=dtype, device=device) for n in (height, width))
    column_steps, row_steps = torch.cartesian_prod(*[torch.arange(-1, 2, device=device)] * 2).T
    x = (2 * (columns + column_steps[:, None]) + 1) / width - 1
    y = (2 * (rows[:, None] + row_steps) + 1) / height - 1
    return torch.stack(torch.broadcast_tensors(x, y[..., None]), dim=-1)


def run_grid_sample(inputs: Inputs) -> Tensor:
    """The operator as one writes it without a kernel, like the fallbacks of DCNv3 and Deformable
    DETR: one row of the grid per output pixel. 16-bit inputs are sampled in float32."""
    n, height, width, channels = inputs.value.shape
    groups, dtype = channels // GROUP_CHANNELS, reference.compute_dtype(inputs.value.dtype)
    value, offset_mask = inputs.value.to(dtype), inputs.offset_mask.to(dtype)
    images = value.unflatten(3, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    x, y, modulation = reference.sampling_points(offset_mask, *inputs.parameters)
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    grid = grid.flatten(1, 2).transpose(1, 2).flatten(0, 1)  # (N * G, H * W, K, 2)
    samples = F.grid_sample(images, grid, align_corners=False)
    modulation = modulation.flatten(1, 2).transpose(1, 2).flatten(0, 1).unsqueeze(1)
    output = (samples * modulation).sum(-1).unflatten(0, (n, groups)).flatten(1, 2)
    return output.transpose(1, 2).unflatten(1, (height, width)).to(inputs.value.dtype)


def run_tuned_grid_sample(inputs: Inputs) -> Tensor:
    """The same with a constant regular grid, and with taps beside rows: neighbours in memory are
    neighbours in the image."""
    n, height, width, channels = inputs.value.shape
    groups, dtype = channels // GROUP_CHANNELS, reference.compute_dtype(inputs.value.dtype)
    value, offset_mask = inputs.value.to(dtype), inputs.offset_mask.to(dtype)
    images = value.unflatten(3, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    packed = offset_mask.unflatten(3, (groups, -1)).permute(0, 3, 1, 4, 2)  # (N, G, H, 3K, W)
    offsets, modulation = packed.split([2 * TAPS, TAPS], dim=3)
    to_normalised = torch.tensor([2 / width, 2 / height], dtype=dtype, device=value.device)
    offsets = offsets.unflatten(3, (TAPS, 2)).transpose(4, 5) * to_normalised
    grid = regular_grid(height, width, dtype, value.device) + offsets  # (N, G, H, K, W, 2)
    grid = grid.reshape(n * groups, height, TAPS * width, 2)
    samples = F.grid_sample(images, grid, align_corners=False)
    samples = samples.view(n, groups, GROUP_CHANNELS, height, TAPS, width)
    output = (samples * modulation.contiguous().unsqueeze(2)).sum(4)
    return output.permute(0, 3, 4, 1, 2).flatten(3).to(inputs.value.dtype)


def run_depthwise(inputs: Inputs) -> Tensor:
    image = inputs.value.permute(0, 3, 1, 2)  # channels-last memory
    output = F.conv2d(image, inputs.weight, padding=3, groups=image.shape[1])
    return output.permute(0, 2, 3, 1)


COMPETITORS = {
    "compiled": run_compiled,
    "reference": run_reference,
    "grid_sample": run_grid_sample,
    "tuned grid_sample": run_tuned_grid_sample,
    "depth-wise 7x7": run_depthwise,
}


def forward(run: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return run(inputs)


def forward_backward(run: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """Gradients of the tensors that `run` reads, None for the others."""
    if run is run_reference:
        forward(run, inputs)
        tensors = inputs.grad_output, inputs.value.detach(), inputs.offset_mask.detach()
        return *reference.dcnv4_backward(*tensors, *inputs.parameters), None
    return torch.autograd.grad(run(inputs), inputs[:3], inputs.grad_output, allow_unused=True)


PASSES = {"forward": forward, "forward+backward": forward_backward}


def check(inputs: Inputs, tolerance: float) -> None:
    """Raises AssertionError where a competitor disagrees with the reference."""

    def results(run: Callable[[Inputs], Tensor]) -> tuple[Tensor, ...]:
        return forward(run, inputs), *forward_backward(run, inputs)[:2]

    for run in (run_compiled, run_grid_sample, run_tuned_grid_sample):
        for actual, expected in zip(results(run), results(run_reference), strict=True):
            atol = tolerance * expected.abs().max().item()
            torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def seconds(step: Callable, run: Callable, inputs: list[Inputs], args: argparse.Namespace) -> float:
    scope = {"step": step, "run": run, "inputs": itertools.cycle(inputs)}
    timer = Timer("step(run, next(inputs))", globals=scope, num_threads=args.threads)
    return timer.blocked_autorange(min_run_time=args.min_time).median


def benchmark(shape: str, device: str, args: argparse.Namespace) -> None:
    """Checks and times one shape, one line of the table for each pass."""
    size = tuple(map(int, shape.split("x")))
    inputs = [random_inputs(size, getattr(torch, args.dtype), device) for _ in range(INPUT_SETS)]
    check(inputs[0], TOLERANCES[args.dtype])
    for name, step in PASSES.items():
        times = [seconds(step, run, inputs, args) for run in COMPETITORS.values()]
        cells = (f"{1e6 * t:10.0f} us {t / times[0]:6.2f}x" for t in times)
        write(f"{device:7}{shape:14}{name:17}" + "".join(cells))


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxHxWxC")
    parser.add_argument("--min-time", type=float, default=0.5, help="seconds per measurement")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    write(f"torch {torch.__version__}, {args.dtype}, {args.threads} thread(s)")
    write("Median times, and how many times faster the compiled kernel is.")
    write(f"{'device':7}{'shape':14}{'pass':17}" + "".join(f"{name:>21}" for name in COMPETITORS))
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for shape in args.shapes:
            benchmark(shape, device, args)


if __name__ == "__main__":
    main()
