"""Random calls of the operators, mostly invalid, on which all backends must agree.

The compiled kernels, the PyTorch reference and the meta device must either all accept or all reject
a call. Results must equal the reference in float64; rejected calls must raise a TypeError or a
ValueError. `make sanitize-cpu` runs this module with a library built with GCC's sanitizers:

    python -m tests.ops_dcnv4.fuzz --cases 3000 --seed 0
"""

import argparse
import collections
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import ops_dcnv4
from ops_dcnv4 import reference
from tests.ops_dcnv4 import attention_cases, cases

REFUSALS = (TypeError, ValueError)
FORWARD, BACKWARD = "forward", "backward"
WINDOW = ("kernel_size", "stride", "padding", "dilation")
HOSTILE_INTS = (0, -1, -7, 2**15, 2**24, 2**27, 2**27 + 1, 2**29, 2**31 - 1, 2**31, 2**40)
HOSTILE_INTS += (2**62, 2**63 - 1, -(2**31), -(2**63))
HOSTILE_SIDES = (0, -1, 2**24 + 1, 2**31, 2**32 + 2, 2**40, 2**62, -(2**63))
SPECIAL_NUMBERS = (math.nan, math.inf, -math.inf, 10.0, -10.0)


@dataclass(frozen=True)
class Call:
    """Arguments of an operator by name, in the order of its schema, and grad_output."""

    operator: str
    arguments: dict[str, Any]
    grad_output: Tensor
    changes: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = {"grad_output": self.grad_output, **self.arguments}
        described = ", ".join(f"{name}={_describe(a)}" for name, a in shown.items())
        return f"{self.operator}({described}), changed: {self.changes or 'nothing'}"

    def tensors(self) -> dict[str, Tensor]:
        found = {"grad_output": self.grad_output, **self.arguments}
        return {name: t for name, t in found.items() if isinstance(t, Tensor)}

    def change(self, what: str, **arguments) -> "Call":
        grad_output = arguments.pop("grad_output", self.grad_output)
        return replace(
            self,
            arguments=self.arguments | arguments,
            grad_output=grad_output,
            changes=(*self.changes, what),
        )

    def to(self, device: str) -> "Call":
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        grad_output = moved.pop("grad_output")
        return replace(self, arguments=self.arguments | moved, grad_output=grad_output)


def _describe(argument) -> str:
    if not isinstance(argument, Tensor):
        return repr(argument)
    if argument.dtype == torch.int64 and argument.device.type == "cpu" and argument.numel() < 32:
        return f"{argument.dtype} {argument.to_dense().tolist()}"
    dtype, shape = str(argument.dtype).removeprefix("torch."), tuple(argument.shape)
    strides = argument.stride() if argument.layout == torch.strided else argument.layout
    return f"{dtype}{shape} {strides} {argument.device}"


# Ordinary calls


def _make_dcnv4(rng: random.Random) -> Call:
    def pair(low: int, high: int) -> tuple[int, int]:
        return rng.randint(low, high), rng.randint(low, high)

    p = cases.Parameters(
        kernel_size=rng.choice([(3, 3), pair(1, 4)]),
        stride=pair(1, 3),
        padding=pair(0, 3),
        dilation=pair(1, 2),
        groups=rng.randint(1, 3),
        offset_scale=rng.choice([0.25, 0.5, 1.0, 2.0, -1.0, 0.0]),
        remove_center=rng.random() < 0.3,
    )
    size = [
        max(1, d * (k - 1) + 1 - 2 * pad) + rng.randint(0, 5)
        for k, pad, d in zip(p.kernel_size, p.padding, p.dilation, strict=True)
    ]
    tensors = cases.random_tensors(
        p,
        batch=rng.choice([0, 1, 1, 2]),
        size=tuple(size),
        group_channels=rng.choice([0, 1, 3, 4, 5, 16, 16, 17, 32, 33]),
        padding_channels=rng.randint(0, 3),
        spread=rng.choice([0.5, 3.0]),
        steps_per_pixel=8,
        seed=rng.randrange(2**31),
    ).to(rng.choice(cases.DTYPES))
    window = {name: list(getattr(p, name)) for name in WINDOW}
    return Call(
        "dcnv4",
        {
            "value": tensors.value,
            "offset_mask": tensors.offset_mask,
            **window,
            "groups": p.groups,
            "offset_scale": p.offset_scale,
            "remove_center": p.remove_center,
        },
        tensors.grad_output,
    )


