"""Tests that configs of `dataset config` load, train and evaluate."""

import numpy as np
import pytest
from PIL import Image

from flash_internimage.openmmlab.cli.config import load_config
from flash_internimage.own_data.config_coco import coco_config
from flash_internimage.own_data.config_label_maps import label_map_config
from flash_internimage.own_data.models import find_base_model
from tests.flash_internimage.own_data.datasets import (
    HEIGHT,
    WIDTH,
    annotation,
    write_coco,
    write_image,
    write_text,
)
from tests.runs import train

CLASSES = ("a", "b", "c")
FAST = ["train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"]
FAST += ["val_dataloader.num_workers=0", "val_dataloader.persistent_workers=False"]


@pytest.fixture
def coco(tmp_path):
    for split in ("train", "val"):
        for i in range(2):
            write_image(tmp_path / f"{split}/{i}.jpg", i)
        objects = [annotation(1, i + 1, 2, 3, 20, 20) for i in range(3)]
        path = tmp_path / f"annotations/instances_{split}.json"
        write_coco(path, ["0.jpg", "1.jpg"], objects, CLASSES)
    return tmp_path


@pytest.fixture
def maps(tmp_path):
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:10], labels[10:15], labels[15:20] = 1, 2, 11
    for split in ("train", "val"):
        for i in range(2):
            write_image(tmp_path / f"images/{split}/{i}.jpg", i)
            path = tmp_path / f"annotations/{split}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(path)
    return tmp_path


def numbers_of_classes(model) -> set[int]:
    """Return all values of num_classes in a model."""
    if isinstance(model, list | tuple):
        return {number for part in model for number in numbers_of_classes(part)}
    if not isinstance(model, dict):
        return set()
    found = {number for part in model.values() for number in numbers_of_classes(part)}
    return found | ({model["num_classes"]} if "num_classes" in model else set())


@pytest.mark.slow
def test_configs_of_detectors_have_the_classes_of_the_data(coco):
    for name in ("mask_rcnn-t", "cascade_mask_rcnn-l", "dino-t", "dino-internimage-l"):
        model = find_base_model(name, "detection")
        cfg = load_config(write_text(coco / "config.py", coco_config(coco, model)))
        assert numbers_of_classes(cfg.model) == {3}, name
        assert cfg.train_dataloader.dataset.metainfo.classes == CLASSES
        assert cfg.load_from == model.weights
        assert cfg.param_scheduler[1].end == cfg.train_cfg.max_epochs == 100
        assert cfg.val_evaluator.ann_file == f"{coco}/annotations/instances_val.json"


@pytest.mark.slow
def test_configs_of_segmentors_have_the_classes_of_the_data(maps):
    for name in ("upernet-t", "mask2former-t"):
        model = find_base_model(name, "segmentation")
        text = label_map_config(maps, model, CLASSES, ignore_index=11)
        cfg = load_config(write_text(maps / "config.py", text))
        assert numbers_of_classes(cfg.model) == {3}, name
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            dataset = loader.dataset
            assert dataset.type == "CheckedSegDataset"
            assert (dataset.ignore_index, dataset.reduce_zero_label) == (11, False)
        weights = cfg.model.decode_head.get("loss_cls", {}).get("class_weight")
        assert weights in (None, [1.0, 1.0, 1.0, 0.1])
        assert cfg.param_scheduler[1].end == cfg.train_cfg.max_iters + 1 == 2001


@pytest.mark.slow
def test_a_detector_trains_and_is_evaluated(coco, one_thread, restore_scope):
    text = coco_config(coco, find_base_model("mask_rcnn-nano", "detection"))
    config = write_text(coco / "config.py", text)
    settings = ["train_cfg.max_epochs=1", "train_cfg.val_interval=1"]
    settings += ["train_dataloader.dataset.filter_cfg.min_size=1"]
    runner = train(config, "--work-dir", coco / "run", "--cfg-options", *FAST, *settings)
    assert runner.iter == 1  # of the two images, one has objects
    assert runner.message_hub.get_scalar("val/coco/bbox_mAP").current() >= 0


@pytest.mark.slow
def test_pixels_of_another_ignore_index_count_neither_in_training_nor_in_evaluation(
    maps, one_thread, restore_scope
):
    text = label_map_config(
        maps, find_base_model("upernet-nano", "segmentation"), CLASSES, ignore_index=11
    )
    config = write_text(maps / "config.py", text)
    settings = [
        "train_cfg.max_iters=1",
        "train_cfg.val_interval=1",
        "train_dataloader.batch_size=2",
    ]
    runner = train(config, "--work-dir", maps / "run", "--cfg-options", *FAST, *settings)
    assert runner.iter == 1
    sample = runner.train_dataloader.dataset[0]["data_samples"].gt_sem_seg.data
    assert set(sample.unique().tolist()) <= {0, 1, 2, 255}
    assert 255 in sample
    # 5 of 30 rows are ignored: the metric has counted the others of both images.
    metric = runner.val_evaluator.metrics[0]
    counted = []
    compute = metric.intersect_and_union
    metric.intersect_and_union = lambda *args: counted.append(compute(*args)) or counted[-1]
    runner.val_loop.run()
    assert sum(int(areas[3].sum()) for areas in counted) == 2 * 25 * WIDTH
