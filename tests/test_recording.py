"""The model is compiled, its loss is plain Python: evaluated in chunks, as exact as eager."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import check, run
from torch import Tensor, nn

from autochunk import DeferredTensor, StaleError
from autochunk.report import collect

VOCABULARY, HIDDEN = 128, 8
OPTIONS = {"min_bytes": 0, "num_chunks": 3, "strict": True}


class Model(nn.Module):
    """Returns logits."""

    def __init__(self, dtype: torch.dtype = torch.float32, softcap: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN, dtype=dtype)
        self.head = nn.Linear(HIDDEN, VOCABULARY, dtype=dtype)
        self.softcap = softcap

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.embed(ids)))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="autochunk", options={**OPTIONS, **options})


def _cross_entropy(z, y, **kwargs):
    return F.cross_entropy(z.view(-1, VOCABULARY), y.view(-1), **kwargs)


def _shifted(z, y):
    return F.cross_entropy(z[:, :-1].flatten(0, 1).float(), y[:, 1:].flatten())


def _hf_label_smoother(z, y, epsilon=0.1):
    logp = -F.log_softmax(z, dim=-1)
    y = y.unsqueeze(-1)
    ignored = y.eq(-100)
    nll = logp.gather(dim=-1, index=y.clamp(min=0))
    smoothed = logp.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(ignored, 0.0)
    smoothed.masked_fill_(ignored, 0.0)
    count = ignored.numel() - ignored.long().sum()
    return (1 - epsilon) * nll.sum() / count + epsilon * smoothed.sum() / (count * z.shape[-1])


def _picked(z, y):
    return z.gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)


def _policy_gradient(z, y):
    logps = _picked(z, y) - z.logsumexp(-1)
    ratio = torch.exp(logps - logps.detach())
    p = z.softmax(-1)
    entropy = z.logsumexp(-1) - (p * z).sum(-1)
    return -(ratio * logps.detach()).mean() - 0.01 * entropy.mean()


def _reinforce(z, y):
    policy = torch.distributions.Categorical(logits=z)
    return -(policy.log_prob(y.clamp_min(0)) * (y > 60)).mean() - 0.01 * policy.entropy().mean()


def _expected_embedding(z, y):
    table = torch.linspace(-1, 1, VOCABULARY * 3, dtype=z.dtype).view(VOCABULARY, 3)
    p = z.clone().softmax(-1)
    return (p @ table).square().mean() + torch.einsum("btv,vk->btk", p, table).tanh().sum()


def _with_accuracy(z, y):
    return _cross_entropy(z, y), (z.argmax(-1) == y).float().mean()


def _no_grad_metrics(z, y):
    loss = _cross_entropy(z, y)
    with torch.no_grad():
        top = z.topk(5).indices.eq(y.unsqueeze(-1)).any(-1).float().mean()
        perplexity = _cross_entropy(z.float(), y).exp()
    return loss, top, perplexity


def _two_losses(z, y):
    return _cross_entropy(z, y) + 1e-2 * z.float().logsumexp(-1).square().mean()


#: Functions of the logits and labels, and how many programs they are.
LOSSES = {
    "cross entropy": (_cross_entropy, 1),
    "sum": (lambda z, y: _cross_entropy(z, y, reduction="sum"), 1),
    "per token": (lambda z, y: _cross_entropy(z, y, reduction="none"), 1),
    "label smoothing": (lambda z, y: _cross_entropy(z, y, label_smoothing=0.1), 1),
    "class weights": (
        lambda z, y: _cross_entropy(z, y, weight=torch.arange(1, 129).to(z.dtype)),
        1,
    ),
    "module": (lambda z, y: nn.CrossEntropyLoss()(z.transpose(1, 2), y), 1),
    "shifted": (_shifted, 1),
    "reshape": (lambda z, y: F.cross_entropy(z.reshape(-1, z.size(-1)), y.reshape(-1)), 1),
    "nll of log_softmax": (
        lambda z, y: F.nll_loss(z.log_softmax(-1).flatten(0, 1), y.flatten()),
        1,
    ),
    "Hugging Face's label smoother": (_hf_label_smoother, 2),
    "policy gradient": (_policy_gradient, 3),
    "torch.distributions": (_reinforce, 3),
    "expected embedding": (_expected_embedding, 2),
    "accuracy": (_with_accuracy, 2),
    "metrics": (_no_grad_metrics, 3),
    "two losses": (_two_losses, 2),
    "temperature": (lambda z, y: _cross_entropy(z / 0.7, y), 1),
    "softcap": (lambda z, y: _cross_entropy(30 * torch.tanh(z / 30), y), 1),
    "mask": (lambda z, y: F.cross_entropy(z.view(-1, VOCABULARY)[y.view(-1) > 9], y[y > 9]), 1),
    "mask of tokens": (lambda z, y: F.cross_entropy(z[y > 9], y[y > 9]), 1),
    "mask of tokens, then a label": (lambda z, y: z.log_softmax(-1)[y > 9, 3].sum(), 1),
    "mask of sequences": (lambda z, y: z[y[:, 0] >= 0, 2:].logsumexp(-1).sum(), 1),
    "mixture": (
        lambda z, y: (
            torch.stack([z.log_softmax(-1), torch.zeros_like(z)]).logsumexp(0)[y > 9].sum()
        ),
        1,
    ),
    "one more class": (
        lambda z, y: F.cross_entropy(
            torch.cat([z, torch.zeros(2, 9, 1, dtype=z.dtype)], -1).flatten(0, 1), y.flatten()
        ),
        1,
    ),
    "positions": (lambda z, y: z[:, [0, 4]].logsumexp(-1).sum(), 1),
    "index_select": (
        lambda z, y: z.view(-1, VOCABULARY).index_select(0, torch.tensor([3, 1, 4])).amax(-1).sum(),
        1,
    ),
    "each sequence": (
        lambda z, y: torch.stack([_cross_entropy(a, b) for a, b in zip(z, y, strict=True)]).sum(),
        1,
    ),
    "each by number": (lambda z, y: sum(z[i, : 3 + i].logsumexp(-1).sum() for i in (0, 1)), 2),
    "unbind": (lambda z, y: sum(a.logsumexp(-1).mean() for a in z.unbind(1)[:3]), 3),
    "halves": (lambda z, y: _cross_entropy(z.chunk(2)[0], y[0]) - z.split(1)[1].mean(), 2),
    "parts": (lambda z, y: sum(a.amax(-1).sum() for a in torch.split(z, [2, 7], dim=1)), 2),
    "parts of the vocabulary": (lambda z, y: z.split(100, -1)[1].logsumexp(-1).mean(), 1),
    "rows and labels": (
        lambda z, y: (
            -z.log_softmax(-1)
            .view(-1, VOCABULARY)[torch.arange(18), y.view(-1)][y.view(-1) > 9]
            .sum()
        ),
        1,
    ),
    "last": (lambda z, y: z[:, -1].logsumexp(-1).sum(), 1),
    "bans": (lambda z, y: z.masked_fill(torch.arange(VOCABULARY) < 3, -1e9).logsumexp(-1).sum(), 1),
    "mse": (lambda z, y: F.mse_loss(z.softmax(-1), torch.ones_like(z) / VOCABULARY), 1),
    "kl": (
        lambda z, y: F.kl_div(
            z.log_softmax(-1), torch.full_like(z, 1 / 128), reduction="batchmean"
        ),
        1,
    ),
    "mean": (lambda z, y: (z * z).mean(), 1),
    "rows mixed": (lambda z, y: z.softmax(0).square().sum(), 0),
    "over time": (lambda z, y: z.cumsum(1).logsumexp(-1).mean(), 0),
    "in place": (lambda z, y: _cross_entropy(z.div_(2), y), 0),
}


def _inputs(model: Model) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in model.parameters()]


def _outcome(model: Model, function: Any, loss: Any, batch: Any) -> Any:
    """Outputs, and the gradients of the parameters."""

    def call(*parameters: Tensor) -> Any:
        with torch.no_grad():
            for own, given in zip(model.parameters(), parameters, strict=True):
                own.copy_(given)
        return loss(function(batch[0]), batch[1])

    model.zero_grad()
    outcome = run(call, _inputs(model))
    return type(outcome)(outcome.outputs, tuple(p.grad for p in model.parameters()))


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name, batch):
    loss, programs = LOSSES[name]
    model = Model()
    exact = Model().double()
    function = compiled(model)
    with collect() as reports:
        actual = _outcome(model, function, loss, batch)
    first, *rest = reports
    assert [row.strategy for row in first.chunked] == ["deferred"]
    assert len([r for r in rest if r.chunked]) == programs, "\n".join(map(str, reports))
    check(
        actual,
        _outcome(model, model, loss, batch),
        _outcome(exact, exact, loss, batch),
        torch.float32,
    )


@pytest.mark.parametrize("name", ["cross entropy", "accuracy", "policy gradient", "two losses"])
def test_logits_stay_deferred(name, batch):
    logits = compiled(Model())(batch[0])
    LOSSES[name][0](logits, batch[1])
    assert type(logits) is DeferredTensor
    assert not logits._formula.filled


def test_bfloat16(batch):
    model, exact = Model(torch.bfloat16), Model().double()
    with torch.no_grad():
        for a, b in zip(exact.parameters(), model.parameters(), strict=True):
            a.copy_(b)
    loss = LOSSES["shifted"][0]
    actual = _outcome(model, compiled(model), loss, batch)
    check(
        actual,
        _outcome(model, model, loss, batch),
        _outcome(exact, exact, loss, batch),
        torch.bfloat16,
    )


@pytest.mark.parametrize("where", ["model", "loss", "both"])
def test_autocast(where, batch):
    ids, labels = batch
    model = Model(softcap=5.0)
    results = []
    for function in (model, compiled(model)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "loss"):
            logits = function(ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "model"):
            values = (logits * 2).softmax(-1).to(logits.dtype).square().sum(-1)
            loss = _cross_entropy(logits * 2, labels)
        (loss + values.float().square().mean()).backward()
        results.append([loss, values, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*reversed(results), strict=True):
        assert ours.dtype == theirs.dtype
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * scale)


def test_grad_modes_change_between_model_and_loss(batch):
    ids, labels = batch
    model = Model()
    function = compiled(model)
    with torch.no_grad():
        logits = function(ids)
    assert not _cross_entropy(logits, labels).requires_grad
    logits = function(ids)
    with torch.no_grad():
        assert not _cross_entropy(logits, labels).requires_grad
        recorded = logits.float() * 2
    assert _cross_entropy(logits, labels).requires_grad
    assert not _cross_entropy(recorded, labels).requires_grad
    torch.testing.assert_close(
        _cross_entropy(recorded, labels), _cross_entropy(model(ids) * 2, labels)
    )
    with torch.inference_mode():
        loss = _cross_entropy(function(ids), labels)
    assert loss.is_inference()


def test_teacher_and_student(batch):
    ids, _ = batch
    student, teacher = Model(), Model(softcap=3.0).requires_grad_(False)
    results = []
    for functions in ((student, teacher), (compiled(student), compiled(teacher))):
        student.zero_grad()
        z, t = functions[0](ids), functions[1](ids)
        loss = F.kl_div(F.log_softmax(z / 2, -1), F.softmax(t / 2, -1), reduction="batchmean")
        loss.backward()
        results.append([loss, *(p.grad.clone() for p in student.parameters())])
    assert type(z) is type(t) is DeferredTensor
    torch.testing.assert_close(results[1], results[0])


def test_gradient_of_the_logits(batch):
    ids, labels = batch
    model = Model()
    results = []
    for function in (model, compiled(model)):
        logits = function(ids)
        loss = _cross_entropy(logits, labels)
        first = torch.autograd.grad(loss, logits, retain_graph=True)
        both = torch.autograd.grad(loss, [logits, model.head.weight])
        results.append([*first, *both])
    torch.testing.assert_close(results[1], results[0])


def test_gradient_of_a_recorded_view(batch):
    ids, labels = batch
    model = Model()
    results = []
    for function in (model, compiled(model)):
        flat = function(ids).view(-1, VOCABULARY)
        loss = F.cross_entropy(flat, labels.view(-1))
        results.append(torch.autograd.grad(loss, [flat, model.head.bias]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_and_retained_gradients(when, batch):
    ids, labels = batch
    model = Model()
    results = []
    for function in (model, compiled(model)):
        model.zero_grad()
        seen: list[Tensor] = []
        logits = function(ids)
        if when == "before":
            logits.register_hook(seen.append)
            logits.retain_grad()
        loss = _cross_entropy(logits, labels)
        if when == "after":
            logits.register_hook(seen.append)
            logits.retain_grad()
        loss.backward()
        results.append([seen[0], logits.grad, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0])


@torch._functorch.config.patch(donated_buffer=False)
def test_retained_graph_and_several_backward_passes(batch):
    ids, labels = batch
    model = Model()
    results = []
    for function in (model, compiled(model)):
        model.zero_grad()
        logits = function(ids)
        first, second = _cross_entropy(logits, labels), logits.logsumexp(-1).mean()
        first.backward(retain_graph=True)
        (3 * first).backward(retain_graph=True)
        second.backward()
        results.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0])


def test_logits_used_after_the_loss(batch):
    """Looking at the logits between loss and backward pass changes no number."""
    ids, labels = batch
    model = Model()
    results = []
    for function in (model, compiled(model)):
        model.zero_grad()
        logits = function(ids)
        loss = _cross_entropy(logits, labels)
        shown = logits.detach().numpy().copy()
        (loss + logits.sum()).backward()
        results.append([torch.from_numpy(shown), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0])


def test_in_place_edit_is_seen_by_earlier_views(batch):
    ids, labels = batch
    model = Model()
    results = []
    for function in (model, compiled(model)):
        with torch.no_grad():
            logits = function(ids)
            view, cast = logits.view(-1, VOCABULARY), logits * 1
            logits[..., 0] = 7.0
            results.append([_cross_entropy(view, labels), cast.sum()])
    torch.testing.assert_close(results[1], results[0])


def test_operand_as_large_as_the_logits_is_not_copied(batch):
    logits = compiled(Model())(batch[0].repeat(4, 1))
    noise = torch.randn(logits.shape)
    with torch.no_grad():
        noisy = logits + noise
        noise.zero_()
    with pytest.raises(StaleError, match=r"add at .*test_recording.py:\d+ was deferred"):
        noisy.sum()


def test_pieces_share_memory_with_the_whole(batch):
    """As eager's: a piece that is modified shows in the whole and in the other pieces."""
    model = Model()
    results = []
    for function in (model, compiled(model)):
        with torch.no_grad():
            logits = function(batch[0])
            first, second = logits
            left, right = logits.chunk(2, dim=1)
            first.mul_(2)
            results.append([first, second, left, right, logits])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda z: z.split([2, 3], dim=1),
        lambda z: z.split(0),
        lambda z: z.chunk(2, dim=7),
        lambda z: torch.unbind(z, dim=-4),
        lambda z: z[2],
        lambda z: z[torch.ones(2, 8, dtype=torch.bool)],
        lambda z: z[:, torch.ones(8, dtype=torch.bool)],
        lambda z: z[..., torch.ones(127, dtype=torch.bool)],
        lambda z: z.view(-1, VOCABULARY)[torch.tensor([18]), torch.tensor([3])],
        lambda z: z.view(-1, VOCABULARY)[torch.tensor([1, 2]), torch.tensor([3, 4, 5])],
    ],
)
def test_pieces_that_do_not_exist(wrong, batch):
    model = Model()
    with pytest.raises(Exception) as expected:
        wrong(model(batch[0]))
    with pytest.raises(type(expected.value)) as actual:
        wrong(compiled(model)(batch[0]))
    assert str(actual.value).splitlines()[0] == str(expected.value).splitlines()[0]


