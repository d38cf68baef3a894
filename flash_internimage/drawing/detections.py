"""Boxes, masks and their labels."""

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from ..predictions import Detections
from .colors import label_color, text_color
from .layout import add_caption, enlarge, font_size, pad
from .placement import place_labels
from .text import fit, line_height, load_font, text_width

_MASK_OPACITY = 0.45


def draw_detections(
    image: np.ndarray, result: Detections, *, caption: str | None = None, min_width: int = 640
) -> np.ndarray:
    """Draw boxes, masks with outlines, class names and scores.

    Labels are placed beside the boxes where there is room, and do not overlap. If they would cover
    more than a third of the picture, only the first ones are drawn, and the caption says so.

    Args:
        image: (H, W, 3) uint8 array.
        result: Detections in this image, or annotations, whose scores are NaN and not drawn.
        caption: Text of a bar above the picture.
        min_width: Width in pixels to which smaller images are enlarged.

    Returns:
        (H', W', 3) uint8 array.

    Raises:
        ValueError: If the image or the shape of the masks is wrong.
    """
    picture, factor = enlarge(image, min_width)
    _check(result, image)
    colors = [label_color(int(label), len(result.classes)) for label in result.labels]
    boxes = np.asarray(result.boxes, np.float64).reshape(-1, 4) * factor
    height, width = picture.shape[:2]
    line = max(2, round(font_size(width, height) / 6))
    if result.masks is not None:
        picture = _with_masks(picture, result.masks, colors, line)
    canvas = Image.fromarray(pad(picture, min_width, 0))  # room for the labels of a narrow image
    draw = ImageDraw.Draw(canvas)
    for box, color in reversed(list(zip(boxes, colors, strict=True))):
        _draw_box(draw, box, color, line)
    names = [_text(result, i) for i in range(len(boxes))]
    named = _draw_labels(draw, boxes, names, colors, line)
    if caption is not None and named < len(boxes):
        caption = f"{caption} ({named} of {len(boxes)} with labels)"
    return add_caption(np.asarray(canvas), caption)


def _check(result: Detections, image: np.ndarray) -> None:
    counts = {len(result.boxes), len(result.scores), len(result.labels)}
    if len(counts) > 1:
        raise ValueError(
            "result must have as many boxes as scores and labels, got "
            f"{len(result.boxes)}, {len(result.scores)} and {len(result.labels)}"
        )
    shape = (len(result.boxes), *image.shape[:2])
    if result.masks is not None and result.masks.shape != shape:
        raise ValueError(f"masks must have the shape {shape}, got {result.masks.shape}")


def _text(result: Detections, i: int) -> str:
    label, score = int(result.labels[i]), float(result.scores[i])
    name = result.classes[label] if 0 <= label < len(result.classes) else f"class {label}"
    return name if np.isnan(score) else f"{name}: {100 * score:.0f} %"


def _with_masks(
    picture: np.ndarray, masks: np.ndarray, colors: list[tuple[int, int, int]], line: int
) -> np.ndarray:
    """Return a picture with masks, the first one in front."""
    picture = picture.copy()
    height, width = picture.shape[:2]
    for mask, color in reversed(list(zip(masks, colors, strict=True))):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            continue
        # Around the mask, in pixels of the picture.
        scale_y, scale_x = height / mask.shape[0], width / mask.shape[1]
        margin = 2 * line
        top = max(0, int(rows[0] * scale_y) - margin)
        bottom = min(height, int((rows[-1] + 1) * scale_y) + margin + 1)
        left = max(0, int(columns[0] * scale_x) - margin)
        right = min(width, int((columns[-1] + 1) * scale_x) + margin + 1)
        part = Image.fromarray(mask.astype(np.uint8) * 255).resize(
            (right - left, bottom - top),
            Image.Resampling.BILINEAR,
            box=(left / scale_x, top / scale_y, right / scale_x, bottom / scale_y),
        )
        inside = part.point(lambda value: 255 * (value >= 128))
        # A mean of 255 is far from any edge; a minimum filter would take minutes for large images.
        inner = inside.filter(ImageFilter.BoxBlur(line))
        opacity = inner.point(lambda value: round(255 * _MASK_OPACITY) if value == 255 else 255)
        below = Image.fromarray(picture[top:bottom, left:right])
        below.paste(color, mask=ImageChops.darker(opacity, inside))
        picture[top:bottom, left:right] = np.asarray(below)
    return picture


def _draw_box(
    draw: ImageDraw.ImageDraw, box: np.ndarray, color: tuple[int, int, int], line: int
) -> None:
    """Draw a box in its color between two thin black lines, visible on any background."""
    x1, y1, x2, y2 = (int(v) for v in np.rint(box))
    x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)
    around = max(1, line // 3)
    outer = x1 - around, y1 - around, x2 + around, y2 + around
    draw.rectangle(outer, outline="black", width=line + 2 * around)
    draw.rectangle((x1, y1, x2, y2), outline=color, width=line)


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    boxes: np.ndarray,
    names: list[str],
    colors: list[tuple[int, int, int]],
    line: int,
) -> int:
    """Draw labels of the first objects and return their number."""
    width, height = draw.im.size
    font = load_font(font_size(width, height), "".join(names))
    margin = line + 1
    names = [fit(name, font, width - 2 * margin) for name in names]
    rows = line_height(font) + 2 * margin
    sizes = np.array([(text_width(name, font) + 2 * margin, rows) for name in names])
    covered = np.cumsum(sizes.reshape(-1, 2).prod(1))
    count = max(1, int(np.searchsorted(covered, width * height / 3, side="right")))
    names, colors, sizes, boxes = names[:count], colors[:count], sizes[:count], boxes[:count]
    around = line + max(1, line // 3)
    apart = boxes + np.array([-around, -around, around, around])
    places = place_labels(apart, sizes.reshape(-1, 2), width, height)
    for color, place, box in zip(colors, places, boxes, strict=True):
        if np.maximum(place[:2] - box[2:], box[:2] - place[2:]).max() > rows / 2:
            middle = (place[:2] + place[2:]) / 2
            nearest = np.maximum(np.minimum(middle, box[2:]), box[:2])
            draw.line([*nearest, *middle], fill=color, width=line)
    for name, color, place in zip(names, colors, places, strict=True):
        x1, y1, x2, y2 = (int(v) for v in np.rint(place))
        middle = (x1 + x2) / 2, (y1 + y2) / 2
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=color)
        draw.text(middle, name, text_color(color), font, anchor="mm")
    return len(names)
