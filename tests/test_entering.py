"""Deferred logits enter another function that is compiled with this backend: evaluated in it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import check
from test_recording import (
    OPTIONS,
    VOCABULARY,
    Model,
    _cross_entropy,
    _outcome,
    compiled,
)
from torch import Tensor, nn

import autochunk
import autochunk.backend
from autochunk import DeferredTensor, StaleError
from autochunk.backend import FallbackWarning
from autochunk.report import collect


def _masked(z, y):
    keep = y != -100
    picked = z.float().log_softmax(-1).gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return -(picked * keep).sum() / keep.sum()


def _with_metrics(z, y):
    loss = _cross_entropy(z, y)
    with torch.no_grad():
        accuracy = (z.argmax(-1) == y).float().mean()
    return loss, accuracy, z.logsumexp(-1)


def _losses_filled_in(z, y):
    out = z.new_zeros(2)
    out[0] = _cross_entropy(z, y)
    out[1] = z.logsumexp(-1).mean()
    return out.sum()


#: Functions of logits and labels that never need the logits as a whole.
CHUNKED = {
    "cross entropy": _cross_entropy,
    "masked": _masked,
    "metrics": _with_metrics,
    "two losses": lambda z, y: _cross_entropy(z, y) + 1e-2 * z.logsumexp(-1).square().mean(),
    "shifted": lambda z, y: F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    "module": lambda z, y: nn.CrossEntropyLoss()(z.transpose(1, 2), y),
    "fault U, labels": lambda z, y: _cross_entropy(z, y.clone().clamp_(min=0)),
    "fault U, losses": _losses_filled_in,
}

#: Those that do, with the reason in the log.
COMPUTED = {
    "softmax over rows": (lambda z, y: z.softmax(0).square().sum(), "mixes-rows"),
    "returned": (lambda z, y: z.softmax(-1), "not-reduced"),
    "dropout": (lambda z, y: F.dropout(z, 0.0).logsumexp(-1).mean(), "dropout may be random"),
}


def _second(function: Any, **kwargs: Any) -> Any:
    return torch.compile(function, backend="autochunk", options=OPTIONS, **kwargs)


def _check(loss: Any, second: Any, data: Any, dtype: torch.dtype = torch.float32) -> None:
    model, exact = Model(), Model().double()
    check(
        _outcome(model, compiled(model), second, data),
        _outcome(model, model, loss, data),
        _outcome(exact, exact, loss, data),
        dtype,
    )


@pytest.mark.parametrize("name", CHUNKED)
def test_second_function(name, batch):
    loss = CHUNKED[name]
    second = _second(lambda z, y: loss(z, y), fullgraph=True)
    logits = compiled(Model())(batch[0])
    with collect() as reports:
        second(logits, batch[1])
    assert [row.strategy for report in reports for row in report.chunked] != []
    assert type(logits) is DeferredTensor
    assert not logits._formula.filled
    _check(loss, second, batch)


@pytest.mark.parametrize("name", COMPUTED)
def test_computed(name, batch, caplog):
    loss, reason = COMPUTED[name]
    second = _second(lambda z, y: loss(z, y), fullgraph=True)
    logits = compiled(Model())(batch[0])
    with caplog.at_level(logging.INFO, "autochunk.deferred"):
        second(logits, batch[1])
    assert reason in caplog.text
    assert "test_entering.py:" in caplog.text
    assert type(logits) is Tensor or logits._formula.filled
    _check(loss, second, batch)


def test_fault_U_a_write_to_the_logits_is_named(batch, caplog):
    """Dynamo leaves it to PyTorch: the rest of the function has the values."""

    def loss(z, y):
        z.mul_(2)
        return _cross_entropy(z, y)

    with caplog.at_level(logging.INFO, "autochunk.deferred"):
        _check(loss, _second(loss), batch)
    assert "mul_" in caplog.text
    assert "test_entering.py:" in caplog.text


def _banned(z, y):
    z[..., 3] = -1.0
    return _cross_entropy(z, y)


def _ignored(z, y):
    z[y == 3] = 0.0
    return _cross_entropy(z, y)


@pytest.mark.parametrize("loss", [_banned, _ignored])
def test_fault_W_a_write_to_the_logits_where_breaks_are_errors(loss, batch, caplog):
    """Plain Inductor compiles it, and the caller sees the write."""
    second = _second(loss, fullgraph=True)
    logits, plain = compiled(Model())(batch[0]), Model()(batch[0])
    with caplog.at_level(logging.INFO, "autochunk.deferred"):
        second(logits, batch[1])
    loss(plain, batch[1])
    torch.testing.assert_close(logits, plain)
    assert "writes to z" in caplog.text
    _check(loss, second, batch)


def test_fault_Y4_what_fails_before_the_graph_is_compiled(batch, monkeypatch):
    def fail(*args):
        raise KeyError("ours")

    model = Model()
    first, another = (compiled(model)(batch[0]) for _ in range(2))
    monkeypatch.setattr(autochunk.backend, "enter", fail)
    text = "logits that enter a compiled function are computed .*KeyError: 'ours'"
    second = torch.compile(_cross_entropy, backend="autochunk", options={"min_bytes": 0})
    with pytest.warns(FallbackWarning, match=text):
        loss = second(first, batch[1])
    torch.testing.assert_close(loss, _cross_entropy(model(batch[0]), batch[1]))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="KeyError: 'ours'"):
        _second(_cross_entropy)(another, batch[1])


def test_wide_and_narrow_results(batch):
    def both(z, y):
        return z.softmax(-1), z.logsumexp(-1)

    _check(both, _second(both), batch)


def test_graph_break(batch):
    """Between head and loss: the rest of the frame is a function of its own."""
    seen = []

    class Broken(Model):
        def forward(self, ids, labels):
            logits = super().forward(ids)
            torch._dynamo.graph_break()
            seen.append(logits)
            return _cross_entropy(logits.float() / 0.7, labels)

    torch.manual_seed(0)
    model = Broken()
    results = []
    for function in (model, compiled(model)):
        model.zero_grad()
        loss = function(*batch)
        (3 * loss).backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert type(seen[1]) is DeferredTensor
    assert not seen[1]._formula.filled
    torch.testing.assert_close(results[1], results[0])


def test_report(batch):
    """What was compiled is explained; the head is where the model has it."""
    logits = compiled(Model())(batch[0])
    (row,) = autochunk.explain(_masked, options=OPTIONS)(logits, batch[1]).chunked
    assert "test_recording.py" in row.source
    assert "log_softmax" in row.found


def test_dynamic_shapes():
    compiles = []
    model = Model()

    def counting(gm, inputs):
        compiles.append(gm)
        return autochunk.backend.autochunk(gm, inputs, options=OPTIONS)

    step, second = compiled(model), torch.compile(_masked, backend=counting)
    for length in (7, 9, 4, 12, 7, 15):
        ids = torch.randint(0, VOCABULARY, (2, length))
        results = []
        with collect() as reports:
            for function, loss in ((model, _masked), (step, second)):
                model.zero_grad()
                value = loss(function(ids), ids)
                value.backward()
                results.append([value.detach(), *(p.grad for p in model.parameters())])
        torch.testing.assert_close(results[1], results[0])
    assert len(compiles) <= 2  # a static graph, then a dynamic one
    assert not reports  # nothing was compiled any more


def test_logits_looked_at_before_and_after(batch):
    """The gradient then flows through the logits, whose hooks see all of it."""
    ids, labels = batch
    model = Model()
    step, second = compiled(model), _second(_cross_entropy)
    for first_look in (True, False):
        results = []
        for function, loss in ((model, _cross_entropy), (step, second)):
            model.zero_grad()
            logits = function(ids)
            if first_look:
                logits.retain_grad()
            total = loss(logits, labels)
            if not first_look:
                logits.retain_grad()
            (total + logits.mean()).backward()
            results.append([logits.grad, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(results[1], results[0])


def test_modes(batch):
    ids, labels = batch
    model = Model()
    step, second = compiled(model), _second(_masked)
    expected = _masked(model(ids), labels)
    with torch.no_grad():
        logits = step(ids)
        torch.testing.assert_close(second(logits, labels), expected)
    assert not second(logits, labels).requires_grad
    with torch.inference_mode():
        assert second(step(ids), labels).is_inference()
    results = []
    for function, loss in ((model, _masked), (step, second)):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(loss(function(ids), labels))
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=0)


def _autocast_inside(z, y):
    with torch.autocast("cpu", torch.bfloat16):
        return z.pow(3).mean() + _cross_entropy(z, y)


def _autocast_off_inside(z, y):
    with torch.autocast("cpu", torch.bfloat16):
        first = z.pow(3).mean()
        with torch.autocast("cpu", enabled=False):
            second = _cross_entropy(z.float(), y)
    return first + second


def _autocast_twice(z, y):
    with torch.autocast("cpu", torch.bfloat16):
        first = _cross_entropy(z, y)
    with torch.autocast("cpu", enabled=False):
        return first + z.float().logsumexp(-1).square().mean()


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("loss", [_autocast_inside, _autocast_off_inside, _autocast_twice])
def test_fault_AF_autocast_inside_and_around(loss, around, batch):
    """Dynamo failed on our program of the second function: "Global autocast state changed"."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=around)
    second = autocast(_second(lambda z, y: loss(z, y), fullgraph=True))
    logits = compiled(Model())(batch[0])
    with collect() as reports:
        second(logits, batch[1])
    assert [row for report in reports for row in report.chunked]
    assert not logits._formula.filled
    _check(autocast(loss), second, batch, torch.bfloat16)


