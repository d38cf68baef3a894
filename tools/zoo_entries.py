"""Entries of the zoo, read and validated from configs/zoo.yaml."""

import difflib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from flash_internimage.checkpoint import fetch_checkpoint
from flash_internimage.classification.config import ConfigError, Section, explain, load_yaml

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "configs" / "zoo.yaml"

Percent = Annotated[float, Field(ge=0, le=100)]


class Figures(Section):
    """Figures in percent: ImageNet-1K val accuracy, COCO val2017 AP and ADE20K val mIoU."""

    top1: Percent | None = None
    box_ap: Percent | None = None
    mask_ap: Percent | None = None
    miou: Percent | None = None
    miou_several_scales: Percent | None = None

    def known(self) -> dict[str, float]:
        """Return the figures that are known, by name."""
        return self.model_dump(exclude_none=True)


class Entry(Section):
    """A released checkpoint; configs/zoo.yaml explains the keys."""

    task: Literal["classification", "detection", "segmentation"]
    architecture: str
    backbone: Literal["T", "S", "B", "L"]
    pretraining: str
    schedule: str | None = None
    config: str | None = None
    addresses: list[Annotated[str, Field(pattern=r"^https?://.*/[^/]+$")]] = Field(min_length=1)
    resolution: PositiveInt
    classes: PositiveInt | None = None
    parameters: PositiveInt
    gmacs: PositiveFloat | None = None
    published: Figures = Figures()
    source: str | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    def fetch(self, offline: bool = False) -> Path:
        """Return the local file, downloading it on first use."""
        return fetch_checkpoint(self.addresses[0], offline, self.sha256)


def read_zoo(path: Path = ZOO) -> dict[str, Entry]:
    """Read the entries of the zoo, by name.

    Raises:
        ConfigError: If the file is not valid YAML, or a key is duplicate or unknown, or a value is
            invalid; the message says where and why.
    """
    contents = load_yaml(path.read_bytes(), path)
    if not isinstance(contents, dict):
        raise ConfigError(f"{path} must hold entries by their names, got {contents!r:.100}")
    zoo = {}
    for name, values in contents.items():
        try:
            zoo[name] = Entry.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, Entry, f"{path}: {name}")) from error
    return zoo


def find(zoo: dict[str, Entry], name: str) -> Entry:
    """Return the entry `name`.

    Raises:
        ConfigError: If there is no such entry.
    """
    if name not in zoo:
        close = difflib.get_close_matches(name, zoo, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else "`python -m tools.zoo list` has them"
        raise ConfigError(f"the zoo has no '{name}', {hint}")
    return zoo[name]
