"""Directives that write tables from the rows of configs/zoo.yaml.

``zoo-table`` lists the released checkpoints of a task, ``reproduction-table`` how to train and
evaluate each of them and which figures count as reproduced.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from tools.zoo import TOLERANCE
from tools.zoo_entries import ROOT, ZOO, Entry, read_zoo

TASKS = ("classification", "detection", "segmentation")
_FIGURES = {
    "top1": "top-1",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
    "miou": "mIoU",
    "miou_several_scales": "mIoU, multi-scale",
}
_DATA = {
    "classification": "/path/to/imagenet",
    "detection": "data/coco",
    "segmentation": "data/ade/ADEChallengeData2016",
}
_EMPTY = "\N{EN DASH}"


def _table(columns: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _config(entry: Entry) -> str:
    return f"[{Path(entry.config).name}](/../{entry.config})" if entry.config else _EMPTY


def _checkpoint(entry: Entry) -> str:
    return f"[{entry.addresses[0].rpartition('/')[2]}]({entry.addresses[0]})"


def _zoo_row(name: str, entry: Entry) -> tuple:
    figures = (entry.published.known().get(figure, _EMPTY) for figure in _columns(entry.task))
    size = f"{entry.parameters / 1e6:.1f} M"
    macs = (f"{entry.gmacs:.1f} G",) if entry.task == "classification" else ()
    file = _checkpoint(entry)
    return f"`{name}`", entry.pretraining, entry.resolution, size, *macs, *figures, file


def _columns(task: str) -> list[str]:
    known = {
        "classification": ["top1"],
        "detection": ["box_ap", "mask_ap"],
        "segmentation": ["miou", "miou_several_scales"],
    }
    return known[task]


def zoo_table(task: str, zoo: dict[str, Entry]) -> str:
    """Return the Markdown table of the released checkpoints of a task."""
    macs = ("MACs",) if task == "classification" else ()
    figures = tuple(_FIGURES[figure] for figure in _columns(task))
    columns = ("name", "pretraining", "resolution", "parameters", *macs, *figures, "file")
    rows = [_zoo_row(name, entry) for name, entry in zoo.items() if entry.task == task]
    return _table(columns, rows)


def _processes(entry: Entry) -> tuple[int, int]:
    """Return the number of GPUs and the images per GPU that the config's first line states."""
    if entry.task == "classification":
        return 8, 128
    found = re.search(r"^# (\d+) GPUs x (\d+) images", (ROOT / entry.config).read_text(), re.M)
    if not found:
        raise ValueError(f"{entry.config} must state its GPUs and images per GPU")
    return int(found[1]), int(found[2])


def _training_command(entry: Entry) -> str:
    gpus, _ = _processes(entry)
    nodes_ = f"--nnodes {gpus // 8} " if gpus > 8 else ""
    data = f" data.root={_DATA[entry.task]}" if entry.task == "classification" else ""
    return f"torchrun {nodes_}--nproc-per-node 8 -m {entry.task}.train {entry.config}{data}"


def _evaluation_command(name: str, entry: Entry) -> str:
    return f"python -m tools.zoo evaluate {name} --data {_DATA[entry.task]}"


def _reproduction_row(name: str, entry: Entry) -> tuple:
    figures = entry.published.known()
    published = "<br>".join(f"{_FIGURES[figure]} {value}" for figure, value in figures.items())
    accepted = "<br>".join(
        f"{value - TOLERANCE:.1f} to {value + TOLERANCE:.1f}" for value in figures.values()
    )
    commands = f"`{_training_command(entry)}`<br>`{_evaluation_command(name, entry)}`"
    gpus, images = _processes(entry)
    return _config(entry), f"{gpus} x {images}", commands, published, accepted


def reproduction_table(task: str, zoo: dict[str, Entry]) -> str:
    """Return the Markdown table of commands and figures of a task."""
    columns = ("config", "GPUs x images", "train, then evaluate", "published", "reproduced")
    rows = [
        _reproduction_row(name, entry)
        for name, entry in zoo.items()
        if entry.task == task and entry.config
    ]
    return _table(columns, rows)


class _Table(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        (task,) = self.arguments
        if task not in TASKS:
            raise self.error(f"the task must be one of {', '.join(TASKS)}, got {task!r}")
        self.env.note_dependency(str(ZOO))
        return self.parse_text_to_nodes(self.make(task, read_zoo()))


class ZooTable(_Table):
    """List the released checkpoints of a task."""

    make = staticmethod(zoo_table)


class ReproductionTable(_Table):
    """List the commands and figures of a task."""

    make = staticmethod(reproduction_table)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives with Sphinx."""
    app.add_directive("zoo-table", ZooTable)
    app.add_directive("reproduction-table", ReproductionTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
