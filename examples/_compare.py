"""What the examples share: the same training in one process per method, then a comparison.

Each method runs in a child process of its own (the example's script again, with ``--worker``), so
that no method inherits memory, compiled code or random state from another.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from autochunk.report import collect

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Run:
    """What a child process measured.

    Attributes:
        method: ``eager``, or a name that ``torch.compile(backend=...)`` takes.
        losses: One per step.
        peak_bytes: Most memory that the forward and backward pass of a step took above what was
            held before it, over all steps but the first (which compiles).
        total_bytes: The same including what was held before: weights and optimizer state.
        seconds: Median time of a step, the optimizer's included, over the same steps.
        chunked: Heads that autochunk runs in chunks.
        report: What autochunk says about every graph with a head.
    """

    method: str
    losses: tuple[float, ...]
    peak_bytes: int
    total_bytes: int
    seconds: float
    chunked: int = 0
    report: str = ""


class PeakMemory:
    """Peak memory between ``start()`` and ``stop()``, both with the device idle.

    On the CPU it is the kernel's high-water mark of the process's resident memory, which is reset
    by ``start``; on CUDA it is the caching allocator's.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def start(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return
        # What the C library keeps of freed memory would be reused unseen: give it back first.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.base = _status_bytes("VmRSS")

    def stop(self) -> tuple[int, int]:
        """(bytes above what was held at ``start``, bytes in total)."""
        if self.cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = _status_bytes("VmHWM")
        return peak - self.base, peak


def train(
    method: str,
    model: torch.nn.Module,
    batches: Iterable[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    options: Mapping[str, Any],
) -> Run:
    """Trains a causal language model, one step per batch.

    Args:
        method: As ``Run.method``.
        model: Called as ``model(input_ids=ids, labels=ids).loss``.
        batches: Token ids ``[batch, tokens]``.
        optimizer: Over the model's parameters.
        options: Of autochunk.
    """
    device = next(model.parameters()).device
    if method == "autochunk":
        step_model: Any = torch.compile(model, backend="autochunk", options=dict(options))
    else:
        step_model = model if method == "eager" else torch.compile(model, backend=method)
    memory = PeakMemory(device)
    losses, peaks, totals, seconds = [], [], [], []
    with collect() as reports:
        for i, ids in enumerate(batches):
            ids = ids.to(device)
            memory.start()
            started = time.perf_counter()
            loss = step_model(input_ids=ids, labels=ids).loss
            loss.backward()
            above, total = memory.stop()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            del loss
            seconds.append(time.perf_counter() - started)
            peaks.append(above)
            totals.append(total)
            print(
                f"{method}: step {i + 1}, loss {losses[-1]:.6f}, {seconds[-1]:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    return Run(
        method,
        tuple(losses),
        max(peaks[1:]),
        max(totals[1:]),
        statistics.median(seconds[1:]),
        sum(len(report.chunked) for report in reports),
        "\n".join(str(report) for report in reports if report.rows or report.failure),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every comparison has; those of the child process are not shown."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--memory-budget",
        default=None,
        metavar="BYTES",
        help='bytes that a chunk of logits may take, as "64MiB" (default: autochunk\'s own)',
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model with random weights, to try the script"
    )
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, default=None, help=argparse.SUPPRESS)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with the parser's error for values that make no sense."""
    for name in ("steps", "batch", "tokens"):
        least = 1 if name == "batch" else 2
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this installation of PyTorch sees no CUDA device")
    if args.device == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        parser.error(
            "--device cpu: peak memory is read from Linux's /proc/self, which is not there or not "
            "writable; run on Linux, or with --device cuda"
        )


def backend_options(args: argparse.Namespace) -> dict[str, Any]:
    """autochunk's options from the command line.

    ``strict``: an example should fail loudly rather than show plain Inductor's figures.
    """
    options: dict[str, Any] = {"strict": True}
    if args.memory_budget is not None:
        options["memory_budget"] = args.memory_budget
    if args.tiny:
        options |= {"min_bytes": 0, "num_chunks": 4}
        options.pop("memory_budget", None)
    return options


def run_methods(methods: Sequence[str]) -> list[Run]:
    """Runs this program once per method, each in a child process, one after another."""
    runs = []
    with tempfile.TemporaryDirectory() as directory:
        for method in methods:
            path = Path(directory) / f"{method}.json"
            command = [*sys.argv, "--worker", method, "--result", str(path)]
            done = subprocess.run([sys.executable, *command], check=False)
            if done.returncode != 0:
                sys.exit(f"{method}: its process ended with status {done.returncode} (see above)")
            runs.append(Run(**json.loads(path.read_text())))
    return runs


def write_run(run: Run, path: Path) -> None:
    """Hands a child's measurements to its parent."""
    path.write_text(json.dumps(dataclasses.asdict(run)))


def largest_difference(run: Run, baseline: Run) -> float:
    """Largest relative difference of a step's loss; infinite where a loss is not a number."""
    pairs = zip(run.losses, baseline.losses, strict=True)
    found = [abs(a - b) / abs(b) for a, b in pairs]
    return max(d if math.isfinite(d) else math.inf for d in found)


def print_losses(runs: Sequence[Run]) -> None:
    """A table of the losses, one row per step."""
    rows = [[i + 1, *losses] for i, losses in enumerate(zip(*(r.losses for r in runs), strict=True))]
    print(tabulate(rows, ["step", *(f"{r.method}: loss" for r in runs)], floatfmt=".7f"))
    print()


def print_summary(runs: Sequence[Run]) -> None:
    """A table of loss, memory and time, one row per method; ratios are to the first one."""
    first = runs[0]
    rows = [
        [
            run.method,
            f"{run.losses[-1]:.6f}",
            f"{largest_difference(run, first):.1e}",
            f"{run.peak_bytes / MIB:.0f}",
            f"{run.peak_bytes / first.peak_bytes:.2f}",
            f"{run.total_bytes / MIB:.0f}",
            f"{run.seconds:.2f}",
            f"{run.seconds / first.seconds:.2f}",
        ]
        for run in runs
    ]
    headers = [
        "method",
        "last loss",
        f"largest relative\ndifference from\n{first.method}",
        "peak of a step\nabove base, MiB",
        "ratio",
        "peak of the\nprocess, MiB",
        "seconds\nper step",
        "ratio",
    ]
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 7)))
    print()


def verdict(run: Run, baseline: Run, tolerance: float) -> int:
    """Prints whether autochunk's run is what it should be; returns the exit status."""
    failures = []
    difference = largest_difference(run, baseline)
    if not difference <= tolerance:
        failures.append(
            f"the losses disagree: the largest relative difference of {run.method} from "
            f"{baseline.method} is {difference:.1e}, more than {tolerance:.0e}"
        )
    if run.chunked == 0:
        failures.append("autochunk left the head alone, so there is nothing to compare")
    if failures:
        print("\n".join(f"FAILED: {failure}" for failure in failures))
        return 1
    print(
        f"The losses agree: largest relative difference {difference:.1e}, "
        f"at most {tolerance:.0e} is accepted."
    )
    return 0




def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
