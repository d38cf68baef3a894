"""Test torchvision's operators in place of mmcv's, against those of a compiled mmcv.

The recorded results hold in every environment. After `make openmmlab-compiled`, the operators of
mmcv itself are compared with them as well.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import mmcv
import pytest
import torch
from mmcv.ops import (
    CARAFE,
    DeformConv2d,
    RoIAlign,
    SigmoidFocalLoss,
    batched_nms,
    nms,
    nms_match,
    roi_align,
    soft_nms,
)
from mmdet.models.losses import focal_loss
from torch.nn.functional import one_hot
from torchvision.ops import box_iou, sigmoid_focal_loss

from flash_internimage import mmcv_ops
from flash_internimage.openmmlab import errors
from tests import processes
from tests.flash_internimage.openmmlab import mmcv_cases as cases

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def torchvision_operators(monkeypatch):
    """Run a test with the operators of torchvision, also if mmcv is compiled."""
    substitute = mmcv_ops.Operators()
    for module in "nms", "roi_align", "focal_loss", "deform_conv", "carafe":
        module = importlib.import_module(f"mmcv.ops.{module}")
        monkeypatch.setattr(module, "ext_module", substitute)


@pytest.fixture(params=["torchvision", *(["compiled"] if cases.mmcv_is_compiled() else [])])
def operators(request):
    """Run a test with the operators of torchvision and, if there are any, with mmcv's own."""
    if request.param == "torchvision":
        request.getfixturevalue("torchvision_operators")


@pytest.mark.parametrize("name", cases.nms_calls())
def test_nms_keeps_the_boxes_that_mmcv_keeps(name, operators):
    boxes, scores, *settings = cases.nms_calls()[name]
    kept, indices = nms(boxes, scores, *settings)
    assert indices.tolist() == cases.recorded()[f"nms, {name}"].tolist()
    assert torch.equal(kept, torch.cat([boxes, scores[:, None]], 1)[indices])


@pytest.mark.parametrize("threshold", [0.1, 0.5])
@pytest.mark.parametrize("values", [1, 2, 5])
def test_equal_scores_are_in_the_order_of_sort(values, threshold, operators):
    boxes, _ = cases.boxes_and_scores(150)
    scores = torch.randint(values, (150,)) / values
    overlaps = box_iou(boxes, boxes) > threshold
    expected: list[int] = []
    for index in scores.sort(descending=True).indices.tolist():
        if not overlaps[index, expected].any():
            expected.append(index)
    assert nms(boxes, scores, threshold)[1].tolist() == expected


@pytest.mark.parametrize("name", cases.batched_nms_calls())
def test_batched_nms_keeps_the_boxes_that_mmcv_keeps(name, operators):
    call = cases.batched_nms_calls()[name]
    assert batched_nms(*call)[1].tolist() == cases.recorded()[f"batched_nms, {name}"].tolist()


@pytest.mark.parametrize("dtype", FLOATS)
def test_nms_of_another_type_keeps_what_it_keeps_of_the_same_values(dtype, torchvision_operators):
    boxes, scores = (tensor.to(dtype) for tensor in cases.boxes_and_scores(100))
    kept, indices = nms(boxes, scores, 0.5)
    assert kept.dtype == dtype
    assert torch.equal(indices, nms(boxes.float(), scores.float(), 0.5)[1])
    assert 0 < len(indices) < 100


@pytest.mark.parametrize("name", cases.roi_align_calls())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_roi_align_is_that_of_mmcv(name, dtype, operators):
    recorded = cases.recorded()
    results = cases.pooled_and_gradient(*cases.in_dtype(cases.roi_align_calls()[name], dtype))
    tolerance = 1e-12 if dtype == torch.float64 else 3e-5
    for result, suffix in zip(results, ("", ", gradient"), strict=True):
        expected = recorded[f"roi_align, {name}, torch.float64{suffix}"].to(dtype)
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", cases.roi_align_calls())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_roi_align_is_more_accurate_than_that_of_mmcv(name, dtype, torchvision_operators):
    call = cases.in_dtype(cases.roi_align_calls()[name], dtype)
    results = cases.pooled_and_gradient(*call)
    maps = call[0].double().requires_grad_()
    exact = cases.pooled_and_gradient(maps, call[1].double(), *call[2:])
    for result, expected, suffix in zip(results, exact, ("", ", gradient"), strict=True):
        assert result.dtype == dtype
        # Upstream gradients are rounded as well, and each pixel sums many of them.
        tolerance = torch.finfo(dtype).eps * (40 if suffix else 1)
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
        if dtype == torch.float16:
            recorded = cases.recorded()[f"roi_align, {name}, {dtype}{suffix}"].double()
            errors_of = [(r.double() - expected).abs().max() for r in (result, recorded) if len(r)]
            assert not errors_of or errors_of[0] <= errors_of[1]


