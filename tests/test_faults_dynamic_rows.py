"""Rows that data select, and ops that are others where autograd is off: no fallback."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import autochunk

N, H, V = 24, 8, 64
OPTIONS = {"min_bytes": 0, "chunk_rows": 5}


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    x, w = torch.randn(N, H, generator=random), torch.randn(V, H, generator=random)
    y = torch.randint(0, V, (N,), generator=random)
    return x.requires_grad_(), w.requires_grad_(), y, torch.rand(N, generator=random) > 0.4


def _mean(x: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return F.linear(x, w)[mask].square().mean()


def _loss(x: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w)[mask], y[mask])


def _positions(x: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    z, rows = F.linear(x, w), mask.nonzero()[:, 0]
    return F.cross_entropy(z[rows], y[rows])


def _in_the_end(x: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return F.linear(x, w).logsumexp(-1)[mask].mean()


def _bag(x: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(x, w), y, reduction="none")
    return F.embedding_bag(torch.arange(N).view(4, 6), losses[:, None], mode="mean").square().sum()


def _bag_of_a_metric(x: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(x, w), y, reduction="none")
    with torch.no_grad():
        bags = F.embedding_bag(torch.arange(N).view(4, 6), losses[:, None], mode="mean")
    return losses.mean() * bags.sum()


def _singular(x: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(x, w), y, reduction="none")
    return torch.linalg.svdvals(losses.view(4, 6)).sum()


def _pooled(x: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(x, w), y, reduction="none")
    return F.max_pool1d(losses[None, None], 3).sum()


@pytest.fixture
def _captured():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


@pytest.mark.usefixtures("_captured", "no_codegen")
@pytest.mark.parametrize(
    "function",
    [_mean, _loss, _positions, _in_the_end, _bag, _bag_of_a_metric, _singular, _pooled],
    ids=lambda f: f.__name__.strip("_"),
)
def test_fault_dynamic_rows_are_chunked(function: Any):
    found = []
    for one in (torch.compile(function, backend="autochunk", options=OPTIONS), function):
        x, w, y, mask = _inputs()
        with warnings.catch_warnings():
            warnings.simplefilter("error", autochunk.FallbackWarning)
            value = one(x, w, y, mask)
        value.backward()
        found.append((value.detach(), x.grad, w.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    explained = autochunk.explain(function, options={**OPTIONS, "strict": True})(*_inputs())
    assert explained.chunked
    assert not explained.refused


@pytest.mark.usefixtures("_captured", "no_codegen")
def test_fault_dynamic_rows_that_are_returned_are_refused():
    """Nobody knows the shape of the deferred logits before they are computed."""

    def rows(x: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return F.linear(x, w)[mask]

    explained = autochunk.explain(rows, options={**OPTIONS, "strict": True})(*_inputs())
    (refused,) = explained.refused
    assert refused.refusal.code == "unsupported-graph"
    assert "depends on data" in refused.refusal.detail
    torch.testing.assert_close(explained.result, rows(*_inputs()))


@pytest.mark.usefixtures("_captured", "no_codegen")
def test_fault_dynamic_rows_that_are_returned_beside_a_loss():
    """A loss of the same rows tells how many there are."""

    def both(x: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(x, w)[mask]
        return F.cross_entropy(z, y[mask]), z

    explained = autochunk.explain(both, options={**OPTIONS, "strict": True})(*_inputs())
    assert explained.chunked
    loss, z = explained.result
    expected, logits = both(*_inputs())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(z * 1, logits)
