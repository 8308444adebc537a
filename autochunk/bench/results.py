"""Results: what was measured, kept as it comes in, and written as JSON after each step."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autochunk.bench.cases import Case, Variant
from autochunk.bench.search import Found

#: Number of the JSON file's layout.
SCHEMA = 1
LATE = "the time limit was reached"


@dataclass(frozen=True)
class Row:
    """What a variant did with a case.

    Attributes:
        case: What was measured.
        variant: With what.
        status: ``pending``, ``measured``, ``unavailable``, ``failed``, ``interrupted`` or
            ``not run``.
        reason: Of the last four, in a few words.
        seconds: Of each timed step, by round.
        floor_seconds: Of the bare matrix products in the same rounds (None where not known).
        additional_bytes: Peak of each step above what was held before it.
        total_bytes: The same including it.
        own_process: Whether these peaks are of a process that ran no other method.
        loss: Of the last warm-up step.
        errors: Relative distance from float64 of ``loss``, ``dx`` and ``dw``; may be empty.
        first_seconds: Of the first step, which compiles (or finds a compiled graph in a cache).
        note: What the method said about what it did.
    """

    case: Case
    variant: Variant
    status: str = "pending"
    reason: str = ""
    seconds: tuple[float, ...] = ()
    floor_seconds: tuple[float | None, ...] = ()
    additional_bytes: tuple[int, ...] = ()
    total_bytes: tuple[int, ...] = ()
    own_process: bool = True
    loss: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    first_seconds: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a dict of JSON's types."""
        data = dataclasses.asdict(self)
        return {**data, "case": data["case"], "variant": str(self.variant)}


@dataclass(frozen=True)
class BreakingPoint:
    """The largest size of a case that a method could do.

    Attributes:
        case: With the searched size left at 0.
        variant: The method.
        dimension: ``vocabulary`` or ``tokens``.
        limit_bytes: Memory a step may take; None for all that a CUDA device has.
        granularity: To within which the point was searched.
        found: What the search found; None if the method is unavailable or was not run.
        reason: Why there is none.
    """

    case: Case
    variant: Variant
    dimension: str
    limit_bytes: int | None
    granularity: int
    found: Found | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a dict of JSON's types."""
        return {**dataclasses.asdict(self), "variant": str(self.variant)}


class Results:
    """Everything measured so far.

    Attributes:
        about: Hardware, versions, command line and settings.
        rows: By case and variant, in the order of the table.
        points: Breaking points.
        path: The JSON file, or None.
    """

    def __init__(self, about: dict[str, Any], path: Path | None) -> None:
        self.about = about
        self.rows: dict[tuple[Case, Variant], Row] = {}
        self.points: list[BreakingPoint] = []
        self.path = path
        self.saved = 0.0

    def add(self, case: Case, variant: Variant, reason: str = "") -> None:
        """A row for a variant, unavailable if there is a reason."""
        status = "unavailable" if reason else "pending"
        self.rows[case, variant] = Row(case, variant, status, reason)

    def change(self, case: Case, variant: Variant, **changes: Any) -> None:
        """Replaces fields of a row."""
        key = (case, variant)
        self.rows[key] = dataclasses.replace(self.rows[key], **changes)

    def append(self, case: Case, variant: Variant, **values: Any) -> None:
        """Adds one value to each of these fields of a row."""
        row = self.rows[case, variant]
        self.change(case, variant, **{k: (*getattr(row, k), v) for k, v in values.items()})

    def pending(self, case: Case) -> tuple[Variant, ...]:
        """Variants of a case that have neither failed nor finished."""
        return tuple(row.variant for row in self.of(case) if row.status == "pending")

    def of(self, case: Case) -> list[Row]:
        """Rows of a case."""
        return [row for row in self.rows.values() if row.case == case]

    def cases(self) -> list[Case]:
        """Cases in order."""
        return list(dict.fromkeys(case for case, _ in self.rows))

    def finish(self, case: Case, timed: bool) -> None:
        """Calls a case's pending rows measured, unless they should be timed and are not."""
        for variant in self.pending(case):
            if timed and not self.rows[case, variant].seconds:
                self.change(case, variant, status="not run", reason=LATE)
            else:
                self.change(case, variant, status="measured")

    def interrupt(self) -> None:
        """Says of all that is still pending that it was not finished."""
        for case, variant in list(self.rows):
            row = self.rows[case, variant]
            if row.status == "pending" and row.loss is None:
                self.change(case, variant, status="not run", reason="interrupted")
            elif row.status == "pending":
                self.change(case, variant, status="interrupted", reason="not all steps were done")

    def save_soon(self) -> None:
        """As ``save``, but not more than once in two seconds."""
        if time.monotonic() - self.saved > 2:
            self.save()

    def save(self, finished: bool = False) -> None:
        """Writes the JSON file; an interrupted write leaves the previous one."""
        if self.path is None:
            return
        self.saved = time.monotonic()
        data = {
            "schema": SCHEMA,
            "finished": finished,
            **self.about,
            "rows": [row.to_json() for row in self.rows.values()],
            "breaking_points": [point.to_json() for point in self.points],
        }
        temporary = self.path.with_name(self.path.name + ".partial")
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(temporary, self.path)
