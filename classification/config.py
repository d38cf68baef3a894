"""The configuration of a training run: YAML, strictly checked, with `key=value` overrides."""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Model(Section):
    name: str = "flash_internimage_tiny"
    num_classes: PositiveInt = 1000
    drop_path_rate: float = Field(0.1, ge=0, lt=1)
    args: dict[str, Any] = {}  # further arguments of the timm model
    initial_checkpoint: str | None = None
    # A text file with one class index of the initial checkpoint per class of this model: keeps
    # those rows of its classifier. Without it, a classifier of another size starts anew.
    class_map: str | None = None
    grad_checkpointing: bool = False
    compile: bool = False


class Data(Section):
    root: str = "data/imagenet"
    kind: str = ""  # a timm dataset prefix such as 'hfds/' or 'wds/'; empty for folders and tars
    train_split: str = "train"
    val_split: str = "val"
    image_size: PositiveInt = 224
    crop_pct: float = Field(1.0, gt=0, le=1)
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    workers: int = Field(8, ge=0)  # per process
    max_corrupt: int = Field(100, ge=0)  # unreadable images, per process, that stop the run


class Augmentation(Section):
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: Probability = 0.5
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: NonNegativeFloat = 0.4  # without effect beside auto_augment
    random_erasing: Probability = 0.25
    random_erasing_mode: Literal["pixel", "const", "rand"] = "pixel"
    random_erasing_count: PositiveInt = 1
    mixup: NonNegativeFloat = 0.8
    cutmix: NonNegativeFloat = 1.0
    mixup_prob: Probability = 1.0
    mixup_switch_prob: Probability = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    label_smoothing: float = Field(0.1, ge=0, lt=1)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


class Optimizer(Section):
    name: str = "adamw"
    lr: NonNegativeFloat = 5e-4  # for lr_batch images per update
    # lr, warmup_lr and min_lr are scaled by the images per update over this; null: not scaled.
    lr_batch: PositiveInt | None = 512
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float | None = Field(5.0, gt=0)  # norm
    layer_decay: float | None = Field(None, gt=0, le=1)
    dcn_lr_multiplier: NonNegativeFloat = 1.0  # of offset_mask and offset_mask_dw


class Schedule(Section):
    name: Literal["cosine", "linear", "step"] = "cosine"
    epochs: PositiveInt = 300
    warmup_epochs: NonNegativeFloat = 20
    warmup_lr: NonNegativeFloat = 5e-7
    min_lr: NonNegativeFloat = 5e-6
    decay_epochs: NonNegativeFloat = 30  # of 'step'
    decay_rate: float = Field(0.1, gt=0, le=1)  # of 'step'


class Checkpoints(Section):
    every_epochs: int = Field(0, ge=0)  # keep a copy every so many epochs; 0: none
    every_updates: int = Field(0, ge=0)  # save `last` within an epoch too; 0: at its end alone


class Config(Section):
    output: str = "output"
    seed: int = 0
    device: str = "auto"
    batch_size: PositiveInt = 128  # per process and accumulation step
    val_batch_size: PositiveInt = 128
    accumulation_steps: PositiveInt = 1
    amp: Literal["off", "bf16", "fp16"] = "fp16"
    ema_decay: float | None = Field(0.9999, ge=0, lt=1)
    max_nonfinite: PositiveInt = 20  # updates in a row without a finite loss that stop the run
    model: Model = Model()
    data: Data = Data()
    augmentation: Augmentation = Augmentation()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    checkpoints: Checkpoints = Checkpoints()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.augmentation.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size must be even for mixup and cutmix, got {self.batch_size}")
        if self.schedule.warmup_epochs > self.schedule.epochs:
            raise ValueError(
                f"schedule.warmup_epochs must not exceed schedule.epochs={self.schedule.epochs}, "
                f"got {self.schedule.warmup_epochs}"
            )
        return self


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where and why."""


def load_config(path: str | os.PathLike, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies `key=value` overrides, such as `optimizer.lr=1e-3`.

    Raises:
        ConfigError: the file is missing or no YAML, or a key or value is not accepted.
    """
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(content).__name__}")
    for override in overrides or []:
        _apply(content, override)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError(explain(error, Config, path)) from error


def _apply(content: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"an override must be key=value, got {override!r}")
    *sections, leaf = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"{override}: {section} is not a section")
    content[leaf] = yaml.safe_load(value)


def explain(error: ValidationError, section: type[Section], where: str | os.PathLike) -> str:
    """What a section does not accept, and what was perhaps meant, a line for each."""
    return "\n".join(f"{where}: {_explain(one, section)}" for one in error.errors())


def _explain(error: dict, section: type[Section]) -> str:
    location = [str(part) for part in error["loc"]]
    if error["type"] != "extra_forbidden":
        given = "" if error["type"] == "missing" else f", got {error['input']!r}"
        message = error["msg"].removeprefix("Value error, ")
        return f"{'.'.join(location)}: {message}{given}" if location else message
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    hint = (
        f"did you mean '{'.'.join([*location[:-1], close[0]])}'?"
        if close
        else f"known are {', '.join(known)}"
    )
    return f"unknown key '{'.'.join(location)}', {hint}"
