"""Compare an exported file with eager PyTorch on real images, and time both."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .formats import Runtime
from .models import ExportableModel
from .tensors import use_threads

_logger = logging.getLogger(__name__)

Outputs = Mapping[str, np.ndarray]  # by name

# Height and width of the batches, relative to the test size, and their number of images.
_CASES = ((1.0, 1.0, 1), (0.75, 1.25, 2), (1.0, 0.6, 3))
_DEFAULT_SIZE = 224
# Proportion of predictions that must agree: where two scores are equal, either may win.
MIN_AGREEMENT = 0.98
MIN_AGREEMENT_INT8 = 0.95
# Intersection over union of the masks of an object: single pixels are near the threshold.
MIN_MASK_IOU = 0.95
_SECONDS = 1.0  # of a measurement


class DifferenceError(ValueError):
    """An exported file does not compute what the model computes."""


@dataclass(frozen=True)
class Comparison:
    """Differences between an exported file and eager PyTorch for a batch of images.

    Attributes:
        shape: Shape of the batch.
        largest: Largest difference of each output, relative to the largest absolute value in it.
        mean: Mean difference of each output, likewise.
        agreement: Proportion of equal predictions: classes, classes of pixels or objects; None for
            feature maps.
        empty: Whether the model and the file found no object.
    """

    shape: tuple[int, ...]
    largest: Mapping[str, float]
    mean: Mapping[str, float]
    agreement: float | None
    empty: bool = False


@dataclass(frozen=True)
class Timing:
    """Shortest times of a batch of one image at the test size, in seconds.

    Attributes:
        threads: Number of threads.
        eager: Time of eager PyTorch.
        exported: Time of the exported file in its runtime.
    """

    threads: int
    eager: float
    exported: float


def sample_images() -> list[np.ndarray]:
    """Return scikit-learn's two photographs, (427, 640, 3) uint8 RGB."""
    from sklearn.datasets import load_sample_images

    return [np.asarray(image) for image in load_sample_images().images]


def batches(model: ExportableModel, images: Sequence[np.ndarray]) -> Iterator[Tensor]:
    """Yield batches of several sizes and numbers of images, preprocessed for the model.

    Args:
        model: Model, whose test size the sizes are relative to.
        images: Arrays (H, W, 3) uint8 RGB.
    """
    size = model.preprocessing.size or _DEFAULT_SIZE
    for height, width, count in _CASES:
        shape = round(height * size), round(width * size)
        yield make_batch(model, images, shape, count if model.dynamic_batch else 1)


def make_batch(
    model: ExportableModel, images: Sequence[np.ndarray], shape: tuple[int, int], count: int
) -> Tensor:
    """Return the first images, repeated if necessary and resized to (height, width)."""
    height, width = shape
    resized = [
        Image.fromarray(images[i % len(images)]).resize((width, height), Image.Resampling.BICUBIC)
        for i in range(count)
    ]
    return model.make_batch([np.array(image) for image in resized])


def run_eager(model: ExportableModel, images: Tensor) -> Outputs:
    """Return the outputs of eager PyTorch as arrays."""
    return {name: output.numpy() for name, output in model.run(images).items()}


def compare(expected: Outputs, actual: Outputs, shape: Sequence[int]) -> Comparison:
    """Compare the outputs for a batch of images.

    Args:
        expected: Outputs of eager PyTorch.
        actual: Outputs of the exported file.
        shape: Shape of the batch.

    Raises:
        DifferenceError: If an output has another shape.
    """
    empty = False
    agreement: float | None
    if "boxes" in expected:
        empty = expected["labels"].size == actual["labels"].size == 0
        expected, actual, agreement = match_objects(expected, actual)
    else:
        agreement = _same_classes(expected, actual)
    largest, mean = {}, {}
    for name, output in expected.items():
        if actual[name].shape != output.shape:
            raise DifferenceError(
                f"{name} must have the shape {output.shape}, got {actual[name].shape}"
            )
        scale = max(float(np.abs(output).max(initial=0)), np.finfo(np.float32).tiny)
        difference = np.abs(actual[name].astype(np.float64) - output) / scale
        # A NaN must not be taken for agreement.
        difference = np.nan_to_num(difference, nan=np.inf, posinf=np.inf)
        largest[name] = float(difference.max(initial=0))
        mean[name] = float(difference.mean()) if difference.size else 0.0
    return Comparison(tuple(shape), largest, mean, agreement, empty)


def _same_classes(expected: Outputs, actual: Outputs) -> float | None:
    scores = next((name for name in ("logits", "scores") if name in expected), None)
    if scores is None or expected[scores].shape != actual[scores].shape:
        return None
    return float((expected[scores].argmax(1) == actual[scores].argmax(1)).mean())


