"""Directives that write tables from the entries of the zoo.

``zoo-table TASK [FAMILY]`` lists the released checkpoints of a task, ``reproduction-table`` how to
train and evaluate each of them and which results count as reproduced.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from flash_internimage.checkpoints.zoo import PAPERS, ZOO, Entry, Figure, read_zoo
from flash_internimage.cli.zoo_evaluation import TOLERANCE
from tools.zoo_documents import ROOT, table

_FIGURES: dict[Figure, str] = {
    "top1": "top-1",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
    "miou": "mIoU",
    "miou_several_scales": "mIoU, multi-scale",
}
_COLUMNS: dict[str, list[Figure]] = {
    "classification": ["top1"],
    "detection": ["box_ap", "mask_ap"],
    "segmentation": ["miou", "miou_several_scales"],
}
TASKS = tuple(_COLUMNS)
_DATA = {
    "classification": "/path/to/imagenet",
    "detection": "data/coco",
    "segmentation": "data/ade/ADEChallengeData2016",
}


def _zoo_row(name: str, entry: Entry) -> tuple:
    figures = map(entry.published.get, _COLUMNS[entry.task])
    size = f"{entry.parameters / 1e6:.1f} M"
    macs = (f"{entry.gmacs:.1f} G",) if entry.task == "classification" else ()
    file = f"[{Path(entry.addresses[0]).name}]({entry.addresses[0]})"
    return f"`{name}`", entry.pretraining, entry.resolution, size, *macs, *figures, file


def zoo_table(task: str, zoo: dict[str, Entry]) -> str:
    """Return the Markdown table of the checkpoints of a task."""
    macs = ("MACs",) if task == "classification" else ()
    figures = (_FIGURES[figure] for figure in _COLUMNS[task])
    columns = ("name", "pretraining", "resolution", "parameters", *macs, *figures, "file")
    rows = (_zoo_row(name, entry) for name, entry in zoo.items() if entry.task == task)
    return table(columns, rows)


def _processes(config: str) -> tuple[int, int]:
    """Return the number of GPUs and the images per GPU that the config's first lines state."""
    found = re.search(r"^# .*?(\d+) GPUs x (\d+) image", (ROOT / config).read_text(), re.M)
    if not found:
        raise ValueError(f"{config} must state its GPUs and images per GPU")
    return int(found[1]), int(found[2])


def _reproduction_row(name: str, task: str, config: str, entry: Entry) -> tuple:
    gpus, images = _processes(config)
    nodes_ = f"--nnodes {gpus // 8} " if gpus > 8 else ""
    data = f" data.root={_DATA[task]}" if task == "classification" else ""
    train = f"torchrun {nodes_}--nproc-per-node 8 -m {task}.train {config}{data}"
    evaluate = f"flash-internimage zoo evaluate {name} --data {_DATA[task]}"
    published = (f"{_FIGURES[figure]} {value}" for figure, value in entry.published.items())
    accepted = (
        f"{value - TOLERANCE:.1f} to {value + TOLERANCE:.1f}" for value in entry.published.values()
    )
    return (
        f"[{Path(config).name}](/../{config})", f"{gpus} x {images}",
        f"`{train}`<br>`{evaluate}`", "<br>".join(published), "<br>".join(accepted),
    )  # fmt: skip


def reproduction_table(task: str, zoo: dict[str, Entry]) -> str:
    """Return the Markdown table of commands and results of a task."""
    columns = ("config", "GPUs x images", "train, then evaluate", "published", "reproduced")
    rows = (
        _reproduction_row(name, task, entry.config, entry)
        for name, entry in zoo.items()
        if entry.task == task and entry.config
    )
    return table(columns, rows)


class _Table(SphinxDirective):
    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        task, *families = self.arguments
        if task not in TASKS:
            raise self.error(f"the task must be one of {', '.join(TASKS)}, got {task!r}")
        if not {*families} <= {*PAPERS}:
            raise self.error(f"the family must be one of {', '.join(PAPERS)}, got {families[0]!r}")
        self.env.note_dependency(str(ZOO))
        zoo = {
            name: entry
            for name, entry in read_zoo().items()
            if entry.family in (families or PAPERS)
        }
        return self.parse_text_to_nodes(self.make(task, zoo))


class ZooTable(_Table):
    """List the released checkpoints of a task."""

    make = staticmethod(zoo_table)


class ReproductionTable(_Table):
    """List the commands and results of a task."""

    make = staticmethod(reproduction_table)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives with Sphinx."""
    app.add_directive("zoo-table", ZooTable)
    app.add_directive("reproduction-table", ReproductionTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
