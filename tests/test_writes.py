"""In-place writes around a head: faults W (read after a write), D (harmless writes) and U.

Each program is run for two steps as eager in float32 and float64 and compiled; losses, gradients,
buffers and inputs that are written to are compared.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from compare import Outcome, check
from torch import nn

import autochunk.backend
from autochunk.memory import Memory
from autochunk.order import ReorderedError
from autochunk.report import collect
from autochunk.writes import tensor_name

N, H, V = 24, 8, 64
OPTIONS = {"strict": True, "min_bytes": 0, "chunk_rows": 7}

PROGRAMS: dict[str, tuple] = {}


def program(expect="chunked"):
    """Registers a program: a function of a module with buffers, hidden states, weight, labels.

    ``expect`` is ``"chunked"`` or a part of the refusal's message.
    """

    def register(function):
        PROGRAMS[function.__name__] = (function, expect)
        return function

    return register


def nll(x, w, y):
    return F.cross_entropy(F.linear(x, w), y, reduction="none")


class Buffers(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("hist", torch.zeros(8))
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("counts", torch.zeros(V))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x, w, y):
        return self.function(self, x, w, y)


# ---- fresh tensors that losses are written into


@program()
def losses_one_by_one(s, x, w, y):
    z, out = F.linear(x, w), torch.zeros(2)
    for i in range(2):
        out[i] = F.cross_entropy(z[12 * i : 12 * i + 12], y[12 * i : 12 * i + 12])
    return out.sum()


@program()
def empty_filled_loss_by_loss(s, x, w, y):
    z, out = F.linear(x, w), torch.empty(3)
    for i in range(3):
        out[i] = F.cross_entropy(z[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8])
    return out.mean()


@program()
def slice_of_losses(s, x, w, y):
    out = torch.zeros(N)
    out[1:] = nll(x, w, y)[1:]
    return out.sum()


@program()
def indexed_losses(s, x, w, y):
    out, idx = x.new_zeros(N), torch.arange(6) * 2
    out[idx] = nll(x, w, y)[3:9]
    return out.square().sum()


@program()
def copied_losses(s, x, w, y):
    out = torch.zeros(N)
    out.copy_(nll(x, w, y))
    return out.mean()


@program()
def added_to_a_row(s, x, w, y):
    out = torch.zeros(2, N)
    out[0].add_(nll(x, w, y))
    return out.mean()


@program()
def column_multiplied(s, x, w, y):
    out = torch.ones(N, 3)
    out.select(1, 1).mul_(nll(x, w, y))
    return out.sum()


@program()
def masked_scatter_statement(s, x, w, y):
    out = x.new_zeros(N)
    out.masked_scatter_(y > 30, nll(x, w, y))
    return out.sum()


@program()
def scatter_returned(s, x, w, y):
    out = x.new_zeros(N)
    return out.scatter_(0, torch.arange(N).flip(0), nll(x, w, y)).square().sum()


@program()
def metrics_in_a_vector(s, x, w, y):
    z, m = F.linear(x, w), torch.zeros(2)
    m[0] = (z.argmax(-1) == y).float().mean()
    loss = F.cross_entropy(z, y)
    m[1] = loss.detach()
    return loss + 0 * m.sum(), m


@program()
def metrics_without_gradients(s, x, w, y):
    z, m = F.linear(x, w), torch.zeros(3)
    with torch.no_grad():
        m[0] = (z.argmax(-1) == y).float().mean()
        m[1] = z.logsumexp(-1).mean()
    return F.cross_entropy(z, y), m


@program()
def loop_over_pieces(s, x, w, y):
    out = x.new_zeros(N)
    for i in range(0, N, 12):
        rows = slice(i, i + 12)
        out[rows] = nll(x[rows], w, y[rows])
    return out.mean()


@program()
def written_before_and_after(s, x, w, y):
    out = torch.zeros(3)
    out[0] = w[0].sum()
    z = F.linear(x, w)
    out[1] = F.cross_entropy(z, y)
    return out.square().sum()


@program()
def view_returned(s, x, w, y):
    losses, out = nll(x, w, y), torch.zeros(N)
    view = out[2:5]
    out.copy_(losses)
    return losses.sum(), out, view


@program()
def out_argument(s, x, w, y):
    losses, buffer = nll(x, w, y), torch.zeros(2, N)
    torch.add(buffer[0], losses.detach(), out=buffer[1])
    return losses.mean() + buffer.sum()


@program()
def written_logits(s, x, w, y):
    z = F.linear(x, w)
    z.div_(2)
    z[:, 3] = -5.0
    return F.cross_entropy(z, y)


@program()
def target_distribution(s, x, w, y):
    t = torch.zeros(N, V)
    t.scatter_(1, y[:, None], 0.9)
    t += 0.1 / V
    return -(t * F.linear(x, w).log_softmax(-1)).sum(-1).mean()


@program()
def zeroed_teacher(s, x, w, y):
    t = x.detach() @ w.detach().T
    t[:, 2] = -9
    q, logp = t.softmax(-1), F.linear(x, w).log_softmax(-1)
    t.zero_()
    return F.kl_div(logp, q, reduction="sum") + t.sum()


# ---- buffers and inputs, read in the same forward


@program()
def history_buffer(s, x, w, y):
    loss = nll(x, w, y).mean()
    s.hist[3] = loss.detach()
    return loss * (1 + s.hist.sum())


@program()
def running_total(s, x, w, y):
    loss = nll(x, w, y).mean()
    s.total.add_(loss.detach())
    return loss, s.total * 2


@program()
def augmented_total(s, x, w, y):
    loss = nll(x, w, y).mean()
    s.total += loss.detach()
    return loss, s.total


@program()
def index_added(s, x, w, y):
    losses = nll(x, w, y)
    s.counts.index_add_(0, y, losses.detach())
    return losses.mean() + s.counts.square().mean()


@program()
def counted_labels(s, x, w, y):
    losses = nll(x, w, y)
    s.counts.scatter_add_(0, y, x.new_ones(N))
    return (losses * s.counts[y]).mean()


@program()
def counted_predictions(s, x, w, y):
    z = F.linear(x, w)
    s.counts += torch.bincount(z.argmax(-1), minlength=V)
    return F.cross_entropy(z, y), s.counts.sum()


@program()
def view_of_a_buffer(s, x, w, y):
    losses = nll(x, w, y)
    s.hist.view(2, 4)[1].add_(losses.detach()[:4])
    return losses.mean(), s.hist.sum(), s.hist.view(4, 2)[3]


@program()
def average_without_gradients(s, x, w, y):
    loss = nll(x, w, y).mean()
    with torch.no_grad():
        s.total.mul_(0.9).add_(loss, alpha=0.1)
    return loss / (s.total + 1)


@program()
def data_attribute(s, x, w, y):
    loss = nll(x, w, y).mean()
    s.hist.data[2] = loss.detach()
    return loss * (1 + s.hist.sum())


@program()
def many_at_once(s, x, w, y):
    loss = nll(x, w, y).mean()
    torch._foreach_add_([s.hist, s.counts], 1.0)
    s.total.copy_(loss.detach())
    return loss + s.hist.sum() * s.total


@program()
def buffer_between(s, x, w, y):
    z = F.linear(x, w) * (1 + s.total)
    s.total.add_(1)
    return F.cross_entropy(z, y) * (s.total + 1)


@program()
def logits_and_history(s, x, w, y):
    z = F.linear(x, w)
    loss = F.cross_entropy(z, y)
    s.hist[0] = loss.detach()
    return z, loss + s.hist.sum()


# ---- writes that only have to stay in order (D)


@program()
def labels_masked_after_the_head(s, x, w, y):
    z, labels = F.linear(x, w), y.clone()
    labels[labels == 3] = -100
    return F.cross_entropy(z, labels)


@program()
def input_labels_masked(s, x, w, y):
    z = F.linear(x, w)
    y[y == 3] = 1
    return F.cross_entropy(z, y)


@program()
def step_counter(s, x, w, y):
    z = F.linear(x, w)
    s.steps.add_(1)
    return F.cross_entropy(z, y) / s.steps


@program()
def multi_token_prediction(s, x, w, y):
    labels, total = y.clone(), 0
    for i in range(3):
        total = total + F.cross_entropy(F.linear(x * (i + 1), w), labels.clone())
        labels[: 3 * i + 5] = -100
    return total


@program()
def batch_logps(s, x, w, y):  # TRL's CPO
    logits, labels = F.linear(x, w).view(2, 12, V)[:, :-1], y.view(2, 12)[:, 1:].clone()
    mask = labels != 5
    labels[labels == 5] = 0
    per_token = torch.gather(logits.log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
    return (per_token * mask).sum(-1).mean()


@program()
def hidden_states_scaled_after(s, x, w, y):
    h = x + 2
    z = F.linear(h.clone(), w)
    h.mul_(3)
    return F.cross_entropy(z, y) + h.square().mean()


@program()
def negatives_masked(s, x, w, y):  # a queue of negatives: ``dup[i, i] = False``
    z = F.linear(x, w)
    duplicate = y[:, None] == torch.arange(V)[None]
    duplicate[torch.arange(N), y] = False
    return F.cross_entropy(z.masked_fill(duplicate, -1e4), y)


# ---- what is refused, and says so


@program("setitem writes to z, which has a gradient, behind autograd's back")
def logits_masked_without_gradients(s, x, w, y):
    z = F.linear(x, w)
    with torch.no_grad():
        z[:, 3] = -5.0
    return F.cross_entropy(z, y)


@program("mul_ writes to z, which has a gradient, behind autograd's back")
def detached_logits_written(s, x, w, y):
    z = F.linear(x, w)
    z.detach().mul_(0.5)
    return F.cross_entropy(z, y)


@program("mul_ writes to w, which has a gradient, behind autograd's back; mul_ writes to w (")
def weight_rescaled_last(s, x, w, y):
    loss = F.cross_entropy(F.linear(x, w), y)
    with torch.no_grad():
        s.counts.copy_(w.sum(1))
        w.data.mul_(1.0)
    return loss


@program("batch_norm updates self.hist inside")
def running_statistics(s, x, w, y):
    losses = nll(x, w, y)
    F.batch_norm(losses[:, None], s.hist[:1], s.hist[1:2], training=True)
    return losses.mean() + s.hist.sum()


def _inputs(dtype):
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, H, generator=g).to(dtype).requires_grad_() for n in (N, V))
    return x, w, torch.randint(0, V, (N,), generator=g)


def _steps(function, dtype, compiled=lambda module: module, steps=2):
    """Everything two steps give: outputs, gradients, buffers, labels."""
    module = Buffers(function).to(dtype)
    call = compiled(module)
    x, w, y = _inputs(dtype)
    outputs, gradients = [], []
    for _ in range(steps):
        x.grad = w.grad = None
        found = call(x, w, y)
        found = found if isinstance(found, tuple) else (found,)
        sum(f.sum() * (i + 1) for i, f in enumerate(found) if f.requires_grad).backward()
        outputs += [f.detach().clone() for f in found]
        outputs += [b.clone() for b in module.buffers()] + [y.clone()]
        gradients += [x.grad, w.grad]
    return Outcome(tuple(outputs), tuple(gradients))


def _ours(function):
    return _steps(
        function,
        torch.float32,
        lambda module: torch.compile(module, backend="autochunk", options=OPTIONS),
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_fault_W_D_writes_keep_their_order(name, no_codegen):
    function, expect = PROGRAMS[name]
    with collect() as reports:
        ours = _ours(function)
    check(ours, _steps(function, torch.float32), _steps(function, torch.float64), torch.float32)
    rows = [row for report in reports for row in report.rows]
    refusals = [row.refusal for row in rows if row.refusal]
    assert rows
    if expect == "chunked":
        assert not refusals, "\n".join(map(str, reports))
    else:
        assert {r.code for r in refusals} == {"mutation"}
        assert expect in refusals[0].detail
        assert "test_writes.py:" in refusals[0].source


@pytest.mark.parametrize("name", ["losses_one_by_one", "view_of_a_buffer", "running_total"])
def test_fault_W_with_real_kernels(name):
    function, _ = PROGRAMS[name]
    ours = _ours(function)
    check(ours, _steps(function, torch.float32), _steps(function, torch.float64), torch.float32)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_write_leaves_the_grad_mode_alone(enabled, no_codegen):
    module = torch.compile(
        Buffers(PROGRAMS["running_total"][0]), backend="autochunk", options=OPTIONS
    )
    with torch.set_grad_enabled(enabled):
        loss, _ = module(*_inputs(torch.float32))
        assert torch.is_grad_enabled() == enabled
    assert loss.requires_grad == enabled


def test_fault_D_a_refusal_names_the_tensor_the_reader_and_both_lines(no_codegen):
    """A writer that cannot be lowered reads what the head reads: both lines are told."""

    def function(s, x, w, y):
        h = x * 1
        z = F.linear(h, w)
        torch.ops.autochunk_test.scale_(h)
        return F.cross_entropy(z, y)

    with collect() as reports:
        compiled = torch.compile(Buffers(function), backend="autochunk", options=OPTIONS)
        with torch.no_grad():
            compiled(*_inputs(torch.float32))
    (row,) = reports[0].rows
    assert row.refusal.code == "mutation"
    assert "writes to h" in row.refusal.detail
    assert "which linear reads" in row.refusal.detail
    assert row.refusal.detail.count("test_writes.py:") == 2


@torch.library.custom_op("autochunk_test::scale_", mutates_args={"x"})
def _scale(x: torch.Tensor) -> None:
    x.mul_(2)


@_scale.register_fake
def _(x):
    return None


def test_a_cone_that_ignores_memory_is_caught(no_codegen, monkeypatch):
    """The check after the rewrite does not rely on what decided on the cone."""

    def by_value_alone(self, graph, heads):
        reached = dict.fromkeys(heads)
        for node in graph.nodes:
            if node.op != "output" and any(arg in reached for arg in node.all_input_nodes):
                reached[node] = None
        return reached

    monkeypatch.setattr(Memory, "dependents", by_value_alone)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        _ours(PROGRAMS["losses_one_by_one"][0])
    assert isinstance(caught.value.inner_exception, ReorderedError)
    assert "setitem (" in str(caught.value)
    assert "would run after sum (" in str(caught.value)


def test_a_write_that_gets_lost_is_caught(no_codegen, monkeypatch):
    real = autochunk.backend.lower

    def forgetful(*args):
        lowered = real(*args)
        output = next(n for n in lowered.graph.graph.nodes if n.op == "output")
        output.args = (output.args[0][: len(lowered.outputs)],)
        return dataclasses.replace(lowered, writes=())

    monkeypatch.setattr(autochunk.backend, "lower", forgetful)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="writes would be lost"):
        _ours(PROGRAMS["running_total"][0])


@pytest.mark.parametrize(
    ("body", "writes"),
    [
        (lambda a, b: F.relu(a, inplace=True), "a"),
        (lambda a, b: torch.add(a, 1, out=b), "b"),
        (lambda a, b: torch.add(a, 1, out=None), ""),
        (lambda a, b: a.__setitem__(0, b[0]), "a"),
        (lambda a, b: torch._foreach_mul_([a, b], 2.0), "ab"),
        (lambda a, b: a.view(-1)[:3].zero_(), "a"),
        (lambda a, b: a.detach().add_(b), "a"),
        (lambda a, b: a.data.add_(b), "a"),
        (lambda a, b: F.batch_norm(b, a[0], a[1], training=True), "a"),
        (lambda a, b: torch.batch_norm(b, None, None, a[0], a[1], True, 0.1, 1e-5, False), "a"),
        (lambda a, b: F.batch_norm(b, a[0], a[1]), ""),
        (lambda a, b: F.embedding(torch.zeros(1, dtype=torch.long), a, max_norm=1.0), "a"),
        (lambda a, b: torch.ops.autochunk_test.scale_(b), "b"),
        (lambda a, b: (a[True], a.sum(-1, True), a.reshape(-1), b.t()), ""),
    ],
)
def test_what_a_call_writes_to(body, writes):
    found = []

    def backend(gm, example_inputs):
        memory = Memory.of(gm.graph)
        found.append({tensor_name(memory.base(s)) for s in memory.written})
        return gm.forward

    def function(a, b):
        body(a, b)
        return a + 1

    torch.compile(function, backend=backend)(torch.ones(4, 4), torch.ones(4, 4))
    assert found == [set(writes)]


def test_an_input_written_to_before_the_call_is_no_evidence_of_a_write(no_codegen):
    def function(s, x, w, y):
        return F.cross_entropy(F.linear(x, w), y)

    x, w, y = _inputs(torch.float32)
    y[:3] = -100
    with collect() as reports:
        torch.compile(Buffers(function), backend="autochunk", options=OPTIONS)(x, w, y)
    assert [row.strategy for row in reports[0].rows] == ["fused"]
