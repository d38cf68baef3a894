"""Tests of knowledge distillation."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from flash_internimage.checkpoints import load_checkpoint, save_atomically
from flash_internimage.classification import distillation
from flash_internimage.classification.config import ConfigError
from tests.classification.helpers import CPU, SMALL, build

ALPHA, TEMPERATURE = 0.7, 3.0


@pytest.fixture
def teacher(checkpoint) -> Path:
    """Return the checkpoint of a model with the classes of the digits."""
    return checkpoint["between"]


@pytest.fixture
def student(config, deterministic_images):
    """Return a function that builds a trainer with a teacher."""

    def build_student(teacher=None, **changes):
        options = {} if teacher is None else {"teacher": str(teacher)}
        options |= {"alpha": ALPHA, "temperature": TEMPERATURE}
        changes |= {"augmentation": deterministic_images, "model": {"drop_path_rate": 0.0}}
        return build(config(distillation=options, ema_decay=None, **changes))

    return build_student


def logits_of(teacher: Path, images: torch.Tensor) -> torch.Tensor:
    model = timm.create_model("flash_internimage_nano", num_classes=10, **SMALL)
    model.load_state_dict(load_checkpoint(teacher)["model_ema"])
    return model.eval()(images).detach()


def by_hand(student, images, labels, teacher_logits) -> float:
    logits = student.model(images)
    p = (teacher_logits / TEMPERATURE).softmax(1)
    q = (logits / TEMPERATURE).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
    return ((1 - ALPHA) * loss + ALPHA * TEMPERATURE**2 * divergence).item()


def test_the_loss_is_that_of_hinton(student, teacher):
    trainer = student(teacher)
    batch = next(iter(trainer.train_loader))
    expected = by_hand(trainer, *batch, logits_of(teacher, batch[0]))
    assert trainer.train_update([batch]) == pytest.approx(expected, rel=1e-4)


def test_images_are_normalized_as_the_teacher_expects(student, teacher):
    data = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.3]}
    trainer = student(teacher, data=data)
    images, labels = next(iter(trainer.train_loader))
    own, imagenet = ([torch.tensor(t).view(3, 1, 1) for t in pair] for pair in (
        data.values(), [(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]
    ))  # fmt: skip
    seen = (images * own[1] + own[0] - imagenet[0]) / imagenet[1]
    expected = by_hand(trainer, images, labels, logits_of(teacher, seen))
    assert trainer.train_update([(images, labels)]) == pytest.approx(expected, rel=1e-4)


def test_the_teacher_is_only_evaluated(student, teacher):
    """It has no gradients, its batch norm does not adapt, and checkpoints do not contain it."""
    trainer, without = student(teacher), student()
    model = trainer.distillation.teacher.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.train_update([next(iter(trainer.train_loader))])
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert trainer.state_dict().keys() == without.state_dict().keys()
    assert trainer.state_dict()["model"].keys() == without.state_dict()["model"].keys()


def test_the_teacher_does_not_change_the_random_numbers(student, teacher):
    with_teacher, state = student(teacher), torch.get_rng_state()
    without = student()
    assert torch.equal(state, torch.get_rng_state())
    weights = without.model.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in with_teacher.model.state_dict().items())


def test_without_weight_the_teacher_has_no_effect(config, deterministic_images, teacher):
    losses = []
    for options in ({}, {"teacher": str(teacher), "alpha": 0.0}):
        trainer = build(config(distillation=options, augmentation=deterministic_images))
        torch.manual_seed(0)  # of stochastic depth
        losses.append(trainer.train_update([next(iter(trainer.train_loader))]))
    assert losses[0] == losses[1]


def test_a_released_model_can_teach(student, teacher, tmp_path, monkeypatch):
    """The released weights of a timm model are found by its name, with its normalization."""
    save_atomically({"model": load_checkpoint(teacher)["model_ema"]}, tmp_path / "model.pth")
    name = "flash_internimage_nano"
    cfg = replace(
        timm.get_pretrained_cfg(name),
        file=str(tmp_path / "model.pth"), num_classes=10, mean=(0.1,) * 3, std=(0.2,) * 3,
    )  # fmt: skip
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda *args, **kwargs: cfg)
    create = timm.create_model

    def create_small(*args, **kwargs):
        overlay = {"file": cfg.file, "num_classes": 10} if kwargs.get("pretrained") else None
        return create(*args, **{**kwargs, **SMALL}, pretrained_cfg_overlay=overlay)

    monkeypatch.setattr(timm, "create_model", create_small)
    trainer = student(name, data={"mean": [0.1] * 3, "std": [0.2] * 3})
    batch = next(iter(trainer.train_loader))
    monkeypatch.undo()
    expected = by_hand(trainer, *batch, logits_of(teacher, batch[0]))
    assert trainer.train_update([batch]) == pytest.approx(expected, rel=1e-4)


def test_a_model_without_released_weights_is_rejected(student):
    message = r"must have released weights, got 'flash_internimage_nano'; pass a checkpoint of"
    with pytest.raises(ConfigError, match=message):
        student("flash_internimage_nano")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash_internimage_tiny.in1k", "must have the 10 classes of the model, got 1000"),
        ("nowhere.pth", r"must be a timm model or a checkpoint .*, got 'nowhere\.pth'"),
        ("README.md", r"must be a timm model or a checkpoint .*, got 'README\.md'"),
    ],
)
def test_an_unsuitable_teacher_is_rejected(student, name, message, monkeypatch):
    monkeypatch.setattr(distillation, "create_model", pytest.fail)
    with pytest.raises(ConfigError, match=f"distillation.teacher.*{message}") as error:
        student(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("config"), "cannot be used: it must be a checkpoint of classification.tr"),
        (lambda c: c["config"].pop("model"), "cannot be used: KeyError: 'model'"),
        (lambda c: c["config"].update(model=3), "cannot be used: TypeError: 'int' object is not"),
        (lambda c: c["config"]["model"].update(name="x"), "cannot be used: model.name must be a"),
        (
            lambda c: c["config"]["model"].update(num_classes=9),
            "it must have the 10 classes of",
        ),
        (lambda c: c["config"]["data"].update(std=[0, 1, 1]), "cannot be used: .*std.*greater"),
        (lambda c: c["model_ema"].pop("head.bias"), "cannot be used: .*head.bias"),
        (lambda c: c["model_ema"]["head.bias"].fill_(torch.nan), "head.bias is not finite"),
        (lambda c: c["classes"].__setitem__(3, "x"), "only in the teacher: x; only in the data: 3"),
        (
            lambda c: c["classes"].sort(reverse=True),
            "class 0 is 9 in the teacher and 0 in",
        ),
    ],
)
def test_a_checkpoint_that_cannot_teach_is_rejected(config, teacher, tmp_path, change, message):
    contents = load_checkpoint(teacher)
    names = [*contents["classes"]]
    change(contents)
    torch.save(contents, tmp_path / "teacher.pth")
    cfg = config(distillation={"teacher": str(tmp_path / "teacher.pth")})
    with pytest.raises(ConfigError, match=rf"distillation\.teacher=.*{message}") as error:
        distillation.build_distillation(nn.Identity(), nn.Identity(), cfg, names, CPU)
    assert "\n" not in str(error.value)


def test_the_teacher_must_accept_the_images(student, teacher):
    contents = load_checkpoint(teacher)
    args = {"depth": 1, "img_size": 64}
    contents["model_ema"] = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, **args
    ).state_dict()
    contents["config"]["model"] |= {"name": "vit_tiny_patch16_224", "args": args}
    path = teacher.with_name("vit.pth")
    torch.save(contents, path)
    with pytest.raises(ConfigError, match=r"teacher=.*vit\.pth does not accept images of data\.im"):
        student(path)


def test_unknown_class_names_are_a_warning(student, teacher, caplog):
    contents = load_checkpoint(teacher)
    contents["config"]["data"]["kind"] = "hfds/digits"
    path = teacher.with_name("unnamed.pth")
    torch.save(contents, path)
    student(path)
    assert "its outputs are used in the order of the classes" in caplog.text
