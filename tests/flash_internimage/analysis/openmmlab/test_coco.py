"""Test precision, recall and matched boxes against pycocotools and cases computed by hand."""

import contextlib
import io

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pycocotools.mask
import pytest

from flash_internimage.analysis.coco import evaluate_curves, match_boxes

CATEGORIES = [7, 3, 9]  # in the order of the classes: cat, dog, and bird, of which there is none
IMAGES = [1, 2, 5]
BOX, OTHER = [5, 5, 20, 20], [40, 40, 10, 10]


def annotation(identity, image, category, box, **more) -> dict:
    area = box[2] * box[3]
    return {
        "id": identity, "image_id": image, "category_id": category, "bbox": box, "area": area,
        "iscrowd": 0, **more,
    }  # fmt: skip


# The second image has two objects, and the last one has none.
OBJECTS = [annotation(1, 1, 7, BOX), annotation(2, 2, 7, BOX), annotation(3, 2, 3, OTHER)]
TRUTH = {
    "images": [{"id": i, "width": 64, "height": 64, "file_name": f"{i}.png"} for i in IMAGES],
    "categories": [{"id": i, "name": str(i)} for i in sorted(CATEGORIES)],
    "annotations": OBJECTS,
}
KEYS = ("image_id", "category_id", "bbox")
PERFECT = [{**{key: one[key] for key in KEYS}, "score": 0.9} for one in OBJECTS]


def curves(detections, truth=TRUTH, kind="bbox", images=IMAGES):
    return evaluate_curves(truth, detections, kind, categories=CATEGORIES, images=images)


def matches(detections, truth=TRUTH, score_threshold=0.3):
    chosen = {"categories": CATEGORIES, "images": IMAGES}
    return match_boxes(truth, detections, **chosen, score_threshold=score_threshold)


def errors(detections, **settings) -> dict[int, tuple[int, int]]:
    """Return the number of missed and false boxes of each image."""
    return {i: (one.missed, one.false) for i, one in matches(detections, **settings).items()}


def test_perfect_predictions_have_full_precision_and_no_errors():
    result = curves(PERFECT)
    np.testing.assert_array_equal(result.average_precision(), [1, 1, np.nan])
    np.testing.assert_array_equal(result.average_precision(0.5), [1, 1, np.nan])
    np.testing.assert_array_equal(result.recall.mean(0), [1, 1, np.nan])
    assert result.precision.shape == (10, 101, 3)
    assert errors(PERFECT) == {1: (0, 0), 2: (0, 0), 5: (0, 0)}


def test_one_missed_box_halves_the_recall_of_its_class():
    result = curves(PERFECT[1:])
    np.testing.assert_array_equal(result.recall.mean(0), [0.5, 1, np.nan])
    # Full precision up to a recall of 0.5, which is 51 of 101 recalls.
    assert result.average_precision()[0] == pytest.approx(51 / 101)
    assert errors(PERFECT[1:]) == {1: (1, 0), 2: (0, 0), 5: (0, 0)}


def test_swapped_classes_are_missed_and_false():
    swapped = [{**one, "category_id": 10 - one["category_id"]} for one in PERFECT]
    np.testing.assert_array_equal(curves(swapped).average_precision(), [0, 0, np.nan])
    assert errors(swapped) == {1: (1, 1), 2: (2, 2), 5: (0, 0)}


def test_a_box_in_an_empty_image_and_a_second_one_for_an_object_are_false():
    more = [{**PERFECT[0], "image_id": 5}, {**PERFECT[0], "score": 0.8}]
    assert errors(PERFECT + more) == {1: (0, 1), 2: (0, 0), 5: (0, 1)}
    kept = matches(PERFECT + more)[1]
    assert [one["score"] for one in kept.detections] == [0.9, 0.8]
    assert kept.correct.tolist() == [True, False]


