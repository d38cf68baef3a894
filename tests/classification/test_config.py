import re
from operator import attrgetter
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.layers import DropPath
from timm.optim import get_optimizer_info, list_optimizers

from flash_internimage.classification.config import (
    ConfigError,
    Optimizer,
    check_output,
    find_ignored,
    load_config,
)
from flash_internimage.classification.model import build_model
from flash_internimage.classification.optim import lr_scale

RECIPES = Path("configs/classification")


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def recipe(name: str):
    return load_config(RECIPES / f"{name}.yaml")


def test_the_config_for_own_data_in_the_guide_is_valid(yaml_file):
    guide = Path("docs/own-data.md").read_text()
    cfg = load_config(yaml_file(guide.split("```yaml\n")[1].split("```")[0]))
    assert (cfg.model.num_classes, cfg.data.root) == (5, "data/flowers")
    assert cfg.model.initial_checkpoint == "flash_internimage_tiny.in1k"


@pytest.mark.parametrize("family", ["flash_internimage", "internimage"])
@pytest.mark.parametrize(
    ("name", "drop_path"),
    [("tiny_in1k_224", 0.1), ("small_in1k_224", 0.4), ("base_in1k_224", 0.5)],
)
def test_recipes_of_tiny_small_and_base_match_the_published_ones(family, name, drop_path):
    cfg = recipe(f"{family}_{name}")
    assert cfg.model.drop_path_rate == drop_path
    assert (cfg.batch_size, cfg.ema_decay, cfg.data.image_size) == (128, 0.9999, 224)
    assert cfg.amp == "auto"
    assert (cfg.data.crop_pct, cfg.data.interpolation) == (1.0, "bicubic")
    optimizer, schedule, augmentation = cfg.optimizer, cfg.schedule, cfg.augmentation
    assert (optimizer.name, optimizer.lr, optimizer.lr_batch) == ("adamw", 5e-4, 512)
    assert (optimizer.weight_decay, optimizer.betas, optimizer.eps) == (0.05, None, None)
    assert (optimizer.clip_grad, optimizer.layer_decay) == (5.0, None)
    assert (schedule.name, schedule.epochs, schedule.warmup_epochs) == ("cosine", 300, 20)
    assert (schedule.warmup_lr, schedule.min_lr) == (5e-7, 5e-6)
    assert (augmentation.mixup, augmentation.cutmix, augmentation.mixup_mode) == (0.8, 1.0, "batch")
    assert (augmentation.mixup_prob, augmentation.mixup_switch_prob) == (1.0, 0.5)
    assert augmentation.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (augmentation.scale, augmentation.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert (augmentation.hflip, augmentation.label_smoothing) == (0.5, 0.1)
    assert (augmentation.random_erasing, augmentation.random_erasing_mode) == (0.25, "pixel")


def test_recipe_of_convnext_with_dcnv4_is_that_of_convnext():
    cfg = recipe("convnext_base_dcnv4_in1k_224")
    assert cfg.batch_size * cfg.accumulation_steps * 8 == 4096
    assert lr_scale(cfg, world_size=8) * cfg.optimizer.lr == 4e-3
    assert (cfg.optimizer.name, cfg.optimizer.weight_decay) == ("adamw", 0.05)
    assert (cfg.optimizer.clip_grad, cfg.ema_decay) == (None, 0.9999)
    schedule, model, augmentation = cfg.schedule, cfg.model, cfg.augmentation
    assert (schedule.name, schedule.epochs, schedule.warmup_epochs) == ("cosine", 300, 20)
    assert (schedule.warmup_lr, schedule.min_lr) == (0, 1e-6)
    assert (model.name, model.drop_path_rate) == ("convnext_base_dcnv4", 0.5)
    assert (cfg.data.image_size, cfg.data.crop_pct) == (224, 0.875)
    assert augmentation == recipe("flash_internimage_base_in1k_224").augmentation


def test_recipe_of_vit_with_dcnv4_is_that_of_deit():
    cfg = recipe("vit_base_dcnv4_in1k_224")
    scale = lr_scale(cfg, world_size=8)
    assert cfg.batch_size * cfg.accumulation_steps * 8 == 1024
    rates = cfg.optimizer.lr, cfg.schedule.warmup_lr, cfg.schedule.min_lr
    assert [scale * rate for rate in rates] == pytest.approx([1e-3, 1e-6, 1e-5])
    assert (cfg.optimizer.name, cfg.optimizer.weight_decay) == ("adamw", 0.05)
    assert (cfg.optimizer.clip_grad, cfg.ema_decay) == (None, None)
    assert (cfg.schedule.epochs, cfg.schedule.warmup_epochs) == (300, 5)
    assert (cfg.model.name, cfg.model.drop_path_rate) == ("vit_base_dcnv4", 0.1)
    assert (cfg.data.image_size, cfg.data.crop_pct) == (224, 0.875)
    assert cfg.augmentation == recipe("flash_internimage_base_in1k_224").augmentation


@pytest.mark.parametrize("name", ["convnext_base_dcnv4", "vit_base_dcnv4"])
def test_models_of_the_recipes_with_dcnv4_are_built(name):
    cfg = recipe(f"{name}_in1k_224")
    with torch.device("meta"):
        model = build_model(cfg.model)
        logits = model(torch.empty(1, 3, cfg.data.image_size, cfg.data.image_size))
    assert logits.shape == (1, 1000)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert max(rates) == pytest.approx(cfg.model.drop_path_rate)


@pytest.mark.parametrize(
    ("name", "drop_path", "layer_decay", "dcn_lr_multiplier"),
    [
        ("flash_internimage_large_in22k_ft_in1k_384", 0.1, 0.9, 0.1),
        ("internimage_large_in22k_ft_in1k_384", 0.1, None, 1),
        ("internimage_xlarge_in22k_ft_in1k_384", 0.2, None, 1),
        ("internimage_huge_joint_in22k_ft_in1k_640", 0.2, None, 1),
        ("internimage_giant_joint_in22k_ft_in1k_512", 0.4, None, 1),
    ],
)
def test_recipes_of_the_larger_sizes_match_the_published_fine_tuning(
    name, drop_path, layer_decay, dcn_lr_multiplier
):
    cfg = recipe(name)
    assert (cfg.model.drop_path_rate, cfg.model.grad_checkpointing) == (drop_path, True)
    assert (cfg.data.image_size, cfg.ema_decay) == (int(name[-3:]), 0.9999)
    assert (cfg.optimizer.lr, cfg.optimizer.layer_decay) == (2e-5, layer_decay)
    assert cfg.optimizer.dcn_lr_multiplier == dcn_lr_multiplier
    assert (cfg.schedule.epochs, cfg.schedule.warmup_epochs) == (20, 2)
    assert (cfg.schedule.warmup_lr, cfg.schedule.min_lr) == (0, 0)
    assert (cfg.augmentation.mixes, cfg.augmentation.random_erasing) == (False, 0)
    assert cfg.augmentation.label_smoothing == 0.3


@pytest.mark.parametrize("path", sorted(RECIPES.glob("internimage_*.yaml")), ids=lambda p: p.stem)
def test_recipes_of_internimage_have_the_published_images_per_update(path):
    cfg = load_config(path)
    gpus, images = map(int, re.search(r"(\d+) GPUs x (\d+) images", path.read_text()).groups())
    assert images == cfg.batch_size
    assert gpus * images == (4096 if cfg.data.image_size == 224 else 512)
    if cfg.model.initial_checkpoint:
        released = timm.get_pretrained_cfg(cfg.model.initial_checkpoint)
        assert (released.architecture, released.num_classes) == (cfg.model.name, 21841)


def test_overrides_take_precedence_over_the_file(yaml_file):
    path = yaml_file("batch_size: 32\noptimizer: {lr: 0.1}")
    cfg = load_config(path, ["optimizer.lr=1e-3", "ema_decay=null", "model.args={cls_scale: 2}"])
    assert (cfg.batch_size, cfg.optimizer.lr, cfg.ema_decay) == (32, 1e-3, None)
    assert cfg.model.args == {"cls_scale": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lrr: 3}", r"unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'\?"),
        ("bach_size: 3", r"unknown key 'bach_size'; did you mean 'batch_size'\?"),
        ("optimizer: {zzz: 3}", "unknown key 'optimizer.zzz'; known keys: name, lr"),
        ("batch_size: many", "batch_size: .*integer.*'many'"),
        ("data: 3", "data: .*got 3"),
        ("augmentation: {hflip: 2}", "augmentation.hflip: .*got 2"),
        ("batch_size: 7", "batch_size must be even for mixup and cutmix, got 7"),
        ("schedule: {epochs: 5}", "schedule.warmup_epochs must not exceed schedule.epochs=5"),
        ("[1, 2]", "must contain a mapping"),
        ("a: [", "not valid YAML"),
        ("optimizer: {lr: true}", r"optimizer\.lr: .*number, got True"),
        ("optimizer: {lr: .nan}", r"optimizer\.lr: .*finite number, got nan"),
        ("optimizer: {lr: -.inf}", r"optimizer\.lr: .*finite number, got -inf"),
        ("optimizer: {lr: '1'}", r"optimizer\.lr: .*number, got '1'"),
        ("schedule: {epochs: .inf}", r"schedule\.epochs: .*integer, got inf"),
        ("batch_size: true", "batch_size: .*integer, got True"),
        ("batch_size: 010", "batch_size: .*integer, got '010'"),
        ("batch_size: 1_2", "batch_size: .*integer, got '1_2'"),
        ("batch_size: 12:30", "batch_size: .*integer, got '12:30'"),
        ("optimizer: {lr: 1:30}", r"optimizer\.lr: .*number, got '1:30'"),
        ("data: {workers: 100000}", r"data\.workers: .*less than or equal to 1024, got 100000"),
        ("seed: -1", "seed: .*greater than or equal to 0, got -1"),
        ("model: {args: {a: .inf}}", r"model\.args: must contain .*finite"),
        ("model: {args: {a: 2026-01-01}}", r"model\.args: must contain .*date"),
        ("optimizer: {name: adamww}", r"optimizer\.name: must be .*'adamw'\?, got 'adamww'"),
        ("optimizer: {name: lbfgs}", r"optimizer\.name: must be a timm optimizer; .*'lbfgs'"),
        ("optimizer: {name: adahessian}", r"optimizer\.name: second-order optimizers .*, got"),
        (
            "optimizer: {name: adan, betas: [0.9, 0.999]}",
            r"optimizer\.betas: must have 3 values for adan, got \[0.9",
        ),
        *(
            (
                f"model: {{args: {{{name}: 1}}}}",
                rf"not contain '{name}', which is not an argument of the model itself{hint}",
            )
            for name, hint in (
                ("checkpoint_path", "; weights are loaded by model.initial_checkpoint"),
                ("pretrained", "; weights are loaded by model.initial_checkpoint"),
                ("pretrained_cfg", "; weights are loaded by model.initial_checkpoint"),
                ("pretrained_strict", "; weights are loaded by model.initial_checkpoint"),
                ("num_classes", "; set model.num_classes"),
                ("drop_path_rate", "; set model.drop_path_rate"),
                *((name, ", got") for name in ("device", "dtype", "cache_dir", "features_only")),
            )
        ),
        (
            "model: {args: {drop_rat: null}}",
            r"args: must not contain null, remove 'drop_rat'",
        ),
        ("model: {args: {drop_rate:0.9}}", r"must not contain null, remove 'drop_rate:0.9'"),
        ("optimizer: {betas: [0.9, 1.0]}", r"optimizer\.betas\.1: .*less than 1, got 1.0"),
        ("optimizer: {eps: -1e-8}", r"optimizer\.eps: .*greater than 0, got -1e-08"),
        ("augmentation: {auto_augment: nonsense}", r"auto_augment: must be .*got 'nonsense'"),
        ("augmentation: {auto_augment: rand-nonsense}", r"auto_augment: must be"),
        ("augmentation: {ratio: [2, 1]}", r"augmentation\.ratio: the first .*got \[2, 1\]"),
        ("augmentation: {scale: [-1, 1]}", r"augmentation\.scale\.0: .*got -1"),
        ("augmentation: {random_erasing_mode: dots}", "random_erasing_mode: .*got 'dots'"),
        ("augmentation: {random_erasing_count: 0}", "random_erasing_count: .*got 0"),
        ("data: {std: [1, 1, 0]}", r"data\.std\.2: .*got 0"),
        ("schedule: {decay_epochs: 0}", r"schedule\.decay_epochs: .*got 0"),
        ("seed: 1\nseed: 2", "not valid YAML: duplicate key 'seed', line 2"),
        ("model:\n  name: a\n  name: b", "duplicate key 'name', line 3"),
        ("model: &m {args: *m}", r"alias '\*m' within an anchor.*line 1"),
        ("a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]", r"alias '\*a' within an anchor.*line 2"),
        ("a: &a 1\nb: [" + "*a, " * 101 + "]", "or over 100 aliases, line 2"),
        ("[" * 1500, "too deeply nested"),
        ("seed: " + "1" * 5000, "not valid YAML: .*digits"),
        ("seed: !!timestamp x", "not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "not valid YAML: .*python/object"),
        ("output: '\x00'", "not valid YAML"),
        ("0", "must contain a mapping, got int"),
        ("# " + "x" * 100_000, "must be a YAML file of at most 100000 bytes"),
    ],
)
def test_a_wrong_config_raises_one_clear_error(yaml_file, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(yaml_file(text))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_numbers_and_booleans_follow_yaml_1_2(yaml_file):
    cfg = load_config(yaml_file("amp: off\noptimizer: {lr: 1e-3, eps: 1.5E-8, lr_batch: 64}"))
    assert (cfg.amp, cfg.optimizer.lr, cfg.optimizer.eps, cfg.optimizer.lr_batch) == (
        "off", 1e-3, 1.5e-8, 64,
    )  # fmt: skip
    assert load_config(yaml_file("model: {compile: true}"), ["amp=bf16"]).model.compile


TEXTS = [
    "2024_11_28", "2024-11-28", "1e3", "0123", "12", "1.5", "0x10", "null", "none",
    "true", "no", "off", "on", ".nan", "run #1", "a: b", "[a", "{", "1:30", "a, b",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "key", ["output", "device", "model.name", "data.root", "data.train_split", "data.val_split"]
)
def test_text_settings_are_kept_verbatim(yaml_file, key, text):
    """Folder names can look like dates, numbers, booleans or null in YAML."""

    def value_of(cfg):
        return attrgetter(key)(cfg)

    path = yaml_file("seed: 1")
    assert value_of(load_config(path, [f"{key}={text}"])) == text
    assert value_of(load_config(path, [f"{key}='{text}'"])) == text
    section, _, name = key.rpartition(".")
    indent = "  " if section else ""
    if all(c not in text for c in "#:{["):  # must be quoted in a file
        path = yaml_file(f"{section}:\n" * bool(section) + f"{indent}{name}: {text}")
        assert value_of(load_config(path)) == text


@pytest.mark.parametrize("word", ["off", "Off", "none", "None", "null", "~", "no", "false", ""])
@pytest.mark.parametrize(
    "key",
    [
        "ema_decay", "optimizer.clip_grad", "optimizer.layer_decay", "optimizer.lr_batch",
        "augmentation.auto_augment", "model.initial_checkpoint", "model.class_map",
        "class_weights", "distillation.teacher", "early_stopping.patience",
    ],
)  # fmt: skip
def test_optional_settings_are_disabled_by_words(yaml_file, key, word):
    cfg = load_config(yaml_file("seed: 1"), [f"{key}={word}"])
    assert attrgetter(key)(cfg) is None
    section, _, name = key.rpartition(".")
    path = yaml_file(f"{section}:\n  {name}: {word}" if section else f"{name}: {word}")
    assert attrgetter(key)(load_config(path)) is None
    assert load_config(path, ["amp=" + word]).amp == "off"


def test_names_of_files_may_be_numbers_or_quoted_words(yaml_file):
    path = yaml_file("model: {initial_checkpoint: 2024.10, class_map: 'none'}")
    model = load_config(path, ["augmentation.auto_augment=v0"]).model
    assert (model.initial_checkpoint, model.class_map) == ("2024.10", "none")


@pytest.mark.parametrize(
    ("overrides", "replaced"),
    [
        (["seed=1", "amp=off", "seed=2"], ["seed=1 is replaced by the later seed=2"]),
        (["optimizer.lr=1", "seed=2", "optimizer={}"], ["optimizer.lr=1 is .* later optimizer={}"]),
        (["model.args={}", "model.args.a=1", "seed=2", "model.name=a"], []),
    ],
)
def test_an_override_replaced_by_a_later_one_is_logged(yaml_file, overrides, replaced, caplog):
    assert load_config(yaml_file("batch_size: 2"), overrides).seed == 2
    assert len(caplog.records) == len(replaced)
    assert all(re.search(text, caplog.text) for text in replaced)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["optimizer.name=sgd", "optimizer.eps=1e-6"],
            "optimizer.eps has no effect with optimizer",
        ),
        (
            ["optimizer.name=sgd", "optimizer.betas=[0.8, 0.9]"],
            "optimizer.betas has no effect with",
        ),
        (
            ["schedule.decay_rate=0.5"],
            "schedule.decay_rate has no effect with schedule.name=cosine",
        ),
        (
            ["schedule.warmup_epochs=0", "schedule.warmup_lr=1e-3"],
            "schedule.warmup_lr has no effect with warmup_epochs=0",
        ),
        (["schedule.name=step", "schedule.min_lr=1"], "schedule.min_lr has no effect with"),
        (
            ["augmentation.color_jitter=0.1"],
            "augmentation.color_jitter has no effect with auto_aug",
        ),
        (
            ["augmentation.random_erasing=0", "augmentation.random_erasing_mode=rand"],
            "augmentation.random_erasing_mode has no effect with random_erasing=0",
        ),
        (
            ["augmentation.mixup=0", "augmentation.cutmix=0", "augmentation.mixup_mode=elem"],
            "augmentation.mixup_mode has no effect with mixup=0 and cutmix=0",
        ),
        (
            ["data.size_schedule=progressive"],
            "data.size_schedule has no effect with image_sizes=[]",
        ),
        (
            ["early_stopping.metric=loss"],
            "early_stopping.metric has no effect with patience=null",
        ),
        (["distillation.alpha=1"], "distillation.alpha has no effect with teacher=null"),
    ],
)
def test_a_setting_without_effect_is_reported(yaml_file, overrides, line):
    cfg = load_config(yaml_file("seed: 1"), overrides)
    assert [text[: len(line)] for text in find_ignored(cfg)] == [line]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")))
