"""Gradient modes inside of a graph: who has a gradient is what eager PyTorch and Inductor say."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

V = 40
OPTIONS = {"min_bytes": 0, "chunk_rows": 5, "strict": True}

#: Ops that return their argument itself, or a view of it, or a tensor of their own.
OPS: dict[str, Callable[[Tensor], Any]] = {
    # The argument itself, whatever the mode.
    "type_as": lambda z: z.type_as(z),
    "atleast_1d": torch.atleast_1d,
    "atleast_2d": torch.atleast_2d,
    "atleast_2d of two": lambda z: torch.atleast_2d(z, z)[1],
    "to a dtype": lambda z: z.to(z.dtype),
    "to a tensor": lambda z: z.to(z),
    "to a device": lambda z: z.to(z.device),
    "type": lambda z: z.type(torch.float32),
    "float": lambda z: z.float(),
    "cpu": lambda z: z.cpu(),
    "contiguous": lambda z: z.contiguous(),
    "flatten": lambda z: z.flatten(1),
    "real": lambda z: z.real,
    "conj": lambda z: z.conj(),
    "conj_physical": lambda z: z.conj_physical(),
    "resolve_conj": lambda z: z.resolve_conj(),
    "resolve_neg": lambda z: z.resolve_neg(),
    "positive": lambda z: +z,
    "broadcast_tensors": lambda z: torch.broadcast_tensors(z)[0],
    "sum_to_size": lambda z: z.sum_to_size(z.shape),
    "requires_grad_": lambda z: z.requires_grad_(),
    "Identity": lambda z: torch.nn.Identity()(z),
    "dropout in evaluation": lambda z: F.dropout(z, 0.5, training=False),
    # Views.
    "view": lambda z: z.view(z.shape),
    "view_as": lambda z: z.view_as(z),
    "reshape": lambda z: z.reshape(z.shape),
    "reshape of three": lambda z: z.reshape(3, -1, V),
    "expand": lambda z: z.expand(-1, -1),
    "expand_as": lambda z: z.expand_as(z),
    "broadcast_to": lambda z: z.broadcast_to(z.shape),
    "atleast_3d": lambda z: torch.atleast_3d(z)[..., 0],
    "squeeze": lambda z: z.squeeze(),
    "slice": lambda z: z[:],
    "ellipsis": lambda z: z[...],
    "narrow": lambda z: z.narrow(0, 0, z.shape[0]),
    "transposed twice": lambda z: z.T.T,
    "permute": lambda z: z.permute(0, 1),
    "movedim": lambda z: z.movedim(0, 0),
    "chunk": lambda z: z.chunk(1)[0],
    "split": lambda z: z.split(z.shape[0])[0],
    "tensor_split": lambda z: z.tensor_split(1)[0],
    "unflatten": lambda z: z.unflatten(0, (3, -1)),
    "alias": torch.ops.aten.alias,
    "as_strided": lambda z: z.as_strided(z.shape, z.stride()),
    "dropout1d in evaluation": lambda z: F.dropout1d(z, 0.1, False),
    # Tensors of their own.
    "clone": lambda z: z.clone(),
    "double": lambda z: z.double().float(),
    "detach": lambda z: z.detach(),
    "data": lambda z: z.data,
    "twice": lambda z: z * 2,
    "cat": lambda z: torch.cat([z]),
    "repeat": lambda z: z.repeat(1, 1),
    "where": lambda z: torch.where(z > 0, z, z),
    "nan_to_num": lambda z: z.nan_to_num(),
}

MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(12, 8, generator=random)
    w = torch.randn(V, 8, generator=random)
    return x.requires_grad_(), w.requires_grad_(), torch.randint(0, V, (12,), generator=random)


def _found(function: Callable[..., Any], ambient: Callable[[], Any] = torch.enable_grad) -> Any:
    """The loss, whether it says it has a gradient, and the gradients; or the error's class."""
    x, w, y = _inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with ambient():
                loss = function(x, w, y)
            if loss.requires_grad:
                loss.backward()
        except Exception as error:
            return type(error).__name__
    return loss.detach(), loss.requires_grad, x.grad, w.grad


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return all(
        torch.allclose(i, j, atol=1e-6)
        if isinstance(i, Tensor) and isinstance(j, Tensor)
        else i is j
        for i, j in zip(a, b, strict=True)
    )


def _agree(function: Callable[..., Any], **kwargs: Any) -> None:
    """Never a third thing: what eager PyTorch or Inductor (its AOTAutograd) gives."""
    eager = _found(function, **kwargs)
    compiled = _found(torch.compile(function, backend="autochunk", options=OPTIONS), **kwargs)
    if not _same(compiled, eager):
        inductor = _found(torch.compile(function, backend=aot_eager), **kwargs)
        assert _same(compiled, inductor), f"eager {eager}, inductor {inductor}, ours {compiled}"


