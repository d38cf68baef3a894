"""Tests of publishing classifiers on the Hub."""

import functools
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load as load_safetensors
from torch import Tensor

from flash_internimage import FlashInternImage
from flash_internimage.checkpoints import Entry, read_zoo
from flash_internimage.classification.config import Config, Data, Model
from flash_internimage.cli import zoo as tool
from flash_internimage.hub import check_repository, push, read_results, upload_folder
from flash_internimage.hub.card import datasets_of
from tests.flash_internimage.models import assert_equal, nano
from tests.hub import Hub, serve_hub, usage

NAME, REPO = "flash_internimage_nano", "me/digits"
RELEASED = "flash_internimage_nano.untrained"  # the only tag of this size
FILES = ["README.md", "config.json", "model.safetensors"]
CLASSES = [f"digit {i}" for i in range(10)]
ENTRY = Entry(
    task="classification",
    architecture="FlashInternImage",
    backbone="T",
    pretraining="ImageNet-1K",
    addresses=["https://example.org/never-asked.pth"],
    resolution=64,
    classes=1000,
    parameters=1,
    gmacs=4.87,
    published={"top1": 83.6},
    source="README of https://github.com/OpenGVLab/DCNv4",
)


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    """Apply to all tests of this module."""


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    with serve_hub(monkeypatch, tmp_path / "caches") as hub:
        yield hub


@pytest.fixture(scope="module")
def trained() -> FlashInternImage:
    """Return a trained model whose architecture differs from the default in one argument."""
    return nano(0, num_classes=10, layer_scale=0.5).eval()


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory) -> Path:
    """Write a checkpoint of classification.train, with other weights than the averaged ones."""
    config = Config(
        model=Model(name=NAME, num_classes=10, args={"layer_scale": 0.5}),
        data=Data(
            root="/home/me/data/digits",
            image_size=32,
            crop_pct=0.9,
            interpolation="bilinear",
            mean=(0.1, 0.2, 0.3),
            std=(0.4, 0.5, 0.6),
        ),
    )
    contents = {
        "model": nano(1, num_classes=10, layer_scale=0.5).state_dict(),
        "model_ema": trained.state_dict(),
        "classes": CLASSES,
        "config": config.model_dump(mode="json"),
    }
    path = tmp_path_factory.mktemp("run") / "best.pth"
    torch.save(contents, path)
    return path


@pytest.fixture
def changed(checkpoint, tmp_path) -> Callable[..., Path]:
    """Return a function that writes a checkpoint with changed contents."""

    def changed(change: Callable[[dict], None]) -> Path:
        contents = torch.load(checkpoint)
        change(contents)
        torch.save(contents, tmp_path / "changed.pth")
        return tmp_path / "changed.pth"

    return changed


@pytest.fixture
def released(tmp_path, monkeypatch) -> Path:
    """Write a published file, which `ENTRY` finds in the cache."""
    path = tmp_path / "flash_intern_image_nano.pth"
    torch.save({"model": nano(0).state_dict(), "config": SimpleNamespace()}, path)
    monkeypatch.setattr(Entry, "fetch", lambda entry, offline: path)
    return path


