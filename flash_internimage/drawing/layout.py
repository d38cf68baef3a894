"""Sizes, captions, and pictures that consist of several."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..images import check_rgb
from .text import fit, line_height, load_font

BACKGROUND = (255, 255, 255)
_CAPTION = (40, 40, 40)
# Longer sides than this make pictures that programs fail to open.
_MAX_ENLARGED = 8192


def enlarge(image: np.ndarray, min_width: int = 640) -> tuple[np.ndarray, float]:
    """Enlarge a small image, with Lanczos interpolation.

    Args:
        image: (H, W, 3) uint8 array.
        min_width: Width in pixels below which images are enlarged.

    Returns:
        The image, at least `min_width` pixels wide unless that would make it more than 8192 pixels
        high, and the factor by which it was enlarged, 1 for a large image.

    Raises:
        ValueError: If the image is not such an array or `min_width` is below 1.
    """
    check_rgb(image)
    if min_width < 1:
        raise ValueError(f"min_width must be at least 1, got {min_width}")
    height, width = image.shape[:2]
    factor = min(min_width / width, _MAX_ENLARGED / height)
    if factor <= 1:
        return image, 1.0
    size = round(width * factor), round(height * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)), factor


def font_size(width: int, height: int) -> int:
    """Return the font size in pixels for a picture of a size."""
    return max(14, round(min(width, 2 * height) / 40))


def add_caption(picture: np.ndarray, caption: str | None) -> np.ndarray:
    """Add a bar with a caption above a picture.

    Args:
        picture: (H, W, 3) uint8 array.
        caption: Text of one line, shortened if it is too long; None for no bar.
    """
    if caption is None:
        return picture
    height, width = picture.shape[:2]
    font = load_font(font_size(width, height), caption)
    line = line_height(font)
    bar = Image.new("RGB", (width, 2 * line), _CAPTION)
    text = fit(caption, font, width - line)
    ImageDraw.Draw(bar).text((line // 2, line), text, "white", font, anchor="lm")
    return np.concatenate([np.asarray(bar), picture])


def pad(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """Extend a picture to a width and a height with the background color, right and below."""
    missing = max(0, height - picture.shape[0]), max(0, width - picture.shape[1])
    if not any(missing):
        return picture
    padded = np.full(
        (picture.shape[0] + missing[0], picture.shape[1] + missing[1], 3), BACKGROUND, np.uint8
    )
    padded[: picture.shape[0], : picture.shape[1]] = picture
    return padded


def side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Return pictures next to each other, for example ground truth and prediction.

    Args:
        pictures: (H, W, 3) uint8 arrays of any sizes.

    Raises:
        ValueError: If there are no pictures or one is not such an array.
    """
    _check_pictures(pictures)
    height = max(picture.shape[0] for picture in pictures)
    gap = np.full((height, max(4, height // 100), 3), BACKGROUND, np.uint8)
    parts = [part for picture in pictures for part in (gap, pad(picture, 0, height))]
    return np.concatenate(parts[1:], axis=1)


def contact_sheet(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    columns: int = 4,
    cell_width: int = 240,
) -> np.ndarray:
    """Return pictures in rows, each above its caption.

    Args:
        pictures: (H, W, 3) uint8 arrays of any sizes, each scaled to fit into a square cell.
        captions: As many texts, each of one or more lines; lines that are too long are shortened.
        columns: Number of pictures in a row.
        cell_width: Width of a cell in pixels.

    Raises:
        ValueError: If there are no pictures, one is not such an array, the number of captions is
            different, `columns` is below 1 or `cell_width` is below 32.
    """
    _check_pictures(pictures)
    if len(captions) != len(pictures):
        raise ValueError(
            f"captions must be as many as pictures ({len(pictures)}), got {len(captions)}"
        )
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if cell_width < 32:
        raise ValueError(f"cell_width must be at least 32, got {cell_width}")
    columns = min(columns, len(pictures))
    gap = max(4, cell_width // 24)
    font = load_font(min(max(12, cell_width // 17), 20), "".join(captions))
    line = round(1.4 * line_height(font))
    rows = []
    for start in range(0, len(pictures), columns):
        images = [_fit_into(p, cell_width) for p in pictures[start : start + columns]]
        texts = [caption.splitlines() for caption in captions[start : start + columns]]
        height = max(image.height for image in images)
        lines = max(map(len, texts))
        row = Image.new(
            "RGB",
            (gap + columns * (cell_width + gap), gap + height + lines * line),
            BACKGROUND,
        )
        draw = ImageDraw.Draw(row)
        for column, (image, text) in enumerate(zip(images, texts, strict=True)):
            left = gap + column * (cell_width + gap)
            row.paste(image, (left + (cell_width - image.width) // 2, gap + height - image.height))
            for number, words in enumerate(text):
                middle = left + cell_width // 2, gap + height + number * line + line // 2
                draw.text(middle, fit(words, font, cell_width), "black", font, anchor="mm")
        rows.append(np.asarray(row))
    rows.append(np.full((gap, rows[0].shape[1], 3), BACKGROUND, np.uint8))
    return np.concatenate(rows)


def _fit_into(picture: np.ndarray, side: int) -> Image.Image:
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)


def _check_pictures(pictures: Sequence[np.ndarray]) -> None:
    if not len(pictures):
        raise ValueError("pictures must not be empty")
    for number, picture in enumerate(pictures):
        check_rgb(picture, f"pictures[{number}]")
