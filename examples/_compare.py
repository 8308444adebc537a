"""What the examples share: the same training in one process per method, step by step in turn.

Each method runs in a child process of its own (the example's script again, with ``--worker``), so
that none inherits memory, compiled code or random state from another. The parent lets one child
at a time do one step: a load on the machine then slows all of them alike, and the ratios of times
hold. A child waits for a line, does a step, and answers with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from autochunk.bench.memory import MIB, PEAK_ENVIRONMENT, PeakMemory, peak_is_readable
from autochunk.config import OptionError, Options
from autochunk.report import collect


@dataclass(frozen=True)
class Run:
    """What one method did.

    Attributes:
        method: ``eager``, or a name that ``torch.compile(backend=...)`` takes.
        losses: One per step.
        peak_bytes: Most memory that the forward and backward pass of a step took above what was
            held before it, over all steps but the first (which compiles).
        total_bytes: The same including what was held before: weights, optimizer state, libraries.
        seconds: Time of the fastest of these steps, the optimizer's included.
        chunked: Number of heads that ran in chunks.
        report: What autochunk says about every graph with a head.
        gradients: Of each parameter after the first step, if asked for: see :func:`_sketch`.
    """

    method: str
    losses: tuple[float, ...]
    peak_bytes: int
    total_bytes: int
    seconds: float
    chunked: int
    report: str
    gradients: tuple[tuple[float, float], ...] = ()


# ---- the command line --------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every comparison has."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--memory-budget",
        metavar="BYTES",
        help="of autochunk: what a chunk of logits may take, as 64MiB (default: %(default)s)",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model with random weights, to try the script"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with the parser's error for values that make no sense."""
    for name, least in (("steps", 2), ("batch", 1), ("tokens", 2), ("layers", 1)):
        value = getattr(args, name, None)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this installation of PyTorch sees no CUDA device")
    if args.device == "cpu" and not peak_is_readable():
        parser.error(
            "--device cpu: peak memory is read from Linux's /proc/self, which is not there or not "
            "writable; run on Linux, or with --device cuda"
        )
    try:
        Options.parse(backend_options(args))
    except OptionError as error:
        parser.error(str(error))


def backend_options(args: argparse.Namespace) -> dict[str, Any]:
    """autochunk's options from the command line.

    ``strict``: an example should fail loudly rather than show plain Inductor's figures.
    """
    if args.tiny:
        return {"strict": True, "min_bytes": 0, "num_chunks": 4}
    return {"strict": True, "memory_budget": args.memory_budget}


