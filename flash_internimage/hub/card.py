"""Model cards: the README of a repository on the Hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoints.zoo import Entry, Figure, Task

CARD = "README.md"

# The Hub's id for models whose license is not known.
UNKNOWN = "unknown"

_AUTHORS = "[OpenGVLab/DCNv4](https://github.com/OpenGVLab/DCNv4)"
_PAPER = (
    "[Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision "
    "Applications](https://arxiv.org/abs/2401.06197)"
)
_CITATION = """\
```bibtex
@article{xiong2024efficient,
  title={Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications},
  author={Xiong, Yuwen and Li, Zhiqi and Chen, Yuntao and Wang, Feng and Zhu, Xizhou and Luo, Jiapeng and Wang, Wenhai and Lu, Tong and Li, Hongsheng and Qiao, Yu and Lu, Lewei and Zhou, Jie and Dai, Jifeng},
  journal={arXiv preprint arXiv:2401.06197},
  year={2024}
}
```
"""  # noqa: E501

# The Hub's name of each task, and its name in a sentence.
_TASKS: dict[Task, tuple[str, str]] = {
    "classification": ("image-classification", "image classification"),
    "detection": ("object-detection", "object detection"),
    "segmentation": ("image-segmentation", "semantic segmentation"),
}

# Names of datasets by their id on the Hub; others are named by their id.
_DATASETS = {
    "imagenet-1k": "ImageNet-1K",
    "imagenet-22k": "ImageNet-22K",
    "coco": "COCO",
    "ade20k": "ADE20K",
}
# Datasets and splits of the published results.
_SPLITS = {"ImageNet-1K": "val", "COCO": "val2017", "ADE20K": "val"}
# The dataset on which the released models of a task were trained last, and evaluated.
_LAST: dict[Task, str] = {
    "classification": "imagenet-1k",
    "detection": "coco",
    "segmentation": "ade20k",
}

SIZES = {"nano": "nano", "tiny": "T", "small": "S", "base": "B", "large": "L"}


class _Metric(NamedTuple):
    name: str
    type: str


# Name and type of each metric in model cards.
METRICS: dict[str, _Metric] = {
    "top1": _Metric("Top-1 accuracy", "accuracy"),
    "top5": _Metric("Top-5 accuracy", "accuracy"),
    "box_ap": _Metric("Box AP", "mean_average_precision"),
    "mask_ap": _Metric("Mask AP", "mean_average_precision"),
    "miou": _Metric("mIoU", "mean_iou"),
    "miou_several_scales": _Metric("mIoU, multi-scale", "mean_iou"),
}


@dataclass(frozen=True)
class Target:
    """Where a model is published.

    Attributes:
        repo_id: Repository, as USER/NAME.
        branch: Branch of the repository; None for main.
    """

    repo_id: str
    branch: str | None = None

    @property
    def in_timm(self) -> str:
        """Name under which timm loads the model."""
        return f"hf-hub:{self.repo_id}" + (f"@{self.branch}" if self.branch else "")

    def download(self, file: str) -> str:
        """Return the Python expression that downloads a file and returns its path."""
        revision = f', revision="{self.branch}"' if self.branch else ""
        return f'hf_hub_download("{self.repo_id}", "{file}"{revision})'


@dataclass(frozen=True)
class Result:
    """A result that a model card states.

    Attributes:
        figure: Name of the metric.
        value: Value in percent.
        origin: Whether the authors published it or it was measured.
        images: Number of images it was measured on, if known.
    """

    figure: Figure | Literal["top5"]
    value: float
    origin: Literal["published", "measured"]
    images: int | None = None

    @property
    def metric(self) -> _Metric:
        """Name and type of the metric."""
        return METRICS[self.figure]

    @property
    def source(self) -> str:
        """Where the value comes from."""
        if self.origin == "published":
            return "published by the authors"
        return "measured" + (f" on {self.images:,} images" if self.images else "")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about the weights of a model beyond the files themselves.

    Attributes:
        results: Measured results.
        dataset: Id or name of the dataset of the training; None for that of the released weights
            or of the settings.
        license: Id of the license on the Hub.
    """

    results: Sequence[Result] = ()
    dataset: str | None = None
    license: str | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """Contents of a model card.

    Attributes:
        target: Where the model is published.
        task: Task of the model.
        model: Name of the model, such as 'Mask R-CNN with FlashInternImage-T'.
        details: Properties of the model by name, in Markdown.
        dataset: Name of the dataset that the model was trained and evaluated on, if known.
        datasets: Ids on the Hub of all training data, if known.
        library: Library that loads the model.
        tags: Tags in addition to those of the task and the backbone.
        released: Whether the weights are the released ones.
        source: Where the authors published their results, if they did.
        base_model: Repository of the weights that the training started from, if known.
        license: Id of the license on the Hub; None if it is not stated.
        results: Results of the model.
        usage: Python code that loads and runs the model.
        install: Packages that the code needs.
    """

    target: Target
    task: Task
    model: str
    details: Mapping[str, str]
    dataset: str | None
    datasets: Sequence[str] = ()
    library: str
    tags: Sequence[str] = ()
    released: bool
    source: str | None = None
    base_model: str | None = None
    license: str | None
    results: Sequence[Result]
    usage: str
    install: str

    def write(self, folder: Path) -> None:
        """Write the card to a folder."""
        ModelCard(f"---\n{self._metadata().to_yaml()}\n---\n\n{self._text()}").save(folder / CARD)

    def _metadata(self) -> ModelCardData:
        tag, _ = _TASKS[self.task]
        results = [
            EvalResult(
                task_type=tag,
                dataset_type=self.datasets[0] if self.datasets else self._evaluated_on,
                dataset_name=self._evaluated_on,
                metric_type=result.metric.type,
                metric_value=result.value,
                metric_name=f"{result.metric.name} ({result.source})",
            )
            for result in self.results
        ]
        return ModelCardData(
            license=self.license,
            library_name=self.library,
            pipeline_tag=tag,
            tags=[tag, *self.tags, "flash-internimage", "dcnv4", "arxiv:2401.06197"],
            datasets=[*dict.fromkeys(self.datasets)] or None,
            base_model=self.base_model,
            model_name=self.target.repo_id.partition("/")[2] if results else None,
            eval_results=results or None,
        )

    def _text(self) -> str:
        name = self.target.repo_id.partition("/")[2]
        purpose = _TASKS[self.task][1]
        if "instance-segmentation" in self.tags:
            purpose += " and instance segmentation"
        trained = f", trained on {self.dataset}" if self.dataset else ""
        origin = "It was trained with the `flash-internimage` package."
        if self.released:
            origin = (
                f"The weights are those released by the authors in {_AUTHORS}, under the parameter "
                f"names of {self.library}."
            )
        details = {"Model": self.model, **self.details, "Paper": _PAPER, "License": self._license()}
        parts = [
            f"# {name}\n",
            f"{self.model} for {purpose}{trained}. {origin}\n",
            "## Model details\n",
            "".join(f"- **{key}:** {value}\n" for key, value in details.items()),
            "## Results\n",
            self._table(),
            "## Usage\n",
            f"Install {self.install}. Then:\n",
            f"```python\n{self.usage}```\n",
            "## Citation\n",
            _CITATION,
        ]
        return "\n".join(parts)

    @property
    def _evaluated_on(self) -> str:
        dataset = self.dataset or "unknown dataset"
        split = _SPLITS.get(dataset) if self.released else None
        return f"{dataset} {split}" if split else dataset

    def _license(self) -> str:
        if self.license == UNKNOWN and self.released:
            return "not known for the weights; the authors' code is under the MIT license"
        return self.license or "not stated"

    def _table(self) -> str:
        if not self.results:
            return "No results are stated.\n"
        rows = [
            f"| {self._evaluated_on} | {result.metric.name} | {result.value} | {result.source} |\n"
            for result in self.results
        ]
        head = "| dataset | metric | value (percent) | source |\n|---|---|---|---|\n"
        return "".join([head, *rows]) + (f"\nPublished in: {self.source}.\n" if self.source else "")


