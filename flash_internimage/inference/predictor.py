"""Load a model of any task for prediction."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import nn

from ..checkpoints.zoo import Task
from .results import Result


class Predictor(ABC):
    """A model with its preprocessing and class names; there is one subclass per task.

    Attributes:
        task: 'classification', 'detection' or 'segmentation'.
        classes: Names of the classes, in the order of the labels.
        model: The model, in evaluation mode and on its device.
    """

    task: ClassVar[Task]
    classes: tuple[str, ...]
    model: nn.Module

    @abstractmethod
    def __call__(self, images: Sequence[np.ndarray]) -> list[Result]:
        """Predict the images in one batch.

        Args:
            images: Arrays (H, W, 3) of dtype uint8 in RGB, of any sizes.

        Returns:
            For each image a :class:`Classification`, :class:`Detections` or :class:`LabelMap`.

        Raises:
            ValueError: If an image is anything else, or the outputs of the model are not finite.
        """


def load_predictor(
    model: str | Path,
    checkpoint: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    top_k: int = 5,
    score_threshold: float = 0.3,
    tta: bool = False,
) -> Predictor:
    """Load a model of any task for prediction.

    Args:
        model: Name of a model of the zoo or of timm, path or name of a config: `*.py` of mmdet or
            mmseg, `*.yaml` of `classification.train`.
        checkpoint: Path or URL; None for the released weights.
        device: 'auto', which selects the accelerator if there is one, 'cpu', 'cuda', 'cuda:1', ...
        dtype: 'float32', or 'float16' or 'bfloat16' for mixed precision.
        top_k: Number of classes that a classifier returns.
        score_threshold: Minimum score of the objects that a detector returns.
        tta: Average the predictions of a segmentor over scales and flips, as its config defines.

    Raises:
        FileNotFoundError: If the config or checkpoint does not exist.
        ValueError: If an argument cannot be used, or the checkpoint does not match the model.
        OSError: If a download fails.
    """
    raise ValueError("model must be a classifier, detector or segmentor")
