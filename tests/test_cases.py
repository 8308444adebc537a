"""The table of cases, each against float64, values and all gradients."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, H, V
from compare import check, run, widened

import autochunk

OPTIONS = {"min_bytes": 0, "chunk_rows": 4, "strict": True}


def _explain_and_run(case: Case, inputs, dynamic_rows=False):
    options = {**OPTIONS, **case.options}
    if "chunk_rows" in case.options or "num_chunks" in case.options:
        options = {**{k: v for k, v in OPTIONS.items() if k != "chunk_rows"}, **case.options}
    rows = []

    def function(*args):
        if dynamic_rows:
            mark_rows_dynamic(args)
        explanation = autochunk.explain(case.function, options=options)(*args)
        rows.extend(row for report in explanation.reports for row in report.rows)
        return explanation.result

    return run(function, inputs), rows


def mark_rows_dynamic(args) -> None:
    """All leading dimensions but a weight's are rows here."""
    for t in args:
        if isinstance(t, torch.Tensor) and t.dim() and not (t.shape[0] == V or t.shape[-1] == H):
            torch._dynamo.maybe_mark_dynamic(t, list(range(t.dim() - (t.shape[-1] == V))))
    x = args[0]
    torch._dynamo.maybe_mark_dynamic(x, list(range(x.dim() - 1)))


def _check_expectation(case: Case, rows) -> None:
    assert rows, "no head was found"
    found = {row.refusal.code if row.refusal else row.strategy.split(" + ")[0] for row in rows}
    assert case.expect in found, f"{case.name}: {found}\n" + "\n".join(map(str, rows))
    if case.expect in ("fused", "recompute", "forward"):
        assert not any(row.refusal for row in rows), rows


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_case(case: Case, dtype: torch.dtype, no_codegen):
    if dtype not in case.dtypes:
        return
    inputs = case.inputs(dtype)
    actual, rows = _explain_and_run(case, inputs)
    _check_expectation(case, rows)
    check(actual, run(case.function, inputs), run(case.function, widened(inputs)), dtype)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.expect not in autochunk.REFUSAL_CODES], ids=lambda c: c.name
)
def test_case_dynamic(case: Case, no_codegen):
    inputs = case.inputs(torch.float32)
    actual, rows = _explain_and_run(case, inputs, dynamic_rows=True)
    _check_expectation(case, rows)
    check(actual, run(case.function, inputs), run(case.function, widened(inputs)), torch.float32)