def published_results(entry: Entry | None) -> list[Result]:
    """Return the published results of a released checkpoint, and none for other weights."""
    published = entry.published if entry else {}
    return [Result(figure, value, "published") for figure, value in published.items()]


def datasets_of(entry: Entry) -> list[str]:
    """Return the ids of the datasets that a released checkpoint was trained on, the last first."""
    pretraining = entry.pretraining.lower()
    only_pretrained = entry.task == "classification" and entry.classes != 1000
    return [*dict.fromkeys([*([] if only_pretrained else [_LAST[entry.task]]), pretraining])]


def choose_dataset(
    entry: Entry | None, facts: Facts, root: str | None
) -> tuple[str | None, list[str]]:
    """Return the name of the last dataset of a training, and the ids of all that are known.

    Args:
        entry: Entry of the zoo if the weights are the released ones.
        facts: What the user stated.
        root: Root of the dataset, whose last part is its name if nothing else is known.
    """
    ids = datasets_of(entry) if entry else [facts.dataset] if facts.dataset else []
    name = ids[0] if ids else Path(root).name if root else None
    return _DATASETS.get(name or "", name), ids


def choose_license(entry: Entry | None, facts: Facts) -> str | None:
    """Return the license to state: the given one, or 'unknown' for the released weights."""
    return facts.license or (UNKNOWN if entry else None)
