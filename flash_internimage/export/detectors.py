"""Detectors of mmdet in the form that is exported."""

from typing import Any

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from .deformable_encoder import width_height
from .models import ExportableModel


class ExportableDetector(ExportableModel):
    """Common part of detectors."""

    outputs: tuple[str, ...] = ("boxes", "scores", "labels")

    def pad(self, images: Tensor) -> Tensor:
        """Pad images at the bottom and right, as the data preprocessor does in a test."""
        preprocessor: Any = self.model.data_preprocessor
        divisor = preprocessor.pad_size_divisor
        rows, columns = ((size + divisor - 1) // divisor * divisor for size in images.shape[2:])
        # Padding by a symbolic number of pixels would distinguish zero from others.
        return F.pad(images, (0, divisor, 0, divisor))[..., :rows, :columns]

    def predict_by_mmdet(self, images: Tensor) -> list[Any]:
        """Return mmdet's instances for each image."""
        padded, model = self.pad(images), self.model
        size, padded_size = tuple(images.shape[2:]), tuple(padded.shape[2:])
        metainfo = {
            "img_shape": size,
            "ori_shape": size,
            "scale_factor": (1.0, 1.0),
            "batch_input_shape": padded_size,
            "pad_shape": padded_size,
        }
        samples = [DetDataSample(metainfo=metainfo) for _ in images]
        predictions = model.predict(padded, samples, rescale=False)  # type: ignore[operator]
        return [sample.pred_instances for sample in predictions]


def scale_boxes(boxes: Tensor, size: torch.Size) -> Tensor:
    """Convert boxes (cx, cy, w, h) from 0 to 1 to corners in pixels, within the image.

    Args:
        boxes: (..., 4).
        size: Height and width of the image.
    """
    center, extent = boxes[..., :2], boxes[..., 2:]
    limits = width_height(size, boxes)
    corners = torch.stack([center - extent / 2, center + extent / 2], dim=-2) * limits
    return torch.minimum(corners.clamp(min=0), limits).flatten(-2)


def check_sigmoid(head: nn.Module) -> None:
    """Check that a head predicts a probability of each class."""
    loss: Any = head.loss_cls
    if not loss.use_sigmoid:
        raise ValueError("loss_cls.use_sigmoid must be True, got False")
