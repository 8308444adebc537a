"""What lifting, planning and the rules once got wrong or would not take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import check, run, widened
from torch import Tensor

import autochunk
from autochunk import runtime
from autochunk.bench.memory import PEAK_ENVIRONMENT
from autochunk.report import collect

MIB = 2**20
OPTIONS: dict[str, Any] = {"min_bytes": 0, "chunk_rows": 7, "strict": True}
B, T, H, V = 4, 6, 8, 64
N = B * T


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    keywords = {k: options.pop(k) for k in ("dynamic",) if k in options}
    return torch.compile(function, backend="autochunk", options={**OPTIONS, **options}, **keywords)


def check_chunked(
    function: Callable[..., Any], inputs: list[Any], heads: int = 1, **options: Any
) -> autochunk.Report:
    """All heads run in chunks, and the numbers are eager's."""
    runtime.REGIONS.clear()
    with collect() as reports:
        actual = run(compiled(function, **options), inputs)
    (report,) = reports
    assert len(report.chunked) == len(report.rows) == heads, str(report)
    dtype = inputs[0].dtype
    check(actual, run(function, inputs), run(function, widened(inputs)), dtype)
    return report


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


# ---- L: what broadcasts along features or rows stays as small as it is -----------------------


def _mse_of_a_column(x, w, t):
    with torch.no_grad():  # of the warning that the shapes differ
        column = t[:, None]
    return F.mse_loss(*torch.broadcast_tensors(F.linear(x, w), column))


#: A function of x [N, H] or [B, T, H], w [V, H] and an operand, and the operand.
BROADCAST: dict[str, tuple[Callable[..., Any], Callable[[], Tensor]]] = {
    "target": (_mse_of_a_column, lambda: torch.randn(N)),
    "target that learns": (
        lambda x, w, t: F.smooth_l1_loss(F.linear(x, w), t[:, None].expand(-1, w.shape[0])),
        lambda: leaf(N),
    ),
    "target that is read elsewhere": (
        lambda x, w, t: (F.l1_loss(F.linear(x, w), e := t[:, None].expand(-1, V)), e.sum()),
        lambda: leaf(N),
    ),
    "target given as a view": (
        lambda x, w, t: F.mse_loss(F.linear(x, w), t),
        lambda: torch.randn(N, 1).expand(-1, V),
    ),
    "mask": (
        lambda x, w, t: F.linear(x, w).masked_fill((t > 0)[:, None].expand(-1, V), 0).logsumexp(-1),
        lambda: torch.randn(N),
    ),
    "view of a mask": (
        lambda x, w, t: (F.linear(x, w) * t.view(B, T, 1).expand(B, T, V).flatten(0, 1)).amax(-1),
        lambda: torch.randn(N),
    ),
    "selection of a mask": (
        lambda x, w, t: (
            F.linear(x, w).view(B, T, V)[:, :-1] * t.view(B, T, 1).expand(B, T, V)[:, 1:]
        ).logsumexp(-1),
        lambda: torch.randn(N),
    ),
    "teacher's number": (
        lambda x, w, t: F.binary_cross_entropy_with_logits(
            z := F.linear(x, w), t.sigmoid()[:, None].expand_as(z)
        ),
        lambda: torch.randn(N),
    ),
    "labels": (
        lambda x, w, t: F.linear(x, w).gather(-1, t[:, None].expand(-1, 3)).sum(),
        lambda: torch.randint(0, V, (N,)),
    ),
}


@pytest.mark.parametrize("name", BROADCAST)
@pytest.mark.parametrize("dynamic", [False, True])
def test_fault_L_features_are_not_repeated(name, dynamic, no_codegen, monkeypatch):
    """A row input has one feature where its storage has one, in the loop and for its gradient."""
    import compare

    leaf_of = compare._leaf  # copies, which a view that repeats itself does not allow
    monkeypatch.setattr(
        compare, "_leaf", lambda t: t if name == "target given as a view" and 0 in t.stride()
        else leaf_of(t)
    )  # fmt: skip
    function, operand = BROADCAST[name]
    check_chunked(function, [leaf(N, H), leaf(V, H), operand()], dynamic=dynamic)
    (loop,) = runtime.REGIONS.values()
    assert [spec.sizes for spec in loop.spec.rows[1:]] == [(1,)]


