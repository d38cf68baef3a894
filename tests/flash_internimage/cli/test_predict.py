"""Tests of `flash-internimage predict`."""

import csv
import json
import logging
import os
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
from faster_coco_eval import COCO as FasterCOCO
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from flash_internimage.cli import predict as command
from flash_internimage.files import partial_path, remove_partial_files
from flash_internimage.inference import load_predictor, read_rgb
from flash_internimage.inference.classifier import Classifier
from flash_internimage.inference.run import predict_sources
from tests import processes
from tests.nano import (
    CLASSIFIER,
    DETECTOR,
    LETTERS,
    SEGMENTOR,
)

SIZES = {"a.png": (40, 60), "gray.png": (32, 32), "deep/a.png": (33, 45)}
FRAMES = 5
DEFAULTS = {"tta": False, "device": "cpu", "dtype": "float32"}


@pytest.fixture(autouse=True)
def always_clean(one_thread, restore_scope):
    """Apply to all tests of this module."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder with three images, one of them gray."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep").mkdir()
    for i, (name, size) in enumerate(SIZES.items()):
        shape = size if name == "gray.png" else (*size, 3)
        pixels = np.random.default_rng(i).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Return a video of five frames at ten per second."""
    path = tmp_path_factory.mktemp("clip") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for i in range(FRAMES):
        writer.write(np.full((48, 64, 3), 50 * i, np.uint8))
    writer.release()
    return path


@pytest.fixture(scope="module")
def load():
    """Return a function that loads each predictor once."""
    loaded = {}

    def load(source, checkpoint, **options):
        key = getattr(source, "name", source), str(checkpoint), *sorted(options.items())
        if key not in loaded:
            loaded[key] = load_predictor(source, checkpoint, **options)
        return loaded[key]

    return load


