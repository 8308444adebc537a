"""Wide values that do not depend on the head are computed per chunk, and never exist as a whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import check, run, widened
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import autochunk
import autochunk.backend

B, T, H, V = 3, 8, 4, 192
OPTIONS = {"min_bytes": 0, "num_chunks": 3, "strict": True}


def _kl(z, p):
    return (p * (p.clamp_min(1e-9).log() - z.log_softmax(-1))).sum(-1).mean()


def _hot(size, y, on=1.0, off=0.0):
    return torch.full(size, off).scatter_(-1, y.unsqueeze(-1), on)


def _without_gradient(z, t, y):
    with torch.no_grad():
        p = t.softmax(-1)
    return _kl(z, p)


def _autocast(z, t, y):
    with torch.autocast("cpu", torch.bfloat16):
        p = F.linear(t.float(), torch.eye(V)).sigmoid()
    return _kl(z, p.float())


def _written_earlier(z, t, y):
    t = t.clone()
    t[..., 0] = 3.0
    return _kl(z, t.softmax(-1))


def _sure(z, t, y):
    logp = t.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    best = logp.max(-1).values
    return (z.logsumexp(-1) * entropy / (1 - best)).mean()


#: Functions of logits, given wide numbers (with a gradient) and labels: nothing wide is outside.
SUNK = {
    "softmax": lambda z, t, y: _kl(z, t.softmax(-1)),
    "temperature": lambda z, t, y: _kl(z / 2, (t / 2).softmax(-1)),
    "cast": lambda z, t, y: _kl(z, t.to(torch.bfloat16).float().softmax(-1)),
    "flattened": lambda z, t, y: _kl(z.flatten(0, 1), t.view(-1, V).softmax(-1)),
    "narrow results": _sure,
    "without gradient": _without_gradient,
    "of two": lambda z, t, y: _kl(z, (0.5 * t.softmax(-1) + 0.5 * t.roll(1, -1).softmax(-1))),
    "mask": lambda z, t, y: torch.where(t > 0, z, -1e9).logsumexp(-1).mean(),
    "top-k mask": lambda z, t, y: z.masked_fill(t < t.topk(5).values[..., -1:], 0).square().mean(),
    "one-hot": lambda z, t, y: -(F.one_hot(y, V) * z.log_softmax(-1)).sum(-1).mean(),
    "one-hot of eq": lambda z, t, y: (z * (y.unsqueeze(-1) == torch.arange(V))).sum(-1).mean(),
    "scatter in place": lambda z, t, y: (_hot((B, T, V), y, 0.9, 0.1) * z.log_softmax(-1)).sum(),
    "eye": lambda z, t, y: (z.flatten(0, 1) * (2 * torch.eye(B * T, V) - 1)).sigmoid().mean(),
    "tables": lambda z, t, y: F.mse_loss(z, t.sign() * torch.arange(V) / V),
}

#: Those that stay outside, or are no business of ours; as exact all the same.
OUTSIDE = {
    "autocast": _autocast,
    "written earlier": _written_earlier,
    "rows mixed": lambda z, t, y: _kl(z, t.softmax(0)),
    "features first": lambda z, t, y: _kl(z, t.transpose(1, 2).softmax(1).transpose(1, 2)),
    "shifted": lambda z, t, y: _kl(z[:, :-1], t[:, 1:].softmax(-1)),
    "also returned": lambda z, t, y: (_kl(z, p := t.softmax(-1)), p),
    "also summed over rows": lambda z, t, y: _kl(z, p := t.softmax(-1)) + p.sum(1).square().sum(),
    "narrow part outside": lambda z, t, y: _kl(z, p := t.softmax(-1)) + p.max(-1).values.sum(),
    "random": lambda z, t, y: _kl(z, (t + 0 * torch.rand(B, T, V)).softmax(-1)),
    "two heads": lambda z, t, y: _kl(z, p := t.softmax(-1)) + _kl(z * 2, p),
}


def _inputs(grad=False):
    return [
        torch.randn(B, T, H).requires_grad_(),
        (torch.randn(V, H) * 0.5).requires_grad_(),
        torch.randn(B, T, V).requires_grad_(grad),
        torch.randint(0, V, (B, T)),
    ]


def _compiled(function, dynamic=None):
    def loss(x, w, t, y):
        return function(F.linear(x, w), t, y)

    chunked = torch.compile(loss, backend="autochunk", options=OPTIONS, dynamic=dynamic)
    return loss, chunked


def _made(graphs):
    """The sizes of what the ops of AOTAutograd's graphs make, views and regions left out."""
    for graph in graphs:
        for node in graph.nodes:
            if not isinstance(node.target, torch._ops.OpOverload):
                continue
            view = any(result.alias_info for result in node.target._schema.returns)
            if node.target.namespace != "autochunk" and not view:
                for tensor in torch.utils._pytree.tree_leaves(node.meta.get("val", ())):
                    yield tensor.numel(), node


@pytest.mark.parametrize("name", SUNK)
def test_nothing_wide_outside(name, no_codegen, monkeypatch):
    graphs = []

    def outer(gm, example_inputs, config_patches=None):
        def keep(gm, example_inputs):
            graphs.append(gm.graph)
            return make_boxed_func(gm)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(gm, example_inputs)

    monkeypatch.setattr(autochunk.backend, "compile_fx", outer)
    loss, chunked = _compiled(SUNK[name])
    inputs = _inputs()
    actual = run(chunked, inputs)
    assert len(graphs) == 2
    numel, node = max(_made(graphs), key=lambda made: made[0])
    assert numel <= V * H, node.format_node()
    check(actual, run(loss, inputs), run(loss, widened(inputs)), torch.float32)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", [*SUNK, *OUTSIDE])
def test_gradient_of_the_given_numbers(name, dynamic, no_codegen):
    loss, chunked = _compiled({**SUNK, **OUTSIDE}[name], dynamic)
    inputs = _inputs(grad=True)
    explained = autochunk.explain(loss, options=OPTIONS)(*inputs)
    assert explained.chunked, str(explained)
    assert not explained.refused, str(explained)
    actual = run(chunked, inputs)
    dtype = torch.bfloat16 if name in ("cast", "autocast") else torch.float32
    check(actual, run(loss, inputs), run(loss, widened(inputs)), dtype)


def test_numbers_written_before_the_head_runs(no_codegen):
    def loss(x, w, t, y):
        t = t.clone()
        p = t.softmax(-1)
        t.zero_()
        return _kl(F.linear(x, w), p) + t.sum()

    inputs = _inputs()
    chunked = torch.compile(loss, backend="autochunk", options=OPTIONS)
    actual = run(chunked, inputs)
    check(actual, run(loss, inputs), run(loss, widened(inputs)), torch.float32)


def test_random_numbers_are_drawn_once_and_in_order(no_codegen):
    def loss(x, w, t, y):
        first = torch.rand(B, T)
        noisy = F.dropout(t, 0.5).softmax(-1)
        second = torch.rand(B, T)
        return _kl(F.linear(x, w), noisy) + (first - second).mean()

    inputs = _inputs()
    chunked = torch.compile(loss, backend="autochunk", options=OPTIONS)
    torch.manual_seed(3)
    actual = chunked(*inputs)
    torch.manual_seed(3)
    torch.testing.assert_close(actual, loss(*inputs))
