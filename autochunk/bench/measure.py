"""Measuring: which child processes run, in which order, and what becomes of their events.

**Peaks and times are taken in different processes.** The peak of a process tells something about a
method only if nothing else has run in it: another method's cached buffers, fragments of the heap,
or a library's workspace would count as well. So each method has a process of its own for its peak.
Times of two processes are not comparable where the machine's load or clock changes between them.
So all methods of a case share one process for times, in which they take turns, round by round, and
ratios are taken within a round before their median is.

A suite with a time limit takes the peaks in the shared process as well (``Row.own_process`` says
so). On CUDA that loses little: the allocator counts the live bytes of tensors, not pages.

A child process that dies takes nothing along but the method it was busy with: what has been heard
is kept, and another process goes on with the rest.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autochunk.bench.cases import Case, Job, Variant
from autochunk.bench.memory import PEAK_ENVIRONMENT
from autochunk.bench.methods import why_not
from autochunk.bench.processes import End, run_child
from autochunk.bench.progress import Progress
from autochunk.bench.results import LATE, Results

#: Float64 gradients are computed where they and what they are computed from fit into this.
REFERENCE_BYTES = 2**31
#: What was begun before the time limit may go on for so long.
_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        repeats: Timed steps of each method; 0 for none.
        warmup: Untimed steps before them.
        peaks: Steps whose peak is taken; 0 for none.
        accuracy: Whether loss and gradients are compared with float64 (where that fits).
        timeout_seconds: A child process silent for so long is ended.
        shared: Whether peaks are taken in the process that takes the times.
        deadline: Time (as ``time.time``) after which nothing new is begun, or None.
    """

    repeats: int = 5
    warmup: int = 2
    peaks: int = 2
    accuracy: bool = True
    timeout_seconds: float = 600.0
    shared: bool = False
    deadline: float | None = None

    @property
    def until(self) -> float | None:
        """Time at which what is still running is ended."""
        return None if self.deadline is None else self.deadline + _GRACE_SECONDS

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.time() > self.deadline


def measure(
    work: Sequence[tuple[Case, Sequence[Variant]]],
    plan: Plan,
    results: Results,
    progress: Progress,
) -> None:
    """Measures each case with its variants; what cannot be measured is a row that says why."""
    cases = [case for case, _ in work]
    for case, variants in work:
        for variant in variants:
            reason = why_not(variant.method, case.loss, case.device, bool(case.layers))
            results.add(case, variant, reason)
    count = sum(len(results.pending(case)) for case in cases)
    processes = 1 if plan.shared else int(bool(plan.peaks)) + int(bool(plan.repeats))
    progress.expect(count * (processes + plan.repeats))
    results.save()
    if plan.shared:
        jobs = [
            Job(case, results.pending(case), plan.warmup, plan.repeats, plan.peaks)
            for case in cases
        ]
        _run(jobs, plan, results, progress, {})
    for case in cases:
        if not plan.shared:
            _measure_case(case, plan, results, progress)
        results.finish(case, bool(plan.repeats))
    results.save()


def _measure_case(case: Case, plan: Plan, results: Results, progress: Progress) -> None:
    with tempfile.TemporaryDirectory() as directory:
        reference = _reference(case, plan, results, Path(directory)) if plan.accuracy else ""
        if plan.peaks or reference:
            for variant in results.pending(case):
                job = Job(case, (variant,), plan.warmup, peaks=plan.peaks, reference=reference)
                _run([job], plan, results, progress, PEAK_ENVIRONMENT)
    if plan.repeats:
        job = Job(case, results.pending(case), plan.warmup, plan.repeats)
        _run([job], plan, results, progress, {})


def _reference(case: Case, plan: Plan, results: Results, directory: Path) -> str:
    """Name of a file with float64 loss and gradients; empty where there are none."""
    values = 4 * case.vocabulary * case.hidden + 2 * case.tokens * case.hidden
    if case.layers or 8 * values > REFERENCE_BYTES or not results.pending(case):
        return ""
    path = str(directory / "reference.pt")
    order = {
        "task": "reference",
        "device": case.device,
        "case": dataclasses.asdict(case),
        "path": path,
    }
    end = run_child(order, lambda event: None, plan.timeout_seconds, {})
    if end.complete:
        return path
    for variant in results.pending(case):
        results.change(case, variant, note=f"no float64 reference: {end.reason}")
    return ""


