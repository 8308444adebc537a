"""Every rule has a sample; each is run in chunks and compared with the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compare import check_chunked

import autochunk
from autochunk import rules
from autochunk.rules import RULES, Boundary, match_view
from autochunk.types import RowValue

aten = torch.ops.aten
B, T, H, V = 2, 6, 8, 64
OPTIONS = {"min_bytes": 0, "chunk_rows": 5, "strict": True}


PLACES = torch.tensor([40, 3, 17])


def _indices(z, k=1):
    return (torch.arange(B * T * k).view(B, T, k) * 7) % V


def _targets(z):
    return _constant(B, T, V).to(z)


#: For each op with a rule: a function of logits [B, T, V] that lowers to it and ends narrow.
SAMPLES = {
    aten.alias.default: lambda z: aten.alias.default(z).logsumexp(-1),
    aten.detach.default: lambda z: (z - z.detach().amax(-1, keepdim=True)).logsumexp(-1),
    aten.masked_fill.Tensor: lambda z: z.masked_fill(z > 1, torch.tensor(0.5)).logsumexp(-1),
    aten.zeros_like.default: lambda z: torch.where(z > 0, z, torch.zeros_like(z)).sum(-1),
    aten.ones_like.default: lambda z: (z * torch.ones_like(z)).logsumexp(-1),
    aten.full_like.default: lambda z: torch.maximum(z, torch.full_like(z, 0.1)).sum(-1),
    aten.empty_like.default: lambda z: aten.fill.Scalar(torch.empty_like(z), 2.0).mul(z).sum(-1),
    aten.fill.Scalar: lambda z: (aten.fill.Scalar(z, 2.0) * z).sum(-1),
    aten.fill.Tensor: lambda z: (aten.fill.Tensor(z, torch.tensor(2.0)) * z).sum(-1),
    aten.bucketize.Tensor: lambda z: torch.bucketize(
        z.detach(), torch.tensor([-1.0, 0.0, 1.0], dtype=z.dtype)
    ).sum(-1),
    aten._prelu_kernel.default: lambda z: F.prelu(z, torch.tensor([0.2], dtype=z.dtype)).sum(-1),
    aten.mse_loss.default: lambda z: F.mse_loss(z, _constant(V).to(z).expand_as(z)),
    aten.smooth_l1_loss.default: lambda z: F.smooth_l1_loss(z, _targets(z), beta=0.4),
    aten.huber_loss.default: lambda z: F.huber_loss(z, _targets(z), delta=0.6),
    aten.binary_cross_entropy.default: lambda z: F.binary_cross_entropy(
        (4 * z).sigmoid(), _targets(z).abs(), weight=_constant(V).to(z).abs()
    ),
    aten.soft_margin_loss.default: lambda z: F.soft_margin_loss(z, _targets(z).sign()),
    aten.log_sigmoid_forward.default: lambda z: F.logsigmoid(z).sum(-1),
    aten.glu.default: lambda z: F.glu(z, -1).square().sum(-1),
    aten._to_copy.default: lambda z: z.double().logsumexp(-1),
    aten.sum.dim_IntList: lambda z: z.square().sum(-1),
    aten.sum.default: lambda z: z.square().sum(),
    aten.mean.dim: lambda z: z.square().mean(-1),
    aten.mean.default: lambda z: z.square().mean(),
    aten.amax.default: lambda z: z.amax(-1),
    aten.amin.default: lambda z: z.amin(-1),
    aten.max.default: lambda z: z.max(),
    aten.min.default: lambda z: z.min(),
    aten.any.default: lambda z: (z > 4).any(),
    aten.any.dims: lambda z: torch.any(z > 4, dim=(2,)),
    aten.any.dim: lambda z: aten.any.dim(z > 2, -1),
    aten.all.default: lambda z: (z > -4).all(),
    aten.all.dims: lambda z: torch.all(z > -1, dim=(2,)),
    aten.all.dim: lambda z: aten.all.dim(z > -2, -1),
    aten.logsumexp.default: lambda z: z.logsumexp(-1),
    aten.prod.dim_int: lambda z: (1 + 0.01 * z).prod(-1),
    aten.argmax.default: lambda z: z.argmax(-1),
    aten.argmin.default: lambda z: z.argmin(-1, keepdim=True),
    aten.max.dim: lambda z: z.max(-1).values,
    aten.min.dim: lambda z: z.min(-1, keepdim=True)[0],
    aten.median.dim: lambda z: z.median(-1).values,
    aten.mode.default: lambda z: z.round().mode(-1).values,
    aten.kthvalue.default: lambda z: z.kthvalue(3, dim=-1).values,
    aten.var.correction: lambda z: z.var(-1),
    aten.std.correction: lambda z: z.std(-1, unbiased=False),
    aten.var_mean.correction: lambda z: torch.var_mean(z, -1)[0],
    aten.linalg_vector_norm.default: lambda z: z.norm(dim=-1),
    aten.count_nonzero.default: lambda z: torch.count_nonzero(z > 0, dim=-1),
    aten.count_nonzero.dim_IntList: lambda z: torch.count_nonzero(z > 0, dim=(2,)),
    aten.nansum.default: lambda z: aten.nansum.default(z.square(), [-1]),
    aten._softmax.default: lambda z: z.softmax(-1).square().sum(-1),
    aten._log_softmax.default: lambda z: z.log_softmax(-1).exp().square().sum(-1),
    aten._safe_softmax.default: lambda z: aten._safe_softmax.default(z, -1).square().sum(-1),
    aten.cummax.default: lambda z: z.cummax(-1).values.sum(-1),
    aten.cummin.default: lambda z: z.cummin(-1).values.sum(-1),
    aten.cumsum.default: lambda z: z.cumsum(-1).square().sum(-1),
    aten.cumprod.default: lambda z: (1 + 0.01 * z).cumprod(-1).sum(-1),
    aten.logcumsumexp.default: lambda z: z.logcumsumexp(-1).sum(-1),
    aten.sort.default: lambda z: z.sort(-1).values[..., :3],
    aten.sort.stable: lambda z: z.sort(dim=-1, stable=True).values[..., :3],
    aten.topk.default: lambda z: z.topk(4, dim=-1).values,
    aten.flip.default: lambda z: z.flip(-1)[..., :5],
    aten.roll.default: lambda z: z.roll(3, -1)[..., :5],
    aten.gather.default: lambda z: z.gather(-1, _indices(z, 2)),
    aten.scatter.value: lambda z: z.scatter(-1, _indices(z), 0.5).logsumexp(-1),
    aten.scatter.src: lambda z: z.scatter(-1, _indices(z), z[..., :1] * 2).logsumexp(-1),
    aten.scatter_add.default: lambda z: z.scatter_add(
        -1, _indices(z), torch.ones(B, T, 1, dtype=z.dtype)
    ).logsumexp(-1),
    aten.scatter.value_reduce: lambda z: aten.scatter.value_reduce(
        z.detach(), -1, _indices(z), 2.0, reduce="add"
    ).logsumexp(-1),
    aten.scatter_reduce.two: lambda z: z.scatter_reduce(
        -1, _indices(z), z[..., :1] * 2, "amax"
    ).logsumexp(-1),
    aten.index_put.default: lambda z: _assign(z, (..., torch.tensor([3, -1])), 0.5).logsumexp(-1),
    aten.select_scatter.default: lambda z: _assign(z, (..., 3), z[..., 5] * 2).logsumexp(-1),
    aten.slice_scatter.default: lambda z: _assign(z, (..., slice(40, None)), -9.0).logsumexp(-1),
    aten.index_fill.int_Scalar: lambda z: z.index_fill(-1, PLACES, -2.0).logsumexp(-1),
    aten.index_fill.int_Tensor: lambda z: z.index_fill(
        -1, PLACES - V, torch.tensor(-2.0, dtype=z.dtype)
    ).logsumexp(-1),
    aten.index_copy.default: lambda z: z.index_copy(-1, PLACES, 2 * z[..., :3]).logsumexp(-1),
    aten.index_add.default: lambda z: (
        z.view(B, T, 8, 8)
        .index_add(2, PLACES // 8, _constant(B, T, 3, 8).to(z))
        .logsumexp((-1, -2))
    ),
    aten.diagonal.default: lambda z: z.view(B, T, 8, 8).diagonal(1, -1, -2).logsumexp(-1),
    aten.diagonal_scatter.default: lambda z: (
        z.view(B, T, 8, 8).diagonal_scatter(3 * z[..., :7], -1, 3, 2).logsumexp((-1, -2))
    ),
    aten.tril.default: lambda z: z.view(B, T, 8, 8).tril(1).exp().sum((-1, -2)),
    aten.triu.default: lambda z: z.view(B, T, 8, 8).triu(-1).exp().sum((-1, -2)),
    aten.index_select.default: lambda z: z.index_select(-1, torch.tensor([3, 1, 3])),
    aten.slice.Tensor: lambda z: z[..., 2:40:3].logsumexp(-1),
    aten.select.int: lambda z: z[..., 3] * z[:, :, -1],
    aten.cat.default: lambda z: torch.cat([z, z[..., :4] * 2], -1).logsumexp(-1),
    aten.stack.default: lambda z: torch.stack([z, z * 2], 2).logsumexp(2).sum(-1),
    aten.constant_pad_nd.default: lambda z: F.pad(z, (1, 2), value=0.3).logsumexp(-1),
    aten.index.Tensor: lambda z: z[..., torch.tensor([3, 1, 3])],
    aten.mm.default: lambda z: (z.view(-1, V) @ _constant(V, 3).to(z)).tanh(),
    aten.addmm.default: lambda z: torch.addmm(
        _constant(3).to(z), z.reshape(-1, V), _constant(V, 3).to(z)
    ),
    aten.mv.default: lambda z: torch.mv(z.reshape(-1, V), _constant(V).to(z)),
    aten.bmm.default: lambda z: torch.bmm(z.view(-1, 1, V), z.view(-1, V, 1)),
    aten.embedding.default: lambda z: F.embedding(z.argmax(-1), _constant(V, 3).to(z)),
    aten.view.default: lambda z: z.view(B, T, 4, 16).logsumexp(-1),
    aten._unsafe_view.default: lambda z: aten._unsafe_view.default(z, [B * T, V]).logsumexp(-1),
    aten.unsqueeze.default: lambda z: z.unsqueeze(1).unsqueeze(-1).logsumexp(-2),
    aten.squeeze.dim: lambda z: z.logsumexp(-1, keepdim=True).squeeze(-1),
    aten.squeeze.dims: lambda z: torch.squeeze(z.logsumexp(-1, keepdim=True), (2, 0)),
    aten.squeeze.default: lambda z: z.logsumexp(-1, keepdim=True).squeeze(),
    aten.permute.default: lambda z: z.permute(2, 0, 1).logsumexp(0),
    aten.transpose.int: lambda z: z.transpose(1, 2).logsumexp(1),
    aten.t.default: lambda z: z.view(-1, V).t().logsumexp(0),
    aten.repeat.default: lambda z: z.repeat(2, 1, 1, 3).logsumexp(-1).sum(0),
    aten.unfold.default: lambda z: z.unfold(-1, 8, 4).logsumexp(-1).sum(-1),
    aten.expand.default: lambda z: (
        z.logsumexp(-1, keepdim=True).expand(B, T, 4) * _constant(4).to(z)
    ),
}

#: A few of those that have a rule by their tag.
POINTWISE = {
    "tanh": lambda z: z.tanh().sum(-1),
    "where": lambda z: torch.where(z > 0, z, -z).sum(-1),
    "clamp": lambda z: z.clamp(-1, 1).sum(-1),
    "pow": lambda z: z.pow(2).sum(-1),
    "broadcast": lambda z: (z - z.amax(-1, keepdim=True)).exp().sum(-1),
    "per row": lambda z: (z * torch.arange(T).view(1, T, 1)).logsumexp(-1),
    "per batch": lambda z: (z + torch.arange(B).view(B, 1, 1)).logsumexp(-1),
    "per feature": lambda z: (z * torch.arange(V)).logsumexp(-1),
    "gelu": lambda z: F.gelu(z).sum(-1),
}


def _constant(*shape):
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)


def _assign(z, where, value):
    z = z.clone()
    z[where] = value
    return z


#: Writes over elements of the logits, each another branch of one rule.
WRITES = {
    "mask": lambda z: _assign(z, z.detach() > 1, -3.0).logsumexp(-1),
    "given mask": lambda z: _assign(z, _indices(z, V) % 3 == 0, 0.0).logsumexp(-1),
    "features": lambda z: _assign(z, (..., torch.tensor([0, 9])), -3.0).logsumexp(-1),
    "label": lambda z: _assign(
        z, (torch.arange(B)[:, None], torch.arange(T), _indices(z)[..., 0]), -3.0
    ).logsumexp(-1),
    "margin": lambda z: _margin(z.view(-1, V)).logsumexp(-1),
    "added": lambda z: (
        z.view(-1, V)
        .index_put(
            (torch.arange(B * T), _indices(z).view(-1)), z.mean(-1).view(-1), accumulate=True
        )
        .logsumexp(-1)
    ),
    "places": lambda z: _assign(z, (..., PLACES - V), z[..., PLACES] * 0.5).logsumexp(-1),
    "places, added": lambda z: aten.index_put.default(
        z, [None, None, PLACES], _constant(3).to(z), True
    ).logsumexp(-1),
    "places before other features": lambda z: _assign(
        z.view(B, T, 8, 8), (slice(None), slice(None), PLACES // 8), z.view(B, T, 8, 8)[..., :1, :]
    ).logsumexp((-1, -2)),
    "into a new tensor": lambda z: _assign(
        z.new_empty(B, T, V), (..., slice(0, V)), z.log_softmax(-1)
    )[..., 3],
    "one column of a new tensor": lambda z: _assign(
        z.new_zeros(B, T, V), (..., 7), z.logsumexp(-1)
    ).sum(-1),
    "a column of a tensor beside": lambda z: aten.select_scatter.default(
        _targets(z), z.amax(-1), 2, 7
    ).logsumexp(-1),
    "row value": lambda z: _assign(z, (..., slice(1)), z.amax(-1, keepdim=True)).sum(-1),
}


def _margin(z):
    z = z * 1.0
    z[torch.arange(B * T), _indices(z).view(-1) - V] -= 0.35
    return z


@pytest.mark.parametrize("name", WRITES)
def test_writes(name, no_codegen):
    _compare(WRITES[name])


ROWS, COLUMNS = torch.tensor([1, 0, 1, 1, 0]), torch.tensor([3, 5, -6, 3, 0])
LABELS = torch.tensor([7, -1, 63, 2, 0])

#: One feature of each of some rows, by number.
PAIRS = {
    "any rows": lambda z: z.softmax(-1)[ROWS, COLUMNS, LABELS].log(),
    "flat rows": lambda z: z.log_softmax(-1).view(-1, V)[COLUMNS - 6, LABELS],
    "one label": lambda z: z[ROWS, COLUMNS, 3] - z.logsumexp(-1)[ROWS, COLUMNS],
    "a table of rows": lambda z: z.log_softmax(-1).view(-1, V)[
        torch.arange(4, 8).view(2, 2), LABELS[:4].view(2, 2)
    ],
    "labels that broadcast": lambda z: z.log_softmax(-1).view(-1, V)[
        torch.arange(4, 8).view(2, 2), LABELS[:2]
    ],
}


@pytest.mark.parametrize("name", PAIRS)
def test_rows_and_labels(name, no_codegen):
    _compare(PAIRS[name])


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (
            lambda z: z.view(-1, V)[torch.arange(12).repeat(2), torch.arange(24)],
            "would be computed again",
        ),
        (lambda z: z[:, COLUMNS, LABELS], "some rows"),
        (lambda z: z.view(-1, V)[torch.tensor([3]), LABELS], "not one index per row"),
        (lambda z: _assign(z, (slice(None), 0), 1.0).logsumexp(-1), "overwritten"),
        (lambda z: _assign(z, (torch.tensor([0, 1]), torch.tensor([2, 3])), 1.0), "overwritten"),
        (lambda z: _assign(z, z > 1, z[z > 1] * 2).logsumexp(-1), ""),
        (lambda z: torch.cat([z[:, 1:], z[:, :1]], 1).logsumexp(-1), "rows are concatenated"),
        (lambda z: z.repeat(1, 2, 1).logsumexp(-1), "rows are repeated"),
        (lambda z: z.unfold(1, 2, 1).logsumexp(-1), "windows of rows"),
    ],
)
def test_rows_are_not_mixed(sample, reason, no_codegen):
    """Refused with a reason, and computed as ever."""
    x, w = torch.randn(B, T, H), torch.randn(V, H)

    def function(x, w):
        return sample(F.linear(x, w)).float().mean()

    explained = autochunk.explain(function, options=OPTIONS)(x, w)
    # Of a graph that breaks behind the logits they are deferred, which is no chunk of theirs.
    assert all(row.strategy == "deferred" for row in explained.chunked)
    assert reason in str(explained)
    torch.testing.assert_close(explained.result, function(x, w))


def _compare(sample):
    inputs = [
        torch.randn(B, T, H).requires_grad_(),
        (torch.randn(V, H) * 0.5).requires_grad_(),
    ]

    def function(x, w):
        return sample(F.linear(x, w))

    check_chunked(function, inputs, torch.float32, OPTIONS)


def test_every_rule_has_a_sample():
    assert set(SAMPLES) == set(RULES)


@pytest.mark.parametrize("target", sorted(SAMPLES, key=str), ids=str)
def test_rule(target, no_codegen, monkeypatch):
    applied = []
    original = RULES[target]

    def apply(walk, node):
        applied.append(node)
        return original.apply(walk, node)

    monkeypatch.setitem(RULES, target, replace(original, apply=apply))
    _compare(SAMPLES[target])
    assert applied, f"the sample of {target} does not reach its rule"


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_by_tag(name, no_codegen):
    _compare(POINTWISE[name])


def test_a_broken_rule_is_caught(no_codegen, monkeypatch):
    """The comparison must notice a rule that lets rows mix: here softmax over the sequence."""

    def wrong(walk, node):
        x = walk.row_argument(node, node.args[0])
        emitted = walk.emit(aten._softmax.default, x.node, 0, False)
        return walk.result(node, emitted, x.is_row, x, [x])

    monkeypatch.setitem(RULES, aten._softmax.default, rules.Rule(wrong, "broken"))
    with pytest.raises(AssertionError, match="error"):
        _compare(lambda z: z.softmax(1).square().sum(-1))


def test_a_shifted_reduction_is_caught(no_codegen, monkeypatch):
    original = RULES[aten.logsumexp.default]

    def wrong(walk, node):
        value = original.apply(walk, node)
        return replace(value, node=walk.emit(aten.roll.default, value.node, [1], [0]))

    monkeypatch.setitem(RULES, aten.logsumexp.default, rules.Rule(wrong, "broken"))
    with pytest.raises(AssertionError, match="error"):
        _compare(lambda z: z.logsumexp(-1))


@pytest.mark.parametrize(
    ("shape", "is_row", "view", "expected"),
    [
        ((2, 6, 8), (True, True, False), (12, 8), (True, False)),
        ((12, 8), (True, False), (2, 6, 8), (True, True, False)),
        ((12, 8), (True, False), (1, 12, 8), (False, True, False)),
        ((12, 8), (True, False), (12, 2, 4), (True, False, False)),
        ((2, 8, 6), (True, False, True), (2, 8, 1, 6), (True, False, False, True)),
        ((2, 8, 6), (True, False, True), (2, 48), None),
        ((12, 8), (True, False), (96,), None),
        ((12, 8), (True, False), (24, 4), None),
        ((0, 8), (True, False), (0, 8), (True, False)),
    ],
)
def test_match_view(shape, is_row, view, expected):
    value = RowValue(None, is_row, shape, (), frozenset(), False, torch.empty(0))
    assert match_view(value, view) == expected


def test_boundary_carries_its_reason():
    boundary = Boundary("mixes-rows", "it does")
    assert (boundary.code, str(boundary)) == ("mixes-rows", "it does")
