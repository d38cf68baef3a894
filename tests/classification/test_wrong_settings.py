"""Tests that settings beyond the schema's checks are rejected before anything is written."""

from pathlib import Path

import pytest
import yaml

from flash_internimage.classification.cli.train import main
from flash_internimage.classification.config import ConfigError
from flash_internimage.classification.engine import Trainer
from flash_internimage.classification.training import train

VIT = {"name": "vit_tiny_patch16_224", "args": {"depth": 1}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "gpu"}, "device must be 'auto' or one of cpu.*, got 'gpu'"),
        ({"model": {"args": {"chanels": 3}}}, "model.args=.*chanels"),
        ({"model": {"initial_checkpoint": "none.pth"}}, "initial_checkpoint: .*none.pth"),
        ({"model": {"num_classes": 5}}, "model.num_classes must be at least 10, .* got 5"),
        ({"model": VIT}, r"images of data\.image_size=32 with 3 channels: .*224"),
        ({"augmentation": {"auto_augment": "rand-m1-q5"}}, r"auto_augment=rand-m1-q5: .*section"),
        ({"augmentation": {"auto_augment": "rand-m1.5"}}, r"auto_augment=rand-m1\.5: .*'1\.5'"),
        ({"augmentation": {"auto_augment": "v0-m5"}}, r"auto_augment=v0-m5: "),
        ({"output": "README.md"}, r"output must be a folder, got 'README\.md'"),
        ({"output": "README.md/run"}, r"output must be a folder, got 'README\.md/run'"),
        ({"output": "a\0b"}, r"output cannot be created, got 'a\\x00b': embedded null"),
        ({"output": "x" * 300}, r"output cannot be created, got 'xxx.*: File name too long"),
        ({"data": {"root": "x" * 300}}, "data.root not found: xxx"),
        ({"data": {"val_split": "x" * 300}}, "must contain a folder 'xxx.*', got train, val"),
    ],
)
def test_an_invalid_setting_is_a_one_line_error(config, monkeypatch, changes, message):
    monkeypatch.setattr(Trainer, "fit", None)
    cfg = config(**changes)
    with pytest.raises(ConfigError, match=message) as error:
        train(cfg)
    assert "\n" not in str(error.value)
    assert "output" in changes or not Path(cfg.output).exists()


def test_the_command_reports_a_wrong_config_in_one_line(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("optimzer: {lr: 1}")
    assert main([str(tmp_path / "config.yaml")]) == 2
    assert "unknown key 'optimzer'; did you mean 'optimizer'?" in caplog.text


def test_the_command_ends_with_status_2(settings, tmp_path, caplog):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main([str(tmp_path / "config.yaml"), "device=gpu"]) == 2
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert record.getMessage().endswith("got 'gpu'")
