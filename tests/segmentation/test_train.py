"""Test the training and test scripts on real images."""

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from PIL import Image

from flash_internimage.cli import analyze
from flash_internimage.openmmlab.engine.hooks import curves
from flash_internimage.openmmlab.engine.runner.checkpoint_names import latest_checkpoint
from flash_internimage.openmmlab.safe_loading import read_checkpoint
from segmentation import test as test_program
from tests import runs
from tests.runs import log, tensorboard, train, train_until_killed, train_with_two_processes

FIGURES = ("aAcc", "mIoU", "mAcc")
evaluate = partial(runs.evaluate, test_program)


def figures(folder: Path) -> dict[str, float]:
    """Return the metrics of the last validation of a run."""
    scalars = curves.read_scalars(folder)
    return {name: scalars[name][max(scalars[name])] for name in FIGURES}


@pytest.fixture(scope="module", params=["upernet", "mask2former"])
def trained(request, write_config, tmp_path_factory) -> tuple[Path, Path]:
    """Train four iterations, and return the config and the work folder."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_config(folder / f"trained_{request.param}.py", request.param)
    train(config, "--work-dir", folder / "run")
    return config, folder / "run"


def test_a_run_writes_checkpoints_scalars_and_curves(trained):
    config, folder = trained
    names = {path.name for path in folder.iterdir()}
    assert {"iter_4.pth", "curves.png", config.name, "last_checkpoint"} <= names
    assert len([name for name in names if name.startswith("best_mIoU_iter_")]) == 1
    assert "iter_2.pth" not in names
    assert not list(folder.rglob("*.partial"))
    scalars = curves.read_scalars(folder)
    assert list(scalars["loss"]) == [1, 2, 3, 4]
    assert np.isfinite(list(scalars["loss"].values())).all()
    assert list(scalars["mIoU"]) == [2, 4]


def test_the_test_program_gives_the_metrics_of_the_validation(trained, tmp_path):
    config, folder = trained
    found = evaluate(config, folder / "iter_4.pth", "--work-dir", tmp_path)
    assert found == pytest.approx(figures(folder), abs=0.01)


@pytest.mark.parametrize("trained", ["upernet"], indirect=True)
def test_the_report_has_the_metrics_of_the_validation(trained, tmp_path):
    config, folder = trained
    arguments = [config, folder / "iter_4.pth", "-o", tmp_path, "--pictures", "2"]
    assert analyze.main([str(argument) for argument in arguments]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == pytest.approx(figures(folder), abs=0.01)
    with open(tmp_path / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    iou = [float(row["IoU (%)"]) for row in rows if row["IoU (%)"]]
    assert np.mean(iou) == pytest.approx(summary["mIoU"], abs=0.01)
    assert (tmp_path / "worst.png").is_file()


def test_label_maps_are_written_and_drawn(trained, scenes, tmp_path):
    config, folder = trained
    arguments = ["--work-dir", tmp_path, "--out", tmp_path / "maps", "--show-dir", "pictures"]
    found = evaluate(config, folder / "iter_4.pth", *arguments)
    right, valid = 0, 0
    for path in sorted((tmp_path / "maps").iterdir()):
        predicted = np.array(Image.open(path))
        truth = np.array(Image.open(scenes / "annotations" / "validation" / path.name))
        assert predicted.shape == truth.shape
        assert predicted.min() >= 1  # as in the files, where 0 is ignored
        right += (predicted == truth).sum()
        valid += (truth != 0).sum()
    assert found["aAcc"] == pytest.approx(100 * right / valid, abs=0.01)
    pictures = list((tmp_path / "pictures").rglob("*.png"))
    assert len(pictures) == 4
    for path in pictures:
        picture = np.array(Image.open(path))
        assert picture.shape[1] > 2 * 640  # ground truth and prediction, enlarged
        bar = picture[:30, [200, -200]]  # their captions
        assert (bar < 80).all()


def test_several_scales(trained, tmp_path):
    config, folder = trained
    arguments = (config, folder / "iter_4.pth", "--work-dir", tmp_path, "--tta")
    found = evaluate(*arguments, "--out", tmp_path / "maps")
    assert set(found) == set(FIGURES)
    assert len(list((tmp_path / "maps").iterdir())) == 4


def test_a_published_checkpoint_gives_the_same_metrics(trained, tmp_path):
    config, folder = trained
    state_dict = read_checkpoint(folder / "iter_4.pth")["state_dict"]
    published = {"state_dict": state_dict, "meta": {"CLASSES": ["background", *"0147"]}}
    torch.save(published, tmp_path / "published.pth")
    found = evaluate(config, tmp_path / "published.pth", "--work-dir", tmp_path)
    assert found == pytest.approx(figures(folder), abs=0.01)


def test_mixed_precision_and_accumulation(trained, tmp_path):
    config, _ = trained
    runner = train(
        config, "--amp", "bf16", "--work-dir", tmp_path, "--cfg-options",
        "train_cfg.max_iters=2", "optim_wrapper.accumulative_counts=2",
    )  # fmt: skip
    assert type(runner.optim_wrapper).__name__ == "BFloat16OptimWrapper"
    assert np.isfinite(list(curves.read_scalars(tmp_path)["loss"].values())).all()


def test_a_killed_run_resumes_from_its_last_checkpoint(write_config, tmp_path):
    settings = """
