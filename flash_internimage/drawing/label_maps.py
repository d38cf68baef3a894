"""Label maps over their image, with a legend."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ..predictions import LabelMap
from .colors import class_colors, text_color
from .layout import BACKGROUND, add_caption, enlarge, font_size, pad
from .text import Font, fit, line_height, load_font, text_width

_OTHER = (128, 128, 128)  # labels that are not the index of a class
_UNTINTED = (32, 32, 36)  # classes with the name "background"


class LegendEntry(NamedTuple):
    """A class in a label map.

    Attributes:
        name: Name of the class.
        color: RGB color, None for pixels that are ignored.
        share: Share of the pixels, from 0 to 1.
    """

    name: str
    color: tuple[int, int, int] | None
    share: float


def draw_label_map(
    image: np.ndarray,
    result: LabelMap,
    *,
    caption: str | None = None,
    min_width: int = 640,
    opacity: float = 0.6,
    ignore: int | None = 255,
    legend_rows: int | None = None,
) -> np.ndarray:
    """Draw the class of each pixel in color, with a legend below the picture.

    A class with the name "background" is dark, without a hue of its own. Regions that are large
    enough also contain the name of their class.

    Args:
        image: (H, W, 3) uint8 array.
        result: Label map of the same height and width.
        caption: Text of a bar above the picture.
        min_width: Width in pixels to which smaller images are enlarged.
        opacity: Opacity of the colors over the image in shades of gray, from 0 to 1.
        ignore: Label of pixels without a class, which show the image in its own colors.
        legend_rows: Number of rows of the legend, so that the frames of a video have the same
            height; the smallest classes are summed up if there are more. None for all classes.

    Returns:
        (H', W', 3) uint8 array.

    Raises:
        ValueError: If the image, the shape of the label map, the opacity or the number of rows is
            wrong.
    """
    picture, _ = enlarge(image, min_width)
    labels = np.asarray(result.labels)
    if labels.shape != image.shape[:2]:
        raise ValueError(f"labels must have the shape {image.shape[:2]}, got {labels.shape}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be from 0 to 1, got {opacity}")
    if legend_rows is not None and legend_rows < 1:
        raise ValueError(f"legend_rows must be at least 1, got {legend_rows}")
    height, width = picture.shape[:2]
    # Rows and columns of the label map for those of the picture: enlarging does not mix labels.
    rows = np.arange(height) * labels.shape[0] // height
    columns = np.arange(width) * labels.shape[1] // width
    enlarged = labels if height == labels.shape[0] else labels[rows][:, columns]
    picture = _colored(picture, enlarged, result.classes, opacity, ignore)
    picture = _with_names(picture, enlarged, result.classes, ignore)
    entries = legend_entries(result, ignore)
    font = load_font(font_size(width, height), "".join(result.classes))
    legend = _legend(entries, max(width, min_width), font, legend_rows)
    picture = np.concatenate([pad(picture, legend.shape[1], 0), legend])
    return add_caption(picture, caption)


def legend_entries(result: LabelMap, ignore: int | None = 255) -> list[LegendEntry]:
    """Return the classes in a label map, the largest first and ignored pixels last.

    Labels that are not the index of a class are named "label 17".
    """
    present, counts = np.unique(result.labels, return_counts=True)
    entries, ignored = [], []
    for label, count in zip(present.tolist(), counts.tolist(), strict=True):
        share = count / result.labels.size
        if label == ignore:
            ignored.append(LegendEntry("ignored", None, share))
            continue
        known = 0 <= label < len(result.classes)
        name = result.classes[label] if known else f"label {label}"
        entries.append(LegendEntry(name, _color(label, result.classes), share))
    return sorted(entries, key=lambda entry: -entry.share) + ignored


def _table(classes: tuple[str, ...]) -> np.ndarray:
    """Return the colors of all classes and of other labels, (classes + 1, 3) uint8."""
    table = np.concatenate([class_colors(len(classes)), np.array([_OTHER], np.uint8)])
    table[[i for i, name in enumerate(classes) if name.casefold() == "background"]] = _UNTINTED
    return table


def _color(label: int, classes: tuple[str, ...]) -> tuple[int, int, int]:
    known = 0 <= label < len(classes)
    red, green, blue = _table(classes)[label if known else -1].tolist()
    return red, green, blue


def _colored(
    picture: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    opacity: float,
    ignore: int | None,
) -> np.ndarray:
    known = (labels >= 0) & (labels < len(classes))
    colors = _table(classes)[np.where(known, labels, len(classes))]
    border = _borders(labels, max(1, font_size(*labels.shape[::-1]) // 12))
    colors[border] = 255
    gray = Image.fromarray(picture).convert("L").convert("RGB")  # keeps the hues of the classes
    blended = np.array(Image.blend(gray, Image.fromarray(colors), opacity))
    if ignore is not None:
        ignored = (labels == ignore) & ~border
        blended[ignored] = picture[ignored]
    return blended


def _borders(labels: np.ndarray, line: int) -> np.ndarray:
    """Return the pixels within `line` pixels left of or above a pixel with another label."""
    border = np.zeros(labels.shape, bool)
    for step in range(1, line + 1):
        border[:-step] |= labels[:-step] != labels[step:]
        border[:, :-step] |= labels[:, :-step] != labels[:, step:]
    return border


def _with_names(
    picture: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], ignore: int | None
) -> np.ndarray:
    """Write the name of each class where it lies completely on the class."""
    height, width = labels.shape
    size = font_size(width, height)
    step = max(1, size // 4)
    coarse = labels[::step, ::step]
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    for label in np.unique(coarse).tolist():
        if label == ignore or not 0 <= label < len(classes):
            continue
        font = load_font(size, classes[label])
        name = fit(classes[label], font, width // 2)
        columns = -(-(text_width(name, font) + size) // step)
        rows = -(-3 * line_height(font) // (2 * step))
        place = _place(coarse == label, columns, rows)
        if place is None:
            continue
        color = text_color(_color(label, classes))
        around = (255 - color[0],) * 3
        draw.text(
            (place[0] * step, place[1] * step), name, color, font, anchor="mm",
            stroke_width=max(1, size // 12), stroke_fill=around,
        )  # fmt: skip
    return np.asarray(canvas)


def _place(mask: np.ndarray, columns: int, rows: int) -> tuple[float, float] | None:
    """Return the center x and y of a rectangle inside a mask, the most central one."""
    if mask.shape[0] < rows or mask.shape[1] < columns:
        return None
    sums = np.pad(mask, ((1, 0), (1, 0))).astype(np.int64).cumsum(0).cumsum(1)
    inside = (
        sums[rows:, columns:] - sums[:-rows, columns:] - sums[rows:, :-columns]
        + sums[:-rows, :-columns]
    )  # fmt: skip
    corners = np.argwhere(inside == rows * columns)
    if not len(corners):
        return None
    middle = np.argwhere(mask).mean(0) - (rows / 2, columns / 2)
    top, left = corners[np.square(corners - middle).sum(1).argmin()].tolist()
    return left + columns / 2, top + rows / 2


def _legend(entries: list[LegendEntry], width: int, font: Font, rows: int | None) -> np.ndarray:
    """Return a legend of a width in columns, read from top to bottom."""
    texts = [_entry_text(entry) for entry in entries]
    line = round(1.7 * line_height(font))
    swatch = line_height(font)
    widest = max((text_width(text, font) for text in texts), default=0)
    columns = min(len(entries), max(1, width // (widest + 3 * swatch))) or 1
    column_width = width // columns
    if rows is None:
        rows = -(-len(entries) // columns)
    elif len(entries) > rows * columns:
        kept = rows * columns - 1
        others = entries[kept:]
        share = sum(entry.share for entry in others)
        entries = [*entries[:kept], LegendEntry(f"{len(others)} more", _OTHER, share)]
        texts = [_entry_text(entry) for entry in entries]
    legend = Image.new("RGB", (width, rows * line + line // 2), BACKGROUND)
    draw = ImageDraw.Draw(legend)
    for number, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        left = number // rows * column_width + swatch // 2
        top = number % rows * line + line // 2
        box = left, top, left + swatch, top + swatch
        draw.rectangle(box, fill=entry.color, outline="black")
        if entry.color is None:
            draw.line(box, "black")
        place = left + 3 * swatch // 2, top + swatch / 2
        draw.text(
            place, fit(text, font, column_width - 5 * swatch // 2), "black", font, anchor="lm"
        )
    return np.asarray(legend)


def _entry_text(entry: LegendEntry) -> str:
    return f"{entry.name}: {_percent(entry.share)}"


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.1f} %" if percent >= 0.1 else "< 0.1 %"
