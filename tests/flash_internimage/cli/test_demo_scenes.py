"""Tests of the scenes of digits, with the readers that OpenMMLab installs."""

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy.ndimage import binary_erosion
from sklearn.datasets import load_digits, load_sample_images
from sklearn.neighbors import KNeighborsClassifier

from flash_internimage.cli.demo_data import (
    SEGMENTED_DIGITS,
    SEGMENTED_LAYOUT,
    split_scenes,
    write_digits_scenes,
    write_digits_scenes_ade20k,
)
from flash_internimage.cli.demo_scenes import to_coco
from tests.demo_data import read_annotations

# The decoder of pycocotools predates NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    write_digits_scenes(root, train=40, val=20)
    return root


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
            for annotation in read_annotations(scenes, split)["annotations"]
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
        coco = read_annotations(scenes, split)
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


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory):
    root = tmp_path_factory.mktemp("ade20k") / "ade20k"
    write_digits_scenes_ade20k(root, train=40, val=20)
    return root


def images_and_maps(root, folder):
    for path in sorted((root / "images" / folder).iterdir()):
        labels = root / "annotations" / folder / f"{path.stem}.png"
        yield path, np.asarray(Image.open(path)), np.asarray(Image.open(labels))


@pytest.mark.parametrize(("split", "folder"), [("train", "training"), ("val", "validation")])
def test_label_maps_agree_with_the_masks_of_coco(split, folder, ade20k):
    scenes = split_scenes(40, 20, SEGMENTED_DIGITS, SEGMENTED_LAYOUT)[split]
    coco = COCO()
    coco.dataset = to_coco(scenes)
    coco.createIndex()
    found = set()
    for (path, image, labels), entry in zip(
        images_and_maps(ade20k, folder), coco.imgs.values(), strict=True
    ):
        assert path.name == entry["file_name"]
        assert labels.dtype == np.uint8
        assert labels.shape == image.shape[:2] == (entry["height"], entry["width"])
        annotations = coco.imgToAnns[entry["id"]]
        crowds = [a for a in annotations if a["iscrowd"]]
        digits = {0: 2, 1: 3, 4: 4, 7: 5}
        classes = {0: crowds} | {
            value: [a for a in annotations if a["category_id"] - 1 == digit and a not in crowds]
            for digit, value in digits.items()
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
    assert found == set(range(6))


def test_some_label_maps_are_empty_and_some_have_crowds(ade20k):
    for folder in ("training", "validation"):
        values = [set(np.unique(labels)) for _, _, labels in images_and_maps(ade20k, folder)]
        assert values.count({1}) == len(values) // 20
        assert sum(0 in each for each in values) == len(values) // 20


def test_colors_do_not_tell_the_classes_apart(ade20k):
    colors, classes = {}, {}
    for folder in ("training", "validation"):
        pairs = [
            (image[(labels == value) & binary_erosion(labels == value)].mean(0), value)
            for _, image, labels in images_and_maps(ade20k, folder)
            for value in range(2, 6)
            if binary_erosion(labels == value).any()
        ]
        colors[folder], classes[folder] = map(np.array, zip(*pairs, strict=True))
    model = KNeighborsClassifier(15).fit(colors["training"], classes["training"])
    assert model.score(colors["validation"], classes["validation"]) < 0.45  # by chance: 0.25
