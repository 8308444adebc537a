"""Autotune: which chunk size is taken, that it is remembered, and that results stay the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import fresh_cache

from autochunk import OptionError, Options, autotune, runtime
from autochunk.autotune import least_of_fast
from autochunk.report import Report, collect

N, H, V = 512, 16, 256
BUDGET = 256 * V * 4  # of 256 rows in float32


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caches and regions of its own for each test."""
    monkeypatch.setattr(runtime, "REGIONS", {})
    with fresh_cache():
        yield


def loss_of(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_NH, w_VH).float(), y_N)


def data(
    dtype: torch.dtype = torch.float32, rows: int = N, hidden: int = H
) -> tuple[Tensor, Tensor, Tensor]:
    x_NH = torch.randn(rows, hidden).to(dtype).requires_grad_()
    w_VH = torch.randn(V, hidden).to(dtype).requires_grad_()
    return x_NH, w_VH, torch.randint(0, V, (rows,))


def run(
    inputs: tuple[Tensor, ...], function: Any = loss_of, dynamic: bool | None = None, **options: Any
) -> tuple[Report, list[Tensor]]:
    """The report, and loss and gradients."""
    torch._dynamo.reset()
    settings = {"min_bytes": 0, "strict": True, "autotune": True, **options}
    compiled = torch.compile(function, backend="autochunk", options=settings, dynamic=dynamic)
    with collect() as reports:
        loss = compiled(*inputs)
    (report,) = reports
    return report, [loss, *torch.autograd.grad(loss, inputs[:2])]


@pytest.fixture
def timed(
    monkeypatch: pytest.MonkeyPatch, no_codegen: None
) -> Callable[[dict[int, float]], list[list[int]]]:
    """Takes a time for each size and returns a list that receives the sizes of each call."""

    def given(times: dict[int, float]) -> list[list[int]]:
        calls: list[list[int]] = []

        def found(trials: Sequence[tuple[Any, Any]]) -> dict[int, float]:
            calls.append([plan.chunk_rows for plan, _ in trials])
            return {rows: times[rows] for rows in calls[-1]}

        monkeypatch.setattr(autotune, "_times", found)
        return calls

    return given


# ---- the choice ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({256: 1.0, 128: 1.02, 64: 1.5}, 128),
        ({256: 1.0, 128: 1.1, 64: 1.5}, 256),
        ({256: 1.3, 128: 1.0, 64: 1.2}, 128),
        ({256: 1.0, 128: 1.0, 64: 1.0}, 64),
        ({256: 1.0}, 256),
    ],
)
def test_least_memory_of_those_that_are_fast(times, best):
    assert least_of_fast(times, {rows: 10 * rows for rows in times}) == best


def test_memory_counts_a_sum_in_float32(timed):
    """Six chunks need less than sixteen with such a sum, of four bytes for each weight."""
    calls = timed(dict.fromkeys(range(1, N), 1.0))
    report, _ = run(data(torch.bfloat16, hidden=64), memory_budget=96 * V * 2)
    assert calls == [[96, 32, 24]]
    assert report.chunked[0].chunks == "6 × 96"


def test_choice_is_run_and_reported(timed):
    calls = timed({256: 1.0, 128: 1.01, 64: 1.5, 32: 2.0})
    report, _ = run(data(), memory_budget=BUDGET)
    assert calls == [[256, 128, 64, 32]]
    (row,) = report.chunked
    assert row.chunks == "4 × 128"
    note = (
        "autotuned, time ÷ that of 128 rows: 32 rows 1.98, 64 rows 1.49, 128 rows 1.00, "
        "256 rows 0.99"
    )
    assert note in row.notes
    (loop,) = runtime.REGIONS.values()
    assert loop.spec.chunk_rows == 128


