"""Heads that are several, or no plain linear: what was once refused, wrongly named or not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autochunk.report import collect

OPTIONS: dict[str, Any] = {"min_bytes": 0, "chunk_rows": 7, "strict": True}
N, H, K, V = 24, 8, 3, 64


def compiled(function: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="autochunk", options=OPTIONS, **keywords)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def labels(*shape: int) -> Tensor:
    made = torch.randint(V, shape)
    made.view(-1)[::5] = -100
    return made


# ---- R2: heads that are no linear ------------------------------------------------------------


def _first(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of logits whose features come last, of labels in the same order."""
    return F.cross_entropy(logits.movedim(-1, 1), y)


OTHER: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
    "bmm": (lambda x, w, y: _first(torch.bmm(x, w), y), [leaf(K, N, H), leaf(K, H, V)]),
    "baddbmm": (
        lambda x, w, y: _first(torch.baddbmm(torch.ones(1), x, w), y),
        [leaf(K, N, H), leaf(K, H, V)],
    ),
    "a weight for each codebook": (
        lambda x, w, y: _first((x[:, :, None] @ w[None]).squeeze(2), y.view(N, K)),
        [leaf(N, K, H), leaf(K, H, V)],
    ),
    "einsum": (
        lambda x, w, y: _first(torch.einsum("knh,kvh->knv", x, w), y),
        [leaf(K, N, H), leaf(K, V, H)],
    ),
    "a wide kernel": (
        lambda x, w, y: F.cross_entropy(F.conv1d(x, w, padding=1), y),
        [leaf(K, 4, N), leaf(V, 4, 3)],
    ),
    "groups": (
        lambda x, w, y: F.cross_entropy(F.conv1d(x, w, groups=2), y),
        [leaf(K, 4, N), leaf(V, 2, 1)],
    ),
}


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", list(OTHER))
def test_fault_R2_a_head_that_is_no_linear_has_a_line(name: str, dynamic: bool) -> None:
    function, inputs = OTHER[name]
    y = labels(K, N)
    with collect() as reports:
        result = compiled(function, dynamic=dynamic)(*inputs, y)
    torch.testing.assert_close(result, function(*inputs, y))
    (row,) = reports[0].rows
    assert row.refusal is not None
    assert row.refusal.code == "other-product"
    assert "test_faults_heads.py" in row.refusal.source
    assert row.shape.endswith(f"× {V} float32")


LAYERS: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
    "attention": (
        lambda q, k: ((q @ k.transpose(1, 2)).softmax(-1) @ k).sum(),
        [leaf(K, V, H), leaf(K, V, H)],
    ),
    "attention by einsum": (
        lambda q, k: torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k), k).sum(),
        [leaf(K, V, H), leaf(K, V, H)],
    ),
    "depthwise": (
        lambda x, w: F.conv1d(x, w, groups=V).square().sum(),
        [leaf(K, V, N), leaf(V, 1, 3)],
    ),
    "expanding": (
        lambda x, w, v: F.conv1d(F.conv1d(x, w, padding=1).relu(), v, padding=1).square().sum(),
        [leaf(K, 4, N), leaf(V, 4, 3), leaf(4, V, 3)],
    ),
    "a score of a row": (
        lambda x, w: torch.einsum("nh,h->n", x, w).square().sum(),
        [leaf(N, H), leaf(H)],
    ),
}


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("name", list(LAYERS))
def test_fault_R2_a_layer_has_no_line(name: str) -> None:
    function, inputs = LAYERS[name]
    with collect() as reports:
        compiled(function)(*inputs)
    assert not reports[0].rows, str(reports[0])
