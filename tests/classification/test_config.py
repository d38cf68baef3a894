from pathlib import Path

import pytest

from classification.config import ConfigError, load_config

RECIPES = Path("configs/classification")


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def recipe(name: str):
    return load_config(RECIPES / f"flash_internimage_{name}.yaml")


@pytest.mark.parametrize(
    ("name", "drop_path"),
    [("tiny_in1k_224", 0.1), ("small_in1k_224", 0.4), ("base_in1k_224", 0.5)],
)
def test_recipes_of_tiny_small_and_base_are_the_published_ones(name, drop_path):
    cfg = recipe(name)
    assert cfg.model.drop_path_rate == drop_path
    assert (cfg.batch_size, cfg.ema_decay, cfg.data.image_size) == (128, 0.9999, 224)
    assert (cfg.data.crop_pct, cfg.data.interpolation) == (1.0, "bicubic")
    optimizer, schedule, augmentation = cfg.optimizer, cfg.schedule, cfg.augmentation
    assert (optimizer.name, optimizer.lr, optimizer.lr_batch) == ("adamw", 5e-4, 512)
    assert (optimizer.weight_decay, optimizer.betas, optimizer.eps) == (0.05, (0.9, 0.999), 1e-8)
    assert (optimizer.clip_grad, optimizer.layer_decay) == (5.0, None)
    assert (schedule.name, schedule.epochs, schedule.warmup_epochs) == ("cosine", 300, 20)
    assert (schedule.warmup_lr, schedule.min_lr) == (5e-7, 5e-6)
    assert (augmentation.mixup, augmentation.cutmix, augmentation.mixup_mode) == (0.8, 1.0, "batch")
    assert (augmentation.mixup_prob, augmentation.mixup_switch_prob) == (1.0, 0.5)
    assert augmentation.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (augmentation.scale, augmentation.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert (augmentation.hflip, augmentation.label_smoothing) == (0.5, 0.1)
    assert (augmentation.random_erasing, augmentation.random_erasing_mode) == (0.25, "pixel")


def test_recipe_of_large_is_the_published_fine_tuning():
    cfg = recipe("large_in22k_ft_in1k_384")
    assert (cfg.model.drop_path_rate, cfg.model.grad_checkpointing) == (0.1, True)
    assert (cfg.data.image_size, cfg.ema_decay) == (384, 0.9999)
    assert (cfg.optimizer.lr, cfg.optimizer.layer_decay) == (2e-5, 0.9)
    assert cfg.optimizer.dcn_lr_multiplier == 0.1
    assert (cfg.schedule.epochs, cfg.schedule.warmup_epochs) == (20, 2)
    assert (cfg.schedule.warmup_lr, cfg.schedule.min_lr) == (0, 0)
    assert (cfg.augmentation.mixes, cfg.augmentation.random_erasing) == (False, 0)
    assert cfg.augmentation.label_smoothing == 0.3


def test_overrides_win_over_the_file(yaml_file):
    path = yaml_file("batch_size: 32\noptimizer: {lr: 0.1}")
    cfg = load_config(path, ["optimizer.lr=1e-3", "ema_decay=null", "model.args={cls_scale: 2}"])
    assert (cfg.batch_size, cfg.optimizer.lr, cfg.ema_decay) == (32, 1e-3, None)
    assert cfg.model.args == {"cls_scale": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lrr: 3}", r"unknown key 'optimizer.lrr', did you mean 'optimizer.lr'\?"),
        ("bach_size: 3", r"unknown key 'bach_size', did you mean 'batch_size'\?"),
        ("optimizer: {zzz: 3}", "unknown key 'optimizer.zzz', known are name, lr"),
        ("batch_size: many", "batch_size: .*integer.*'many'"),
        ("data: 3", "data: .*got 3"),
        ("augmentation: {hflip: 2}", "augmentation.hflip: .*got 2"),
        ("batch_size: 7", "batch_size must be even for mixup and cutmix, got 7"),
        ("schedule: {epochs: 5}", "schedule.warmup_epochs must not exceed schedule.epochs=5"),
        ("[1, 2]", "must hold keys and values"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_config_is_one_clear_error(yaml_file, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(yaml_file(text))


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"cannot read the config nowhere\.yaml"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("override", ["optimizer.lr", "batch_size.x=3"])
def test_a_malformed_override_is_named(yaml_file, override):
    with pytest.raises(ConfigError, match=override):
        load_config(yaml_file("batch_size: 2"), [override])
