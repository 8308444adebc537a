"""Losses that write to columns, masks and tensors beside the logits (fault R3)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import check, check_chunked, run, widened
from torch import Tensor, nn

import autochunk

H, V, N = 16, 256, 24
OPTIONS = {"min_bytes": 0, "chunk_rows": 7, "strict": True}


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    x, w = torch.randn(N, H, generator=random), torch.randn(V, H, generator=random)
    return x.requires_grad_(), w.requires_grad_(), torch.randint(0, V, (N,), generator=random)


def _adaptive(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """``nn.AdaptiveLogSoftmaxWithLoss.log_prob``: three heads, written side by side."""
    cuts = [32, 128, V]
    head = F.log_softmax(F.linear(x, w[: cuts[0] + 2]), dim=1)
    out = x.new_empty((x.size(0), V))
    out[:, : cuts[0]] = head[:, : cuts[0]]
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        cluster = F.log_softmax(F.linear(x, w[start:stop]), dim=1)
        out[:, start:stop] = cluster + head[:, cuts[0] + i].unsqueeze(1)
    return F.nll_loss(out, y)


def _queue(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """A queue of negatives: all but one's own."""
    z = x @ w.T
    dup = y[:, None] == torch.arange(V)[None] % N
    for i in range(N):
        dup[i, i] = False
    return F.cross_entropy(z.masked_fill(dup, -1e9), torch.arange(N))