def _loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.reshape(-1, V), y)


#: Each op under ``no_grad``, and those that cut the history themselves with gradients on.
UNDER = [(op, "no_grad") for op in OPS] + [("detach", "grad"), ("data", "grad"), ("view", "grad")]


@pytest.mark.parametrize(("op", "mode"), UNDER)
def test_fault_modes_of_an_op_in_the_graph(op: str, mode: str, no_codegen: Any):
    """``z.type_as(z)`` under ``no_grad`` is ``z``, with its gradients; they were lost."""
    function, context = OPS[op], MODES[mode]

    def f(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(x, w)
        with context():
            made = function(z)
        return _loss(made, y)

    _agree(f)


@pytest.mark.parametrize("op", ["type_as", "float", "flatten", "twice", "clone", "detach"])
def test_fault_modes_of_inference_in_the_graph(op: str, no_codegen: Any):
    """A part in inference mode had gradients."""
    function = OPS[op]

    def f(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(x, w)
        with torch.inference_mode():
            made = function(z)
        return _loss(z, y) + _loss(made, y)

    _agree(f)


@pytest.mark.parametrize(("op", "mode"), UNDER)
def test_fault_modes_of_an_op_on_deferred_logits(op: str, mode: str, no_codegen: Any):
    """A view under ``no_grad`` of logits outside of the graph had a gradient."""
    function, context = OPS[op], MODES[mode]

    def outside(z: Tensor, y: Tensor) -> Tensor:
        with context():
            made = function(z)
        return _loss(made, y)

    def compiled(backend: Any, **options: Any) -> Callable[..., Tensor]:
        head = torch.compile(lambda x, w: F.linear(x, w), backend=backend, **options)
        return lambda x, w, y: outside(head(x, w), y)

    expected = _found(lambda x, w, y: outside(F.linear(x, w), y))
    ours = _found(compiled("autochunk", options=OPTIONS))
    assert _same(ours, expected) or _same(ours, _found(compiled(aot_eager)))


def _switched_on(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        return _loss(F.linear(x, w), y)


def _off_again(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        z = F.linear(x, w)
    return _loss(z, y)


def _nested(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.linear(x, w)
    with torch.no_grad():
        a = z * 2
        with torch.enable_grad():
            b = _loss(z * 3, y)
        c = b * 2
    return b + c + a.logsumexp(-1).mean()


def _out_of_inference(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.linear(x, w)
    with torch.no_grad():
        with torch.inference_mode(False):
            a = z * 2
        b = z * 3
    return _loss(a, y) + b.logsumexp(-1).mean()


def _beside_a_view(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.linear(x, w)
    with torch.no_grad():
        flat = z.view(3, 4, V)
    return _loss(z, y) + flat.logsumexp(-1).mean() * x.square().mean()


def _written(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        out = torch.zeros(2)
        out[0] = _loss(F.linear(x, w), y)
        return out.sum()


@pytest.mark.parametrize("ambient", MODES)
@pytest.mark.parametrize(
    "function",
    [_switched_on, _off_again, _nested, _out_of_inference, _beside_a_view, _written],
    ids=lambda f: f.__name__,
)
def test_fault_modes_around_the_graph(function: Any, ambient: str, no_codegen: Any):
    """``enable_grad`` in a graph that is called under ``no_grad``: the gradients were lost."""
    _agree(function, ambient=MODES[ambient])


def test_fault_modes_logits_made_with_gradients_on_under_no_grad(no_codegen: Any):
    """Their inputs are views that were made under ``no_grad``."""
    x, w, y = _inputs()

    @torch.compile(backend="autochunk", options=OPTIONS)
    def head(x: Tensor, w: Tensor) -> Tensor:
        with torch.enable_grad():
            return F.linear(x, w)

    with torch.no_grad():
        z = head(x, w)
    _loss(z, y).backward()
    assert _same((z, True, x.grad, w.grad), (z, True, *_found(_switched_on)[2:]))


def test_fault_modes_with_kernels():
    """All ops of one kind in one function, against real Inductor."""
    names = ["type_as", "atleast_2d", "float", "sum_to_size", "view", "slice", "clone", "twice"]

    def f(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z, total = F.linear(x, w), x.new_zeros(())
        for i, name in enumerate(names):
            with torch.no_grad():
                made = OPS[name](z)
            total = total + (i + 1) * _loss(made, y)
        return total

    ours = _found(torch.compile(f, backend="autochunk", options=OPTIONS))
    inductor = _found(torch.compile(f, backend="inductor"))
    assert isinstance(ours, tuple)
    assert isinstance(inductor, tuple)
    for a, b, c in zip(ours, inductor, _found(f), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)