def test_recipes_have_no_setting_without_effect(path):
    assert find_ignored(load_config(path)) == []


def test_a_tilde_expands_to_the_home_folder(yaml_file, monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    text = "output: ~/run\nmodel: {initial_checkpoint: ~/a.pth, class_map: ~/map.txt}"
    cfg = load_config(yaml_file(text), ["data.root=~/images"])
    assert (cfg.output, cfg.data.root) == ("/somebody/run", "/somebody/images")
    assert cfg.model.initial_checkpoint == "/somebody/a.pth"
    assert cfg.model.class_map == "/somebody/map.txt"


def test_a_written_config_is_read_back(yaml_file):
    cfg = load_config(RECIPES / "flash_internimage_nano_digits.yaml")
    text = yaml.safe_dump(cfg.model_dump(mode="json"))
    assert load_config(yaml_file(text)) == cfg


def test_aliases_of_values_and_merged_keys_work(yaml_file):
    text = "data: {mean: &half [0.5, 0.5, 0.5], std: *half}\noptimizer: {<<: {lr: 1.0}, eps: 1e-6}"
    cfg = load_config(yaml_file(text))
    assert cfg.data.mean == cfg.data.std == (0.5, 0.5, 0.5)
    assert (cfg.optimizer.lr, cfg.optimizer.eps) == (1.0, 1e-6)


def test_every_other_optimizer_of_timm_is_accepted_with_its_number_of_betas():
    for name in set(list_optimizers()) - {"adahessian"}:
        betas = (0.9, 0.9, 0.9)[: get_optimizer_info(name).num_betas]
        assert Optimizer(name=name, betas=betas).name == name


def test_a_binary_config_file_is_a_one_line_error(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"output: \xe9")
    with pytest.raises(ConfigError, match=r"not valid YAML: .*unexpected end of data"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"cannot read config .*: Is a directory"):
        load_config(tmp_path)


def test_an_unwritable_output_is_a_one_line_error(tmp_path, monkeypatch):
    check_output(str(tmp_path / "new" / "run"))
    (tmp_path / "file").write_text("")
    for output in ("file", "file/run"):
        with pytest.raises(ConfigError, match=rf"output must be a folder, got '.*{output}'"):
            check_output(str(tmp_path / output))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # Root can write anywhere.
    with pytest.raises(ConfigError, match=r"output must be writable, got '.*run'"):
        check_output(str(tmp_path / "run"))


def test_error_names_the_missing_file():
    with pytest.raises(ConfigError, match=r"cannot read config nowhere\.yaml"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "must be key=value, got 'optimizer.lr'"),
        ("=3", "must be key=value, got '=3'"),
        ("a..b=1", r"must be key=value, got 'a\.\.b=1'"),
        ("batch_size.x=3", "batch_size.x=3: batch_size is not a section"),
        ("optimizer=3", "optimizer: .*got 3"),
        ("optimizer.lr=[", r"optimizer.lr=\[ is not valid YAML"),
        ("optimizer.lr=", "optimizer.lr: .*got None"),
        ("data.root=", r"data\.root: .*at least 1 character, got ''"),
        ("model.num_classes=1", r"model\.num_classes: .*greater than or equal to 2, got 1"),
        ("model.num_classes=2000000000", r"num_classes: .*less than or equal to 1000000, got 2"),
        ("data.image_size=100000", r"image_size: .*less than or equal to 8192, got 100000"),
        ("amp=on", "amp: .*'auto', 'off', 'bf16' or 'fp16', got 'on'"),
        ("optimizer.lr=nan", "optimizer.lr: .*number, got 'nan'"),
        ("optimizer.lr=.nan", "optimizer.lr: .*finite number, got nan"),
        ("optimizer.lr=true", "optimizer.lr: .*number, got True"),
        ("model.args={a: 1, a: 2}", "duplicate key 'a'"),
        ("output=", "output: .*got ''"),
        ("class_weights=even", "class_weights: must be null, 'balanced' or a list .*got 'even'"),
        ("class_weights=[1, -1]", r"class_weights: must be .* from 1e-6 to 1e6; .*got \[1, -1\]"),
        ("class_weights=[1, 0]", r"class_weights: must be .* remove its images, got \[1, 0\]"),
        ("class_weights=[]", r"class_weights: must be .*, got \[\]"),
        ("class_weights=[1, true]", r"class_weights: must be .*, got \[1, True\]"),
        ("class_weights=[1, .inf]", r"class_weights: must be .*, got \[1, inf\]"),
        ("class_weights=[1, 2]", r"one number for each of model\.num_classes=1000, got 2"),
        ("data.image_sizes=[0]", r"data\.image_sizes\.0: .*greater than 0, got 0"),
        ("data.image_sizes=[1,2,3,4,5,6,7,8,9]", "data.image_sizes: .*at most 8 items"),
        ("model.freeze=backbone", "model.freeze: .*got 'backbone'"),
        ("early_stopping.patience=0", "early_stopping.patience: .*greater than 0, got 0"),
        ("distillation.temperature=0", "distillation.temperature: .*greater than 0, got 0"),
    ],
)
def test_error_names_the_malformed_override(yaml_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(yaml_file("batch_size: 2"), [override])
