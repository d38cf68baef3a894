"""Test the examples of docs/fine-tuning.md in one run of a segmentor."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from PIL import Image

from flash_internimage.openmmlab.cli.train import training_parser, training_runner
from flash_internimage.openmmlab.safe_loading import read_checkpoint
from tests.guides import read_examples, write_chain
from tests.recipes import an_eighth

# The guide's config for own data.
LEAVES = """
classes = ("background", "leaf", "stem")
loader = dict(dataset=dict(metainfo=dict(classes=classes)))
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
model = dict(decode_head=dict(num_classes=3), auxiliary_head=dict(num_classes=3))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(write_config, scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("leaves")
    root = folder / "data"
    shutil.copytree(scenes, root)
    for path in root.rglob("*.png"):  # 0 is ignored, and the classes begin at 1
        Image.fromarray(np.asarray(Image.open(path)).clip(max=3)).save(path)
    write_config(folder / "leaves.py", settings=LEAVES, root=root)
    code = [text.replace("parts", "leaves") if "same with leaves.py" in text else text
            for text in read_examples("fine-tuning", "python")]  # fmt: skip
    examples = [text for text in code if "leaves.py" in text]
    assert len(examples) == 5
    cfg = Config.fromfile(write_chain(folder, "leaves.py", examples))
    cfg.train_dataloader.dataset.pipeline = an_eighth(cfg.train_dataloader.dataset.pipeline)
    cfg.dump(folder / "all.py")
    return folder / "all.py"


@pytest.fixture(scope="module")
def run(config) -> SimpleNamespace:
    """Train two iterations with all examples together."""
    options = config, "--work-dir", config.parent / "run", "--cfg-options", "train_cfg.max_iters=2"
    runner = training_runner(training_parser("train", "").parse_args([*map(str, options)]))
    before = {k: t.clone() for k, t in runner.model.backbone.state_dict().items()}
    runner.train()
    checkpoint = read_checkpoint(config.parent / "run" / "iter_2.pth")
    return SimpleNamespace(runner=runner, before=before, checkpoint=checkpoint)


def test_frozen_stages_are_unchanged_bit_for_bit(run):
    frozen = ("patch_embed.", "levels.0.", "levels.1.")
    weights = run.checkpoint["state_dict"], run.checkpoint["ema_state_dict"]
    for prefix, after in zip(("backbone.", "module.backbone."), weights, strict=True):
        changed = {k for k, t in run.before.items() if not torch.equal(t, after[prefix + k])}
        assert not any(name.startswith(frozen) for name in changed)
        assert {"levels.2.norm.0.weight", "levels.3.norm.0.weight"} <= changed


def test_images_are_resized_to_several_sizes(run):
    resize = run.runner.train_dataloader.dataset.pipeline.transforms[2]
    image = {"img": np.zeros((130, 128, 3), np.uint8)}
    sides = {min(resize(dict(image))["img"].shape[:2]) for _ in range(50)}
    assert sides == {32, 48, 64, 80, 96}


@pytest.mark.parametrize("head", ["decode_head", "auxiliary_head"])
def test_class_weights_are_those_of_pytorch(run, head):
    loss = getattr(run.runner.model, head).loss_decode
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    labels[0, :2] = 255
    weights = torch.tensor([0.5, 1.0, 2.0])
    expected = F.cross_entropy(logits, labels, weights, ignore_index=255)
    actual = loss(logits, labels, ignore_index=255) / loss.loss_weight
    torch.testing.assert_close(actual, expected)


def test_checkpoints_contain_averaged_and_trained_weights(run):
    """Which of them is validated, tested and resumed is tested in engine/test_ema.py."""
    trained, averaged = run.checkpoint["ema_state_dict"], run.checkpoint["state_dict"]
    (hook,) = (hook for hook in run.runner.hooks if type(hook).__name__ == "EMAHook")
    assert hook.ema_model.momentum == 0.001
    name = "decode_head.conv_seg.weight"
    assert torch.equal(trained[f"module.{name}"], run.runner.model.state_dict()[name])
    assert torch.equal(averaged[name], hook.ema_model.module.state_dict()[name])
    assert not torch.equal(trained[f"module.{name}"], averaged[name])


def test_the_checkpoint_contains_the_state_of_early_stopping(run):
    state = run.checkpoint["message_hub"]["runtime_info"]["early_stopping"]
    assert (state["monitor"], state["waited"]) == ("mIoU", 0)
    kept = {type(hook).__name__ for hook in run.runner.hooks}
    assert {"CheckFiniteHook", "CurvesHook", "CheckSegmentorHook", "EMAHook"} <= kept
