"""Test the examples of docs/fine-tuning.md in one run of a detector."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config

from flash_internimage.openmmlab.cli.train import training_parser, training_runner
from flash_internimage.openmmlab.safe_loading import read_checkpoint
from tests.guides import read_examples, write_chain
from tests.recipes import an_eighth

# The guide's config for own data, with two of the digits.
PARTS = """
loader = dict(dataset=dict(metainfo=dict(classes=("0", "1"))))
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
model = dict(roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_config(folder / "parts.py", settings=PARTS)
    examples = [text for text in read_examples("fine-tuning", "python") if "parts.py" in text]
    assert len(examples) == 6
    path = write_chain(folder, "parts.py", examples)
    cfg = Config.fromfile(path)
    dataset = cfg.train_dataloader.dataset.dataset
    dataset.pipeline = an_eighth(dataset.pipeline)
    cfg.val_dataloader.dataset.indices = 1
    cfg.dump(folder / "all.py")
    return folder / "all.py"


@pytest.fixture(scope="module")
def run(config) -> SimpleNamespace:
    """Train an epoch with all examples together."""
    settings = "train_cfg.max_epochs=1", "randomness.seed=0"
    options = config, "--work-dir", config.parent / "run", "--cfg-options", *settings
    runner = training_runner(training_parser("train", "").parse_args([*map(str, options)]))
    before = {k: t.clone() for k, t in runner.model.backbone.state_dict().items()}
    shapes = set()
    runner.model.backbone.register_forward_pre_hook(
        lambda module, inputs: shapes.add(tuple(inputs[0].shape[2:])) if module.training else None
    )
    runner.train()
    checkpoint = read_checkpoint(config.parent / "run" / "epoch_1.pth")
    return SimpleNamespace(runner=runner, before=before, shapes=shapes, checkpoint=checkpoint)


def test_frozen_stages_are_unchanged_bit_for_bit(run):
    frozen = ("patch_embed.", "levels.0.", "levels.1.")
    weights = run.checkpoint["state_dict"], run.checkpoint["ema_state_dict"]
    for prefix, after in zip(("backbone.", "module.backbone."), weights, strict=True):
        changed = {k for k, t in run.before.items() if not torch.equal(t, after[prefix + k])}
        assert not any(name.startswith(frozen) for name in changed)
        assert {"levels.2.norm.0.weight", "levels.3.norm.0.weight"} <= changed


def test_images_have_several_sizes(run):
    assert len(run.shapes) > 1


def test_class_weights_are_those_of_pytorch(run):
    loss = run.runner.model.roi_head.bbox_head.loss_cls
    logits, labels = torch.randn(9, 3), torch.arange(9) % 3
    weights = torch.tensor([1.0, 5.0, 1.0])
    expected = F.cross_entropy(logits, labels, weights, reduction="none").mean()
    torch.testing.assert_close(loss(logits, labels, avg_factor=9), expected)


def test_images_of_rare_classes_are_repeated(run):
    dataset = run.runner.train_dataloader.dataset
    rare = dataset.dataset
    assert type(dataset).__name__ == "ClassBalancedDataset"
    assert dataset.oversample_thr == 0.1
    factors = dataset._get_repeat_factors(rare, 1.0)
    present = [set(rare.get_cat_ids(i)) for i in range(len(rare))]
    share = {c: sum(c in classes for classes in present) / len(rare) for c in (0, 1)}
    expected = [max(max(1, share[c] ** -0.5) for c in classes) for classes in present]
    assert factors == pytest.approx(expected)
    assert max(factors) > 1


def test_checkpoints_contain_averaged_and_trained_weights(run):
    """Which of them is validated, tested and resumed is tested in engine/test_ema.py."""
    trained, averaged = run.checkpoint["ema_state_dict"], run.checkpoint["state_dict"]
    (hook,) = (hook for hook in run.runner.hooks if type(hook).__name__ == "EMAHook")
    assert hook.ema_model.momentum == 0.001
    name = "backbone.levels.3.norm.0.weight"
    assert torch.equal(trained[f"module.{name}"], run.runner.model.state_dict()[name])
    assert torch.equal(averaged[name], hook.ema_model.module.state_dict()[name])
    assert not torch.equal(trained[f"module.{name}"], averaged[name])


def test_the_checkpoint_contains_the_state_of_early_stopping(run):
    state = run.checkpoint["message_hub"]["runtime_info"]["early_stopping"]
    assert (state["monitor"], state["waited"]) == ("coco/bbox_mAP", 0)
    (hook,) = (h for h in run.runner.hooks if type(h).__name__ == "ResumableEarlyStoppingHook")
    assert (hook.patience, hook.min_delta) == (5, 0.001)
    kept = {type(hook).__name__ for hook in run.runner.hooks}
    assert {"CheckFiniteHook", "CurvesHook", "NumClassCheckHook", "EMAHook"} <= kept
