"""Tests of layers and models on a GPU: equality with the CPU, mixed precision, torch.compile."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flash_internimage  # noqa: F401  registers the models
from ops_dcnv4 import DCNv4
from tests.flash_internimage.test_backbone import GOLDENS, gradients, images, load_golden
from tests.ops_dcnv4.test_modules import test_published_module  # noqa: F401


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def randomized_model(name: str) -> nn.Module:
    """Return a registered model with random offsets and modulation, which are initially zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, DCNv4):
            nn.init.normal_(module.offset_mask.weight, std=0.02)
            nn.init.normal_(module.offset_mask.bias, std=0.5)
    return model.eval()


models = pytest.mark.parametrize(
    ("name", "size"), [("flash_internimage_nano", 64), ("flash_internimage_tiny", 224)]
)


def to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
@torch.no_grad()
def test_feature_maps_equal_the_published_ones(path, device, assert_near):
    golden, model = load_golden(path)
    x = torch.from_numpy(golden["input"]).to(device, torch.float64)
    maps = model.to(device, torch.float64).forward_intermediates(x, intermediates_only=True)
    for i, feature_map in enumerate(maps):
        assert_near(feature_map.cpu(), torch.from_numpy(golden[f"feat{i}"]), 1e-9)


@models
@torch.no_grad()
def test_float32_logits_equal_those_of_the_cpu(name, size, device, assert_near):
    model, x = randomized_model(name), images(2, 3, size, size)
    expected = model(x)
    assert_near(model.to(device)(x.to(device)).cpu(), expected, 1e-4)


@models
def test_gradients_equal_those_of_the_cpu(name, size, device, assert_near):
    model, x = randomized_model(name).double(), images(2, 3, size, size).double()
    expected = gradients(model, x)
    actual = to_cpu(gradients(model.to(device), x.to(device)))
    for parameter, gradient in expected.items():
        assert_near(actual[parameter], gradient, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@models
def test_mixed_precision_training_reduces_the_loss(name, size, dtype, device):
    model = randomized_model(name).to(device).train()
    x, target = images(8, 3, size, size).to(device), torch.arange(8, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    losses = []
    for _ in range(15):
        with torch.autocast(device, dtype):
            loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_compiled_model_equals_the_eager_one(device, assert_near):
    model = randomized_model("flash_internimage_nano").to(device, torch.float64)
    x = images(2, 3, 64, 64).to(device, torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    with torch.no_grad():
        assert_near(compiled(x), model(x), 1e-9)
    actual, expected = gradients(compiled.train(), x), gradients(model.train(), x)
    for name, gradient in expected.items():
        assert_near(actual[f"_orig_mod.{name}"], gradient, 1e-8)
