import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from tools.make_demo_data import write_digits


def test_digits_are_written_as_a_stratified_image_folder(tmp_path):
    write_digits(tmp_path / "digits")
    files = sorted((tmp_path / "digits").rglob("*.png"))
    counts = {
        split: [len(list((tmp_path / "digits" / split / str(i)).iterdir())) for i in range(10)]
        for split in ("train", "val")
    }
    assert (sum(counts["train"]), sum(counts["val"])) == (1437, 360)
    assert max(counts["val"]) - min(counts["val"]) <= 2
    assert len({file.stem for file in files}) == 1797  # no image in both splits


def test_an_image_shows_the_digit_that_its_folder_names(tmp_path):
    write_digits(tmp_path / "digits")
    digits = load_digits()
    for file in sorted((tmp_path / "digits" / "val").rglob("*.png"))[::40]:
        with Image.open(file) as image:
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float) / 255 * 16
        index = int(file.stem)
        assert file.parent.name == str(digits.target[index])
        assert np.corrcoef(small.ravel(), digits.images[index].ravel())[0, 1] > 0.95


def test_writing_twice_gives_the_same_split(tmp_path):
    for name in ("a", "b"):
        write_digits(tmp_path / name)
    a, b = (
        {file.relative_to(root): file.read_bytes() for file in root.rglob("*.png")}
        for root in (tmp_path / "a", tmp_path / "b")
    )
    assert a == b
