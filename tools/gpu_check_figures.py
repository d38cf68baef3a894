"""Figures of benchmarks: measured, predicted for an NVIDIA H200, and how others compare."""

from collections.abc import Iterable, Iterator
from typing import Any

Figure = dict[str, Any]
PASSES = ("forward", "backward")


def figure(
    name: str, measured: float | None, predicted: float | None, unit: str, note: str = ""
) -> Figure:
    """Return a row of the table."""
    return {
        "name": name,
        "measured": measured,
        "predicted": predicted,
        "unit": unit,
        "note": note,
    }


def of_operators(results: list[dict]) -> Iterator[Figure]:
    """Yield the passes of the first implementation of each shape, compared with the others."""
    kinds = dict.fromkeys((r["shape"], r["dtype"], r["pass"]) for r in results)
    for kind in kinds:
        ours, *others = (r for r in results if (r["shape"], r["dtype"], r["pass"]) == kind)
        if kind[2] in PASSES:
            ratios = [f"{o['competitor']} {o['ratio']:.2f}x" for o in others if "ratio" in o]
            seconds, predicted = ours.get("seconds"), ours.get("predicted_seconds")
            yield figure(
                " ".join(kind), _micro(seconds), _micro(predicted), "us", ", ".join(ratios)
            )


def of_models(results: list[dict]) -> Iterator[Figure]:
    """Yield the throughput of each model."""
    for r in results:
        name = " ".join(r[key] for key in ("model", "task", "dtype", "mode"))
        measured, predicted = (r.get(f"{p}images_per_second") for p in ("", "predicted_"))
        yield figure(name, measured, predicted, "images/s", r.get("note") or "")


def of_tuning(results: list[dict]) -> Iterator[Figure]:
    """Yield the passes of each variant of the kernels."""
    for r in results:
        if r["pass"] in PASSES:
            name = f"{r['variant']}: {r['shape']} {r['dtype']} {r['pass']}"
            yield figure(name, _micro(r.get("seconds")), _micro(r["predicted_seconds"]), "us")


def of_others(results: list[dict]) -> Iterator[Figure]:
    """Yield results that are figures already."""
    for r in results:
        yield figure(r["name"], r["measured"], r["predicted"], r["unit"])


KINDS = {"op": of_operators, "model": of_models, "tune": of_tuning}


def figures(record: dict) -> list[Figure]:
    """Return the figures of a benchmark's record (see benchmarks.record)."""
    return list(KINDS.get(record["benchmark"], of_others)(record["results"]))


def table(rows: Iterable[Figure]) -> list[str]:
    """Return the lines of a table of figures."""
    lines = [f"{'figure':60}{'measured':>12}{'predicted':>12}{'ratio':>8}"]
    for row in rows:
        measured, predicted = row["measured"], row["predicted"]
        ratio = f"{measured / predicted:.2f}" if measured and predicted else ""
        numbers = "".join(f"{'-' if n is None else f'{n:.4g}':>12}" for n in (measured, predicted))
        line = f"{row['name']:60}{numbers}{ratio:>8} {row['unit']:9}{row['note']}"
        lines.append(line.rstrip())
    return lines


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else 1e6 * seconds