def _make_attention(rng: random.Random, form: str) -> Call:
    dtype = rng.choice(cases.DTYPES)
    is_16_bit = dtype in (torch.float16, torch.bfloat16)
    inputs = attention_cases.random_inputs(
        shapes=rng.choice(
            [
                ((4, 5), (3, 4), (2, 2), (1, 2)),
                [(rng.randint(1, 6), rng.randint(1, 6)) for _ in range(rng.randint(1, 4))],
            ]
        ),
        points=rng.choice([1, 2, 4, 8]),
        heads=rng.randint(1, 3),
        head_channels=rng.choice([0, 1, 3, 16, 17, 32, 33]),
        queries=rng.choice([0, 1, 3, 5]),
        batch=rng.choice([0, 1, 1, 2]),
        spread=rng.choice([0.3, 1.0, 20.0]),
        steps=64,
        seed=rng.randrange(2**31),
    ).to(dtype, torch.float32 if is_16_bit and rng.random() < 0.5 else dtype)
    levels = {
        "value": inputs.value,
        "spatial_shapes": inputs.spatial_shapes,
        "level_start_index": inputs.level_start_index,
    }
    if form == "split":
        points = {"sampling_locations": inputs.locations, "attention_weights": inputs.weights}
        return Call("ms_deform_attn", levels | points, inputs.grad_output)
    points = {
        "sampling_loc_attn": attention_cases.pack(inputs),
        "n_points": inputs.locations.shape[4],
    }
    return Call("flash_deform_attn", levels | points, inputs.grad_output)


# Changes


def _resize(rng: random.Random, tensor: Tensor) -> Tensor:
    """Change the size of one dimension, dropping elements or appending ones."""
    dim = rng.randrange(tensor.dim())
    size = tensor.shape[dim] + rng.choice([-1, 1, 2])
    wanted = [*tensor.shape]
    wanted[dim] = rng.choice([0, 1, max(size, 0)])
    numbers = tensor.flatten()[: math.prod(wanted)]
    missing = numbers.new_ones(math.prod(wanted) - len(numbers))
    return torch.cat((numbers, missing)).view(wanted)


def _change_dimensions(rng: random.Random, tensor: Tensor) -> Tensor:
    if rng.random() < 0.5 or 0 in tensor.shape[:1]:
        return tensor[None]
    return tensor[0]


def _change_dtype(rng: random.Random, tensor: Tensor) -> Tensor:
    others = (torch.int64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)
    return tensor.to(rng.choice([*cases.DTYPES, *others]))


def _use_special_numbers(rng: random.Random, tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    flat = tensor.view(-1)
    for _ in range(min(3, len(flat)) if tensor.is_floating_point() else 0):
        flat[rng.randrange(len(flat))] = rng.choice(SPECIAL_NUMBERS)
    return tensor


def _scatter(rng: random.Random, tensor: Tensor) -> Tensor:
    """Return equal values in another memory layout: strided, transposed, misaligned or negated."""
    way = rng.choice(["apart", "order", "misaligned", "negated"])
    if way == "apart":
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    if way == "order":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if way == "negated" and tensor.is_floating_point():
        return torch._neg_view(-tensor)
    memory = bytearray(tensor.numel() * tensor.element_size() + 1)
    if len(memory) == 1:
        return tensor
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape).copy_(tensor)


