"""Summaries: what a table or a chart says about the raw results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from autochunk.bench.methods import METHODS
from autochunk.bench.results import BreakingPoint, Row


@dataclass(frozen=True)
class Summary:
    """A row in figures; None where something was not measured.

    Attributes:
        row: The raw row.
        median_seconds, least_seconds, most_seconds: Of its timed steps.
        time_ratio: Median over the rounds of its time to that of the baseline in the same round.
        floor_ratio: The same, to the bare matrix products.
        additional_bytes, total_bytes: Highest peaks.
        memory_ratio: Of the additional peak to the baseline's.
        is_baseline: Whether it is the fastest unchunked method of its case.
        dominated_by: A row of the case that is as good in time and memory and better in one.
    """

    row: Row
    median_seconds: float | None
    least_seconds: float | None
    most_seconds: float | None
    time_ratio: float | None
    floor_ratio: float | None
    additional_bytes: int | None
    total_bytes: int | None
    memory_ratio: float | None
    is_baseline: bool
    dominated_by: str = ""


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """The rows of one case in figures, in the same order."""
    unchunked = [row for row in rows if row.seconds and METHODS[row.variant.method].unchunked]
    baseline = min(unchunked, key=lambda row: statistics.median(row.seconds), default=None)
    base_bytes = max(baseline.additional_bytes, default=0) if baseline else 0
    dominators = _dominators(rows, baseline)
    found = []
    for row in rows:
        additional = max(row.additional_bytes, default=None)
        found.append(
            Summary(
                row=row,
                median_seconds=statistics.median(row.seconds) if row.seconds else None,
                least_seconds=min(row.seconds, default=None),
                most_seconds=max(row.seconds, default=None),
                time_ratio=ratio(row.seconds, baseline.seconds) if baseline else None,
                floor_ratio=ratio(row.seconds, row.floor_seconds),
                additional_bytes=additional,
                total_bytes=max(row.total_bytes, default=None),
                memory_ratio=additional / base_bytes if additional and base_bytes else None,
                is_baseline=row is baseline,
                dominated_by=dominators.get(str(row.variant), ""),
            )
        )
    return found


def ratio(seconds: Sequence[float], base: Sequence[float | None]) -> float | None:
    """Median of the ratios of two methods' times, round by round."""
    found = [own / other for own, other in zip(seconds, base, strict=False) if other]
    return statistics.median(found) if found else None


def dominated(points: Sequence[tuple[float, float]]) -> list[int | None]:
    """For each point (time, memory) one that is as good in both and better in one, or None.

    The points that have none are the Pareto curve: to be better in one of the two costs something
    of the other.
    """
    found: list[int | None] = []
    for own in points:
        better = (
            i
            for i, other in enumerate(points)
            if other[0] <= own[0] and other[1] <= own[1] and other != own
        )
        found.append(next(better, None))
    return found


def _dominators(rows: Sequence[Row], baseline: Row | None) -> dict[str, str]:
    full = [row for row in rows if row.seconds and row.additional_bytes]
    # Times to one of them, round by round: a load that comes and goes decides nothing.
    base = baseline or next(iter(full), None)
    points = [
        (ratio(row.seconds, base.seconds) or 0.0, float(max(row.additional_bytes)))
        for row in full
        if base is not None
    ]
    return {
        str(row.variant): str(full[by].variant)
        for row, by in zip(full, dominated(points), strict=True)
        if by is not None
    }


def point_ratios(points: Sequence[BreakingPoint]) -> list[float | None]:
    """Of each breaking point to Inductor's for the same case."""
    found: list[float | None] = []
    for point in points:
        base = next(
            (
                other.found.largest
                for other in points
                if other.found and other.case == point.case and str(other.variant) == "inductor"
            ),
            0,
        )
        found.append(point.found.largest / base if point.found and base else None)
    return found
