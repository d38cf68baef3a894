"""Segmentors of mmseg."""

import os
from collections.abc import Sequence

import cv2
import numpy as np

from ..predictions import LabelMap
from .openmmlab import LoadedModel, OpenMMLabPredictor, load_model
from .predictor import ModelSource

# A segmentor computes a logit per class and pixel of the image, and copies of them. This many take
# 2 GiB.
MAX_LOGITS = 2**29


class Segmentor(OpenMMLabPredictor):
    """A segmentor, with or without test-time augmentation.

    Large images are reduced before the prediction so that their logits take at most 2 GiB: those of
    more than 3.5 megapixels for the 150 classes of ADE20K.

    Args:
        loaded: The model.
    """

    task = "segmentation"

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded, MAX_LOGITS / (len(loaded.classes) * loaded.views))

    def __call__(self, images: Sequence[np.ndarray]) -> list[LabelMap]:
        """Predict label maps; see :meth:`Predictor.__call__`."""
        dtype = np.uint8 if len(self.classes) <= 256 else np.int64
        maps = []
        for image, sample in zip(images, self._predict(images), strict=True):
            if "seg_logits" in sample and not sample.seg_logits.data.isfinite().all():
                raise ValueError("the logits must be finite, got NaN or infinity")
            labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
            if labels.shape != image.shape[:2]:
                # OpenCV does not resize int64.
                labels = labels.astype(np.float32 if len(self.classes) > 256 else np.uint8)
                size = image.shape[1::-1]
                labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT)
            maps.append(LabelMap(labels.astype(dtype), self.classes))
        return maps


def load_segmentor(
    source: ModelSource,
    checkpoint: str | os.PathLike | None = None,
    device: str = "auto",
    amp: str = "off",
    tta: bool = False,
) -> Segmentor:
    """Load a segmentor; see :func:`~flash_internimage.inference.load_predictor`."""
    return Segmentor(load_model(source, checkpoint, device, amp, tta))
