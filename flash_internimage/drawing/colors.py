"""Colors of classes that color-blind readers can tell apart."""

import functools

import numpy as np

# Okabe and Ito's palette without black, https://jfly.uni-koeln.de/color
_OKABE_ITO = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)

# Linear RGB as dichromats see it: Machado, Oliveira and Fernandes, "A Physiologically-based Model
# for Simulation of Color Vision Deficiency" (2009), severity 1.0.
_DICHROMACY = {
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}

# From linear RGB to CIE XYZ, and the white point D65.
_XYZ = np.array(
    (
        (0.4124564, 0.3575761, 0.1804375),
        (0.2126729, 0.7151522, 0.0721750),
        (0.0193339, 0.1191920, 0.9503041),
    )
)
_WHITE = _XYZ.sum(1)

# Darker colors hide the image under them, and lighter ones look like white.
_LIGHTNESS = (42, 92)

# More colors than this could not be told apart; further classes have the same ones again.
_MOST = 1000


def class_colors(count: int) -> np.ndarray:
    """Return colors that are distinct in normal vision, deuteranopia and protanopia.

    The first seven are Okabe and Ito's. Each further color is the one farthest from all before it,
    in the vision in which it is nearest, so that the first colors do not depend on `count`. After
    1000, the colors repeat.

    Args:
        count: Number of colors.

    Returns:
        (count, 3) uint8 array in RGB.

    Raises:
        ValueError: If `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if count <= len(_OKABE_ITO):
        return np.array(_OKABE_ITO, np.uint8)[:count]
    return _palette(min(count, _MOST))[np.arange(count) % _MOST]


def label_color(label: int, classes: int) -> tuple[int, int, int]:
    """Return the color of a label, gray if it is not the index of a class."""
    if not 0 <= label < classes:
        return 128, 128, 128
    red, green, blue = class_colors(classes)[label].tolist()
    return red, green, blue


def text_color(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return black or white, whichever has the higher contrast on a background (WCAG 2)."""
    luminance = _linear(np.array(background, np.uint8)) @ _XYZ[1]
    black, white = (luminance + 0.05) / 0.05, 1.05 / (luminance + 0.05)
    return (0, 0, 0) if black >= white else (255, 255, 255)


def visible_distances(colors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the distances between colors, in the vision in which each pair is most similar.

    Args:
        colors: (n, 3) uint8 array in RGB.
        others: (m, 3) uint8 array in RGB.

    Returns:
        (n, m) array: the least CIE76 distance in normal vision, protanopia and deuteranopia. A
        distance of 2 is just noticeable for colors side by side.
    """
    pairs = zip(appearances(colors), appearances(others), strict=True)
    return np.min([np.linalg.norm(a[:, None] - b, axis=-1) for a, b in pairs], axis=0)


@functools.lru_cache(maxsize=8)
def _palette(count: int) -> np.ndarray:
    levels = np.arange(0, 256, 15, np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lightness = appearances(cube)[0][:, 0]
    candidates = cube[(lightness >= _LIGHTNESS[0]) & (lightness <= _LIGHTNESS[1])]
    seen = np.stack(appearances(candidates))
    palette = list(np.array(_OKABE_ITO, np.uint8))
    nearest = visible_distances(candidates, np.array(palette)).min(1)
    while len(palette) < count:
        best = int(nearest.argmax())
        palette.append(candidates[best])
        distances = np.linalg.norm(seen - seen[:, best : best + 1], axis=-1).min(0)
        nearest = np.minimum(nearest, distances)
    return np.array(palette)


def appearances(colors: np.ndarray) -> list[np.ndarray]:
    """Return (n, 3) CIELAB coordinates in normal vision, protanopia and deuteranopia."""
    linear = _linear(colors)
    seen = [linear, *(linear @ np.array(matrix).T for matrix in _DICHROMACY.values())]
    return [_lab(rgb.clip(0, 1)) for rgb in seen]


def _linear(colors: np.ndarray) -> np.ndarray:
    """Return sRGB of 0 to 255 as linear RGB of 0 to 1."""
    values = colors / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    relative = linear @ _XYZ.T / _WHITE
    root = np.where(
        relative > (6 / 29) ** 3, np.cbrt(relative), relative * (29 / 6) ** 2 / 3 + 4 / 29
    )
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
