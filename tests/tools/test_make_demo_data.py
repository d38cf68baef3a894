import json
from functools import partial

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy.ndimage import binary_dilation, binary_erosion
from sklearn.datasets import load_digits, load_sample_images

from flash_internimage.cli.demo_data import (
    main,
    write_digits,
    write_digits_scenes,
    write_digits_scenes_ade20k,
)
from flash_internimage.cli.demo_scenes import Instance, Scene

# The decoder of pycocotools predates NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "digits"
    write_digits(root)
    return root


def contents(root):
    return {file.relative_to(root): file.read_bytes() for file in root.rglob("*.*")}


def test_digits_are_written_as_a_stratified_image_folder(folder):
    files = sorted(folder.rglob("*.png"))
    counts = {
        split: [len(list((folder / split / str(i)).iterdir())) for i in range(10)]
        for split in ("train", "val")
    }
    assert (sum(counts["train"]), sum(counts["val"])) == (1437, 360)
    assert max(counts["val"]) - min(counts["val"]) <= 2
    assert len({file.stem for file in files}) == 1797  # no image in both splits


def test_images_show_the_digit_of_their_folder(folder):
    digits = load_digits()
    for file in sorted((folder / "val").rglob("*.png"))[::40]:
        with Image.open(file) as image:
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float) / 255 * 16
        index = int(file.stem)
        assert file.parent.name == str(digits.target[index])
        assert np.corrcoef(small.ravel(), digits.images[index].ravel())[0, 1] > 0.95


