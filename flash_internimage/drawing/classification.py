"""Images with the scores of their classes."""

import numpy as np
from PIL import Image, ImageDraw

from ..predictions import Classification
from .colors import class_colors
from .layout import BACKGROUND, add_caption, enlarge, font_size, pad
from .text import fit, line_height, load_font, text_width

_WIDTH = 640


def draw_classification(
    image: np.ndarray, result: Classification, *, caption: str | None = None
) -> np.ndarray:
    """Draw the scores of the best classes as bars below an image.

    Args:
        image: (H, W, 3) uint8 array; enlarged if it is less than 640 pixels wide.
        result: Classes and scores.
        caption: Text of a bar above the picture.

    Returns:
        (H', W', 3) uint8 array.

    Raises:
        ValueError: If the image is not such an array.
    """
    picture, _ = enlarge(image, _WIDTH)
    font = load_font(font_size(*picture.shape[1::-1]), "".join(result.names))
    picture = pad(picture, _WIDTH, 0)
    width = picture.shape[1]
    letters = line_height(font)
    line = 2 * letters
    bars = Image.new("RGB", (width, len(result.names) * line + letters), BACKGROUND)
    draw = ImageDraw.Draw(bars)
    texts = [fit(name, font, width // 2 - letters) for name in result.names]
    left = max((text_width(text, font) for text in texts), default=0) + letters
    right = width - text_width("100.0 %", font) - 3 * letters // 2
    color = tuple(class_colors(2)[1].tolist())
    for number, (text, score) in enumerate(zip(texts, result.scores.tolist(), strict=True)):
        middle = number * line + line // 2 + letters // 2
        draw.text((left - letters // 2, middle), text, "black", font, anchor="rm")
        end = left + round((right - left) * min(max(score, 0), 1))
        top, bottom = middle - 2 * letters // 3, middle + 2 * letters // 3
        draw.rectangle((left, top, end, bottom), fill=color)
        value = f"{100 * score:.1f} %"
        draw.text((end + letters // 2, middle), value, "black", font, anchor="lm")
    return add_caption(np.concatenate([picture, np.asarray(bars)]), caption)
