"""Tests of checking class folders."""

import pytest

from flash_internimage.own_data.check import Options, check_dataset
from flash_internimage.own_data.config_folder import folder_config
from flash_internimage.own_data.duplicates import find_similar

from .datasets import HEIGHT, WIDTH, write_image, write_text


@pytest.fixture
def root(tmp_path):
    """Return folders of the classes rose and tulip, and a config."""
    for split, count in (("train", 3), ("val", 2)):
        for k, name in enumerate(("rose", "tulip")):
            for i in range(count):
                seed = 100 * (split == "val") + 10 * k + i
                write_image(tmp_path / f"{split}/{name}/{i}.jpg", seed)
    write_text(tmp_path / "c.yaml", folder_config(tmp_path, "flash_internimage_nano", "c"))
    return tmp_path


def check(root, **options):
    findings = check_dataset(root / "c.yaml", Options(**options))
    faults = [(fault.split, fault.kind, fault.message) for fault in findings.report.faults]
    return findings, faults


def test_images_of_each_class_are_counted(root):
    findings, faults = check(root, pictures=True)
    train, val = findings.report.splits
    assert not faults
    assert dict(train.counts) == {"rose": 3, "tulip": 3}
    assert dict(val.counts) == {"rose": 2, "tulip": 2}
    assert train.sizes == {(HEIGHT, WIDTH): 6}
    assert (
        "class  train images  val images\nrose              3           2\n"
        in findings.report.text()
    )
    assert [caption for _, caption in findings.pictures][-1] == "val: tulip"


def test_faults_are_listed(root):
    write_text(root / "train/rose/0.jpg", "no image")
    write_text(root / "val/rose/0.jpg", "no")
    write_text(root / "train/tulip/notes.txt", "x")
    (root / "val/tulip/1.jpg").write_bytes((root / "train/rose/1.jpg").read_bytes())
    write_image(root / "val/lily/1.jpg", 50)
    findings, faults = check(root, similar=0)
    assert [(split, kind) for split, kind, _ in faults] == [
        ("train", "unreadable images"),
        ("val", "unreadable images"),
        ("val", "training refuses"),
        ("train and val", "identical images in several splits"),
    ]
    assert faults[0][2].startswith(f"cannot read image {root}/train/rose/0.jpg: ")
    assert faults[2][2] == "1 class is not in data.train_split=train (rose, tulip): lily"
    assert findings.report.splits[0].notes == ["6 images; other files: 1 .txt"]
    # A header alone tells that it is no image.
    _, by_header = check(root, decode=False)
    assert [kind for _, kind, _ in by_header] == [kind for _, kind, _ in faults]


def test_too_many_unreadable_images_and_too_few_classes_are_refused(root):
    for i in range(3):
        write_text(root / f"train/rose/{i}.jpg", "no image")
    _, faults = check(root, overrides={"data.max_corrupt": 2})
    assert faults[3] == (
        "train", "training refuses",
        "found 3 unreadable images, more than data.max_corrupt=2",
    )  # fmt: skip
    _, faults = check(root, overrides={"model.num_classes": 2, "data.val_split": "nowhere"})
    assert faults[-1][:2] == ("val", "training refuses")
    assert "must contain a folder 'nowhere'" in faults[-1][2]


def test_a_missing_class_folder_is_refused(root):
    for path in (root / "train/rose").iterdir():
        path.unlink()
    _, faults = check(root)
    assert faults[0][:2] == ("train", "training refuses")
    assert "1 class folders contain no images: rose" in faults[0][2]


def test_many_equal_images_are_few_faults(root):
    content = (root / "train/rose/1.jpg").read_bytes()
    for i in range(20):
        (root / f"train/rose/copy{i}.jpg").write_bytes(content)
        (root / f"val/rose/copy{i}.jpg").write_bytes(content)
    _, faults = check(root, similar=32)
    identical, *similar = faults
    assert identical[2].startswith(
        f"{root}/train/rose/1.jpg (train) = {root}/val/rose/copy0.jpg (val)"
    )
    assert identical[2].endswith(" and 31 more")
    # Of the 41 equal images, the first is compared with the 4 different images for validation.
    assert len(similar) <= 6 * 4


def test_further_similar_images_are_counted(root, monkeypatch):
    monkeypatch.setattr("flash_internimage.own_data.check.MAX_PAIRS", 3)
    _, faults = check(root, similar=32)
    total = len(find_similar(check(root, similar=32)[0].hashes, 32, 100)[0])
    assert len(faults) == 4
    assert faults[-1] == (
        "all splits",
        "similar images in several splits",
        f"{total - 3} further pairs",
    )
