"""Configuration of a training run: strictly validated YAML with `key=value` overrides."""

import difflib
import inspect
import json
import logging
import os
import re
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from timm import create_model
from timm.optim import get_optimizer_info, list_optimizers

from .errors import ConfigError
from .strict_yaml import OFF, accepts, load_yaml

_logger = logging.getLogger(__name__)

MAX_FILE_SIZE = 100_000  # bytes
MAX_WORKERS = 1024
MAX_IMAGE_SIZE = 8192  # one image in float32 takes 0.8 GB
MAX_CLASSES = 1_000_000
MAX_SIZES = 8  # torch.compile compiles the model once per size, by default at most 8 times
DATA_KINDS = ("hfds/", "hfids/", "tfds/", "wds/", "torch/")  # timm's prefixes

# Strict types: booleans, NaN and infinity are not accepted as numbers.
Integer = Annotated[int, Field(strict=True, le=2**31 - 1)]
NonNegativeInt = Annotated[Integer, Field(ge=0)]
PositiveInt = Annotated[Integer, Field(gt=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Probability = Annotated[Number, Field(ge=0, le=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
ImageSize = Annotated[int, Field(strict=True, gt=0, le=MAX_IMAGE_SIZE)]


def _in_order(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("the first value must not exceed the second")
    return limits


def _off(value: Any) -> Any:
    return "off" if str(value).lower() in OFF else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Loggers = Annotated[
    tuple[Literal["wandb", "mlflow"], ...],
    BeforeValidator(_as_list),
    AfterValidator(lambda names: tuple(dict.fromkeys(names))),
]
Range = Annotated[tuple[Positive, Positive], AfterValidator(_in_order)]


class Section(BaseModel):
    """Base class of all sections, which reject unknown keys."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


def _expand_user(path: str | None) -> str | None:
    """Expand a leading `~`, which shells do not expand in `key=~/value`."""
    return os.path.expanduser(path) if path is not None else None


# Arguments of timm.create_model itself, and those that this project sets.
_RESERVED_ARGS = {
    *inspect.signature(create_model).parameters, "pretrained_strict", "num_classes",
    "drop_path_rate", "features_only", "device", "dtype",
} - {"kwargs"}  # fmt: skip


class Model(Section):
    """Settings of the model and its initial weights."""

    name: str = Field("flash_internimage_tiny", min_length=1)
    num_classes: int = Field(1000, strict=True, ge=2, le=MAX_CLASSES)
    drop_path_rate: Number = Field(0.1, ge=0, lt=1)
    args: dict[str, Any] = {}  # further arguments of the timm model
    initial_checkpoint: str | None = None
    # Text file with one index per class of this model: its row in the classifier of the initial
    # checkpoint. Without it, a classifier of another size stays randomly initialized.
    class_map: str | None = None
    # Parts of the model that are not trained: names or wildcards of modules and parameters, or
    # 'backbone' for everything but the classifier.
    freeze: tuple[str, ...] = ()
    grad_checkpointing: bool = False
    compile: bool = False

    @field_validator("args")
    @classmethod
    def _plain(cls, args: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(args, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "must contain strings, finite numbers, booleans, lists and mappings"
            ) from error
        if unset := [name for name, value in args.items() if value is None]:
            # timm removes these arguments before the model can reject unknown ones.
            raise ValueError(f"must not contain null, remove '{unset[0]}'")
        if reserved := [name for name in args if name in _RESERVED_ARGS]:
            name, hint = reserved[0], ""
            if name in cls.model_fields:
                hint = f"; set model.{name}"
            elif name == "checkpoint_path" or name.startswith("pretrained"):
                hint = "; weights are loaded by model.initial_checkpoint"
            raise ValueError(
                f"must not contain '{name}', which is not an argument of the model itself{hint}"
            )
        return args

    _expand = field_validator("initial_checkpoint", "class_map")(_expand_user)

    def without_initial(self) -> "Model":
        """Return the settings without initial weights."""
        return self.model_copy(update={"initial_checkpoint": None, "class_map": None})


class Data(Section):
    """Settings of the datasets, their preprocessing and loading."""

    root: str = Field("data/imagenet", min_length=1)
    kind: str = ""  # timm's prefix, such as 'hfds/' or 'wds/'; empty for folders and tar files
    train_split: str = Field("train", min_length=1)
    val_split: str = Field("val", min_length=1)
    image_size: ImageSize = 224
    # Sizes of training images; empty: image_size, which is always that of validation.
    image_sizes: tuple[ImageSize, ...] = Field((), max_length=MAX_SIZES)
    size_schedule: Literal["random", "progressive"] = "random"
    crop_pct: Number = Field(1.0, ge=0.1, le=1)
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    mean: tuple[Number, Number, Number] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    workers: int = Field(8, strict=True, ge=0, le=MAX_WORKERS)  # per process
    max_corrupt: NonNegativeInt = 100  # the run stops if more files of a split are unreadable

    _expand = field_validator("root")(_expand_user)

    @field_validator("kind")
    @classmethod
    def _known_to_timm(cls, kind: str) -> str:
        if kind and not kind.lower().startswith(DATA_KINDS):
            raise ValueError(f"must be empty or start with one of {', '.join(DATA_KINDS)}")
        return kind


class Augmentation(Section):
    """Settings of the augmentation of training images and labels."""

    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    hflip: Probability = 0.5
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: NonNegative = 0.4  # has no effect with auto_augment
    random_erasing: Probability = 0.25
    random_erasing_mode: Literal["pixel", "const", "rand"] = "pixel"
    random_erasing_count: PositiveInt = 1
    mixup: NonNegative = 0.8
    cutmix: NonNegative = 1.0
    mixup_prob: Probability = 1.0
    mixup_switch_prob: Probability = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    label_smoothing: Number = Field(0.1, ge=0, lt=1)

    @field_validator("auto_augment")
    @classmethod
    def _known_policy(cls, policy: str | None) -> str | None:
        # timm ignores unknown parts of a policy.
        known = r"(rand|augmix|original|originalr|v0|v0r|3a)(-[a-z]+\d[\d.]*|-t[a-z]+)*"
        if policy is not None and not re.fullmatch(known, policy):
            raise ValueError(
                "must be null or a timm policy such as 'rand-m9-mstd0.5-inc1', 'augmix-m3-w3', "
                "'original', 'v0' or '3a'"
            )
        return policy

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix is enabled."""
        return self.mixup > 0 or self.cutmix > 0


class Optimizer(Section):
    """Settings of the optimizer and gradient clipping."""

    name: str = "adamw"
    lr: NonNegative = 5e-4  # for a total batch size of lr_batch
    # lr, warmup_lr and min_lr are multiplied by (total batch size / lr_batch); null: unscaled.
    lr_batch: PositiveInt | None = 512
    weight_decay: NonNegative = 0.05
    betas: tuple[Beta, ...] | None = None  # null: the optimizer's own; 0.9, 0.999 for adamw
    eps: Positive | None = None  # null: the optimizer's own; 1e-8 for adamw
    clip_grad: Positive | None = 5.0  # maximum norm
    layer_decay: Number | None = Field(None, gt=0, le=1)
    dcn_lr_multiplier: NonNegative = 1.0  # on the layers that predict offsets of DCNv4 and DCNv3

    @field_validator("name")
    @classmethod
    def _suitable(cls, name: str) -> str:
        known = list_optimizers()
        if name.lower() not in known:
            close = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "see timm.optim.list_optimizers()"
            raise ValueError(f"must be a timm optimizer; {hint}")
        if get_optimizer_info(name).second_order:
            raise ValueError("second-order optimizers are not supported")
        return name

    @field_validator("betas")
    @classmethod
    def _as_many_as_needed(
        cls, betas: tuple[float, ...] | None, fields: ValidationInfo
    ) -> tuple[float, ...] | None:
        name = fields.data.get("name")  # absent if invalid
        info = get_optimizer_info(name) if name else None
        if betas and info and info.has_betas and len(betas) != info.num_betas:
            raise ValueError(f"must have {info.num_betas} values for {name}")
        return betas


class Schedule(Section):
    """Settings of the learning-rate schedule."""

    name: Literal["cosine", "linear", "step"] = "cosine"
    epochs: PositiveInt = 300
    warmup_epochs: NonNegative = 20
    warmup_lr: NonNegative = 5e-7
    min_lr: NonNegative = 5e-6
    decay_epochs: Positive = 30  # for 'step'
    decay_rate: Number = Field(0.1, gt=0, le=1)  # for 'step'


class Checkpoints(Section):
    """Settings of additional checkpoints."""

    every_epochs: NonNegativeInt = 0  # interval of checkpoints to keep; 0: none
    every_updates: NonNegativeInt = 0  # interval of saving `last`; 0: only at the end of an epoch


class EarlyStopping(Section):
    """Settings that end a run whose validation metric no longer improves."""

    patience: PositiveInt | None = None  # epochs without improvement; null: train all epochs
    metric: Literal["top1", "loss"] = "top1"  # of the EMA weights, if there are any
    min_delta: NonNegative = 0.0  # smaller changes are no improvement; percentage points for top1


class Distillation(Section):
    """Settings of knowledge distillation from the logits of a trained model."""

    # A timm model with released weights, or a checkpoint of classification.train; null: none
    teacher: str | None = None
    alpha: Probability = 0.5  # weight of the teacher in the loss; that of the labels is 1 - alpha
    temperature: Positive = 2.0

    _expand = field_validator("teacher")(_expand_user)


class Config(Section):
    """Configuration of a run; the defaults are the published settings shared by T, S and B."""

    output: str = Field("output", min_length=1)
    loggers: Loggers = ()  # in addition to TensorBoard
    seed: int = Field(0, strict=True, ge=0, lt=2**63)
    device: str = "auto"
    batch_size: PositiveInt = 128  # per process and accumulation step
    val_batch_size: PositiveInt = 128
    accumulation_steps: PositiveInt = 1
    amp: Annotated[Literal["auto", "off", "bf16", "fp16"], BeforeValidator(_off)] = "auto"
    ema_decay: Number | None = Field(0.9999, ge=0, lt=1)
    max_nonfinite: PositiveInt = 20  # consecutive steps without a finite loss that stop the run
    # Weight of each class in the loss; 'balanced': inversely proportional to its training images.
    class_weights: tuple[float, ...] | Literal["balanced"] | None = None
    model: Model = Model()
    data: Data = Data()
    augmentation: Augmentation = Augmentation()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    checkpoints: Checkpoints = Checkpoints()
    early_stopping: EarlyStopping = EarlyStopping()
    distillation: Distillation = Distillation()

    _expand = field_validator("output")(_expand_user)

    @field_validator("class_weights", mode="before")
    @classmethod
    def _usable_weights(cls, weights: Any) -> Any:
        if weights is None or weights == "balanced":
            return weights
        values = weights if isinstance(weights, list | tuple) else ()
        # The loss of a batch is divided by the sum of the weights of its images: 0 would give NaN.
        if not values or not all(
            type(value) in (int, float) and 1e-6 <= value <= 1e6 for value in values
        ):
            raise ValueError(
                "must be null, 'balanced' or a list of numbers from 1e-6 to 1e6; to leave a class "
                "out, remove its images"
            )
        return tuple(map(float, values))

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.augmentation.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size must be even for mixup and cutmix, got {self.batch_size}")
        if self.schedule.warmup_epochs > self.schedule.epochs:
            raise ValueError(
                f"schedule.warmup_epochs must not exceed schedule.epochs={self.schedule.epochs}, "
                f"got {self.schedule.warmup_epochs}"
            )
        weights = self.class_weights
        if isinstance(weights, tuple) and len(weights) != self.model.num_classes:
            raise ValueError(
                "class_weights must have one number for each of "
                f"model.num_classes={self.model.num_classes}, got {len(weights)}"
            )
        return self


def load_config(path: str | os.PathLike, overrides: list[str] | None = None) -> Config:
    """Load a YAML file and apply `key=value` overrides such as `optimizer.lr=1e-3`.

    If a key is overridden twice, the last override wins and a warning names the other.

    Raises:
        ConfigError: If the file is missing or not YAML, or a key or value is not accepted.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE_SIZE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read config {path}: {reason}") from error
    if len(text) > MAX_FILE_SIZE:
        raise ConfigError(f"{path} must be a YAML file of at most {MAX_FILE_SIZE} bytes")
    content = load_yaml(text, path, Config)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must contain a mapping, got {type(content).__name__}")
    _warn_of_replaced(overrides or [])
    for override in overrides or []:
        _apply(content, override)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError(explain(error, Config, path)) from error


def find_ignored(cfg: Config) -> list[str]:
    """Return a message for each changed setting that has no effect in this configuration."""
    optimizer, schedule, augmentation = cfg.optimizer, cfg.schedule, cfg.augmentation
    info = get_optimizer_info(optimizer.name)
    rules = [
        (optimizer, f"optimizer.name={optimizer.name}", not info.has_betas, "betas"),
        (optimizer, f"optimizer.name={optimizer.name}", not info.has_eps, "eps"),
        (schedule, f"schedule.name={schedule.name}", schedule.name != "step", "decay_epochs"),
        (schedule, f"schedule.name={schedule.name}", schedule.name != "step", "decay_rate"),
        (schedule, "schedule.name=step", schedule.name == "step", "min_lr"),
        (schedule, "warmup_epochs=0", schedule.warmup_epochs == 0, "warmup_lr"),
        (augmentation, "auto_augment", augmentation.auto_augment is not None, "color_jitter"),
    ]
    without = "random_erasing=0", augmentation.random_erasing == 0
    rules += [(augmentation, *without, f"random_erasing_{name}") for name in ("mode", "count")]
    without = "mixup=0 and cutmix=0", not augmentation.mixes
    rules += [(augmentation, *without, f"mixup_{key}") for key in ("prob", "switch_prob", "mode")]
    data, stopping, distillation = cfg.data, cfg.early_stopping, cfg.distillation
    rules += [(data, "image_sizes=[]", not data.image_sizes, "size_schedule")]
    without = "patience=null", stopping.patience is None
    rules += [(stopping, *without, key) for key in ("metric", "min_delta")]
    without = "teacher=null", distillation.teacher is None
    rules += [(distillation, *without, key) for key in ("alpha", "temperature")]
    names = {type(section): name for name, section in cfg}
    return [
        f"{names[type(section)]}.{key} has no effect with {reason}"
        for section, reason, is_ignored, key in rules
        if is_ignored and getattr(section, key) != type(section).model_fields[key].default
    ]


def check_output(output: str) -> None:
    """Check that a run can write to its output folder, which need not exist.

    Raises:
        ConfigError: If `output` is a file, or it or its closest existing parent is not writable.
    """
    path = Path(output).absolute()
    existing = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not existing.is_dir():
        raise ConfigError(f"output must be a folder, got '{output}': {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"output must be writable, got '{output}': {existing} is not writable")


def _warn_of_replaced(overrides: list[str]) -> None:
    for i, override in enumerate(overrides):
        key = override.partition("=")[0]
        for later in overrides[i + 1 :]:
            if f"{key}.".startswith(f"{later.partition('=')[0]}."):
                _logger.warning("override %s is replaced by the later %s", override, later)
                break


def _apply(content: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    *sections, leaf = key.split(".")
    if not equals or not all([*sections, leaf]):
        raise ConfigError(f"an override must be key=value, got {override!r}")
    annotation: Any = Config
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"{override}: {section} is not a section")
        annotation = _annotation(annotation, section)
    content[leaf] = _read_value(value, override, _annotation(annotation, leaf))


def _annotation(section: Any, key: str) -> Any:
    """Return the type of a setting; None for unknown keys and within settings of any type."""
    fields = getattr(section, "model_fields", {})
    return fields[key].annotation if key in fields else None


def _read_value(value: str, override: str, annotation: Any) -> Any:
    """Parse the value of an override; strings are taken literally, without enclosing quotes."""
    if not accepts(annotation, str):
        return load_yaml(value, override, annotation)
    if accepts(annotation, NoneType) and value.strip().lower() in OFF:
        return None
    quoted = re.fullmatch(r"""\s*(['"]).*\1\s*""", value, re.DOTALL)
    return load_yaml(value, override) if quoted else value


def explain(error: ValidationError, section: type[Section], where: str | os.PathLike) -> str:
    """Return one line for each rejected key or value, with a suggestion for misspelt keys.

    Args:
        error: Error raised by validating the section.
        section: Type of the section.
        where: Origin of the settings, which begins each line.
    """
    return "\n".join(f"{where}: {_explain(one, section)}" for one in error.errors())


def _explain(error: ErrorDetails, section: Any) -> str:
    location = [str(part) for part in error["loc"]]
    if error["type"] != "extra_forbidden":
        given = "" if error["type"] == "missing" else f", got {_shown(error['input'])}"
        message = error["msg"].removeprefix("Value error, ")
        return f"{'.'.join(location)}: {message}{given}" if location else message
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    hint = (
        f"did you mean '{'.'.join([*location[:-1], close[0]])}'?"
        if close
        else f"known keys: {', '.join(known)}"
    )
    return f"unknown key '{'.'.join(location)}'; {hint}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
