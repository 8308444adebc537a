"""Drawing: lines, points and bars with their names next to them, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Beyond this ratio of the largest to the smallest value a linear axis would hide the small ones.
_LOGARITHMIC = 8.0


@dataclass(frozen=True)
class Line:
    """A series, or with one point and no ``style`` a mark.

    Attributes:
        name: Written next to it.
        points: (x, y).
        colour: Of line and name.
        style: As matplotlib's, ``-`` or ``--``.
        filled: Whether a mark is filled.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    style: str = "-"
    filled: bool = True


@dataclass(frozen=True)
class Bar:
    """A bar with its name and what is written at its end."""

    name: str
    value: float
    colour: str
    text: str


def draw_lines(
    path: Path, title: str, labels: tuple[str, str], lines: Sequence[Line], level: float | None
) -> None:
    """Lines over an x axis, named at their right end; ``level`` is a line to compare with."""
    figure, axes = _figure(title, (8.5, 5))
    for line in lines:
        xs, ys = zip(*line.points, strict=True)
        axes.plot(xs, ys, line.style, color=line.colour, marker="o", markersize=4)
    if level is not None:
        axes.axhline(level, color="#999999", linewidth=1, zorder=0)
    values = [y for line in lines for _, y in line.points]
    if max(values) > _LOGARITHMIC * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: "")
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}".replace(",", " "))
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    _name_ends(axes, lines)
    _save(figure, path)


def _name_ends(axes: Any, lines: Sequence[Line]) -> None:
    """Names to the right of the axes, moved apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    lowest = float("-inf")
    for line in sorted(lines, key=lambda line: line.points[-1][1]):
        height = to_axes.transform(line.points[-1])[1]
        lowest = max(height, lowest + 0.05)
        axes.annotate(
            line.name,
            xy=line.points[-1],
            xytext=(1.03, lowest),
            textcoords="axes fraction",
            color=line.colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.colour, "alpha": 0.4},
        )


def draw_marks(
    path: Path,
    title: str,
    labels: tuple[str, str],
    marks: Sequence[Line],
    curve: Sequence[tuple[float, float]],
) -> None:
    """Named marks, and a curve through some of them."""
    figure, axes = _figure(title, (8.5, 5.5))
    for mark in marks:
        face = mark.colour if mark.filled else "none"
        axes.scatter(*mark.points[0], color=face, edgecolors=mark.colour, zorder=3)
    axes.plot(*zip(*curve, strict=True), color="#bbbbbb", linewidth=1, zorder=1)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.margins(0.15)
    for n, (axis, name) in enumerate([(axes.xaxis, "x"), (axes.yaxis, "y")]):
        values = [mark.points[0][n] for mark in marks]
        if max(values) > _LOGARITHMIC / 2 * min(values):
            axes.set(**{f"{name}scale": "log"})
            axis.set_major_locator(_ticker().LogLocator(subs=(1, 2, 5)))
            axis.set_minor_formatter(_ticker().NullFormatter())
        else:
            axes.set(**{f"{name}lim": (0, None)})
        axis.set_major_formatter(lambda value, _: f"{value:,.5g}".replace(",", " "))
    _name_marks(figure, axes, marks)
    _save(figure, path)


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def _name_marks(figure: Any, axes: Any, marks: Sequence[Line]) -> None:
    """Names next to marks, each at the nearest place where it covers nothing."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    inside = axes.bbox
    points = [axes.transData.transform(mark.points[0]) for mark in marks]
    offsets = [(x, y * sign) for y in range(0, 120, 6) for x in (7, -7) for sign in (1, -1)]
    taken: list[Any] = []
    for mark in marks:
        text = axes.annotate(
            mark.name,
            mark.points[0],
            xytext=offsets[0],
            textcoords="offset points",
            color=mark.colour,
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": mark.colour, "alpha": 0.4},
        )
        for offset in offsets:
            text.xyann = offset
            text.set_ha("left" if offset[0] > 0 else "right")
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the line to the mark
            covers = any(box.overlaps(other) for other in taken) or any(
                box.padded(6).contains(*point) for point in points
            )
            if not covers and box.x0 > inside.x0 and inside.y0 < box.y0 < box.y1 < inside.y1:
                break
        taken.append(box)


def draw_bars(path: Path, title: str, label: str, bars: Sequence[Bar]) -> None:
    """Horizontal bars, the first one on top."""
    figure, axes = _figure(title, (8.5, 1.6 + 0.42 * len(bars)))
    positions = range(len(bars))
    colours = [bar.colour for bar in bars]
    axes.barh(positions, [bar.value for bar in bars], color=colours, height=0.65)
    axes.set_yticks(positions, [bar.name for bar in bars])
    axes.invert_yaxis()
    for position, bar in enumerate(bars):
        axes.annotate(
            bar.text,
            (bar.value, position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.margins(x=0.25)
    axes.set_xlabel(label)
    _save(figure, path)


def _figure(title: str, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
