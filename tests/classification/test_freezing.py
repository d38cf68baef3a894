"""Tests that frozen parts of a model stay as they are, and only those."""

import pytest
import timm
import torch

from flash_internimage.classification.config import ConfigError
from flash_internimage.classification.freezing import freeze
from tests.classification.helpers import SMALL, build


def small(**kwargs) -> torch.nn.Module:
    return timm.create_model("flash_internimage_nano", num_classes=10, **SMALL, **kwargs)


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "prefixes"),
    [
        ((), ()),
        (("patch_embed", "levels.[01]"), ("patch_embed.", "levels.0.", "levels.1.")),
        (("levels.*.norm1",), tuple(f"levels.{i}.blocks.0.norm1." for i in range(4))),
        (("levels.3.*.offset_mask.bias",), ("levels.3.blocks.0.dcn.offset_mask.bias",)),
        (("backbone",), ("patch_embed.", "levels.", "conv_head.")),
        (("backbone", "head.bias"), ("patch_embed.", "levels.", "conv_head.", "head.bias")),
    ],
)  # fmt: skip
def test_only_the_named_parts_are_frozen(patterns, prefixes):
    model = small()
    freeze(model, patterns)
    names = {name for name, _ in model.named_parameters()}
    frozen = {name for name in names if name.startswith(prefixes)}
    assert all(any(name.startswith(prefix) for name in names) for prefix in prefixes)
    assert names - trained(model) == frozen


@pytest.mark.parametrize(
    ("name", "classifiers"),
    [
        ("convnext_atto", {"head.fc"}),
        ("deit_tiny_distilled_patch16_224", {"head", "head_dist"}),
    ],
)
def test_backbone_is_everything_but_the_classifier(name, classifiers):
    with torch.device("meta"):
        model = timm.create_model(name)
    freeze(model, ["backbone"])
    assert {name.rpartition(".")[0] for name in trained(model)} == classifiers


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["level.0"],
            "must name parts of the model, got 'level.0'; its outermost parts are",
        ),
        (["levels.0", ""], "must name parts of the model, got ''"),
        (["*"], r"must leave some parameters to train, got \*"),
        (["backbone", "head"], "must leave some parameters to train, got backbone, head"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_rejected(patterns, message):
    with pytest.raises(ConfigError, match=rf"model\.freeze {message}"):
        freeze(small(), patterns)


def test_the_classifier_must_be_known():
    model = small()
    model.pretrained_cfg = {}
    model.reset_classifier(0)
    with pytest.raises(ConfigError, match="FlashInternImage has no classifier, got 'backbone'"):
        freeze(model, ["backbone"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patterns", "prefixes", "layer_decay"),
    [
        (["backbone"], ("patch_embed.", "levels.", "conv_head."), None),
        (["levels.[12]", "conv_head"], ("levels.1.", "levels.2.", "conv_head."), 0.5),
    ],
)
def test_training_leaves_frozen_parts_unchanged_bit_for_bit(
    config, patterns, prefixes, layer_decay
):
    """This includes weight decay, batch-norm statistics and the EMA."""
    cfg = config(
        model={"freeze": patterns, "drop_path_rate": 0.5},
        optimizer={"weight_decay": 1.0, "layer_decay": layer_decay, "lr": 0.1},
    )
    trainer = build(cfg)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert any(name.endswith("running_mean") for name in before if name.startswith(prefixes))
    trainer.train_update([next(iter(trainer.train_loader))])
    trainer.validate_epoch()
    trainer.train_epoch()
    for model in (trainer.model, trainer.ema.module):
        after = model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if not name.startswith(prefixes)}
    modules = {name: m for name, m in trainer.model.named_modules() if name}
    stochastic = {name for name, module in modules.items() if module.training}
    assert not any(f"{name}.".startswith(prefixes) for name in stochastic)
    assert "head" in stochastic


def test_the_log_counts_trained_parameters(config, caplog):
    from flash_internimage.classification.output import log_start

    caplog.set_level("INFO")
    trainer = build(config(model={"freeze": ["backbone"]}))
    log_start(trainer, None, [])
    head = sum(p.numel() for p in trainer.model.head.parameters())
    assert f"M parameters, {head / 1e6:.4g} M of them trained; total" in caplog.text
