"""The released checkpoints, listed in zoo.yaml."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from ..configs import configs_root
from .loading import fetch_checkpoint

try:
    from yaml import CSafeLoader as Loader
except ImportError:  # PyYAML compiled without libyaml
    from yaml import SafeLoader as Loader  # type: ignore[assignment]

ZOO = files(__package__) / "zoo.yaml"
Task = Literal["classification", "detection", "segmentation"]
Family = Literal["FlashInternImage", "InternImage"]
# ImageNet-1K val accuracy, COCO val2017 AP and ADE20K val mIoU
Figure = Literal["top1", "box_ap", "mask_ap", "miou", "miou_several_scales"]


@dataclass(frozen=True)
class Paper:
    """The paper of a family of backbones.

    Attributes:
        title: Title.
        arxiv: Number on arXiv.
        repository: Repository of the authors on GitHub, and of the released files on the Hub.
    """

    title: str
    arxiv: str
    repository: str


PAPERS: dict[Family, Paper] = {
    "FlashInternImage": Paper(
        "Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision "
        "Applications",
        "2401.06197",
        "OpenGVLab/DCNv4",
    ),
    "InternImage": Paper(
        "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions",
        "2211.05778",
        "OpenGVLab/InternImage",
    ),
}

# Tasks of OpenMMLab's libraries.
TASKS: dict[str, Task] = {"mmdet": "detection", "mmseg": "segmentation"}
# Metrics of OpenMMLab, and the factors that convert them to percent.
_METRICS: dict[Figure, tuple[str, int]] = {
    "box_ap": ("coco/bbox_mAP", 100),
    "mask_ap": ("coco/segm_mAP", 100),
    "miou": ("mIoU", 1),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A released checkpoint; zoo.yaml explains the keys."""

    task: Task
    architecture: str
    family: Family = "FlashInternImage"
    backbone: Literal["T", "S", "B", "L", "XL", "H", "G"]
    pretraining: str
    schedule: str | None = None
    config: str | None = None
    addresses: list[str]
    resolution: int
    classes: int | None = None
    parameters: int
    gmacs: float | None = None
    published: dict[Figure, float] = field(default_factory=dict)
    source: str | None = None
    sha256: str | None = None

    @property
    def config_path(self) -> Path:
        """Path of the shipped config.

        Raises:
            ValueError: If the entry has none.
        """
        if self.config is None:
            raise ValueError(f"config must be set for {self.task}, got None")
        return configs_root() / self.config

    def fetch(self, offline: bool = False) -> Path:
        """Return the local file, downloading it on first use."""
        return fetch_checkpoint(self.addresses[0], offline, self.sha256)


def read_zoo() -> dict[str, Entry]:
    """Return all entries of the zoo, by name."""
    rows = yaml.load(ZOO.read_bytes(), Loader)
    return {name: Entry(**row) for name, row in rows.items()}


def find(zoo: Mapping[str, Entry], name: str) -> Entry:
    """Return the entry `name`.

    Raises:
        ValueError: If there is no such entry.
    """
    if name not in zoo:
        close = difflib.get_close_matches(name, zoo, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else "see `flash-internimage zoo list`"
        raise ValueError(f"no checkpoint '{name}' in the zoo; {hint}")
    return zoo[name]


def to_figures(metrics: Mapping[str, Any]) -> dict[Figure, float]:
    """Return the metrics of mmdet and mmseg that the zoo lists, in percent."""
    return {
        figure: float(metrics[metric]) * factor
        for figure, (metric, factor) in _METRICS.items()
        if metric in metrics
    }
