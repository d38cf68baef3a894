"""Checkpoints: what is read, what is refused, and how they are written."""

import logging
import os
import pickle
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flash_internimage import FlashInternImage
from flash_internimage.checkpoint import (
    check_optimizer,
    clean_state_dict,
    fetch_checkpoint,
    load_checkpoint,
    load_weights,
    save_atomically,
)
from tests.servers import serve, use_own_caches

WEIGHTS = {"head.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.ones(2)}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    assert all(actual[name].equal(expected[name]) for name in expected)


# clean_state_dict


@pytest.mark.parametrize("container", ["state_dict", "model_ema", "model"])
def test_weights_are_taken_out_of_their_container(container):
    checkpoint = {"epoch": 3, container: WEIGHTS, "optimizer": {"state": {}}}
    assert_equal(clean_state_dict(checkpoint), WEIGHTS)


def test_bare_weights_are_taken_as_they_are():
    assert_equal(clean_state_dict(WEIGHTS), WEIGHTS)


def test_containers_are_preferred_in_the_published_order():
    entries = {name: {name: torch.zeros(1)} for name in ("model", "model_ema", "state_dict")}
    assert list(clean_state_dict(entries)) == ["state_dict"]
    del entries["state_dict"]
    assert list(clean_state_dict(entries)) == ["model_ema"]


def test_container_without_weights_is_passed_over():
    assert_equal(clean_state_dict({"model_ema": None, "model": WEIGHTS}), WEIGHTS)


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
def test_prefixes_of_wrappers_are_stripped(prefix):
    wrapped = {prefix + name: tensor for name, tensor in WEIGHTS.items()}
    assert_equal(clean_state_dict({"model": wrapped}), WEIGHTS)


def test_prefixes_are_stripped_at_the_start_only():
    names = {"neck.backbone.weight": torch.zeros(1), "backbone_norm.weight": torch.zeros(1)}
    assert_equal(clean_state_dict(names), names)


def test_of_a_detector_the_backbone_alone_is_taken():
    names = {"module.neck.weight": torch.zeros(1), "ema_backbone_head_bias": torch.zeros(1)}
    names |= {"module.backbone." + name: tensor for name, tensor in WEIGHTS.items()}
    assert_equal(clean_state_dict({"state_dict": names}), WEIGHTS)


@pytest.mark.parametrize("other", [{"epoch": 3}, {"head": {}}, {1: torch.zeros(1)}, {"text": "x"}])
def test_more_than_tensors_is_an_error(other):
    for checkpoint in (WEIGHTS | other, {"model": WEIGHTS | other}):
        with pytest.raises(ValueError, match=f"tensors by name, got also {next(iter(other))}"):
            clean_state_dict(checkpoint)


# load_checkpoint


def test_pth_keeps_its_contents(tmp_path):
    path = tmp_path / "last.pth"
    torch.save({"model": WEIGHTS, "epoch": 3, "best": {"top1": 0.5}}, path)
    checkpoint = load_checkpoint(path)
    assert (checkpoint["epoch"], checkpoint["best"]) == (3, {"top1": 0.5})
    assert_equal(checkpoint["model"], WEIGHTS)


def test_pth_of_old_pytorch_is_read(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"model": WEIGHTS}, path, _use_new_zipfile_serialization=False)
    assert_equal(load_checkpoint(str(path))["model"], WEIGHTS)


def test_safetensors_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path)
    loaded = load_checkpoint(path)
    assert_equal({name: loaded[name] for name in WEIGHTS}, WEIGHTS)
    assert len(loaded) == len(WEIGHTS)


@pytest.mark.parametrize("map_location", ["meta", torch.device("meta")])
def test_pth_goes_to_the_device_asked_for(tmp_path, map_location):
    torch.save(WEIGHTS, tmp_path / "model.pth")
    assert load_checkpoint(tmp_path / "model.pth", map_location)["head.bias"].is_meta


def write_zip(contents: object, path: os.PathLike) -> None:
    torch.save(contents, path)


def write_old(contents: object, path: os.PathLike) -> None:
    torch.save(contents, path, _use_new_zipfile_serialization=False)


def write_pickle(contents: object, path: os.PathLike) -> None:
    with open(path, "wb") as file:
        pickle.dump(contents, file, protocol=2)


