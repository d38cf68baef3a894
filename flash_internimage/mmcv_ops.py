"""mmcv's operators from torchvision, for an mmcv that was installed without compiled operators.

mmcv's operators are Python functions on top of an extension module, `mmcv._ext`, which takes a
quarter of an hour to compile. If it is missing, `flash_internimage_startup` imports the substitute
of this module in its place, so that `mmcv.ops` can be imported: NMS and RoIAlign are computed by
torchvision, the sigmoid focal loss by PyTorch, and all other operators raise
:class:`MissingOperatorError` when called. A compiled mmcv is never touched.
"""

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
import torchvision  # noqa: F401  registers its operators
from torch import Tensor
from torch.nn import functional

_EXTENSION = "mmcv._ext"
SUMMARY = (
    "mmcv has no compiled operators; using torchvision for NMS and RoIAlign, and PyTorch for the "
    "sigmoid focal loss"
)
_AVERAGE = 1  # pool_mode of RoIAlign; 0 is the maximum
_COMPILE = (
    "install mmcv with its operators: `make openmmlab-compiled` in a clone of FlashInternImage, or "
    "`pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall onedl-mmcv`"
)


class MissingOperatorError(NotImplementedError):
    """An operator of mmcv was called that requires mmcv's compiled operators."""

    def __init__(self, operator: str) -> None:
        super().__init__(
            f"{operator} requires mmcv's compiled operators, which are not installed; {_COMPILE}"
        )


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices of the boxes that non-maximum suppression keeps.

    Equal scores are in the order of :func:`torch.sort`, as in mmcv; torchvision sorts stably.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2, of any floating-point type.
        scores: (N,).
        iou_threshold: Boxes that overlap a better one by more are suppressed. As in mmcv, it is
            rounded to float32, which decides at an IoU of exactly the threshold.
        offset: Only 0 is supported.

    Returns:
        Indices in descending order of their scores, (K,).

    Raises:
        MissingOperatorError: If `offset` is not 0.
    """
    if offset:
        raise MissingOperatorError(f"nms with offset={offset}")
    threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()
    order = scores.sort(0, descending=True).indices
    ranks = torch.arange(len(order), 0, -1, device=order.device)
    boxes = _wide(boxes[order])
    return order[torch.ops.torchvision.nms(boxes, ranks.to(boxes), threshold)]


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the average-pooled regions of the feature maps to `output`.

    16-bit tensors are computed in float32.

    Args:
        input: Feature maps, (N, C, H, W).
        rois: Index of the image and x1, y1, x2, y2 of each region, (K, 5).
        output: (K, C, aligned_height, aligned_width).
        argmax_y: Unused, as is `argmax_x`.
        argmax_x: Used by max pooling only.
        aligned_height: Height of the output.
        aligned_width: Width of the output.
        spatial_scale: Size of the feature maps relative to the coordinates.
        sampling_ratio: Points per bin and axis; 0 depends on the size of the region.
        pool_mode: Only 1, the average, is supported.
        aligned: Whether to shift the coordinates by half a pixel.

    Raises:
        MissingOperatorError: If `pool_mode` is 0, the maximum.
    """
    if pool_mode != _AVERAGE:
        raise MissingOperatorError("RoIAlign with pool_mode='max'")
    pooled = torch.ops.torchvision.roi_align(
        _wide(input),
        rois.to(_wide_dtype(input)),
        spatial_scale,
        aligned_height,
        aligned_width,
        sampling_ratio,
        aligned,
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of the feature maps to `grad_input`.

    Args:
        grad_output: (K, C, aligned_height, aligned_width).
        rois: As in :func:`roi_align_forward`, as are the other arguments.
        argmax_y: Unused.
        argmax_x: Unused.
        grad_input: (N, C, H, W).
        aligned_height: Height of the output.
        aligned_width: Width of the output.
        spatial_scale: Size of the feature maps relative to the coordinates.
        sampling_ratio: Points per bin and axis.
        pool_mode: The forward pass supports only the average.
        aligned: Whether the coordinates were shifted by half a pixel.
    """
    gradient = torch.ops.torchvision._roi_align_backward(
        _wide(grad_output),
        rois.to(_wide_dtype(grad_output)),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input.copy_(gradient)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Write the focal loss of each prediction to `output`.

    Computed from log-sigmoids. mmcv's CUDA operator, which takes logarithms of rounded
    probabilities, differs for wrong logits beyond 16.

    Args:
        input: Logits, (N, C).
        target: Indices of the classes, (N,); C is the background.
        weight: A weight for each class, (C,), or empty.
        output: (N, C).
        gamma: Exponent of the modulating factor.
        alpha: Weight of the positive class; the negative one has 1 - alpha.

    Raises:
        ValueError: If there are weights and a target is not one of the C classes.
    """
    _, confidence, log_confidence, factor = _focal_terms(input, target, weight, alpha)
    output.copy_(-factor * (1 - confidence) ** gamma * log_confidence)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Write the gradient of each prediction's own loss to `grad_input`.

    Args:
        input: Logits, (N, C).
        target: As in :func:`sigmoid_focal_loss_forward`, as are the other arguments.
        weight: (C,), or empty.
        grad_input: (N, C).
        gamma: Exponent of the modulating factor.
        alpha: Weight of the positive class.
    """
    sign, confidence, log_confidence, factor = _focal_terms(input, target, weight, alpha)
    error = 1 - confidence
    slope = error**gamma * (gamma * confidence * log_confidence - error)
    grad_input.copy_(sign * factor * slope)


def _focal_terms(
    input: Tensor, target: Tensor, weight: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sign of the logit, the probability of the truth, its log, and the factor."""
    classes = input.size(1)
    if weight.numel() and len(target) and not 0 <= target.min() <= target.max() < classes:
        raise ValueError(
            f"target must be from 0 to {classes - 1} if weight is given, "
            f"got {target.min()} to {target.max()}"
        )
    positive = target[:, None] == torch.arange(classes, device=target.device)
    sign = torch.where(positive, 1.0, -1.0).to(_wide_dtype(input))
    log_confidence = functional.logsigmoid(sign * input)
    factor = torch.where(positive, alpha, 1 - alpha).to(sign.dtype)
    if weight.numel():
        factor = factor * weight[target, None]
    return sign, log_confidence.exp(), log_confidence, factor


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    """Return a 16-bit tensor as float32."""
    return tensor.to(_wide_dtype(tensor))


def _not_available() -> str:
    return "not available"  # as in an mmcv that was compiled without CUDA


_PROVIDED: dict[str, Callable] = {
    "nms": nms,
    "roi_align_forward": roi_align_forward,
    "roi_align_backward": roi_align_backward,
    "sigmoid_focal_loss_forward": sigmoid_focal_loss_forward,
    "sigmoid_focal_loss_backward": sigmoid_focal_loss_backward,
    "get_compiler_version": _not_available,
    "get_compiling_cuda_version": _not_available,
}


class Operators(ModuleType):
    """The substitute for `mmcv._ext`. It has every operator, since mmcv looks for their names."""

    def __init__(self) -> None:
        super().__init__(_EXTENSION, "Operators of torchvision in place of mmcv's own.")
        vars(self).update(_PROVIDED)
        logging.getLogger(__name__).info(SUMMARY)

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(f"module {_EXTENSION!r} has no attribute {name!r}")

        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise MissingOperatorError(name)

        return refuse
