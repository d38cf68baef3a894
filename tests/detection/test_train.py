"""Test the training and test scripts on real images."""

import csv
import json
import pickle
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection import test as test_program
from flash_internimage.cli import analyze
from flash_internimage.openmmlab.cli.train import training_parser, training_runner
from flash_internimage.openmmlab.engine.hooks import curves
from flash_internimage.openmmlab.engine.runner.checkpoint_names import latest_checkpoint
from flash_internimage.openmmlab.safe_loading import read_checkpoint
from tests import runs
from tests.runs import log, tensorboard, train, train_until_killed, train_with_two_processes

evaluate = partial(runs.evaluate, test_program)


def figures(folder: Path) -> dict[str, float]:
    """Return the metrics of the last validation of a run."""
    scalars = curves.read_scalars(folder)
    return {name: values[max(values)] for name, values in scalars.items() if "coco/" in name}


@pytest.fixture(scope="module", params=["mask_rcnn", "dino"])
def trained(request, write_config, tmp_path_factory) -> tuple[Path, Path]:
    """Train two epochs, and return the config and the work folder."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_config(folder / f"trained_{request.param}.py", request.param)
    train(config, "--work-dir", folder / "run")
    return config, folder / "run"


def test_a_run_writes_checkpoints_scalars_and_curves(trained):
    config, folder = trained
    names = {path.name for path in folder.iterdir()}
    assert {"epoch_2.pth", "curves.png", config.name, "last_checkpoint"} <= names
    assert len([name for name in names if name.startswith("best_coco_bbox_mAP_epoch_")]) == 1
    assert "epoch_1.pth" not in names
    assert not list(folder.rglob("*.partial"))
    scalars = curves.read_scalars(folder)
    assert list(scalars["loss"]) == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(list(scalars["loss"].values())).all()
    assert list(scalars["coco/bbox_mAP"]) == [1, 2]
    assert "11 images" in log(folder)
    assert "1 without objects" in log(folder)


def test_the_test_program_gives_the_metrics_of_the_validation(trained, tmp_path):
    config, folder = trained
    arguments = (config, folder / "epoch_2.pth", "--work-dir", tmp_path)
    assert evaluate(*arguments) == pytest.approx(figures(folder), abs=1e-6)


def test_predictions_are_written_and_drawn(trained, tmp_path, monkeypatch):
    config, folder = trained
    arguments = ["test", config, folder / "epoch_2.pth", "--work-dir", tmp_path]
    arguments += ["--out", tmp_path / "new" / "predictions.pkl", "--show-dir", "pictures"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    test_program.main()
    predictions = pickle.loads((tmp_path / "new" / "predictions.pkl").read_bytes())
    assert [p["img_id"] for p in predictions] == [1, 2, 3, 4]
    assert all(len(p["pred_instances"]["bboxes"]) for p in predictions)
    pictures = sorted(tmp_path.glob("*/pictures/*.jpg"))
    assert len(pictures) == 4
    for path in pictures:
        picture = np.array(Image.open(path))
        assert picture.shape[1] > 2 * 640  # ground truth and prediction, enlarged
        bar = picture[:30, [200, -200]]  # their captions
        assert (bar < 80).all()


@pytest.mark.parametrize("trained", ["mask_rcnn"], indirect=True)
def test_the_report_has_the_metrics_of_the_validation(trained, scenes, tmp_path, capsys):
    config, folder = trained
    arguments = [config, folder / "epoch_2.pth", "-o", tmp_path, "--score-threshold", "0.02"]
    assert analyze.main([str(argument) for argument in arguments]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == pytest.approx(figures(folder), abs=1e-6)
    truth = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    with open(tmp_path / "images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["objects"]) for row in rows) == len(truth["annotations"])
    assert len(rows) == 4
    assert {"bbox_class_ap.png", "segm_class_ap.png", "missed.png", "report.md"} <= {
        path.name for path in tmp_path.iterdir()
    }


@pytest.mark.parametrize("trained", ["mask_rcnn"], indirect=True)  # the goldens cover DINO
def test_a_published_checkpoint_gives_the_same_metrics(trained, tmp_path):
    config, folder = trained
    state_dict = read_checkpoint(folder / "epoch_2.pth")["state_dict"]
    averaged = {f"ema_{name.replace('.', '_')}": t for name, t in state_dict.items()}
    published = {"state_dict": state_dict | averaged, "meta": {"CLASSES": list("0123456789")}}
    torch.save(published, tmp_path / "published.pth")
    arguments = (config, tmp_path / "published.pth", "--work-dir", tmp_path)
    assert evaluate(*arguments) == pytest.approx(figures(folder), abs=1e-6)


def test_mixed_precision_and_accumulation(tmp_path, trained):
    config, _ = trained
    runner = train(
        config, "--amp", "bf16", "--work-dir", tmp_path, "--cfg-options",
        "train_cfg.max_epochs=1", "optim_wrapper.accumulative_counts=2",
    )  # fmt: skip
    assert type(runner.optim_wrapper).__name__ == "BFloat16OptimWrapper"
    assert np.isfinite(list(curves.read_scalars(tmp_path)["loss"].values())).all()


def test_a_killed_run_resumes_from_its_last_checkpoint(write_config, tmp_path):
    settings = "train_cfg = dict(max_epochs=4, val_interval=4)\n"
    config = write_config(tmp_path / "killed.py", settings=settings)
    folder = tmp_path / "run"
    train_until_killed("detection", config, folder)
    (folder / "last_checkpoint").write_text("")  # as a killed run may leave it
    done = int(latest_checkpoint(folder).stem.split("_")[1])
    train(config, "--work-dir", folder, "--resume")
    assert f"resumed epoch: {done}, iter: {3 * done}" in log(folder)
    assert latest_checkpoint(folder).name == "epoch_4.pth"
    assert list(curves.read_scalars(folder)["loss"]) == list(range(1, 13))
    steps = tensorboard(folder)
    assert (steps["loss"], steps["coco/bbox_mAP"]) == (list(range(1, 13)), [12])


def test_two_processes_train_and_evaluate(write_config, tmp_path):
    settings = """
