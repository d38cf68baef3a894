"""Predict times on an NVIDIA H200, to be compared with measurements.

A kernel is assumed to take as long as the slowest of its parts: issuing its instructions, reading
and writing each tensor once, adding to memory sectors, and matrix products. The instructions and
sectors per warp are those that ``make sass`` counts on the emulator, from the table in
docs/benchmarks.md. Latencies and caches are not modeled; deviating measurements show where they
matter.
"""

import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

# Rates of the H200, per second.
CLOCK = 1.98e9
ISSUED = 132 * 4 * CLOCK  # instructions of warps: one per clock and scheduler
EFFICIENCY = 0.65  # assumed share of the clocks in which a scheduler issues an instruction
BYTES = 4.3e12  # read and written by a large copy
SECTORS = 160e9  # added to in the L2 cache; unknown, assumed between 80e9 and 240e9
TENSOR_CORES = {"float16": 790e12, "bfloat16": 790e12, "tf32": 390e12}  # operations
CUDA_CORES = 67e12  # operations in float32
LAUNCH = 6e-6  # seconds in which PyTorch launches a kernel, if it is not part of a graph

SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
WARP_BYTES = 512  # of the output that a warp computes, or whose gradient it reads


@functools.cache
def counts() -> dict[str, tuple[float, float]]:
    """Return the instructions and sectors per warp of each kernel in the table."""
    row = r"^\| ((?:DCNv4|attention) [^|]+?) \| \d+ \| \d+ \| (\d+) \| (\d+) \|$"
    rows = re.findall(row, TABLE.read_text(), re.MULTILINE)
    return {name: (float(mean), float(sectors)) for name, mean, sectors in rows}


def kernel_name(family: str, way: str, dtype: str, group_channels: int) -> str:
    """Return the name of a kernel in the table; it may not exist.

    Args:
        family: "DCNv4" or "attention".
        way: "forward" or "backward".
        dtype: Name of the dtype, such as "float16".
        group_channels: Channels per group or head.
    """
    return f"{family} {way} {SHORT.get(dtype, dtype)} D{group_channels}"


def kernel_seconds(kernel: str, output_bytes: int, touched: int) -> float | None:
    """Return the predicted time of one of this project's kernels.

    Args:
        kernel: Name of the kernel in the table.
        output_bytes: Size of the output.
        touched: Bytes that are read and written if each tensor is accessed once.

    Returns:
        The time in seconds, or None for kernels that are not in the table.
    """
    if kernel not in counts():
        return None
    instructions, sectors = counts()[kernel]
    number = output_bytes / WARP_BYTES
    issue = number * instructions / (EFFICIENCY * ISSUED)
    return max(issue, number * sectors / SECTORS, touched / BYTES)


def operator_seconds(
    family: str, dtype: str, group_channels: int, output_bytes: int, touched: dict[str, int]
) -> dict[str, float]:
    """Return the predicted time of each pass of an operator, as far as there is a prediction.

    Args:
        family: "DCNv4" or "attention".
        dtype: Name of the dtype.
        group_channels: Channels per group or head.
        output_bytes: Size of the output.
        touched: Bytes that each pass reads and writes.
    """
    seconds = {}
    for way in ("forward", "backward"):
        name = kernel_name(family, way, dtype, group_channels)
        if predicted := kernel_seconds(name, output_bytes, touched[way]):
            seconds[way] = predicted
    if len(seconds) == 2:
        seconds["forward+backward"] = sum(seconds.values())
    return seconds


class Stopwatch(TorchDispatchMode):
    """Add up the predicted times of the operators that run, which can be on meta tensors.

    Args:
        fused: Assume that operators that treat each element alone are fused into others.

    Attributes:
        seconds: Time of the kernels.
        kernels: Number of kernels.
    """

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.seconds, self.kernels = 0.0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operator and add its time."""
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = any(r.alias_info and not r.alias_info.is_write for r in returns)
        is_free = self.fused and torch.Tag.pointwise in func.tags
        if not is_view and not is_free:
            self.kernels += 1
            self.seconds += _seconds(func, args, kwargs or {}, result)
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _seconds(func: Any, args: tuple, kwargs: dict, result: Any) -> float:
    """Return the predicted time of an operator."""
    touched = sum(tensor.nbytes for tensor in _tensors((args, kwargs, result)))
    if func.namespace == "ops_dcnv4":
        return _seconds_of_ours(func, args, touched)
    operations = 0
    if (count := flop_registry.get(func._overloadpacket)) and not _has_groups(func, args):
        operations = count(*args, **kwargs, out_val=result)
    return max(touched / BYTES, operations / _operations_per_second(func, args))


def _has_groups(func: Any, args: tuple) -> bool:
    """Return whether this is a convolution with groups, which is limited by memory instead."""
    names = [argument.name for argument in func._schema.arguments]
    return "groups" in names and args[names.index("groups")] > 1


def _seconds_of_ours(func: Any, args: tuple, touched: int) -> float:
    name = func._schema.name.partition("::")[2]
    is_backward = name.endswith("_backward")
    value, like_output = (args[1], args[0]) if is_backward else (args[0], args[0])
    if not name.startswith("dcnv4"):
        return touched / BYTES
    groups = args[6 + is_backward]  # after value, offset_mask and four pairs
    kernel = kernel_name(
        "DCNv4",
        "backward" if is_backward else "forward",
        str(value.dtype).removeprefix("torch."),
        value.shape[3] // groups,
    )
    return kernel_seconds(kernel, like_output.nbytes, touched) or touched / BYTES


def _operations_per_second(func: Any, args: tuple) -> float:
    """Return the rate of matrix products and convolutions in the dtype of the first tensor."""
    dtype = str(next(_tensors(args), torch.empty(0)).dtype).removeprefix("torch.")
    if "convolution" in func._schema.name and dtype == "float32":
        return TENSOR_CORES["tf32"]  # PyTorch's default
    return TENSOR_CORES.get(dtype, CUDA_CORES)


def model_seconds(model: nn.Module, images: Tensor, dtype: torch.dtype, mode: str) -> float | None:
    """Return the predicted time of inference, or of forward and backward if `model` is training.

    Args:
        model: The model, on any device.
        images: Images (N, 3, H, W); only the shape is used.
        dtype: Dtype of weights and images.
        mode: "eager", where the launches of kernels are counted too, "graph" or "compiled".

    Returns:
        The time in seconds, or None if the model cannot run on tensors without data.
    """
    meta = copy.deepcopy(model).to("meta", dtype)
    inputs = torch.empty(images.shape, dtype=dtype, device="meta")
    targets = torch.empty(len(images), dtype=torch.int64, device="meta")
    try:
        with Stopwatch(fused=mode == "compiled") as stopwatch:
            if model.training:
                F.cross_entropy(meta(inputs), targets).backward()
            else:
                with torch.no_grad():
                    meta(inputs)
    except (NotImplementedError, RuntimeError):
        return None
    launches = stopwatch.kernels * LAUNCH if mode == "eager" else 0.0
    return max(stopwatch.seconds, launches)
