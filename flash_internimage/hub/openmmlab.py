"""Write a detector or segmentor in the format that OpenMMLab loads."""

import copy
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from torch import nn

from ..checkpoints import (
    Entry,
    check_finite,
    check_state_dict,
    convert_checkpoint,
    load_checkpoint,
    save_atomically,
)
from ..checkpoints.zoo import TASKS
from ..openmmlab.utils import build_without_memory
from .card import SIZES, Card, Facts, Target
from .classifier import base_model, family_of

_logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "config.py", "model.pth"

# Run-specific keys of a config; some contain local paths.
_OF_A_RUN = ("launcher", "load_from", "resume", "work_dir")

_INFERENCERS = {"mmdet": "DetInferencer", "mmseg": "MMSegInferencer"}
_USAGE = """\
from flash_internimage.openmmlab import {package}  # registers the model
from huggingface_hub import hf_hub_download
from {library}.apis import {inferencer}

config = {config}
inferencer = {inferencer}(config, {weights})
result = inferencer("image.jpg")
"""


def save_openmmlab_model(
    folder: Path,
    cfg: Config,
    checkpoint: Path,
    target: Target,
    *,
    entry: Entry | None = None,
    released: bool = False,
    facts: Facts,
) -> None:
    """Write weights, config and model card of a detector or segmentor to a folder.

    `model.pth` contains the weights under the current parameter names, and the class names and
    colors; `config.py` contains the whole config.

    Args:
        folder: Existing folder.
        cfg: Config of the model. Its `default_scope` must be 'mmdet' or 'mmseg'.
        checkpoint: Weights under current or published names.
        target: Where the folder will be uploaded to.
        entry: Entry of the zoo with this model, if any.
        released: Whether the weights are the released ones of this entry.
        facts: Measured results, dataset and license.

    Raises:
        ValueError: If the checkpoint cannot be read or does not match the model, its weights are
            not finite, or the config is not of a detector or segmentor.
    """
    library = cfg.get("default_scope")
    if library not in TASKS or not isinstance(cfg.get("model"), dict):
        raise ValueError(
            f"default_scope of {cfg.filename} must be one of {', '.join(TASKS)}, got {library!r}"
        )
    model = build_without_memory(cfg)
    converted = convert_checkpoint(load_checkpoint(checkpoint))
    weights = _matching(model, converted["state_dict"])
    with DefaultScope.overwrite_default_scope(library):
        meta = converted["meta"].get("dataset_meta") or _dataset_meta(cfg)
    save_atomically({"state_dict": weights, "meta": {"dataset_meta": meta}}, folder / WEIGHTS)
    settings = {key: value for key, value in cfg.items() if key not in _OF_A_RUN}
    if paths := sorted(set(_absolute_paths(settings))):
        _logger.warning(
            "%s will contain paths of this machine: %s%s",
            CONFIG, ", ".join(paths[:5]), ", ..." if len(paths) > 5 else "",
        )  # fmt: skip
    Config(settings).dump(folder / CONFIG)

    task = TASKS[library]
    known = entry if released else None
    source = base_model((cfg.model.backbone.get("init_cfg") or {}).get("checkpoint"))
    tags = ["instance-segmentation"] if _has_masks(cfg) else []
    if task == "segmentation":
        tags = ["semantic-segmentation"]
    details = {
        "Parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        "Classes": f"{len(meta['classes']):,}, named in `{WEIGHTS}`",
    }
    if known is not None:
        size = "crop size" if task == "segmentation" else "shorter side"
        details["Image size"] = f"{known.resolution} ({size})"
        details["Pretraining data"] = f"{known.pretraining} (backbone)"
        details["Schedule"] = f"{known.schedule}"
    details["Config"] = f"[`{CONFIG}`]({CONFIG}), for {library}"
    inferencer = _INFERENCERS[library]
    Card(
        target=target,
        task=task,
        family=family_of(model.backbone),
        model=_name(cfg, entry),
        details=details,
        library=library,
        tags=tags,
        entry=known,
        facts=facts,
        root=_test_dataset(cfg).get("data_root"),
        base_model=source,
        usage=_USAGE.format(
            package=task,
            library=library,
            inferencer=inferencer,
            config=target.download(CONFIG),
            weights=target.download(WEIGHTS),
        ),
        install="`flash-internimage` with OpenMMLab",
    ).write(folder)


def _matching(model: nn.Module, weights: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return weights in the order of a model, after checking that they match and are finite."""
    expected = model.state_dict()
    check_state_dict(expected, weights)
    check_finite(weights)
    # Cloning a view keeps the file from containing the rest of its storage.
    return {name: weights[name].detach().clone() for name in expected}


def _absolute_paths(value: Any) -> Iterator[str]:
    """Yield the absolute paths in a part of a config."""
    if isinstance(value, str) and os.path.isabs(value):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _absolute_paths(item)


def _test_dataset(cfg: Config) -> Mapping[str, Any]:
    return (cfg.get("test_dataloader") or {}).get("dataset") or {}


def _dataset_meta(cfg: Config) -> dict[str, Any]:
    """Return the class names and colors of a config, for checkpoints that have none."""
    dataset = copy.deepcopy(_test_dataset(cfg))
    meta = DATASETS.build({**dataset, "lazy_init": True}).metainfo if dataset else {}
    if not meta.get("classes"):
        raise ValueError("the checkpoint or test_dataloader must contain class names, got none")
    return {key: meta[key] for key in ("classes", "palette") if meta.get(key)}


def _has_masks(cfg: Config) -> bool:
    return bool((cfg.model.get("roi_head") or {}).get("mask_head"))


def _name(cfg: Config, entry: Entry | None) -> str:
    """Return the name of a model, such as 'Mask R-CNN with FlashInternImage-T'."""
    if entry is not None:
        return f"{entry.architecture} with {entry.family}-{entry.backbone}"
    kind, backbone = cfg.model.type, cfg.model.backbone
    if kind in ("EncoderDecoder", "CheckedEncoderDecoder"):
        kind = cfg.model.decode_head.type
    size = SIZES.get(backbone.get("arch"))
    return f"{kind} with {backbone.type}" + (f"-{size}" if size else "")
