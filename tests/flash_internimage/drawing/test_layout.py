"""Test sizes, captions, and pictures that consist of several."""

import numpy as np
import pytest

from flash_internimage.drawing import contact_sheet, enlarge, side_by_side
from flash_internimage.drawing.layout import add_caption, font_size
from flash_internimage.drawing.text import fit, load_font, text_width


def gray(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "size", "factor"),
    [
        (128, 160, (512, 640), 4),
        (1, 1, (640, 640), 640),
        (480, 639, (481, 640), 640 / 639),
        (480, 640, (480, 640), 1),
        (3, 2000, (3, 2000), 1),
        (2000, 10, (8192, 41), 4.096),  # 640 pixels wide, it would be 128000 pixels high
    ],
)
def test_small_images_are_enlarged_to_a_width(height, width, size, factor):
    picture, found = enlarge(gray(height, width))
    assert picture.shape == (*size, 3)
    assert picture.dtype == np.uint8
    assert found == pytest.approx(factor)


def test_an_enlarged_image_keeps_its_contents_in_place():
    image = gray(40, 64, 0)
    image[10:20, 16:32] = 200
    picture, factor = enlarge(image)
    assert factor == 10
    assert abs(int(picture[150, 240, 0]) - 200) < 5
    assert (picture[102:198, 162:318] > 120).all()
    bright = picture.copy()
    bright[95:205, 155:325] = 0
    assert (bright < 50).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"image must be an \(H, W, 3\) uint8 array, got uint8 of sh"),
        (np.zeros((4, 4, 3)), r"got float64 of shape \(4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got uint8 of shape \(0, 4, 3\)"),
        ([[1, 2, 3]], "got list"),
    ],
)
def test_other_arrays_are_rejected(image, message):
    with pytest.raises(ValueError, match=message):
        enlarge(image)


def test_text_grows_with_the_picture():
    assert [font_size(*size) for size in ((640, 480), (1280, 960), (6400, 4800))] == [16, 32, 160]
    assert font_size(640, 30) == font_size(1, 1) == 14


def test_a_caption_is_a_bar_above_the_unchanged_picture():
    picture = gray(60, 640)
    captioned = add_caption(picture, "Ground truth")
    bar = captioned[:-60]
    assert (captioned[-60:] == picture).all()
    assert 14 < len(bar) < 60
    assert bar.max() == 255  # white text
    assert np.median(bar) < 64  # on a dark bar
    assert add_caption(picture, None) is picture


@pytest.mark.parametrize("caption", ["", "x" * 5000, "Größe = ½ · 数字\nzweite Zeile\x00"])
def test_any_caption_fits(caption):
    assert add_caption(gray(20, 640), caption).shape[1] == 640
    assert add_caption(gray(1, 1), caption).shape[1] == 1


def test_text_that_is_too_long_ends_in_an_ellipsis():
    font = load_font(16)
    assert fit("traffic light", font, 500) == "traffic light"
    short = fit("traffic light" * 50, font, 120)
    assert short.startswith("traffic l")
    assert short.endswith("…")
    assert 100 < text_width(short, font) <= 120
    assert fit("a\tb\n c\x07", font, 500) == "a b c?"
    assert fit("abc", font, 1) == ""


@pytest.mark.parametrize("letters", ["äöüß", "Жук", "λέξη", "ﺏ", "½"])
def test_letters_beyond_ascii_have_their_own_shapes(letters):
    pytest.importorskip("matplotlib")
    font = load_font(20, letters)
    missing = bytes(font.getmask("\U000fffff"))  # a private character, drawn as a box
    for letter in letters:
        assert bytes(font.getmask(letter)) not in (missing, bytes(font.getmask(" ")))


def test_letters_without_a_font_are_named_in_a_warning(caplog):
    pytest.importorskip("matplotlib")
    letter = "\U0001e2c0"  # Wancho, which hardly any font has
    load_font(20, letter)
    if "no installed font" in caplog.text:
        assert letter in caplog.text


def test_pictures_of_other_heights_stand_side_by_side():
    left, right = gray(50, 30, 10), gray(20, 40, 90)
    joined = side_by_side([left, right])
    assert len(joined) == 50
    assert (joined[:, :30] == 10).all()
    assert (joined[:20, -40:] == 90).all()
    assert (joined[20:, -40:] == 255).all()
    assert (joined[:, 30:-40] == 255).all()
    assert joined.shape[1] > 70
    assert (side_by_side([left]) == left).all()


def test_a_contact_sheet_has_rows_of_scaled_pictures():
    pictures = [gray(20, 40), gray(400, 100), gray(1, 1)]
    for channel, picture in enumerate(pictures):
        picture[..., channel] = 0
    sheet = contact_sheet(pictures, ["one", "two\nlines", ""], columns=2, cell_width=120)
    gap = 5
    assert sheet.shape[1] == gap + 2 * (120 + gap)
    for channel, size in enumerate((60 * 120, 120 * 30, 120 * 120)):
        assert (sheet == pictures[channel][0, 0]).all(2).sum() == size
    assert (sheet[gap:, gap : gap + 120] == pictures[0][0, 0]).all(2).any(1).sum() == 60
    one_row = contact_sheet(pictures, ["", "", ""], columns=4, cell_width=120)
    assert one_row.shape[:2] == (2 * gap + 120, gap + 3 * (120 + gap))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "pictures must not be empty"),
        (([gray(1, 1)], []), r"captions must be as many as pictures \(1\), got 0"),
        (([gray(1, 1), np.zeros((2, 2))], ["", ""]), r"pictures\[1\] must be an \(H, W, 3\)"),
        (([gray(1, 1)], [""], 0), "columns must be at least 1, got 0"),
        (([gray(1, 1)], [""], 1, 8), "cell_width must be at least 32, got 8"),
    ],
)
def test_wrong_arguments_of_a_contact_sheet_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(*arguments)
