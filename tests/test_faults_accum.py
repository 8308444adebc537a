"""Several losses of one weight: one gradient of its size, however many wait for it."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import autochunk
from autochunk import keeping
from autochunk.bench.memory import PEAK_ENVIRONMENT
from tests.compare import FLOOR, error

MIB = 2**20
#: Fewer rows than hidden size: a weight's gradient takes more bytes than logits.
ROWS, HIDDEN, VOCABULARY = 24, 64, 1024
OPTIONS = {"min_bytes": 0, "chunk_rows": 7, "strict": True}


def loss_of(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)


def batches(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, ROWS, HIDDEN, generator=generator, dtype=dtype)
    w = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype) * 0.3
    y = torch.randint(0, VOCABULARY, (count, ROWS), generator=generator)
    return [a.clone().requires_grad_() for a in x], w.requires_grad_(), y


def expected(scales):
    """Gradients of the sum of the losses × ``scales``, in float64."""
    xs, w, ys = batches(len(scales))
    xs, w = [x.detach().double().requires_grad_() for x in xs], w.detach().double().requires_grad_()
    sum(s * loss_of(x, w, y) for s, x, y in zip(scales, xs, ys, strict=True)).backward()
    return [x.grad for x in xs], w.grad


def check(xs, w, scales):
    want_xs, want_w = expected(scales)
    assert error(w.grad, want_w) < 2 * FLOOR[torch.float32]
    for x, want in zip(xs, want_xs, strict=True):
        if want is not None and want.abs().max() > 0:
            assert error(x.grad, want) < 2 * FLOOR[torch.float32]


@pytest.fixture
def compiled():
    """A compiled loss, and a history as a fresh process has it."""
    keeping._HISTORIES.clear()
    counters["autochunk"].clear()
    return torch.compile(loss_of, backend="autochunk", options=OPTIONS)


def kept_bytes():
    """Bytes of all gradients that are kept from forward to backward."""
    gc.collect()
    tickets = [ticket for ticket in list(keeping._TICKETS.values()) if ticket.gradients]
    return sum(g.nbytes for ticket in tickets for g in ticket.gradients)


def counts():
    return counters["autochunk"]["early gradients"], counters["autochunk"]["late gradients"]


def test_fault_Z1_a_loss_on_its_own_has_its_gradients_early(compiled):
    for _ in range(3):
        (x,), w, (y,) = batches(1)
        loss = compiled(x, w, y)
        assert kept_bytes() == w.nbytes + x.nbytes
        (1.7 * loss).backward()
        assert kept_bytes() == 0
        check([x], w, [1.7])
    assert counts() == (3, 0)


def test_fault_Z1_losses_that_wait_keep_nothing(compiled, caplog):
    """The second call drops what the first keeps; in the next step no call computes it."""
    scales = [1.0, 0.3, 2.0]
    for step in range(2):
        xs, w, ys = batches(3)
        with caplog.at_level(logging.INFO, "autochunk"):
            losses = [compiled(x, w, y) for x, y in zip(xs, ys, strict=True)]
        assert kept_bytes() == 0
        sum(s * loss for s, loss in zip(scales, losses, strict=True)).backward()
        check(xs, w, scales)
        assert counts() == (1, 2 + 3 * step)
    said = [r for r in caplog.records if "several losses of one weight wait" in r.message]
    assert [record.levelno for record in said] == [logging.INFO]


def test_fault_Z1_losses_one_by_one_are_early_again(compiled):
    xs, w, ys = batches(3)
    sum(compiled(x, w, y) for x, y in zip(xs, ys, strict=True)).backward()
    for _ in range(keeping.TRIAL):
        compiled(xs[0], w, ys[0]).backward()
    assert counts()[0] == 1
    compiled(xs[0], w, ys[0]).backward()
    assert counts()[0] == 2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_fault_Z1_backward_passes_in_any_order(compiled, order):
    xs, w, ys = batches(3)
    losses = [compiled(x, w, y) for x, y in zip(xs, ys, strict=True)]
    for i in order:
        losses[i].backward()
        losses[i] = None
    check(xs, w, [1, 1, 1])


def test_fault_Z1_a_backward_pass_that_never_comes(compiled):
    """The gradients go with the graph; the loss that is left has the right ones."""
    xs, w, ys = batches(2)
    first, second = compiled(xs[0], w, ys[0]), compiled(xs[1], w, ys[1])
    del first
    second.backward()
    check(xs, w, [0, 1])
    loss = compiled(xs[0], w, ys[0])
    del loss
    assert kept_bytes() == 0


@torch._functorch.config.patch(donated_buffer=False)  # of another test, from the cache
def test_fault_Z1_retain_graph(compiled):
    """Twice, alone and with another loss in between, and a third time without."""
    (x, other), w, (y, other_y) = batches(2)
    loss = 3 * compiled(x, w, y)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    compiled(other, w, other_y).backward()
    loss.backward()
    check([x, other], w, [9, 1])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_fault_Z1_two_programs_of_one_weight():
    """What another compiled function keeps of the same weight is dropped, too."""
    keeping._HISTORIES.clear()
    xs, w, ys = batches(2)
    cross_entropy = torch.compile(loss_of, backend="autochunk", options=OPTIONS)
    z_loss = torch.compile(
        lambda x, w: F.linear(x, w).logsumexp(-1).square().mean(),
        backend="autochunk",
        options=OPTIONS,
    )
    total = cross_entropy(xs[0], w, ys[0]) + z_loss(xs[1], w)
    assert kept_bytes() == 0
    total.backward()
    a, b, v = (t.detach().double().requires_grad_() for t in (*xs, w))
    (loss_of(a, v, ys[0]) + F.linear(b, v).logsumexp(-1).square().mean()).backward()
    for found, want in ((xs[0], a), (xs[1], b), (w, v)):
        assert error(found.grad, want.grad) < 2 * FLOOR[torch.float32]


def test_fault_Z1_many_rows_stay_fused(compiled):
    """A gradient that takes fewer bytes than the logits would is kept for each loss."""
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(2 * HIDDEN, HIDDEN, generator=generator) for _ in range(3)]
    w = torch.randn(VOCABULARY, HIDDEN, generator=generator, requires_grad=True)
    ys = [torch.randint(0, VOCABULARY, (2 * HIDDEN,), generator=generator) for _ in range(3)]
    losses = [compiled(x, w, y) for x, y in zip(xs, ys, strict=True)]
    assert kept_bytes() == 3 * w.nbytes
    sum(losses).backward()
    v = w.detach().double().requires_grad_()
    sum(loss_of(x.double(), v, y) for x, y in zip(xs, ys, strict=True)).backward()
    assert error(w.grad, v.grad) < 2 * FLOOR[torch.float32]


def test_fault_Z1_saved_tensors_hooks_that_copy(compiled):
    """Offloading copies the ticket, and the gradients go: they are computed again."""
    (x,), w, (y,) = batches(1)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        loss = compiled(x, w, y)
    assert kept_bytes() == 0
    loss.backward()
    check([x], w, [1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_fault_Z1_checkpoint(compiled, use_reentrant):
    xs, w, ys = batches(2)
    for _ in range(3):
        w.grad = xs[0].grad = xs[1].grad = None
        sum(
            torch.utils.checkpoint.checkpoint(compiled, x, w, y, use_reentrant=use_reentrant)
            for x, y in zip(xs, ys, strict=True)
        ).backward()
        check(xs, w, [1, 1])


def test_fault_Z1_a_weight_modified_in_between_is_an_error(compiled):
    """As with Inductor: the gradients may have to be computed with what it was."""
    (x,), w, (y,) = batches(1)
    loss = compiled(x, w, y)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fault_Z1_heads_of_one_weight_in_one_graph(dtype):
    """One op, and one sum of the weight's gradient."""

    def several(x, w, y):
        total = sum((i + 1) * loss_of(x.roll(i, -1), w, y) for i in range(3))
        return total / 2

    (x,), w, (y,) = batches(1, dtype)
    explained = autochunk.explain(several, options=OPTIONS)(x, w, y)
    assert [row.strategy for row in explained.chunked] == ["fused"] * 3
    assert kept_bytes() == w.nbytes + 3 * x.nbytes
    explained.result.backward()
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    plain = [t.detach().clone().requires_grad_() for t in (x, w)]
    several(*exact, y).backward()
    several(*plain, y).backward()
    for found, eager, want in zip((x, w), plain, exact, strict=True):
        limit = 2 * error(eager.grad, want.grad) + FLOOR[dtype]
        assert error(found.grad, want.grad) <= limit


