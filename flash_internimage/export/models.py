"""Models in the form that is exported: one tensor of images in, named tensors out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose

from ..inference import Predictor
from ..sampling.preprocessing import Preprocessing, preprocessing_of
from .preprocessing import ImagePreprocessing


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
        layout: Description of the images.
        dynamic_batch: Whether the number of images may vary; otherwise it is 1.
        metadata: What is stored in the file.
        size_dims: Dimensions of the images that are their height and width.
        preprocessing: Preprocessing of the images for `forward`.
    """

    size_dims = (2, 3)
    layout = "(N, 3, H, W) float32, RGB, (pixels - mean) / std with pixels from 0 to 255"

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

    def example(self, height: int, width: int) -> Tensor:
        """Return images to trace the model with."""
        # A batch of one would be taken for a constant.
        return torch.randn(2 if self.dynamic_batch else 1, 3, height, width)

    def make_batch(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return images (H, W, 3) uint8 RGB, all of one size, as the input of `forward`."""
        normalize = replace(self.preprocessing, size=None, max_size=None)
        return torch.cat([normalize(image) for image in images])

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


class ClassifierOfImages(ExportableClassifier):
    """A classifier with its preprocessing, for images of any size.

    Args:
        model: Model in evaluation mode.
        steps: The transforms of its preprocessing.
    """

    size_dims = (1, 2)
    layout = "(N, H, W, 3) uint8, RGB"

    def __init__(self, model: nn.Module, steps: Sequence[Any]) -> None:
        super().__init__(model)
        self.preprocess = ImagePreprocessing(steps)
        self._transform = Compose(steps)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the logits.

        Args:
            images: (N, H, W, 3) uint8, RGB.
        """
        return (self.model(self.preprocess(images)),)

    def eager(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the logits with the preprocessing by Pillow."""
        inputs = [self._transform(Image.fromarray(image)) for image in images.numpy()]
        return (self.model(torch.stack(inputs)),)

    def example(self, height: int, width: int) -> Tensor:
        """Return images to trace the model with."""
        return torch.zeros((2, height, width, 3), dtype=torch.uint8)

    def make_batch(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return images as one tensor."""
        return torch.from_numpy(np.stack(images))


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


def exportable(
    predictor: Predictor, name: str, *, features: bool = False, with_preprocessing: bool = False
) -> ExportableModel:
    """Return the model of a predictor in the form that is exported.

    Args:
        predictor: Predictor in float32 on the CPU.
        name: Name of the model, for the metadata.
        features: Whether to export the feature maps of a classifier instead of its logits.
        with_preprocessing: Whether the model takes images of uint8 and preprocesses them.

    Raises:
        ValueError: If the model cannot be exported.
    """
    for parameter in predictor.model.parameters():
        if parameter.device.type != "cpu":
            raise ValueError(f"predictor must be on the CPU, got one on {parameter.device}")
    model = _wrap(predictor, features, with_preprocessing)
    model.preprocessing = preprocessing_of(predictor)
    model.metadata = Metadata(
        model=name,
        task="features" if features else predictor.task,
        classes=() if features else predictor.classes,
        images=model.layout,
        outputs=model.outputs,
        input_size=model.preprocessing.size,
        mean=model.preprocessing.mean,
        std=model.preprocessing.std,
    )
    return model.requires_grad_(False).eval()


def check_options(task: str, features: bool, with_preprocessing: bool) -> None:
    """Check that the options fit the task.

    Raises:
        ValueError: If one of them is for classifiers only, or both are given.
    """
    for option, given in (("features", features), ("with_preprocessing", with_preprocessing)):
        if given and task != "classification":
            raise ValueError(f"the task must be classification for {option}, got {task}")
    if features and with_preprocessing:
        raise ValueError("features and with_preprocessing must not be given together, got both")


def _wrap(predictor: Predictor, features: bool, with_preprocessing: bool) -> ExportableModel:
    model = predictor.model
    check_options(predictor.task, features, with_preprocessing)
    if with_preprocessing:
        return ClassifierOfImages(model, predictor.steps)
    if predictor.task == "classification":
        return ExportableFeatures(model) if features else ExportableClassifier(model)
    if predictor.task == "segmentation":
        from .segmentors import ExportableSegmentor

        return ExportableSegmentor(model)
    from mmdet.models.detectors import DINO, TwoStageDetector

    from .dino import ExportableDINO
    from .two_stage import ExportableTwoStage

    if isinstance(model, DINO):
        return ExportableDINO(model)
    if isinstance(model, TwoStageDetector):
        return ExportableTwoStage(model)
    raise ValueError(f"detector must be DINO or two-stage, got a {type(model).__name__}")
