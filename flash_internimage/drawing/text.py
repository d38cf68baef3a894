"""Text in pictures: fonts that have the letters, and texts that fit."""

import functools
import importlib.util
import logging
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_logger = logging.getLogger(__name__)

_FIRST_UNCERTAIN = "\u0600"  # DejaVu has nearly all letters before: Latin, Greek, Cyrillic, Hebrew


def load_font(size: int, text: str = "") -> Font:
    """Return a font of a size in pixels that has the letters of a text.

    It is DejaVu Sans, which matplotlib includes, for languages of Europe and the Near East, and for
    other languages an installed font. Without matplotlib, it is Pillow's own, which has Latin
    letters only.
    """
    uncertain = "".join(sorted({c for c in text if c >= _FIRST_UNCERTAIN and c.isalnum()}))
    path = _dejavu()
    if path is None:
        return ImageFont.load_default(size)
    return _open(_font_with(uncertain, path) if uncertain else path, size)


@functools.lru_cache(maxsize=64)
def _open(path: Path, size: int) -> Font:
    return ImageFont.truetype(path, size)


@functools.cache
def _dejavu() -> Path | None:
    package = importlib.util.find_spec("matplotlib")  # importing it would take half a second
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return path if path.exists() else None


@functools.lru_cache(maxsize=64)
def _font_with(letters: str, default: Path) -> Path:
    """Return the first font that has most of the letters, and warn of those that it lacks."""
    from matplotlib.font_manager import findSystemFonts
    from matplotlib.ft2font import FT2Font

    codes = set(map(ord, letters))
    best, missing = default, codes
    for path in [default, *map(Path, sorted(findSystemFonts()))]:
        try:
            lacking = codes - FT2Font(path).get_charmap().keys()
        except (OSError, RuntimeError):  # damaged, or a format that FreeType cannot read
            continue
        if len(lacking) < len(missing):
            best, missing = path, lacking
        if not missing:
            break
    if missing:
        _logger.warning(
            "no installed font has the letters %s: they are drawn as boxes",
            "".join(sorted(map(chr, missing))),
        )
    return best


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
