"""Breaking points: the largest vocabulary or number of tokens under a real limit on memory.

Each size is tried in a child process of its own (``child.fits`` says what the limit counts), so
that one that fails leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from autochunk.bench.cases import Case, Search, Variant
from autochunk.bench.measure import Plan
from autochunk.bench.memory import PEAK_ENVIRONMENT
from autochunk.bench.methods import why_not
from autochunk.bench.processes import run_child
from autochunk.bench.progress import Progress
from autochunk.bench.results import LATE, BreakingPoint, Results
from autochunk.bench.search import FAILED, FITS, TOO_LARGE, Probe, search


def break_points(
    work: Sequence[tuple[Case, Sequence[Variant]]],
    wanted: Search,
    plan: Plan,
    results: Results,
    progress: Progress,
) -> None:
    """Searches the breaking point of each variant for each case (with 0 for what is searched)."""
    dimension, limit_bytes = wanted.dimension, wanted.limit_bytes
    for case, variants in work:
        for variant in variants:
            point = BreakingPoint(case, variant, dimension, limit_bytes, wanted.granularity)
            reason = why_not(variant.method, case.loss, case.device)
            if not reason and plan.late:
                reason = LATE
            if reason:
                results.points.append(dataclasses.replace(point, reason=reason))
                continue

            def probe(size: int, case: Case = case, variant: Variant = variant) -> Probe:
                progress.show(f"{variant}, {dimension} {size}")
                tried = try_size(case, variant, dimension, size, limit_bytes, plan.timeout_seconds)
                said = f"{variant}, {dimension} {size}: {tried.outcome} {tried.reason}"
                progress.advance(said.rstrip())
                return tried

            guess = first_guess(case, dimension, limit_bytes)
            found = search(probe, guess, wanted.granularity, wanted.largest)
            results.points.append(dataclasses.replace(point, found=found))
            results.save()


def first_guess(case: Case, dimension: str, limit_bytes: int | None) -> int:
    """A size near the breaking point of a method that holds the logits twice."""
    item_bytes = 4 if case.dtype == "float32" else 2
    limit = limit_bytes or 2**34
    if dimension == "vocabulary":
        return limit // (item_bytes * 2 * (case.tokens + case.hidden))
    weights = 2 * case.vocabulary * case.hidden * item_bytes
    return max(limit - weights, 0) // (item_bytes * 2 * (case.vocabulary + case.hidden))


def with_size(case: Case, dimension: str, size: int) -> Case:
    """The case with another ``vocabulary`` or number of ``tokens``."""
    if dimension == "vocabulary":
        return dataclasses.replace(case, vocabulary=size)
    return dataclasses.replace(case, tokens=size)


def try_size(
    case: Case,
    variant: Variant,
    dimension: str,
    size: int,
    limit_bytes: int | None,
    timeout_seconds: float,
) -> Probe:
    """Tries one size in a child process, as ``child.fits`` describes.

    A child that a signal ends does not fit either: libraries below PyTorch abort where an
    allocation of theirs fails, and without a limit the kernel kills.
    """
    sized = with_size(case, dimension, size)
    order = {
        "task": "fits",
        "device": case.device,
        "case": dataclasses.asdict(sized),
        "variant": str(variant),
        "limit_bytes": limit_bytes,
    }
    answers: list[dict[str, Any]] = []

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "fits":
            answers.append(event)

    begin = time.perf_counter()
    # Inductor's worker processes would inherit the limit, each with its own count.
    environment = {**PEAK_ENVIRONMENT, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    end = run_child(order, hear, timeout_seconds, environment)
    seconds = time.perf_counter() - begin
    if answers:
        answer = answers[0]
        outcome = FITS if answer["fits"] else TOO_LARGE
        return Probe(size, outcome, answer["note"], seconds)
    if end.signal is not None and not end.timed_out:
        return Probe(size, TOO_LARGE, end.reason, seconds)
    return Probe(size, FAILED, end.reason, seconds)
