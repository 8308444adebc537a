"""Extrema and log-sum-exp over rows and features: ties between rows, infinities, nan."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import check_chunked

import autochunk

N, H, V = 24, 8, 96
OPTIONS = {"strict": True, "min_bytes": 0, "chunk_rows": 7}
INF = float("inf")

REDUCTIONS = {
    "max": lambda z: z.max(),
    "min": lambda z: z.min(),
    "amax": lambda z: z.amax(),
    "amin kept": lambda z: z.amin((0, 1), keepdim=True).sum(),
    "logsumexp": lambda z: z.logsumexp((0, 1)),
}


def _ties(z):
    """Row 1 attains each extremum twice, row 9 three times, row 20 once."""
    z = z.clamp(-4, 4)
    high, low = torch.zeros(N, V, dtype=torch.bool), torch.zeros(N, V, dtype=torch.bool)
    for row, column in [(1, 2), (1, 5), (9, 0), (9, 1), (9, 7), (20, 3)]:
        high[row, column], low[row, column + 10] = True, True
    shift = torch.where(high, 9.0, 0.0) - torch.where(low, 9.0, 0.0)
    return z - z.detach() + shift.to(z.dtype)


VALUES = {
    "ties": _ties,
    "all equal": lambda z: z - z.detach() + 2,
    "a row of -inf": lambda z: torch.where(torch.arange(N)[:, None] == 3, -INF, _ties(z)),
    "all -inf": lambda z: z + torch.full((N, V), -INF, dtype=z.dtype),
    "a nan": lambda z: torch.where(torch.arange(N * V).view(N, V) % 700 == 5, z * float("nan"), z),
}


def _inputs(dtype):
    torch.manual_seed(0)
    return [torch.randn(n, H).to(dtype).requires_grad_() for n in (N, V)]


def _compare(function, dtype):
    check_chunked(function, _inputs(dtype), dtype, OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", ["ties", "all equal", "a row of -inf"])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_fault_C2_ties_between_rows(no_codegen, name, values, dtype):
    """Every element that attains the extremum has the same share of the gradient."""
    _compare(lambda x, w: REDUCTIONS[name](VALUES[values](F.linear(x, w))), dtype)


@pytest.mark.parametrize("name", ["max", "amax"])
def test_fault_C2_with_kernels(name):
    _compare(lambda x, w: REDUCTIONS[name](VALUES["ties"](F.linear(x, w))), torch.float32)


@pytest.mark.parametrize("values", ["all -inf", "a nan"])
@pytest.mark.parametrize("name", ["max", "amax"])
def test_fault_C2_infinities_and_nan(no_codegen, name, values):
    """Values are eager's, and so is where a gradient of the logits is nan."""

    def function(x, w):
        return REDUCTIONS[name](VALUES[values](F.linear(x, w)))

    x, w = _inputs(torch.float32)
    results = []
    for run_it in (function, lambda *a: autochunk.explain(function, options=OPTIONS)(*a).result):
        value = run_it(x, w)
        results.append((value, *torch.autograd.grad(value, (x, w))))
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, equal_nan=True)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_fault_C2_without_gradient(no_codegen, name):
    x, w = (t.detach() for t in _inputs(torch.float32))

    def function(x, w):
        return REDUCTIONS[name](_ties(F.linear(x, w)))

    found = autochunk.explain(function, options=OPTIONS)(x, w)
    assert found.chunked, found
    torch.testing.assert_close(found.result, function(x, w))


def test_fault_C2_an_added_mask_of_minus_infinity_in_a_whole_row():
    """The row's own logsumexp has a gradient of nan; that of all has none there."""

    def function(x, w):
        mask = torch.zeros(N, V, dtype=x.dtype)
        mask[3] = -INF
        return (F.linear(x, w) + mask).logsumexp((0, 1))

    _compare(function, torch.float32)