def test_the_split_is_deterministic(folder, tmp_path):
    write_digits(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    write_digits_scenes(root, train=40, val=20)
    return root


def annotations(root, split):
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


@pytest.fixture(params=["train", "val"])
def coco(scenes, request):
    return COCO(scenes / "annotations" / f"instances_{request.param}.json"), scenes / request.param


def test_coco_lists_all_images_with_their_sizes(coco):
    coco, folder = coco
    assert {image["file_name"] for image in coco.imgs.values()} == {
        f.name for f in folder.iterdir()
    }
    for image in coco.imgs.values():
        with Image.open(folder / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"])
            assert file.mode == "RGB"


def test_categories_are_the_ten_digits_and_all_occur(coco):
    coco, _ = coco
    names = {category["id"]: category["name"] for category in coco.cats.values()}
    assert names == {i + 1: str(i) for i in range(10)}
    assert {annotation["category_id"] for annotation in coco.anns.values()} == set(names)


def test_areas_and_boxes_match_the_masks(coco):
    coco, _ = coco
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        image = coco.imgs[annotation["image_id"]]
        assert mask.shape == (image["height"], image["width"])
        rows, columns = mask.nonzero()
        left, top, width, height = annotation["bbox"]
        assert mask.sum() == annotation["area"] > 0
        assert (columns.min(), columns.max() + 1) == (left, left + width)
        assert (rows.min(), rows.max() + 1) == (top, top + height)


def test_instances_do_not_overlap(coco):
    coco, _ = coco
    for annotations in coco.imgToAnns.values():
        assert sum(coco.annToMask(annotation) for annotation in annotations).max() == 1


def test_crowds_and_digits_with_holes_are_rle_and_others_polygons(coco):
    coco, _ = coco
    found = set()
    for annotation in coco.anns.values():
        background = 1 - np.pad(coco.annToMask(annotation), 1)
        regions, _ = cv2.connectedComponents(background, connectivity=8)  # Label 0 is the mask.
        has_holes = regions > 2
        expected = dict if annotation["iscrowd"] or has_holes else list
        assert isinstance(annotation["segmentation"], expected)
        found.add((annotation["iscrowd"], expected))
    assert found == {(0, list), (0, dict), (1, dict)}


def test_a_crowd_consists_of_many_small_digits(coco):
    coco, _ = coco
    crowds = [annotation for annotation in coco.anns.values() if annotation["iscrowd"]]
    assert 1 <= len(crowds) <= 2
    for crowd in crowds:
        assert len(crowd["sources"]) >= 12
        assert max(crowd["bbox"][2:]) <= 64


def test_some_images_are_empty_and_the_others_have_two_to_seven_objects(coco):
    coco, _ = coco
    counts = [len(coco.getAnnIds(imgIds=i)) for i in coco.imgs]
    assert 1 <= counts.count(0) <= 2
    assert set(counts) <= {0, 2, 3, 4, 5, 6, 7}


def test_annotations_match_the_drawn_digits(coco):
    coco, _ = coco
    digits = load_digits()
    likeness = []
    for annotation in coco.anns.values():
        labels = digits.target[annotation["sources"]]
        assert (labels == annotation["category_id"] - 1).all()
        if not annotation["iscrowd"]:
            left, top, width, height = annotation["bbox"]
            ink = coco.annToMask(annotation)[top : top + height, left : left + width]
            image = digits.images[annotation["sources"][0]]
            drawn = image[:, image.max(axis=0) >= 8].astype(np.float32)
            drawn = cv2.resize(drawn, (width, height))
            likeness.append(np.corrcoef(ink.ravel(), drawn.ravel())[0, 1])
    # The median is about 0.57 despite rotation and occlusion, and about 0.1 for other digits.
    assert np.median(likeness) > 0.4


def test_masks_match_the_colors_of_the_image(coco):
    coco, folder = coco
    for annotation in coco.anns.values():
        if annotation["iscrowd"]:
            continue
        image = cv2.imread(folder / coco.imgs[annotation["image_id"]]["file_name"]).astype(float)
        mask = coco.annToMask(annotation)
        inside = cv2.erode(mask, np.ones((3, 3))) == 1
        around = (cv2.dilate(mask, np.ones((7, 7))) - cv2.dilate(mask, np.ones((3, 3)))) == 1
        distance = np.linalg.norm(image - np.median(image[inside], axis=0), axis=-1)
        assert np.median(distance[inside]) < 20
        assert np.median(distance[around]) > 80


def test_splits_share_no_digit(scenes):
    train, val = (
        {
            i
            for annotation in annotations(scenes, split)["annotations"]
            for i in annotation["sources"]
        }
        for split in ("train", "val")
    )
    assert len(train) > 100
    assert len(val) > 50
    assert not train & val


def test_splits_share_no_background(scenes):
    photos = load_sample_images().images
    for split, begin, end in (("train", 0, 440), ("val", 440, 640)):
        coco = annotations(scenes, split)
        with_objects = {annotation["image_id"] for annotation in coco["annotations"]}
        empty = [image for image in coco["images"] if image["id"] not in with_objects]
        assert empty
        for image in empty:
            crop = np.asarray(Image.open(scenes / split / image["file_name"]))
            matches = [cv2.matchTemplate(photo, crop, cv2.TM_CCOEFF_NORMED) for photo in photos]
            best = max(matches, key=np.max)
            assert best.max() > 0.98  # JPEG is lossy.
            left = best.argmax() % best.shape[1]
            assert begin <= left
            assert left + image["width"] <= end


def test_scenes_are_deterministic_and_do_not_depend_on_their_number(tmp_path):
    for name, train in (("a", 4), ("b", 4), ("c", 6)):
        write_digits_scenes(tmp_path / name, train=train, val=2)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert len(a) == 4 + 2 + 2
    assert a == b
    assert all(c[path] == a[path] for path in a if path.suffix == ".jpg")
    first = annotations(tmp_path / "a", "train")["annotations"]
    assert first == annotations(tmp_path / "c", "train")["annotations"][: len(first)]


def test_label_map_encodes_crowds_background_and_digits():
    left, middle, right = np.zeros((3, 3, 4), bool)
    left[1, 0] = middle[:, 1] = right[:, 3] = True
    scene = Scene(
        np.zeros((3, 4, 3), np.uint8),
        [
            Instance(0, left, sources=(5,)),
            Instance(9, middle, sources=(6,)),
            Instance(9, right, sources=(7, 8), crowd=True),
        ],
    )
    expected = [[1, 11, 1, 0], [2, 11, 1, 0], [1, 11, 1, 0]]
    np.testing.assert_array_equal(scene.label_map(), np.array(expected, np.uint8), strict=True)


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory):
    root = tmp_path_factory.mktemp("ade20k") / "ade20k"
    write_digits_scenes_ade20k(root, train=40, val=20)
    return root


@pytest.mark.parametrize(("split", "folder"), [("train", "training"), ("val", "validation")])
def test_images_in_ade20k_layout_are_the_same_scenes_in_class_colors(split, folder, scenes, ade20k):
    images = contents(ade20k / "images" / folder)
    assert set(images) == set(contents(scenes / split))
    colors = {}
    for path in images:
        one, other = (
            np.array(Image.open(root / path), np.float32)
            for root in (ade20k / "images" / folder, scenes / split)
        )
        with Image.open((ade20k / "annotations" / folder / path).with_suffix(".png")) as file:
            labels = np.asarray(file)
        far_from_ink = ~binary_dilation(labels != 1, iterations=8)  # JPEG blurs edges.
        assert np.abs(one - other)[far_from_ink].mean() < 1
        inside = binary_erosion(labels > 1, iterations=2)
        for label in np.unique(labels[inside]):
            colors.setdefault(label, []).append(one[inside & (labels == label)].mean(0))
    assert set(colors) == set(range(2, 12))
    centers = np.array([np.median(colors[label], axis=0) for label in range(2, 12)])
    for i, label in enumerate(range(2, 12)):
        nearest = [np.linalg.norm(centers - color, axis=1).argmin() for color in colors[label]]
        assert np.mean(np.array(nearest) == i) > 0.8
    maps = contents(ade20k / "annotations" / folder)
    assert {path.with_suffix(".jpg") for path in maps} == set(images)
    assert {path.suffix for path in maps} == {".png"}


@pytest.mark.parametrize(("split", "folder"), [("train", "training"), ("val", "validation")])
def test_label_maps_agree_with_the_masks_of_coco(split, folder, scenes, ade20k):
    coco = COCO(scenes / "annotations" / f"instances_{split}.json")
    found = set()
    for i, image in coco.imgs.items():
        name = image["file_name"].replace(".jpg", ".png")
        with Image.open(ade20k / "annotations" / folder / name) as file:
            assert file.mode == "L"
            labels = np.asarray(file)
        annotations = coco.imgToAnns[i]
        crowds = [a for a in annotations if a["iscrowd"]]
        classes = {0: crowds} | {
            digit + 2: [a for a in annotations if a["category_id"] - 1 == digit and a not in crowds]
            for digit in range(10)
        }
        covered = np.zeros(labels.shape, bool)
        for value, members in classes.items():
            union = np.zeros(labels.shape, bool)
            for annotation in members:
                union |= coco.annToMask(annotation) == 1
            np.testing.assert_array_equal(labels == value, union)
            covered |= union
        np.testing.assert_array_equal(labels == 1, ~covered)
        found |= set(np.unique(labels))
    assert found == set(range(12))


@pytest.mark.parametrize(
    "write",
    [
        write_digits,
        partial(write_digits_scenes, train=2, val=2),
        partial(write_digits_scenes_ade20k, train=2, val=2),
    ],
    ids=["digits", "scenes", "ade20k"],
)
def test_an_interrupted_write_leaves_no_partial_data_set(write, tmp_path, monkeypatch):
    save, saved = Image.Image.save, []

    def interrupted(self, path, **options):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "data")
    assert len(saved) == 3
    assert not (tmp_path / "data").exists()

    write(tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("arguments", "name", "root"),
    [
        ([], "digits", "data/digits"),
        (["--root", "elsewhere"], "digits", "elsewhere"),
        (["digits"], "digits", "data/digits"),
        (["digits-scenes"], "digits-scenes", "data/digits-scenes"),
        (["digits-scenes-ade20k"], "digits-scenes-ade20k", "data/digits-scenes-ade20k"),
    ],
)
def test_command_writes_the_named_data_set_once(arguments, name, root, tmp_path, monkeypatch):
    written = []

    def writer(name):
        def write(root):
            root.mkdir(parents=True)
            written.append((name, str(root)))

        return write

    for each in ("digits", "digits-scenes", "digits-scenes-ade20k"):
        function = f"write_{each.replace('-', '_')}"
        monkeypatch.setattr(f"flash_internimage.cli.demo_data.{function}", writer(each))
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    assert main(arguments) == 0  # The dataset exists.
    assert written == [(name, root)]