class _Listener:
    """Puts the events of one child process into the results."""

    def __init__(self, jobs: Sequence[Job], results: Results, progress: Progress) -> None:
        self.jobs, self.results, self.progress = jobs, results, progress
        self.number = 0
        self.busy: Variant | None = None

    @property
    def job(self) -> Job:
        return self.jobs[self.number]

    def hear(self, event: dict[str, Any]) -> None:
        kind, case = event.pop("event"), self.job.case
        if kind == "hardware":
            self.results.about["hardware"] = event
        elif kind == "job":
            for done in self.jobs[self.number : event["number"]]:
                if done.repeats:
                    self.results.finish(done.case, timed=True)
            self.number, self.busy = event["number"], None
        elif kind == "floor":
            for variant in self.results.pending(case):
                self.results.append(case, variant, floor_seconds=event["seconds"])
        elif kind != "end":
            self._hear(kind, case, Variant.split(event.pop("variant")), event)
        if kind in ("begin", "time", "floor"):
            self.results.save_soon()
        else:
            self.results.save()

    def _hear(self, kind: str, case: Case, variant: Variant, event: dict[str, Any]) -> None:
        if kind == "begin":
            self.busy = variant
            self.progress.show(f"{variant}, {case.title}")
            return
        if kind == "warm":
            row = self.results.rows[case, variant]
            note = "; ".join(dict.fromkeys(filter(None, (row.note, event["note"]))))
            # A later process finds in a cache what the first one has compiled.
            first = row.first_seconds or event["first_seconds"]
            self.results.change(case, variant, note=note, first_seconds=first, loss=event["loss"])
            self.progress.advance()
        elif kind == "errors":
            self.results.change(case, variant, errors=event)
        elif kind == "peak":
            self.results.append(case, variant, **event)
        elif kind == "time":
            self.results.append(case, variant, seconds=event["seconds"])
            self.progress.advance()
        elif kind == "late":
            self.results.change(case, variant, status="not run", reason=LATE)
        elif kind == "failed":
            self.results.change(case, variant, status="failed", reason=event["reason"])

    def died(self, end: End, late: bool) -> None:
        """Blames the variant that was running; or all, if none had begun."""
        blamed = [self.busy] if self.busy is not None else self.results.pending(self.job.case)
        for variant in blamed:
            if end.timed_out and late:
                self.results.change(self.job.case, variant, status="not run", reason=LATE)
            else:
                self.results.change(self.job.case, variant, status="failed", reason=end.reason)

    def remaining(self) -> list[Job]:
        """What another process has to do: the job it died in, without the failed, and the rest."""
        case = self.job.case
        left = self.results.pending(case)
        fresh: dict[str, Any] = {"seconds": (), "floor_seconds": ()}
        if self.job.peaks:
            fresh |= {"additional_bytes": (), "total_bytes": ()}
        left = tuple(variant for variant in self.job.variants if variant in left)
        for variant in left:
            self.results.change(case, variant, **fresh)
        return [dataclasses.replace(self.job, variants=left), *self.jobs[self.number + 1 :]]


def _run(
    jobs: Sequence[Job],
    plan: Plan,
    results: Results,
    progress: Progress,
    environment: Mapping[str, str],
) -> None:
    while jobs := [job for job in jobs if job.variants]:
        if plan.late:
            for job in jobs:
                for variant in job.variants:
                    results.change(job.case, variant, status="not run", reason=LATE)
            return
        for job in jobs:
            for variant in job.variants:
                if job.peaks:
                    results.change(job.case, variant, own_process=not plan.shared)
        listener = _Listener(jobs, results, progress)
        order = {
            "task": "measure",
            "device": jobs[0].case.device,
            "jobs": [job.to_json() for job in jobs],
            "deadline": plan.deadline,
        }
        end = run_child(order, listener.hear, plan.timeout_seconds, environment, plan.until)
        if end.complete:
            return
        listener.died(end, plan.late)
        jobs = listener.remaining()
        results.save()