def test_boxes_below_the_score_threshold_do_not_count():
    low = [{**one, "score": 0.29} for one in PERFECT]
    assert errors(low) == {1: (1, 0), 2: (2, 0), 5: (0, 0)}
    assert errors(low, score_threshold=0.29) == {1: (0, 0), 2: (0, 0), 5: (0, 0)}


def test_without_detections_everything_is_missed():
    np.testing.assert_array_equal(curves([]).average_precision(), [0, 0, np.nan])
    assert errors([]) == {1: (1, 0), 2: (2, 0), 5: (0, 0)}


def test_crowds_are_neither_missed_nor_are_boxes_in_them_false():
    crowd = {**TRUTH, "annotations": [*OBJECTS, annotation(9, 5, 7, [0, 0, 60, 60], iscrowd=1)]}
    assert errors(PERFECT, truth=crowd)[5] == (0, 0)
    inside = [*PERFECT, {**PERFECT[0], "image_id": 5}]
    assert errors(inside, truth=crowd)[5] == (0, 0)
    assert matches(inside, truth=crowd)[5].detections == []


def test_annotations_without_iscrowd_are_objects():
    plain = [{k: v for k, v in one.items() if k != "iscrowd"} for one in OBJECTS]
    assert errors(PERFECT, truth={**TRUTH, "annotations": plain}) == dict.fromkeys(IMAGES, (0, 0))
    assert curves(PERFECT, truth={**TRUTH, "annotations": plain}).average_precision()[0] == 1


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_curves_are_those_of_pycocotools(kind):
    random = np.random.default_rng(0)
    images = list(range(1, 13))

    def shape(box) -> dict:
        mask = np.zeros((64, 64), np.uint8, order="F")
        x, y, width, height = np.round(box).astype(int)
        mask[y : y + height, x : x + width] = 1
        rle = pycocotools.mask.encode(mask)
        return {"size": [64, 64], "counts": rle["counts"].decode()}

    objects, detections = [], []
    for i in range(60):
        box = random.uniform(4, 30, 4)
        image, category = int(random.choice(images)), int(random.choice(CATEGORIES[:2]))
        objects.append(annotation(i + 1, image, category, box.tolist(), segmentation=shape(box)))
        moved = box + random.normal(0, 1.5, 4)
        found = int(random.choice([category, *CATEGORIES]))
        detections.append(
            {
                "image_id": image,
                "category_id": found,
                "bbox": moved.tolist(),
                "score": float(random.uniform()),
                "segmentation": shape(moved),
            }
        )
    truth = {**TRUTH, "images": [{**TRUTH["images"][0], "id": i} for i in images]}
    truth["annotations"] = objects
    ours = curves(detections, truth, kind, images)

    coco = pycocotools.coco.COCO()
    coco.dataset = truth
    unused = "bbox" if kind == "segm" else "segmentation"
    given = [{k: v for k, v in one.items() if k != unused} for one in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        theirs = pycocotools.cocoeval.COCOeval(coco, coco.loadRes(given), kind)
        theirs.params.catIds, theirs.params.imgIds = CATEGORIES, images
        theirs.evaluate()
        theirs.accumulate()
    order = np.searchsorted(np.sort(CATEGORIES), CATEGORIES)
    precision = theirs.eval["precision"][:, :, order, 0, -1]
    np.testing.assert_allclose(ours.precision, np.where(precision < 0, np.nan, precision))
    recall = theirs.eval["recall"][:, order, 0, -1]
    np.testing.assert_allclose(ours.recall, np.where(recall < 0, np.nan, recall))
    assert 0.1 < np.nanmean(ours.average_precision()) < 0.9
    if kind == "bbox":
        at_half = theirs.eval["recall"][0, order, 0, -1]
        found = match_boxes(
            truth, detections, categories=CATEGORIES, images=images, score_threshold=0
        ).values()
        for category, expected in zip(CATEGORIES[:2], at_half[:2], strict=True):
            flags = [
                is_found
                for one in found
                for item, is_found in zip(one.truth, one.found, strict=True)
                if item["category_id"] == category
            ]
            assert np.mean(flags) == pytest.approx(expected)
