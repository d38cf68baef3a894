"""Command line of `python -m classification.test`."""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, world_info_from_env
from torch import nn

from ...checkpoint import (
    clean_state_dict,
    fetch_checkpoint,
    load_checkpoint,
    load_weights,
)
from ...files import write_atomically
from ..config import MAX_WORKERS, Config, ConfigError, Data, Model, load_config
from ..data import build_dataset, val_loader
from ..data.classes import names_of, set_labels
from ..evaluation import AMP_DTYPES, evaluate, resolve_amp, throughput
from ..model import build_model, check_model, create_model, find_not_finite, pick_device
from ..output import describe
from ..processes import EndedByAnother, fail_together, on_first, raise_once, rank, world_size

_logger = logging.getLogger(__name__)

MAX_BATCH_SIZE = 65536

# Settings that affect the output of a model and should match those of its training.
_OF_A_MODEL = {
    "data": ("image_size", "crop_pct", "interpolation", "mean", "std"),
    "model": ("name", "args"),
}

# Settings that can be overridden; the others have an option of their own or no effect.
_OVERRIDES = (
    "data.kind", "data.max_corrupt", "model.num_classes",
    *(f"{section}.{key}" for section, keys in _OF_A_MODEL.items() for key in keys),
)  # fmt: skip


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m classification.test", description="Evaluate a classifier."
    )
    parser.add_argument("model", metavar="MODEL|CONFIG", help="a timm model or a training YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.crop_pct=0.9")
    parser.add_argument("--checkpoint", help="a path or an address (default: released weights)")
    parser.add_argument("--data", help="root of the data set (default: the config's)")
    parser.add_argument("--split", help="split of the data (default: the config's)")
    parser.add_argument("--limit", type=int, help="images to take, evenly spaced (default: all)")
    parser.add_argument("--batch-size", type=int, default=64, help="per process (default: 64)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=("auto", *AMP_DTYPES), default="off")
    parser.add_argument(
        "--weights",
        choices=("ema", "model"),
        default="ema",
        help="of a checkpoint that has both (default: ema)",
    )
    parser.add_argument("--throughput", action="store_true", help="measure speed on random images")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_intermixed_args(argv)


def _config(name: str, overrides: list[str]) -> Config:
    """Return the configuration of a YAML file, or of a timm model with its data settings."""
    if name.endswith((".yaml", ".yml")):
        return load_config(name, overrides)
    if overrides:
        raise ConfigError(f"key=value needs a CONFIG.yaml, got '{name}' and {overrides[0]!r}")
    if not timm.is_model(name):
        raise ConfigError(f"'{name}' is neither a timm model nor a .yaml file")
    cfg = timm.get_pretrained_cfg(name)
    if not cfg.num_classes:
        raise ConfigError(f"MODEL must be a classifier, got '{name}'")
    model = Model(name=name, num_classes=cfg.num_classes, drop_path_rate=0)
    data = Data(
        image_size=cfg.input_size[-1],
        crop_pct=cfg.crop_pct,
        interpolation=cfg.interpolation,
        mean=cfg.mean,
        std=cfg.std,
    )
    return Config(model=model, data=data)


def _without_initial(options: Model) -> Model:
    return options.model_copy(update={"initial_checkpoint": None, "class_map": None})


def _load_model(options: Model, checkpoint: str | None, weights: str) -> tuple[nn.Module, Mapping]:
    """Return a model with its weights, and the contents of the checkpoint."""
    options = _without_initial(options).model_copy(update={"grad_checkpointing": False})
    if checkpoint is None:
        released = timm.get_pretrained_cfg(options.name, allow_unregistered=False)
        if released is None or not released.has_weights:
            raise ConfigError(f"{options.name} has no released weights: pass --checkpoint")
        return create_model(options, pretrained=True), {}
    model = build_model(options)
    contents = load_checkpoint(fetch_checkpoint(checkpoint))
    state_dict = clean_state_dict(contents, use_ema=weights == "ema")
    head = state_dict.get("head.weight")
    if head is not None and head.shape[0] != options.num_classes:
        raise ConfigError(
            f"{checkpoint} has {head.shape[0]} classes, the model {options.num_classes}: "
            "a training of your own is evaluated with its YAML in the place of the model's name"
        )
    load_weights(model, state_dict)
    return model, contents


def _warn_of_other_settings(cfg: Config, checkpoint: Mapping) -> None:
    """Warn about settings that affect the results and differ from those of the training."""
    trained = checkpoint.get("config")
    differences = []
    for section, keys in _OF_A_MODEL.items():
        before = trained.get(section) if isinstance(trained, dict) else None
        now = getattr(cfg, section).model_dump(mode="json")
        for key in keys if isinstance(before, dict) else ():
            if before.get(key, now[key]) != now[key]:
                differences.append(f"{section}.{key} is {now[key]}, was {before[key]} in training")
    if differences:
        _logger.log(
            on_first(logging.WARNING),
            "the checkpoint was trained with other settings: %s; the config.yaml of its run has "
            "its own",
            ", ".join(differences),
        )  # fmt: skip


def _check(arguments: argparse.Namespace) -> None:
    for name, least, most in (
        ("limit", 1, math.inf), ("batch_size", 1, MAX_BATCH_SIZE), ("workers", 0, MAX_WORKERS),
    ):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            limits = f"at least {least}" if value < least else f"at most {most}"
            raise ConfigError(f"--{name.replace('_', '-')} must be {limits}, got {value}")
    for override in arguments.overrides:
        key = override.partition("=")[0]
        if key not in _OVERRIDES and not key.startswith("model.args."):
            raise ConfigError(f"key=value must be of {', '.join(_OVERRIDES)}, got {override!r}")
    if arguments.split == "":  # it would select all splits together
        raise ConfigError("--split must be a split of the data, got ''")
    if arguments.throughput and world_size() > 1:
        raise ConfigError("--throughput measures a single process: run it without torchrun")
    if arguments.throughput:
        unused = ("checkpoint", "data", "split", "limit")
        if given := [name for name in unused if getattr(arguments, name) is not None]:
            raise ConfigError(
                f"--throughput measures random weights on random images: leave out --{given[0]}"
            )
    if arguments.json is not None and rank() == 0:
        check_json(arguments.json)


def check_json(path: Path) -> None:
    """Check that a result can be written to a file.

    Raises:
        ConfigError: If `path` exists but is not a file, or its folder is not writable.
    """
    if os.path.exists(path) and not path.is_file():
        raise ConfigError(f"--json must be a file, got {path}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--json must be in a folder that can be written, got {path}")


def run(arguments: argparse.Namespace) -> dict:
    """Evaluate a model or measure its throughput; every process of torchrun must call this.

    Args:
        arguments: Result of :func:`parse_arguments`.

    Returns:
        Entries of the printed table.

    Raises:
        ValueError: If an argument, model or data set cannot be used, or a result is not finite.
        OSError: If a file cannot be read.
        TooManyCorruptImages: If more images than `data.max_corrupt` cannot be read.
        EndedByAnother: If one of the above was raised on another process.
    """
    env = init_distributed_device_so(device=str(pick_device(arguments.device)))
    device = torch.device(env["device"])
    if rank() != 0:
        logging.getLogger().setLevel(logging.WARNING)
    with fail_together(device):
        _check(arguments)
        cfg = _config(arguments.model, arguments.overrides)
    amp = resolve_amp(arguments.amp, device)
    if arguments.throughput:
        model = build_model(_without_initial(cfg.model)).to(device)
        check_model(model, cfg.data.image_size, cfg.model.num_classes)
        speed = throughput(model, cfg.data.image_size, arguments.batch_size, device, amp)
        return {
            "model": cfg.model.name,
            "image_size": cfg.data.image_size,
            "batch_size": arguments.batch_size,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "amp": amp,
            "images_per_second": float(f"{speed:.4g}"),
        }
    updates = {"root": arguments.data, "val_split": arguments.split, "workers": arguments.workers}
    data = cfg.data.model_copy(update={k: v for k, v in updates.items() if v is not None})
    with fail_together(device):
        dataset = build_dataset(
            data, data.val_split, is_training=False, batch_size=arguments.batch_size
        )
        model, contents = _load_model(cfg.model, arguments.checkpoint, arguments.weights)
        _warn_of_other_settings(cfg, contents)
        model = model.to(device)
        source = arguments.checkpoint or cfg.model.name
        if name := find_not_finite(model):
            raise ValueError(f"{name} of {source} is not finite")
        set_labels(dataset, names_of(contents), source, cfg.model.num_classes)
        check_model(model, data.image_size, cfg.model.num_classes)
        loader = val_loader(
            dataset, data, arguments.batch_size, device, rank(), world_size(), arguments.limit
        )
    result = evaluate(model, loader, device, amp)
    if result.nonfinite or not math.isfinite(result.loss):
        raise_once(
            ValueError(
                f"{result.nonfinite} of {result.images} images have logits that are not finite, "
                f"the loss is {result.loss} (--amp {amp})"
            )
        )
    figures = asdict(result)
    del figures["nonfinite"]
    return {
        "model": cfg.model.name,
        "checkpoint": arguments.checkpoint or "released",
        "data": str(data.root),
        "image_size": data.image_size,
        **{key: round(value, 4) for key, value in figures.items()},
        "images_per_second": float(f"{result.images_per_second:.4g}"),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    arguments = parse_arguments(argv)
    for name in ("checkpoint", "data"):  # Shells leave the ~ in --data=~/images.
        if (value := getattr(arguments, name)) is not None:
            setattr(arguments, name, os.path.expanduser(value))
    if arguments.json is not None:
        arguments.json = arguments.json.expanduser()
    try:
        result = run(arguments)
        if rank() == 0:
            _write(result, arguments.json)
    except EndedByAnother:
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        # Before the process group exists, every process raises the same error.
        if dist.is_initialized() or world_info_from_env()[1] == 0:
            _logger.error("%s", describe(error))
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _write(result: dict, path: Path | None) -> None:
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if path:
        write_atomically(path, lambda file: file.write(text.encode()))
    width = max(map(len, result))
    sys.stdout.write("".join(f"{key:<{width}}  {value}\n" for key, value in result.items()))
    sys.stdout.write(json.dumps(result) + "\n")
