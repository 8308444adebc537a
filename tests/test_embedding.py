"""The token embedding's gradient, with Inductor's real kernels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import FLOOR, error
from torch import nn

from autochunk.embedding import SPARSE, add_rows

VOCABULARY, HIDDEN = 8192, 32


class Model(nn.Module):
    def __init__(self, tied: bool, **embedding):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, **embedding)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, labels):
        logits = self.head(self.mix(self.embedding(ids)).tanh())
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {}),
        (False, {"padding_idx": 3}),
        (True, {"padding_idx": 3, "scale_grad_by_freq": True}),  # the dense form
    ],
    ids=["tied", "untied", "by_frequency"],
)
def test_gradients(tied, options, dtype):
    model = Model(tied, **options).to(dtype)
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(
        model, backend="autochunk", options={"strict": True, "num_chunks": 3, "min_bytes": 0}
    )
    # Two lengths, then one that runs the graph with symbolic sizes again; the last has as many
    # tokens as a quarter of the table's rows, and most of them more than once.
    for tokens in (40, 33, VOCABULARY // SPARSE // 4):
        ids = torch.randint(0, 30, (4, tokens))
        labels = torch.randint(0, VOCABULARY, (4, tokens))
        gradients = []
        for step in (compiled, model, exact):
            model.zero_grad()
            exact.zero_grad()
            step(ids, labels).backward()
            owner = exact if step is exact else model
            gradients.append({name: p.grad.clone() for name, p in owner.named_parameters()})
        for name, ours in gradients[0].items():
            theirs, true = gradients[1][name], gradients[2][name]
            assert ours.dtype == theirs.dtype
            assert error(ours, true) <= 2 * error(theirs, true) + FLOOR[dtype], name


def test_other_accumulations():
    """Any accumulation into zeros by row is one; those of another shape stay as they are."""

    def function(x, w, y, ids, scores):
        logits = F.linear(x, w)
        rows = torch.zeros_like(w).index_put((ids,), x, accumulate=True)
        grid = torch.zeros(9, VOCABULARY).index_put((y % 9, ids), scores, accumulate=True)
        return F.cross_entropy(logits, y) + (w * rows).sum() + grid.square().sum()

    x, scores = torch.randn(40, HIDDEN), torch.randn(40)
    w = torch.randn(VOCABULARY, HIDDEN).requires_grad_()
    y, ids = torch.randint(0, VOCABULARY, (2, 40))
    ids[::3] = ids[0] - VOCABULARY  # negative, and the same row as a positive one
    compiled = torch.compile(
        function, backend="autochunk", options={"strict": True, "min_bytes": 0}
    )
    for leaf in (x, scores):
        leaf.requires_grad_()
    inputs = (x, w, y, ids, scores)
    ours = torch.autograd.grad(compiled(*inputs), (x, w, scores))
    theirs = torch.autograd.grad(function(*inputs), (x, w, scores))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_added(dtype):
    """Half precision sums once: a row that occurs 3 000 times does not saturate."""
    ids = torch.tensor([5] * 3000 + [0, 7, 7, -50, 2, 999])
    mask = (ids < 50) & (ids != 2)
    table = torch.full((50, 4), 2.0, dtype=dtype)
    expected = table.clone()
    expected[5] += 3000
    expected[0] += 2
    expected[7] += 2
    got = add_rows(table, ids, torch.ones(len(ids), 4), mask.unsqueeze(-1))
    assert torch.equal(got, expected)
    assert torch.equal(table, torch.full((50, 4), 2.0, dtype=dtype))


def test_shape_of_ids():
    ids = torch.tensor([[1, 2], [2, 3]])
    values = torch.arange(12.0).view(2, 2, 3)
    expected = torch.zeros(6, 3).index_put((ids,), values, accumulate=True)
    assert torch.equal(add_rows(torch.zeros(6, 3), ids, values, None), expected)


def test_fault_AD_gradient_of_symbolic_rows_is_no_table():
    """An element of the logits: its gradient is written into zeros of symbolic rows."""
    head = nn.Linear(8, 96, bias=False)

    @torch.compile(backend="autochunk", options={"strict": True, "min_bytes": 0})
    def function(x):
        return head(x).reshape(-1, 96)

    for rows in (12, 16, 24):
        x = torch.randn(2, rows, 8, requires_grad=True)
        loss = function(x)[0, 0] * 1.0
        given, weight = torch.autograd.grad(loss, (x, head.weight))
        expected = torch.zeros_like(weight)
        expected[0] = x[0, 0].detach()
        torch.testing.assert_close(weight, expected)
        torch.testing.assert_close(given[0, 0], head.weight[0].detach())