def match_objects(
    expected: Outputs, actual: Outputs
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
    """Match objects by their labels and boxes, as objects of equal scores may change places.

    Pairs have the same label, boxes whose sides are within a pixel and masks (if any) that overlap.
    The assignment minimizes the sum of the distances between boxes and scores.

    Args:
        expected: `boxes` (N, n, 4), `scores` and `labels` (N, n), perhaps `masks` (N, n, H, W); or
            without N for a single image.
        actual: The same of the exported file, with another n for all images at most.

    Returns:
        The boxes and scores of matched objects, expected and actual, and the proportion of objects
        on both sides that are matched.
    """
    wanted, found = (_with_batch(outputs) for outputs in (expected, actual))
    pairs = [
        (image, left, right)
        for image in range(len(wanted["labels"]))
        for left, right in _match(
            *({name: output[image] for name, output in side.items()} for side in (wanted, found))
        )
    ]
    images, left, right = np.array(pairs, int).reshape(-1, 3).T
    names = ("boxes", "scores")
    total = max(wanted["labels"].size, found["labels"].size)
    return (
        {name: wanted[name][images, left] for name in names},
        {name: found[name][images, right] for name in names},
        len(pairs) / total if total else 1.0,
    )


def _match(expected: Outputs, actual: Outputs) -> Iterator[tuple[int, int]]:
    """Yield the indices of the matched objects of one image."""
    from scipy.optimize import linear_sum_assignment

    distances = np.abs(expected["boxes"][:, None] - actual["boxes"]).max(2, initial=0)
    near = (distances <= 1) & (expected["labels"][:, None] == actual["labels"])
    # As many pairs as possible: one that is not near costs more than all that are.
    differences = np.abs(expected["scores"][:, None] - actual["scores"])
    cost = distances + np.nan_to_num(differences, nan=1.0)
    cost = np.where(near, cost, 2.0 * max(near.shape, default=0) + 1)
    for left, right in zip(*linear_sum_assignment(cost), strict=True):
        if near[left, right] and _overlap(expected, actual, left, right):
            yield left, right


def _overlap(expected: Outputs, actual: Outputs, left: int, right: int) -> bool:
    if "masks" not in expected:
        return True
    one, other = expected["masks"][left], actual["masks"][right]
    return bool((one & other).sum() >= MIN_MASK_IOU * (one | other).sum())


def _with_batch(outputs: Outputs) -> dict[str, np.ndarray]:
    single = outputs["labels"].ndim == 1
    return {name: outputs[name][None] if single else outputs[name] for name in outputs}


def check(comparisons: Sequence[Comparison], tolerance: float) -> None:
    """Check that all differences are within the tolerance.

    Raises:
        DifferenceError: If one is not, or fewer predictions agree than `MIN_AGREEMENT`.
    """
    if without := sum(comparison.empty for comparison in comparisons):
        _logger.warning(
            "no objects in %d of %d batches, for which no boxes are compared: choose images of the "
            "classes with --images",
            without,
            len(comparisons),
        )
    for comparison in comparisons:
        shape = " x ".join(map(str, comparison.shape))
        for name, difference in comparison.largest.items():
            if difference > tolerance:
                raise DifferenceError(
                    f"{name} of {shape} images must differ by at most {tolerance:g} of the largest "
                    f"value, got {difference:.3g}"
                )
        if comparison.agreement is not None and comparison.agreement < MIN_AGREEMENT:
            raise DifferenceError(
                f"predictions for {shape} images must agree by at least {MIN_AGREEMENT:.0%}, "
                f"got {comparison.agreement:.2%}"
            )


def proportion_of_equal_classes(
    model: ExportableModel, runtime: Runtime, images: Sequence[Tensor]
) -> float:
    """Return the proportion of images whose class is the same.

    Args:
        model: Classifier in eager PyTorch.
        runtime: The exported file.
        images: Inputs (1, 3, H, W).
    """
    equal = [
        run_eager(model, image)["logits"].argmax() == runtime(image.numpy())["logits"].argmax()
        for image in images
    ]
    return sum(equal) / len(equal)


def check_agreement(agreement: float) -> None:
    """Check the proportion of the calibration images whose class is the same.

    Raises:
        DifferenceError: If it is below `MIN_AGREEMENT_INT8`.
    """
    if agreement < MIN_AGREEMENT_INT8:
        raise DifferenceError(
            f"the classes of the calibration images must agree by at least "
            f"{MIN_AGREEMENT_INT8:.0%}, got {agreement:.2%}"
        )


def measure(
    model: ExportableModel, load: Callable[[int], Runtime], images: Tensor, threads: int
) -> Timing:
    """Time eager PyTorch and the exported file alternately, so that other load affects both.

    Args:
        model: Model in eager PyTorch.
        load: Loads the file for a number of threads.
        images: Batch to compute.
        threads: Number of threads of both.
    """
    runtime, array = load(threads), images.numpy()
    calls: Sequence[Callable[[], Any]] = (lambda: model.run(images), lambda: runtime(array))
    times: tuple[list[float], list[float]] = ([], [])
    with use_threads(threads):
        for call in calls:
            call()
        end = time.perf_counter() + 2 * _SECONDS
        while time.perf_counter() < end or len(times[0]) < 3:
            for call, durations in zip(calls, times, strict=True):
                begin = time.perf_counter()
                call()
                durations.append(time.perf_counter() - begin)
    # Other load on the machine can only add to the time.
    return Timing(threads, *(min(durations) for durations in times))