def test_roi_align_reads_other_memory_layouts(torchvision_operators):
    name, (maps, rois, *settings) = next(iter(cases.roi_align_calls().items()))
    strided = maps.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    reversed_rois = rois.flip(1).contiguous().flip(1)
    assert not strided.is_contiguous()
    pooled, gradient = cases.pooled_and_gradient(strided, reversed_rois, *settings)
    expected = cases.recorded()[f"roi_align, {name}, torch.float64"]
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)
    expected = cases.recorded()[f"roi_align, {name}, torch.float64, gradient"]
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_roi_align_under_autocast(torchvision_operators):
    maps, rois, *settings = next(iter(cases.roi_align_calls().values()))
    maps, rois = maps.half(), rois.half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = roi_align(maps, rois, *settings)
    assert torch.equal(pooled, roi_align(maps, rois, *settings))


def exact_focal_loss(logits, target, gamma, alpha):
    """Return the loss by its definition, for logits at which float64 is precise."""
    p = logits.double().sigmoid()
    positive = one_hot(target, logits.shape[1] + 1)[:, :-1].bool()
    return torch.where(
        positive,
        -alpha * (1 - p) ** gamma * p.log(),
        -(1 - alpha) * p**gamma * (1 - p).log(),
    )


def logits_and_target(dtype=torch.float64):
    logits = 3 * torch.randn(12, 4, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.arange(12) % 5  # 4 is the background


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.5, 0.6), (0.0, 0.5), (0.5, 0.1)])
def test_focal_loss_and_its_gradient_follow_the_definition(
    gamma, alpha, dtype, torchvision_operators
):
    logits, target = logits_and_target(dtype)
    loss = mmcv.ops.sigmoid_focal_loss(logits, target, gamma, alpha, None, "none")
    expected = exact_focal_loss(logits, target, gamma, alpha)
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-7)  # alpha and gamma arrive as float32
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(loss)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    (exact,) = torch.autograd.grad(expected, logits, upstream.double())
    torch.testing.assert_close(gradient, exact, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_focal_loss_of_extreme_logits_is_finite_and_that_of_torchvision(
    dtype, torchvision_operators
):
    logits = torch.tensor([[-1000.0, -90, -20, 0, 20, 90, 1000]], dtype=dtype).requires_grad_()
    for target in range(logits.shape[1] + 1):
        target = torch.tensor([target])
        loss = mmcv.ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        wide = logits.detach().double().requires_grad_()
        truth = one_hot(target, logits.shape[1] + 1)[:, :-1].double()
        expected = sigmoid_focal_loss(wide, truth)
        torch.testing.assert_close(loss, expected.to(dtype))
        (exact,) = torch.autograd.grad(expected.sum(), wide)
        torch.testing.assert_close(gradient, exact.to(dtype))


def test_focal_loss_that_mmdet_computes_on_gpus_is_that_on_the_cpu(torchvision_operators):
    logits, target = logits_and_target()
    weight = torch.rand(len(target), dtype=torch.float64)
    on_gpu = focal_loss.sigmoid_focal_loss(logits, target, weight, avg_factor=7)
    on_cpu = focal_loss.FocalLoss()(logits, target, weight, avg_factor=7)
    torch.testing.assert_close(on_gpu, on_cpu)
    for gradients in zip(
        *(torch.autograd.grad(loss, logits) for loss in (on_gpu, on_cpu)), strict=True
    ):
        torch.testing.assert_close(*gradients)


def test_focal_loss_weights_the_class_of_the_target(torchvision_operators):
    logits, target = logits_and_target()
    target = target % 4
    weight = torch.rand(4, dtype=torch.float64)
    loss = SigmoidFocalLoss(2.0, 0.25, weight, "sum")(logits, target)
    expected = (exact_focal_loss(logits, target, 2.0, 0.25) * weight[target, None]).sum()
    torch.testing.assert_close(loss, expected)
    (gradient,), (exact,) = (torch.autograd.grad(value, logits) for value in (loss, expected))
    torch.testing.assert_close(gradient, exact)
    with pytest.raises(ValueError, match="target must be from 0 to 3 if weight is given"):
        SigmoidFocalLoss(2.0, 0.25, weight)(logits, target + 1)


def test_focal_loss_without_rows(torchvision_operators):
    logits = torch.empty(0, 4, requires_grad=True)
    loss = mmcv.ops.sigmoid_focal_loss(logits, torch.empty(0).long(), 2.0, 0.25, None, "none")
    assert loss.shape == (0, 4)
    loss.sum().backward()


BOXES, SCORES = torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1)
MAPS, REGION = torch.ones(1, 2, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]])


