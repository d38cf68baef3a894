"""Draw predictions of any task."""

import math

import numpy as np
from PIL import Image

from ..drawing import draw_classification, draw_detections, draw_label_map
from ..predictions import Classification, Detections, LabelMap, Result

# Pictures of larger images are reduced: viewers are slow to open them.
MAX_PIXELS = 16_000_000


def draw(
    image: np.ndarray,
    result: Result,
    caption: str | None = None,
    legend_rows: int | None = None,
) -> np.ndarray:
    """Draw the prediction of an image.

    Args:
        image: (H, W, 3) uint8 array in RGB. Above 16 megapixels, the picture is reduced.
        result: Prediction of any task for this image.
        caption: Text of a bar above the picture.
        legend_rows: Rows of the legend of a label map; None for as many as it needs.

    Returns:
        (H', W', 3) uint8 array.
    """
    image, result = _reduce(image, result)
    if isinstance(result, Classification):
        return draw_classification(image, result, caption=caption)
    if isinstance(result, Detections):
        return draw_detections(image, result, caption=caption)
    return draw_label_map(image, result, caption=caption, ignore=None, legend_rows=legend_rows)


def _reduce(image: np.ndarray, result: Result) -> tuple[np.ndarray, Result]:
    height, width = image.shape[:2]
    factor = math.sqrt(MAX_PIXELS / (height * width))
    if factor >= 1:
        return image, result
    size = max(1, int(width * factor)), max(1, int(height * factor))
    # Rows and columns of the image for those of the picture.
    rows = np.arange(size[1]) * height // size[1]
    columns = np.arange(size[0]) * width // size[0]
    if isinstance(result, LabelMap):
        result = LabelMap(result.labels[rows][:, columns], result.classes)
    elif isinstance(result, Detections):
        masks = result.masks
        result = Detections(
            result.boxes * np.array([size[0] / width, size[1] / height] * 2, np.float32),
            result.scores,
            result.labels,
            None if masks is None else masks[:, rows][:, :, columns],
            result.classes,
        )
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)), result
