"""Deferred logits where others watch: autograd Functions, frames of Dynamo's, hooks, forks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import Outcome, check
from torch import Tensor, nn

from autochunk import DeferredTensor, StaleError
from autochunk.report import collect

VOCABULARY, HIDDEN, ROWS = 128, 8, 18
OPTIONS = {"min_bytes": 0, "chunk_rows": 7, "strict": True}


class Model(nn.Module):
    """A head, and what an adapter would add to its logits."""

    def __init__(self, loss: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.delta = nn.Parameter(torch.randn(VOCABULARY, HIDDEN))
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.loss(self, x, y)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(ROWS, HIDDEN), torch.randint(0, VOCABULARY, (ROWS,))


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="autochunk", options={**OPTIONS, **options})


def _outcome(model: nn.Module, step: Callable[..., Any], x: Tensor, y: Tensor) -> Outcome:
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    outputs = step(x, y)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(o.sum() * (1 + i) for i, o in enumerate(outputs) if o.requires_grad).backward()
    gradients = (x.grad, *(p.grad for p in model.parameters()))
    return Outcome(tuple(o.detach().clone() for o in outputs), gradients)


def compare(made: Callable[[], nn.Module], step: Callable[..., Any], batch: Any) -> list[Any]:
    """A step with a compiled model against the same without; the reports of what was compiled.

    Args:
        made: Makes a model.
        step: Of a model's forward pass (maybe compiled), the model, and a batch.
        batch: Its arguments.
    """

    def run(dtype: torch.dtype, compiler: Callable[..., Any]) -> Outcome:
        model = made().to(dtype)
        function = compiler(model)
        x, y = batch
        return _outcome(model, lambda x, y: step(function, model, x, y), x.to(dtype), y)

    with collect() as reports, warnings.catch_warnings():
        warnings.filterwarnings("error", "Dynamo (does not know|detected a call)")
        actual = run(torch.float32, compiled)
    eager = run(torch.float32, lambda model: model)
    check(actual, eager, run(torch.float64, lambda model: model), torch.float32)
    return [row for report in reports for row in report.chunked]


def _strategies(rows: list[Any]) -> list[str]:
    return sorted({row.strategy for row in rows})


# ---- A: autograd Functions that return deferred logits -------------------------------------------


class Reentrant(torch.autograd.Function):
    """What ``checkpoint(..., use_reentrant=True)`` does."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            z = ctx.function(x)
        z.backward(grad)
        return None, x.grad


class Parallel(torch.autograd.Function):
    """Returns what it made with gradients on; hands back the gradient of its own graph."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            z = function(ctx.x)
            ctx.total = z.view(-1).float().sum()
            ctx.view = z.view(-1)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            total = ctx.total + (ctx.view * grad.view(-1)).sum()
        total.backward()
        return None, 3 * ctx.x.grad


class Constant(torch.autograd.Function):
    """Returns what it made with gradients on, without a gradient."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = function(x.detach().requires_grad_())
        ctx.mark_non_differentiable(z)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise AssertionError


