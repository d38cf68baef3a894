"""Places for labels that do not hide objects or each other."""

import numpy as np

_ROWS = 4  # above or below a box that labels may move away from it, in heights of a label

# Costs of a label that is hidden or hides something completely.
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
        candidates, costs = _candidates(box, size, width, height)
        area = size.prod()
        costs += _OTHER_LABEL * _overlaps(candidates, placed[:i]).sum(1) / area
        costs += _OWN_BOX * _overlaps(candidates, box[None])[:, 0] / area
        # Many boxes of one object count once.
        others = _overlaps(candidates, np.delete(boxes, i, 0))
        costs += _OTHER_BOX * others.max(1, initial=0) / area
        placed[i] = candidates[costs.argmin()]
    return placed


def _candidates(
    box: np.ndarray, size: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (m, 4) places inside the picture, and their costs before anything else is drawn."""
    x1, y1, x2, y2 = box
    columns, rows = size
    corners = []
    for row in range(_ROWS):
        above, below = y1 - (row + 1) * rows, y2 + row * rows
        for preference, y in enumerate((above, below)):
            for shift, x in enumerate((x1, x2 - columns, (x1 + x2 - columns) / 2)):
                corners.append((x, y, _PER_ROW * row + 0.02 * preference + 0.01 * shift))
    for side, x in enumerate((x2, x1 - columns)):
        for shift, y in enumerate((y1, y2 - rows, (y1 + y2 - rows) / 2)):
            corners.append((x, y, 0.05 + 0.02 * side + 0.01 * shift))
    corners.append((x1, y1, 0.1))  # on the box
    corners.append((x1, y2 - rows, 0.12))
    places = np.array(corners)
    places[:, 0] = places[:, 0].clip(0, max(0, width - columns))
    places[:, 1] = places[:, 1].clip(0, max(0, height - rows))
    return np.hstack([places[:, :2], places[:, :2] + size]), places[:, 2]


def _overlaps(places: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the (m, n) areas in which places and boxes overlap."""
    low = np.maximum(places[:, None, :2], boxes[None, :, :2])
    high = np.minimum(places[:, None, 2:], boxes[None, :, 2:])
    return (high - low).clip(0).prod(2)
