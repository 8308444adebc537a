"""The token embedding's gradient, with Inductor's real kernels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autochunk.embedding import SPARSE, add_rows
from tests.compare import FLOOR, error

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_added(dtype):
    """Half precision sums once: a row that occurs 3 000 times does not saturate."""
    ids = torch.tensor([5] * 3000 + [0, 7, 7, 2])
    grad = torch.ones(len(ids), 4, dtype=dtype)
    table = torch.full((50, 4), 2.0, dtype=dtype)
    expected = table.clone()
    expected[5] += 3000
    expected[0] += 1
    expected[7] += 2  # row 2 is the padding
    assert torch.equal(add_rows(table, grad, ids, 2), expected)
    assert torch.equal(table, torch.full((50, 4), 2.0, dtype=dtype))


def test_shape_of_ids():
    ids = torch.tensor([[1, 2], [2, 3]])
    grad = torch.arange(12.0).view(2, 2, 3)
    expected = torch.zeros(6, 3).index_put((ids,), grad, accumulate=True)
    assert torch.equal(add_rows(torch.zeros(6, 3), grad, ids, -1), expected)