def test_fault_Z1_heads_that_cast_their_weight_in_one_graph():
    """Under autocast each head casts the weight for itself: still one sum."""

    def several(x, w, y):
        with torch.autocast("cpu", torch.bfloat16):
            return sum(loss_of(x.roll(i, -1), w, y) for i in range(3))

    (x,), w, (y,) = batches(1)
    loss = torch.compile(several, backend="autochunk", options=OPTIONS)(x, w, y)
    assert kept_bytes() == w.nbytes // 2 + 3 * x.nbytes // 2
    loss.backward()
    both = (torch.float64, torch.float32)
    exact, plain = ([t.detach().to(d).requires_grad_() for t in (x, w)] for d in both)
    sum(loss_of(exact[0].roll(i, -1), exact[1], y) for i in range(3)).backward()
    several(*plain, y).backward()
    for found, eager, want in zip((x, w), plain, exact, strict=True):
        limit = 2 * error(eager.grad, want.grad) + FLOOR[torch.float32]
        assert error(found.grad, want.grad) <= limit


def test_fault_Z1_a_graph_that_is_replayed_keeps_its_gradients():
    """``strategy="fused"``, as CUDA graphs and wide inputs: they are results of the op."""
    (x,), w, (y,) = batches(1)
    options = {**OPTIONS, "strategy": "fused"}
    loss = torch.compile(loss_of, backend="autochunk", options=options)(x, w, y)
    assert kept_bytes() == 0
    (1.7 * loss).backward()
    check([x], w, [1.7])


