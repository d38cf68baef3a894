import ctypes
import math

import pytest
import torch
from torch import nn

from benchmarks import dcnv4, predict
from benchmarks.competitors import bytes_touched
from tests.cuda_model.build import AVAILABLE, load_operators
from tests.ops_dcnv4 import attention_cases
from tests.ops_dcnv4.cases import Parameters, random_tensors
from tests.sass import __main__ as sass
from tests.sass import device

META = torch.device("meta")
MAIN = dcnv4.Shape(64, 56, 56, 128)


def test_the_table_has_every_kernel_that_is_counted():
    assert predict.counts().keys() == {name for name, _ in sass.cases()}
    assert all(instructions > 0 for instructions, _ in predict.counts().values())
    has_sectors = {name for name, (_, sectors) in predict.counts().items() if sectors}
    assert has_sectors == {name for name in predict.counts() if "backward" in name}


@pytest.fixture
def launched():
    """Count the warps that the operators launch, without running the kernels."""
    warps = []

    def receive(kernel, parameters, size, grid, block, shared_bytes):
        warps.append(math.prod(grid[:3]) * math.ceil(math.prod(block[:3]) / 32))

    load_operators()
    launcher = device.Launcher(receive)
    device.OPERATORS.set_launcher(ctypes.cast(launcher, ctypes.c_void_p).value)
    yield warps
    device.OPERATORS.set_launcher(0)


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="needs Linux and g++")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_warps_are_those_that_the_operators_launch(dtype, launched):
    p = Parameters(groups=8)
    value, offset_mask, grad_output = random_tensors(p, 2, (16, 16), 16).to(dtype)
    device.OPERATORS.dcnv4(value, offset_mask, *p)
    device.OPERATORS.dcnv4_backward(grad_output, value, offset_mask, *p, deterministic=False)
    inputs = attention_cases.random_inputs(sass.LEVELS, 4, heads=8, head_channels=32, queries=64)
    inputs = inputs.to(dtype)
    device.OPERATORS.ms_deform_attn(*inputs[:5])
    device.OPERATORS.ms_deform_attn_backward(inputs.grad_output, *inputs[:5], deterministic=False)
    outputs = [grad_output.nbytes] * 2 + [inputs.grad_output.nbytes] * 2
    assert launched == [size / predict.WARP_BYTES for size in outputs]


def predicted(shape, dtype):
    inputs = shape.random_inputs(getattr(torch, dtype), META)
    touched, size = bytes_touched(inputs), inputs.grad_output.nbytes
    return predict.operator_seconds("DCNv4", dtype, shape.group_channels, size, touched)


def test_the_slowest_part_of_a_kernel_determines_its_time(monkeypatch):
    kernels = {"DCNv4 forward fp16 D16": (650, 0), "DCNv4 backward fp16 D16": (2600, 2000)}
    monkeypatch.setattr(predict, "counts", lambda: kernels)
    warps = 64 * 56 * 56 * 128 * 2 / 512
    seconds = predicted(MAIN, "float16")
    assert seconds["forward"] == pytest.approx(warps * 650 / (0.65 * 132 * 4 * 1.98e9))  # issue
    assert seconds["backward"] == pytest.approx(warps * 2000 / 160e9)  # reductions
    assert seconds["forward+backward"] == seconds["forward"] + seconds["backward"]
    kernels["DCNv4 forward fp16 D16"] = (1, 0)
    touched = bytes_touched(MAIN.random_inputs(torch.float16, META))["forward"]
    assert predicted(MAIN, "float16")["forward"] == touched / 4.3e12  # memory


def test_kernels_that_are_not_counted_have_no_prediction():
    assert predicted(MAIN, "float64") == {}
    assert predicted(dcnv4.Shape(1, 7, 7, 48, 24), "float16") == {}


def test_matrix_products_are_limited_by_operations_or_memory():
    images = torch.empty(4096, 4096)
    model = nn.Linear(4096, 4096, bias=False).eval()
    seconds = predict.model_seconds(model, images, torch.bfloat16, "graph")
    assert seconds == pytest.approx(2 * 4096**3 / 790e12)
    assert predict.model_seconds(model.train(), images, torch.bfloat16, "graph") > 2 * seconds
    seconds = predict.model_seconds(model.eval(), images[:1], torch.bfloat16, "graph")
    assert seconds == pytest.approx(2 * (4096**2 + 2 * 4096) / 4.3e12)


def test_launches_limit_eager_models_and_fusion_saves_memory():
    model, images = nn.Sequential(*[nn.ReLU() for _ in range(10)]).eval(), torch.empty(2, 3)
    seconds = {
        mode: predict.model_seconds(model, images, torch.float32, mode)
        for mode in ("eager", "graph", "compiled")
    }
    assert seconds["eager"] == pytest.approx(10 * predict.LAUNCH)
    assert seconds["graph"] == pytest.approx(10 * 2 * images.nbytes / predict.BYTES)
    assert seconds["compiled"] == 0


def test_the_operators_of_this_project_are_counted_by_their_kernels():
    stopwatch = predict.Stopwatch(fused=False)
    inputs = MAIN.random_inputs(torch.float16, META)
    with stopwatch:
        output = torch.ops.ops_dcnv4.dcnv4(*inputs.arguments)
        output.backward(inputs.grad_output)
    seconds = predicted(MAIN, "float16")
    assert stopwatch.kernels == 2
    assert stopwatch.seconds == pytest.approx(seconds["forward+backward"], rel=1e-3)


def test_a_model_that_reads_data_has_no_prediction():
    class Reads(nn.Module):
        def forward(self, images):
            return images * images.sum().item()

    assert predict.model_seconds(Reads().eval(), torch.empty(1), torch.float32, "eager") is None
