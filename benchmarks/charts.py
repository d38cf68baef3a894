"""Draw the charts of benchmark results next to their JSON files.

python -m benchmarks.charts benchmarks/results/*.json
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.record import machine_name, write

PASSES = ("forward", "backward", "forward+backward")
FLOOR = "memory-bandwidth bound"


def make_panels(
    rows: Sequence, columns: Sequence, size: tuple[float, float]
) -> tuple[Figure, list[tuple]]:
    """Return a figure and its panels: row, column and axes of each."""
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharey=True)
    places = itertools.product(rows, columns)
    return figure, [(*place, axis) for place, axis in zip(places, axes.flat, strict=True)]


def draw_op(record: dict) -> Figure:
    """Draw a dot for each implementation: time relative to ours, the first of each shape."""
    settings, results = record["settings"], record["results"]
    ours: dict[str, str] = {}
    for result in results:
        ours.setdefault(result["shape"], result["competitor"])
    others = dict.fromkeys(r["competitor"] for r in results if r["competitor"] != ours[r["shape"]])
    tab20 = matplotlib.color_sequences["tab20"]
    colors = dict(zip(others, tab20[::2] + tab20[1::2], strict=False))

    size = 13, 1.9 + len(settings["dtypes"]) * (0.8 + 0.32 * len(ours))
    figure, panels = make_panels(settings["dtypes"], PASSES, size)
    for dtype, pass_name, axis in panels:
        for result in results:
            if (result["dtype"], result["pass"]) == (dtype, pass_name) and "ratio" in result:
                draw_result(axis, result, ours, colors)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}x")
        axis.set_yticks(range(len(ours)), list(ours))
        axis.set_ylim(len(ours) - 0.5, -0.5)
        axis.grid(alpha=0.3)
        axis.set_title(f"{pass_name.replace('+', ' + ')}, {dtype}", fontsize="medium")
    for axis in figure.axes[-len(PASSES) :]:
        axis.set_xlabel("relative time (this project = 1)")
    figure.suptitle(
        f"Time relative to {' and '.join(dict.fromkeys(ours.values()))} (lower is better)\n"
        f"{machine_name(record['machine'])}, {record['date'][:10]}"
    )
    drawn = {line.get_label(): line for axis in figure.axes for line in axis.lines[::-1]}
    labels = [label for label in (FLOOR, *others) if label in drawn]
    figure.legend(
        [drawn[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=5,
        frameon=False,
        title="hollow: baselines that compute something else; cross: wrong results",
    )
    return figure


def draw_result(axis: Axes, result: dict, ours: dict[str, str], colors: dict) -> None:
    """Draw the dot of an implementation, or the memory-bandwidth bound in place of ours."""
    row, name = list(ours).index(result["shape"]), result["competitor"]
    if name == ours[result["shape"]]:
        axis.plot(result["share_of_floor"], row, "|k", markersize=12, label=FLOOR)
        return
    marker = "X" if result["status"] == "wrong" else "o"
    fill = "full" if "share_of_floor" in result else "none"  # baselines have no bound
    axis.plot(result["ratio"], row, marker, color=colors[name], fillstyle=fill, label=name)


def draw_model(record: dict) -> Figure:
    """Draw bars of images per second, with a panel for each task, dtype and mode."""
    settings = record["settings"]
    models = settings["models"]
    kinds = list(itertools.product(settings["dtypes"], settings["modes"]))
    size = 2.5 + 3.5 * len(kinds), 0.8 + len(settings["tasks"]) * (0.7 + 0.35 * len(models))
    figure, panels = make_panels(settings["tasks"], kinds, size)
    for task, kind, axis in panels:
        speeds = {
            r["model"]: r.get("images_per_second", 0)
            for r in record["results"]
            if (r["task"], r["dtype"], r["mode"]) == (task, *kind)
        }
        colors = ["C1" if name.startswith("flash_internimage") else "C0" for name in models]
        bars = axis.barh(models, [speeds.get(name, 0) for name in models], color=colors)
        axis.bar_label(bars, fmt=lambda speed: f"{speed:.4g}" if speed else "-", padding=3)
        axis.margins(x=0.2)
        axis.set_title(f"{task}, {', '.join(kind)}", fontsize="medium")
    figure.axes[0].invert_yaxis()  # shared by all panels
    for axis in figure.axes[-len(kinds) :]:
        axis.set_xlabel("images per second")
    machine = machine_name(record["machine"])
    figure.suptitle(
        f"Throughput at batch size {settings['batch_size']} (higher is better)\n"
        f"{machine}, {record['date'][:10]}",
        fontsize="medium",
    )
    return figure


def relative_times(record: dict) -> Iterator[tuple[str, str, str, float]]:
    """Yield label, kind, series and relative time of each alternative in a comparison."""
    for result in record["results"]:
        if "ratio" not in result or result.get("competitor") == "DCNv4":
            continue
        if "competitor" in result:
            label, series = f"{result['competitor']}, {result['shape']}", result["dtype"]
            yield label, result["pass"], series, result["ratio"]
        else:
            mode = f", {result['mode']}" * (result["mode"] != "eager")
            yield result["other"], result["task"], result["dtype"] + mode, result["ratio"]


def draw_paper(record: dict) -> Figure:
    """Draw a dot for each alternative: time relative to the operator or model with DCNv4."""
    points = list(relative_times(record))
    labels = list(dict.fromkeys(label for label, *_ in points))
    series = list(dict.fromkeys(name for *_, name, _ in points))
    titles = {
        ("forward", "inference"): "inference (forward)",
        ("forward+backward", "training"): "training (forward + backward)",
    }
    figure, panels = make_panels([None], list(titles), (9, 2 + 0.32 * len(labels)))
    for _, kinds, axis in panels:
        for label, kind, name, ratio in points:
            if kind in kinds:
                row, color = labels.index(label), f"C{series.index(name)}"
                axis.plot(ratio, row, "o", color=color, label=name)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}x")
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.grid(alpha=0.3)
        axis.set_title(titles[kinds], fontsize="medium")
        axis.set_xlabel("relative time (with DCNv4 = 1)")
    figure.suptitle(
        "Time relative to DCNv4, and to the model with DCNv4 (above 1: DCNv4 is faster)\n"
        f"{machine_name(record['machine'])}, {record['date'][:10]}",
        fontsize="medium",
    )
    drawn = {line.get_label(): line for axis in figure.axes for line in axis.lines[::-1]}
    handles = [drawn[name] for name in series]
    figure.legend(handles, series, loc="outside lower center", ncols=5, frameon=False)
    return figure


def draw_accuracy(record: dict) -> Figure:
    """Draw a dot for each seed and a line at the mean: top-1 of each model."""
    results, settings = record["results"], record["settings"]
    names = list(dict.fromkeys(result["model"] for result in results))
    figure, [(_, _, axis)] = make_panels([None], [None], (8, 1.6 + 0.35 * len(names)))
    for row, name in enumerate(names):
        top1 = [result["top1"] for result in results if result["model"] == name]
        axis.plot(top1, [row] * len(top1), "o", color="C0", fillstyle="none")
        axis.plot(sum(top1) / len(top1), row, "|k", markersize=14)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(alpha=0.3)
    axis.set_xlabel("top-1 on the test images in % (one dot per seed, line: mean)")
    figure.suptitle(
        f"Fashion-MNIST: {settings['epochs']} epochs of {settings['train_images']:,} images\n"
        f"{machine_name(record['machine'])}, {record['date'][:10]}",
        fontsize="medium",
    )
    return figure


DRAW = {"op": draw_op, "model": draw_model, "paper": draw_paper, "accuracy": draw_accuracy}


def draw(file: Path) -> Path:
    """Draw the chart of a JSON file next to it; return its path."""
    record = json.loads(file.read_text())
    chart = file.with_suffix(".png")
    DRAW[record["benchmark"]](record).savefig(chart)
    return chart


def main(argv: list[str] | None = None) -> None:
    """Draw the charts of the files on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.charts", description=__doc__.splitlines()[0]
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON files of results")
    for file in parser.parse_args(argv).files:
        write(draw(file))


if __name__ == "__main__":
    main()