train_cfg = dict(max_iters=12, val_interval=12)
default_hooks = dict(checkpoint=dict(interval=3))
"""
    config = write_config(tmp_path / "killed.py", settings=settings)
    folder = tmp_path / "run"
    train_until_killed("segmentation", config, folder)
    done = int(latest_checkpoint(folder).stem.split("_")[1])
    assert done < 12
    train(config, "--work-dir", folder, "--resume")
    assert f"resumed epoch: 0, iter: {done}" in log(folder)
    assert latest_checkpoint(folder).name == "iter_12.pth"
    assert list(curves.read_scalars(folder)["loss"]) == list(range(1, 13))
    steps = tensorboard(folder)
    assert (steps["loss"], steps["mIoU"]) == (list(range(1, 13)), [12])


# SyncBN does not work on CPUs: running statistics would differ between processes.
GROUP_NORM = "dict(norm_cfg=dict(_delete_=True, type='GN', num_groups=4))"
HEADS = {
    "upernet": f"model = dict(decode_head={GROUP_NORM}, auxiliary_head={GROUP_NORM})\n",
    "mask2former": "",
}


@pytest.mark.parametrize("family", HEADS)
def test_two_processes_train_and_evaluate(family, write_config, tmp_path):
    settings = "train_cfg = dict(max_iters=2)\ntrain_dataloader = dict(batch_size=2)\n"
    settings += HEADS[family]
    config = write_config(tmp_path / "two.py", family, settings)
    folder = tmp_path / "run"
    train_with_two_processes(config, folder)
    assert "GPU number: 2" in log(folder)
    assert list(curves.read_scalars(folder)["loss"]) == [1, 2]
    together = figures(folder)
    assert together == pytest.approx(evaluate(config, folder / "iter_2.pth"), abs=0.1)


def test_fine_tuning_loads_the_tensors_that_fit(write_config, scenes, trained, tmp_path):
    _, folder = trained
    family = folder.parent.name.rstrip("0123456789")
    settings = {
        "upernet": "model = dict(decode_head=dict(num_classes=6), "
        "auxiliary_head=dict(num_classes=6))\n",
        "mask2former": "model = dict(decode_head=dict("
        "num_classes=6, loss_cls=dict(class_weight=[1.0] * 6 + [0.1])))\n",
    }[family]
    settings += """
data = dict(metainfo=dict(classes=(*"0147", "background", "more")))
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=1)
"""
    config = write_config(tmp_path / "tuned.py", family, settings)
    run = tmp_path / "run"
    train(config, "--work-dir", run, "--cfg-options", f"load_from={folder / 'iter_4.pth'}")
    anew = {
        "upernet": "4 tensors stay randomly initialized: auxiliary_head.conv_seg.bias, "
        "auxiliary_head.conv_seg.weight, decode_head.conv_seg.bias, decode_head.conv_seg.weight",
        "mask2former": "2 tensors stay randomly initialized: decode_head.cls_embed.bias, "
        "decode_head.cls_embed.weight",
    }
    assert anew[family] in log(run).replace("decode_head.loss_cls.class_weight, ", "")


def copy_with_labels(scenes: Path, root: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Copy the scenes with other values in their label maps."""
    copytree(scenes, root)
    for path in root.glob("annotations/*/*.png"):
        Image.fromarray(change(np.array(Image.open(path)))).save(path)