@pytest.fixture
def image(tmp_path, monkeypatch) -> Path:
    """Write the image that model cards read."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save("image.jpg")
    return tmp_path / "image.jpg"


@pytest.fixture
def run(capsys, caplog) -> Callable[..., str]:
    """Return a function that runs `zoo push` and returns its output."""

    def run(*arguments) -> str:
        assert tool.main(["push", *map(str, arguments)]) == 0, caplog.text
        return capsys.readouterr().out.strip()

    return run


@pytest.fixture
def refused(caplog) -> Callable[..., str]:
    """Return a function that runs a failing `zoo push` and returns the logged line."""

    def refused(*arguments) -> str:
        caplog.set_level(logging.DEBUG)
        assert tool.main(["push", *map(str, arguments)]) == 2
        [message] = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
        assert "\n" not in message
        return message

    return refused


def release(repo_id: str = "me/nano", **options) -> str:
    return push(RELEASED, repo_id, entry=ENTRY, **options)


def run_code(code: str) -> dict:
    namespace: dict = {}
    exec(code, namespace)
    return namespace


def expected_probabilities(model: FlashInternImage, image: Path) -> Tensor:
    """Preprocess as the training config says, without what the folder says."""
    transform = timm.data.create_transform(
        (3, 32, 32), interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6),
        crop_pct=0.9, is_training=False,
    )  # fmt: skip
    with torch.inference_mode():
        return model(transform(Image.open(image).convert("RGB"))[None]).softmax(1)


def test_the_code_of_the_card_predicts_as_the_trained_model(hub, trained, checkpoint, image, run):
    url = run(NAME, REPO, "--checkpoint", checkpoint)
    assert url.startswith(f"{hub.address}/{REPO}/commit/")
    card = image.with_name("README.md")
    card.write_bytes(hub.files[f"/{REPO}/resolve/main/README.md"])
    found = run_code(usage(card))
    assert found["probabilities"].equal(expected_probabilities(trained, image))
    assert_equal(found["model"].state_dict(), trained.state_dict())
    assert found["model"].pretrained_cfg["label_names"] == CLASSES


def test_a_written_folder_is_loaded_by_timm(trained, checkpoint, image, run, tmp_path):
    folder = tmp_path / "new" / "folder"
    assert run(NAME, REPO, "--checkpoint", checkpoint, "--folder", folder) == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    code = usage(folder / "README.md")
    assert f'"hf-hub:{REPO}"' in code
    found = run_code(code.replace(f"hf-hub:{REPO}", f"local-dir:{folder}"))
    assert found["probabilities"].equal(expected_probabilities(trained, image))


def test_all_files_are_uploaded_in_one_commit(hub, trained, checkpoint, run, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    run(NAME, REPO, "--checkpoint", checkpoint, "--private")
    run(NAME, REPO, "--checkpoint", checkpoint, "--folder", tmp_path / "folder")
    assert hub.commits == [(REPO, "main", f"Add {NAME}", FILES)]
    assert hub.private == {REPO: True}
    uploaded = {name: hub.files[f"/{REPO}/resolve/main/{name}"] for name in FILES}
    assert uploaded == {name: (tmp_path / "folder" / name).read_bytes() for name in FILES}
    assert list(hub.storage.values()) == [uploaded["model.safetensors"]]
    weights = load_safetensors(uploaded["model.safetensors"])
    assert_equal(weights, {name: trained.state_dict()[name] for name in weights})
    assert len(weights) == len(trained.state_dict())
    assert hub.token not in caplog.text


def test_a_branch_is_created_and_named_in_the_card(hub, checkpoint, image, run):
    run(NAME, REPO, "--checkpoint", checkpoint, "--branch", "v2")
    assert hub.branches == [f"{REPO}/v2"]
    card = image.with_name("README.md")
    card.write_bytes(hub.files[f"/{REPO}/resolve/v2/README.md"])
    assert f'"hf-hub:{REPO}@v2"' in usage(card)
    run_code(usage(card))
    expression = 'hf_hub_download("me/digits", "model.pth", revision="v2")'
    assert check_repository(REPO, "v2").download("model.pth") == expression


def test_an_existing_repository_gets_another_commit(hub, checkpoint, run):
    hub.files[other := f"/{REPO}/resolve/main/LICENSE"] = b"MIT"
    for license in ("mit", "cc-by-4.0"):
        run(NAME, REPO, "--checkpoint", checkpoint, "--license", license)
        assert f"license: {license}\n" in hub.files[f"/{REPO}/resolve/main/README.md"].decode()
    assert [files for *_, files in hub.commits] == [FILES, FILES]
    assert hub.files[other] == b"MIT"


def test_the_card_of_own_weights_states_what_is_known(checkpoint, run, tmp_path):
    results = tmp_path / "results.json"
    measured = {"top1": 98.3333, "top5": 99.96, "images": 360, "loss": 0.1}
    results.write_text(json.dumps({"model": NAME, "checkpoint": "output/best.pth", **measured}))
    run(NAME, REPO, "--checkpoint", checkpoint, "--results", results, "--folder", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.license, card.data.datasets) == ("timm", None, None)
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.model_name == "digits"
    top1, top5 = card.data.eval_results
    assert (top1.metric_value, top5.metric_value) == (98.33, 99.96)
    assert top1.metric_name == "Top-1 accuracy (measured on 360 images)"
    assert "| digits | Top-1 accuracy | 98.33 | measured on 360 images |" in card.text
    assert "FlashInternImage-nano for image classification, trained on digits.\n" in card.text
    assert "- **License:** not stated" in card.text
    assert not [path for path in (tmp_path / "out").iterdir() if b"/home/me" in path.read_bytes()]


def test_the_card_of_released_weights_separates_published_from_measured(released, tmp_path):
    results = tmp_path / "results.json"
    figures = {"top1": {"measured": 83.58, "published": 83.6}}
    measured = {"name": RELEASED, "checkpoint": str(released), "images": 50_000}
    results.write_text(json.dumps({**measured, "figures": figures}))
    release(results=results, folder=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == ["imagenet-1k"]
    assert [result.metric_value for result in card.data.eval_results] == [83.6, 83.58]
    assert "| ImageNet-1K val | Top-1 accuracy | 83.6 | published by the authors |" in card.text
    assert "| ImageNet-1K val | Top-1 accuracy | 83.58 | measured on 50,000 images |" in card.text
    assert "Published in: README of https://github.com/OpenGVLab/DCNv4." in card.text
    assert "The weights are those released by the authors" in card.text


def test_the_license_of_released_weights_is_not_invented(released, tmp_path):
    for given, stated in ((None, "unknown"), ("mit", "mit")):
        folder = tmp_path / stated
        release(folder=folder, license=given)
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == stated
        reason = "not known for the weights; the authors' code is under the MIT license"
        assert (reason in card.text) == (given is None)
        config = json.loads((folder / "config.json").read_text())
        assert config["pretrained_cfg"]["license"] == stated


def test_released_weights_keep_their_classifier(released, tmp_path):
    release(folder=tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert_equal(loaded.state_dict(), nano(0).state_dict())


def test_own_weights_say_where_the_training_started(changed, run, tmp_path):
    released = {"initial_checkpoint": "flash_internimage_tiny.in1k"}
    checkpoint = changed(lambda contents: contents["config"]["model"].update(released))
    run(
        NAME, REPO, "--checkpoint", checkpoint, "--dataset", "cifar10", "--folder", tmp_path / "out"
    )
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.base_model, data.datasets) == ("OpenGVLab/DCNv4", ["cifar10"])


def test_the_card_of_internimage_names_its_own_paper(run, tmp_path):
    size = {"channels": 16, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8]}
    options = Model(
        name="internimage_tiny", num_classes=10, args=size,
        initial_checkpoint="internimage_tiny.in1k",
    )  # fmt: skip
    weights = timm.create_model(options.name, num_classes=10, **size).state_dict()
    contents = {"model": weights, "config": Config(model=options).model_dump(mode="json")}
    torch.save(contents, tmp_path / "own.pth")
    run(options.name, REPO, "--checkpoint", tmp_path / "own.pth", "--folder", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "OpenGVLab/InternImage"
    assert card.data.tags[-3:] == ["internimage", "dcnv3", "arxiv:2211.05778"]
    assert "\nInternImage-T for image classification" in card.text
    assert "(https://arxiv.org/abs/2211.05778)" in card.text
    assert "{wang2023internimage," in card.text
    assert "xiong2024efficient" not in card.text


def test_only_datasets_of_the_hub_are_named():
    zoo = read_zoo()
    assert datasets_of(zoo["internimage_huge.joint_in22k_ft_in1k_640"]) == [
        "imagenet-1k", "imagenet-22k",
    ]  # fmt: skip
    assert datasets_of(zoo["internimage_giant.joint_in22k_384"]) == ["imagenet-22k"]


def test_weights_of_other_programs_take_the_settings_of_timm(run, tmp_path):
    torch.save(nano(0, num_classes=7).state_dict(), tmp_path / "weights.pth")
    run(NAME, REPO, "--checkpoint", tmp_path / "weights.pth", "--folder", tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert loaded.num_classes == 7
    assert_equal(loaded.state_dict(), nano(0, num_classes=7).state_dict())
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, 64, 64)


WRONG = [
    (["resnet50", REPO], "no checkpoint or config 'resnet50'; see `flash-internimage zoo list`"),
    (
        ["upernet_flash_internimage_nano_digit", REPO],
        "no checkpoint or config 'upernet_flash_internimage_nano_digit'; did you mean "
        "'upernet_flash_internimage_nano_digits_scenes' or ",
    ),
    (
        ["mask2former_internimage", REPO],
        "did you mean 'mask2former_flash_internimage_t_512_160k_ade20k' or "
        "'mask2former_flash_internimage_s_640_160k_ade20k'?",
    ),
    (["flash_internimage_tinny.in1k", REPO], "did you mean 'flash_internimage_tiny.in1k' or "),
    (
        ["flash_internimage_nano_digits", REPO],
        "CONFIG must end in .py, got flash_internimage_nano_digits; publish a classifier by the",
    ),
    ([NAME, REPO], f"--checkpoint must be set for {NAME}, which has no released weights"),
    ([NAME, "digits"], "REPO_ID must be USER/NAME"),
    ([NAME, "me/my/digits"], "REPO_ID must be USER/NAME"),
    ([NAME, "me/di gits"], "REPO_ID must be USER/NAME"),
    ([NAME, REPO, "--branch", "a b"], "--branch must be the name of a branch, got 'a b'"),
    ([NAME, REPO, "--checkpoint", "none.pth"], "checkpoint not found: none.pth"),
    ([NAME, REPO, "--checkpoint", "best.pth", "--folder", "."], "--folder must be a new or empty"),
    ([NAME, REPO, "--folder", "new", "--private"], "--private must be used without --folder"),
    (
        ["flash_internimage_tiny.in1k", REPO, "--dataset", "coco"],
        "--dataset requires --checkpoint; the dataset of released weights is known",
    ),
    (
        ["flash_internimage_tiny", REPO, "--checkpoint", "best.pth"],
        f"must be a checkpoint of flash_internimage_tiny, got one of {NAME}",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_one_error(hub, checkpoint, refused, monkeypatch, arguments, message):
    monkeypatch.chdir(checkpoint.parent)
    assert message in refused(*arguments)
    assert hub.requests == []


def without_head(contents: dict) -> None:
    del contents["model_ema"]["head.weight"]


def without_a_layer(contents: dict) -> None:
    del contents["model_ema"]["patch_embed.conv1.bias"]


def with_a_nan(contents: dict) -> None:
    contents["model_ema"]["head.bias"][3] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_head, "must contain a classifier, got no head.weight"),
        (without_a_layer, "does not match the model: missing: patch_embed.conv1.bias"),
        (with_a_nan, "weights must be finite, got NaN or infinity in head.bias"),
    ],
)
def test_nothing_is_uploaded_if_the_weights_do_not_fit(hub, refused, changed, change, message):
    assert message in refused(NAME, REPO, "--checkpoint", changed(change))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "must be JSON"),
        ('{"loss": 1}', "must contain metrics of an evaluation program"),
        ('{"top1": 98, "model": "flash_internimage_tiny"}', f"must be of {NAME}, got those of"),
        ('{"top1": 98, "checkpoint": "last.pth"}', "must be of best.pth, got those of last.pth"),
        ('{"top1": 98, "checkpoint": "released"}', "must be of best.pth, got those of released"),
        ('{"top1": 9830}', "top1 must be a percentage, got 9830"),
        ('{"figures": {"top1": {"measured": NaN}}}', "top1 must be a percentage, got nan"),
    ],
)
def test_results_of_another_model_are_refused(
    hub, refused, checkpoint, tmp_path, contents, message
):
    results = tmp_path / "results.json"
    results.write_text(contents)
    assert message in refused(NAME, REPO, "--checkpoint", checkpoint, "--results", results)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "model", "accepted"),
    [
        ("flash_internimage_large.in22k_384", "flash_internimage_large.in22k_384", True),
        ("flash_internimage_large.in22k_384", "flash_internimage_large.in22k_ft_in1k_384", False),
        ("flash_internimage_large.in22k_384", "flash_internimage_large", True),
        ("flash_internimage_large", "flash_internimage_large.in22k_384", True),
        ("flash_internimage_large", "flash_internimage_base", False),
        ("flash_internimage_large.in22k_384", "flash_internimage_base", False),
    ],
)
def test_timm_tags_distinguish_results(name, model, accepted, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"top1": 88.1, "model": model}))
    read = functools.partial(read_results, tmp_path / "results.json", name, "a.pth", False)
    if accepted:
        assert [result.value for result in read()] == [88.1]
    else:
        with pytest.raises(ValueError, match=f"must be of {name}, got those of {model}"):
            read()


def test_a_missing_token_is_one_error(hub, refused, checkpoint, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    message = refused(NAME, REPO, "--checkpoint", checkpoint)
    assert message.startswith("an access token with write permission is required: run `hf auth")
    assert hub.requests == []


@pytest.mark.parametrize(
    "token", ["hf_wrong", "hf_\N{LATIN SMALL LETTER E WITH ACUTE}", "hf_a\x01b"]
)
def test_a_wrong_token_is_one_error_that_does_not_show_it(
    hub, refused, checkpoint, monkeypatch, caplog, token
):
    monkeypatch.setenv("HF_TOKEN", token)
    message = refused(NAME, REPO, "--checkpoint", checkpoint)
    if token == "hf_wrong":
        assert message.startswith(f"upload to {REPO} failed: ")
        assert "401" in message
    else:
        assert message == "the access token must consist of printable ASCII characters"
    assert token not in caplog.text
    assert repr(token)[1:-1] not in caplog.text
    assert hub.commits == []


def test_a_refused_upload_is_one_error(hub, refused, checkpoint):
    hub.refuses = (403, f"You have no rights to {REPO} with {hub.token}")
    message = refused(NAME, REPO, "--checkpoint", checkpoint)
    assert message.startswith(f"upload to {REPO} failed: ")
    assert f"You have no rights to {REPO} with ***" in message


def test_the_traceback_of_a_refused_upload_does_not_show_the_token(hub, tmp_path):
    hub.refuses = (403, f"You have no rights to {REPO} with {hub.token}")
    with pytest.raises(OSError, match=r"with \*\*\*") as error:
        upload_folder(tmp_path, check_repository(REPO))
    assert hub.token not in "".join(traceback.format_exception(error.value))


def test_a_public_repository_is_not_taken_for_a_private_one(hub, refused, checkpoint):
    hub.private[REPO] = False
    message = refused(NAME, REPO, "--checkpoint", checkpoint, "--private")
    assert message.startswith(f"--private cannot be used with {REPO}, which exists and is public")
    assert hub.commits == []
