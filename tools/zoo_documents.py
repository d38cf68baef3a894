"""Documents generated from the zoo: the README's tables and OpenMMLab's metafiles.

The README lists the models with FlashInternImage, docs/internimage.md those with InternImage.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from flash_internimage.checkpoints.zoo import PAPERS, Entry

ROOT = Path(__file__).parents[1]

# Columns of each task's table in README.md.
_COLUMNS = {
    "classification": (
        "model",
        "timm name",
        "pretraining",
        "resolution",
        "parameters",
        "MACs",
        "top-1 (published)",
    ),
    "detection": ("detector", "backbone", "schedule", "box AP", "mask AP", "config"),
    "segmentation": ("segmentor", "backbone", "crop", "mIoU", "mIoU (ms)", "config"),
}
# OpenMMLab's names of task, dataset and metric of each result.
_RESULTS = {
    "top1": ("Image Classification", "ImageNet-1K", "Top 1 Accuracy"),
    "box_ap": ("Object Detection", "COCO", "box AP"),
    "mask_ap": ("Instance Segmentation", "COCO", "mask AP"),
    "miou": ("Semantic Segmentation", "ADE20K", "mIoU"),
    "miou_several_scales": ("Semantic Segmentation", "ADE20K", "mIoU(ms+flip)"),
}
_EMPTY = "\N{EN DASH}"
_NOTICE = "# Generated from the zoo by `python -m tools.zoo generate`. Do not edit.\n"


def table(columns: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table, with a dash for None."""
    lines = ([_EMPTY if cell is None else str(cell) for cell in row] for row in (columns, *rows))
    head, *body = (f"| {' | '.join(line)} |\n" for line in lines)
    return "".join([head, "|" + "---|" * len(columns) + "\n", *body])


def _row(name: str, entry: Entry) -> tuple:
    figures = entry.published.get
    if entry.task == "classification":
        size = f"{entry.parameters / 1e6:.1f} M", f"{entry.gmacs:.1f} G"
        model = f"{entry.architecture}-{entry.backbone}", f"`{name}`"
        return *model, entry.pretraining, entry.resolution, *size, figures("top1")
    config = entry.config and f"[{Path(entry.config).name}]({entry.config})"
    model = entry.architecture, entry.backbone
    if entry.task == "detection":
        return *model, entry.schedule, figures("box_ap"), figures("mask_ap"), config
    return *model, entry.resolution, figures("miou"), figures("miou_several_scales"), config


def _with_tables(text: str, zoo: dict[str, Entry]) -> str:
    for task, columns in _COLUMNS.items():
        head = table(columns, [])
        before, found, after = text.partition(head)
        if not found:
            raise ValueError(f"README.md must contain a table that begins with {head}")
        lines = after.splitlines(keepends=True)
        rest = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
        rows = (
            _row(name, entry)
            for name, entry in zoo.items()
            if entry.task == task and entry.family == "FlashInternImage"
        )
        text = "".join([before, table(columns, rows), *lines[rest:]])
    return text


def _metafile(task: str, zoo: dict[str, Entry]) -> dict[str, Any]:
    collections = [
        {
            "Name": f"{family}-{task}",
            "Paper": {"Title": paper.title, "URL": f"https://arxiv.org/abs/{paper.arxiv}"},
            "README": f"{task}/README.md",
        }
        for family, paper in PAPERS.items()
    ]
    models = []
    for name, entry in zoo.items():
        if entry.task != task or not entry.config:  # mmengine warns of models without one
            continue
        metadata = {"Parameters": entry.parameters}
        if entry.gmacs:
            metadata["FLOPs"] = round(entry.gmacs * 1e9)
        model = {
            "Name": name,
            "In Collection": f"{entry.family}-{task}",
            "Metadata": metadata,
            "Results": [
                {"Task": work, "Dataset": data, "Metrics": {metric: value}}
                for figure, value in entry.published.items()
                for work, data, metric in [_RESULTS[figure]]
            ],
            "Weights": entry.addresses[0],
            "Config": entry.config,
        }
        models.append(model)
    return {"Collections": collections, "Models": models}


def documents(zoo: dict[str, Entry]) -> dict[Path, str]:
    """Return the contents of all generated files, including README.md with its tables."""
    metafiles = {f"configs/{task}/metafile.yml": _metafile(task, zoo) for task in _COLUMNS}
    metafiles["model-index.yml"] = {"Import": list(metafiles)}
    written = {
        ROOT / path: _NOTICE + yaml.safe_dump(contents, sort_keys=False)
        for path, contents in metafiles.items()
    }
    readme = ROOT / "README.md"
    return written | {readme: _with_tables(readme.read_text(), zoo)}
