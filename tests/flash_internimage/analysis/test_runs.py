"""Test the comparison of runs."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from flash_internimage.analysis.runs import compare_runs, read_run, read_runs

HEADER = "epoch,lr,train_loss,val_loss,val_top1,images_per_second\n"


def write_classifier(folder: Path, accuracies=(50, 75)) -> Path:
    folder.mkdir(parents=True)
    rows = [f"{i},0.1,{1 / i},nan,{top1},9\n" for i, top1 in enumerate(accuracies, start=1)]
    (folder / "metrics.csv").write_text(HEADER + "".join(rows) + "\0damaged,1\n")
    return folder


def write_attempt(folder: Path, name: str, rows: list[dict]) -> Path:
    (folder / name / "vis_data").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows) + '{"half'
    (folder / name / "vis_data" / "scalars.json").write_text(lines)
    return folder


def training(iteration: int, loss: float, **more) -> dict:
    return {"lr": 0.1, "loss": loss, "time": 1.0, "iter": iteration, "step": iteration, **more}


def test_a_classifier_has_a_value_per_epoch(tmp_path):
    run = read_run(write_classifier(tmp_path / "run"))
    assert (run.unit, run.length) == ("epoch", 2)
    assert run.scalars["val_top1"] == {1: 50, 2: 75}
    assert run.scalars["train_loss"] == {1: 1, 2: 0.5}
    assert "val_loss" not in run.scalars  # never finite


def test_validations_in_epochs_are_placed_at_the_iteration(tmp_path):
    first = [training(i, 9, epoch=1) for i in (5, 10)]
    first += [{"coco/bbox_mAP": 0.1, "time": 3.0, "step": 1}]
    second = [training(i, 8, epoch=2) for i in (15, 20)]
    second += [{"coco/bbox_mAP": 0.2, "time": 3.0, "step": 2}]
    run = read_run(write_attempt(tmp_path, "20260101_000000", first + second))
    assert run.unit == "iteration"
    assert run.scalars["coco/bbox_mAP"] == {10: 0.1, 20: 0.2}
    assert run.scalars["time"] == {5: 1.0, 10: 1.0, 15: 1.0, 20: 1.0}
    assert run.scalars["val/time"] == {10: 3.0, 20: 3.0}


def test_validations_in_iterations_keep_their_place(tmp_path):
    rows = [training(i, 9) for i in (1, 2, 3, 4)] + [{"mIoU": 31.5, "step": 4}]
    assert read_run(write_attempt(tmp_path, "a", rows)).scalars["mIoU"] == {4: 31.5}
    by_epoch = [training(i, 9, epoch=1 + (i > 4)) for i in range(1, 9)]
    by_epoch += [{"coco/bbox_mAP": 0.1, "step": 8}]
    run = read_run(write_attempt(tmp_path / "other", "a", by_epoch))
    assert run.scalars["coco/bbox_mAP"] == {8: 0.1}


def test_the_latest_attempt_of_a_run_counts(tmp_path):
    write_attempt(tmp_path, "20260101_000000", [training(i, 9) for i in (1, 2, 3)])
    write_attempt(tmp_path, "20260102_000000", [training(i, 7) for i in (3, 4)])
    assert read_run(tmp_path).scalars["loss"] == {1: 9, 2: 9, 3: 7, 4: 7}


def test_names_are_as_long_as_needed(tmp_path):
    folders = [write_classifier(tmp_path / name) for name in ("a/x", "b/x", "b/y")]
    assert [run.name for run in read_runs(folders)] == ["a/x", "b/x", "y"]


def test_runs_of_all_tasks_are_drawn_in_one_chart(tmp_path):
    folders = [
        write_classifier(tmp_path / "digits"),
        write_attempt(tmp_path / "boxes", "a", [training(1, 2), {"coco/bbox_mAP": 0.3, "step": 1}]),
        write_attempt(tmp_path / "maps", "a", [training(1, 2), {"mIoU": 30.0, "step": 1}]),
    ]
    compare_runs(read_runs(folders), tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000
    compare_runs(read_runs(folders), tmp_path / "chosen.svg", ["val_top1"])
    text = (tmp_path / "chosen.svg").read_text()
    assert text.count("progress") == 1


@pytest.mark.parametrize(
    ("row", "left_out"),
    [
        ({"loss": float("nan")}, 1),
        ({"loss": float("inf"), "lr": 10**400}, 2),
        ({"loss": True}, 0),
        ({"loss": 1.0, "step": True}, 0),
    ],
)
def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path, caplog, row, left_out):
    rows = [training(1, 9), {**{"iter": 2, "step": 2}, **row}]
    run = read_run(write_attempt(tmp_path, "a", rows))
    assert run.scalars["loss"] == {1: 9}
    assert [f"left out {left_out} values that are not finite" in caplog.text] == [left_out > 0]


def test_a_run_that_recorded_step_0_alone_is_drawn_beside_one_of_another_unit(tmp_path):
    folders = write_attempt(tmp_path / "b", "a", [training(0, 9)]), write_classifier(tmp_path / "c")
    compare_runs(read_runs(folders), tmp_path / "a.svg", ["lr"])
    assert (tmp_path / "a.svg").is_file()


def test_the_table_has_the_recorded_values(tmp_path):
    runs = read_runs([write_classifier(tmp_path / "digits")])
    compare_runs(runs, tmp_path / "curves.csv", ["val_top1"])
    with open(tmp_path / "curves.csv", newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [
        ("digits", "val_top1", "1", "epoch", "50.0"),
        ("digits", "val_top1", "2", "epoch", "75.0"),
    ]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["missing"], "RUN must be the folder of a run, got .*missing"),
        (["empty"], r"RUN must contain metrics.csv or \*/vis_data/scalars.json of a run"),
        (["digits", "digits"], "RUN must be given once, got .*digits twice"),
    ],
)
def test_folders_without_curves_are_errors(tmp_path, folders, message):
    (tmp_path / "empty").mkdir()
    write_classifier(tmp_path / "digits")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_runs([tmp_path / name for name in folders])


def test_a_run_without_the_main_metrics_needs_names(tmp_path):
    runs = read_runs([write_attempt(tmp_path / "run", "a", [{"PQ": 40.0, "step": 4}])])
    with pytest.raises(ValueError, match=r"--metrics must name what to draw, got none; known: PQ"):
        compare_runs(runs, tmp_path / "a.png")
    compare_runs(runs, tmp_path / "a.png", ["PQ"])
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("name", "metrics", "message"),
    [
        (
            "a.png",
            ["val_top2"],
            "must be recorded by a run, got 'val_top2'; did you mean",
        ),
        ("a.jpg", [], "-o must end in .png, .svg, .pdf or .csv, got a.jpg"),
    ],
)
def test_unknown_metrics_and_formats_are_errors(tmp_path, name, metrics, message):
    runs = read_runs([write_classifier(tmp_path / "digits")])
    with pytest.raises(ValueError, match=message):
        compare_runs(runs, Path(name), metrics)