class Halve(torch.autograd.Function):
    """Modifies the logits in place."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        z.div_(2)
        ctx.mark_dirty(z)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


def _head() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, VOCABULARY)


LOSSES = {
    "loss": lambda z, y: F.cross_entropy(z, y),
    "of a view": lambda z, y: F.cross_entropy(z.view(2, -1, VOCABULARY).flatten(0, 1), y),
    "two": lambda z, y: F.cross_entropy(z, y) + 1e-2 * z.logsumexp(-1).square().mean(),
    "materialised": lambda z, y: F.cross_entropy(z.add_(1e-3) if False else z.tanh(), y) + z.sum(),
}


def test_fault_A_backward_of_logits(batch):
    """``z.backward(g)`` gives None as it was given for ``retain_graph``; it is no op to record."""

    def step(head, model, x, y):
        head(x).backward(torch.ones(ROWS, VOCABULARY, dtype=x.dtype))
        return x.square().sum()

    compare(_head, step, batch)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("function", [Reentrant, Parallel], ids=lambda f: f.__name__)
def test_fault_A_logits_returned_by_a_function(function, loss, batch):
    def step(head, model, x, y):
        return LOSSES[loss](function.apply(head, x), y), x.square().sum()

    compare(_head, step, batch)


def test_fault_A_reentrant_checkpoint(batch):
    def step(head, model, x, y):
        z = torch.utils.checkpoint.checkpoint(head, x, use_reentrant=True)
        return F.cross_entropy(z, y), x.square().sum()

    compare(_head, step, batch)


def test_fault_A_nested_reentrant_checkpoints(batch):
    def block(head, x):
        return torch.utils.checkpoint.checkpoint(head, x.tanh(), use_reentrant=True)

    def step(head, model, x, y):
        z = torch.utils.checkpoint.checkpoint(block, head, x, use_reentrant=True)
        return F.cross_entropy(z.float(), y), x.square().sum()

    compare(_head, step, batch)


def test_fault_A_recorded_ops_returned_by_a_function(batch):
    def step(head, model, x, y):
        z = Reentrant.apply(lambda x: head(x).view(2, -1, VOCABULARY) * 2, x)
        return F.cross_entropy(z.flatten(0, 1), y), x.square().sum()

    compare(_head, step, batch)


def test_fault_A_not_differentiable(batch):
    def step(head, model, x, y):
        z = Constant.apply(head, x)
        assert not z.requires_grad
        assert z.grad_fn is None
        return F.cross_entropy(z, y), x.square().sum()

    compare(_head, step, batch)


def test_fault_A_function_that_modifies_logits(batch):
    def step(head, model, x, y):
        return F.cross_entropy(Halve.apply(head(x)), y)

    compare(_head, step, batch)


def test_fault_A_hooks_on_logits_returned_by_a_function(batch):
    """The hook and the gradient of the logits are those of the Function's output."""
    seen: dict[Any, list[Tensor]] = {}

    def step(head, model, x, y):
        z = Reentrant.apply(head, x)
        mine = seen.setdefault((type(head) is nn.Linear, x.dtype), [])
        loss = F.cross_entropy(z, y)
        z.register_hook(lambda g: mine.append(g) or g.clamp(-1e-2, 1e-2))
        mine.append(torch.autograd.grad(loss, z, retain_graph=True)[0])
        return loss

    compare(_head, step, batch)
    ours, eager = seen[False, torch.float32], seen[True, torch.float32]
    torch.testing.assert_close(ours, eager)


def test_fault_A_requires_grad_changes_after_a_view(batch):
    """A view has the history of the moment it was made in."""
    x, _ = batch
    results = []
    for function in (_head(), compiled(_head())):
        with torch.no_grad():
            z = function(x)
        view, double = z.view(-1, VOCABULARY), z * 2
        z.requires_grad_()
        other = function(x)
        detached = other.view(2, -1, VOCABULARY)
        other.detach_()
        results.append([(t + 0).requires_grad for t in (z, view, double, other, detached)])
    assert results[0] == results[1] == [True, True, False, False, True]


# ---- M, X1, X2: frames that Dynamo skips or resumes ----------------------------------------------


def _adapter(model, x, y):
    return F.cross_entropy(model.head(x) + F.linear(x, model.delta), y)


def _scaled(model, x, y):
    return F.cross_entropy(torch.ones(VOCABULARY) * model.head(x), y)


def _ensemble(model, x, y):
    """Two deferred tensors added."""
    a, b = model.head(x), F.linear(x, model.delta)
    torch._dynamo.graph_break()
    return F.cross_entropy(a + b, y)


def _broken_scaled(model, x, y):
    z = model.head(x)
    torch._dynamo.graph_break()
    return F.cross_entropy(torch.ones(VOCABULARY) * z, y)


