"""Tests of pretrained weights in timm: every source loads them completely, or says why not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from timm.task.distillation import DistillationTeacher
from torch import nn

from flash_internimage import FlashInternImage
from tests.flash_internimage.checkpoints import RunsCommand
from tests.flash_internimage.models import assert_equal, nano, split_head
from tests.servers import FileServer, serve, use_as_hub, use_own_caches


@pytest.fixture(scope="module")
def source() -> FlashInternImage:
    """Return a model with the number of classes of the released ones."""
    return nano(0)


@pytest.fixture(scope="module")
def own() -> FlashInternImage:
    """Return a model with a different number of classes."""
    return nano(0, num_classes=10)


def file(model: nn.Module | dict, folder: Path, **overlay) -> dict:
    """Save weights and return the keyword arguments with which timm loads the file."""
    path = folder / "model.pth"
    torch.save(dict(model if isinstance(model, dict) else model.state_dict()), path)
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), **overlay}}


@pytest.fixture
def server(own, tmp_path, monkeypatch) -> Iterator[FileServer]:
    """Serve the weights of `own` at a URL and as a repository of the hub."""
    save_file(own.state_dict(), tmp_path / "own.safetensors")
    torch.save({"model": own.state_dict(), "config": SimpleNamespace()}, tmp_path / "own.pth")
    use_own_caches(monkeypatch, tmp_path / "caches")
    save_for_hf(own, tmp_path / "own")
    files = {
        "/own.pth": (tmp_path / "own.pth").read_bytes(),
        "/me/own/resolve/main/config.json": (tmp_path / "own" / "config.json").read_bytes(),
        "/me/own/resolve/main/model.safetensors": (tmp_path / "own.safetensors").read_bytes(),
    }
    with serve(files) as server:
        use_as_hub(monkeypatch, server.address)
        yield server


def from_address(own, tmp_path, server, **kwargs):
    overlay = {"url": f"{server.address}/own.pth"}
    return nano(1, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def from_hub(own, tmp_path, server, **kwargs):
    # timm prefers the hub to the URL.
    overlay = {"hf_hub_id": "me/own", "url": f"{server.address}/other.pth"}
    return nano(1, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def from_name_on_hub(own, tmp_path, server, **kwargs):
    return timm.create_model("hf-hub:me/own", pretrained=True, **kwargs)


def from_file(own, tmp_path, server, **kwargs):
    return nano(1, **file(own, tmp_path), **kwargs)


def from_described_file(own, tmp_path, server, **kwargs):
    return nano(1, **file(own, tmp_path, num_classes=10), **kwargs)


def from_cfg(own, tmp_path, server, **kwargs):
    cfg = file(own, tmp_path)["pretrained_cfg_overlay"]
    return nano(1, pretrained=True, pretrained_cfg=cfg, **kwargs)


def from_state_dict(own, tmp_path, server, **kwargs):
    overlay = {"state_dict": dict(own.state_dict())}
    return nano(1, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def from_container(own, tmp_path, server, **kwargs):
    overlay = {"state_dict": {"epoch": 3, "model_ema": dict(own.state_dict())}}
    return nano(1, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def from_folder(own, tmp_path, server, **kwargs):
    save_for_hf(own, tmp_path / "folder")
    return timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True, **kwargs)


WAYS = pytest.mark.parametrize(
    "way",
    [
        from_address, from_hub, from_file, from_described_file, from_cfg, from_state_dict,
        from_container, from_folder, from_name_on_hub,
    ],
)  # fmt: skip


@WAYS
def test_own_weights_are_loaded_with_their_classifier(own, tmp_path, server, way, caplog):
    model = way(own, tmp_path, server, num_classes=10)
    assert_equal(model.state_dict(), own.state_dict())
    assert model.pretrained_cfg["num_classes"] == 10
    assert "state_dict" not in model.pretrained_cfg
    assert caplog.messages == []


@WAYS
def test_classifier_for_other_classes_keeps_its_initial_values(own, tmp_path, server, way, caplog):
    model = way(own, tmp_path, server, num_classes=7)
    assert model.head.out_features == 7
    assert_equal(split_head(model.state_dict())[1], split_head(own.state_dict())[1])
    assert caplog.messages == [
        "head stays randomly initialized: the checkpoint has 10 classes, the model 7"
    ]


@WAYS
@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx"])
def test_feature_maps_use_the_loaded_weights(own, tmp_path, server, way, feature_cls):
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = own.eval().forward_intermediates(x, [1, 2], intermediates_only=True)
    features = way(
        own, tmp_path, server, features_only=True, out_indices=(1, 2), feature_cls=feature_cls
    )
    actual = features.eval()(x)
    assert [m.equal(e) for m, e in zip(actual, expected, strict=True)] == [True, True]


@WAYS
@pytest.mark.parametrize("in_chans", [1, 4])
def test_the_stem_is_adapted_to_other_input_channels(own, tmp_path, server, way, in_chans):
    model = way(own, tmp_path, server, num_classes=10, in_chans=in_chans)
    weight = own.patch_embed.conv1.weight
    expected = weight.sum(1, keepdim=True) if in_chans == 1 else weight[:, [0, 1, 2, 0]] * 3 / 4
    torch.testing.assert_close(model.patch_embed.conv1.weight, expected)
    assert model.head.weight.equal(own.head.weight)


@WAYS
@pytest.mark.parametrize("global_pool", ["avg", ""])
def test_a_model_without_classifier_loads_the_rest(own, tmp_path, server, way, global_pool):
    model = way(own, tmp_path, server, num_classes=0, global_pool=global_pool)
    assert_equal(model.state_dict(), split_head(own.state_dict())[1])


def test_checkpoint_path_loads_the_weights(own, tmp_path):
    file(own, tmp_path)
    model = nano(1, num_classes=10, checkpoint_path=tmp_path / "model.pth")
    assert_equal(model.state_dict(), own.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        nano(1, num_classes=7, checkpoint_path=tmp_path / "model.pth")


def test_a_distillation_teacher_loads_its_weights(own, tmp_path):
    path = file(own, tmp_path)["pretrained_cfg_overlay"]["file"]
    teacher = DistillationTeacher(
        "flash_internimage_nano", 10, pretrained_path=path, device="cpu", dtype=torch.float64
    )
    weights = {name: tensor.double() for name, tensor in own.state_dict().items()}
    assert teacher.model.head.weight.equal(weights["head.weight"])
    assert teacher(torch.zeros(1, 3, 64, 64, dtype=torch.float64)).dtype == torch.float64


def test_own_weights_for_other_channels_are_loaded_unchanged(tmp_path, caplog):
    own = nano(0, num_classes=10, in_chans=4)
    model = nano(1, num_classes=10, in_chans=4, **file(own, tmp_path))
    assert_equal(model.state_dict(), own.state_dict())
    assert model.pretrained_cfg["input_size"][0] == 4
    assert caplog.messages == []
    weight = nano(1, num_classes=10, **file(own, tmp_path)).patch_embed.conv1.weight
    torch.testing.assert_close(weight, own.patch_embed.conv1.weight[:, :3] * 4 / 3)


def without(name: str) -> Callable[[dict], None]:
    return lambda weights: weights.pop(name)


def reshape(name: str, *shape: int) -> Callable[[dict], None]:
    return lambda weights: weights.update({name: torch.zeros(shape)})


def rename(old: str, new: str) -> Callable[[dict], None]:
    return lambda weights: weights.update({new: weights.pop(old)})


FC1 = "levels.0.blocks.0.mlp.fc1.weight"
MISMATCHES = [
    (rename(FC1, "levels.0.x"), {}, r"missing: .*fc1\.weight; unexpected: levels\.0\.x"),
    (without("patch_embed.conv1.weight"), {}, r"missing: patch_embed\.conv1\.weight"),
    (reshape("patch_embed.conv1.weight", 16, 3, 7, 7), {}, r"shape of patch_embed\.conv1\.weight"),
    (reshape(FC1, 128, 8), {}, rf"shape of {FC1}: \(128, 8\), expected \(128, 32\)"),
    (without("conv_head.0.weight"), {}, r"missing: conv_head\.0\.weight"),
]
OWN_HEAD = [
    (without("head.weight"), {"num_classes": 1000}, r"missing: head\.weight"),
    (without("head.bias"), {"num_classes": 10}, r"missing: head\.bias"),
    (
        lambda weights: None,
        {"num_classes": 1000},
        r"shape of head\.weight: \(10, 384\), expected \(1000, 384\)",
    ),
    (
        lambda weights: None,
        {"num_classes": 10, "global_pool": "catavgmax"},
        r"shape of head\.weight: \(10, 384\), expected \(10, 768\)",
    ),
]


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [(change, {"num_classes": n}, message) for change, _, message in MISMATCHES for n in (7, 10, 0)]
    + [(change, {"features_only": True}, message) for change, _, message in MISMATCHES[:-1]]
    + [(change, {"in_chans": 1}, message) for change, _, message in MISMATCHES]
    + OWN_HEAD,
)
def test_a_checkpoint_that_does_not_fit_is_rejected(own, tmp_path, change, kwargs, message):
    weights = dict(own.state_dict())
    change(weights)
    with pytest.raises(ValueError, match=message):
        nano(1, **kwargs, **file(weights, tmp_path))


def test_weights_without_classifier_keep_the_initial_one_and_are_logged(own, tmp_path, caplog):
    weights = split_head(own.state_dict())[1]
    model = nano(1, num_classes=7, **file(weights, tmp_path))
    assert_equal(split_head(model.state_dict())[1], weights)
    assert caplog.messages == [
        "head stays randomly initialized: the checkpoint has no classes, the model 7"
    ]


def test_non_strict_loading_logs_the_names_that_do_not_match(own, tmp_path, caplog):
    weights = dict(own.state_dict())
    rename(FC1, "levels.0.x")(weights)
    model = nano(1, num_classes=10, pretrained_strict=False, **file(weights, tmp_path))
    assert caplog.messages == [f"2 names do not match: {FC1}; levels.0.x"]
    expected = {**own.state_dict(), FC1: nano(1, num_classes=10).state_dict()[FC1]}
    assert_equal(model.state_dict(), expected)
    reshape("conv_head.0.weight", 3)(weights)
    with pytest.raises(ValueError, match=r"shape of conv_head\.0\.weight"):
        nano(1, num_classes=10, pretrained_strict=False, **file(weights, tmp_path))


def test_error_lists_missing_and_unexpected_names(own, tmp_path):
    weights = {f"model.{name}": tensor for name, tensor in own.state_dict().items()}
    weights["criterion.weight"] = torch.ones(10)
    with pytest.raises(ValueError, match=r"missing: .*unexpected: model\.patch.* and \d+ more"):
        nano(1, num_classes=7, **file(weights, tmp_path))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_weights_are_rejected(own, tmp_path, value):
    weights = own.state_dict()
    weights[FC1] = weights[FC1].clone().fill_(value)
    with pytest.raises(ValueError, match=rf"weights must be finite, got NaN or infinity in {FC1}"):
        nano(1, num_classes=10, **file(weights, tmp_path))


def test_a_file_without_pretrained_is_ignored_with_a_warning(own, tmp_path, caplog):
    nano(1, num_classes=10, **(file(own.state_dict(), tmp_path) | {"pretrained": False}))
    assert caplog.messages == [
        "file of pretrained_cfg_overlay has no effect without pretrained=True"
    ]


def test_pretrained_models_on_the_meta_device_are_rejected(own, tmp_path):
    with pytest.raises(ValueError, match="device must not be 'meta' with pretrained=True"):
        nano(1, num_classes=10, device="meta", **file(own, tmp_path))


def test_custom_load_is_rejected(own, tmp_path):
    with pytest.raises(ValueError, match="custom_load must be False for flash_internimage_nano"):
        nano(1, num_classes=10, **file(own, tmp_path, custom_load=True))


def test_released_weights_are_loaded_with_their_classifier(source, tmp_path):
    model = nano(1, **file({"model": source.state_dict(), "epoch": 299}, tmp_path))
    assert_equal(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx"])
def test_weights_of_a_feature_extractor_are_loaded(tmp_path, feature_cls):
    kwargs = {"features_only": True, "out_indices": (0, 1, 2, 3), "feature_cls": feature_cls}
    expected = nano(0, **kwargs).state_dict()
    actual = nano(1, **kwargs, **file(expected, tmp_path)).state_dict()
    assert len(actual) > 50
    # Feature maps do not use conv_head.
    expected |= {name: actual[name] for name in actual if "conv_head" in name}
    assert_equal(actual, expected)


def test_a_feature_extractor_loads_the_backbone_of_a_detector(source, tmp_path):
    detector = {"backbone." + name: tensor for name, tensor in source.state_dict().items()}
    detector |= {"neck.weight": torch.zeros(1)}
    del detector["backbone.conv_head.0.weight"]
    model = nano(1, features_only=True, **file({"state_dict": detector}, tmp_path)).model
    own = model.state_dict()
    assert_equal(own, {name: source.state_dict()[name] for name in own})


@pytest.mark.parametrize("address", ["{}/own.pth", "https://huggingface.co/me/it/resolve/main/{}"])
def test_cache_dir_selects_the_folder_of_downloads(own, tmp_path, server, address, caplog):
    server.files["/me/it/resolve/main/own.pth"] = server.files["/own.pth"]
    overlay = {"url": address.format(server.address if "{}/" in address else "own.pth")}
    kwargs = {"num_classes": 10, "pretrained": True, "pretrained_cfg_overlay": overlay}
    cache = tmp_path / "elsewhere"
    for _ in range(2):
        requests = len(server.requests)
        model = nano(1, cache_dir=cache, **kwargs)
        assert_equal(model.state_dict(), own.state_dict())
    assert len(server.requests) == requests
    assert [path.name for path in cache.rglob("*.pth")] == ["own.pth"]
    assert not (tmp_path / "caches").exists()


def test_nothing_is_executed(source, tmp_path):
    marker = tmp_path / "marker"
    contents = {"model": source.state_dict(), "config": RunsCommand(f"touch {marker}")}
    assert_equal(nano(1, **file(contents, tmp_path)).state_dict(), source.state_dict())
    assert not marker.exists()
