"""Calls of mmcv's operators, and the results of a compiled mmcv 2.3.6 for them.

After `make openmmlab-compiled`, this records them again::

    .venv/bin/python -m tests.flash_internimage.openmmlab.mmcv_cases
"""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from mmcv.ops import batched_nms, nms, roi_align
from torch import Tensor

RESULTS = Path(__file__).parents[2] / "data" / "openmmlab" / "mmcv_ops.npz"


def boxes_and_scores(count: int, *, clusters: int = 12) -> tuple[Tensor, Tensor]:
    """Return boxes around a few centers."""
    rng = np.random.default_rng(count)
    centers = rng.uniform(0, 300, (clusters, 2))[rng.integers(0, clusters, count)]
    corners = centers + rng.normal(0, 4, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(10, 60, (count, 2))], 1)
    return torch.from_numpy(boxes).float(), torch.from_numpy(rng.uniform(0, 1, count)).float()


def overlapping(*shares: float) -> tuple[Tensor, Tensor]:
    """Return a box of size 100, and boxes within it that cover these shares of it."""
    boxes = torch.tensor([[0.0, 0, 10, 10], *([0, 0, 10, 10 * share] for share in shares)])
    return boxes, torch.linspace(1, 0.5, len(boxes))


def nms_calls() -> dict[str, tuple]:
    """Return the arguments of :func:`mmcv.ops.nms` by name."""
    point = torch.tensor([[3.0, 4, 3, 4]])
    square = torch.tensor([[0.0, 0, 10, 10]])
    return {
        "random": (*boxes_and_scores(200), 0.5),
        "random, low threshold": (*boxes_and_scores(150), 0.05),
        "score threshold": (*boxes_and_scores(90), 0.6, 0, 0.4),
        "at most ten": (*boxes_and_scores(91), 0.7, 0, 0, 10),
        "no box": (torch.empty(0, 4), torch.empty(0), 0.5),
        "no box above the score threshold": (square, torch.tensor([0.1]), 0.5, 0, 0.2),
        "one box": (square, torch.tensor([0.3]), 0.5),
        "identical boxes": (square.repeat(5, 1), torch.arange(5) / 10, 0.5),
        "boxes without area": (torch.cat([point, square, point, point]), torch.arange(4.0), 0.3),
        "inverted box": (square[:, [2, 3, 0, 1]].repeat(2, 1), torch.tensor([0.2, 0.9]), 0.3),
        **{
            f"IoU of {share}": (*overlapping(share), share)
            for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9)
        },
    }


def batched_nms_calls() -> dict[str, tuple]:
    """Return the arguments of :func:`mmcv.ops.batched_nms` by name."""
    boxes, scores = boxes_and_scores(240)
    many, many_scores = boxes_and_scores(12_000, clusters=30)
    classes = torch.arange(len(boxes)) % 5
    cfg = {"type": "nms", "iou_threshold": 0.5}
    return {
        "five classes": (boxes, scores, classes, cfg),
        "class agnostic": (boxes, scores, classes, cfg, True),
        "class agnostic by config": (boxes, scores, classes, cfg | {"class_agnostic": True}),
        "score threshold": (boxes, scores, classes, cfg | {"score_threshold": 0.5}),
        "at most seven": (boxes, scores, classes, cfg | {"max_num": 7}),
        "no nms": (boxes, scores, classes, None),
        "no box": (boxes[:0], scores[:0], classes[:0], cfg | {"class_agnostic": True}),
        "split by class": (boxes, scores, classes, cfg | {"split_thr": 100}),
        "more than 10000 boxes": (many, many_scores, torch.arange(12_000) % 3, cfg),
    }


ROIS = [
    [0, 4, 6, 30, 25],
    [1, -9, -7, 20, 13],  # beyond the upper left corner
    [0, 25, 20, 70, 60],  # beyond the lower right corner
    [1, 100, 100, 120, 130],  # outside
    [1, 0, 0, 44, 36],  # the whole image
    [0, 10, 10, 10, 10],  # a point
    [1, 8.3, 9.1, 9.2, 9.4],  # smaller than a pixel of the feature map
]


def roi_align_calls() -> dict[str, tuple]:
    """Return the arguments of :func:`mmcv.ops.roi_align` by name, in float64."""
    maps = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (2, 3, 9, 11)))
    rois = torch.tensor(ROIS, dtype=torch.float64)
    return {
        f"{size} {scale} {ratio} {aligned}": (maps, rois, size, scale, ratio, "avg", aligned)
        for size, scale, ratio, aligned in [
            (7, 0.25, 0, True),
            (7, 0.25, 0, False),
            ((2, 3), 0.25, 2, True),
            ((2, 3), 0.25, 2, False),
            (3, 1.0, 1, True),
            (1, 0.125, 0, False),
        ]
    } | {"no region": (maps, rois[:0], 7, 0.25, 0, "avg", True)}


def pooled_and_gradient(maps: Tensor, rois: Tensor, *settings: object) -> tuple[Tensor, Tensor]:
    """Return the output of RoIAlign, and the gradient of the feature maps."""
    maps = maps.detach().requires_grad_()
    pooled = roi_align(maps, rois, *settings)
    upstream = np.random.default_rng(1).normal(0, 1, pooled.shape)
    (gradient,) = torch.autograd.grad(pooled, maps, torch.from_numpy(upstream).to(pooled))
    return pooled.detach(), gradient


def in_dtype(call: tuple, dtype: torch.dtype) -> tuple:
    return call[0].to(dtype), call[1].to(dtype), *call[2:]


def mmcv_is_compiled() -> bool:
    return hasattr(sys.modules["mmcv._ext"], "__file__")


@cache
def recorded() -> dict[str, Tensor]:
    with np.load(RESULTS) as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def main() -> None:
    if not mmcv_is_compiled():
        sys.exit("mmcv has no compiled operators: make openmmlab-compiled")
    results = {f"nms, {name}": nms(*call)[1] for name, call in nms_calls().items()}
    for name, call in batched_nms_calls().items():
        results[f"batched_nms, {name}"] = batched_nms(*call)[1]
    results = {name: indices.to(torch.int16) for name, indices in results.items()}
    for name, call in roi_align_calls().items():
        for dtype in torch.float64, torch.float16:
            pooled, gradient = pooled_and_gradient(*in_dtype(call, dtype))
            results[f"roi_align, {name}, {dtype}"] = pooled
            results[f"roi_align, {name}, {dtype}, gradient"] = gradient
    np.savez_compressed(RESULTS, **{name: value.numpy() for name, value in results.items()})


if __name__ == "__main__":
    main()
