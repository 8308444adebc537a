"""Faults of log-probabilities that depend on the batch: the same rows, in company of others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autochunk.report import collect

H, V, ROWS = 64, 4096, 192


def log_probs(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    logp_NV = F.log_softmax(F.linear(x_NH, w_VH), -1)
    return logp_NV.gather(-1, y_N[:, None]).squeeze(-1)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x_NH, w_VH = torch.randn(ROWS, H, dtype=dtype), torch.randn(V, H, dtype=dtype) / H**0.5
    return x_NH.requires_grad_(), w_VH.requires_grad_(), torch.randint(0, V, (ROWS,))


def compiled(chunk_rows: int, dynamic: bool = False):
    """Compiled for ``chunk_rows``; a call that compiles checks that the head was chunked."""
    function = torch.compile(
        log_probs,
        backend="autochunk",
        dynamic=dynamic,
        options={"chunk_rows": chunk_rows, "min_bytes": 0},
    )

    def call(*args: Tensor) -> Tensor:
        with collect() as reports:
            out = function(*args).detach()
        for report in reports:
            assert report.rows, report
            assert not any(row.refusal for row in report.rows), report
        return out

    return call


def test_fault_V_the_size_of_a_chunk_shows_in_the_last_bit_only():
    """What docs/numerics.md says: at most 2e-6 at log-probabilities down to -16, in float32."""
    x_NH, w_VH, y_N = inputs(torch.float32)
    x_NH, y_N = x_NH[:96], y_N[:96]
    exact = log_probs(x_NH.double(), w_VH.double(), y_N)
    assert exact.min() > -16
    of_size = {}
    for size in (1, 2, 7, 95, 96):
        torch._dynamo.reset()
        of_size[size] = compiled(size)(x_NH, w_VH, y_N)
        assert (of_size[size] - exact).abs().max() < 2e-6, size
    found = torch.stack(list(of_size.values()))
    assert (found.amax(0) - found.amin(0)).max() <= 2e-6


@pytest.mark.parametrize(
    ("dtype", "dynamic"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_fault_V_whole_chunks_give_a_row_the_same_bits_in_any_batch(dtype, dynamic):
    """``chunk_rows`` that divides the rows of each batch: other rows, places, counts."""
    x_NH, w_VH, y_N = inputs(dtype)
    function = compiled(32, dynamic)
    all_N = function(x_NH, w_VH, y_N)
    for picked in (
        torch.arange(64),
        torch.arange(40, 136),
        torch.randperm(ROWS),
        torch.randperm(ROWS)[:96],
        torch.cat([torch.arange(31), torch.full((33,), 100)]),
    ):
        assert_same(function(x_NH[picked], w_VH, y_N[picked]), all_N[picked])
    with torch.no_grad():
        assert_same(function(x_NH, w_VH, y_N), all_N)


def assert_same(found, expected):
    """Bit by bit where that was measured; elsewhere no promise is made but the bound."""
    difference = (found - expected).abs().max()
    measured = torch.backends.cpu.get_cpu_capability() == "AVX2"
    assert difference <= (0 if measured else 2e-6), difference
