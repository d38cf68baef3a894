"""Places for labels that do not hide objects or each other."""

import numpy as np

# Costs of a label that is hidden or hides something completely, and of the distance from its box.
_OTHER_LABEL, _OWN_BOX, _OTHER_BOX, _PER_ROW = 10.0, 4.0, 1.0, 0.15


def place_labels(boxes: np.ndarray, sizes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Choose places for the labels of boxes, in the order of the boxes.

    Labels lie inside the picture if they fit into it: above, below or beside their box where there
    is room, and only otherwise on it. They avoid labels before them and, less strictly, other
    boxes.

    Args:
        boxes: (n, 4) array, x1, y1, x2 and y2 in pixels.
        sizes: (n, 2) array, width and height of each label.
        width: Width of the picture.
        height: Height of the picture.

    Returns:
        (n, 4) array of the labels' x1, y1, x2 and y2.
    """
    placed = np.zeros((len(boxes), 4))
    for i, (box, size) in enumerate(zip(boxes, sizes, strict=True)):
        candidates, costs = _candidates(box, size, placed[:i], width, height)
        costs += _OTHER_LABEL * _hidden(candidates, placed[:i]).sum(1)
        costs += _OWN_BOX * _hidden(candidates, box[None])[:, 0]
        # Many boxes of one object count once.
        costs += _OTHER_BOX * _hidden(candidates, np.delete(boxes, i, 0)).max(1, initial=0)
        placed[i] = candidates[costs.argmin()]
    return placed


def _candidates(
    box: np.ndarray, size: np.ndarray, placed: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (m, 4) places inside the picture, and costs that rise with the distance to the box."""
    x1, y1, x2, y2 = box
    columns, rows = size
    xs = [x1, x2 - columns, (x1 + x2 - columns) / 2]
    ys = [y1 - rows, y2]  # above and below
    beside = [(x, y) for x in (x2, x1 - columns) for y in (y1, y2 - rows, (y1 + y2 - rows) / 2)]
    on_the_box = [(x1, y1), (x1, y2 - rows)]
    # Above and below the labels before it that may be in the way.
    near = placed[
        (placed[:, 1] < y2 + 4 * rows) & (placed[:, 3] > y1 - 4 * rows)
        & (placed[:, 0] < x2 + columns) & (placed[:, 2] > x1 - columns)
    ]  # fmt: skip
    stacked = [*(near[:, 1] - rows), *near[:, 3]]
    corners = np.array([(x, y) for y in [*ys, *stacked] for x in xs] + beside + on_the_box)
    preferences = 0.01 * np.arange(len(corners)).clip(max=12)
    corners = corners.clip(0, np.maximum(0, (width - columns, height - rows)))
    places = np.hstack([corners, corners + size])
    gaps = np.maximum(places[:, :2] - box[2:], box[:2] - places[:, 2:]).max(1).clip(0)
    return places, preferences + _PER_ROW * gaps / rows


def _hidden(places: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the overlap of (m, 4) places with (n, 4) boxes, as shares of the smaller ones."""
    columns, rows = (
        np.minimum(places[:, None, i + 2], boxes[:, i + 2])
        - np.maximum(places[:, None, i], boxes[:, i])
        for i in (0, 1)
    )
    smaller = np.minimum(_areas(places)[:, None], _areas(boxes)[None])
    return columns.clip(0) * rows.clip(0) / smaller.clip(1)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)
