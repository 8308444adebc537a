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
