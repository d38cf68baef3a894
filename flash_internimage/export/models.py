"""Models in the form that is exported: one tensor of images in, named tensors out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..inference import Predictor
from ..sampling.preprocessing import Preprocessing, preprocessing_of


@dataclass(frozen=True)
class Metadata:
    """What a user of an exported file needs to know; it is stored in the file.

    Attributes:
        model: Name of the model.
        task: 'classification', 'detection', 'segmentation' or 'features'.
        classes: Names of the classes, in the order of the labels.
        images: Layout of the input `images`.
        outputs: Names of the outputs.
        input_size: Size to which the shorter side of images is resized in a test.
        mean: Mean of red, green and blue, from 0 to 255.
        std: Standard deviation of red, green and blue.
    """

    model: str
    task: str
    classes: tuple[str, ...]
    images: str
    outputs: tuple[str, ...]
    input_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ExportableModel(nn.Module):
    """A model that computes named outputs from one tensor of images.

    Args:
        model: Model in evaluation mode.

    Attributes:
        outputs: Names of the outputs.
        dynamic_batch: Whether the number of images may vary; otherwise it is 1.
        metadata: What is stored in the file.
        preprocessing: Preprocessing of the images for `forward`.
    """

    outputs: tuple[str, ...]
    dynamic_batch = True
    metadata: Metadata
    preprocessing: Preprocessing

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs.

        Args:
            images: (N, 3, H, W) float32, RGB, normalized.
        """
        raise NotImplementedError

    def eager(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the same outputs by the model's own library, for the comparison."""
        return self(images)

    @torch.inference_mode()
    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of :meth:`eager` by name."""
        return dict(zip(self.outputs, self.eager(images), strict=True))


class ExportableClassifier(ExportableModel):
    """A classifier: `logits`, (N, classes)."""

    outputs = ("logits",)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the logits; see :class:`ExportableModel`."""
        return (self.model(images),)


class ExportableFeatures(ExportableModel):
    """The backbone of a classifier: `stage1`, ... (N, C, H, W), one feature map per stage."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        stages: Any = model.feature_info
        self.outputs = tuple(f"stage{i + 1}" for i in range(len(stages)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps; see :class:`ExportableModel`."""
        maps: Any = self.model.forward_intermediates(images, intermediates_only=True)  # type: ignore[operator]
        return tuple(maps)


def exportable(predictor: Predictor, name: str, *, features: bool = False) -> ExportableModel:
    """Return the model of a predictor in the form that is exported.

    Args:
        predictor: Predictor in float32 on the CPU.
        name: Name of the model, for the metadata.
        features: Whether to export the feature maps of a classifier instead of its logits.

    Raises:
        ValueError: If the model cannot be exported.
    """
    model = _wrap(predictor, features)
    model.preprocessing = preprocessing_of(predictor)
    model.metadata = Metadata(
        model=name,
        task="features" if features else predictor.task,
        classes=() if features else predictor.classes,
        images="(N, 3, H, W) float32, RGB, (pixels - mean) / std with pixels from 0 to 255",
        outputs=model.outputs,
        input_size=model.preprocessing.size,
        mean=model.preprocessing.mean,
        std=model.preprocessing.std,
    )
    return model.requires_grad_(False).eval()


def _wrap(predictor: Predictor, features: bool) -> ExportableModel:
    model = predictor.model
    if predictor.task == "classification":
        return ExportableFeatures(model) if features else ExportableClassifier(model)
    raise ValueError(f"model must be a classifier, got one for {predictor.task}")
