"""Tests of the command convert-backbone."""

import logging

import pytest
import timm
import torch
from torch import nn

from flash_internimage import InternImage
from flash_internimage.backbones.flash_internimage import ARCHITECTURES
from flash_internimage.checkpoints import clean_state_dict, load_checkpoint, load_internimage
from flash_internimage.classification.config import Model
from flash_internimage.classification.model import build_model
from flash_internimage.cli import convert_backbone
from tools import convert_backbone as tool

NANO = "flash_internimage_nano"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def internimage():
    """Return an InternImage of the size nano, with random weights."""
    torch.manual_seed(1)
    model = InternImage(**ARCHITECTURES["nano"], num_classes=5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def source(internimage, tmp_path):
    """Write a checkpoint as the published program does."""
    path = tmp_path / "internimage.pth"
    torch.save({"model": internimage.state_dict(), "epoch": 299}, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_and_recipes_load_the_file(suffix, internimage, source, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    output = tmp_path / f"flash{suffix}"
    assert tool.main([str(source), str(output)]) == 0
    assert capsys.readouterr().out == f"{NANO}: {output}\n"
    assert "10 converted, 0 kept as they were" in caplog.text

    expected = timm.create_model(NANO, num_classes=5)
    load_internimage(expected, internimage.state_dict())
    created = timm.create_model(NANO, num_classes=5, checkpoint_path=str(output))
    other = Model(name=NANO, num_classes=3, initial_checkpoint=str(output))
    for name, weight in expected.state_dict().items():
        assert created.state_dict()[name].equal(weight), name
    for name, weight in build_model(other).state_dict().items():
        assert name.startswith("head.") or weight.equal(expected.state_dict()[name]), name


def test_names_are_printed(source, tmp_path, capsys):
    assert convert_backbone.main([str(source), str(tmp_path / "a.pth"), "-v"]) == 0
    *rows, _ = (line.split() for line in capsys.readouterr().out.splitlines())
    assert ["copied", "patch_embed.conv1.weight"] in rows
    assert ["converted", "levels.2.blocks.1.dcn.offset_mask.bias"] in rows
    assert ["unused", "levels.0.blocks.0.dcn.dw_conv.0.weight"] in rows
    assert {row[0] for row in rows} == {"copied", "converted", "unused"}


def test_base_compensates_for_its_offset_scale(tmp_path, monkeypatch):
    # FlashInternImage-B halves the offsets that InternImage-B does not scale.
    small = {"channels": 16, "depths": (1, 1), "groups": (1, 2)}
    source, output = tmp_path / "internimage.pth", tmp_path / "flash.pth"
    state = InternImage(**small, num_classes=5).state_dict()
    torch.save(state, source)
    model = timm.create_model("flash_internimage_base", num_classes=5, **small)
    monkeypatch.setattr(
        timm, "create_model", lambda name, **_: {"flash_internimage_base": model}[name]
    )
    arguments = [str(source), str(output), "--model", "flash_internimage_base"]
    assert convert_backbone.main(arguments) == 0
    bias = load_checkpoint(output)["state_dict"]["levels.0.blocks.0.dcn.offset_mask.bias"]
    # 0.5 * (grid + offset) is the grid if offset = grid, which is (-1, -1) at the first tap.
    torch.testing.assert_close(bias[:4], torch.tensor([-1.0, -1.0, -1.0, 0.0]))


def test_backbone_of_a_detector_is_found(internimage, tmp_path, caplog):
    names = {f"backbone.{name}": weight for name, weight in internimage.state_dict().items()}
    head = ("backbone.head.", "backbone.conv_head.")
    state = {name: weight for name, weight in names.items() if not name.startswith(head)}
    source, output = tmp_path / "detector.pth", tmp_path / "flash.pth"
    torch.save({"state_dict": state | {"bbox_head.weight": torch.ones(1)}, "meta": {}}, source)
    assert convert_backbone.main([str(source), str(output)]) == 0
    assert "8 tensors of flash_internimage_nano stay randomly initialized" in caplog.text
    weights = clean_state_dict(load_checkpoint(output))
    assert weights["head.weight"].shape[0] == 1000
    stem = "patch_embed.conv1.weight"
    assert weights[stem].equal(internimage.state_dict()[stem])


def test_classifier_without_classes_is_replaced(internimage, tmp_path, caplog):
    source, output = tmp_path / "internimage.pth", tmp_path / "flash.pth"
    torch.save(internimage.state_dict() | {"head.weight": torch.tensor(1.0)}, source)
    assert convert_backbone.main([str(source), str(output)]) == 0
    assert "2 tensors of flash_internimage_nano stay randomly initialized" in caplog.text


def test_input_is_never_overwritten(source, tmp_path, caplog):
    before = source.read_bytes()
    link = tmp_path / "link.pth"
    link.symlink_to(source)
    for output in (source, link):
        assert convert_backbone.main([str(source), str(output)]) == 2
        assert "output must be another file than the checkpoint" in caplog.records[-1].getMessage()
    assert source.read_bytes() == before


def _change(name, change):
    return lambda state: state | {name: change(state[name])}


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, ["missing.pth", "a.pth"], "checkpoint not found: missing.pth is neither a file"),
        (None, ["SOURCE", "a.ckpt"], "output must end in .safetensors or .pth, got"),
        (None, ["SOURCE", "missing/a.pth"], "output must be in an existing folder, got"),
        (None, ["SOURCE", "folder.pth"], "output must be a file, got the folder folder.pth"),
        (None, ["internimage_huge.joint_in22k_384", "a.pth"],
         "the released weights must be those of internimage_tiny, internimage_small, inter"),
        (None, ["flash_internimage_tiny.in1k", "a.pth"],
         "the released weights must be those of internimage_tiny, internimage_small, inter"),
        (None, ["internimage_tiny.in1k", "a.pth", "--model", "flash_internimage_small"],
         "--model must have the size of the checkpoint, got flash_internimage_small for intern"),
        (None, ["SOURCE", "a.pth", "--model", "flash_internimage_tiny"],
         "--model must have the size of the checkpoint, got flash_internimage_tiny for 32 chan"),
        (lambda state: {"head.bias": state["head.bias"]}, ["SOURCE", "a.pth"],
         "the checkpoint must contain the weights of an InternImage, got"),
        (_change("patch_embed.conv2.weight", lambda w: w.sum()), ["SOURCE", "a.pth"],
         "the checkpoint must contain the weights of an InternImage, got"),
        (_change("head.bias", lambda bias: bias / 0), ["SOURCE", "a.pth"],
         "weights must be finite, got NaN or infinity in head.bias"),
        (_change("patch_embed.conv2.weight", lambda w: w.repeat(2, 1, 1, 1)), ["SOURCE", "a.pth"],
         "the checkpoint must have the size of one of flash_internimage_nano, flash_internimage"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_write_nothing(
    change, arguments, message, source, internimage, tmp_path, caplog, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.pth").mkdir()
    if change:
        torch.save(change(internimage.state_dict()), source)
    before = {*tmp_path.iterdir()}
    given = [str(source) if argument == "SOURCE" else argument for argument in arguments]
    assert convert_backbone.main(given) == 2
    error = caplog.records[-1].getMessage()
    assert message in error
    assert "\n" not in error
    assert {*tmp_path.iterdir()} == before


def test_messages_of_downloads_are_printed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    assert convert_backbone.main(["missing.pth", str(tmp_path / "a.pth")]) == 2
    assert not logging.getLogger("huggingface_hub").propagate


def test_damaged_file_is_one_line(source, tmp_path, caplog):
    source.write_bytes(b"no checkpoint")
    assert convert_backbone.main([str(source), str(tmp_path / "a.pth")]) == 2
    assert "is damaged or not a checkpoint" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_size_is_recognized_from_names_and_shapes(size, tmp_path):
    with torch.device("meta"):
        state = timm.create_model(f"internimage_{size}").state_dict()
    found = convert_backbone._find_model(*convert_backbone._size(state, tmp_path))
    assert found == f"flash_internimage_{size}"
