"""Text in pictures: fonts, and texts that fit."""

import functools
import importlib.util
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@functools.lru_cache(maxsize=64)
def load_font(size: int) -> Font:
    """Return a font of a size in pixels.

    DejaVu Sans, which matplotlib includes, has Latin, Greek, Cyrillic, Arabic and Hebrew letters.
    Without matplotlib, it is the font that Pillow includes, which has Latin letters only.
    """
    path = _dejavu()
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@functools.cache
def _dejavu() -> Path | None:
    package = importlib.util.find_spec("matplotlib")  # importing it would take half a second
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return path if path.exists() else None


def text_width(text: str, font: Font) -> int:
    """Return the width of a line of text in pixels, rounded up."""
    return -int(-font.getlength(text) // 1)


def line_height(font: Font) -> int:
    """Return the height of a line of text in pixels: of letters with ascenders and descenders."""
    return int(font.getbbox("Ág", anchor="ls")[3] - font.getbbox("Ág", anchor="ls")[1])


def fit(text: str, font: Font, width: int) -> str:
    """Return a text in one line, shortened with an ellipsis to at most a width in pixels.

    Characters that cannot be printed become question marks.
    """
    text = " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text).split())
    if text_width(text, font) <= width:
        return text
    shorter, longer = 0, len(text)
    while longer - shorter > 1:
        middle = (shorter + longer) // 2
        if text_width(f"{text[:middle]}…", font) <= width:
            shorter = middle
        else:
            longer = middle
    return f"{text[:shorter].rstrip()}…" if shorter else ""