def _masked(model, x, y):
    """A data-dependent index breaks the graph once more, and Dynamo runs it by itself."""
    z = model.head(x)
    torch._dynamo.graph_break()
    keep = y > 40
    return F.cross_entropy(z[keep], y[keep])


def _method(model, x, y):
    z = model.head(x)
    torch._dynamo.graph_break()
    rows = (y > 40).nonzero().squeeze(-1)
    return z.log_softmax(-1).gather(-1, y[:, None])[rows].mean()


class Skipped(Model):
    """PEFT's LoHa and LoKr: ``torch.rand(1) > p`` in a loop has Dynamo skip the whole frame."""

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.loss(self, x, y)


class AdapterFrame(Model):
    """Only the calls of the skipped frame are compiled."""

    def adapter(self, x: Tensor) -> Tensor:
        return F.linear(x, self.delta)

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return F.cross_entropy(self.head(x) + self.adapter(x), y)


def _step(function, model, x, y):
    return function(x, y)


@pytest.mark.parametrize("loss", [_ensemble, _broken_scaled, _masked, _method])
def test_fault_M_resumed_frame(loss, batch):
    rows = compare(lambda: Model(loss), _step, batch)
    assert _strategies(rows) in (["deferred", "fused"], ["deferred", "recompute"])


@pytest.mark.parametrize("loss", [_adapter, _scaled, _masked])
def test_fault_X1_skipped_frame(loss, batch):
    compare(lambda: Skipped(loss), _step, batch)


def test_fault_X1_calls_of_a_skipped_frame(batch):
    rows = compare(AdapterFrame, _step, batch)
    assert _strategies(rows) == ["deferred", "fused"]


def test_fault_X1_backward_in_a_resumed_frame(batch):
    """The backward functions are not compiled, either."""

    def loss(model, x, y):
        z = model.head(x)
        torch._dynamo.graph_break()
        value = F.cross_entropy(z[y > 40], y[y > 40])
        (gradient,) = torch.autograd.grad(value, model.head.weight, retain_graph=True)
        return value, gradient.detach()

    compare(lambda: Model(loss), _step, batch)


def test_fault_X1_reset_keeps_the_handler_out(batch):
    """``torch._dynamo.reset`` forgets what Dynamo skips of the user's, not of ours."""
    for _ in range(2):
        torch._dynamo.reset()
        compare(AdapterFrame, _step, batch)


