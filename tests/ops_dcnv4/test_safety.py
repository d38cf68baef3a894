"""Tests that every backend rejects arguments that would access memory outside the tensors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ops_dcnv4 import dcnv4, flash_deform_attn, ms_deform_attn, output_size, use_backend
from tests import processes
from tests.ops_dcnv4 import fuzz, test_attention, test_ops
from tests.ops_dcnv4.attention_cases import FORMS
from tests.ops_dcnv4.cases import DTYPES, Parameters, random_tensors

ROOT = Path(__file__).parents[2]
CPU_SOURCES = ROOT / "ops_dcnv4" / "csrc" / "cpu"


@pytest.fixture(params=["compiled", "reference", "triton", "meta"])
def device(request) -> str:
    """Select a backend and return the device of its tensors."""
    if request.param == "meta":
        yield "meta"
        return
    if request.param == "triton":  # Arguments are checked before a GPU is needed.
        pytest.importorskip("triton")
    with use_backend(request.param):
        yield "cpu"


def assert_refused(
    operator: str, error: type[Exception], grad_output: Tensor, *arguments, message: str = ""
) -> None:
    namespace = torch.ops.ops_dcnv4
    with pytest.raises(error, match=message):
        getattr(namespace, operator)(*arguments)
    with pytest.raises(error, match=message):
        getattr(namespace, f"{operator}_backward")(grad_output, *arguments)


@pytest.mark.parametrize(("change", "error", "message"), test_ops.REFUSED)
def test_dcnv4_rejects_invalid_arguments_in_every_backend(change, error, message, device):
    tensors = {"value": test_ops.VALUE, "offset_mask": test_ops.OFFSET_MASK}
    arguments = Parameters()._asdict() | tensors | change
    value, offset_mask, *parameters = (arguments[name] for name in test_ops.SCHEMA_ORDER)
    grad_output = torch.zeros(2, 5, 6, 8, dtype=value.dtype, device=device)
    tensors = value.to(device), offset_mask.to(device)
    assert_refused("dcnv4", error, grad_output, *tensors, *parameters)


@pytest.mark.parametrize("pair", [[], [1], [1, 1, 1]])
@pytest.mark.parametrize("name", fuzz.WINDOW)
def test_dcnv4_rejects_parameters_other_than_pairs(name, pair, device):
    value, offset_mask, grad_output = random_tensors(Parameters()).to(device)
    parameters = Parameters()._replace(**{name: pair})
    assert_refused("dcnv4", ValueError, grad_output, value, offset_mask, *parameters)


@pytest.mark.parametrize(("change", "error", "message"), test_attention.CHANGES)
@pytest.mark.parametrize("form", FORMS)
def test_attention_rejects_invalid_arguments_in_every_backend(form, change, error, message, device):
    inputs = test_attention.SPLIT._replace(**change)
    arguments = [
        a.to(device) if isinstance(a, Tensor) else a
        for a in test_attention.raw_arguments(inputs, form)
    ]
    operator = "ms_deform_attn" if form == "split" else "flash_deform_attn"
    assert_refused(operator, error, inputs.grad_output.to(device), *arguments)


@pytest.mark.parametrize("shapes", [[[2, 3], [2, 3]], [[2**40, 2**40], [2, 2]], [[0, 3], [2, 2]]])
@pytest.mark.parametrize("start", [[0, 6], [-1, 6], [0, 2**62]])
@pytest.mark.parametrize("backend", ["compiled", "reference", "triton"])
def test_levels_outside_of_value_are_rejected(backend, start, shapes):
    if backend == "triton":
        pytest.importorskip("triton")
    levels = torch.zeros(2, 10, 2, 4), torch.tensor(shapes), torch.tensor(start)
    points = torch.zeros(2, 5, 2, 2, 3, 2), torch.zeros(2, 5, 2, 2, 3)
    message = r"level \d of spatial_shapes and level_start_index"
    with use_backend(backend):
        assert_refused(
            "ms_deform_attn", ValueError, torch.zeros(2, 5, 8), *levels, *points, message=message
        )


def test_tensors_on_different_devices_are_rejected():
    p = Parameters()
    value, offset_mask, grad_output = random_tensors(p)
    for tensors in (
        (grad_output, value.to("meta"), offset_mask),
        (grad_output, value, offset_mask.to("meta")),
        (grad_output.to("meta"), value, offset_mask),
    ):
        with pytest.raises(ValueError, match=r"device|grad_output must be"):
            torch.ops.ops_dcnv4.dcnv4_backward(*tensors, *p)


@pytest.mark.parametrize("axis", [0, 1])
def test_public_function_rejects_an_image_without_pixels(axis, device):
    size, padding = [[0, 4], [4, 0]][axis], [[2, 1], [1, 2]][axis]
    out = [2, 4] if axis == 0 else [4, 2]
    value = torch.zeros(1, *size, 16, device=device, requires_grad=True)
    offset_mask = torch.zeros(1, *out, 27, device=device)
    with pytest.raises(ValueError, match="value must have at least one row and one column"):
        dcnv4(value, offset_mask, padding=tuple(padding))


@pytest.mark.parametrize("levels", [[(0, 3)], [(3, 0)], torch.tensor([[0, 0]])])
def test_public_functions_reject_levels_without_pixels(levels, device):
    value, points = torch.zeros(1, 0, 2, 4, device=device), torch.zeros(1, 5, 2, 3, device=device)
    message = "value must have at least one pixel"
    with pytest.raises(ValueError, match=message):
        flash_deform_attn(value, levels, None, points, 1)
    locations, weights = points.view(1, 5, 2, 1, 1, 3)[..., :2], points[..., None, :1]
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(value, levels, None, locations, weights)


@pytest.mark.parametrize("name", fuzz.WINDOW)
@pytest.mark.parametrize("number", [2**29, 2**63, 2**80])
def test_public_function_rejects_a_window_beyond_the_limits(name, number):
    value, offset_mask, _ = random_tensors(Parameters())
    parameters = Parameters()._replace(**{name: (1, number)})
    with pytest.raises(ValueError, match=f"{name} must be at most 134217728, got"):
        dcnv4(value, offset_mask, *parameters)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_alignment(dtype):
    def misaligned(tensor: Tensor) -> Tensor:
        memory = bytearray(tensor.numel() * tensor.element_size() + 1)
        moved = torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)
        return moved.copy_(tensor)

    p = Parameters()
    value, offset_mask, grad_output = random_tensors(p).to(dtype)
    operators = torch.ops.ops_dcnv4
    expected = operators.dcnv4_backward(grad_output, value, offset_mask, *p)
    tensors = map(misaligned, (grad_output, value, offset_mask))
    for actual, wanted in zip(operators.dcnv4_backward(*tensors, *p), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_windows_just_within_the_limits_are_computed():
    """Parameters just within the limits give the most distant coordinates."""
    p = Parameters((1, 2), (2**27, 2**27), (2**27, 2**27), (2**27, 2**27), groups=1)
    value = torch.ones(1, 3, 4, 1)
    out = output_size((3, 4), *p[:4])
    offset_mask = torch.zeros(1, *out, 6)
    offset_mask[..., 4:] = 1
    for backend in ("compiled", "reference"):
        with use_backend(backend):
            output = dcnv4(value, offset_mask, *p)
        assert output.shape == (1, *out, 1)
    assert output.sum() == 2  # from the top left pixel
    assert torch.equal(output, dcnv4(value, offset_mask, *p))


def test_negated_views_are_resolved():
    p = Parameters()
    value, offset_mask, _ = random_tensors(p)
    negated = torch._neg_view(-value)
    assert negated.is_neg()
    assert torch.equal(dcnv4(negated, offset_mask, *p), dcnv4(value, offset_mask, *p))


# Instruction sets


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_every_instruction_set_feature_is_checked_before_use(name):
    source = (CPU_SOURCES / f"kernels_{name}.cpp").read_text()
    targets = re.findall(r'target\("([^"]+)"\)', source)
    assert len(targets) == 2  # for clang and GCC
    choice = (CPU_SOURCES / "instruction_set.cpp").read_text()
    bodies = dict(re.findall(r"bool supports_(\w+)\(\) {(.+?)\n}", choice, re.DOTALL))
    checked = checked_features(bodies, name)
    for target in targets:
        assert set(target.split(",")) == checked


def checked_features(bodies: dict[str, str], name: str) -> set[str]:
    features = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', bodies[name]))
    for other in re.findall(r"supports_(\w+)\(\)", bodies[name]):
        if "cpuid" in bodies[other]:
            assert f"bit_{other.upper()}" in bodies[other]
            features.add(other)
        else:
            features |= checked_features(bodies, other)
    return features


# The choice is made once per process, so each line of the environment has its own.
CHOICES = """
import os, sys, torch, ops_dcnv4
for line in sys.stdin:
    ours, of_torch = line.rstrip("\\n").split(",")
    if os.fork() == 0:
        os.environ.update(OPS_DCNV4_CPU_CAPABILITY=ours, ATEN_CPU_CAPABILITY=of_torch)
        try:
            print(torch.ops.ops_dcnv4.instruction_set(), flush=True)
        except ValueError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_environment_variables_cap_the_instruction_set():
    lines = [",", "default,", "avx2,", "avx512,", ",default", ",avx2", "avx512,default"]
    lines += ["default,avx512", "AVX2,", "fastest,default"]
    result = subprocess.run(
        [sys.executable, "-c", CHOICES],
        input="\n".join(lines),
        capture_output=True,
        check=True,
        text=True,
    )
    choices = dict(zip(lines, result.stdout.splitlines(), strict=True))
    best = choices[","]
    assert best in ("baseline", "avx2", "avx512")
    avx2 = "avx2" if best == "avx512" else best
    refusal = "the environment variable OPS_DCNV4_CPU_CAPABILITY must be default, avx2 or avx512"
    assert choices == {
        ",": best,
        "default,": "baseline",
        "avx2,": avx2,
        "avx512,": best,
        ",default": "baseline",
        ",avx2": avx2,
        "avx512,default": best,
        "default,avx512": "baseline",
        "AVX2,": f"{refusal}, got AVX2",
        "fastest,default": f"{refusal}, got fastest",
    }


# Random calls


@pytest.mark.slow
def test_backends_agree_on_random_calls():
    counts = fuzz.run(range(400))
    for operator in ("dcnv4", "ms_deform_attn", "flash_deform_attn"):
        assert counts[operator, "computed"] > 20
        assert counts[operator, "refused"] > 20


# Instruction sets below the best one, which the test above uses.
LOWER = {"AVX2": {"default": "baseline"}, "AVX512": {"default": "baseline", "avx2": "avx2"}}


@pytest.mark.slow
def test_lower_instruction_sets_agree_on_random_calls():
    sets = LOWER.get(torch.backends.cpu.get_cpu_capability(), {"default": "baseline"})
    for highest, chosen in sets.items():
        process = processes.run(
            *("-m", "tests.ops_dcnv4.fuzz", "--cases", 150, "--seed", 400),
            environment={"OPS_DCNV4_CPU_CAPABILITY": highest},
        )
        assert f"150 cases, {chosen} kernels" in process.checked().stdout
