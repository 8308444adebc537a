"""Deferred logits behave as the tensor that the model would have returned."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from autochunk import DeferredTensor, StaleError, explain

HIDDEN, VOCABULARY = 8, 96
OPTIONS = {"min_bytes": 0, "chunk_rows": 5, "strict": True}


class LanguageModel(nn.Module):
    """Returns its loss and its logits, as Hugging Face's models do."""

    def __init__(self, softcap: float | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.softcap = softcap

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.embed(ids))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits.view(-1, VOCABULARY), ids.view(-1)), logits


def compiled(model: nn.Module, **kwargs: Any) -> Callable[..., Any]:
    torch._dynamo.reset()  # its recompilation limits are per code object, not per model
    return torch.compile(model, backend="autochunk", options=OPTIONS, **kwargs)


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel()


@pytest.fixture
def ids() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, VOCABULARY, (2, 7))


@pytest.fixture(scope="module")
def _pair() -> tuple[nn.Module, Callable[..., Any]]:
    torch.manual_seed(0)
    model = LanguageModel()
    return model, compiled(model)


@pytest.fixture
def pair(_pair: Any) -> tuple[nn.Module, Callable[..., Any]]:
    """A model and the same compiled, for tests that do not modify it."""
    _pair[0].zero_grad()
    return _pair


