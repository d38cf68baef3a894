"""Tests of the zoo's commands on files in the published format, with a local server as the hub."""

import json
import re
import shlex
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import timm
import torch
import yaml
from PIL import Image
from torch import Tensor

from flash_internimage.checkpoints import (
    Entry,
    convert_state_dict,
    find_mismatches,
    load_checkpoint,
    read_zoo,
)
from flash_internimage.cli import zoo as tool
from flash_internimage.cli import zoo_evaluation
from flash_internimage.openmmlab import FlashInternImageBackbone
from tests.flash_internimage.openmmlab.goldens import arrays
from tests.recipes import ROOT, published_shapes, read_recipes
from tests.servers import FileServer, serve, use_as_hub, use_own_caches

NANO = "flash_internimage_nano.untrained"
ON_HUB = "/OpenGVLab/DCNv4/resolve/main"
HUB = f"https://huggingface.co{ON_HUB}"
GOLDENS = ("cascade", "dino", "mask2former", "mask_rcnn", "upernet")
CLASSES = ("cup", "bowl")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch, one_thread) -> None:
    use_own_caches(monkeypatch, tmp_path / "caches")


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """Return the weights of a classifier that always predicts class 3."""
    torch.manual_seed(0)
    weights = timm.create_model("flash_internimage_nano").state_dict()
    weights["head.weight"].zero_()
    weights["head.bias"][3] = 1.0
    return weights


@pytest.fixture
def server(weights, tmp_path, monkeypatch, digits_config) -> FileServer:
    """Serve that classifier in a published container as the hub, as the zoo's only entry."""
    published = tmp_path / "published.pth"
    config = SimpleNamespace(MODEL="nano")
    averaged = {"model": {}, "model_ema": weights, "config": config, "epoch": 299}
    torch.save(averaged, published)
    entry = Entry(
        task="classification",
        architecture="FlashInternImage",
        backbone="T",
        pretraining="ImageNet-1K",
        config=str(digits_config),
        addresses=[f"{HUB}/nano.pth"],
        resolution=32,
        parameters=1,
        published={"top1": 9.9},
    )
    monkeypatch.setattr(tool, "read_zoo", lambda: {NANO: entry})
    with serve({f"{ON_HUB}/nano.pth": published.read_bytes()}) as server:
        use_as_hub(monkeypatch, server.address)
        yield server