def language_reference() -> str:
    """Real text that is on any machine: the documentation of Python's syntax, about 450 kB."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def split(
    parser: argparse.ArgumentParser, args: argparse.Namespace, ids: torch.Tensor, batch: int
) -> torch.Tensor:
    """The first token ids of a text as ``[steps, batch, tokens]``."""
    needed = args.steps * batch * args.tokens
    if len(ids) < needed:
        parser.error(
            f"the text has {len(ids)} tokens, and {args.steps} steps of {batch} x {args.tokens} "
            f"tokens need {needed}: lower --steps or --tokens"
        )
    return ids[:needed].view(args.steps, batch, args.tokens)


# ---- the child ---------------------------------------------------------------------------------


def work(
    method: str,
    model: torch.nn.Module,
    batches: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    options: Mapping[str, Any],
    loss_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
    gradients: bool = False,
) -> None:
    """Trains a causal language model, one step per line from stdin.

    Args:
        method: As ``Run.method``.
        model: Called as ``model(input_ids=ids, labels=ids).loss``.
        batches: Token ids ``[steps, batch, tokens]``.
        optimizer: Over the model's parameters.
        options: Of autochunk.
        loss_of: Compiled instead of the model: from token ids to the loss.
        gradients: Whether the gradients of the first step are compared as well.
    """
    channel, sys.stdout = sys.stdout, sys.stderr  # a library's print must not mix with the JSON
    device = next(model.parameters()).device
    compiled: Any = model if loss_of is None else loss_of
    if method != "eager":
        extra = {"options": dict(options)} if method == "autochunk" else {}
        compiled = torch.compile(compiled, backend=method, **extra)
    memory = PeakMemory(device)
    with collect() as reports:
        for cpu_ids in batches:
            if not sys.stdin.readline():
                return  # the parent is gone
            ids = cpu_ids.to(device)
            memory.start()
            started = time.perf_counter()
            loss = compiled(ids) if loss_of else compiled(input_ids=ids, labels=ids).loss
            loss.backward()
            above, total = memory.stop()
            found = {"loss": loss.item(), "peak_bytes": above, "total_bytes": total}
            if gradients:
                found["gradients"] = [_sketch(p.grad) for p in model.parameters()]
                gradients = False
            optimizer.step()
            optimizer.zero_grad()
            del loss
            found["seconds"] = time.perf_counter() - started
            print(json.dumps(found), file=channel, flush=True)
    report = "\n".join(str(r) for r in reports if r.rows or r.failure)
    chunked = sum(len(r.chunked) for r in reports)
    print(json.dumps({"chunked": chunked, "report": report}), file=channel, flush=True)


def _sketch(gradient: torch.Tensor | None) -> tuple[float, float]:
    """The norm, and the product with a vector of random numbers.

    Of two gradients the difference of the products is about the norm of their difference.
    """
    if gradient is None:
        return 0.0, 0.0
    generator = torch.Generator(gradient.device).manual_seed(gradient.numel())
    numbers = torch.randn(gradient.shape, generator=generator, device=gradient.device)
    return gradient.double().norm().item(), (gradient.double() * numbers).sum().item()


# ---- the parent --------------------------------------------------------------------------------

_CHILD_ENVIRONMENT = {**PEAK_ENVIRONMENT, "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_methods(methods: Sequence[str], steps: int) -> list[Run]:
    """Trains with each method, in turn step by step; ends the program if a child fails."""
    children = {method: _start(["--worker", method]) for method in methods}
    try:
        done: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for step in range(steps):
            for method, child in children.items():
                done[method].append(found := _ask(method, child))
                print(
                    f"step {step + 1}, {method}: loss {found['loss']:.6f}, "
                    f"peak +{found['peak_bytes'] / MIB:.0f} MiB, {found['seconds']:.1f} s",
                    file=sys.stderr,
                )
        return [_run(method, done[method], _read(method, children[method])) for method in methods]
    finally:
        for child in children.values():
            child.kill()
            child.communicate()


def run_alone(arguments: Sequence[str], log: Path) -> dict[str, Any] | None:
    """Runs this script in a child process until it ends.

    Args:
        arguments: Of the command line, in addition to those of this process.
        log: A file for what it prints to stderr.

    Returns:
        The JSON of the last line that it printed; None if it failed.
    """
    with log.open("w") as stderr:
        printed, _ = _start(arguments, stderr).communicate()
    lines = printed.splitlines()
    return json.loads(lines[-1]) if lines else None


def _start(arguments: Sequence[str], stderr: Any = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *sys.argv, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, **_CHILD_ENVIRONMENT},
    )


def _ask(method: str, child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdin is not None
    try:
        child.stdin.write("step\n")
        child.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended; reading says so
    return _read(method, child)


def _read(method: str, child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        status = child.wait()
        sys.exit(f"the process that trains with {method} ended with status {status}; see above")
    return json.loads(line)


def _run(method: str, steps: Sequence[Mapping[str, Any]], last: Mapping[str, Any]) -> Run:
    warm = steps[1:]
    return Run(
        method=method,
        losses=tuple(step["loss"] for step in steps),
        peak_bytes=max(step["peak_bytes"] for step in warm),
        total_bytes=max(step["total_bytes"] for step in warm),
        seconds=min(step["seconds"] for step in warm),
        chunked=last["chunked"],
        report=last["report"],
        gradients=tuple((norm, product) for norm, product in steps[0].get("gradients", ())),
    )


def largest_gradient_difference(run: Run, baseline: Run) -> float:
    """Largest difference of a parameter's gradient, relative to its norm."""
    found = [
        max(abs(norm - expected[0]), abs(product - expected[1])) / max(expected[0], 1e-30)
        for (norm, product), expected in zip(run.gradients, baseline.gradients, strict=True)
    ]
    return max((d if math.isfinite(d) else math.inf for d in found), default=0.0)


def largest_difference(run: Run, baseline: Run) -> float:
    """Largest relative difference of a step's loss; infinite where a loss is not a number."""
    pairs = zip(run.losses, baseline.losses, strict=True)
    found = [abs(a - b) / abs(b) for a, b in pairs]
    return max(d if math.isfinite(d) else math.inf for d in found)


def print_losses(runs: Sequence[Run]) -> None:
    """A table of the losses, one row per step."""
    columns = zip(*(run.losses for run in runs), strict=True)
    rows = [[i, *losses] for i, losses in enumerate(columns, start=1)]
    print(tabulate(rows, ["step", *(f"{run.method}: loss" for run in runs)], floatfmt=".7f"))
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
    if first.gradients:
        for row, run in zip(rows, runs, strict=True):
            row.insert(3, f"{largest_gradient_difference(run, first):.1e}")
    headers = [
        "method",
        "last loss",
        f"largest relative\ndifference from\n{first.method}",
        "peak of a step\nabove base, MiB",
        "ratio",
        "peak in\ntotal, MiB",
        "seconds of the\nfastest step",
        "ratio",
    ]
    if first.gradients:
        headers.insert(3, "of a parameter's\ngradient,\nfirst step")
    alignment = ("left", *["right"] * (len(headers) - 1))
    print(tabulate(rows, headers, disable_numparse=True, colalign=alignment))
    print()


def failures(
    run: Run, baseline: Run, tolerance: float, gradient_tolerance: float = math.inf
) -> list[str]:
    """What is wrong with a run of autochunk: nothing, if the list is empty."""
    found = []
    difference = largest_difference(run, baseline)
    if not difference <= tolerance:
        found.append(
            f"the losses disagree: the largest relative difference of {run.method} from "
            f"{baseline.method} is {difference:.1e}, and {tolerance:.0e} is accepted"
        )
    difference = largest_gradient_difference(run, baseline)
    if not difference <= gradient_tolerance:
        found.append(
            f"the gradients disagree: the largest relative difference of {run.method} from "
            f"{baseline.method} is {difference:.1e}, and {gradient_tolerance:.0e} is accepted"
        )
    if run.chunked == 0:
        found.append("autochunk left the head alone, so nothing was compared")
    return found


def conclude(found: Sequence[str], success: str) -> int:
    """Prints the failures, or that there are none; returns the exit status."""
    print("\n".join(f"FAILED: {failure}" for failure in found) if found else success)
    return 1 if found else 0