PRINTS: dict[str, Callable[[Tensor], Any]] = {
    "print": print,
    "str": str,
    "repr": repr,
    "format": lambda z: f"{z}",
    "log": lambda z: logging.getLogger("test").warning("%s", z),
    "file": lambda z: print(z, file=sys.stderr),
}


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("name", PRINTS)
def test_fault_X2_printed_in_a_forward(name, batch, capsys, caplog, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", True)  # "--- Logging error ---" on stderr
    x, y = batch

    def loss(model, x, y):
        z = model.head(x)
        PRINTS[name](z)
        return F.cross_entropy(z, y)

    results, printed = [], []
    for compiler in (lambda model: model, compiled):
        model = Model(loss)
        total = compiler(model)(x, y)
        total.backward()
        results.append([total.detach(), model.head.weight.grad])
        out, err = capsys.readouterr()
        mine = [record.getMessage() for record in caplog.records if record.name == "test"]
        printed.append([out, err, mine])
        caplog.clear()
    torch.testing.assert_close(results[1], results[0])
    assert not any("Error" in text or "error" in text for text in printed[1][:2])
    if name in ("print", "file"):
        first = [[text[:60] for text in texts[:2]] for texts in printed]
        assert first[0] == first[1]
    if name == "log":
        assert printed[1][2][0][:60] == printed[0][2][0][:60]


# ---- X3, X5: other ways to the gradient of the logits --------------------------------------------


def _hook(z):
    z.register_hook(lambda g: g.clamp(-1e-3, 1e-3))


def _node_hook(z):
    z.grad_fn.register_prehook(lambda grads: tuple(g.clamp(-1e-3, 1e-3) for g in grads))


def _retain(z):
    z.retain_grad()


HOOKS = {"hook": _hook, "node": _node_hook, "retain": _retain}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("where", ["outside", "view", "second function", "graph break"])
def test_fault_X3_hook_after_the_loss(where, name, batch):
    recorded = []

    def broken(model, x, y):
        z = model.head(x)
        torch._dynamo.graph_break()
        loss = F.cross_entropy(z, y)
        torch._dynamo.graph_break()
        HOOKS[name](z)
        return loss

    def step(function, model, x, y):
        is_eager = function is model
        if where == "graph break":
            return function(x, y)
        z = function(x)
        if where == "view":
            z = z.view(2, -1, VOCABULARY)
        second = compiled(F.cross_entropy) if where == "second function" and not is_eager else None
        loss = (second or F.cross_entropy)(z.flatten(0, -2) if where == "view" else z, y)
        HOOKS[name](z)
        if name == "retain":
            loss.backward(retain_graph=True)
            recorded.append(z.grad)
            model.zero_grad()
            x.grad = None
        return loss

    compare((lambda: Model(broken)) if where == "graph break" else _head, step, batch)
    if recorded:
        torch.testing.assert_close(recorded[0], recorded[1])
        assert recorded[1].abs().sum() > 0


def test_fault_X3_hook_that_records(batch):
    x, y = batch
    seen: list[Tensor] = []
    for function in (_head(), compiled(_head())):
        z = function(x)
        loss = F.cross_entropy(z, y)
        z.register_hook(lambda g: seen.append(g))
        torch.autograd.graph.register_multi_grad_hook([z], lambda grads: seen.extend(grads))
        loss.backward()
    torch.testing.assert_close(seen[2:], seen[:2])


def test_fault_X3_gradient_after_an_edit(batch):
    """In-place edits of logits after their loss: the loss has the gradient of what it saw."""

    def step(head, model, x, y):
        z = head(x)
        view = z.view(2, -1, VOCABULARY)
        loss = F.cross_entropy(view.flatten(0, 1), y)
        z.tanh_()
        return loss, z.sum() + view.sum()

    compare(_head, step, batch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.cross_entropy(z, y),
        lambda z, y: F.cross_entropy(z, y) + z.logsumexp(-1).mean(),
        lambda z, y: F.cross_entropy(z.view(2, -1, VOCABULARY).flatten(0, 1), y) + z.mean(),
        lambda z, y: F.cross_entropy(z, y) + z.tanh_().sum(),
    ],
    ids=["one", "two", "views", "computed"],
)
def test_fault_X5_compiled_autograd(loss, backend, batch):
    x, y = batch
    results = []
    for compiler in (lambda head: head, compiled):
        head = _head()
        total = loss(compiler(head)(x), y)
        if compiler is compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend)):
                total.backward()
        else:
            total.backward()
        results.append([total.detach(), head.weight.grad, head.bias.grad])
    torch.testing.assert_close(results[1], results[0])


# ---- S: forks ------------------------------------------------------------------------------------

FORK = """
import os, signal, sys, time
import torch, torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(0)
head, x, y = torch.nn.Linear(8, 128), torch.randn(18, 8), torch.arange(18)
c = torch.compile(head, backend="autochunk", options={"min_bytes": 0, "num_chunks": 3})
F.cross_entropy(c(x), y).backward()  # has Inductor's compile workers started
expected = torch.autograd.grad(F.cross_entropy(head(x), y), head.weight)[0]
used = F.cross_entropy(c(x), y)
z = c(x)
second = torch.compile(lambda z, y: z.logsumexp(-1).mean(), backend="autochunk")
second(c(x), y)
child = os.fork()
if child == 0:
    signal.alarm(60)
    gradient = torch.autograd.grad(F.cross_entropy(z, y), head.weight)[0]
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(torch.autograd.grad(used, head.weight)[0], expected)
    torch.testing.assert_close(z.argmax(-1), head(x).argmax(-1))
    torch.testing.assert_close(c(x).amax(-1), head(x).amax(-1))
    torch.testing.assert_close(second(c(x), y), head(x).logsumexp(-1).mean())
    print("right", flush=True)
    os._exit(0)
print("status", os.waitpid(child, 0)[1], flush=True)
os._exit(0)
"""