@pytest.fixture
def digits_config(tmp_path) -> Path:
    path = tmp_path / "nano.yaml"
    settings = {"model": {"name": "flash_internimage_nano"}, "data": {"image_size": 32}}
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """Write two images for each of ten classes."""
    for label in range(10):
        folder = tmp_path / "data" / "val" / str(label)
        folder.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 32), (20 * label, 100 * i, 0)).save(folder / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def run(capsys, caplog) -> Callable[..., str]:
    """Return a function that runs a command and returns its standard output."""

    def run(*arguments) -> str:
        assert tool.main([str(argument) for argument in arguments]) == 0, caplog.text
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(caplog) -> Callable[..., str]:
    """Return a function that runs a failing command and returns the logged error."""

    def refused(*arguments) -> str:
        assert tool.main([str(argument) for argument in arguments]) == 2
        return caplog.records[-1].getMessage()

    return refused


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(actual[name].equal(expected[name]) for name in expected)


# list, info, download


def test_every_entry_is_listed_with_its_figures(run):
    head, *lines = run("list").splitlines()
    assert head.split()[:2] == ["name", "parameters"]
    assert [line.split()[0] for line in lines] == list(read_zoo())
    [line] = (line for line in lines if line.startswith("mask_rcnn_flash_internimage_b_fpn_3x"))
    assert line.split(maxsplit=1)[1] == "115.2 M  box_ap 50.6, mask_ap 45.4"


def test_entries_are_listed_by_task_and_family(run):
    _, *lines = run("list", "--task", "segmentation", "--family", "InternImage").splitlines()
    names = {line.split()[0] for line in lines}
    assert "mask2former_internimage_h_896_80k_cocostuff2ade20k" in names
    assert {name for name in names if not name.startswith("mask2former")} == {
        f"upernet_internimage_{size}_160k_ade20k"
        for size in ("t_512", "s_512", "b_512", "l_640", "xl_640", "h_896")
    }


@pytest.mark.usefixtures("server")
def test_a_downloaded_file_is_found_by_info(run):
    assert yaml.safe_load(run("info", NANO))[NANO]["file"] == "not downloaded"
    path = run("download", NANO).strip()
    assert load_checkpoint(path)["epoch"] == 299
    info = yaml.safe_load(run("info", NANO))[NANO]
    assert (info["file"], info["published"]) == (path, {"top1": 9.9})
    assert run("download", NANO, "--offline").strip() == path


def test_a_missing_file_is_one_error(server, refused):
    assert "nano.pth failed: not in the cache (" in refused("download", NANO, "--offline")
    server.files.clear()
    assert f"download of {HUB}/nano.pth failed: 404" in refused("download", NANO)


def test_a_login_page_is_not_cached(server, refused, run):
    whole = dict(server.files)
    server.files = dict.fromkeys(whole, b"<html>Log in</html>")
    assert "not a complete checkpoint: it begins with b'<html>" in refused("download", NANO)
    server.files = whole
    assert load_checkpoint(run("download", NANO).strip())["epoch"] == 299


def test_timm_and_openmmlab_use_the_same_file(server, weights, run):
    run("download", NANO)
    address = f"{HUB}/nano.pth"
    model = timm.create_model(
        "flash_internimage_nano", pretrained=True, pretrained_cfg_overlay={"url": address}
    )
    assert_equal(model.state_dict(), weights)
    init_cfg = {"type": "Pretrained", "checkpoint": address}
    backbone = FlashInternImageBackbone("nano", layer_scale=None, init_cfg=init_cfg)
    backbone.init_weights()
    own = backbone.state_dict()
    assert_equal(own, {name: weights[name] for name in own})
    files = [path for method, path, _ in server.requests if method == "GET"]
    assert [path for path in files if path.endswith(".pth")] == [f"{ON_HUB}/nano.pth"]


# convert


def published_container(folder: str, path: Path) -> dict[str, Tensor]:
    """Write a golden in the format of mmdet 2 and mmseg 0 with EMA buffers; return its weights."""
    published = arrays(f"{folder}/state_dict")
    buffers = {f"ema_{name.replace('.', '_')}": tensor + 1 for name, tensor in published.items()}
    meta = {"CLASSES": CLASSES, "PALETTE": [[0, 0, 0]], "env": SimpleNamespace(), "epoch": 12}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
    state_dict = OrderedDict(published | buffers)
    torch.save({"meta": meta, "state_dict": state_dict, "optimizer": optimizer}, path)
    return published


@pytest.mark.parametrize("folder", GOLDENS)
def test_conversion_of_a_published_container_is_reversible(folder, run, tmp_path):
    old, new, back = (tmp_path / f"{name}.pth" for name in ("old", "new", "back"))
    published = published_container(folder, old)
    assert run("convert", old, "-o", new) == f"{new}\n"
    converted = load_checkpoint(new)
    assert converted.keys() == {"state_dict", "meta"}
    dataset = {"classes": CLASSES, "palette": [[0, 0, 0]]}
    assert converted["meta"] == {"epoch": 12, "dataset_meta": dataset}
    moved = published.keys() - converted["state_dict"].keys()
    assert bool(moved) == (folder in ("dino", "mask2former"))
    run("convert", new, "-o", back, "--published")
    restored = load_checkpoint(back)
    assert_equal(restored["state_dict"], published)
    assert restored["meta"] == {"epoch": 12, "CLASSES": CLASSES, "PALETTE": [[0, 0, 0]]}


@pytest.mark.parametrize("folder", GOLDENS)
def test_safetensors_contain_the_same_weights_and_classes(folder, run, tmp_path):
    old, new, tensors = tmp_path / "old.pth", tmp_path / "new.pth", tmp_path / "new.safetensors"
    published = published_container(folder, old)
    run("convert", old, "-o", new)
    run("convert", old, "-o", tensors)
    assert_equal(load_checkpoint(tensors), load_checkpoint(new)["state_dict"])
    with safetensors.safe_open(tensors, "pt") as file:
        assert json.loads(file.metadata()["dataset_meta"])["classes"] == list(CLASSES)
    run("convert", tensors, "-o", new, "--published")
    assert_equal(load_checkpoint(new)["state_dict"], published)


RELEASED = [
    "mask_rcnn_flash_internimage_s_fpn_3x_coco",
    "cascade_mask_rcnn_flash_internimage_l_fpn_3x_coco",
    "dino-4scale_flash_internimage_t_1x_coco",
    "mask_rcnn_internimage_b_fpn_1x_coco",
    "cascade_mask_rcnn_internimage_xl_fpn_3x_coco",
    "dino-4scale_internimage_l_layer_wise_lr_1x_coco",
    "upernet_internimage_h_896_160k_ade20k",
    "upernet_flash_internimage_b_512_160k_ade20k",
    "mask2former_flash_internimage_l_640_160k_ade20k",
]


@pytest.mark.parametrize("name", RELEASED)
def test_converted_schemas_fit_their_models(name):
    recipes = read_recipes("detection_recipes.csv") | read_recipes("segmentation_recipes.csv")
    shapes = convert_state_dict(published_shapes(recipes[name]))
    converted = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    own = tool.build_model(name, read_zoo()[name]).state_dict()
    assert find_mismatches(own, converted) == []


@pytest.mark.usefixtures("server")
def test_a_released_classifier_is_converted_by_its_name(weights, run, tmp_path):
    out, tensors = tmp_path / "out.pth", tmp_path / "out.safetensors"
    run("convert", NANO, "-o", out)
    assert_equal(load_checkpoint(out)["state_dict"], weights)
    run("convert", out, "--model", NANO, "-o", tensors)
    assert_equal(load_checkpoint(tensors), weights)


@pytest.mark.usefixtures("server")
def test_every_name_that_does_not_fit_is_reported(weights, refused, run, tmp_path, caplog):
    source, out = tmp_path / "source.pth", tmp_path / "out.pth"
    missing = [name for name in weights if ".mlp." in name]
    assert len(missing) > 10
    state_dict = {name: weight for name, weight in weights.items() if name not in missing}
    state_dict |= {"neck.weight": torch.zeros(1), "patch_embed.conv1.bias": torch.zeros(3)}
    torch.save({"model": state_dict}, source)
    arguments = ("convert", source, "--model", NANO, "-o", out)
    report = [
        *(f"missing: {name}" for name in missing),
        "unexpected: neck.weight",
        "shape of patch_embed.conv1.bias: (3,), expected (16,)",
    ]
    message = refused(*arguments)
    assert message.startswith(f"{source} does not match {NANO}, see above; --partial writes")
    assert [record.getMessage() for record in caplog.records[-len(report) - 1 : -1]] == report
    assert not out.exists()
    caplog.clear()
    run(*arguments, "--partial")
    assert [record.getMessage() for record in caplog.records] == report
    gone = {*missing, "patch_embed.conv1.bias"}
    assert load_checkpoint(out)["state_dict"].keys() == weights.keys() - gone


def test_conversion_without_a_model_logs_that_nothing_was_compared(run, tmp_path, caplog):
    torch.save({"neck.weight": torch.zeros(1)}, tmp_path / "a.pth")
    run("convert", tmp_path / "a.pth", "-o", tmp_path / "b.pth")
    assert "a.pth are not compared with a model; see --model" in caplog.text


def test_a_missing_folder_or_source_is_one_error(refused, tmp_path):
    source, out = tmp_path / "a.pth", tmp_path / "none" / "b.pth"
    torch.save({"neck.weight": torch.zeros(1)}, source)
    assert f"output must be in an existing folder, got {out}" in refused(
        "convert", source, "-o", out
    )
    name = "dino-4scale_flash_internimage_tt_1x_coco"
    hint = "did you mean 'dino-4scale_flash_internimage_t_1x_coco'?"
    assert hint in refused("convert", name, "-o", tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("contents", "out", "message"),
    [
        ({"w": torch.ones(1)}, "out.onnx", "output must end in .safetensors or .pth, got"),
        ({"epoch": 3, "w": torch.ones(1)}, "out.pth", "only tensors, got also epoch"),
        ({1: torch.ones(1)}, "out.pth", "only tensors, got also 1"),
        ({"model": {}, "epoch": 3}, "out.pth", "must contain weights and nothing"),
        (
            {"neck.w": torch.ones(1), "neck.x": 1},
            "out.pth",
            "must contain weights and nothing else",
        ),
        ({"bbox_head.transformer.x": torch.ones(1)}, "out.pth", "unknown to such models"),
    ],
)
def test_unsupported_contents_are_one_error(contents, out, message, refused, tmp_path):
    torch.save(contents, tmp_path / "source.pth")
    assert message in refused("convert", tmp_path / "source.pth", "-o", tmp_path / out)
    assert not (tmp_path / out).exists()


# evaluate


@pytest.mark.usefixtures("server")
def test_evaluation_compares_with_the_published_figure(run, data, tmp_path, monkeypatch):
    monkeypatch.setitem(zoo_evaluation.IMAGES, "classification", 20)
    out = tmp_path / "result.json"
    text = run("evaluate", NANO, "--data", data, "--device", "cpu", "--json", out)
    result = json.loads(out.read_text())
    assert json.loads(text.splitlines()[-1]) == result
    row = {"measured": 10.0, "published": 9.9, "difference": 0.1, "reproduced": True}
    assert (result["images"], result["figures"]) == (
        20,
        {"top1": row},
    )  # two of twenty images are of class 3
    assert text.splitlines()[-2].split() == ["top1", "10.00", "9.9", "0.1"]


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(("arguments", "images"), [(["--limit", "10"], 10), ([], 20)])
def test_a_subset_of_the_images_does_not_count_as_reproduction(
    run, data, caplog, arguments, images
):
    text = run("evaluate", NANO, "--data", data, *arguments)
    result = json.loads(text.splitlines()[-1])
    assert result["images"] == images  # equally many of each class
    row = {"measured": 10.0, "published": 9.9, "difference": 0.1, "reproduced": None}
    assert result["figures"] == {"top1": row}
    assert f"evaluated {images} of 50000 images: cannot tell" in caplog.text


@pytest.mark.parametrize(
    ("measured", "reproduced"), [(83.6, True), (83.41, True), (83.8, True), (83.39, False)]
)
def test_a_figure_within_the_tolerance_is_reproduced(measured, reproduced):
    entry = read_zoo()["flash_internimage_tiny.in1k"]
    row = zoo_evaluation.compare(entry, {"top1": measured}, whole=True)["top1"]
    assert (row["published"], row["reproduced"]) == (83.6, reproduced)


def test_figures_without_a_published_value_are_not_compared():
    entry = read_zoo()["flash_internimage_large.in22k_384"]
    assert zoo_evaluation.compare(entry, {"top1": 50.0}, whole=True) == {"top1": {"measured": 50.0}}


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data not found: nowhere"),
        (["--data", ".", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["--data", ".", "--tta"], "--tta must be used with a segmentor"),
        (["--data", ".", "--json", "nowhere/x"], "--json must be in a writable folder"),
        (["--data", ".", "--checkpoint", "none.pth"], "checkpoint not found: none.pth"),
    ],
)
def test_wrong_arguments_are_one_error(refused, arguments, message):
    assert message in refused("evaluate", NANO, *arguments)


# docs/zoo.md


def test_the_commands_of_the_guide_are_accepted():
    guide = (ROOT / "docs" / "zoo.md").read_text()
    commands = re.findall(r"^flash-internimage zoo (.*)$", guide, re.MULTILINE)
    assert len(commands) == 12
    demo = "configs/detection/mask_rcnn_flash_internimage_nano_fpn_digits_scenes.py"
    assert (ROOT / demo).is_file()
    known = read_zoo().keys() | {"flash_internimage_nano", demo}  # of `push --checkpoint`
    for command in commands:
        arguments = vars(tool.parse_arguments(shlex.split(command)))
        names = {*arguments.get("names", []), arguments.get("name"), arguments.get("model")}
        assert names - {None} <= known, command