@pytest.mark.parametrize(
    ("operator", "call"),
    [
        ("softnms", lambda: soft_nms(BOXES, SCORES)),
        ("nms with offset=1", lambda: nms(BOXES, SCORES, 0.5, 1)),
        ("nms_match", lambda: nms_match(torch.ones(1, 5), 0.5)),
        ("RoIAlign with pool_mode='max'", lambda: RoIAlign(2, pool_mode="max")(MAPS, REGION)),
        ("deform_conv_forward", lambda: DeformConv2d(2, 2, 1)(MAPS, torch.zeros(1, 2, 4, 4))),
        ("carafe_forward", lambda: CARAFE(3, 1, 2)(MAPS, torch.ones(1, 9, 8, 8))),
    ],
)
def test_other_operators_say_how_to_install_them(operator, call, torchvision_operators):
    with pytest.raises(mmcv_ops.MissingOperatorError) as caught:
        call()
    message = f"{operator} requires mmcv's compiled operators, which are not installed; install"
    assert str(caught.value).startswith(message)
    assert "`make openmmlab-compiled`" in str(caught.value)
    assert errors.is_users(caught.value)


def test_special_attributes_are_those_of_a_module():
    operators = mmcv_ops.Operators()
    assert not hasattr(operators, "__path__")
    assert not hasattr(operators, "__file__")
    assert operators.__name__ == "mmcv._ext"


@pytest.fixture
def run(tmp_path):
    """Run programs in which mmcv has no operators, or those of a file."""
    (tmp_path / "mmcv").mkdir()
    for path in Path(mmcv.__file__).parent.iterdir():
        if not path.name.startswith("_ext"):
            (tmp_path / "mmcv" / path.name).symlink_to(path)

    def run(program: str, extension: str | None = None) -> str:
        if extension is not None:
            (tmp_path / "mmcv" / "_ext.py").write_text(extension)
        return processes.run("-c", WITHOUT_THE_HOOK + program, tmp_path).checked().stderr

    return run


WITHOUT_THE_HOOK = """
import sys
sys.meta_path = [f for f in sys.meta_path if type(f).__module__ != "flash_internimage_startup"]
sys.path.insert(0, sys.argv[1])
"""

OPERATORS_ARE_FOUND = """
import logging
FIRST
logging.basicConfig(level=logging.INFO)
import flash_internimage.openmmlab
from mmcv import ops
from mmcv.utils.ext_loader import check_ops_exist
from mmdet.models.dense_heads import rpn_head

assert check_ops_exist()
assert rpn_head.batched_nms is ops.batched_nms
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "warnings"), [("", 0), ("import mmdet.structures.mask.structures", 1)]
)
def test_importing_the_package_provides_the_operators(first, warnings, run):
    messages = run(OPERATORS_ARE_FOUND.replace("FIRST", first))
    assert messages.count("INFO:flash_internimage.mmcv_ops:mmcv has no compiled operators;") == 1
    assert messages.count("import flash_internimage.openmmlab first") == warnings


@pytest.mark.slow
def test_compiled_operators_are_not_replaced(run):
    program = """
import flash_internimage.openmmlab, mmcv, mmcv.ops
assert sys.modules["mmcv._ext"].mine
assert mmcv.ops.get_compiler_version() == "mine"
"""
    run(program, "mine = True\ndef __getattr__(name):\n    return lambda: 'mine'")


@pytest.mark.parametrize("substituted", [True, False])
def test_the_log_of_a_run_says_once_that_operators_are_substituted(
    substituted, runner, monkeypatch, tmp_path
):
    extension = mmcv_ops.Operators() if substituted else ModuleType("mmcv._ext")
    extension.__spec__ = ModuleSpec("mmcv._ext", None)
    monkeypatch.setitem(sys.modules, "mmcv._ext", extension)
    runner(log_level="INFO")
    [log] = (tmp_path / "run").rglob("*.log")
    assert log.read_text().count(mmcv_ops.SUMMARY) == substituted
