"""Tests of the command visualize, with classifiers and a detector."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from flash_internimage.cli import visualize
from tests.flash_internimage.models import nano

NANO = "flash_internimage_nano"
MASK_RCNN = "mask_rcnn_flash_internimage_nano_fpn_digits_scenes"


@pytest.fixture(autouse=True)
def one_thread_each(one_thread) -> None:
    """Use one thread in every test of this module."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with the weights of models and an image of 50 x 40 pixels."""
    folder = tmp_path_factory.mktemp("visualize")
    torch.save({"model": nano(0, num_classes=10).state_dict()}, folder / "nano.pth")
    other = timm.create_model("test_byobnet", num_classes=10)
    torch.save({"model": other.state_dict()}, folder / "other.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    Image.fromarray(pixels).save(folder / "image-maps.png")
    (folder / "folder.png").mkdir()
    return folder


@pytest.fixture
def run(files, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in the folder, and returns its output."""
    monkeypatch.chdir(files)

    def run(*arguments: str) -> str:
        options = ("--device", "cpu", "-o", str(tmp_path / "new" / "out.png"))
        assert visualize.main([*arguments, *options]) == 0
        return capsys.readouterr().out

    return run


def size_of(path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        return picture.size


@pytest.mark.slow
def test_points_and_maps_of_a_classifier_are_drawn(run, tmp_path):
    arguments = ("--layer", "levels.1.blocks.0", "--pixel", "49,39", "--depth", "2", "--maps")
    output = run(NANO, "nano.pth", "image.png", *arguments)
    paths = [tmp_path / "new" / "out.png", tmp_path / "new" / "out-maps.png"]
    assert output.splitlines() == [str(path) for path in paths]
    assert all(size_of(path)[0] >= 640 for path in paths)
    assert sorted((tmp_path / "new").iterdir()) == sorted(paths)


@pytest.mark.slow
@pytest.mark.mm
@pytest.mark.usefixtures("restore_scope")
def test_points_of_a_detector_are_drawn_at_its_test_size(run, tmp_path, files, monkeypatch):
    from mmengine.registry import MODELS, DefaultScope

    from flash_internimage.configs import find_config
    from flash_internimage.openmmlab import detection  # noqa: F401  (registers the models)
    from flash_internimage.openmmlab.cli.config import read_config

    DefaultScope.get_instance("visualize", scope_name="mmdet")
    model = MODELS.build(read_config(find_config(MASK_RCNN)).model)
    meta = {"dataset_meta": {"classes": tuple("0123456789")}}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, tmp_path / "detector.pth")
    settings = []

    def draw(*arguments, preprocessing, **options):
        settings.append(preprocessing)
        return original(*arguments, preprocessing=preprocessing, **options)

    original = visualize.draw_sampling_points
    monkeypatch.setattr(visualize, "draw_sampling_points", draw)
    arguments = ("--layer", "backbone.levels.2.blocks.1", "--pixel", "3,4")
    run(MASK_RCNN, str(tmp_path / "detector.pth"), "image.png", *arguments)
    assert size_of(tmp_path / "new" / "out.png")[0] >= 640
    assert (settings[0].size, settings[0].max_size) == (128, 128)
    assert settings[0].mean == pytest.approx((123.675, 116.28, 103.53))


def test_options_reach_the_functions(run, monkeypatch):
    calls = []

    def draw(predictor, image, *arguments, preprocessing, **options):
        calls.append((image.shape, arguments, preprocessing.size, options))
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(visualize, "draw_sampling_points", draw)
    monkeypatch.setattr(visualize, "draw_maps", draw)
    basic = (NANO, "nano.pth", "image.png", "--layer", "levels.2.blocks.0", "--pixel", "3,4")
    run(*basic)
    run("--size", "96", "--depth", "3", *basic, "--max-points", "7", "--maps")
    ends = [f"levels.{name}" for name in
            ("0.blocks.0", "1.blocks.0", "2.blocks.0", "2.blocks.1", "3.blocks.0")]  # fmt: skip
    assert calls == [
        ((40, 50, 3), ("levels.2.blocks.0", (3, 4), 1), 64, {"max_points": 2000}),
        ((40, 50, 3), ("levels.2.blocks.0", (3, 4), 3), 96, {"max_points": 7}),
        ((40, 50, 3), ((3, 4), ends), 96, {}),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel": "3"}, "--pixel must be two integers X,Y, got '3'"),
        ({"pixel": "3,4,5"}, "--pixel must be two integers X,Y, got '3,4,5'"),
        ({"pixel": "50,0"}, "--pixel must be inside the image, from 0,0 to 49,39, got 50,0"),
        ({"depth": "0"}, "--depth must be at least 1, got 0"),
        ({"max-points": "0"}, "--max-points must be at least 1, got 0"),
        ({"size": "-1"}, "--size must be at least 1, got -1"),
        ({"output": "out.txt"}, "-o must end in .png, .jpg, .jpeg, .webp, got out.txt"),
        ({"output": "image.png/out.png"}, "-o image.png cannot be written"),
        ({"output": "./image.png"}, "-o must not overwrite image.png, got image.png"),
        ({"output": "image.png", "maps": None, "files": [NANO, "nano.pth", "image-maps.png"]},
         "-o must not overwrite image-maps.png, got image.png"),
        ({"output": "folder.png"}, "-o must be a file, got the folder folder.png"),
        ({"device": "gpu"}, "device must be 'auto' or one of cpu"),
        ({"files": [NANO, "nano.pth", "no.png"]}, "cannot read image no.png: "),
        ({"files": [NANO, "nano.pth", "nano.pth"]}, "cannot read image nano.pth: "),
        ({"files": [NANO, "a", "b", "c"]}, "must be NAME|CONFIG [CHECKPOINT] IMAGE, got 4"),
        ({"files": [NANO, "image.png"]}, f"checkpoint must be given for {NANO}"),
        ({"files": ["flash_nano", "image.png"]}, "got 'flash_nano'"),
        ({"files": [NANO, "no.pth", "image.png"]}, "no.pth"),
        ({"layer": "levels.9.blocks.0"}, "got 'levels.9.blocks.0'; did you mean 'levels."),
        ({"layer": "levels.0.downsample"}, "a Downsample without sampling points"),
        ({"depth": "5"}, "depth must be from 1 to 3, the layers from levels.2.blocks.0 down to "),
        ({"files": ["test_byobnet", "other.pth", "image.png"]},
         "model must contain a FlashInternImage or InternImage, got ByobNet"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(changes, message, files, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(files)
    settings = {
        "layer": "levels.2.blocks.0",
        "pixel": "3,4",
        "device": "cpu",
        "output": str(tmp_path / "out.png"),
        **changes,
    }
    inputs = settings.pop("files", [NANO, "nano.pth", "image.png"])
    options = [text for name, value in settings.items() for text in (f"--{name}", value) if text]
    assert visualize.main([*inputs, *options]) == 2
    assert message in caplog.records[-1].getMessage()
    assert "\n" not in caplog.records[-1].getMessage()
    assert not (tmp_path / "out.png").exists()


def test_a_lack_of_memory_is_one_line(files, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(files)
    monkeypatch.setattr(visualize, "draw_sampling_points", lambda *_, **__: torch.empty(2**52))
    options = ["--layer", "levels.2.blocks.0", "--pixel", "3,4", "--device", "cpu"]
    out = str(tmp_path / "out.png")
    assert visualize.main([NANO, "nano.pth", "image.png", *options, "-o", out]) == 2
    assert caplog.records[-1].getMessage().endswith("reduce it by --size")


def test_missing_arguments_are_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        visualize.main([NANO, "image.png"])
    assert "required: --layer, --pixel, -o/--output" in capsys.readouterr().err
