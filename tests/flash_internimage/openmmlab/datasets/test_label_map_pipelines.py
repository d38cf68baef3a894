"""Test the training and test pipelines on images and label maps."""

import numpy as np
import pytest
import torch
from mmseg.models import SegDataPreProcessor
from PIL import Image

from flash_internimage.cli.demo_data import write_digits_scenes_ade20k
from flash_internimage.openmmlab.segmentation import CheckedSegDataset
from tests.flash_internimage.openmmlab.label_maps import (
    HEIGHT,
    TEST,
    TRAIN,
    WIDTH,
    arguments,
    label_map,
    reduced,
    write_labels,
)

DIGITS = ("background", *"0147")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("ade20k") / "scenes"
    write_digits_scenes_ade20k(root, train=20, val=2)
    return root


def scenes_dataset(root, split, pipeline, **kwargs):
    return CheckedSegDataset(
        data_root=str(root),
        data_prefix={"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"},
        metainfo={"classes": DIGITS},
        reduce_zero_label=True,
        pipeline=pipeline,
        **kwargs,
    )


def train_pipeline(crop):
    return [
        *TRAIN,
        {
            "type": "mmseg.RandomResize",
            "scale": (320, 160),
            "ratio_range": (0.5, 2.0),
            "keep_ratio": True,
        },
        {"type": "mmseg.RandomCrop", "crop_size": crop, "cat_max_ratio": 0.75},
        {"type": "mmseg.RandomFlip", "prob": 0.5},
        {"type": "mmseg.PhotoMetricDistortion"},
        {"type": "mmseg.PackSegInputs"},
    ]


def preprocessor(size):
    return SegDataPreProcessor(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=size,
        pad_val=0,
        seg_pad_val=255,
    )


def test_demo_scenes_contain_all_classes_and_ignore_crowds(scenes):
    dataset = scenes_dataset(scenes, "training", TRAIN)
    found = [set(np.unique(dataset[i]["gt_seg_map"])) for i in range(len(dataset))]
    assert set().union(*found) == {*range(5), 255}
    assert [i for i, labels in enumerate(found) if 255 in labels] == [19]


def test_crops_form_a_batch(scenes):
    dataset = scenes_dataset(scenes, "training", train_pipeline((64, 64)))
    items = [dataset[i] for i in range(4)]
    batch = {key: [item[key] for item in items] for key in ("inputs", "data_samples")}
    batch = preprocessor((64, 64))(batch, training=True)
    assert batch["inputs"].shape == (4, 3, 64, 64)
    for sample in batch["data_samples"]:
        assert sample.gt_sem_seg.data.shape == (1, 64, 64)
        assert sample.gt_sem_seg.data.max() < 5


def test_images_smaller_than_the_crop_are_padded_with_the_ignore_index(scenes):
    dataset = scenes_dataset(scenes, "training", train_pipeline((512, 512)))
    items = [dataset[i] for i in range(4)]
    shapes = [item["inputs"].shape[-2:] for item in items]
    assert max(max(shape) for shape in shapes) < 512
    before = [item["data_samples"].gt_sem_seg.data.clone() for item in items]
    batch = {key: [item[key] for item in items] for key in ("inputs", "data_samples")}
    batch = preprocessor((512, 512))(batch, training=True)
    for image, sample, labels, (height, width) in zip(
        batch["inputs"], batch["data_samples"], before, shapes, strict=True
    ):
        padded = torch.ones(512, 512, dtype=torch.bool)
        padded[:height, :width] = False
        assert (sample.gt_sem_seg.data[0][padded] == 255).all()
        assert (image[:, padded] == 0).all()
        torch.testing.assert_close(sample.gt_sem_seg.data[:, :height, :width], labels)


def test_images_with_only_ignored_labels_are_trained_on(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / f"{i}.jpg")
        write_labels(tmp_path, i, label_map(0, 1) if i else label_map(255))
    dataset = CheckedSegDataset(**arguments(tmp_path, pipeline=train_pipeline((8, 8))))
    assert (dataset[0]["data_samples"].gt_sem_seg.data == 255).all()


def test_labels_stay_aligned_with_their_pixels(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, (6, 8)).astype(np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    for kind, array in (("images", labels * 20), ("labels", labels)):
        (tmp_path / kind).mkdir()
        Image.fromarray(array).save(tmp_path / kind / "1.png")
    pipeline = [step for step in train_pipeline((64, 48)) if "Photo" not in step["type"]]
    dataset = CheckedSegDataset(
        **arguments(
            tmp_path,
            metainfo={"classes": [str(i) for i in range(11)]},
            reduce_zero_label=True,
            img_suffix=".png",
            pipeline=pipeline,
        )
    )
    np.random.seed(0)  # used by the transforms of mmcv and mmseg
    for _ in range(5):
        item = dataset[0]
        shown = item["inputs"][0].float() / 20  # the label in the file, blurred at edges
        expected = torch.where(shown.round() == 0, 255, shown.round() - 1)
        plain = (shown - shown.round()).abs() < 0.01
        agreeing = (item["data_samples"].gt_sem_seg.data[0] == expected)[plain]
        assert agreeing.numel() > 1000
        assert agreeing.float().mean() > 0.95  # a shift by one pixel: 0.88


def test_a_test_keeps_labels_at_the_original_size(scenes):
    pipeline = [*TEST, {"type": "mmseg.PackSegInputs"}]
    dataset = scenes_dataset(scenes, "validation", pipeline, test_mode=True)
    for i in range(2):
        sample = dataset[i]["data_samples"]
        values = np.asarray(Image.open(scenes / "annotations" / "validation" / f"00000{i + 1}.png"))
        expected = [[reduced(v) for v in row] for row in values.tolist()]
        np.testing.assert_array_equal(sample.gt_sem_seg.data[0], expected)
        assert sample.ori_shape == values.shape != sample.img_shape