def test_fault_L_a_leaf_that_repeats_itself_has_a_gradient_at_each_place(no_codegen):
    x, w = leaf(N, H), leaf(V, H)
    target = torch.randn(N, 1).expand(-1, V).detach().requires_grad_()
    function = lambda x, w, t: F.mse_loss(F.linear(x, w), t)  # noqa: E731
    (expected,) = torch.autograd.grad(function(x, w, target), target)
    (found,) = torch.autograd.grad(compiled(function)(x, w, target), target)
    torch.testing.assert_close(found, expected)


#: As above, the rows of the loop's inputs besides the hidden states having no feature at all:
#: they are positions in a table, which is as large as what the user gave.
TABLES: dict[str, tuple[Callable[..., Any], tuple[int, ...], Callable[[], Tensor]]] = {
    "one target per sequence": (
        lambda x, w, t: F.mse_loss(F.linear(x, w), t.expand(B, T, V)),
        (B, T),
        lambda: torch.randn(B, 1, V),
    ),
    "one per sequence that learns": (
        lambda x, w, t: F.l1_loss(F.linear(x, w), t.expand(B, T, V)),
        (B, T),
        lambda: leaf(B, 1, V),
    ),
    "one per place": (
        lambda x, w, t: (F.linear(x, w) - t).square().mean(),
        (B, T),
        lambda: torch.randn(T, V),
    ),
    "one for all": (
        lambda x, w, t: (F.linear(x, w) * t.expand(B, T, V)).logsumexp(-1),
        (B, T),
        lambda: leaf(1, V),
    ),
    "one-hot labels": (
        lambda x, w, t: (
            F.linear(x, w).log_softmax(-1) * F.one_hot(t, V)[:, None].expand(-1, T, -1)
        ).sum(-1),
        (B, T),
        lambda: torch.randint(0, V, (B,)),
    ),
    "two that broadcast": (
        lambda x, w, t: (F.linear(x, w) - (t[:, None] + t[:1, None].transpose(0, 1))).amax(-1),
        (B, T),
        lambda: torch.randn(B, V),
    ),
    "shifted teacher": (
        lambda x, w, t: F.kl_div(
            F.linear(x, w)[:, :-1].log_softmax(-1), t[:, :-1].softmax(-1), reduction="sum"
        ),
        (B, T),
        lambda: torch.randn(B, T, V),
    ),
    "selected afterwards": (
        lambda x, w, t: (F.linear(x, w) - t).square()[:, 1:].sum(-1),
        (B, T),
        lambda: torch.randn(B, T, V),
    ),
    "another layout": (
        lambda x, w, t: F.mse_loss(F.linear(x, w).transpose(1, 2), t),
        (B, T),
        lambda: torch.randn(B, V, T),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_fault_L_rows_are_not_copied(name, no_codegen):
    function, rows, operand = TABLES[name]
    check_chunked(function, [leaf(*rows, H), leaf(V, H), operand()])
    (loop,) = runtime.REGIONS.values()
    assert all(spec.sizes in ((), (1,)) for spec in loop.spec.rows[1:]), loop.spec.rows


SCRIPT = """
    import json, sys, torch, torch.nn.functional as F
    from autochunk.bench.memory import PeakMemory
    B, T, H, V = 8, 64, 64, 32768
    N = B * T
    x, w = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    b, t = torch.randn(V, requires_grad=True), torch.randn(N)
    column, rows = torch.randn(N, requires_grad=True), torch.randn(B, 1, V)
    teacher = torch.randn(B, T, V)

    FUNCTIONS = {
        "mse": lambda: F.mse_loss(F.linear(x, w, b), t[:, None]),
        "smooth_l1": lambda: F.smooth_l1_loss(F.linear(x, w), t[:, None].expand(-1, V)),
        "learned": lambda: F.l1_loss(F.linear(x, w), column[:, None].expand(-1, V)),
        "mask": lambda: F.linear(x, w).where((t > 0)[:, None].expand(-1, V), 0).logsumexp(-1).sum(),
        "rows": lambda: F.mse_loss(F.linear(x, w).view(B, T, V), rows.expand(-1, T, -1)),
        "teacher": lambda: F.kl_div(
            F.linear(x, w).view(B, T, V)[:, :-1].log_softmax(-1), teacher[:, 1:].softmax(-1)
        ),
    }

    def peak(name, backend, options, grad):
        torch._dynamo.reset()
        function = torch.compile(FUNCTIONS[name], backend=backend, options=options)
        memory = PeakMemory(torch.device("cpu"))
        for step in range(2):
            x.grad = w.grad = b.grad = column.grad = None
            memory.start()
            with torch.set_grad_enabled(grad):
                loss = function()
            if grad:
                loss.backward()
            found = memory.stop()[0]
        return found

    options = {"min_bytes": 0, "chunk_rows": 32, "strict": True}
    for name in sys.argv[1:]:
        for grad in (True, False):
            found = [peak(name, "autochunk", options, grad)]
            if grad and name in ("mse", "smooth_l1"):
                found.append(peak(name, "inductor", None, grad))
            print(json.dumps([name, grad, found]), flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "names", [("mse", "smooth_l1"), ("learned", "mask", "rows", "teacher")], ids=" ".join
)
def test_fault_L_peak_with_broadcast_operands(names):
    """512 rows of 32768: logits of 64 MiB, 8 MiB of gradients, 4 MiB for a chunk of 32 rows."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT), *names],
        capture_output=True,
        text=True,
        env={**os.environ, **PEAK_ENVIRONMENT},
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 * len(names)
    for name, grad, (found, *baseline) in lines:
        bound = 22 * MIB if grad else 11 * MIB
        assert found <= bound, f"{name}, {'backward' if grad else 'forward'}: {found / MIB:.1f} MiB"
        if baseline:
            assert found <= 0.35 * baseline[0], f"{name}: {found / baseline[0]:.2f} of Inductor's"


# ---- Z0: the last, widest product is the head ------------------------------------------------


def _behind_an_mlp(x, w1, w2, w, y):
    h = x + F.linear(F.gelu(F.linear(x, w1)), w2)
    return F.cross_entropy(F.linear(h, w), y)


@pytest.mark.parametrize("ratio", [4, 8, 16, 64])
def test_fault_Z0_an_inner_layer_is_no_head(ratio, no_codegen):
    """Whatever its width, larger than the vocabulary's included."""
    inputs = [leaf(N, H), leaf(ratio * H, H), leaf(H, ratio * H), leaf(4 * V, H)]
    function = compiled(_behind_an_mlp)
    inputs.append(torch.randint(0, 4 * V, (N,)))
    with collect() as reports:
        actual = run(function, inputs)
    (report,) = reports
    assert [row.shape for row in report.chunked] == [f"{N} × {4 * V} float32"]
    (refused,) = report.refused
    assert refused.refusal.code == "feeds-layer"
    assert refused.refusal.detail == f"the {ratio * H}-wide output enters linear"
    check(actual, run(_behind_an_mlp, inputs), run(_behind_an_mlp, widened(inputs)), torch.float32)


def test_fault_Z0_the_budget_is_of_the_logits(no_codegen):
    inputs = [leaf(N, H), leaf(8 * H, H), leaf(H, 8 * H), leaf(4 * V, H)]
    options = {"min_bytes": 0, "memory_budget": 5 * 4 * V * 4, "strict": True}
    explained = autochunk.explain(_behind_an_mlp, options=options)(
        *inputs, torch.randint(0, 4 * V, (N,))
    )
    assert [row.chunks for row in explained.chunked] == ["5 × 5"]


def test_fault_Z0_a_value_wider_than_the_logits_is_planned_for(no_codegen):
    function = lambda x, w: torch.cat([F.linear(x, w)] * 3, -1).sort(-1).values[:, 0]  # noqa: E731
    options = {"min_bytes": 0, "memory_budget": 4 * 3 * V * 4, "strict": True}
    explained = autochunk.explain(function, options=options)(leaf(N, H), leaf(V, H))
    assert [row.chunks for row in explained.chunked] == ["6 × 4"]


def test_fault_Z0_heads_that_depend_on_heads_row_by_row(no_codegen):
    """Logits that are reduced and embedded are a head of their own; both are in one region."""

    def soft(x, w, e, y):
        z = F.linear(x, w)
        return F.cross_entropy(z, y) + F.cross_entropy(F.linear(z.softmax(-1) @ e, w), y)

    def greedy(x, w, e, y):
        z = F.linear(x, w)
        return F.cross_entropy(z, y) + F.cross_entropy(
            F.linear(F.embedding(z.argmax(-1), e) + x, w), y
        )

    inputs = [leaf(N, H), leaf(V, H), leaf(V, H), torch.randint(0, V, (N,))]
    for function in (soft, greedy):
        check_chunked(function, inputs, heads=2)
        assert len(runtime.REGIONS) == 1


def test_fault_Z0_a_head_behind_another_one_that_mixes_rows_says_so(no_codegen):
    def function(x, w, y):
        z = F.linear(x, w)
        first = F.cross_entropy(z, y)
        return first + F.cross_entropy(F.linear(x * first, w), y)

    explained = autochunk.explain(function, options=OPTIONS)(
        leaf(N, H), leaf(V, H), torch.randint(0, V, (N,))
    )
    assert len(explained.chunked) == 1
    (row,) = explained.refused
    assert row.refusal.code == "two-pass"
    assert row.refusal.detail == "its hidden states are computed from another head's results"


# ---- Y1, Y3: pieces of rows put together again, and copies of numbers per row ----------------


def _cross_entropy(z, y):
    return F.cross_entropy(z.reshape(-1, V), y.reshape(-1))


#: Functions of logits [B, T, V] and labels that take rows apart and put them together.
PIECES: dict[str, Callable[..., Tensor]] = {
    "stack": lambda z, y: _cross_entropy(torch.stack(list(z.view(N, V))), y),
    "stack of sequences": lambda z, y: _cross_entropy(torch.stack([*z]), y),
    "transposed": lambda z, y: _cross_entropy(torch.stack(list(z), 1), y.T),
    "cat": lambda z, y: _cross_entropy(torch.cat([s.float() for s in z]), y),
    "cat of splits": lambda z, y: _cross_entropy(torch.cat((2 * z).split(3, 1), 1), y),
    "losses": lambda z, y: torch.stack([_cross_entropy(z[i], y[i]) for i in range(B)]).mean(),
    "one row": lambda z, y: F.cross_entropy(z[1, 2], y[1, 2]),
    "one row's sum": lambda z, y: z[1, 2].square().sum() + z[1, 2].amax() + z[0, 0].std(),
    "one row's place": lambda z, y: z[1, 2].argmax() + (z[1, 2] > 0).count_nonzero(),
}


@pytest.mark.parametrize("name", PIECES)
def test_fault_Y1_pieces_of_rows(name, no_codegen):
    function = PIECES[name]
    inputs = [leaf(B, T, H), leaf(V, H), torch.randint(0, V, (B, T))]
    check_chunked(lambda x, w, y: function(F.linear(x, w), y), inputs)
    if name.startswith(("stack", "transposed", "cat")):
        (loop,) = runtime.REGIONS.values()
        assert len(loop.spec.rows) <= 3  # one pass over all rows, not a product for each piece


def test_fault_Y1_rows_in_another_order_are_a_refusal(no_codegen):
    def function(x, w, y):
        return F.cross_entropy(torch.stack([*F.linear(x, w)][::-1]), y)

    inputs = [leaf(N, H), leaf(V, H), torch.randint(0, V, (N,))]
    explained = autochunk.explain(function, options=OPTIONS)(*inputs)
    (row,) = explained.refused
    assert row.refusal.code == "mixes-rows"
    assert row.refusal.detail == "some rows are stacked, in another order or not all"


def _column(nll):
    out = nll.new_zeros(2, N // 2)
    out[:, 1] = nll.view(2, -1).mean(1)
    return out.sum()


def _halves(nll):
    out = nll.new_zeros(2, N // 2)
    out[0] = nll[: N // 2]
    out[1] = nll[N // 2 :]
    return out.square().sum()


def _like(nll):
    out = torch.zeros_like(nll)
    out[:5] = nll[:5]
    out[5:] = 2 * nll[5:]
    return out.sum()


def _cast_and_broadcast(nll):
    out = nll.new_zeros(3, N, dtype=torch.float64)
    out[:2] = nll
    return out.square().sum()


@pytest.mark.parametrize("copy", [_column, _halves, _like, _cast_and_broadcast])
def test_fault_Y3_losses_copied_into_new_tensors(copy, no_codegen):
    def function(x, w, y):
        return copy(F.cross_entropy(F.linear(x, w), y, reduction="none"))

    check_chunked(function, [leaf(N, H), leaf(V, H), torch.randint(0, V, (N,))])


# ---- N, P, E: few rows, no rows, few outputs -------------------------------------------------


def _planned(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Any, autochunk.Report]:
    """The report on a head of so many rows, which is compiled for made-up tensors only."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), collect() as reports:
        x, w = torch.empty(rows, 64, dtype=dtype), torch.empty(vocabulary, 64, dtype=dtype)
        function = lambda x, w: F.linear(x, w).logsumexp(-1)  # noqa: E731
        torch.compile(function, backend="autochunk", options={"min_bytes": 0, "strict": True})(x, w)
    (report,) = reports
    (row,) = report.rows
    return row, report


@pytest.mark.parametrize(
    ("rows", "vocabulary", "dtype", "chunks"),
    [
        (96, 262144, torch.float32, "3 × 32"),
        (128, 262144, torch.float32, "4 × 32"),
        (20, 524288, torch.float32, "1 × 20"),
        (96, 262144, torch.bfloat16, "2 × 64"),
        (96, 4096, torch.float32, "1 × 96"),
    ],
)
def test_fault_N_few_rows_of_large_logits_are_cut(rows, vocabulary, dtype, chunks, no_codegen):
    row, report = _planned(rows, vocabulary, dtype)
    assert row.chunks == chunks
    whole = rows * vocabulary * dtype.itemsize
    note = "all rows are one chunk: its logits exist, once, and become their gradient"
    if chunks.startswith("1 "):
        assert row.avoided_bytes == 0
        assert row.chunk_bytes == whole
        assert f"note on {row.head}: {note}" in str(report)
    else:
        assert row.avoided_bytes == whole
        assert row.chunk_bytes == whole * int(chunks.split(" × ")[1]) // rows
        assert note not in str(report)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_fault_P_no_rows(shape, no_codegen):
    def function(x, w, y):
        return F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), reduction="sum")

    inputs = [leaf(*shape, H), leaf(V, H), torch.randint(0, V, shape)]
    with collect() as reports:
        actual = run(compiled(function), inputs)
    check(actual, run(function, inputs), run(function, widened(inputs)), torch.float32)
    (row,) = reports[0].rows
    assert row.refusal.code == "single-row"
    assert row.refusal.detail == "no rows of logits"


@pytest.mark.parametrize("outputs", [2, H // 2, H - 1])
def test_fault_E_fewer_outputs_than_inputs(outputs, no_codegen):
    def function(z, y):
        return F.cross_entropy(z.tanh(), y)

    def with_head(x, w, y):
        return function(F.linear(x, w), y)

    def chunked(x, w, y):
        return autochunk.chunked_linear(function, x, w, y, chunk_rows=7)

    inputs = [leaf(N, H), leaf(outputs, H), torch.randint(0, 2, (N,))]
    with collect() as reports:
        actual = run(chunked, inputs)
    (row,) = reports[0].rows
    assert row.refusal is None
    assert row.chunks == "4 × 6"
    check(actual, run(with_head, inputs), run(with_head, widened(inputs)), torch.float32)


def test_fault_E_a_layer_inside_of_the_function_is_no_head(no_codegen):
    def function(z, values, y):
        return F.mse_loss((z.softmax(-1) @ values).sum(-1), y)

    inputs = [leaf(N, 4 * V), leaf(V, 4 * V), leaf(V, 2), torch.randn(N)]
    chunked = lambda x, w, *rest: autochunk.chunked_linear(function, x, w, *rest)  # noqa: E731
    with collect() as reports:
        actual = run(chunked, inputs)
    (row,) = reports[0].rows
    assert row.refusal is None
    whole = lambda x, w, *rest: function(F.linear(x, w), *rest)  # noqa: E731
    check(actual, run(whole, inputs), run(whole, widened(inputs)), torch.float32)
