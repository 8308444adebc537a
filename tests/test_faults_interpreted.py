"""Graphs that run op by op, as the first evaluation of deferred logits does (fault Q)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autochunk.deferred import DeferredTensor

H, V, N = 8, 96, 24
OPTIONS = {"min_bytes": 0, "chunk_rows": 7, "strict": True}


@pytest.mark.parametrize("change", ["copied", "scaled", "written"])
def test_fault_Q_logits_returned_after_a_graph_break(change):
    """Each result took the place of the one before: the logits' was not kept free.

    Validation steps do this: logits, a graph break (a print, a metric), the loss, both returned.
    """
    torch.manual_seed(0)
    head = torch.nn.Linear(H, V)
    x_NH, y_N = torch.randn(N, H), torch.randint(0, V, (N,))

    def step(x_NH: Tensor, y_N: Tensor) -> tuple[Tensor, ...]:
        z_NV = head(x_NH)
        torch._dynamo.graph_break()
        z_NV = z_NV * 1.5 if change == "scaled" else z_NV.clone()
        if change == "written":
            z_NV[:, 3] = -5.0
        return y_N, z_NV, F.cross_entropy(z_NV, y_N)

    function = torch.compile(step, backend="autochunk", options=OPTIONS)
    with torch.no_grad():
        for _ in range(3):  # op by op, then compiled
            found = function(x_NH, y_N)
            assert type(found[1]) is DeferredTensor
            torch.testing.assert_close([t + 0 for t in found], [*step(x_NH, y_N)])
