"""Show a prediction as a picture, a sentence and a table."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from ..inference import Classification, Detections, LabelMap
from ..inference.pictures import draw
from ..inference.run import is_out_of_memory
from ..predictions import Result

# Of a detector's objects; those below the minimum that the user chooses are hidden.
LOWEST_SCORE = 0.05


@dataclass(frozen=True)
class Presentation:
    """A prediction for people.

    Attributes:
        picture: (H, W, 3) uint8 in RGB.
        summary: One sentence.
        headers: Titles of the table's columns.
        rows: Rows of the table.
    """

    picture: np.ndarray
    summary: str
    headers: list[str]
    rows: list[list[str]]


def present(image: np.ndarray, result: Result, threshold: float) -> Presentation:
    """Return a prediction for people.

    Args:
        image: (H, W, 3) uint8 in RGB.
        result: Prediction for the image.
        threshold: Minimum score of the objects of a detector.
    """
    if isinstance(result, Classification):
        return _classification(image, result)
    if isinstance(result, Detections):
        return _detections(image, above(result, threshold), threshold)
    return _label_map(image, result)


def describe_error(error: Exception) -> str:
    """Return the message of an error for users of the page."""
    if is_out_of_memory(error):
        return "There is not enough memory for this image"
    return str(error) or type(error).__name__


def above(result: Detections, threshold: float) -> Detections:
    """Return the objects whose score is at least `threshold`."""
    kept = result.scores >= threshold
    return replace(
        result,
        boxes=result.boxes[kept],
        scores=result.scores[kept],
        labels=result.labels[kept],
        masks=None if result.masks is None else result.masks[kept],
    )


def _classification(image: np.ndarray, result: Classification) -> Presentation:
    rows = [
        [name, _percent(score)]
        for name, score in zip(result.names, result.scores.tolist(), strict=True)
    ]
    return Presentation(draw(image, result), ": ".join(rows[0]), ["class", "probability"], rows)


def _detections(image: np.ndarray, result: Detections, threshold: float) -> Presentation:
    names = [result.classes[label] for label in result.labels.tolist()]
    counts = ", ".join(f"{name} ({count})" for name, count in Counter(names).most_common())
    objects = "1 object" if len(names) == 1 else f"{len(names)} objects"
    rows = [
        [name, _percent(score), *(f"{side:.0f}" for side in box)]
        for name, score, box in zip(
            names, result.scores.tolist(), result.boxes.tolist(), strict=True
        )
    ]
    return Presentation(
        draw(image, result),
        f"{objects} with a score of at least {threshold:.2f}" + (f": {counts}" if counts else ""),
        ["class", "score", "x1", "y1", "x2", "y2"],
        rows,
    )


def _label_map(image: np.ndarray, result: LabelMap) -> Presentation:
    labels, counts = np.unique(result.labels, return_counts=True)
    shares = sorted(zip(counts.tolist(), labels.tolist(), strict=True), reverse=True)
    rows = [
        [result.classes[label], _percent(count / result.labels.size)] for count, label in shares
    ]
    return Presentation(
        draw(image, result),
        ", ".join(" ".join(row) for row in rows[:5]) + (", ..." if len(rows) > 5 else ""),
        ["class", "share of the image"],
        rows,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
