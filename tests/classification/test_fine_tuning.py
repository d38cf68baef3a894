"""Test the examples of docs/fine-tuning.md: each is a valid config, and trains as it says."""

import math

import pytest
import yaml

from flash_internimage.classification.config import load_config
from flash_internimage.classification.engine import Trainer
from tests.classification.helpers import CPU, SMALL
from tests.guides import read_examples

EXAMPLES = read_examples("fine-tuning", "yaml")


def frozen(trainer: Trainer) -> set[str]:
    """Return the outermost parts of the model, and its stages, that are not trained."""
    parts = {name: False for name, _ in trainer.model.named_children() if name != "levels"}
    parts |= {f"levels.{i}": False for i in range(4)}
    for name, parameter in trainer.model.named_parameters():
        for part in parts:
            parts[part] |= name.startswith(f"{part}.") and not parameter.requires_grad
    return {part for part, is_frozen in parts.items() if is_frozen}


CHECKS = [
    lambda t: (t.patience.options.patience, t.patience.options.min_delta) == (10, 0.1),
    lambda t: t.ema.decay == 0.99,
    lambda t: frozen(t) == {"patch_embed", "levels.0", "levels.1"},
    lambda t: (
        frozen(t) == {"patch_embed", "conv_head", *(f"levels.{i}" for i in range(4))}
        and t.mixup is None
        and {group["weight_decay"] for group in t.optimizer.param_groups} == {0.0}
    ),
    lambda t: t.train_loader.batch_sampler.choice_schedule == "constant",
    lambda t: t.train_loader.batch_sampler.choice_schedule == "progressive",
    lambda t: t.criterion.weight.tolist() == [1.0] * 10,
    lambda t: (t.distillation.distill_loss_weight, t.distillation.temperature) == (0.5, 2.0),
]


@pytest.mark.parametrize("number", range(len(CHECKS)))
def test_example(number, digits, checkpoint, tmp_path):
    assert len(EXAMPLES) == len(CHECKS)
    (tmp_path / "flowers.yaml").write_text(EXAMPLES[number])
    own = yaml.safe_load(EXAMPLES[number])
    small = [
        "model.name=flash_internimage_nano", f"model.args={SMALL}", "model.num_classes=10",
        f"data.root={digits}", "data.image_size=32", "data.workers=0", "batch_size=12", "amp=off",
        f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    if listed := own.get("data", {}).get("image_sizes"):
        assert own["data"]["image_size"] in listed
        small.append(f"data.image_sizes={[size // 8 for size in listed]}")
    if "distillation" in own:
        small.append(f"distillation.teacher={checkpoint['between']}")
    trainer = Trainer(load_config(tmp_path / "flowers.yaml", small), CPU)
    assert CHECKS[number](trainer)
    assert math.isfinite(trainer.train_update([next(iter(trainer.train_loader))]))
    if listed:
        assert len(trainer.train_loader.dataset.transforms) == len(listed)