train_cfg = dict(max_epochs=1, val_interval=1)
train_dataloader = dict(batch_size=2)
model = dict(roi_head=dict(bbox_head=dict(
    type="ConvFCBBoxHead", num_shared_convs=1, num_shared_fcs=1, conv_out_channels=64,
    norm_cfg=dict(type="SyncBN"))))
"""
    config = write_config(tmp_path / "two.py", settings=settings)
    folder = tmp_path / "run"
    train_with_two_processes(config, folder)
    assert "GPU number: 2" in log(folder)
    assert list(curves.read_scalars(folder)["loss"]) == [1, 2, 3]
    alone = evaluate(config, folder / "epoch_1.pth", "--work-dir", tmp_path / "alone")
    assert figures(folder) == pytest.approx(alone, abs=1e-3)


def test_learning_rate_scales_with_the_batch_size(write_config, tmp_path):
    settings = "train_cfg = dict(max_epochs=1)\nparam_scheduler = []\n"
    config = write_config(tmp_path / "scaled.py", settings=settings)
    args = [str(config), "--auto-scale-lr", "--work-dir", str(tmp_path / "run")]
    runner = training_runner(training_parser("train", "").parse_args(args))
    runner.train()
    assert {group["lr"] for group in runner.optim_wrapper.optimizer.param_groups} == {1e-3 * 4 / 16}


@pytest.mark.parametrize("trained", ["mask_rcnn"], indirect=True)
def test_fine_tuning_loads_the_tensors_that_fit(write_config, tmp_path, trained):
    _, folder = trained
    settings = """
