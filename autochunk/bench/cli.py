"""The command ``autochunk bench``: from settings to tables, JSON and charts."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from autochunk.bench import environment
from autochunk.bench.arguments import Settings, check
from autochunk.bench.breaking import break_points
from autochunk.bench.measure import measure
from autochunk.bench.parser import add_arguments
from autochunk.bench.progress import Progress
from autochunk.bench.results import Results
from autochunk.bench.tables import listing, results_table

#: As shells report a process that Ctrl-C has ended.
_INTERRUPTED = 130


def add_command(subparsers: Any, given: Sequence[str]) -> None:
    """Adds ``bench`` to the commands of ``autochunk``."""
    parser = subparsers.add_parser("bench", help="time, memory and accuracy of chunked heads")
    add_arguments(parser)
    parser.set_defaults(run=lambda args: run(parser, args, given))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace, given: Sequence[str]) -> int:
    """Measures and prints; returns the exit status.

    0 if something was measured and nothing failed, 1 if something failed, 130 after Ctrl-C. What
    was measured before is printed and written in each case.
    """
    settings = check(parser, args)
    if settings.listing:
        print(listing(settings.device))
        return 0
    results = Results(_about(settings, given), settings.json)
    progress = Progress(settings.quiet)
    before = signal.signal(signal.SIGTERM, _interrupt)
    interrupted = False
    begin = time.perf_counter()
    try:
        _run(settings, results, progress)
    except KeyboardInterrupt:
        interrupted = True
        results.interrupt()
    finally:
        progress.close()
        signal.signal(signal.SIGTERM, before)
        results.about["total_seconds"] = time.perf_counter() - begin
        results.save(finished=not interrupted)
        print(results_table(results, settings.pareto))
    if settings.charts is not None:
        from autochunk.bench.charts import write_charts

        for path in write_charts(results, settings.charts, settings.pareto):
            print(f"wrote {path}", file=sys.stderr)
    if interrupted:
        print("interrupted; what was measured before is above", file=sys.stderr)
        return _INTERRUPTED
    return _status(results)


def _run(settings: Settings, results: Results, progress: Progress) -> None:
    if settings.search is None:
        measure(settings.work, settings.plan, results, progress)
        return
    break_points(settings.work, settings.search, settings.plan, results, progress)


def _about(settings: Settings, given: Sequence[str]) -> dict[str, Any]:
    return {
        "command": shlex.join(["autochunk", *given]),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": environment.versions(),
        "hardware": {},
        "plan": dataclasses.asdict(settings.plan),
    }


def _status(results: Results) -> int:
    failed = any(row.status == "failed" for row in results.rows.values())
    failed = failed or any(p.found is not None and p.found.failure for p in results.points)
    return 1 if failed else 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