def test_weight_modified_in_between(batch):
    model = Model()
    second = _second(_cross_entropy)
    logits = compiled(model)(batch[0])
    second(logits, batch[1])
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(StaleError, match="modified in place"):
        second(logits, batch[1])


def test_two_models_and_one_loss(batch):
    """What was compiled for one model's logits is not used for another's."""
    second = _second(_masked)
    for softcap in (None, 3.0, None, 5.0):
        model = Model(softcap=softcap)
        logits = compiled(model)(batch[0])
        torch.testing.assert_close(second(logits, batch[1]), _masked(model(batch[0]), batch[1]))
        assert not logits._formula.filled


def test_student_in_the_second_function(batch):
    """A teacher's deferred logits and a head of the function's own are one region."""
    teacher, student = Model(softcap=3.0), Model()

    def distil(given, ids):
        own = student(ids)
        return F.kl_div(own.log_softmax(-1), given.softmax(-1), reduction="batchmean")

    with torch.no_grad():
        expected, logits = teacher(batch[0]), compiled(teacher)(batch[0])
    second = _second(distil)
    results = []
    for loss, given in ((distil, expected), (second, logits)):
        student.zero_grad()
        value = loss(given, batch[0])
        value.backward()
        results.append([value.detach(), *(p.grad for p in student.parameters())])
    torch.testing.assert_close(results[1], results[0])
    assert not logits._formula.filled
