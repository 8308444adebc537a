"""The process in which something is measured: ``python -m autochunk.bench.child``.

It reads one line of JSON from stdin, which says what to do, and writes one line for each event to
stdout. It ends when it is done, or when its stdin is closed because the parent has gone.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autochunk.bench import environment
from autochunk.bench.cases import Case, Job, Variant
from autochunk.bench.memory import (
    PeakMemory,
    give_back,
    is_out_of_memory,
    limit_data,
    status_bytes,
)
from autochunk.bench.methods import note
from autochunk.bench.problems import HeadProblem, Problem, errors, make
from autochunk.report import collect

#: What compiling may take next to a step; the step is tried under the exact limit afterwards.
_COMPILER_BYTES = 2**30

Emit = Callable[..., None]


def main() -> int:
    """Does what the first line of stdin says."""
    # A library's output must not mix with the JSON, nor may a compiler process keep the pipe open.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, this process is the one to go

    def emit(event: str, **what: Any) -> None:
        print(json.dumps({"event": event, **what}), file=channel, flush=True)

    warnings.simplefilter("ignore")
    emit("hardware", **environment.hardware(order["device"]))
    if order["task"] == "measure":
        for number, data in enumerate(order["jobs"]):
            job = Job.from_json(data)
            emit("job", number=number)
            measure(job, emit, order.get("deadline"))
            del job
            torch._dynamo.reset()
            free(torch.device(order["device"]))
    elif order["task"] == "reference":
        torch.save(HeadProblem(Case(**order["case"])).reference(), order["path"])
    else:
        emit("fits", **fits(Case(**order["case"]), order["variant"], order["limit_bytes"]))
    emit("end")
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


# ---- times and peaks ----------------------------------------------------------------------------


def measure(job: Job, emit: Emit, deadline: float | None = None) -> None:
    """Warms up each variant, takes peaks, and then times in rounds.

    In a round each variant does one step, so that a load on the machine slows all of them alike;
    the order moves on by one from round to round, so that none always follows the same other one.
    A variant that raises is out, and the others go on.

    Args:
        job: What to do.
        emit: Receives the events ``begin``, ``warm``, ``peak``, ``errors``, ``failed``, ``late``,
            ``floor`` and ``time``.
        deadline: Time (as ``time.time``) after which nothing new is begun.
    """
    gc.freeze()  # what is imported and compiled stays; collecting is fast without it
    try:
        problem = make(job.case)
    except Exception as error:
        for variant in job.variants:
            _fail(variant, error, emit)
        return
    reference = torch.load(job.reference, mmap=True) if job.reference else None
    calls: dict[Variant, Callable[[], Tensor]] = {}
    for variant in job.variants:
        if deadline is not None and time.time() > deadline:
            emit("late", variant=str(variant))
            continue
        emit("begin", variant=str(variant))
        try:
            calls[variant] = _prepare(problem, variant, job, reference, emit)
        except Exception as error:  # whatever a method raises is a row of the table
            _fail(variant, error, emit)
        problem.clear()
        free(problem.device)
    gc.freeze()
    for turn in range(job.repeats):
        if not calls or (deadline is not None and time.time() > deadline):
            break
        gc.collect()
        seconds = _floor(problem)
        emit("floor", round=turn, seconds=seconds)
        for variant in _rotated(list(calls), turn):
            emit("begin", variant=str(variant))
            try:
                emit(
                    "time", variant=str(variant), round=turn, seconds=problem.timed(calls[variant])
                )
            except Exception as error:
                del calls[variant]
                _fail(variant, error, emit)
            problem.clear()
    gc.unfreeze()


def _prepare(
    problem: Problem,
    variant: Variant,
    job: Job,
    reference: dict[str, Tensor] | None,
    emit: Emit,
) -> Callable[[], Tensor]:
    if variant.method == "auto_chunker":
        from torch._inductor import metrics

        metrics.reset()
    with collect() as reports:
        begin = time.perf_counter()
        call = problem.call(variant)
        for turn in range(job.warmup):
            problem.clear()
            loss = problem.step(call)
            if turn == 0:
                problem.synchronize()
                first = time.perf_counter() - begin
    if any(leaf.grad is None for leaf in problem.leaves):
        raise RuntimeError("it left a gradient out")
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"the loss is {loss.item()}")
    said = note(variant.method, reports)
    emit("warm", variant=str(variant), loss=loss.item(), first_seconds=first, note=said)
    if reference is not None:
        emit("errors", variant=str(variant), **errors(loss, problem.leaves, reference))
    memory = PeakMemory(problem.device)
    for _ in range(job.peaks):
        problem.clear()
        memory.start()
        loss = problem.step(call)
        above, total = memory.stop()
        emit("peak", variant=str(variant), additional_bytes=above, total_bytes=total)
    problem.clear()
    return call


def _floor(problem: Problem) -> float | None:
    try:
        return problem.floor()
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise


def _fail(variant: Variant, error: Exception, emit: Emit) -> None:
    emit("failed", variant=str(variant), reason=short_reason(error))
    if "CUDA error" in str(error) and not is_out_of_memory(error):
        os._exit(1)  # the context is lost: the parent goes on in a new process


def short_reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    if is_out_of_memory(error):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def _rotated(items: list[Variant], by: int) -> list[Variant]:
    by %= len(items)
    return items[by:] + items[:by]


def free(device: torch.device) -> None:
    """Gives memory back that nothing uses."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    else:
        give_back()


# ---- does it fit? -------------------------------------------------------------------------------


def fits(case: Case, variant: str, limit_bytes: int | None) -> dict[str, Any]:
    """Whether a step fits into a limit on memory.

    What counts is what the step needs: its inputs, gradients and all temporaries. Libraries and
    what compiling leaves behind do not. On a CPU the first step, which compiles, has 1 GiB more;
    then the limit on the process's data segment is set to what it holds, less the inputs, plus
    ``limit_bytes``, and another step decides. On CUDA it is the share of the device's memory that
    PyTorch's allocator may take, or all there is.

    Returns:
        ``{"fits": bool, "note": str}``.
    """
    try:
        return _fits(case, Variant.split(variant), limit_bytes)
    except Exception as error:
        if is_out_of_memory(error):
            return {"fits": False, "note": ""}
        raise


def _fits(case: Case, variant: Variant, limit_bytes: int | None) -> dict[str, Any]:
    device = torch.device(case.device)
    if limit_bytes is not None:
        if device.type == "cuda":
            everything = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(limit_bytes / everything, 1.0))
        else:
            limit_data(status_bytes("VmData") + limit_bytes + _COMPILER_BYTES)
    problem = make(case)
    if limit_bytes is not None and problem.input_bytes >= limit_bytes:
        return {"fits": False, "note": "the inputs alone"}
    with collect() as reports:
        call = problem.call(variant)
        problem.step(call)
    problem.clear()
    free(device)
    if limit_bytes is not None and device.type == "cpu":
        limit_data(status_bytes("VmData") - problem.input_bytes + limit_bytes)
    problem.step(call)
    problem.synchronize()
    return {"fits": True, "note": note(variant.method, reports)}


if __name__ == "__main__":
    sys.exit(main())