@pytest.fixture
def run(weights, load, tmp_path, monkeypatch):
    """Return a function that predicts inputs into the folder that it returns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load_predictor", load)

    def run(model, *arguments, code=0, checkpoint=True) -> Path:
        given = [weights[model]] if checkpoint else []
        arguments = [str(a) for a in (model, *given, *arguments)]
        assert command.main([*arguments, "-o", "out"]) == code
        return Path("out")

    return run


def files(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != ".lock")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_classes_are_written_as_csv(run, photos, weights, load, capsys):
    out = run(CLASSIFIER, photos, "--batch-size", 2, "--top-k", 2)
    assert capsys.readouterr().out == "3 of 3 inputs predicted; results in out\n"
    pictures = ["pictures/a.jpg", "pictures/deep/a.jpg", "pictures/gray.jpg"]
    assert files(out) == [*pictures, "predictions.csv"]
    predictor = load(CLASSIFIER, weights[CLASSIFIER], top_k=2, **DEFAULTS)
    table = rows(out / "predictions.csv")
    assert [row["file_name"] for row in table[::2]] == list(SIZES)
    assert [row["rank"] for row in table] == ["1", "2"] * 3
    for i, name in enumerate(SIZES):
        [expected] = predictor([read_rgb(photos / name)])
        mine = table[2 * i : 2 * i + 2]
        assert [row["name"] for row in mine] == list(expected.names)
        assert [int(row["label"]) for row in mine] == expected.labels.tolist()
        np.testing.assert_allclose([float(r["score"]) for r in mine], expected.scores, atol=1e-5)
    with Image.open(out / "pictures" / "a.jpg") as picture:
        assert picture.width >= 640


@pytest.mark.slow
def test_objects_are_written_in_the_format_of_coco(run, photos, weights, load):
    out = run(DETECTOR, photos, "--score-threshold", 0.1005)
    written = ["images.json", "pictures/a.jpg", "pictures/deep/a.jpg", "pictures/gray.jpg"]
    assert files(out) == [*written, "predictions.json"]
    truth = COCO(str(out / "images.json"))
    predicted = truth.loadRes(str(out / "predictions.json"))
    assert len(FasterCOCO(str(out / "images.json")).loadRes(str(out / "predictions.json")).anns)
    assert [truth.cats[i + 1]["name"] for i in range(10)] == list(LETTERS[DETECTOR])
    predictor = load(DETECTOR, weights[DETECTOR], score_threshold=0.1005, **DEFAULTS)
    for image in truth.imgs.values():
        [expected] = predictor([read_rgb(photos / image["file_name"])])
        found = [a for a in predicted.dataset["annotations"] if a["image_id"] == image["id"]]
        assert 0 < len(found) == len(expected.boxes)
        assert {a["file_name"] for a in found} == {image["file_name"]}
        assert [a["category_id"] - 1 for a in found] == expected.labels.tolist()
        boxes = np.array([a["bbox"] for a in found])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, expected.boxes, atol=0.01)
        masks = np.stack([coco_mask.decode(a["segmentation"]) for a in found])
        np.testing.assert_array_equal(masks, expected.masks)


def test_label_maps_are_written_as_png(run, photos, weights, load):
    out = run(SEGMENTOR, photos, "--batch-size", 3, "--no-pictures")
    maps = ["label_maps/a.png", "label_maps/deep/a.png", "label_maps/gray.png"]
    assert files(out) == ["classes.txt", *maps]
    assert (out / "classes.txt").read_text().splitlines() == list(LETTERS[SEGMENTOR])
    predictor = load(SEGMENTOR, weights[SEGMENTOR], **DEFAULTS)
    for name in SIZES:
        with Image.open(out / "label_maps" / name) as image:
            assert image.mode == "L"
            labels = np.asarray(image)
        [expected] = predictor([read_rgb(photos / name)])
        np.testing.assert_array_equal(labels, expected.labels)


def test_unreadable_images_are_skipped_with_a_reason(run, photos, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes((photos / "a.png").read_bytes()[:100])
    Image.fromarray(np.zeros((1, 300, 3), np.uint8)).save("long.png")
    inputs = ["broken.png", photos / "a.png", "long.png"]
    out = run(CLASSIFIER, *inputs, "--batch-size", 3, code=1)
    output = capsys.readouterr()
    assert "1 of 3 inputs predicted, 2 skipped (see skipped.csv)" in output.out
    assert "skipped: cannot read image broken.png: " in output.err
    reasons = {Path(r["file_name"]).name: r["reason"] for r in rows(out / "skipped.csv")}
    assert reasons.keys() == {"broken.png", "long.png"}
    assert "200 times the other" in reasons["long.png"]
    assert {Path(row["file_name"]).name for row in rows(out / "predictions.csv")} == {"a.png"}
    run(CLASSIFIER, photos / "a.png")  # the next run has no reasons
    assert "skipped.csv" not in files(out)


def test_large_images_are_predicted_without_a_warning(run, photos, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # the image has 2400
    run(CLASSIFIER, photos / "a.png")
    assert not [w for w in recwarn if w.category is Image.DecompressionBombWarning]


def test_an_image_that_does_not_fit_into_memory_is_skipped(run, photos, monkeypatch):
    real = Classifier.__call__

    def call(self, images):
        if any(len(image) == 33 for image in images):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return real(self, images)

    monkeypatch.setattr(Classifier, "__call__", call)
    out = run(CLASSIFIER, photos, "--batch-size", 3, code=1)
    [skipped] = rows(out / "skipped.csv")
    assert skipped["file_name"] == "deep/a.png"
    assert skipped["reason"].endswith("not enough memory")
    assert len(rows(out / "predictions.csv")) == 10


@pytest.mark.parametrize("model", [CLASSIFIER, SEGMENTOR])
def test_videos(run, clip, weights, load, model):
    out = run(model, clip, "--batch-size", 2)
    assert {"videos/clip.jsonl", "videos/clip.mp4"} <= {*files(out)}
    frames = [json.loads(line) for line in (out / "videos" / "clip.jsonl").open()]
    assert [frame["frame"] for frame in frames] == list(range(FRAMES))
    assert [frame["seconds"] for frame in frames] == [0, 0.1, 0.2, 0.3, 0.4]
    capture = cv2.VideoCapture(str(out / "videos" / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == FRAMES
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 640
    capture.release()
    reader = cv2.VideoCapture(str(clip))
    image = [reader.read()[1] for _ in range(3)][2][..., ::-1]
    reader.release()
    [expected] = load(model, weights[model], **DEFAULTS)([np.ascontiguousarray(image)])
    if model == CLASSIFIER:
        assert [c["label"] for c in frames[2]["classes"]] == expected.labels.tolist()
        return
    labels = np.zeros(expected.labels.shape, np.uint8)
    for segment in frames[2]["segments"]:
        assert segment["name"] == LETTERS[SEGMENTOR][segment["label"]]
        mask = coco_mask.decode(segment["segmentation"])
        assert segment["share"] == pytest.approx(mask.mean(), abs=1e-5)
        labels[mask > 0] = segment["label"]
    np.testing.assert_array_equal(labels, expected.labels)


def test_a_part_of_a_video_and_a_damaged_one(run, clip, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    recorded = clip.read_bytes()
    frames = recorded.find(b"movi") + 4
    (tmp_path / "blank.avi").write_bytes(recorded[:frames] + bytes(len(recorded) - frames))
    out = run(CLASSIFIER, clip, "broken.mp4", "blank.avi", "--max-frames", 2, code=1)
    [video] = out.rglob("*.jsonl")
    assert len(video.read_text().splitlines()) == 2
    videos = sorted(path.name for path in (out / "videos").rglob("*.*"))
    assert videos == ["clip.jsonl", "clip.mp4"]
    reasons = [row["reason"] for row in rows(out / "skipped.csv")]
    assert reasons == ["cannot open video broken.mp4", "cannot read any frame of blank.avi"]


def test_a_camera_records_until_it_is_interrupted(run, clip, monkeypatch):
    capture = cv2.VideoCapture

    class Camera:
        """Plays three frames of the clip."""

        def __init__(self, number):
            assert number == 3
            self.capture, self.count = capture(str(clip)), 0

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def read(self):
            self.count += 1
            if self.count > 3:
                raise KeyboardInterrupt
            return self.capture.read()

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    out = run(CLASSIFIER, "3")
    assert files(out) == ["predictions.csv", "videos/camera_3.jsonl", "videos/camera_3.mp4"]
    assert len((out / "videos" / "camera_3.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (CLASSIFIER, ["missing.jpg"], "INPUT not found: missing.jpg"),
        (CLASSIFIER, ["99"], "INPUT: cannot open camera 99"),
        (CLASSIFIER, ["x.png", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (CLASSIFIER, ["x.png", "--tta"], "--tta must be used with a segmentor, got flash_"),
        (CLASSIFIER, ["x.png", "--score-threshold", "0"], "must be used with a detector"),
        (DETECTOR, ["x.png", "--score-threshold", "2"], "must be from 0 to 1, got 2.0"),
        (SEGMENTOR, ["x.png", "--top-k", "3"], "--top-k must be used with a classifier"),
        (CLASSIFIER, ["x.png", "--device", "tpu"], "device must be 'auto' or one of cpu"),
    ],
)
def test_wrong_arguments_are_one_line(model, arguments, message, run, caplog, tmp_path):
    Image.new("RGB", (8, 8)).save("x.png")
    run(model, *arguments, code=2)
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert message in record.getMessage()
    assert "\n" not in record.getMessage()
    assert not Path("out").exists()


def test_the_checkpoint_is_recognized_by_its_name():
    def parse(*arguments):
        parsed = command.parse_arguments([CLASSIFIER, *arguments, "-o", "out"])
        return parsed.checkpoint, parsed.inputs

    for name in ("a.pth", "a.SAFETENSORS", "https://a.org/b", "flash_internimage_tiny.in1k"):
        assert parse(name, "1.jpg", "2.jpg") == (name, ["1.jpg", "2.jpg"])
    for name in ("1.jpg", "photos", "0", "clip.mp4"):
        assert parse(name, "2.jpg") == (None, [name, "2.jpg"])
    with pytest.raises(SystemExit):
        parse("a.pth")


def test_the_checkpoint_may_be_an_option():
    arguments = [CLASSIFIER, "1.jpg", "--checkpoint", "weights", "-o", "out"]
    assert command.parse_arguments([*arguments, "--amp", "auto"]).amp == "auto"
    parsed = command.parse_arguments(arguments)
    assert (parsed.checkpoint, parsed.inputs, parsed.amp) == ("weights", ["1.jpg"], "off")
    with pytest.raises(SystemExit):
        command.parse_arguments([CLASSIFIER, "a.pth", "1.jpg", *arguments[2:]])


def test_a_missing_checkpoint_or_model_is_one_line(run, photos, caplog):
    run(CLASSIFIER, photos, code=2, checkpoint=False)
    assert "checkpoint must be given for flash_internimage_nano" in caplog.text
    run(CLASSIFIER, "missing.pth", photos, code=2, checkpoint=False)
    assert "checkpoint not found: missing.pth" in caplog.text


def test_partial_results_of_a_killed_run_are_removed(run, photos, tmp_path):
    (tmp_path / "out" / "videos" / "deep").mkdir(parents=True)
    for suffix in ("", ".mp4"):
        partial_path(tmp_path / "out" / "videos" / "deep" / "clip\n.mp4", suffix).touch()
    (tmp_path / "out" / "videos" / ".hidden").touch()
    out = run(CLASSIFIER, photos / "a.png")
    assert files(out) == ["pictures/a.jpg", "predictions.csv", "videos/.hidden"]


def test_file_names_that_are_not_utf_8(run, photos, tmp_path):
    name = os.fsdecode(b"photo\xff.png")
    Image.fromarray(read_rgb(photos / "a.png")).save(name)
    Path(os.fsdecode(b"text\xff.png")).write_text("no image")
    out = run(CLASSIFIER, ".", "--top-k", 1, code=1)
    assert [row["file_name"] for row in rows(out / "predictions.csv")] == ["photo\\udcff.png"]
    assert [row["file_name"] for row in rows(out / "skipped.csv")] == ["text\\udcff.png"]
    assert (out / "pictures" / name).with_suffix(".jpg").is_file()


def test_results_are_no_inputs_of_the_next_run(run, photos, tmp_path):
    Image.fromarray(read_rgb(photos / "a.png")).save("a.png")
    for _ in range(2):
        out = run(CLASSIFIER, ".")
        assert files(out) == ["pictures/a.jpg", "predictions.csv"]


def test_a_stopped_run_keeps_its_results(run, photos, monkeypatch, caplog):
    def stopping(predictor, sources, writer, **options):
        predict_sources(predictor, sources[:2], writer, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command, "predict_sources", stopping)
    out = run(CLASSIFIER, photos, "--top-k", 1, code=128 + signal.SIGTERM)
    assert [row["file_name"] for row in rows(out / "predictions.csv")] == ["a.png", "gray.png"]
    assert files(out) == ["pictures/a.jpg", "pictures/gray.jpg", "predictions.csv"]
    assert "stopped; out contains the results until then" in caplog.text
    remove_partial_files(out)


@pytest.mark.slow
def test_processes_share_the_inputs(photos, weights, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    arguments = [CLASSIFIER, weights[CLASSIFIER], photos, tmp_path / "broken.png"]
    command = ["-m", "flash_internimage", "predict", *arguments, "-o", tmp_path / "out"]
    first, second = processes.run_distributed(*command, "--top-k", 1)
    assert "3 of 4 inputs predicted, 1 skipped" in first.stdout, first.stderr
    assert (first.returncode, second.returncode) == (1, 1), second.stderr
    names = [Path(row["file_name"]).name for row in rows(tmp_path / "out" / "predictions.csv")]
    assert names == ["a.png", "gray.png", "a.png"]
    assert len(list((tmp_path / "out" / "pictures").rglob("*.jpg"))) == 3
    [skipped] = rows(tmp_path / "out" / "skipped.csv")
    assert skipped["file_name"].endswith("broken.png")
    assert not list((tmp_path / "out").glob("*.jsonl"))
