"""Tests of reading, rejecting and writing checkpoints."""

import logging
import os
import pickle
import random
import resource
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from flash_internimage.checkpoints import (
    check_optimizer,
    clean_state_dict,
    fetch_checkpoint,
    load_checkpoint,
    load_weights,
    save_atomically,
)
from tests.flash_internimage.checkpoints import RunsCommand
from tests.flash_internimage.models import assert_equal, nano, split_head
from tests.servers import serve, use_own_caches

WEIGHTS = {"head.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.ones(2)}


# clean_state_dict


AVERAGED = ["state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema"]
# Names used by other programs: any name with "ema", "swa" or "averaged" is recognized.
AVERAGED += [
    "swa_state_dict",
    "swa_model",
    "ema_weights",
    "averaged_model",
    "ema_net",
    "params_ema",
]
TRAINED = ["state_dict", "model", "model_state_dict", "module", "net"]
OTHER = {name: tensor + 1 for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize("container", [*AVERAGED, *TRAINED])
def test_weights_are_extracted_from_their_container(container):
    checkpoint = {"epoch": 3, container: WEIGHTS, "optimizer": {"state": {}}}
    for use_ema in (True, False):
        assert_equal(clean_state_dict(checkpoint, use_ema), WEIGHTS)


def test_bare_weights_are_returned_unchanged():
    assert_equal(clean_state_dict(WEIGHTS), WEIGHTS)


@pytest.mark.parametrize(
    ("averaged", "trained"), [*((a, "state_dict") for a in AVERAGED), ("model_ema", "model")]
)
def test_averaged_weights_are_preferred_and_logged(averaged, trained, caplog):
    caplog.set_level(logging.INFO)
    checkpoint = {trained: OTHER, averaged: WEIGHTS}
    assert_equal(clean_state_dict(checkpoint), WEIGHTS)
    assert caplog.messages == [f"using {averaged}, ignoring {trained}"]
    assert_equal(clean_state_dict(checkpoint, use_ema=False), OTHER)
    assert caplog.messages[1:] == [f"using {trained}, ignoring {averaged}"]


@pytest.mark.parametrize("name", ["teacher", "best_state", "my_weights"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_ignored_weights_are_logged(name, prefix, caplog):
    caplog.set_level(logging.INFO)
    others = {f"{prefix}{key}": tensor for key, tensor in OTHER.items()}
    checkpoint = {"state_dict": WEIGHTS, name: others, "scaler": {"scale": torch.ones(1)}}
    assert_equal(clean_state_dict(checkpoint), WEIGHTS)
    assert caplog.messages == [f"using state_dict, ignoring {name}"]


def test_averaged_weights_of_mmengine_are_in_state_dict():
    raw = {"steps": torch.tensor(8)} | {f"module.{name}": OTHER[name] for name in OTHER}
    checkpoint = {"meta": {"mmengine_version": "0.10.4"}, "state_dict": WEIGHTS}
    assert_equal(clean_state_dict(checkpoint, use_ema=False), WEIGHTS)
    checkpoint["ema_state_dict"] = raw
    assert_equal(clean_state_dict(checkpoint), WEIGHTS)
    assert_equal(clean_state_dict(checkpoint, use_ema=False), OTHER)


@pytest.mark.parametrize("empty", [None, {}, 3])
def test_container_without_weights_is_skipped(empty, caplog):
    assert_equal(clean_state_dict({"model_ema": empty, "model": WEIGHTS}), WEIGHTS)
    warning = f"using model: model_ema is a {type(empty).__name__} without weights"
    assert caplog.messages == ([] if empty is None else [warning])


def test_containers_may_be_nested():
    assert_equal(clean_state_dict({"model_ema": {"module": WEIGHTS, "decay": 0.9}}), WEIGHTS)


WRAPPERS = ["module.", "_orig_mod.", "model.", "net.", "timm_model."]
PARTS = ["backbone.", "ema_model."]
PREFIXES = [*product(WRAPPERS, [*WRAPPERS, *PARTS]), *product(PARTS, ["", *WRAPPERS])]


@pytest.mark.parametrize(("outer", "inner"), PREFIXES)
def test_prefixes_of_wrappers_are_stripped_in_any_order(outer, inner):
    wrapped = {outer + inner + name: tensor for name, tensor in WEIGHTS.items()}
    assert_equal(clean_state_dict({"model": wrapped}), WEIGHTS)


WRAPPED = {
    "compiled": lambda model: torch.compile(model),
    "parallel in compiled": lambda model: torch.compile(nn.DataParallel(model)),
    "compiled in parallel": lambda model: nn.DataParallel(torch.compile(model)),
    "averaged": lambda model: AveragedModel(model),
    "compiled in averaged": lambda model: AveragedModel(torch.compile(model)),
    "averaged by timm": lambda model: ModelEmaV3(model),
    "part": lambda model: nn.ModuleDict({"model": model}),
    "with average": lambda model: nn.ModuleDict({"model": model, "ema": AveragedModel(model)}),
    "detector": lambda model: nn.ModuleDict(
        {"backbone": torch.compile(model), "neck": nn.Linear(1, 1)}
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_of_torch_and_timm_are_recognized(wrapper):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert_equal(clean_state_dict(WRAPPED[wrapper](model).state_dict()), model.state_dict())


def test_prefix_of_a_compiled_submodule_is_stripped():
    model = nn.ModuleDict({"head": nn.Linear(2, 3)})
    weights = model.state_dict()
    model["head"] = torch.compile(model["head"])
    assert "head._orig_mod.weight" in model.state_dict()
    assert_equal(clean_state_dict(model.state_dict()), weights)


@pytest.mark.parametrize("prefix", ["module.", "model.", "net."])
def test_prefix_of_only_some_names_is_kept(prefix):
    names = {f"{prefix}weight": torch.zeros(1), "criterion.weight": torch.zeros(1)}
    assert_equal(clean_state_dict(names), names)


def test_averaged_weights_in_the_same_state_dict_are_separated(caplog):
    caplog.set_level(logging.INFO)
    names = {f"model.{name}": OTHER[name] for name in OTHER}
    names |= {f"ema_model.module.{name}": WEIGHTS[name] for name in WEIGHTS}
    names["ema_model.n_averaged"] = torch.tensor(3)
    assert_equal(clean_state_dict({"state_dict": names}), WEIGHTS)
    assert "using 3 of 5 tensors: those in ema_model., model_ema., ema." in caplog.text
    assert_equal(clean_state_dict({"state_dict": names}, use_ema=False), OTHER)
    assert "using 2 of 5 tensors: those not in ema_model., model_ema., ema." in caplog.text


def test_prefixes_are_stripped_only_at_the_start():
    names = {"neck.backbone.weight": torch.zeros(1), "backbone_norm.weight": torch.zeros(1)}
    assert_equal(clean_state_dict(names), names)


def test_duplicate_names_after_stripping_are_an_error():
    names = {"a.weight": torch.zeros(1), "a._orig_mod.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"two entries for a\.weight: .* and a\._orig_mod\.weight"):
        clean_state_dict(names)


@pytest.mark.parametrize("prefix", ["student.backbone", "student.backbone."])
@pytest.mark.parametrize("outer", ["", "module."])
def test_prefix_selects_a_part_of_a_model(outer, prefix):
    names = {f"student.backbone.{name}": tensor for name, tensor in WEIGHTS.items()}
    names |= {f"teacher.backbone.{name}": tensor for name, tensor in OTHER.items()}
    names |= {"student.backbone_2.weight": torch.ones(1), "student.neck.weight": torch.ones(1)}
    checkpoint = {"state_dict": {outer + name: tensor for name, tensor in names.items()}}
    assert_equal(clean_state_dict(checkpoint, prefix=prefix), WEIGHTS)
    message = r"prefix must match names in the checkpoint, which begin with .*, got 'backbone\.'"
    with pytest.raises(ValueError, match=message):
        clean_state_dict(checkpoint, prefix="backbone")


def test_only_the_backbone_of_a_detector_is_used(caplog):
    caplog.set_level(logging.INFO)
    names = {"module.neck.weight": torch.zeros(1), "ema_backbone_head_bias": torch.zeros(1)}
    names |= {"module.backbone." + name: tensor for name, tensor in WEIGHTS.items()}
    assert_equal(clean_state_dict({"state_dict": names}), WEIGHTS)
    assert "using 2 of 3 tensors: those in backbone." in caplog.text


@pytest.mark.parametrize("other", [{"epoch": 3}, {"head": {}}, {1: torch.zeros(1)}, {"text": "x"}])
def test_values_other_than_tensors_are_an_error(other):
    for checkpoint in (WEIGHTS | other, {"model": WEIGHTS | other}):
        with pytest.raises(ValueError, match=f"only tensors, got also {next(iter(other))}"):
            clean_state_dict(checkpoint)


# load_checkpoint


def test_pth_file_is_read(tmp_path):
    path = tmp_path / "last.pth"
    torch.save({"model": WEIGHTS, "epoch": 3, "best": {"top1": 0.5}}, path)
    checkpoint = load_checkpoint(path)
    assert (checkpoint["epoch"], checkpoint["best"]) == (3, {"top1": 0.5})
    assert_equal(checkpoint["model"], WEIGHTS)


def test_legacy_pth_file_is_read(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"model": WEIGHTS}, path, _use_new_zipfile_serialization=False)
    assert_equal(load_checkpoint(str(path))["model"], WEIGHTS)


def test_safetensors_file_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path)
    loaded = load_checkpoint(path)
    assert_equal({name: loaded[name] for name in WEIGHTS}, WEIGHTS)
    assert len(loaded) == len(WEIGHTS)


@pytest.mark.parametrize("map_location", ["meta", torch.device("meta")])
def test_pth_file_is_loaded_to_the_requested_device(tmp_path, map_location):
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
    """Return the error for a rejected file, which names it and gives no unsafe advice."""
    with pytest.raises(ValueError, match=r"\S") as refused:
        load_checkpoint(path)
    assert str(path) in str(refused.value)
    assert "weights_only" not in str(refused.value)
    return str(refused.value)


def test_pickle_named_safetensors_is_not_executed(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.safetensors"
    write_pickle(RunsCommand(f"touch {marker}"), path)
    refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize("contents", [[WEIGHTS], torch.zeros(2), 3, None])
def test_contents_other_than_a_dict_are_rejected(tmp_path, contents):
    torch.save(contents, tmp_path / "model.pth")
    message = f"must contain a dict, got a {type(contents).__name__}"
    assert message in refusal(tmp_path / "model.pth")


def test_whole_model_is_rejected(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    message = refusal(tmp_path / "model.pth")
    assert "it contains a whole model (torch.nn.modules.linear.Linear)" in message


@pytest.mark.parametrize("write", [write_zip, write_old, save_file])
def test_truncated_file_is_rejected_wherever_it_ends(tmp_path, write):
    path = tmp_path / ("model.safetensors" if write is save_file else "model.pth")
    write(WEIGHTS, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 100):
        path.write_bytes(whole[:length])
        refusal(path)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_random_bytes_are_rejected(tmp_path, name):
    path, generator = tmp_path / name, random.Random(0)
    for _ in range(100):
        path.write_bytes(generator.randbytes(generator.choice([1, 5, 50, 500])))
        refusal(path)


@pytest.mark.parametrize(
    "contents",
    [b"<!DOCTYPE html>", b"version https://git-lfs", b"import torch\n", bytes(99), b"", b"PK"],
    ids=["page", "pointer", "text", "zeros", "empty", "start of a zip"],
)
def test_other_files_are_rejected(tmp_path, contents):
    path = tmp_path / "model.pth"
    path.write_bytes(contents)
    beginning = f"not a zip archive or a pickle, it begins with {contents[:16]}"
    assert refusal(path) == f"{path} is damaged or not a checkpoint: {beginning}"


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path, name):
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(WEIGHTS, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match=f"^{path} cannot be read: Too many open files"):
            load_checkpoint(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert load_checkpoint(path).keys() == WEIGHTS.keys()


def test_files_of_other_programs_are_distinguished_from_damaged_ones(tmp_path):
    write_pickle({"epoch": 3}, tmp_path / "model.pth")
    assert refusal(tmp_path / "model.pth").endswith("a pickle not written by torch.save")
    np.savez(tmp_path / "model.npz", **{name: WEIGHTS[name].numpy() for name in WEIGHTS})
    assert refusal(tmp_path / "model.npz").endswith("zip archive not written by torch.save")


def test_error_names_the_missing_file(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            load_checkpoint(path)


# fetch_checkpoint


@pytest.mark.parametrize("kind", [str, Path])
def test_local_file_is_used_directly(tmp_path, kind):
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
    assert load_checkpoint(path).keys() == WEIGHTS.keys()


@pytest.mark.parametrize(
    "source",
    ["flash_internimage_nano.untrained", "flash_internimage_tiny", "resnet50.a1_in1k", "none.pth"],
)
def test_unknown_source_is_rejected(source):
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
def test_failed_save_keeps_the_existing_file(tmp_path, monkeypatch, existing):
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


# check_optimizer and load_weights


def loaded_optimizer(shape: tuple[int, ...], **kwargs) -> torch.optim.Optimizer:
    """Return an optimizer with a loaded state that selects other kernels.

    Args:
        shape: Shape of one tensor of the state.
        **kwargs: Options of the optimizer.
    """
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(3, 4))], **kwargs)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 4)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(shape)
    state["param_groups"][0].update(fused=True, foreach=False, maximize=True, lr=0.5)
    optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.parametrize("kwargs", [{}, {"foreach": True}, {"fused": True}])
def test_loaded_state_does_not_change_the_optimizers_kernels(kwargs):
    optimizer = loaded_optimizer((3, 4), **kwargs)
    check_optimizer(optimizer)
    group = optimizer.param_groups[0]
    expected = {"fused": None, "foreach": None, "maximize": False, "lr": 0.5, **kwargs}
    assert {name: group[name] for name in expected} == expected


def test_state_of_a_wrong_shape_is_rejected_for_fused_kernels():
    with pytest.raises(ValueError, match=r"exp_avg must have .*\(3, 4\), got \(1,\)"):
        check_optimizer(loaded_optimizer((1,), fused=True))
    optimizer = loaded_optimizer((1,))
    check_optimizer(optimizer)
    with pytest.raises(RuntimeError, match="shape"):
        optimizer.step()


def test_all_weights_are_loaded():
    source, model = nano(0, num_classes=5), nano(1, num_classes=5)
    load_weights(model, source.state_dict())
    assert_equal(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("has_config", [True, False])
def test_classifier_for_other_classes_keeps_its_initial_values(caplog, has_config):
    source, model = nano(0, num_classes=7), nano(1, num_classes=5)
    if not has_config:
        model.pretrained_cfg = {}
    own_head, _ = split_head(nano(1, num_classes=5).state_dict())
    with caplog.at_level(logging.WARNING):
        load_weights(model, source.state_dict())
    head, body = split_head(model.state_dict())
    assert_equal(head, own_head)
    assert_equal(body, split_head(source.state_dict())[1])
    assert caplog.messages == [
        "head stays randomly initialized: the checkpoint has 7 classes, the model 5"
    ]


def test_every_classifier_of_a_timm_model_is_recognized(caplog):
    source, model = (
        timm.create_model("deit_tiny_distilled_patch16_224", num_classes=n, depth=1) for n in (7, 5)
    )
    load_weights(model, source.state_dict())
    assert model.blocks[0].mlp.fc1.weight.equal(source.blocks[0].mlp.fc1.weight)
    assert [message.split()[0] for message in caplog.messages] == ["head", "head_dist"]


@pytest.mark.parametrize("classes", [7, 3])
def test_class_map_selects_the_classes(classes):
    source, model = nano(0, num_classes=classes), nano(1, num_classes=3)
    class_map = [classes - 1, 0, 1]
    load_weights(model, source.state_dict(), class_map)
    assert model.head.weight.equal(source.head.weight[class_map])
    assert model.head.bias.equal(source.head.bias[class_map])


@pytest.mark.parametrize("class_map", [[], [0, 1], [0, 1, 7], [0, 1, -1]])
def test_class_map_that_does_not_fit_is_an_error(class_map):
    source, model = nano(0, num_classes=7), nano(1, num_classes=3)
    with pytest.raises(ValueError, match="class_map must contain 3 indices below 7"):
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
            r"not a tensor: conv_head\.1\.0\.num_batches_tracked is of type int",
        ),
        (lambda weights: weights.clear(), r"missing: .* and \d+ more"),
        (
            lambda weights: weights.update({"head.weight": torch.zeros(5, 8)}),
            r"shape of head\.weight: \(5, 8\), expected \(5, 384\)",
        ),
        (lambda weights: weights.pop("head.weight"), r"missing: head\.weight"),
        (
            lambda weights: weights.update({"head.weight": 3}),
            r"not a tensor: head\.weight",
        ),
        (lambda weights: weights.update({"head.bias": torch.zeros(7)}), r"shape of head\.bias"),
    ],
    ids=[
        "missing",
        "unexpected",
        "shape",
        "no tensor",
        "empty",
        "width",
        "no head",
        "head",
        "bias",
    ],
)
def test_weights_that_do_not_fit_change_nothing(change, problem):
    model, weights = nano(1, num_classes=5), dict(nano(0, num_classes=5).state_dict())
    change(weights)
    with pytest.raises(ValueError, match=problem):
        load_weights(model, weights)
    assert_equal(model.state_dict(), nano(1, num_classes=5).state_dict())
