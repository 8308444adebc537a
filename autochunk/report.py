"""Report: what became of each candidate, for ``explain``, the debug flag and the log."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from autochunk.types import REFUSAL_CODES, Refusal

logger = logging.getLogger("autochunk")


@dataclass(frozen=True)
class Row:
    """One candidate.

    Attributes:
        head: Name of its node.
        source: The user's line.
        shape: Rows × features and dtype of its logits.
        found: The ops it goes through.
        strategy: ``fused``, ``recompute`` or ``forward``; empty if refused.
        chunks: Number of chunks × rows of each.
        logits_bytes: Bytes of the logits.
        chunk_bytes: Bytes of one chunk's logits and gradient, estimated.
        refusal: Why it was left alone, or None.
        notes: Anything else a user should know.
    """

    head: str
    source: str
    shape: str
    found: str
    strategy: str = ""
    chunks: str = ""
    logits_bytes: int = 0
    chunk_bytes: int = 0
    refusal: Refusal | None = None
    notes: tuple[str, ...] = ()

    @property
    def avoided_bytes(self) -> int:
        """Bytes of the logits, if they never exist whole: one chunk of all rows is the logits."""
        return self.logits_bytes if self.chunk_bytes < self.logits_bytes else 0


@dataclass(frozen=True)
class Report:
    """All candidates of one compiled graph.

    Attributes:
        graph: Number of the graph in this process.
        rows: One per candidate.
        failure: Why the whole rewrite was given up, if it was.
        directory: Where the debug graphs are, if they were written.
    """

    graph: int
    rows: tuple[Row, ...]
    failure: str = ""
    directory: str = ""

    @property
    def chunked(self) -> tuple[Row, ...]:
        """Candidates that run in chunks."""
        return tuple(row for row in self.rows if row.refusal is None)

    @property
    def refused(self) -> tuple[Row, ...]:
        """Candidates that were left alone."""
        return tuple(row for row in self.rows if row.refusal is not None)

    def __str__(self) -> str:
        lines = [f"autochunk, graph {self.graph}: {_summary(self)}"]
        if self.chunked:
            table = [
                [
                    row.source or row.head,
                    row.shape,
                    row.found,
                    row.strategy,
                    row.chunks,
                    mebibytes(row.avoided_bytes),
                    mebibytes(row.chunk_bytes),
                ]
                for row in self.chunked
            ]
            headers = ["head", "logits", "found", "strategy", "chunks", "avoided", "per chunk"]
            lines.append(tabulate(table, headers, maxcolwidths=[44, 18, 40, 24, 12, 10, 10]))
            for row in self.chunked:
                lines.extend(f"note on {row.head}: {note}" for note in row.notes)
        if self.refused:
            grouped: dict[tuple[str, ...], int] = {}
            for row in self.refused:
                assert row.refusal is not None
                r = row.refusal
                key = (row.source or row.head, row.shape, r.code, r.op, r.detail, r.source)
                grouped[key] = grouped.get(key, 0) + 1
            table = [
                [
                    head + (f"  (×{count})" if count > 1 else ""),
                    shape,
                    code,
                    op,
                    detail + (f"\nat {source}" if source and source != head else ""),
                ]
                for (head, shape, code, op, detail, source), count in grouped.items()
            ]
            headers = ["left alone", "logits", "reason", "op", "detail"]
            lines.append(tabulate(table, headers, maxcolwidths=[44, 18, 16, 20, 60]))
            for code in dict.fromkeys(key[2] for key in grouped):
                lines.append(f"{code}: {REFUSAL_CODES[code]}")
        if self.failure:
            lines.append(
                f"The rewrite was given up; the graph runs as plain Inductor: {self.failure}"
            )
        if self.directory:
            lines.append(f"graphs of each stage: {self.directory}")
        return "\n".join(lines)


_collectors: list[list[Report]] = []
_graphs = 0


@contextlib.contextmanager
def collect() -> Iterator[list[Report]]:
    """A list that receives the reports of the graphs compiled inside the block."""
    reports: list[Report] = []
    _collectors.append(reports)
    try:
        yield reports
    finally:
        _collectors.remove(reports)


def next_graph() -> int:
    """A number for a graph."""
    global _graphs
    _graphs += 1
    return _graphs - 1


def publish(report: Report, debug: bool) -> None:
    """Hands a report to active collectors and to the log."""
    for collector in _collectors:
        collector.append(report)
    logger.log(logging.WARNING if debug else logging.INFO, "%s", report)


def write_debug(directory: str, graph: int, stages: Sequence[tuple[str, str]]) -> str:
    """Writes one file per stage; returns the directory."""
    path = Path(directory) / f"graph{graph}_pid{os.getpid()}"
    path.mkdir(parents=True, exist_ok=True)
    for i, (name, text) in enumerate(stages):
        (path / f"{i}_{name}.txt").write_text(text)
    return str(path)


def mebibytes(number: int) -> str:
    """``"12.5 MiB"``."""
    return f"{number / 2**20:.1f} MiB"


def _summary(report: Report) -> str:
    n = len(report.rows)
    if not n:
        return "no linear in it is wide enough to be a head"
    return (
        f"{n} head{'s' * (n > 1)}, {len(report.chunked)} chunked, {len(report.refused)} left alone"
    )