def refusal(path: os.PathLike) -> str:
    """The text with which a file is refused: it names the file and gives no unsafe advice."""
    with pytest.raises(ValueError, match=r"\S") as refused:
        load_checkpoint(path)
    assert str(path) in str(refused.value)
    assert "weights_only" not in str(refused.value)
    return str(refused.value)


class RunsCommand:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return subprocess.getoutput, (self.command,)


def test_safetensors_in_name_only_do_not_run(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.safetensors"
    write_pickle(RunsCommand(f"touch {marker}"), path)
    refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize("contents", [[WEIGHTS], torch.zeros(2), 3, None])
def test_anything_but_a_dict_is_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "model.pth")
    assert f"holds a {type(contents).__name__}, expected a dict" in refusal(tmp_path / "model.pth")


def test_whole_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    message = refusal(tmp_path / "model.pth")
    assert "torch.nn.modules.linear.Linear is not plain data" in message


@pytest.mark.parametrize("write", [write_zip, write_old, save_file])
def test_truncated_file_is_refused_wherever_it_ends(tmp_path, write):
    path = tmp_path / ("model.safetensors" if write is save_file else "model.pth")
    write(WEIGHTS, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 100):
        path.write_bytes(whole[:length])
        refusal(path)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_random_bytes_are_refused(tmp_path, name):
    path, generator = tmp_path / name, random.Random(0)
    for _ in range(100):
        path.write_bytes(generator.randbytes(generator.choice([1, 5, 50, 500])))
        refusal(path)


@pytest.mark.parametrize(
    "contents",
    [b"<!DOCTYPE html>", b"version https://git-lfs", bytes(99)],
    ids=["page", "pointer", "zeros"],
)
def test_other_files_are_refused(tmp_path, contents):
    path = tmp_path / "model.pth"
    path.write_bytes(contents)
    refusal(path)


def test_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            load_checkpoint(path)


# fetch_checkpoint


@pytest.mark.parametrize("kind", [str, Path])
def test_file_at_hand_is_taken_as_it_is(tmp_path, kind):
    torch.save(WEIGHTS, tmp_path / "model.pth")
    assert fetch_checkpoint(kind(tmp_path / "model.pth")) == tmp_path / "model.pth"


def test_released_weights_are_found_by_name(tmp_path, monkeypatch):
    torch.save(WEIGHTS, tmp_path / "model.pth")
    use_own_caches(monkeypatch, tmp_path / "caches")
    with serve({"/model.pth": (tmp_path / "model.pth").read_bytes()}) as server:
        released = replace(timm.get_pretrained_cfg("flash_internimage_tiny.in1k"))
        released.url = f"{server.address}/model.pth"
        released = {"flash_internimage_tiny.in1k": released}
        monkeypatch.setattr(timm, "get_pretrained_cfg", released.get)
        path = fetch_checkpoint("flash_internimage_tiny.in1k")
    assert_equal(load_checkpoint(path), WEIGHTS)


@pytest.mark.parametrize(
    "source",
    ["flash_internimage_nano.untrained", "flash_internimage_tiny", "resnet50.a1_in1k", "none.pth"],
)
def test_what_is_neither_file_address_nor_released_is_refused(source):
    message = f"not found: {source} is neither a file, .* flash_internimage_tiny.in1k"
    with pytest.raises(FileNotFoundError, match=message):
        fetch_checkpoint(source)


# save_atomically


def test_saved_checkpoint_is_read_back(tmp_path):
    path = tmp_path / "last.pth"
    for epoch in range(2):
        save_atomically({"model": WEIGHTS, "epoch": epoch}, path)
        assert load_checkpoint(path)["epoch"] == epoch
    assert_equal(load_checkpoint(path)["model"], WEIGHTS)
    assert os.listdir(tmp_path) == ["last.pth"]