def test_what_computes_the_logits_is_said(batch, caplog):
    caplog.set_level("INFO", logger="autochunk.deferred")
    logits = compiled(Model())(batch[0])
    _cross_entropy(logits, batch[1])
    assert not caplog.messages
    logits.tolist()
    (message,) = caplog.messages
    assert re.fullmatch(
        r".*test_recording.py:\d+: tolist computes logits, 2×9×128, 0.0 MiB", message
    )
    logits.tolist()
    assert len(caplog.messages) == 1


def test_recompile_limit(batch, caplog):
    """A Python program that needs too many versions of one expression is computed as ever."""
    caplog.set_level("INFO", logger="autochunk.deferred")
    model = Model()
    function = compiled(model)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=2):
        for n in (3, 4, 5):
            with torch.no_grad():
                ids = batch[0].repeat(1, 2)
                actual = function(ids)[:, :n].logsumexp(-1)
                torch.testing.assert_close(actual, model(ids)[:, :n].logsumexp(-1))
    assert "Dynamo's recompile limit is reached" in caplog.text


def test_stale(batch):
    ids, labels = batch
    model = Model()
    logits = compiled(model)(ids)
    recorded = logits / 2
    with torch.no_grad():
        model.head.weight.add_(1)
    for use in (lambda: _cross_entropy(logits, labels), lambda: recorded.sum()):
        with pytest.raises(StaleError, match="has since been modified in place"):
            use()


def test_label_out_of_range(batch):
    ids, labels = batch
    function = compiled(Model())
    labels[1, 2] = VOCABULARY
    with pytest.raises(IndexError, match=str(VOCABULARY)):
        _cross_entropy(function(ids), labels)
    labels[1, 2] = 0
    _cross_entropy(function(ids), labels).backward()


def test_error_of_the_user_is_pytorch_own(batch):
    logits = compiled(Model())(batch[0])
    with pytest.raises(RuntimeError, match="shape"):
        logits.view(-1, VOCABULARY + 1)
    with pytest.raises(ValueError, match="batch_size"):
        F.cross_entropy(logits.view(-1, VOCABULARY), batch[1].view(-1)[1:])
