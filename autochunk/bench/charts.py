"""Charts: memory and time over a size, the Pareto curve, and breaking points, as PNG files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from autochunk.bench.cases import Case, Variant
from autochunk.bench.drawing import Bar, Line, draw_bars, draw_lines, draw_marks
from autochunk.bench.memory import MIB
from autochunk.bench.methods import METHODS
from autochunk.bench.results import BreakingPoint, Results
from autochunk.bench.summary import Summary, point_ratios, summarize

#: Okabe and Ito's colours, which colour-blind people can tell apart; ours is the blue one.
_COLOURS = {
    "eager": "#7f7f7f",
    "inductor": "#000000",
    "auto_chunker": "#D55E00",
    "linear_cross_entropy": "#CC79A7",
    "liger": "#009E73",
    "cce": "#E69F00",
    "quack": "#B8A800",
    "checkpoint": "#8C564B",
    "autochunk": "#0072B2",
    "chunked_linear": "#56B4E9",
}
_DIMENSIONS = {"vocabulary": "vocabulary (words)", "tokens": "tokens", "hidden": "hidden size"}
_STYLES = ("-", "--", ":", "-.")


def write_charts(results: Results, directory: Path, pareto: bool) -> list[Path]:
    """Writes what can be drawn; returns the files.

    A size that takes several values is an x axis: one chart of memory and one of time for each
    combination of the others. Cases with one value each become bars.
    """
    import matplotlib

    matplotlib.use("Agg")
    written: list[Path] = []
    summaries = {case: summarize(results.of(case)) for case in results.cases()}
    for name, dimension, cases in _groups(list(summaries)):
        own = [summaries[case] for case in cases]
        for kind, label, value in _KINDS:
            if any(value(s) is not None for rows in own for s in rows):
                written.append(directory / f"{kind}_{name}.png")
                if dimension is None:
                    _bars(written[-1], cases[0], label, own[0], value)
                else:
                    _lines(written[-1], cases, dimension, label, own, value)
    for case, rows in summaries.items() if pareto else ():
        full = [s for s in rows if s.median_seconds is not None and s.additional_bytes]
        if len(full) > 1:
            written.append(directory / f"pareto_{_slug(case)}.png")
            _pareto(written[-1], case, full)
    if any(point.found and point.found.largest for point in results.points):
        written.append(directory / f"breaking_point_{results.points[0].dimension}.png")
        _points(written[-1], results.points)
    return written


def _memory(summary: Summary) -> float | None:
    return summary.additional_bytes / MIB if summary.additional_bytes else None


def _time(summary: Summary) -> float | None:
    return summary.time_ratio


def _floor(summary: Summary) -> float | None:
    return summary.floor_ratio


_KINDS: tuple[tuple[str, str, Callable[[Summary], float | None]], ...] = (
    ("memory", "peak memory of a step above its inputs (MiB)", _memory),
    ("time", "time of a step ÷ fastest unchunked method", _time),
    ("floor", "time of a step ÷ its bare matrix products", _floor),
)


def _groups(cases: Sequence[Case]) -> list[tuple[str, str | None, list[Case]]]:
    """(name, x axis, cases in its order); without an x axis for a case that varies in nothing."""
    found: list[tuple[str, str | None, list[Case]]] = []
    alone = dict.fromkeys(cases)
    for dimension in _DIMENSIONS:
        series: dict[Case, list[Case]] = {}
        for case in cases:
            series.setdefault(_without(case, dimension), []).append(case)
        for key, members in series.items():
            if len(members) > 1:
                members.sort(key=lambda case: getattr(case, dimension))
                found.append((f"by_{dimension}_{_slug(key)}", dimension, members))
                for case in members:
                    alone.pop(case, None)
    return found + [(_slug(case), None, [case]) for case in alone]


def _slug(case: Case) -> str:
    sizes = [case.tokens, case.hidden, case.vocabulary]
    kept = "x".join(str(size) for size in sizes if size)
    name = f"{case.name}_" if case.name else ""
    whole = "model_" if case.layers else ""
    return f"{name}{whole}{kept}_{case.dtype}_{case.loss}".replace(" ", "_")


def _without(case: Case, dimension: str) -> Case:
    zero = {
        "vocabulary": dataclasses.replace(case, vocabulary=0),
        "tokens": dataclasses.replace(case, tokens=0),
        "hidden": dataclasses.replace(case, hidden=0),
    }
    return zero[dimension]


def _lines(
    path: Path,
    cases: Sequence[Case],
    dimension: str,
    label: str,
    summaries: Sequence[Sequence[Summary]],
    value: Callable[[Summary], float | None],
) -> None:
    lines = []
    styles = _line_styles(summaries[0])
    for at, first in enumerate(summaries[0]):
        name = str(first.row.variant)
        points = [
            (float(getattr(case, dimension)), found)
            for case, rows in zip(cases, summaries, strict=True)
            if (found := value(rows[at])) is not None
        ]
        if points:
            lines.append(Line(name, points, _colour(first.row.variant), styles[name]))
    level = None if value is _memory else 1.0
    draw_lines(path, _title(cases[0], dimension), (_DIMENSIONS[dimension], label), lines, level)


def _bars(
    path: Path,
    case: Case,
    label: str,
    summaries: Sequence[Summary],
    value: Callable[[Summary], float | None],
) -> None:
    bars = [
        Bar(str(s.row.variant), found, _colour(s.row.variant), f"{found:.4g}")
        for s in summaries
        if (found := value(s)) is not None
    ]
    draw_bars(path, case.title, label, bars)


def _pareto(path: Path, case: Case, summaries: Sequence[Summary]) -> None:
    """Time and memory of each method; those that no other one beats are joined."""
    marks = []
    relative = all(summary.time_ratio is not None for summary in summaries)
    for summary in summaries:
        assert summary.median_seconds is not None
        assert summary.additional_bytes is not None
        time = summary.time_ratio if relative else summary.median_seconds * 1e3
        assert time is not None
        point = (time, summary.additional_bytes / MIB)
        name = re.sub(r"^autochunk:chunk_rows=(\d+)$", r"\1 rows", str(summary.row.variant))
        colour = _colour(summary.row.variant)
        marks.append(Line(name, [point], colour, filled=not summary.dominated_by))
    curve = sorted(mark.points[0] for mark in marks if mark.filled)
    below = _KINDS[1][1] if relative else "time of a step (ms)"
    below += "; hollow: another is as good in both and better in one"
    draw_marks(path, case.title, (below, _KINDS[0][1]), marks, curve)


def _points(path: Path, points: Sequence[BreakingPoint]) -> None:
    first = points[0]
    limit = "all memory" if first.limit_bytes is None else f"{first.limit_bytes / MIB:g} MiB"
    several = len({point.case for point in points}) > 1
    bars = []
    for point, ratio in zip(points, point_ratios(points), strict=True):
        if point.found is not None and point.found.largest:
            largest = point.found.largest
            text = f"{largest}" + (f" ({ratio:.2f} × inductor)" if ratio else "")
            name = f"{point.variant}, {_slug(point.case)}" if several else str(point.variant)
            bars.append(Bar(name, largest, _colour(point.variant), text))
    title = f"{_title(first.case, first.dimension)}, limit {limit}"
    draw_bars(path, title, f"largest {_DIMENSIONS[first.dimension]}", bars)


def _title(case: Case, dimension: str) -> str:
    sizes = {
        "tokens": f"{case.tokens} tokens",
        "hidden": f"{case.hidden} hidden",
        "vocabulary": f"{case.vocabulary} words",
    }
    kept = " × ".join(text for name, text in sizes.items() if name != dimension)
    return f"{kept}, {case.dtype}, {case.loss}, {case.device}"


def _colour(variant: Variant) -> str:
    return _COLOURS.get(variant.method, "#444444")


def _line_styles(summaries: Sequence[Summary]) -> dict[str, str]:
    """Variants of one method share its colour and differ in style."""
    found: dict[str, str] = {}
    for name in METHODS:
        own = [str(s.row.variant) for s in summaries if s.row.variant.method == name]
        found.update({text: _STYLES[i % len(_STYLES)] for i, text in enumerate(own)})
    return found