def _prophet(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """ProphetNet's: labels are copied to a tensor that is filled first."""
    z = F.linear(x, w).view(2, N // 2, V)
    expanded = y.new_zeros(2, N // 2).fill_(-100)
    for i, part in enumerate(y.view(2, -1)):
        expanded[i, 1:] = part[1:]
    log_probs = F.log_softmax(z.view(-1, V), dim=-1, dtype=torch.float32)
    return F.nll_loss(log_probs, expanded.view(-1), reduction="mean")


def _columns(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.linear(x, w).clone()
    banned = torch.tensor([1, 5, 9])
    z[:, banned] *= 0.5
    z.index_fill_(1, banned + 20, -3.0)
    z.view(N, 16, 16).diagonal(dim1=1, dim2=2).mul_(0.1)
    return F.cross_entropy(z, y)


@pytest.mark.parametrize("loss", [_adaptive, _queue, _prophet, _columns])
def test_fault_R3_writes_beside_the_logits(loss: Any):
    check_chunked(loss, _inputs(), torch.float32, OPTIONS)


def test_fault_R3_the_module():
    module = nn.AdaptiveLogSoftmaxWithLoss(H, V, [32, 128], div_value=1.0)
    x, _, y = _inputs()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.nll_loss(module.log_prob(x), y)

    explained = autochunk.explain(loss, options=OPTIONS)(x, y)
    assert explained.chunked
    assert not explained.refused
    torch.testing.assert_close(explained.result, loss(x, y))


class _Curricular(nn.Module):
    """CurricularFace, as published but for the mask, which is a ``where``.

    Its buffer ``t`` is a mean over the whole batch, which each row's loss then needs.
    """

    def __init__(self, ahead: bool) -> None:
        super().__init__()
        margin = 0.5
        self.cos_m, self.sin_m = math.cos(margin), math.sin(margin)
        self.threshold, self.mm = math.cos(math.pi - margin), math.sin(math.pi - margin) * margin
        self.register_buffer("t", torch.zeros(1))
        self.ahead = ahead

    def update(self, target_logit: Tensor) -> None:
        with torch.no_grad():
            self.t = target_logit.mean() * 0.01 + (1 - 0.01) * self.t

    def forward(self, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        x, w = F.normalize(x), F.normalize(w)
        if self.ahead:
            self.update((x * w[y]).sum(-1))
        cos = F.linear(x, w).clamp(-1, 1)
        target = cos[torch.arange(0, x.size(0)), y].view(-1, 1)
        cos_m = target * self.cos_m - torch.sqrt(1.0 - target.pow(2)) * self.sin_m
        hard = cos > cos_m
        final = torch.where(target > self.threshold, cos_m, target - self.mm)
        if not self.ahead:
            self.update(target)
        cos = torch.where(hard, cos * (self.t + cos), cos)
        cos.scatter_(1, y.view(-1, 1), final)
        return F.cross_entropy(cos * 64.0, y)


def test_fault_R3_curricular_face_is_two_passes():
    """Refused where each row's loss needs all rows' logits, with both lines."""
    x, w, y = _inputs()
    explained = autochunk.explain(_Curricular(ahead=False), options=OPTIONS)(x, w, y)
    (refused,) = explained.refused
    assert refused.refusal.code == "two-pass"
    assert "torch.where(hard" in refused.refusal.source
    assert "target_logit.mean()" in refused.refusal.detail
    torch.testing.assert_close(explained.result, _Curricular(ahead=False)(x, w, y))


def test_fault_R3_curricular_face_in_one_pass():
    """Chunked where the targets' own cosines are computed ahead: one feature of each row."""
    module = _Curricular(ahead=True)
    x, w, y = _inputs()

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        module.t = torch.zeros((), dtype=x.dtype)
        return module(x, w, y)

    explained = check_chunked(loss, (x, w, y), torch.float32, OPTIONS)
    assert [row.strategy for row in explained.chunked] == ["fused"]


def test_fault_R3_curricular_face_as_published():
    """A mask that selects single logits is a graph break, as with Inductor."""

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        cos = F.linear(F.normalize(x), F.normalize(w)).clamp(-1, 1)
        target = cos[torch.arange(0, x.size(0)), y].view(-1, 1)
        mask = cos > target * 0.9
        hard = cos[mask]
        with torch.no_grad():
            t = target.mean() * 0.01
        cos[mask] = hard * (t + hard)
        cos.scatter_(1, y.view(-1, 1), target * 0.9)
        return F.cross_entropy(cos * 64.0, y)

    inputs = _inputs()
    compiled = torch.compile(loss, backend="autochunk", options=OPTIONS)
    check(run(compiled, inputs), run(loss, inputs), run(loss, widened(inputs)), torch.float32)


def _losses(x: Tensor, w: Tensor, b: Tensor, s: Tensor, y: Tensor) -> Any:
    z = F.linear(x, w, b)
    one, two = F.cross_entropy(z, y), F.cross_entropy(z * s, y)
    x.add_(1)
    return one + 0.5 * two.exp()


def _normalised(x: Tensor, w: Tensor, b: Tensor, s: Tensor, y: Tensor) -> Any:
    z = F.linear(F.normalize(x), w) * s
    loss = F.cross_entropy(z, y, reduction="none").square().mean() + b.sum()
    x[0].mul_(3)
    return loss


def _one_loss(x: Tensor, w: Tensor, b: Tensor, s: Tensor, y: Tensor) -> Any:
    loss = F.cross_entropy(F.linear(x, w, b) * s, y)
    x.add_(1)
    return loss


def _labels(x: Tensor, w: Tensor, b: Tensor, s: Tensor, y: Tensor) -> Any:
    loss = F.cross_entropy(F.linear(x, w, b) * s, y, reduction="none").square().mean()
    y.clone().fill_(0)
    return loss


def _weight(x: Tensor, w: Tensor, b: Tensor, s: Tensor, y: Tensor) -> Any:
    loss = F.cross_entropy(F.linear(x, w, b) * s, y, reduction="none").square().mean()
    w.mul_(0.5)
    return loss


WRITTEN = [
    (_losses, 1),
    (_normalised, 1),
    (_one_loss, 1),
    (_one_loss, 2),
    (_labels, 1),
    (_weight, 1),
]


@pytest.mark.parametrize(("loss", "calls"), WRITTEN)
def test_fault_written_after_a_frozen_head(loss: Any, calls: int):
    """The backward pass computed its logits again from what the graph had written by then."""

    def gradients(function: Any) -> list[Any]:
        x, w, y = (t.detach().clone() for t in _inputs())
        b, s = torch.zeros(V, requires_grad=True), torch.tensor(1.2, requires_grad=True)
        # One backward pass for all calls: the second one keeps no gradients.
        total = sum(function(x, w, b, s, y) for _ in range(calls))
        total.backward()
        return [total.detach(), x, w, b.grad, s.grad]

    ours = gradients(torch.compile(loss, backend="autochunk", options=OPTIONS))
    for a, b in zip(ours, gradients(loss), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5)


def test_fault_written_under_detached_logits_that_are_returned(no_codegen: Any):
    """Their inputs were returned with gradients, which nobody can ask for."""

    def step(x: Tensor, w: Tensor, b: Tensor, s: Tensor, y: Tensor) -> Any:
        hidden = torch.tanh(x @ w[:H] * s)
        z = F.linear(hidden * s, w, b).detach()
        x.add_(0.1)
        return F.cross_entropy(z, y) + s, z

    x, w, y = _inputs()
    x, s = x.detach(), torch.tensor(1.2, requires_grad=True)
    arguments = (w, torch.zeros(V, requires_grad=True), s, y)
    loss, z = torch.compile(step, backend="autochunk", options=OPTIONS)(x.clone(), *arguments)
    assert type(z) is autochunk.DeferredTensor
    expected, logits = step(x.clone(), *arguments)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(z * 1, logits)