def test_fault_Z1_heads_with_losses_of_their_own_in_one_graph():
    """Each would keep a gradient of the weight: recomputed, with one sum."""

    def several(x, w, y):
        return [loss_of(x.roll(i, -1), w, y) for i in range(3)]

    (x,), w, (y,) = batches(1)
    explained = autochunk.explain(several, options=OPTIONS)(x, w, y)
    assert [row.strategy for row in explained.chunked] == ["recompute"] * 3
    assert "several losses of this weight" in str(explained)
    assert kept_bytes() == 0
    total = sum((i + 1) * loss for i, loss in enumerate(explained.result))
    total.backward()
    a, v = (t.detach().double().requires_grad_() for t in (x, w))
    sum((i + 1) * loss for i, loss in enumerate(several(a, v, y))).backward()
    assert error(x.grad, a.grad) < 2 * FLOOR[torch.float32]
    assert error(w.grad, v.grad) < 2 * FLOOR[torch.float32]


def test_fault_Z1_deferred_logits():
    """Losses outside of the compiled function wait in the same way."""
    keeping._HISTORIES.clear()
    xs, w, ys = batches(3)
    model = torch.compile(F.linear, backend="autochunk", options=OPTIONS)
    losses = [F.cross_entropy(model(x, w), y) for x, y in zip(xs, ys, strict=True)]
    assert kept_bytes() == 0
    sum(losses).backward()
    check(xs, w, [1, 1, 1])


def test_fault_Z2_losses_without_a_backward_pass(compiled):
    """Gradients that nobody asked for are not computed again, until two backward passes came."""
    (x,), w, (y,) = batches(1)
    for _ in range(4):
        compiled(x, w, y).item()
    assert counts() == (1, 3)
    for _ in range(keeping.TRIAL + 1):
        w.grad = x.grad = None
        compiled(x, w, y).backward()
        check([x], w, [1])
    assert counts() == (2, 5)


# ---- measured ------------------------------------------------------------------------------------

SCRIPT = """
    import json, sys, torch, torch.nn.functional as F
    from autochunk.bench.memory import PeakMemory
    case, backend = json.loads(sys.argv[1])
    torch.manual_seed(0)
    K, N, H, V = 6, 64, 256, 16384
    w, body = torch.randn(V, H, requires_grad=True), torch.randn(H, H, requires_grad=True)
    x, y = torch.randn(K, N, H), torch.randint(0, V, (K, N))

    def loss(x, y):
        return F.cross_entropy(F.linear(torch.tanh(x @ body), w), y)

    def calls():
        return sum(compiled(a, b) for a, b in zip(x, y))

    def graph():
        return compiled(x, y)

    def deferred():
        return sum(F.cross_entropy(compiled(a), b) for a, b in zip(x, y))

    functions = {
        "calls": loss,
        "graph": lambda x, y: sum(loss(a, b) for a, b in zip(x, y)),
        "deferred": lambda x: F.linear(torch.tanh(x @ body), w),
    }
    options = {"min_bytes": 0, "strict": True} if backend == "autochunk" else {}
    compiled = torch.compile(functions[case], backend=backend, options=options)
    memory = PeakMemory(torch.device("cpu"))
    for step in range(2):
        w.grad = body.grad = None
        memory.start()
        globals()[case]().backward()
        peak = memory.stop()[0]
    print(json.dumps(peak / (V * H * 4)))
"""


def peak(case: str, backend: str) -> float:
    """Of a step, in gradients of the weight, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps([case, backend])],
        capture_output=True,
        text=True,
        env={**os.environ, **PEAK_ENVIRONMENT},
    )
    assert done.returncode == 0, done.stderr
    return float(json.loads(done.stdout))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("case", "most"),
    [
        ("calls", 2.8),  # the sum, one more gradient, half of one for the chunk
        ("graph", 1.8),
        ("deferred", 3.8),  # autograd adds through a view, not in place
    ],
)
def test_fault_Z1_peak_of_several_losses(case, most):
    """64 rows each, 256 hidden: six gradients of the weight would be 6."""
    found = peak(case, "autochunk")
    assert found <= most
    assert found <= peak(case, "inductor")