def _overlap(rng: random.Random, tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape whose elements overlap in memory."""
    if tensor.numel() == 0:
        return tensor
    if rng.random() < 0.5:
        dim = rng.randrange(tensor.dim())
        return tensor.narrow(dim, 0, 1).expand(tensor.shape)
    strides = [rng.randint(0, 1) for _ in tensor.shape]
    return tensor.as_strided(tensor.shape, strides)


def _inflate(rng: random.Random, tensor: Tensor) -> Tensor:
    """Return a tensor with a size beyond every limit, expanded so that it needs no memory."""
    shape = [min(size, 1) for size in tensor.shape]
    shape[rng.randrange(len(shape))] = rng.choice([2**29, 2**31, 2**33, 2**40])
    return tensor.new_zeros([1] * len(shape)).expand(shape)


def _move(rng: random.Random, tensor: Tensor) -> Tensor:
    """Convert to a sparse or MKL-DNN layout, or move to the meta device."""
    way = rng.choice(["sparse", "csr", "mkldnn", "meta"])
    if way == "meta":
        return tensor.to("meta")
    if way == "mkldnn" and tensor.dtype == torch.float32 and tensor.numel() and tensor.dim() < 6:
        return tensor.contiguous().to_mkldnn()
    if way == "csr" and tensor.dim() == 2:
        return tensor.to_sparse_csr()
    return tensor.to_sparse()


TENSOR_CHANGES: dict[str, Callable[[random.Random, Tensor], Tensor]] = {
    "size": _resize,
    "dimensions": _change_dimensions,
    "dtype": _change_dtype,
    "numbers": _use_special_numbers,
    "memory": _scatter,
    "overlap": _overlap,
    "inflated": _inflate,
    "moved": _move,
}


def _change_tensor(rng: random.Random, call: Call) -> Call:
    name = rng.choice(list(call.tensors()))
    tensor = call.tensors()[name]
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dim() == 0:
        return call
    how = rng.choice(list(TENSOR_CHANGES))
    if tensor.numel() > 2**20 or tensor.is_neg() or tensor.is_complex():
        return call
    return call.change(f"{how} of {name}", **{name: TENSOR_CHANGES[how](rng, tensor)})


def _change_window(rng: random.Random, call: Call) -> Call:
    name = rng.choice(WINDOW)
    pair = list(call.arguments[name])
    if rng.random() < 0.15:
        pair = rng.choice([pair[:1], [*pair, 1], []])
    else:
        pair[rng.randrange(len(pair)) if pair else 0 :] = [rng.choice(HOSTILE_INTS)]
        pair = (pair * 2)[:2]
    return call.change(name, **{name: pair})


def _change_groups(rng: random.Random, call: Call) -> Call:
    return call.change("groups", groups=rng.choice([*HOSTILE_INTS, 2, 3, 7]))


def _change_scale(rng: random.Random, call: Call) -> Call:
    scale = rng.choice([math.nan, math.inf, -math.inf, 1e30, 1e300])
    return call.change("offset_scale", offset_scale=scale)


def _empty_image(rng: random.Random, call: Call) -> Call:
    """Make an image without rows or columns, with enough padding for a non-empty output."""
    arguments = call.arguments
    value, offset_mask = arguments["value"], arguments["offset_mask"]
    axis = rng.randrange(2)
    size = [*value.shape[1:3]]
    size[axis] = 0
    windows = zip(*_pairs(call, "dilation", "kernel_size"), strict=True)
    padding = [dilation * (kernel - 1) + 1 for dilation, kernel in windows]
    out = ops_dcnv4.output_size(
        tuple(size), *_pairs(call, "kernel_size", "stride"), padding, *_pairs(call, "dilation")
    )
    n, channels = value.shape[0], value.shape[3]
    return call.change(
        "empty image",
        value=value.new_zeros(n, *size, channels),
        offset_mask=offset_mask.new_zeros(n, *out, offset_mask.shape[3]),
        padding=padding,
        grad_output=call.grad_output.new_zeros(n, *out, channels),
    )


def _pairs(call: Call, *names: str) -> list[Sequence[int]]:
    return [call.arguments[name] for name in names]


def _change_levels(rng: random.Random, call: Call) -> Call:
    name = rng.choice(["spatial_shapes", "level_start_index"])
    levels = call.arguments[name].clone()
    if levels.numel() == 0 or levels.is_meta or levels.layout != torch.strided:
        return call
    if levels.dtype != torch.int64:
        return call
    flat = levels.view(-1)
    flat[rng.randrange(len(flat))] = rng.choice([*HOSTILE_SIDES, 1, 2, 3])
    return call.change(f"levels of {name}", **{name: levels})


def _change_n_points(rng: random.Random, call: Call) -> Call:
    return call.change("n_points", n_points=rng.choice([*HOSTILE_INTS, 1, 3]))


_CHANGES_OF: dict[str, list[Callable[[random.Random, Call], Call]]] = {
    "dcnv4": [_change_window, _change_window, _change_groups, _change_scale],
    "ms_deform_attn": [_change_levels],
    "flash_deform_attn": [_change_levels, _change_n_points],
}


def make_call(seed: int) -> Call:
    """Make the call of a seed; one in four is ordinary."""
    rng = random.Random(seed)
    operator = rng.choice(["dcnv4", "dcnv4", "ms_deform_attn", "flash_deform_attn"])
    if operator == "dcnv4":
        call = _make_dcnv4(rng)
        if rng.random() < 0.05:
            return _empty_image(rng, call)
    else:
        call = _make_attention(rng, "split" if operator == "ms_deform_attn" else "fused")
    for _ in range(rng.choice([0, 1, 1, 2])):
        changes = [_change_tensor, _change_tensor, *_CHANGES_OF[operator]]
        call = rng.choice(changes)(rng, call)
    return call


# Running calls


Outcome = tuple[Tensor, ...] | Exception


def _attempt(function: Callable, *arguments) -> Outcome:
    try:
        results = function(*arguments)
    except REFUSALS as error:
        return error
    return results if isinstance(results, tuple) else (results,)


def run_raw(call: Call) -> dict[str, Outcome]:
    """Run the operators of torch.ops."""
    namespace, arguments = torch.ops.ops_dcnv4, call.arguments.values()
    forward, backward = (getattr(namespace, call.operator + s) for s in ("", "_backward"))
    return {
        FORWARD: _attempt(forward, *arguments),
        BACKWARD: _attempt(backward, call.grad_output, *arguments),
    }


def run_public(call: Call) -> Outcome:
    """Run the public function."""
    return _attempt(lambda: getattr(ops_dcnv4, call.operator)(**call.arguments))


def run_exactly(call: Call, direction: str) -> tuple[Tensor, ...]:
    """Run the reference in float64 on dense copies."""
    arguments = [
        a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in call.arguments.values()
    ]
    if call.operator == "dcnv4" and call.grad_output.dtype != torch.float64:
        scale = call.arguments["offset_scale"]  # 1e300 is infinite in float32
        arguments[-2] = torch.tensor(scale, dtype=torch.float64).float().item()
    if direction == FORWARD:
        return (getattr(reference, call.operator)(*arguments),)
    backward = getattr(reference, f"{call.operator}_backward")
    return backward(call.grad_output.double(), *arguments)


def _are_near(actual: Tensor, expected: Tensor) -> bool:
    finite = expected.isfinite()
    if actual.shape != expected.shape or not torch.equal(actual.isfinite(), finite):
        return False
    rtol = torch.finfo(actual.dtype).eps
    actual, expected = actual.double()[finite], expected[finite]
    largest = expected.abs().max().item() if len(expected) else 0.0
    return torch.allclose(actual, expected, rtol=rtol, atol=1e-5 * largest)


def find_fault(call: Call, compiled: dict[str, Outcome], others: dict[str, Outcome]) -> str | None:
    """Compare the outcomes of the compiled kernels with the exact results and the reference's."""
    can_be_meta = not any(t.layout != torch.strided for t in call.tensors().values())
    on_meta = run_raw(call.to("meta")) if can_be_meta else compiled
    for direction, outcome in compiled.items():
        refused = isinstance(outcome, Exception)
        if refused and not call.changes:
            return f"{direction} was refused: {outcome}"
        if isinstance(others[direction], Exception) != refused:
            return f"{direction}: compiled {outcome}, reference {others[direction]}"
        # A call with two faults may raise either error.
        if refused and len(call.changes) < 2 and type(others[direction]) is not type(outcome):
            return f"{direction}: compiled {outcome!r}, reference {others[direction]!r}"
        has_own_devices = len({t.device for t in call.tensors().values()}) > 1
        sees_levels = not any("spatial_shapes" in c or "level_start" in c for c in call.changes)
        is_refused_on_meta = isinstance(on_meta[direction], Exception)
        if is_refused_on_meta > refused and not has_own_devices:
            return f"{direction} was refused on meta only: {on_meta[direction]}"
        if is_refused_on_meta < refused and sees_levels and not has_own_devices:
            return f"{direction} was computed on meta only: {outcome}"
        if refused or call.arguments["value"].is_meta:
            continue
        if not is_refused_on_meta and can_be_meta:
            shapes = [tuple(t.shape) for t in on_meta[direction]]
            if shapes != [tuple(t.shape) for t in outcome]:
                return f"{direction}: shapes {shapes} on meta"
        for actual, expected in zip(outcome, run_exactly(call, direction), strict=True):
            if call.arguments["value"].numel() == 0:  # zeros, or NaN from zero times infinity
                actual, expected = actual.nan_to_num(0), torch.zeros_like(expected)
            if not _are_near(actual, expected):
                return f"{direction}: {actual} is not {expected}"
    public = run_public(call)  # converts some dtypes
    takes_more = any(change.startswith("dtype") for change in call.changes)
    if isinstance(public, Exception) < isinstance(compiled[FORWARD], Exception) and not takes_more:
        return f"the public function computed what was refused: {compiled[FORWARD]}"
    if isinstance(public, Exception) and not call.changes:
        return f"the public function refused: {public}"
    return None


def run(seeds: Sequence[int], show: bool = False) -> collections.Counter:
    """Run the calls of some seeds; return how many were computed and refused.

    Raises:
        AssertionError: If a result is wrong, or backends disagree on accepting a call.
    """
    calls = [make_call(seed) for seed in seeds]
    compiled = []
    for seed, call in zip(seeds, calls, strict=True):
        if show:  # to identify the call of a sanitizer's report
            sys.stderr.write(f"{seed}: {call}\n")
        compiled.append(run_raw(call))
    with ops_dcnv4.use_backend("reference"):
        others = [run_raw(call) for call in calls]
    counts = collections.Counter()
    for seed, call, *outcomes in zip(seeds, calls, compiled, others, strict=True):
        fault = find_fault(call, *outcomes)
        if fault is not None:
            raise AssertionError(f"seed {seed}, {call}: {fault}")
        refused = isinstance(outcomes[0][FORWARD], Exception)
        counts[call.operator, "refused" if refused else "computed"] += 1
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="the first case's; others follow")
    parser.add_argument("--show", action="store_true", help="write each call before it is made")
    options = parser.parse_args(arguments)
    counts, end = collections.Counter(), options.seed + options.cases
    for first in range(options.seed, end, 100):
        counts += run(range(first, min(first + 100, end)), options.show)
    listed = ", ".join(f"{count} {' '.join(key)}" for key, count in sorted(counts.items()))
    kernels = torch.ops.ops_dcnv4.instruction_set()
    sys.stdout.write(f"{counts.total()} cases, {kernels} kernels: {listed}\n")


if __name__ == "__main__":
    main()
