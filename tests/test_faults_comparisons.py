"""Logits that are compared with what is picked of them (fault O): eager has both of one tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import check, run, widened
from torch import Tensor

import autochunk
from autochunk.report import collect

H, V, N = 64, 384, 136
OPTIONS = {"min_bytes": 0, "chunk_rows": 64, "strict": True}

POSTS = {
    "a scale": lambda z: z * 1.1,
    "a softcap": lambda z: 30 * torch.tanh(z / 30),
}


def compared(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The label's rank, how many share the maximum, what a top-5 filter keeps."""
    with torch.no_grad():
        return (
            (z > z.gather(-1, y[:, None])).sum(-1),
            (z > z[torch.arange(z.shape[0]), y][:, None]).sum(-1),
            (z == z.amax(-1, keepdim=True)).sum(-1),
            (z >= z.topk(5)[0][..., -1, None]).sum(-1),
        )


@pytest.mark.parametrize(
    ("place", "dynamic"), [("inside", True), ("outside", False), ("outside", True)]
)
@pytest.mark.parametrize(
    ("post", "dtype"),
    [("a scale", torch.bfloat16), ("a softcap", torch.float32), ("a softcap", torch.bfloat16)],
)
def test_fault_O_logits_compared_with_what_is_picked_of_them(post, dtype, place, dynamic):
    """The two were off by one rounding: a row's maximum equalled none of its logits.

    The kernel that picks had the logits in another layout than the one that compares, rounded to
    half precision what the other did not, and had scalar code for ``tanh``.
    """
    torch.manual_seed(0)
    x_NH = torch.randn(N, H, dtype=dtype)
    head = torch.nn.Linear(H, V, dtype=dtype)
    y_N = torch.randint(0, V, (N,))

    def step(x_NH: Tensor, y_N: Tensor) -> tuple[Tensor, ...]:
        z_NV = POSTS[post](head(x_NH))
        loss = F.cross_entropy(z_NV, y_N)
        return (loss, *compared(z_NV, y_N)) if place == "inside" else (loss, z_NV)

    function = torch.compile(step, backend="autochunk", options=OPTIONS, dynamic=dynamic)
    with collect() as reports:
        for _ in range(2):  # deferred logits: op by op first, then compiled
            found = function(x_NH, y_N)
            if place == "outside":
                found = (found[0], *compared(found[1], y_N))
    assert all(row.refusal is None for report in reports for row in report.rows)
    expected = compared(POSTS[post](head(x_NH)), y_N)
    for ours, theirs in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_fault_O_a_gather_is_hoisted_where_it_equals_what_it_picks():
    """Of ops that are rounded correctly; before a ``tanh`` it costs a pass to stay."""
    before = set(autochunk.runtime.REGIONS)
    x_NH, w_VH = torch.randn(N, H), torch.randn(V, H, requires_grad=True)
    y_N = torch.randint(0, V, (N,))

    def graph(post: str) -> str:
        @torch.compile(backend="autochunk", options=OPTIONS)
        def step(x_NH: Tensor, w_VH: Tensor) -> Tensor:
            with torch.no_grad():
                return POSTS[post](F.linear(x_NH, w_VH)).gather(-1, y_N[:, None])

        torch._dynamo.reset()
        step(x_NH, w_VH)
        (name,) = set(autochunk.runtime.REGIONS) - before
        before.add(name)
        return autochunk.runtime.REGIONS[name].value_kernel.graph

    assert "aten.gather" in graph("a scale")
    assert "aten.gather" not in graph("a softcap")


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("pick", ["pairs", "columns"])
def test_fault_O_features_of_a_symbolic_size_are_indexed(pick):
    """A weight that is an argument has a symbolic vocabulary: NameError, or a refusal."""
    x_NH, w_VH = torch.randn(N, H), torch.randn(V, H, requires_grad=True)
    y_N = torch.randint(-V, V, (N,))

    def step(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        logp_NV = F.linear(x_NH, w_VH).log_softmax(-1)
        if pick == "pairs":
            return -logp_NV[torch.arange(x_NH.shape[0]), y_N].mean()
        return -logp_NV[:, y_N[:5]].mean()

    inputs = (x_NH, w_VH, y_N)
    with collect() as reports:
        compiled = torch.compile(step, backend="autochunk", options=OPTIONS, dynamic=True)
        actual = run(compiled, inputs)
    assert [row.strategy for row in reports[0].rows] == ["fused"]
    check(actual, run(step, inputs), run(step, widened(inputs)), torch.float32)