def test_budget_is_the_largest_size_and_without_it_twice_the_default(timed):
    calls = timed(dict.fromkeys(range(1, N + 1), 1.0))
    run(data(), memory_budget=BUDGET // 2)
    run(data())
    assert [call[0] for call in calls] == [128, 256]


@pytest.mark.parametrize("rows", [5, 20])
def test_few_rows_leave_nothing_to_choose(rows, timed):
    calls = timed({})
    report, _ = run(data(rows=rows))
    assert calls == []
    assert not any("autotuned" in note for note in report.chunked[0].notes)


@pytest.mark.parametrize("option", ["chunk_rows", "num_chunks"])
def test_another_option_that_decides_the_size_contradicts(option):
    with pytest.raises(OptionError, match=f"'autotune' and '{option}' contradict each other"):
        Options.parse({"autotune": True, option: 4})


# ---- timing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_same_results_as_eager(strategy, dynamic):
    inputs = data()
    report, got = run(inputs, memory_budget=BUDGET, strategy=strategy, dynamic=dynamic)
    assert any("autotuned" in note for note in report.chunked[0].notes)
    loss = loss_of(*inputs)
    for g, e in zip(got, [loss, *torch.autograd.grad(loss, inputs[:2])], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)


def test_half_precision_is_timed_with_the_sum_it_runs_with(monkeypatch):
    """Chunks of 64 rows are eight, which are summed in float32, also where few are timed."""
    seen = []
    as_in_use = autotune._as_in_use

    def note(plan: Any, loop: Any) -> Any:
        loop = as_in_use(plan, loop)
        seen.append((plan.num_chunks, loop.accumulate))
        return loop

    monkeypatch.setattr(autotune, "_as_in_use", note)
    run(data(torch.bfloat16), memory_budget=BUDGET // 2)
    assert set(seen) == {(2, None), (4, None), (8, torch.float32), (16, torch.float32)}


def test_masks_and_strided_weights():
    """What is made up has the region's dtypes and strides; the user's generator stays put."""

    def masked(x_NH: Tensor, w_HV: Tensor, keep_NV: Tensor) -> Tensor:
        logits_NV = (x_NH @ w_HV).masked_fill(~keep_NV, -1e4)
        return logits_NV.logsumexp(-1).sum()

    w_HV = torch.randn(V, H).t().requires_grad_()
    inputs = (torch.randn(N, H, requires_grad=True), w_HV, torch.rand(N, V) > 0.3)
    before = torch.get_rng_state()
    report, got = run(inputs, masked, memory_budget=BUDGET)
    assert torch.equal(before, torch.get_rng_state())
    assert report.chunked
    loss = masked(*inputs)
    for g, e in zip(got, [loss, *torch.autograd.grad(loss, inputs[:2])], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


def test_size_that_does_not_fit_is_left_out(monkeypatch):
    run_once = autotune._run

    def too_large(loop: Any, *rest: Any) -> None:
        if loop.spec.chunk_rows > 64:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        run_once(loop, *rest)

    monkeypatch.setattr(autotune, "_run", too_large)
    report, _ = run(data(), memory_budget=BUDGET)
    assert report.chunked[0].chunks in ("8 × 64", "16 × 32")
    assert not any("128 rows" in note for note in report.chunked[0].notes)


# ---- memory ----------------------------------------------------------------------------------


def remembered() -> list[Path]:
    return sorted((Path(autotune.cache_dir()) / "autochunk").glob("*.json"))


def test_choice_is_remembered(timed):
    calls = timed({256: 1.0, 128: 1.01, 64: 1.5, 32: 2.0})
    first, _ = run(data(), memory_budget=BUDGET)
    runtime.REGIONS.clear()
    second, _ = run(data(), memory_budget=BUDGET)
    assert len(calls) == 1
    assert first.rows[0].notes == second.rows[0].notes
    (file,) = remembered()
    assert json.loads(file.read_text()) == {"256": 1.0, "128": 1.01, "64": 1.5, "32": 2.0}
    run(data(rows=2 * N), memory_budget=BUDGET)  # another number of rows is another question
    assert len(calls) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"7": 1.0}', '{"a": 1}', '{"128": null}'])
def test_file_that_cannot_be_used_is_written_again(text, timed):
    calls = timed({256: 1.0, 128: 1.01, 64: 1.5, 32: 2.0})
    run(data(), memory_budget=BUDGET)
    (file,) = remembered()
    good = file.read_text()
    file.write_text(text)
    runtime.REGIONS.clear()
    run(data(), memory_budget=BUDGET)
    assert len(calls) == 2
    assert file.read_text() == good


def test_nothing_is_remembered_without_caches(timed):
    calls = timed({256: 1.0, 128: 1.01, 64: 1.5, 32: 2.0})
    with torch._inductor.config.patch(force_disable_caches=True):
        for _ in range(2):
            run(data(), memory_budget=BUDGET)
            runtime.REGIONS.clear()
    assert len(calls) == 2
    assert remembered() == []
