"""Loops over rows become one pass: one region, as exact as unchunked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import check, run, widened

import autochunk

B, T, H, V = 3, 8, 8, 96
OPTIONS = {"min_bytes": 0, "num_chunks": 2, "strict": True}


def _picked(z, y):
    return z.gather(-1, y.unsqueeze(-1)).squeeze(-1)


#: Functions of logits and labels whose loops are joined.
JOINED = {
    "sequences": lambda z, y: _picked(z, y) - torch.stack([r.logsumexp(-1) for r in z]),
    "unbind": lambda z, y: sum(r.logsumexp(-1).mean() for r in z.unbind(1)),
    "pieces": lambda z, y: torch.cat([p.logsumexp(-1) for p in z.view(-1, V).split(7)]),
    "shifted": lambda z, y: torch.cat([p.square().sum(-1) for p in z[:, 1:].split([2, 5], 1)], 1),
    "nested": lambda z, y: torch.stack(
        [torch.cat([p.logsumexp(-1) for p in r.chunk(2)]) for r in z]
    ),
    "halves": lambda z, y: z[:, :4].logsumexp(-1).mean() * z[:, 4:].logsumexp(-1).sum(),
    "out of order": lambda z, y: z[:, 4:].logsumexp(-1) - z[:, :4].logsumexp(-1),
    "two results": lambda z, y: torch.stack(
        [r.logsumexp(-1) * r.softmax(-1).square().sum(-1) for r in z]
    ),
    "detached": lambda z, y: torch.stack([r.detach().amax(-1) for r in z]) * z.logsumexp(-1),
}

#: Those that are not, with the number of regions.
APART = {
    "a part": (lambda z, y: z.logsumexp(-1).sum() + z[1].logsumexp(-1).sum(), 2),
    "overlapping": (lambda z, y: z[:, :5].logsumexp(-1).sum() + z[:, 3:].logsumexp(-1).sum(), 2),
    "different ops": (lambda z, y: z[:, :4].logsumexp(-1).sum() + z[:, 4:].amax(-1).sum(), 2),
    "own labels": (lambda z, y: torch.stack([_picked(r, i) for r, i in zip(z, y, strict=True)]), B),
}


def _run(name, function):
    inputs = [
        torch.randn(B, T, H).requires_grad_(),
        (torch.randn(V, H) * 0.5).requires_grad_(),
        torch.randint(0, V, (B, T)),
    ]
    explained = []

    def loss(x, w, y):
        return function(F.linear(x, w), y)

    def chunked(*args):
        explained.append(autochunk.explain(loss, options=OPTIONS)(*args))
        return explained[0].result

    actual = run(chunked, inputs)
    check(actual, run(loss, inputs), run(loss, widened(inputs)), torch.float32)
    assert not explained[0].refused, explained[0]
    (row,) = explained[0].chunked
    return row.strategy.count("+") + 1


@pytest.mark.parametrize("name", JOINED)
def test_joined(name, no_codegen):
    assert _run(name, JOINED[name]) == 1


@pytest.mark.parametrize("name", APART)
def test_apart(name, no_codegen):
    function, regions = APART[name]
    assert _run(name, function) == regions
