"""Write a classifier in the format that timm loads from the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from torch import nn

from ..backbones import InternImage
from ..checkpoints import (
    Entry,
    check_finite,
    check_state_dict,
    clean_state_dict,
    load_checkpoint,
    read_zoo,
)
from ..checkpoints.zoo import PAPERS, Family
from ..classification.config import Model
from ..classification.data.classes import names_of
from ..classification.model import create_model, trained_settings
from .card import SIZES, Card, Facts, Target, choose_license

_USAGE = """\
import timm
import torch
from PIL import Image

import flash_internimage  # registers the architecture with timm

model = timm.create_model("{source}", pretrained=True).eval()
data = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data, is_training=False)
image = transform(Image.open("image.jpg").convert("RGB"))
with torch.inference_mode():
    probabilities = model(image[None]).softmax(dim=1)
"""
_SOURCES = ("url", "file", "hf_hub_id", "origin_url", "tag", "license")


def save_classifier(
    folder: Path,
    name: str,
    checkpoint: Path,
    target: Target,
    *,
    entry: Entry | None = None,
    facts: Facts,
) -> None:
    """Write weights, `config.json` and model card of a classifier to a folder.

    The settings of the model and its preprocessing, and the class names, are those of the
    checkpoint if it was written by `classification.train`, otherwise timm's for this name.

    Args:
        folder: Existing folder.
        name: timm name of the model, such as 'flash_internimage_tiny.in1k'.
        checkpoint: Weights. Averaged (EMA) weights are preferred.
        target: Where the folder will be uploaded to.
        entry: Entry of the zoo if the checkpoint is a released one.
        facts: Measured results, dataset and license.

    Raises:
        ValueError: If the checkpoint cannot be read or does not match the model, or its weights
            are not finite.
    """
    contents = load_checkpoint(checkpoint)
    weights = clean_state_dict(contents)
    trained = trained_settings(contents)
    options, data = trained.get("model", {}), trained.get("data", {})
    architecture = name.partition(".")[0]
    if (other := options.get("name", architecture).partition(".")[0]) != architecture:
        raise ValueError(f"{checkpoint} must be a checkpoint of {architecture}, got one of {other}")
    classes = len(weights["head.weight"]) if "head.weight" in weights else 0
    if not classes:
        raise ValueError(f"{checkpoint} must contain a classifier, got no head.weight")
    model = create_model(
        Model(name=name, num_classes=classes, drop_path_rate=0, args=options.get("args", {}))
    )
    check_state_dict(model.state_dict(), weights)
    check_finite(weights)
    model.load_state_dict(weights)

    cfg = _pretrained_cfg(model, data, choose_license(entry, facts), entry)
    names = names_of(contents)
    save_for_hf(
        model, str(folder), model_config={"label_names": names} if names else None,
        model_args=options.get("args"), safe_serialization=True,
    )  # fmt: skip
    size = cfg["input_size"][-1]
    family = family_of(model)
    details = {
        "Architecture": f"`{architecture}`, created by timm",
        "Parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        "Classes": f"{classes:,}" + (", named in `config.json`" if names else ""),
        "Image size": f"{size} x {size} (crop {cfg['crop_pct']:g}, {cfg['interpolation']})",
    }
    if entry is not None and entry.gmacs:
        details["Multiply-accumulates"] = f"{entry.gmacs:.1f} G per image"
    if entry is not None:
        details["Pretraining data"] = entry.pretraining
    Card(
        target=target,
        task="classification",
        family=family,
        model=f"{family}-{SIZES[architecture.rpartition('_')[2]]}",
        details=details,
        library="timm",
        tags=["timm"],
        entry=entry,
        facts=facts,
        root=data.get("root"),
        base_model=base_model(options.get("initial_checkpoint")),
        usage=_USAGE.format(source=target.in_timm),
        install="`flash-internimage`, which includes timm and PyTorch",
    ).write(folder)


def _pretrained_cfg(
    model: nn.Module, data: Mapping[str, Any], license: str | None, entry: Entry | None
) -> dict[str, Any]:
    """Set the preprocessing and the license in a model's pretrained config, and return it."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if entry is None:
        for key in _SOURCES:
            cfg.pop(key, None)
    cfg.pop("license", None)
    if license:
        cfg["license"] = license
    if "image_size" in data:
        size = data["image_size"]
        cfg |= {"input_size": (3, size, size), "pool_size": None}
    cfg |= {key: data[key] for key in ("crop_pct", "interpolation", "mean", "std") if key in data}
    return cfg


def family_of(model: object) -> Family:
    """Return the family of a backbone."""
    return "InternImage" if isinstance(model, InternImage) else "FlashInternImage"


def base_model(source: str | None) -> str | None:
    """Return the repository on the Hub of released weights, or None for other sources."""
    entry = read_zoo().get(source or "")
    return None if entry is None else PAPERS[entry.family].repository
