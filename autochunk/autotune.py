"""Autotune: times a region's loop with several chunk sizes, and remembers which was best.

The loop runs on made-up numbers in the shapes of the region, with no more rows than are needed to
tell the sizes apart. The best is the one that takes the least memory (most often the smallest) of
those that are nearly as fast as the fastest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.codecache import write_atomic
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import unset_fake_temporarily

from autochunk.body import TensorSpec
from autochunk.plan import accumulate_dtype, step_bytes
from autochunk.runtime import Loop, alone, run_group
from autochunk.types import Plan

#: How much slower than the fastest one that takes less memory may be: what medians scatter by.
TOLERANCE = 1.03

#: Timed runs of each size, after one that is not.
ROUNDS = 3

#: Rows of a timed run, in chunks of the largest size: the first chunk writes the gradients, the
#: others add to them.
_CHUNKS = 2


def autotune(
    plans: Sequence[Plan], key: str, device: torch.device, build: Callable[[Plan], Loop]
) -> Plan:
    """The best of several plans of a region, which differ in the rows of a chunk.

    Args:
        plans: At least one.
        key: Of the region; with the machine and the sizes it is what the choice is remembered by.
        device: That the region runs on.
        build: Makes a plan's loop.

    Returns:
        One of them, with ``tuned`` saying what was found.
    """
    if len(plans) == 1:
        return plans[0]
    file = _file(plans, key, device)
    times = _remembered(file, plans)
    if times is None:
        times = _times([(p, build(p)) for p in plans])
        _remember(file, times)
    best = least_of_fast(
        times, {p.chunk_rows: step_bytes(p.chunk_bytes, p.sum_bytes) for p in plans}
    )
    shown = ", ".join(
        f"{rows} rows {seconds / times[best]:.2f}" for rows, seconds in sorted(times.items())
    )
    (chosen,) = (p for p in plans if p.chunk_rows == best)
    return replace(chosen, tuned=f"autotuned, time ÷ that of {best} rows: {shown}")


def least_of_fast(times: Mapping[int, float], needed: Mapping[int, int]) -> int:
    """The number of rows that needs the fewest bytes and at most ``TOLERANCE`` × the least time."""
    fastest = min(times.values())
    fast = [rows for rows, seconds in times.items() if seconds <= fastest * TOLERANCE]
    return min(fast, key=lambda rows: needed[rows])


# ---- timing ----------------------------------------------------------------------------------


def _times(trials: Sequence[tuple[Plan, Loop]]) -> dict[int, float]:
    """Seconds for the same rows with each number of rows per chunk; without those out of memory."""
    found: dict[int, list[float]] = {plan.chunk_rows: [] for plan, _ in trials}
    rows = min(_CHUNKS * max(found), max(p.num_chunks * p.chunk_rows for p, _ in trials))
    spec = trials[0][1].spec
    with unset_fake_temporarily(), torch.no_grad(), torch._C._DisableAutocast():
        inputs = [_made_up(s, rows) for s in spec.rows]
        shared = [_made_up(s) for s in spec.shared]
        cotangents = [_made_up(spec.outputs[i], rows) for i in spec.grad_outputs]
        loops = {plan.chunk_rows: _as_in_use(plan, loop) for plan, loop in trials}
        for turn in range(ROUNDS + 1):
            for size in list(found):
                _synchronize(spec.device)
                begin = time.perf_counter()
                try:
                    _run(loops[size], inputs, shared, cotangents)
                    _synchronize(spec.device)
                except torch.OutOfMemoryError:
                    if len(found) == 1:
                        raise
                    del found[size]
                    continue
                if turn:
                    found[size].append(time.perf_counter() - begin)
    return {size: statistics.median(seconds) for size, seconds in found.items()}


def _run(
    loop: Loop, rows: Sequence[Tensor], shared: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> None:
    group = alone(loop)
    if loop.full_kernel is not None:
        run_group(group, "full_kernel", rows, shared, cotangents)
    if loop.value_kernel is not None:
        run_group(group, "value_kernel", rows, shared, (), gradients=False)
    if loop.grad_kernel is not None:
        run_group(group, "grad_kernel", rows, shared, cotangents)


def _as_in_use(plan: Plan, loop: Loop) -> Loop:
    """The loop with the sum that all rows would have: there are fewer here, in fewer chunks."""
    dtypes = {loop.spec.shared[i].dtype for i in loop.spec.shared_grads}
    for dtype in dtypes:
        used = accumulate_dtype(dtype, plan.num_chunks, loop.accumulate)
        if used != dtype:
            return replace(loop, accumulate=used)
    return loop


def _made_up(spec: TensorSpec, rows: int | None = None) -> Tensor:
    """Small numbers, or zeros: an index that is always in range. The global generators stay."""
    sizes = spec.sizes if rows is None else (rows, *spec.sizes)
    strides = spec.strides if rows is None else torch.empty(sizes, device="meta").stride()
    span = 1 + sum(max(n - 1, 0) * stride for n, stride in zip(sizes, strides, strict=True))
    flat = torch.zeros(span, dtype=spec.dtype, device=spec.device)
    if spec.dtype.is_floating_point:
        generator = torch.Generator(spec.device).manual_seed(0)
        flat.uniform_(-0.05, 0.05, generator=generator)
    return flat.as_strided(sizes, strides)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- memory ----------------------------------------------------------------------------------


def _file(plans: Sequence[Plan], key: str, device: torch.device) -> Path | None:
    """Where a choice is remembered; None if Inductor's caches are switched off."""
    if inductor_config.force_disable_caches:
        return None
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    parts = [key, machine, [(p.chunk_rows, p.num_chunks) for p in plans]]
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    return Path(cache_dir()) / "autochunk" / f"{name}.json"


def _remembered(file: Path | None, plans: Sequence[Plan]) -> dict[int, float] | None:
    """The times in a file, or None where there is none that can be used."""
    try:
        found = json.loads(file.read_text()) if file is not None else {}
        times = {int(rows): float(seconds) for rows, seconds in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return times if times and times.keys() <= {p.chunk_rows for p in plans} else None


def _remember(file: Path | None, times: dict[int, float]) -> None:
    if file is None:
        return
    # A directory that cannot be written to only means that the next process times again.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(str(file), json.dumps(times), encode_utf_8=True)