train_cfg = dict(max_epochs=1)
classes = ("0", "1", "2")
train_dataloader = dict(dataset=dict(metainfo=dict(classes=classes)))
val_dataloader = dict(dataset=dict(metainfo=dict(classes=classes)))
test_dataloader = val_dataloader
model = dict(roi_head=dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)))
"""
    config = write_config(tmp_path / "tuned.py", settings=settings)
    run = tmp_path / "run"
    train(config, "--work-dir", run, "--cfg-options", f"load_from={folder / 'epoch_2.pth'}")
    names = "roi_head.bbox_head.fc_cls.bias, roi_head.bbox_head.fc_cls.weight, "
    assert f"6 tensors stay randomly initialized: {names}" in log(run)


def test_damaged_images_do_not_stop_the_training(write_config, scenes, tmp_path):
    root = tmp_path / "scenes"
    shutil.copytree(scenes, root)
    (root / "train" / "000001.jpg").write_bytes(b"no image")
    (root / "train" / "000002.jpg").unlink()
    settings = "train_cfg = dict(max_epochs=1)\n"
    config = write_config(tmp_path / "damaged.py", settings=settings, root=root)
    train(config, "--work-dir", tmp_path / "run")
    text = log(tmp_path / "run")
    assert "left out: 1 missing images" in text
    assert f"left out: cannot read image {root}/train/000001.jpg: " in text


class TestErrors:
    """Errors are raised before the training starts."""

    def test_annotation_files(self, fails):
        settings = '{}_dataloader = dict(dataset=dict(ann_file="none.json"))\n'
        for split in ("train", "val"):
            fails(FileNotFoundError, "ann_file not found: .*/none.json", settings.format(split))

        settings = 'val_evaluator = dict(ann_file="none.json")\n'
        fails(FileNotFoundError, r"none\.json", settings)

    def test_classes(self, fails):
        settings = 'train_dataloader = dict(dataset=dict(metainfo=dict(classes=("cat",))))\n'
        fails(ValueError, r"metainfo\['classes'\] must list .*, got \('cat',\)", settings)

    def test_number_of_classes(self, fails):
        settings = "model = dict(roi_head=dict(mask_head=dict(num_classes=7)))\n"
        fails(AssertionError, r"`num_classes` \(7\) in FCNMaskHead .* 10\)", settings)

    def test_validation_images(self, fails, scenes, tmp_path):
        root = tmp_path / "scenes"
        shutil.copytree(scenes, root)
        (root / "val" / "000003.jpg").unlink()
        fails(FileNotFoundError, r"1 of the 4 images .*val/000003\.jpg", root=root)

    def test_mask_metrics_of_a_detector_without_masks(self, write_config, tmp_path):
        metric = 'dict(metric=["bbox", "segm"])\n'
        settings = f"val_evaluator = {metric}test_evaluator = {metric}"
        config = write_config(tmp_path / "masks.py", "dino", settings)
        message = r"^metric of the evaluator must not contain 'segm' .*, got \['bbox', 'segm'\]"
        with pytest.raises(ValueError, match=message):
            train(config, "--work-dir", tmp_path / "run")
        assert "Epoch(train)" not in log(tmp_path / "run")
        torch.save({"state_dict": {}}, tmp_path / "none.pth")
        with pytest.raises(ValueError, match=message):
            evaluate(config, tmp_path / "none.pth", "--work-dir", tmp_path / "test")

    def test_the_evaluator_requires_the_annotations_of_the_data(self, fails, scenes):
        settings = f'val_evaluator = dict(ann_file="{scenes}/annotations/instances_train.json")\n'
        fails(ValueError, r"instances_train\.json: image 1 \(000001\.jpg\) has .*, but", settings)

    def test_another_run_is_not_overwritten(self, write_config, tmp_path):
        (tmp_path / "epoch_3.pth").touch()
        with pytest.raises(ValueError, match=r"epoch_3\.pth exists: pass --resume to continue"):
            train(write_config(tmp_path / "c.py"), "--work-dir", tmp_path)

    def test_configs_and_checkpoints(self, write_config, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config not found: none\.py"):
            train("none.py")
        config = write_config(tmp_path / "c.py")
        with pytest.raises(FileNotFoundError, match=r"checkpoint not found: none\.pth"):
            train(config, "--resume", "none.pth", "--work-dir", tmp_path)
        with pytest.raises(FileNotFoundError, match=r"checkpoint not found: none\.pth"):
            evaluate(config, "none.pth", "--work-dir", tmp_path)
        with pytest.raises(ValueError, match=r"--out must end in \.pkl or \.pickle, got x\.json"):
            evaluate(config, "none.pth", "--out", "x.json")
        (tmp_path / "x.pkl").mkdir()
        with pytest.raises(ValueError, match=r"--out must be a file, got the folder .*x\.pkl"):
            evaluate(config, "none.pth", "--out", tmp_path / "x.pkl")