def deferred(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of a compiled model, not used yet."""
    logits = compiled(model)(ids)[1]
    assert type(logits) is DeferredTensor
    return logits


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def outcome(use: Callable[..., Any], *args: Any) -> Any:
    """What a use returns, or the error it raises."""
    try:
        return use(*args)
    except Exception as error:
        return type(error), str(error)


def plain(value: Any) -> Any:
    """A comparable form of a result."""
    if isinstance(value, DeferredTensor):
        return plain(value.materialize())
    if isinstance(value, Tensor):
        flags = (value.requires_grad, value.is_leaf, value.dtype, value.shape, value.stride())
        return ("tensor", *flags, value.detach().clone())
    if isinstance(value, np.ndarray):
        return ("array", value.dtype, value.copy())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, str):
        return re.sub(r"grad_fn=<\w+>", "grad_fn", value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def assert_same(actual: Any, expected: Any) -> None:
    """Equal to rounding; everything that is not a number exactly."""
    if isinstance(expected, list):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
    elif isinstance(expected, tuple):
        assert isinstance(actual, tuple)
        assert_same(list(actual), list(expected))
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        assert_same(list(actual.values()), list(expected.values()))
    elif isinstance(expected, (Tensor, np.ndarray)):
        actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
        scale = expected.float().abs().max().item() if expected.numel() else 0
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale, equal_nan=True)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-4)
    else:
        assert actual == expected


# ---- every use gives what eager gives ----------------------------------------------------------


def _save(logits: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save({"logits": logits}, buffer)
    buffer.seek(0)
    return torch.load(buffer)["logits"]


def _dlpack(logits: Tensor) -> Tensor:
    return torch.from_dlpack(logits.detach())


def _in_place(logits: Tensor) -> list[Tensor]:
    logits /= 2
    logits[0] = 0
    logits[:, 1].mul_(3)
    logits.add_(logits)
    return [logits, logits.sum(), logits[0, 0]]


def _out(logits: Tensor) -> Tensor:
    return torch.add(logits.detach(), 1, out=torch.empty_like(logits, requires_grad=False))


def _retain_grad(logits: Tensor) -> Tensor:
    logits.retain_grad()
    assert logits.retains_grad
    logits.square().sum().backward()
    return logits.grad


def _hooks(logits: Tensor) -> Tensor:
    """One registered before the value is there, one after."""
    handles = [logits.register_hook(lambda g: g * 2)]
    total = logits.sum()
    handles.append(logits.register_hook(lambda g: g + 1))
    (gradient,) = torch.autograd.grad(total, logits, retain_graph=True)
    for handle in handles:
        handle.remove()
    return gradient


def _set_data(logits: Tensor) -> Tensor:
    logits.data = torch.ones(3)
    return logits


def _as_gradient(logits: Tensor) -> Tensor:
    x = torch.ones_like(logits, requires_grad=True)
    (x * x).backward(logits)
    return x.grad


def _swap(logits: Tensor) -> list[Tensor]:
    other = torch.ones(2)
    torch.utils.swap_tensors(logits, other)
    return [logits, other]


def _flops(logits: Tensor) -> tuple[int, Tensor]:
    """The deferred computation is not counted among what the user does here."""
    with FlopCounterMode(display=False) as counter:
        product = logits[0] @ logits[0].t()
    return counter.get_total_flops(), product


def _in_device_context(logits: Tensor) -> Tensor:
    with torch.device("meta"):
        return logits.sum()


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class _SaveOnly(torch.autograd.Function):
    """Does not touch its input in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ones(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class _Reverse(torch.autograd.Function):
    """Looks at its input and returns it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.sum()
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class _Double(torch.autograd.Function):
    """Modifies its input in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def _function_then_gradient(logits: Tensor) -> list[Tensor]:
    """The gradient with respect to the logits counts the Function's use and the later one."""
    loss = _Square.apply(logits).sum()
    return [*torch.autograd.grad(loss + logits.sum(), logits)]


def _reverse_then_more(logits: Tensor) -> Tensor:
    reversed_ = _Reverse.apply(logits)
    return reversed_.sum() + 3 * logits.square().sum()


@torch.jit.script
def _scripted(x: Tensor) -> Tensor:
    return (x * 2).sum()


def _device_context(logits: Tensor) -> Tensor:
    with torch.device("cpu"):
        return logits.sum()


_COUNT = torch.full((2, 7), 2)

USES: dict[str, Callable[[Tensor], Any]] = {
    # metadata
    "shape": lambda t: (t.shape, t.size(), t.size(1), t.dim(), t.ndim, len(t), t.numel()),
    "layout": lambda t: (t.stride(), t.is_contiguous(), t.storage_offset(), t.layout, t.nbytes),
    "dtype": lambda t: (t.dtype, t.device, t.is_cuda, t.type(), t.element_size(), t.itemsize),
    "autograd": lambda t: (t.requires_grad, t.is_leaf, t.output_nr, t.retains_grad, t._version),
    "has-grad-fn": lambda t: t.grad_fn is None,
    "same-object": lambda t: (t is t, {t: 1}[t], hash(t) == id(t), weakref.ref(t)() is t),
    "predicates": lambda t: (
        torch.is_tensor(t),
        isinstance(t, Tensor),
        torch.is_floating_point(t),
        t.is_inference(),
        t._is_view(),
        t.is_shared(),
        t.is_complex(),
        t.is_sparse,
        t.is_nested,
        t._base,
    ),
    # reading
    "repr": repr,
    "str": str,
    "format": lambda t: f"{t.sum():.2f} {t}",
    "item": lambda t: t[0, 0, 0].item(),
    "item-error": lambda t: t.item(),
    "bool-error": bool,
    "float-error": float,
    "float": lambda t: float(t.mean()),
    "tolist": lambda t: t.tolist(),
    "index": lambda t: t[0, 1:3],
    "index-mask": lambda t: t[t > 0],
    "index-list": lambda t: t[[0, 1], [1, 2]],
    "iterate": list,
    "unpack": lambda t: (lambda a, b: [a, b])(*t),
    "in": lambda t: 1e9 in t,
    "equal": lambda t: (t == t, t.equal(t), torch.allclose(t, t)),
    "arithmetic": lambda t: [t + 1, 2 * t, t - torch.ones_like(t), -t, t @ t[0].t(), 1 / t, t**2],
    "reflected": lambda t: [torch.ones_like(t) - t, torch.ones(VOCABULARY) * t],
    "numpy-scalar": lambda t: np.float32(2) * t.detach(),
    "argmax": lambda t: t.argmax(-1),
    "topk": lambda t: list(t.topk(3)),
    "contiguous": lambda t: t.contiguous() is t,
    "same-dtype": lambda t: t.to(torch.float32) is t,
    "attribute": lambda t: (hasattr(t, "_nothing"), setattr(t, "_mine", 3), t.sum(), t._mine),
    "mT": lambda t: [t.mT, t.real],
    "views": lambda t: [t.view(-1, VOCABULARY), t[:, :-1].reshape(-1, VOCABULARY), t.unbind(0)],
    # functions
    "cross-entropy": lambda t: F.cross_entropy(t.view(-1, VOCABULARY), _COUNT.view(-1)),
    "cross-entropy-module": lambda t: nn.CrossEntropyLoss()(t.transpose(1, 2), _COUNT),
    "kl": lambda t: F.kl_div(t.log_softmax(-1), torch.zeros_like(t), log_target=True),
    "stack": lambda t: torch.stack([t, t]),
    "cat": lambda t: torch.cat([t, torch.zeros(1, 7, VOCABULARY)]),
    "cat-second": lambda t: torch.cat([torch.zeros(1, 7, VOCABULARY), t]),
    "where": lambda t: torch.where(t > 0, t, 0.0),
    "einsum": lambda t: torch.einsum("btv,bsv->bts", t, t),
    "collate": lambda t: torch.utils.data.default_collate([t, t]),
    "collate-rows": lambda t: torch.utils.data.default_collate(list(t)),
    "linear": lambda t: F.linear(t, torch.ones(3, VOCABULARY)),
    "op": lambda t: torch.ops.aten.sum.dim_IntList(t, [-1]),
    "op-packet": lambda t: torch.ops.aten.add(t, t),
    "parameters": lambda t: nn.utils.parameters_to_vector([t]),
    "map": lambda t: torch.utils._pytree.tree_map(torch.sum, {"a": [t]}),
    "script": _scripted,
    "make-fx": lambda t: make_fx(lambda u: u * 2)(t)(t),
    "fake": lambda t: FakeTensorMode().from_tensor(t).shape,
    "flops": _flops,
    "as-tensor": torch.as_tensor,
    "as-tensor-same": lambda t: torch.as_tensor(t) is t,
    "as-tensor-half": lambda t: torch.as_tensor(t, dtype=torch.bfloat16),
    "parameter": nn.Parameter,
    "vmap": lambda t: torch.vmap(lambda row: row.logsumexp(-1))(t),
    "vmap-captured": lambda t: torch.vmap(lambda scale: (t * scale).sum())(torch.ones(3)),
    "func-grad": lambda t: torch.func.grad(lambda u: (u * u).sum())(t),
    "func-grad-captured": lambda t: (
        torch.func.grad(lambda s: (t * s).sum())(torch.ones(())),
        t.sum(),
    ),
    "func-vjp": lambda t: torch.func.vjp(torch.sin, t)[1](torch.ones_like(t)),
    "func-jvp": lambda t: torch.func.jvp(torch.sin, (t,), (torch.ones_like(t),)),
    "device-context": _device_context,
    # elsewhere
    "cpu": lambda t: t.cpu() is t,
    "to-meta": lambda t: (lambda m: (m.device, m.shape, m.requires_grad))(t.to("meta")),
    "empty-like": lambda t: torch.zeros_like(t),
    "numpy": lambda t: t.detach().numpy(),
    "numpy-error": lambda t: t.numpy(),
    "numpy-force": lambda t: t.numpy(force=True),
    "asarray": lambda t: np.asarray(t.detach()),
    "asarray-error": np.asarray,
    "dlpack": _dlpack,
    "dlpack-error": torch.from_dlpack,
    "storage": lambda t: (t.untyped_storage().nbytes(), t.data_ptr() != 0),
    "data": lambda t: t.data,
    "share-memory": lambda t: t.detach().share_memory_().is_shared(),
    "copy": lambda t: copy.copy(t),
    "deepcopy": lambda t: copy.deepcopy(t.detach()),
    "deepcopy-error": copy.deepcopy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "save": _save,
    "multiprocessing": lambda t: (
        len(torch.multiprocessing.reductions.ForkingPickler.dumps(t.detach())) > 0
    ),
    # in place
    "in-place": _in_place,
    "out": _out,
    "zero": lambda t: t.detach().zero_(),
    "zero-shared": lambda t: (t.detach().zero_(), t.sum()),
    "in-place-no-grad": lambda t: torch.no_grad().__call__(lambda: [t.mul_(2), t])(),
    "metadata-in-place": lambda t: [t.transpose_(0, 1), t.squeeze_(), t.unsqueeze_(0), t],
    "resize-error": lambda t: t.resize_(3),
    "set-data": _set_data,
    "swap": _swap,
    # autograd
    "retain-grad": _retain_grad,
    "hooks": _hooks,
    "grad-wrt": lambda t: torch.autograd.grad(t.square().sum(), t),
    "grad-of": lambda t: torch.autograd.grad(t, t, torch.ones_like(t)),
    "grad-of-grad": lambda t: torch.autograd.grad(
        torch.autograd.grad(t.pow(3).sum(), t, create_graph=True)[0].sum(), t
    ),
    "grad-output": lambda t: torch.autograd.grad(
        (x := torch.ones_like(t, requires_grad=True)) * 2, x, t
    ),
    "as-gradient": _as_gradient,
    "backward-error": lambda t: t.backward(),
    "detach": lambda t: t.detach(),
    "detach-in-place": lambda t: [t.detach_(), t],
    "requires-grad-error": lambda t: t.requires_grad_(False),
    "requires-grad": lambda t: t.requires_grad_().requires_grad,
    "leaf-grad": lambda t: (lambda u: (u.sum().backward(), u.grad))(t.detach().requires_grad_()),
    "grad": lambda t: t.grad,
    "checkpoint": lambda t: torch.utils.checkpoint.checkpoint(torch.sin, t, use_reentrant=False),
    "checkpoint-reentrant": lambda t: torch.utils.checkpoint.checkpoint(
        torch.sin, t, use_reentrant=True
    ),
    "function": lambda t: _Square.apply(t),
    "function-save-only": lambda t: _SaveOnly.apply(t),
    "function-reverse": _reverse_then_more,
    "function-then-gradient": _function_then_gradient,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", list(USES.values()), ids=list(USES))
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_use(use: Callable[[Tensor], Any], grad: bool, pair: Any, ids: Tensor) -> None:
    results = []
    model, _ = pair
    for function in pair:
        with torch.set_grad_enabled(grad):
            loss, logits = function(ids)
        assert type(logits) is (Tensor if function is model else DeferredTensor)
        result = outcome(use, logits)
        after = outcome(lambda t: t * 1, logits)
        found = []
        if grad:
            total = loss
            for value in torch.utils._pytree.tree_leaves([result, after]):
                if isinstance(value, Tensor) and value.requires_grad and value.device == ids.device:
                    total = total + value.to(torch.float32).square().sum()
            found = [outcome(total.backward), gradients(model)]
        results.append(plain([result, after, found]))
    assert_same(results[1], results[0])


# ---- other compiled functions ------------------------------------------------------------------

BACKENDS = ["eager", "aot_eager", "inductor", "autochunk"]


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().view(-1, VOCABULARY), ids.view(-1), reduction="sum")


def _distil(logits: Tensor, weight: Tensor) -> Tensor:
    """The deferred logits are a teacher's, another head is the student's."""
    student = F.linear(torch.ones(2, 7, HIDDEN) / 3, weight)
    return F.kl_div(
        student.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="sum"
    )


def _many(logits: Tensor, ids: Tensor) -> list[Tensor]:
    return [logits, logits.view(-1, VOCABULARY), logits.detach(), logits[0] * 2, logits.argmax(-1)]


def _modify(logits: Tensor, ids: Tensor) -> Tensor:
    logits.mul_(2)
    logits[:, 0] = 1
    return logits.logsumexp(-1)


def _metadata(logits: Tensor, ids: Tensor) -> tuple[Tensor, Any]:
    kind = isinstance(logits, Tensor), logits.requires_grad, logits.dtype, logits.is_leaf
    return logits.new_ones(logits.shape[-1]), kind


class _Holder:
    """Compiled functions find tensors in attributes, too."""

    logits: Tensor

    def loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        self.logits = logits
        return self._loss(ids)

    def _loss(self, ids: Tensor) -> Tensor:
        return _loss(self.logits, ids)


SECOND = {
    "loss": _loss,
    "two-arguments": lambda t, ids: (t * t).sum() + _loss(t, ids),
    "dict": lambda t, ids: {"a": t.softmax(-1), "b": [t + 1]},
    "many": _many,
    "modify": _modify,
    "metadata": _metadata,
    "nothing": lambda t, ids: ids + 1,
    "unbind": lambda t, ids: [row.sum() for row in t],
    "function": lambda t, ids: _Square.apply(t),
    "checkpoint": lambda t, ids: torch.utils.checkpoint.checkpoint(
        torch.sin, t, use_reentrant=False
    ),
    "under-no-grad": lambda t, ids: torch.no_grad()(lambda: t.exp().sum())(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", SECOND)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_compiled_function(
    backend: str, name: str, grad: bool, pair: Any, ids: Tensor
) -> None:
    """It sees the value, with gradients flowing, and compiles once for all deferred tensors."""
    model, step = pair
    compiles = []

    def counting(gm: Any, inputs: Any) -> Any:
        compiles.append(gm)
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    fullgraph = name != "modify"  # Dynamo leaves writes to deferred tensors to eager PyTorch
    second = torch.compile(lambda t, i: SECOND[name](t, i), backend=counting, fullgraph=fullgraph)
    for _ in range(3):
        results = []
        for function, use in ((model, SECOND[name]), (step, second)):
            with torch.set_grad_enabled(grad):
                loss, logits = function(ids)
                assert type(logits) is (Tensor if function is model else DeferredTensor)
                result = use(logits, ids)
            after = [logits, logits.sum()]
            found = []
            if grad:
                total = loss
                for value in torch.utils._pytree.tree_leaves([result, after]):
                    if isinstance(value, Tensor) and value.requires_grad:
                        total = total + value.square().sum()
                total.backward()
                found = gradients(model)
            results.append(plain([result, after, found]))
        assert_same(results[1], results[0])
    assert len(compiles) <= (1 if fullgraph else 3)


def test_dynamic_shapes_in_a_second_function(pair: Any) -> None:
    model, step = pair
    compiles = []

    def counting(gm: Any, inputs: Any) -> Any:
        compiles.append(gm)
        return torch._dynamo.lookup_backend("inductor")(gm, inputs)

    second = torch.compile(_loss, backend=counting, fullgraph=True)
    for length in (7, 9, 4, 12, 7):
        ids = torch.randint(0, VOCABULARY, (2, length))
        results = []
        for function, use in ((model, _loss), (step, second)):
            loss, logits = function(ids)
            (loss + use(logits, ids)).backward()
            results.append(plain(gradients(model)))
        assert_same(results[1], results[0])
    assert len(compiles) == 2  # a static graph, then a dynamic one


class Student(nn.Module):
    """Its loss compares its logits with a teacher's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, ids: Tensor, teacher: Tensor) -> Tensor:
        logits = self.head(self.embed(ids))
        return F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True)


@pytest.mark.parametrize("teacher_grad", [True, False])
def test_deferred_logits_enter_a_chunked_region(teacher_grad: bool, pair: Any, ids: Tensor) -> None:
    teacher, step = pair
    student = Student()
    with torch.no_grad():
        explanation = explain(student, options=OPTIONS)(ids, step(ids)[1])
    assert len(explanation.chunked) == 2  # the teacher's, too
    assert explanation.refused == ()
    results = []
    for function, learner in (
        (teacher, student),
        (step, torch.compile(student, backend="autochunk", options=OPTIONS, fullgraph=True)),
    ):
        with torch.set_grad_enabled(teacher_grad):
            _, logits = function(ids)
        loss = learner(ids, logits)
        loss.backward()
        results.append(plain([loss, gradients(student), gradients(teacher)]))
    assert_same(results[1], results[0])


def test_gradient_with_respect_to_logits_of_a_second_function(pair: Any, ids: Tensor) -> None:
    _, step = pair
    second = torch.compile(lambda t: t.square().sum(), backend="inductor")
    _, logits = step(ids)
    total = second(logits) + logits.sum()
    (gradient,) = torch.autograd.grad(total, logits)
    assert_same(gradient, 2 * logits.detach() + 1)


def test_writes_in_a_full_graph_are_refused(pair: Any, ids: Tensor) -> None:
    _, step = pair
    _, logits = step(ids)
    second = torch.compile(lambda t: t.mul_(2), backend="inductor", fullgraph=True)
    expected = r"aten.mul_.Tensor would modify deferred logits .* call .materialize\(\) on them"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=expected):
        second(logits)


def test_graph_break_after_the_head(ids: Tensor) -> None:
    """The rest of the frame receives deferred logits."""

    class Broken(LanguageModel):
        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            loss, logits = super().forward(ids)
            torch._dynamo.graph_break()
            return loss + logits.logsumexp(-1).square().mean(), logits

    torch.manual_seed(0)
    model = Broken()
    step = compiled(model)
    for _ in range(2):
        results = []
        for function in (model, step):
            loss, logits = function(ids)
            (loss + logits.mean()).backward()
            results.append(plain([loss, logits, gradients(model)]))
        assert_same(results[1], results[0])


_OTHER_PROCESS = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_deferred import LanguageModel, VOCABULARY, compiled, gradients, _loss
torch.manual_seed(0)
model = LanguageModel()
step = compiled(model)
second = torch.compile(_loss, backend="inductor", fullgraph=True)
ids = torch.arange(14).view(2, 7)
for function, use in ((model, _loss), (step, second)):
    loss, logits = function(ids)
    (loss + use(logits, ids)).backward()
    torch.save(gradients(model), sys.argv[1] + str(use is second))
counters = torch._dynamo.utils.counters
print(counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_caches_of_a_second_process(tmp_path: Any) -> None:
    """A second function's compiled code is found again, and is right."""
    script = _OTHER_PROCESS.format(tests=os.path.dirname(__file__))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    hits = []
    for run in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "error:DeferredTensor", "-c", script, str(tmp_path / str(run))],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        hits.append(int(done.stdout))
        expected, actual = (torch.load(tmp_path / f"{run}{name}") for name in (False, True))
        assert_same(actual, expected)
    assert hits == [0, 2]


# ---- where gradients and modes come from -------------------------------------------------------


def test_gradient_through_loss_and_logits(pair: Any, ids: Tensor) -> None:
    model, step = pair
    results = []
    for function in (model, step):
        loss, logits = function(ids)
        (loss + logits.float().logsumexp(-1).square().mean()).backward()
        results.append(plain(gradients(model)))
    assert_same(results[1], results[0])


# A compiled backward pass that is to run twice must not overwrite its inputs.
@torch._functorch.config.patch(donated_buffer=False)
def test_gradient_in_two_backward_passes(model: LanguageModel, ids: Tensor) -> None:
    results = []
    for function in (model, compiled(model)):
        loss, logits = function(ids)
        loss.backward(retain_graph=True)
        logits.square().sum().backward()
        results.append(plain(gradients(model)))
    assert_same(results[1], results[0])


@torch._functorch.config.patch(donated_buffer=False)  # else a cached backward may refuse
def test_retained_graph(ids: Tensor) -> None:
    """The second backward pass computes the formula's own graph anew."""
    torch.manual_seed(0)
    model = LanguageModel(softcap=2.0)
    results = []
    for function in (model, compiled(model)):
        _, logits = function(ids)
        total = logits.pow(3).sum()
        total.backward(retain_graph=True)
        total.backward()
        results.append(plain(gradients(model)))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            total.backward()
    assert_same(results[1], results[0])


def test_second_derivative(ids: Tensor) -> None:
    torch.manual_seed(0)
    model = LanguageModel(softcap=2.0)
    model.embed.requires_grad_(False)  # compiled functions have no second derivative
    results = []
    for function in (model, compiled(model)):
        _, logits = function(ids)
        weight = model.head.weight
        (first,) = torch.autograd.grad(logits.pow(2).sum(), weight, create_graph=True)
        results.append(plain(torch.autograd.grad(first.pow(2).sum(), weight)))
    assert_same(results[1], results[0])


def test_hooks_on_parameters_run_once(pair: Any, ids: Tensor) -> None:
    model, step = pair
    handle = model.head.weight.register_hook(lambda g: g * 2)
    try:
        results = []
        for function in (model, step):
            function(ids)[1].square().sum().backward()
            results.append(plain(gradients(model)))
        assert_same(results[1], results[0])
    finally:
        handle.remove()


def test_hook_does_not_materialise(pair: Any, ids: Tensor) -> None:
    """FSDP registers a hook on every output of a model."""
    _, step = pair
    _, logits = step(ids)
    seen = []
    logits.register_hook(seen.append)
    assert logits.grad_fn is not None
    assert type(logits) is DeferredTensor
    logits.sum().backward()
    assert_same(seen, [torch.ones(2, 7, VOCABULARY)])


MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("later", MODES)
@pytest.mark.parametrize("earlier", MODES)
def test_modes(earlier: str, later: str, pair: Any, ids: Tensor) -> None:
    """What a tensor is was decided when the model ran, not when the value is computed."""
    model, step = pair
    results = []
    for function in pair:
        with MODES[earlier]():
            _, logits = function(ids)
        with MODES[later]():
            if function is step:
                assert logits.materialize() is logits
            flags = logits.requires_grad, logits.is_leaf, logits.is_inference()
        found = []
        if logits.requires_grad:
            logits.square().sum().backward()
            found = gradients(model)
        results.append(plain([flags, logits, found]))
    assert_same(results[1], results[0])


def test_eval_then_train(model: LanguageModel, ids: Tensor) -> None:
    step = compiled(model)
    for training in (False, True, False):
        model.train(training)
        results = []
        for function in (model, step):
            with torch.set_grad_enabled(training):
                _, logits = function(ids)
            results.append(plain(logits))
        assert_same(results[1], results[0])


@pytest.mark.parametrize("inside", [True, False], ids=["used-inside", "used-outside"])
def test_autocast(inside: bool, ids: Tensor) -> None:
    """The logits are bfloat16 wherever they are used."""
    torch.manual_seed(0)
    model = LanguageModel()
    results = []
    for function in (model, compiled(model)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, logits = function(ids)
            assert logits.dtype == torch.bfloat16
            if inside:
                total = logits.square().sum() + (logits @ logits.transpose(1, 2)).sum()
        if not inside:
            total = logits.square().sum() + (logits @ logits.transpose(1, 2)).sum()
        assert logits.dtype == torch.bfloat16
        total.backward()
        results.append((logits.detach(), total.detach(), gradients(model)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-2)


# ---- lifetime ----------------------------------------------------------------------------------


def test_stale(model: LanguageModel, ids: Tensor) -> None:
    step = compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, logits = step(ids)
    loss.backward()
    optimizer.step()
    assert logits.shape == (2, 7, VOCABULARY)
    assert type(logits) is DeferredTensor
    expected = (
        r"^autochunk: the logits were deferred, and their input 1 \(shape \[8, 96\]\) has since "
        r"been modified in place \(by an optimizer's step\?\), so their value can no longer be "
        r"computed; use the logits before that, or call .materialize\(\) on them$"
    )
    for _ in range(2):
        with pytest.raises(StaleError, match=expected):
            logits.sum()
    with pytest.raises(RuntimeError, match=expected.strip("^$")):  # Dynamo's error, our text
        torch.compile(torch.sum, backend="eager")(logits)


def test_steps(model: LanguageModel, ids: Tensor) -> None:
    """Materialised before the optimizer's step: usable after it. The next forward is right."""
    other = copy.deepcopy(model)
    step = compiled(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, other)]
    for _ in range(3):
        results = []
        for function, module, optimizer in zip(
            (step, other), (model, other), optimizers, strict=True
        ):
            loss, logits = function(ids)
            if isinstance(logits, DeferredTensor):
                logits.materialize()
            (loss + logits.mean()).backward()
            optimizer.step()
            results.append(plain([loss, logits, gradients(module)]))
        assert_same(results[0], results[1])


def test_gradient_after_a_step_is_refused(model: LanguageModel, ids: Tensor) -> None:
    """As eager PyTorch refuses it."""
    for function in (model, compiled(model)):
        _, logits = function(ids)
        total = logits.sum()
        with torch.no_grad():
            model.head.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


def test_replaced_weights(model: LanguageModel, ids: Tensor) -> None:
    """``weight.data = …`` is not a modification in place: the value is of the old weights."""
    expected = model(ids)[1].detach()
    _, logits = compiled(model)(ids)
    model.head.weight.data = torch.zeros_like(model.head.weight)
    assert_same(logits.detach(), expected)


def test_freed_weights(model: LanguageModel, ids: Tensor) -> None:
    """FSDP frees the memory of gathered weights; reading them would be fatal."""
    _, logits = compiled(model)(ids)
    storage = model.head.weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    with pytest.raises(StaleError, match="input"):
        logits.sum()
    storage.resize_(size)


def test_memory() -> None:
    """Holding deferred logits does not hold their bytes; what they were is freed with them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8192, bias=False))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return logits.logsumexp(-1).sum(), logits

    torch._dynamo.reset()
    step = torch.compile(forward, backend="autochunk", options=OPTIONS)
    x = torch.randn(100, 8)
    step(x)
    logits_bytes = 100 * 8192 * 4
    assert _bytes_kept(lambda: step(x)) < 0.1 * logits_bytes + 8 * 8192 * 4
    assert _bytes_kept(lambda: (lambda out: (out[1].materialize(), out))(step(x))) > logits_bytes


def _bytes_kept(function: Callable[[], Any]) -> int:
    """Bytes allocated by a function and not freed while its result is alive."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = function()
    kept = sum(event.self_cpu_memory_usage for event in profiler.events())
    del result
    return kept


@pytest.mark.parametrize("used", [True, False])
def test_freed_without_the_garbage_collector(used: bool, pair: Any, ids: Tensor) -> None:
    _, step = pair
    gc.collect()
    gc.disable()
    try:
        loss, logits = step(ids)
        references = [weakref.ref(logits), weakref.ref(logits._formula)]
        if used:
            loss = loss + logits.sum()
        del logits, loss
        assert [r() for r in references] == [None, None]
    finally:
        gc.enable()


def test_threads(pair: Any, ids: Tensor) -> None:
    model, step = pair
    expected = model(ids)[1].sum().item()
    for _ in range(20):
        with torch.no_grad():
            _, logits = step(ids)
        barrier = threading.Barrier(4)
        found = []

        def work(logits: Tensor = logits, barrier: Any = barrier, found: Any = found) -> None:
            barrier.wait()
            found.append(logits.sum().item())

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_same(found, [expected] * 4)


def test_weak_references_from_cpp(pair: Any, ids: Tensor) -> None:
    """The object cannot become another tensor then; its value and gradient are the same."""
    model, _ = pair
    results = []
    for function in pair:
        _, logits = function(ids)
        reference = torch._C._WeakTensorRef(logits)
        logits.mul_(2)
        total = logits.square().sum() + logits.sum()
        (gradient,) = torch.autograd.grad(total, logits, retain_graph=True)
        total.backward()
        assert not reference.expired()
        results.append(plain([total, gradient, gradients(model)]))
    assert_same(results[1], results[0])


# ---- what is refused ---------------------------------------------------------------------------


class _Double(torch.autograd.Function):
    """Modifies its input in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_function_that_modifies_used_logits(pair: Any, ids: Tensor) -> None:
    model, _ = pair
    results = []
    for function in pair:
        _, logits = function(ids)
        logits.tolist()
        result = _Double.apply(logits)
        (result.sum() + logits.square().sum()).backward()
        results.append(plain([result is logits, result, gradients(model)]))
    assert_same(results[1], results[0])


def test_write_from_cpp_is_refused(pair: Any, ids: Tensor) -> None:
    _, logits = pair[1](ids)
    with torch._C.DisableTorchFunctionSubclass():  # as if called from C++
        with pytest.raises(RuntimeError, match=r"aten.mul_.Tensor would modify deferred logits"):
            logits.mul_(2)


@pytest.mark.filterwarnings("ignore")
def test_trace_is_refused(pair: Any, ids: Tensor) -> None:
    _, logits = pair[1](ids)
    with pytest.raises(RuntimeError, match=r"autochunk: torch.jit.trace would record"):
        torch.jit.trace(lambda t: t * 2, (logits,))
    logits.materialize()
    assert_same(torch.jit.trace(lambda t: t * 2, (logits,))(logits), logits * 2)


def test_loss_does_not_depend_on_the_logits(pair: Any, ids: Tensor) -> None:
    """As with any compiled function: both are its outputs."""
    loss, logits = pair[1](ids)
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(loss, logits)


# ---- outputs of models -------------------------------------------------------------------------


def test_same_logits_twice(ids: Tensor) -> None:
    class Twice(LanguageModel):
        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            loss, logits = super().forward(ids)
            flat = logits.view(-1, VOCABULARY)
            return {"loss": loss, "logits": logits, "same": logits, "flat": flat}

    torch.manual_seed(0)
    model = Twice()
    results = []
    for function in (model, compiled(model)):
        outputs = function(ids)
        assert outputs["same"] is outputs["logits"]
        total = outputs["loss"] + outputs["logits"].square().sum() + outputs["flat"].pow(3).sum()
        total.backward()
        results.append(plain([outputs, gradients(model)]))
    assert_same(results[1], results[0])


def test_softcapped_logits(ids: Tensor) -> None:
    torch.manual_seed(0)
    model = LanguageModel(softcap=2.0)
    results = []
    for function in (model, compiled(model)):
        loss, logits = function(ids)
        (loss + logits.square().sum()).backward()
        results.append(plain([loss, logits, gradients(model)]))
    assert_same(results[1], results[0])


@pytest.fixture(scope="module")
def _llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    return model, compiled(model)


@pytest.fixture
def llama(_llama: Any) -> Any:
    """A model of Hugging Face's and the same compiled."""
    _llama[0].zero_grad()
    return _llama


@pytest.mark.parametrize("keep", [0, 3], ids=["all", "last-three"])
def test_llama(keep: int, llama: Any) -> None:
    """With ``logits_to_keep`` the loss is over the same few logits."""
    model, _ = llama
    for length in (8, 11, 9):
        ids = torch.randint(0, 512, (2, length))
        labels = ids[:, -keep:] if keep else ids
        results = []
        for function in llama:
            outputs = function(input_ids=ids, labels=labels, logits_to_keep=keep)
            assert type(outputs.logits) is (Tensor if function is model else DeferredTensor)
            assert outputs.logits.shape == (2, keep or length, 512)
            logits = outputs["logits"]
            accuracy = (logits[:, :-1].argmax(-1) == labels[:, 1:]).float().mean()
            (outputs.loss + logits.float().logsumexp(-1).square().mean()).backward()
            assert outputs.logits is logits
            assert type(logits) is (Tensor if function is model else DeferredTensor)
            results.append(plain([outputs.loss, logits, accuracy, gradients(model)]))
        assert_same(results[1], results[0])


def test_llama_outputs_travel(llama: Any, tmp_path: Any) -> None:
    """Through copies, files and the tools that trainers apply to outputs."""
    ids = torch.randint(0, 512, (2, 8))
    results = []
    for function in llama:
        with torch.no_grad():
            outputs = [function(input_ids=ids, labels=ids) for _ in range(4)]
        copied = copy.deepcopy(outputs[0])
        torch.save(dict(outputs[1]), tmp_path / "outputs.pt")
        loaded = torch.load(tmp_path / "outputs.pt")
        pickled = pickle.loads(pickle.dumps(outputs[2].to_tuple()))
        moved = {k: v.to("cpu", torch.float64) for k, v in outputs[3].items()}
        results.append(plain([copied.logits, loaded["logits"], pickled[1], moved["logits"]]))
    assert_same(results[1], results[0])


def test_accelerate(llama: Any) -> None:
    operations = pytest.importorskip("accelerate.utils.operations")
    ids = torch.randint(0, 512, (2, 8))
    results = []
    for function in llama:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            outputs = [function(input_ids=ids, labels=ids) for _ in range(4)]
        found = [
            operations.convert_to_fp32(outputs[0]).logits,
            operations.recursively_apply(lambda t: t * 2, outputs[1]).logits,
            operations.send_to_device(outputs[2], "cpu").logits,
            operations.concatenate([outputs[3].logits] * 2),
        ]
        results.append([t.float() for t in found])
        assert found[0].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=2e-2)


def test_gradient_checkpointing(ids: Tensor) -> None:
    """Of a model inside which another one's logits are used."""
    torch.manual_seed(0)
    model = LanguageModel()
    results = []
    for function in (model, compiled(model)):

        def block(ids: Tensor, function: Any = function) -> Tensor:
            loss, logits = function(ids)
            return loss + logits.square().mean()

        total = torch.utils.checkpoint.checkpoint(block, ids, use_reentrant=False)
        total.backward()
        results.append(plain([total, gradients(model)]))
    assert_same(results[1], results[0])