@pytest.mark.parametrize("existing", [True, False])
def test_failed_save_leaves_what_was_there(tmp_path, monkeypatch, existing):
    path = tmp_path / "last.pth"
    if existing:
        save_atomically({"epoch": 0}, path)

    def run_out_of_space(checkpoint, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", run_out_of_space)
    with pytest.raises(OSError, match="No space left"):
        save_atomically({"epoch": 1}, path)
    assert list(tmp_path.glob("*.pth")) == [path] * existing
    assert not existing or load_checkpoint(path) == {"epoch": 0}


def test_save_after_a_failed_one_succeeds(tmp_path):
    path = tmp_path / "last.pth"
    (tmp_path / ".last.pth.1234.partial").write_bytes(b"half of a file")
    save_atomically({"epoch": 1}, path)
    assert load_checkpoint(path) == {"epoch": 1}


# load_weights, and timm's own loading


def nano(seed: int, **kwargs) -> FlashInternImage:
    torch.manual_seed(seed)
    return timm.create_model("flash_internimage_nano", **kwargs)


def split_head(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    head = {name: tensor for name, tensor in state_dict.items() if name.startswith("head.")}
    return head, {name: tensor for name, tensor in state_dict.items() if name not in head}


def loaded_optimizer(shape: tuple[int, ...], **kwargs) -> torch.optim.Optimizer:
    """With a state from a file that asks for other kernels, and has one tensor of this shape."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(3, 4))], **kwargs)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 4)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(shape)
    state["param_groups"][0].update(fused=True, foreach=False, maximize=True, lr=0.5)
    optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.parametrize("kwargs", [{}, {"foreach": True}, {"fused": True}])
def test_a_file_does_not_choose_the_optimizers_kernels(kwargs):
    optimizer = loaded_optimizer((3, 4), **kwargs)
    check_optimizer(optimizer)
    group = optimizer.param_groups[0]
    expected = {"fused": None, "foreach": None, "maximize": False, "lr": 0.5, **kwargs}
    assert {name: group[name] for name in expected} == expected


def test_fused_kernels_have_states_of_the_right_shapes():
    with pytest.raises(ValueError, match=r"exp_avg .* shape \(1,\), its parameter of \(3, 4\)"):
        check_optimizer(loaded_optimizer((1,), fused=True))
    optimizer = loaded_optimizer((1,))
    check_optimizer(optimizer)
    with pytest.raises(RuntimeError, match="shape"):
        optimizer.step()


def test_weights_are_loaded_whole():
    source, model = nano(0, num_classes=5), nano(1, num_classes=5)
    load_weights(model, source.state_dict())
    assert_equal(model.state_dict(), source.state_dict())


def test_classifier_of_other_classes_starts_anew_and_says_so(caplog):
    source, model = nano(0, num_classes=7), nano(1, num_classes=5)
    own_head, _ = split_head(nano(1, num_classes=5).state_dict())
    with caplog.at_level(logging.WARNING):
        load_weights(model, source.state_dict())
    head, body = split_head(model.state_dict())
    assert_equal(head, own_head)
    assert_equal(body, split_head(source.state_dict())[1])
    assert "head.weight starts anew: the checkpoint has 7 classes, the model 5" in caplog.text


@pytest.mark.parametrize("classes", [7, 3])
def test_class_map_picks_the_classes(classes):
    source, model = nano(0, num_classes=classes), nano(1, num_classes=3)
    class_map = [classes - 1, 0, 1]
    load_weights(model, source.state_dict(), class_map)
    assert model.head.weight.equal(source.head.weight[class_map])
    assert model.head.bias.equal(source.head.bias[class_map])


@pytest.mark.parametrize("class_map", [[], [0, 1], [0, 1, 7], [0, 1, -1]])
def test_class_map_that_does_not_fit_is_an_error(class_map):
    source, model = nano(0, num_classes=7), nano(1, num_classes=3)
    with pytest.raises(ValueError, match="class_map must hold 3 indices below 7"):
        load_weights(model, source.state_dict(), class_map)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weights: weights.pop("conv_head.0.weight"), r"missing: conv_head\.0\.weight"),
        (lambda weights: weights.update(neck=torch.zeros(1)), "unexpected: neck"),
        (
            lambda weights: weights.update({"patch_embed.conv1.bias": torch.zeros(2)}),
            r"shape of patch_embed\.conv1\.bias: \(2,\), expected \(16,\)",
        ),
        (
            lambda weights: weights.update({"conv_head.1.0.num_batches_tracked": 3}),
            r"no tensor: conv_head\.1\.0\.num_batches_tracked is a int",
        ),
        (lambda weights: weights.clear(), r"missing: .* and \d+ more"),
    ],
    ids=["missing", "unexpected", "shape", "no tensor", "empty"],
)
def test_weights_that_do_not_fit_change_nothing(change, problem):
    model, weights = nano(1, num_classes=5), dict(nano(0, num_classes=5).state_dict())
    change(weights)
    with pytest.raises(ValueError, match=problem):
        load_weights(model, weights)
    assert_equal(model.state_dict(), nano(1, num_classes=5).state_dict())


@pytest.fixture(scope="module")
def source() -> FlashInternImage:
    return nano(0)


@pytest.fixture(scope="module")
def pretrained(source, tmp_path_factory) -> dict:
    """Keyword arguments that let timm load the weights of `source` from a published container."""
    path = tmp_path_factory.mktemp("pretrained") / "model.pth"
    torch.save({"model": source.state_dict(), "epoch": 299}, path)
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}


def test_timm_loads_a_published_checkpoint(source, pretrained):
    assert_equal(nano(1, **pretrained).state_dict(), source.state_dict())


def test_timm_replaces_a_classifier_of_other_classes(source, pretrained):
    model = nano(1, num_classes=10, **pretrained)
    assert model.head.out_features == 10
    assert_equal(split_head(model.state_dict())[1], split_head(source.state_dict())[1])


def test_timm_adapts_the_stem_to_grey_images(source, pretrained):
    model, image = nano(1, in_chans=1, **pretrained).eval(), torch.randn(1, 1, 32, 32)
    expected = source.patch_embed(image.expand(1, 3, 32, 32))
    torch.testing.assert_close(model.patch_embed(image), expected, rtol=1e-4, atol=1e-4)


def test_timm_loads_feature_maps_from_a_detector(source, tmp_path):
    detector = {"backbone." + name: tensor for name, tensor in source.state_dict().items()}
    torch.save({"state_dict": detector}, tmp_path / "detector.pth")
    overlay = {"file": str(tmp_path / "detector.pth")}
    model = nano(1, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay).model
    own = model.state_dict()
    assert_equal(own, {name: source.state_dict()[name] for name in own})


@pytest.fixture
def address(source, tmp_path, monkeypatch) -> Iterator[str]:
    """That of the weights of `source` beside an object that timm's own loader refuses."""
    path = tmp_path / "model.pth"
    torch.save({"model": source.state_dict(), "config": SimpleNamespace(epochs=300)}, path)
    use_own_caches(monkeypatch, tmp_path / "caches")
    with serve({"/model.pth": path.read_bytes()}) as server:
        yield f"{server.address}/model.pth"


def test_timm_downloads_a_published_checkpoint(source, address):
    model = nano(1, pretrained=True, pretrained_cfg_overlay={"url": address})
    assert_equal(model.state_dict(), source.state_dict())
    assert "state_dict" not in model.pretrained_cfg
    assert model.pretrained_cfg["url"] == address


def test_timm_reads_published_objects_with_other_classes_channels_and_maps(source, address, caplog):
    downloaded = {"pretrained": True, "pretrained_cfg_overlay": {"url": address}}
    model = nano(1, num_classes=10, in_chans=1, **downloaded)
    assert "head starts anew: the checkpoint has 1000 classes, the model 10" in caplog.text
    name = "levels.0.blocks.0.dcn.value_proj.weight"
    assert model.get_parameter(name).equal(source.get_parameter(name))
    assert model.patch_embed.conv1.weight.shape[1] == 1
    features = nano(1, features_only=True, out_indices=(1, 2), **downloaded).model.state_dict()
    assert_equal(features, {name: source.state_dict()[name] for name in features})


@pytest.mark.parametrize("adapted", [{"num_classes": 10}, {"features_only": True}, {"in_chans": 1}])
def test_timm_loads_no_part_of_a_checkpoint(source, tmp_path, adapted):
    weights = source.state_dict()
    weights["levels.0.blocks.0.mlp.fc3.weight"] = weights.pop("levels.0.blocks.0.mlp.fc1.weight")
    torch.save(weights, tmp_path / "part.pth")
    part = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "part.pth")}}
    with pytest.raises(ValueError, match=r"missing: .*fc1\.weight; unexpected: .*fc3\.weight"):
        nano(1, **adapted, **part)


def test_timm_takes_a_state_dict_that_it_is_given(source):
    overlay = {"state_dict": dict(source.state_dict())}
    model = nano(1, pretrained=True, pretrained_cfg_overlay=overlay)
    assert_equal(model.state_dict(), source.state_dict())
    assert "state_dict" not in model.pretrained_cfg


def test_timm_executes_nothing(source, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    torch.save({"model": source.state_dict(), "config": RunsCommand(f"touch {marker}")}, path)
    model = nano(1, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert_equal(model.state_dict(), source.state_dict())
    assert not marker.exists()