@pytest.mark.parametrize("family", ["upernet", "mask2former"])
def test_label_maps_with_only_ignored_pixels(family, write_config, scenes, tmp_path):
    root = tmp_path / "scenes"
    copytree(scenes, root)
    for path in sorted(root.glob("annotations/training/*"))[:-1]:
        Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    settings = """
train_cfg = dict(max_iters=2)  # of eight images, without the last one
train_dataloader = dict(sampler=dict(_delete_=True, type="DefaultSampler", shuffle=False))
"""
    config = write_config(tmp_path / "ignored.py", family, settings, root)
    train(config, "--work-dir", tmp_path / "run")
    scalars = curves.read_scalars(tmp_path / "run")
    assert np.isfinite(list(scalars["loss"].values())).all()
    masks = [name for name in scalars if "loss" in name and "cls" not in name and name != "loss"]
    assert masks
    assert all(value == 0 for name in masks for value in scalars[name].values())


@pytest.mark.parametrize("family", ["upernet", "mask2former"])
def test_another_ignore_index_trains_like_255(family, write_config, scenes, tmp_path):
    """Images smaller than the crop are padded with the ignore index, too."""

    def change(labels: np.ndarray, ignored: int) -> np.ndarray:
        labels = labels - 1  # classes start at 1 in the scenes
        labels[20:60, 30:90] = ignored
        return labels

    settings = """
data = dict(reduce_zero_label=False, ignore_index={})
_base_.train_pipeline[3].crop_size = (160, 160)
model = dict(data_preprocessor=dict(size=(160, 160)))
train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline, **data))
val_dataloader = dict(dataset=data)
train_cfg = dict(max_iters=1)
randomness = dict(seed=0)
"""
    found = []
    for ignored in (255, 5):
        root, run = tmp_path / f"scenes_{ignored}", tmp_path / f"run_{ignored}"
        copy_with_labels(scenes, root, partial(change, ignored=ignored))
        config = write_config(tmp_path / "c.py", family, settings.format(ignored), root)
        train(config, "--work-dir", run)
        scalars = curves.read_scalars(run)
        names = [name for name in scalars if "loss" in name or name in FIGURES]
        found.append({name: scalars[name] for name in names})
    assert found[0]["loss"]
    assert found[1] == found[0]


def test_damaged_files_do_not_stop_the_training(write_config, scenes, tmp_path):
    root = tmp_path / "scenes"
    copytree(scenes, root)
    (root / "images" / "training" / "000001.jpg").write_bytes(b"no image")
    (root / "annotations" / "training" / "000002.png").write_bytes(b"no image")
    (root / "annotations" / "training" / "000003.png").unlink()
    small = Image.fromarray(np.ones((64, 64), np.uint8))
    small.save(root / "annotations" / "training" / "000004.png")
    config = write_config(tmp_path / "damaged.py", root=root)
    train(config, "--work-dir", tmp_path / "run")
    text = log(tmp_path / "run")
    assert "11 images; left out: 1 images without a label map; " in text
    assert f"left out: cannot read image {root}/images/training/000001.jpg: " in text
    assert f"left out: cannot read image {root}/annotations/training/000002.png: " in text
    assert "000004.png has (height, width) (64, 64), but its image (1" in text


class TestErrors:
    """Errors are raised before the training starts."""

    def test_missing_folders(self, fails):
        settings = '{}_dataloader = dict(dataset=dict(data_prefix=dict(img_path="none")))\n'
        for split in ("train", "val"):
            message = r"folder not found: data_prefix\['img_path'\] is '.*none'"
            fails(FileNotFoundError, message, settings.format(split))

    def test_number_of_classes(self, fails):
        settings = "model = dict(auxiliary_head=dict(num_classes=7))\n"
        fails(ValueError, r"model.auxiliary_head.num_classes must be 5, .* got 7$", settings)

    def test_unreadable_and_missing_label_maps(self, fails, scenes, tmp_path):
        root = tmp_path / "scenes"
        copytree(scenes, root)
        labels = root / "annotations" / "validation"
        (labels / "000003.png").write_bytes(b"")
        fails(ValueError, r"1 of the 4 images .*read image .*validation/000003\.png: ", root=root)
        (labels / "000003.png").unlink()
        fails(FileNotFoundError, r"1 of the 4 images .*validation/000003\.png", root=root)

    def test_invalid_values_of_label_maps(self, fails):
        settings = "train_dataloader = dict(dataset=dict(reduce_zero_label=False))\n"
        message = r"has invalid values \[5\]; with 5 classes and reduce_zero_label=False, 0 to 4"
        fails(ValueError, message, settings)
