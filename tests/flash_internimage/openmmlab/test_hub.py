"""Tests of publishing detectors and segmentors on the Hub."""

import copy
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from PIL import Image

from flash_internimage.checkpoints import Entry, convert_checkpoint, to_published_checkpoint
from flash_internimage.cli import zoo as tool
from flash_internimage.hub import push
from tests.hub import Hub, serve_hub, usage
from tests.recipes import load_config

DETECTOR = ("detection", "mask_rcnn_flash_internimage_nano_fpn_digits_scenes")
SEGMENTOR = ("segmentation", "upernet_flash_internimage_nano_digits_scenes")
DINO = ("detection", "dino-4scale_flash_internimage_nano_digits_scenes")
REPO = "me/digits"
FILES = ["README.md", "config.py", "model.pth"]
# A run writes its folders and other paths to its config and its checkpoints.
OF_A_RUN = {"work_dir": "/home/me/run", "load_from": "/home/me/old.pth", "launcher": "pytorch"}


@pytest.fixture(autouse=True)
def always_clean(one_thread, restore_scope):
    """Apply to all tests of this module."""


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    with serve_hub(monkeypatch, tmp_path / "caches") as hub:
        yield hub


@pytest.fixture
def trained(tmp_path, monkeypatch) -> Callable[[tuple[str, str]], tuple[Path, Path]]:
    """Return a function that writes the config and the checkpoint of a run, and an image."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(pixels).save("image.jpg")

    def trained(demo: tuple[str, str]) -> tuple[Path, Path]:
        config, checkpoint = tmp_path / "run.py", tmp_path / "best.pth"
        cfg = load_config(*demo)
        settings = {**cfg.to_dict(), **OF_A_RUN}
        config.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            torch.manual_seed(0)
            model = MODELS.build(copy.deepcopy(cfg.model))
        for parameter in model.parameters():  # mmdet leaves some of them uninitialized
            torch.nn.init.normal_(parameter, std=0.05)
        classes = tuple("abcdefghij")[: 10 if demo == DETECTOR else 5]
        palette = [(i, 2 * i, 3 * i) for i in range(len(classes))]
        meta = {"dataset_meta": {"classes": classes, "palette": palette}, "cfg": "/home/me"}
        torch.save({"state_dict": model.state_dict(), "meta": meta}, checkpoint)
        return config, checkpoint

    return trained


def run(*arguments: Any) -> None:
    assert tool.main(["push", *map(str, arguments)]) == 0


def run_code(code: str) -> dict:
    namespace: dict = {}
    exec(code, namespace)
    return namespace


@pytest.mark.slow
@pytest.mark.parametrize(
    ("demo", "library", "inferencer"),
    [(DETECTOR, "mmdet", "DetInferencer"), (SEGMENTOR, "mmseg", "MMSegInferencer")],
    ids=["detector", "segmentor"],
)
def test_the_code_of_the_card_predicts_as_the_trained_model(
    hub, trained, tmp_path, demo, library, inferencer
):
    config, checkpoint = trained(demo)
    build = getattr(importlib.import_module(f"{library}.apis"), inferencer)
    before = build(str(config), str(checkpoint))
    expected = before("image.jpg")["predictions"]

    run(config, REPO, "--checkpoint", checkpoint)
    assert hub.commits == [(REPO, "main", "Add run", FILES)]  # without its folder
    files = {name: hub.files[f"/{REPO}/resolve/main/{name}"] for name in FILES}
    assert list(hub.storage.values()) == [files["model.pth"]]
    assert not [name for name, contents in files.items() if b"/home/me" in contents]
    Path("README.md").write_bytes(files["README.md"])
    found = run_code(usage(tmp_path / "README.md"))
    assert found["inferencer"].model.dataset_meta["classes"] == before.model.dataset_meta["classes"]
    np.testing.assert_equal(found["result"]["predictions"], expected)
    if library == "mmdet":
        assert len(expected[0]["scores"]) > 0


def test_a_shipped_config_is_published_by_its_name(hub, trained):
    _, checkpoint = trained(SEGMENTOR)
    run(SEGMENTOR[1], REPO, "--checkpoint", checkpoint)
    assert hub.commits == [(REPO, "main", f"Add {SEGMENTOR[1]}", FILES)]


def test_files_need_neither_the_base_configs_nor_pickles(trained, tmp_path, caplog):
    config, checkpoint = trained(SEGMENTOR)
    derived = tmp_path / "derived.py"
    derived.write_text(f"_base_ = {config.name!r}\ntest_dataloader = dict(a=[dict(b='/data')])\n")
    run(derived, REPO, "--checkpoint", checkpoint, "--folder", tmp_path / "out")
    assert "config.py will contain paths of this machine: /data" in caplog.messages
    assert "_base_" not in (tmp_path / "out" / "config.py").read_text()
    contents = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert contents["meta"].keys() == {"dataset_meta"}
    before = torch.load(checkpoint)["state_dict"]
    assert list(contents["state_dict"]) == list(before)
    assert all(before[name].equal(tensor) for name, tensor in contents["state_dict"].items())
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("mmseg", "image-segmentation")


@pytest.mark.slow
def test_released_weights_are_published_under_the_current_names(trained, tmp_path, monkeypatch):
    _, checkpoint = trained(DINO)
    before = convert_checkpoint(torch.load(checkpoint))
    published = to_published_checkpoint(before)
    assert published["state_dict"].keys() != before["state_dict"].keys()
    torch.save(published, checkpoint)
    entry = Entry(
        task="detection",
        architecture="DINO, 4 scales",
        backbone="T",
        pretraining="ImageNet-1K",
        schedule="1x",
        config=f"configs/detection/{DINO[1]}.py",
        addresses=["https://example.org/never-asked.pth"],
        resolution=800,
        parameters=1,
        published={"box_ap": 54.7},
        source="README of https://github.com/OpenGVLab/DCNv4",
    )
    monkeypatch.setattr(Entry, "fetch", lambda entry, offline: checkpoint)
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"coco/bbox_mAP": 0.5468, "coco/bbox_mAP_s": 0.1}))
    push(
        "dino",
        REPO,
        entry=entry,
        folder=tmp_path / "out",
        results=results,
    )
    cfg = Config.fromfile(tmp_path / "out" / "config.py")
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model)
    load_checkpoint(model, str(tmp_path / "out" / "model.pth"), strict=True)
    assert all(before["state_dict"][name].equal(t) for name, t in model.state_dict().items())
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == ["coco", "imagenet-1k"]
    assert [result.metric_value for result in card.data.eval_results] == [54.7, 54.68]
    assert "DINO, 4 scales with FlashInternImage-T for object detection" in card.text
    assert "| COCO val2017 | Box AP | 54.7 | published by the authors |" in card.text
    assert "| COCO val2017 | Box AP | 54.68 | measured |" in card.text


def test_class_names_come_from_the_config_if_the_checkpoint_has_none(trained, tmp_path):
    config, checkpoint = trained(SEGMENTOR)
    torch.save(torch.load(checkpoint)["state_dict"], checkpoint)
    run(config, REPO, "--checkpoint", checkpoint, "--folder", tmp_path / "out")
    meta = torch.load(tmp_path / "out" / "model.pth", weights_only=True)["meta"]["dataset_meta"]
    assert meta["classes"] == ("background", *"0147")


def test_nothing_is_uploaded_if_the_weights_do_not_fit(hub, trained, caplog):
    config, checkpoint = trained(SEGMENTOR)
    contents = torch.load(checkpoint)
    del contents["state_dict"]["decode_head.conv_seg.bias"]
    torch.save(contents, checkpoint)
    assert tool.main(["push", str(config), REPO, "--checkpoint", str(checkpoint)]) == 2
    message = caplog.records[-1].getMessage()
    assert message == "the checkpoint does not match the model: missing: decode_head.conv_seg.bias"
    assert tool.main(["push", "none.py", REPO, "--checkpoint", str(checkpoint)]) == 2
    assert caplog.records[-1].getMessage() == "config not found: none.py"
    assert hub.requests == []
