"""Model cards: the README of a repository on the Hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoints.zoo import PAPERS, Entry, Family, Figure, Task

CARD = "README.md"

# The Hub's id for models whose license is not known.
UNKNOWN = "unknown"

_CITATIONS: dict[Family, str] = {
    "FlashInternImage": """\
```bibtex
@article{xiong2024efficient,
  title={Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications},
  author={Xiong, Yuwen and Li, Zhiqi and Chen, Yuntao and Wang, Feng and Zhu, Xizhou and Luo, Jiapeng and Wang, Wenhai and Lu, Tong and Li, Hongsheng and Qiao, Yu and Lu, Lewei and Zhou, Jie and Dai, Jifeng},
  journal={arXiv preprint arXiv:2401.06197},
  year={2024}
}
```
""",  # noqa: E501
    "InternImage": """\
```bibtex
@inproceedings{wang2023internimage,
  title={InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions},
  author={Wang, Wenhai and Dai, Jifeng and Chen, Zhe and Huang, Zhenhang and Li, Zhiqi and Zhu, Xizhou and Hu, Xiaowei and Lu, Tong and Lu, Lewei and Li, Hongsheng and Wang, Xiaogang and Qiao, Yu},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages={14408--14419},
  year={2023}
}
```
""",  # noqa: E501
}
# Tags of the backbone on the Hub.
_TAGS: dict[Family, list[str]] = {
    "FlashInternImage": ["flash-internimage", "dcnv4"],
    "InternImage": ["internimage", "dcnv3"],
}

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

SIZES = {
    "nano": "nano",
    "tiny": "T",
    "small": "S",
    "base": "B",
    "large": "L",
    "xlarge": "XL",
    "huge": "H",
    "giant": "G",
}

# Name and type of each metric in model cards.
METRICS = {
    "top1": ("Top-1 accuracy", "accuracy"),
    "top5": ("Top-5 accuracy", "accuracy"),
    "box_ap": ("Box AP", "mean_average_precision"),
    "mask_ap": ("Mask AP", "mean_average_precision"),
    "miou": ("mIoU", "mean_iou"),
    "miou_several_scales": ("mIoU, multi-scale", "mean_iou"),
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
    def source(self) -> str:
        """Where the value comes from."""
        if self.origin == "published":
            return "published by the authors"
        return "measured" + (f" on {self.images:,} images" if self.images else "")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about the weights of a model that its files do not contain.

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
        family: Family of its backbone.
        model: Name of the model, such as 'Mask R-CNN with FlashInternImage-T'.
        details: Properties of the model by name, in Markdown.
        library: Library that loads the model.
        tags: Tags in addition to those of the task and the backbone.
        entry: Entry of the zoo if the weights are the released ones.
        facts: Facts given by the user.
        root: Root of the dataset, whose last part is its name if nothing else is known.
        base_model: Repository of the weights that the training started from, if known.
        usage: Python code that loads and runs the model.
        install: Packages that the code needs.
    """

    target: Target
    task: Task
    family: Family
    model: str
    details: Mapping[str, str]
    library: str
    tags: Sequence[str] = ()
    entry: Entry | None
    facts: Facts
    root: str | None
    base_model: str | None
    usage: str
    install: str

    @property
    def license(self) -> str | None:
        """License: the given one, or 'unknown' for released weights."""
        return choose_license(self.entry, self.facts)

    @property
    def datasets(self) -> list[str]:
        """Ids on the Hub of all training data that are known, the last first."""
        if self.entry is not None:
            return datasets_of(self.entry)
        return [self.facts.dataset] if self.facts.dataset else []

    @property
    def dataset(self) -> str | None:
        """Name of the dataset that the model was trained and evaluated on."""
        name = self.datasets[0] if self.datasets else Path(self.root or "").name
        return _DATASETS.get(name, name) or None

    @property
    def results(self) -> list[Result]:
        """Published and measured results."""
        published = self.entry.published if self.entry else {}
        stated = [Result(figure, value, "published") for figure, value in published.items()]
        return [*stated, *self.facts.results]

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
                metric_type=METRICS[result.figure][1],
                metric_value=result.value,
                metric_name=f"{METRICS[result.figure][0]} ({result.source})",
            )
            for result in self.results
        ]
        return ModelCardData(
            license=self.license,
            library_name=self.library,
            pipeline_tag=tag,
            tags=[tag, *self.tags, *_TAGS[self.family], f"arxiv:{PAPERS[self.family].arxiv}"],
            datasets=self.datasets or None,
            base_model=self.base_model,
            model_name=self.target.repo_id.partition("/")[2] if results else None,
            eval_results=results or None,
        )

    def _text(self) -> str:
        name, paper = self.target.repo_id.partition("/")[2], PAPERS[self.family]
        purpose = _TASKS[self.task][1]
        if "instance-segmentation" in self.tags:
            purpose += " and instance segmentation"
        trained = f", trained on {self.dataset}" if self.dataset else ""
        origin = ""
        if self.entry is not None:
            origin = (
                f" The weights are those released by the authors in [{paper.repository}]"
                f"(https://github.com/{paper.repository}), under the parameter names of "
                f"{self.library}."
            )
        link = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})"
        details = {"Model": self.model, **self.details, "Paper": link, "License": self._license()}
        parts = [
            f"# {name}\n",
            f"{self.model} for {purpose}{trained}.{origin}\n",
            "## Model details\n",
            "".join(f"- **{key}:** {value}\n" for key, value in details.items()),
            "## Results\n",
            self._table(),
            "## Usage\n",
            f"Install {self.install}. Then:\n",
            f"```python\n{self.usage}```\n",
            "## Citation\n",
            _CITATIONS[self.family],
        ]
        return "\n".join(parts)

    @property
    def _evaluated_on(self) -> str:
        dataset = self.dataset or "unknown dataset"
        split = _SPLITS.get(dataset) if self.entry else None
        return f"{dataset} {split}" if split else dataset

    def _license(self) -> str:
        if self.license == UNKNOWN and self.entry is not None:
            return "not known for the weights; the authors' code is under the MIT license"
        return self.license or "not stated"

    def _table(self) -> str:
        if not self.results:
            return "No results are stated.\n"
        rows = [
            f"| {self._evaluated_on} | {METRICS[result.figure][0]} "
            f"| {result.value} | {result.source} |\n"
            for result in self.results
        ]
        head = "| dataset | metric | value (percent) | source |\n|---|---|---|---|\n"
        source = self.entry.source if self.entry else None
        return "".join([head, *rows]) + (f"\nPublished in: {source}.\n" if source else "")


def datasets_of(entry: Entry) -> list[str]:
    """Return the ids of the datasets that a released checkpoint was trained on, the last first."""
    # Datasets that are not on the Hub, such as the joint one of InternImage-H, have no id.
    pretraining = [name for name in entry.pretraining.lower().split(", ") if name in _DATASETS]
    only_pretrained = entry.task == "classification" and entry.classes != 1000
    return [*dict.fromkeys([*([] if only_pretrained else [_LAST[entry.task]]), *pretraining])]


def choose_license(entry: Entry | None, facts: Facts) -> str | None:
    """Return the license to state: the given one, or 'unknown' for the released weights."""
    return facts.license or (UNKNOWN if entry else None)