def test_fault_S_first_used_in_a_fork():
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1"}
    environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.split() == ["right", "status", "0"], done.stderr


# ---- R4: kept over an optimizer's step -----------------------------------------------------------


def _kept(model, x, y):
    z = model.head(x)
    model.last = z.detach()
    return F.cross_entropy(z, y)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "closure": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fault_R4_kept_in_a_forward(name, batch, caplog):
    caplog.set_level(logging.INFO, logger="autochunk.deferred")
    x, y = batch
    results = []
    for compiler in (lambda model: model, compiled):
        model = Model(_kept)
        function, optimizer = compiler(model), OPTIMIZERS[name](model.parameters())
        for _ in range(1 if name == "closure" else 2):

            def closure(function: Any = function, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = function(x, y)
                loss.backward()
                return loss

            if name != "closure":
                closure()
            optimizer.step(*([closure] if name == "closure" else []))
            results.append(model.last.clone())
    half = len(results) // 2
    torch.testing.assert_close(results[half:], results[:half])
    assert "logits of shape [18, 128] are kept over an optimizer's step" in caplog.text


def test_fault_R4_kept_outside(batch):
    """Detached, or made without a gradient; an expression of them, too."""
    x, y = batch
    results = []
    for compiler in (lambda head: head, compiled):
        head = _head()
        function, optimizer = compiler(head), torch.optim.SGD(head.parameters(), 0.1)
        z = function(x)
        kept = z.detach()
        with torch.no_grad():
            other = function(x).softmax(-1)
        F.cross_entropy(z, y).backward()
        del z
        optimizer.step()
        results.append([kept.clone(), other.clone()])
    torch.testing.assert_close(results[1], results[0])


def test_fault_R4_nothing_else_is_computed(batch):
    """A model's outputs are alive at most steps; an optimizer of other weights changes nothing."""
    x, y = batch
    head, other = _head(), _head()
    function = compiled(head)
    z = function(x)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    F.cross_entropy(other(x), y).backward()
    kept = z.detach()
    optimizer.step()
    assert type(kept) is DeferredTensor
    assert type(z) is DeferredTensor
    del kept
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    F.cross_entropy(z, y).backward()
    optimizer.step()
    assert type(z) is DeferredTensor
    with pytest.raises(StaleError, match="use the logits before that"):
        z.sum()


@pytest.mark.filterwarnings("ignore")
def test_fault_R4_compiled_optimizer(batch):
    x, y = batch
    results = []
    for compiler in (lambda head: head, compiled):
        head = _head()
        optimizer = torch.optim.SGD(head.parameters(), 0.1)
        z = compiler(head)(x)
        kept = z.detach()
        F.cross_entropy(z, y).backward()
        torch.compile(optimizer.step, backend="eager")()
        results.append([kept.sum(), head.weight.detach()])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("position", [0, 1, 2])
def test_fault_R4_each_input_is_watched(position, batch):
    """A loss on logits whose first input has changed since was evaluated with the new values."""
    x, y = batch
    x = x.clone()
    head = _head()
    z = compiled(head)(x)
    with torch.no_grad():
        (x, head.weight, head.bias)[position].mul_(2)
    with pytest.raises(StaleError, match="has since been modified in place"):
        F.cross_entropy(z, y)
