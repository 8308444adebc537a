"""What the backend does with graphs and exceptions that are not the usual: no failure of its own.

Shapes: N rows, H hidden features, V vocabulary.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.exc
import torch.nn.functional as F
from compare import check, run, widened
from torch import Tensor, nn
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

import autochunk
import autochunk.backend
import autochunk.rewrite
import autochunk.runtime
import autochunk.tail
from autochunk.backend import FallbackWarning
from autochunk.report import collect
from autochunk.types import Refusal

N, H, V = 48, 32, 256
OPTIONS: dict[str, Any] = {"min_bytes": 0, "chunk_rows": 7, "strict": True}


def compiled(function: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="autochunk", options=OPTIONS, **keywords)


def data() -> tuple[Tensor, Tensor, Tensor]:
    x_NH, w_VH = torch.randn(N, H), torch.randn(V, H) * 0.3
    return x_NH.requires_grad_(), w_VH.requires_grad_(), torch.randint(0, V, (N,))


def learned(*numbers: float) -> Tensor:
    return torch.tensor(numbers if len(numbers) > 1 else numbers[0], requires_grad=True)


def rowwise(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_NH, w_VH), y_N, reduction="none")


def loss_of(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    return rowwise(x_NH, w_VH, y_N).mean()


def chunked(function: Callable[..., Any], inputs: Sequence[Any], **keywords: Any) -> list[str]:
    """Compares a function with eager; returns the strategies of its heads, none of them refused."""
    with collect() as reports:
        actual = run(compiled(function, **keywords), inputs)
    check(actual, run(function, inputs), run(function, widened(inputs)), torch.float32)
    rows = [row for report in reports for row in report.rows]
    assert rows, "no head was found"
    assert not [row.refusal for row in rows if row.refusal], rows
    return [row.strategy for row in rows]


# ---- J: a loss times a learned number ---------------------------------------------------------


def uncertainty(x_NH: Tensor, w_VH: Tensor, y_N: Tensor, s: Tensor) -> Tensor:
    return loss_of(x_NH, w_VH, y_N) * torch.exp(-s) + s


@pytest.mark.parametrize("dynamic", [None, True])
def test_fault_J_uncertainty_weighting_with_inductor(dynamic: bool | None) -> None:
    assert chunked(uncertainty, (*data(), learned(0.3)), dynamic=dynamic) == ["fused"]


def two_losses(x_NH: Tensor, w_VH: Tensor, y_N: Tensor, s: Tensor) -> Tensor:
    teacher_NV = torch.zeros(N, V, dtype=x_NH.dtype)
    losses = torch.stack(
        [loss_of(x_NH, w_VH, y_N), F.mse_loss(F.linear(x_NH, w_VH * 2), teacher_NV)]
    )
    return (losses * s.softmax(0)).sum() + s.square().sum()


SCALARS: dict[str, Callable[..., Tensor]] = {
    "a temperature": lambda x, w, y, s: loss_of(x, w, y) / s.square() + s.exp(),
    "not affine": lambda x, w, y, s: (loss_of(x, w, y) * s).tanh(),
    "a power": lambda x, w, y, s: loss_of(x, w, y) ** s,
    "a focal power": lambda x, w, y, s: (1 - (-loss_of(x, w, y)).exp()) ** s * loss_of(x, w, y),
    "a gate per row": lambda x, w, y, s: (rowwise(x, w, y) * x.sigmoid().mean(1)).mean() * s,
    "norms": lambda x, w, y, s: loss_of(x, w, y) * w.norm() + s * x.norm(),
    "a choice": lambda x, w, y, s: torch.where(s > 0, loss_of(x, w, y) * s, s),
    "the larger": lambda x, w, y, s: torch.maximum(loss_of(x, w, y), s * 100),
    "one at risk": lambda x, w, y, s: s + F.relu(rowwise(x, w, y) - s).mean() / 0.1,
    "constants": lambda x, w, y, s: (rowwise(x, w, y)[[1, 2, 3, 3]] * s).sum(),
    "part of it without gradient": lambda x, w, y, s: (
        loss_of(x, w, y) * s / (loss_of(x, w, y) * s).detach()
    ),
}


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("name", list(SCALARS))
def test_fault_J_functions_of_the_loss_and_a_learned_number(name: str) -> None:
    assert set(chunked(SCALARS[name], (*data(), learned(0.3)))) <= {"fused", "forward", "recompute"}


@pytest.mark.usefixtures("no_codegen")
def test_fault_J_learned_weights_of_several_losses() -> None:
    assert chunked(two_losses, (*data(), learned(0.3, -0.2))) == ["fused", "fused"]


@pytest.mark.usefixtures("no_codegen")
def test_fault_J_a_model_that_is_frozen_but_for_the_learned_number() -> None:
    x_NH, w_VH, y_N = data()
    inputs = (x_NH.detach(), w_VH.detach(), y_N, learned(0.3))
    assert chunked(uncertainty, inputs) == ["forward"]


COMPLEX: dict[str, Callable[..., Tensor]] = {
    "tail": lambda x, w, y: torch.fft.rfft(rowwise(x, w, y)).real.mean(),
    "scalar": lambda x, w, y: (loss_of(x, w, y) * (1 + 2j)).abs(),
    "narrow": lambda x, w, y: (rowwise(x, w, y) * 1j).exp().real.mean(),
    "wide": lambda x, w, y: (F.linear(x, w) + 1j).abs().logsumexp(-1).mean(),
    "sum": lambda x, w, y: (F.linear(x, w) * 1j).exp().sum().real / N,
}


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("where", list(COMPLEX))
def test_fault_J_complex_numbers(where: str) -> None:
    """Found beside J: a gradient that passes through complex numbers was lost, silently."""
    assert set(chunked(COMPLEX[where], data())) == {"fused"}


@pytest.mark.usefixtures("no_codegen")
def test_fault_J_a_derivative_with_a_constant_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant in the traced derivative: recomputed, with the reason, instead of a failure."""
    make_fx = autochunk.tail.make_fx

    def with_constant(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        def trace(*fakes: Any) -> Any:
            gm = make_fx(*args, **kwargs)(*fakes)
            gm.register_buffer("constant", torch.ones(()))
            (output,) = (n for n in gm.graph.nodes if n.op == "output")
            with gm.graph.inserting_before(output):
                one = gm.graph.get_attr("constant")
                made = [
                    gm.graph.call_function(torch.ops.aten.mul.Tensor, (g, one))
                    for g in output.args[0]
                ]
            output.args = (made,)
            return gm

        return trace

    monkeypatch.setattr(autochunk.tail, "make_fx", with_constant)
    with collect() as reports:
        loss = compiled(loss_of)(*data())
    loss.backward()
    (row,) = reports[0].rows
    assert row.strategy == "recompute"
    assert row.notes == (
        "recomputed in the backward pass: the derivative of the loss has a constant tensor in it",
    )


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("error", [RuntimeError("not differentiable"), NotImplementedError("no")])
def test_fault_J_a_tail_that_autograd_cannot_trace(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(autochunk.tail, "_trace_vjp", fail)
    with collect() as reports:
        compiled(loss_of)(*data()).backward()
    (row,) = reports[0].rows
    assert row.strategy == "recompute"
    assert f"the derivative of the loss could not be traced ({error})" in row.notes[0]


@pytest.mark.usefixtures("no_codegen")
def test_fault_J_a_mistake_of_our_own_in_the_tail_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(autochunk.tail, "_trace_vjp", fail)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="ours"):
        compiled(loss_of)(*data())


# ---- K, Y4: exceptions of others pass -----------------------------------------------------------


class WithFloats(nn.Module):
    """Python floats as attributes: a schedule's temperature, ``CrossEntropyLoss``'s smoothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(H, V, bias=False)
        self.temperature = 1.5
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x_NH: Tensor, y_N: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.head(x_NH) / self.temperature, y_N)
        return loss


def test_fault_K_a_dynamic_module_that_holds_floats() -> None:
    model = WithFloats()
    x_NH, _, y_N = data()
    with warnings.catch_warnings(), collect() as reports:
        warnings.simplefilter("error", FallbackWarning)
        options = {**OPTIONS, "strict": False}
        function = torch.compile(model, backend="autochunk", options=options, dynamic=True)
        for rows, temperature in ((N, 1.5), (N - 5, 1.5), (N - 5, 2.5)):
            model.temperature = temperature
            loss = function(x_NH[:rows], y_N[:rows])
            torch.testing.assert_close(loss, model(x_NH[:rows], y_N[:rows]))
            found = torch.autograd.grad(loss, model.head.weight)
            wanted = torch.autograd.grad(model(x_NH[:rows], y_N[:rows]), model.head.weight)
            torch.testing.assert_close(found, wanted)
    assert {row.strategy for report in reports for row in report.rows} == {"fused"}


def _dynamo_exceptions() -> list[type[Exception]]:
    found = [
        kind
        for _, kind in inspect.getmembers(torch._dynamo.exc, inspect.isclass)
        if issubclass(kind, Exception) and kind.__module__ == "torch._dynamo.exc"
    ]
    fallbacks = torch._dynamo.exc.exceptions_allowed_to_be_fallback
    assert {RestartAnalysis, SkipFrame, torch._dynamo.exc.Unsupported} < {*found}
    return [*found, *fallbacks]


def _made(kind: type[Exception]) -> Exception:
    """An exception without the arguments that its own ``__init__`` would like."""
    error = kind.__new__(kind)
    Exception.__init__(error, "from the compiler")
    return error


def backend_of(function: Callable[..., Any], inputs: Sequence[Any], **options: Any) -> Any:
    """What the backend makes of a function's graph, called as Dynamo does, without Dynamo."""
    graphs: list[Any] = []

    def keep(gm: Any, example_inputs: Any) -> Any:
        graphs.append((gm, example_inputs))
        return gm.forward

    torch.compile(function, backend=keep)(*inputs)
    (graph,) = graphs
    return autochunk.backend.autochunk(*graph, options={**OPTIONS, **options})


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("kind", _dynamo_exceptions(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("strict", [False, True])
def test_fault_K_every_exception_of_dynamo_passes(
    kind: type[Exception], strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What plain Inductor raises as well passes as it is, and is called nobody's failed rewrite."""
    warnings.simplefilter("error", FallbackWarning)  # pytest restores the filters
    error = _made(kind)
    calls: list[Any] = []

    def fail(gm: Any, example_inputs: Any, config_patches: Any = None) -> None:
        calls.append(gm)
        raise error

    monkeypatch.setattr(autochunk.backend, "compile_fx", fail)
    inputs = data()
    with pytest.raises(kind) as caught:
        backend_of(loss_of, inputs, strict=strict)
    assert caught.value is error
    assert error.__context__ is None
    # Control flow is Dynamo's at once; of others it is seen whether plain Inductor raises them.
    assert len(calls) == (1 if issubclass(kind, (RestartAnalysis, SkipFrame)) else 2)


@pytest.mark.usefixtures("no_codegen")
def test_fault_K_control_flow_from_a_stage_of_the_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    def restart(*_: Any) -> None:
        raise torch._dynamo.exc.TensorifyScalarRestartAnalysis

    monkeypatch.setattr(autochunk.backend, "lower", restart)
    with pytest.raises(torch._dynamo.exc.TensorifyScalarRestartAnalysis):
        backend_of(loss_of, data(), strict=False)


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.usefixtures("no_codegen")
def test_fault_Y4_a_failed_rewrite_is_one_that_plain_inductor_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autochunk.backend, "lower", _raise(KeyError("ours")))
    text = r"a rewrite failed and the graph runs as plain Inductor \(KeyError: 'ours'\)"
    with collect() as reports, pytest.warns(FallbackWarning, match=text):
        backend_of(loss_of, data(), strict=False)
    assert reports[0].failure.startswith("KeyError: 'ours'\nTraceback")
    assert "in fail" in reports[0].failure
    with pytest.raises(KeyError, match="ours"):
        backend_of(loss_of, data(), strict=True)


def two_heads(x_NH: Tensor, w_VH: Tensor, y_N: Tensor, extra_VH: Tensor) -> Tensor:
    return loss_of(x_NH, w_VH, y_N) + rowwise(x_NH, extra_VH, y_N).square().mean()


#: Functions of the backend that work on one head or on several.
STAGES = ("refuse_to_lower", "lower", "lift_unmerged", "cotangents", "plan", "_build", "rewrite")


def _fail_at(head: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a stage raise wherever it has to do with one head."""
    real = getattr(autochunk.backend, stage)

    def concerns(argument: Any) -> bool:
        if isinstance(argument, (list, tuple)):
            return any(map(concerns, argument))
        if isinstance(argument, autochunk.types.Lowered):
            return stage in ("lift_unmerged", "rewrite") and concerns(list(argument.heads.values()))
        if isinstance(argument, autochunk.rewrite.Scheduled):
            argument = argument.region
        if isinstance(argument, autochunk.types.Region):
            return head in argument.heads
        return isinstance(argument, autochunk.types.Candidate) and argument.name == head

    def fail(*args: Any, **kwargs: Any) -> Any:
        if concerns(args):
            raise KeyError("ours")
        return real(*args, **kwargs)

    monkeypatch.setattr(autochunk.backend, stage, fail)


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("which", [0, 1])
def test_fault_Y3_one_failing_head_does_not_take_the_others_down(
    which: int, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = (*data(), data()[1])
    with collect() as reports:
        run(compiled(two_heads), inputs)
    names = [row.head for row in reports[0].rows]
    assert [row.strategy for row in reports[0].rows] == ["fused", "fused"], reports[0]
    torch._dynamo.reset()
    autochunk.runtime.REGIONS.clear()
    _fail_at(names[which], stage, monkeypatch)
    text = r"a rewrite failed and 1 of its heads .*test_faults_backend.*KeyError: 'ours'"
    function = torch.compile(two_heads, backend="autochunk", options={**OPTIONS, "strict": False})
    with collect() as reports, pytest.warns(FallbackWarning, match=text) as said:
        actual = run(function, inputs)
    assert len([w for w in said if w.category is FallbackWarning]) == 1
    check(actual, run(two_heads, inputs), run(two_heads, widened(inputs)), torch.float32)
    (report,) = reports
    refused, other = report.rows[which], report.rows[1 - which]
    assert refused.refusal is not None
    assert refused.refusal.code == "internal-error"
    assert "KeyError: 'ours'" in refused.refusal.detail
    assert "return F.cross_entropy(F.linear(x_NH, w_VH)" in refused.refusal.source
    assert other.strategy == "fused"
    assert not report.failure
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="KeyError: 'ours'"):
        run(compiled(two_heads), inputs)


def masked_embeddings(x_NH: Tensor, w_VH: Tensor, y_N: Tensor, image_KH: Tensor) -> Tensor:
    """The image's embeddings among the text's, as Kosmos-2 has it."""
    h_NH = x_NH.clone()
    h_NH[y_N >= V // 2] = image_KH
    return loss_of(h_NH, w_VH, y_N)


@pytest.mark.parametrize("strict", [False, True])
def test_fault_Y4_nonzero_in_the_backward_graph(strict: bool) -> None:
    """Plain Inductor fails at ``aten.nonzero``, and Dynamo runs the graph eagerly: so with ours."""
    x_NH, w_VH, y_N = data()
    image_KH = torch.randn(int((y_N >= V // 2).sum()), H, requires_grad=True)
    inputs = (x_NH, w_VH, y_N, image_KH)
    options = {**OPTIONS, "strict": strict}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        actual = run(torch.compile(masked_embeddings, backend="autochunk", options=options), inputs)
    exact = run(masked_embeddings, widened(inputs))
    check(actual, run(masked_embeddings, inputs), exact, torch.float32)


def test_one_broad_except() -> None:
    """A broad ``except`` hides mistakes of our own: the package has one, the backend's."""
    package = Path(autochunk.__file__).parent
    found = [
        (path.name, node.lineno)
        for path in package.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (
            node.type is None
            or {"Exception", "BaseException"}
            & {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
        )
    ]
    assert [name for name, _ in found] == ["backend.py"], found


# ---- G: sizes that are marked as dynamic ---------------------------------------------------------


def refusals(function: Callable[..., Any], inputs: Sequence[Any], **keywords: Any) -> list[Refusal]:
    """Compares a function with eager; returns the refusals of its heads, all of them refused."""
    with collect() as reports:
        result = compiled(function, **keywords)(*inputs)
    torch.testing.assert_close(result, function(*inputs))
    rows = [row for report in reports for row in report.rows]
    assert rows, "no head was found"
    found = [row.refusal for row in rows if row.refusal is not None]
    assert len(found) == len(rows), rows
    return found


def distilled(x_NH: Tensor, w_VH: Tensor, y_N: Tensor, top_NK: Tensor, p_NK: Tensor) -> Tensor:
    logp_NV = F.linear(x_NH, w_VH).log_softmax(-1)
    return -(logp_NV.gather(1, top_NK) * p_NK).sum(-1).mean()


def shifted(x_NH: Tensor, w_VH: Tensor, y_N: Tensor, shifts_K: Tensor) -> Tensor:
    return (F.linear(x_NH, w_VH).logsumexp(-1, keepdim=True) * shifts_K).mean()


def picked(x_NH: Tensor, w_VH: Tensor, y_N: Tensor, features_K: Tensor) -> Tensor:
    return F.linear(x_NH, w_VH)[:, features_K].logsumexp(-1).mean()


MARKS: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor], Sequence[tuple[int, int]], str]] = {
    "vocabulary": (loss_of, (), [(1, 0)], "the weight's number of features is marked"),
    "hidden size": (loss_of, (), [(0, 1), (1, 1)], "the weight's number of features is marked"),
    "of a row input": (
        distilled,
        (torch.arange(N * 5).view(N, 5) % V, torch.rand(N, 5)),
        [(3, 1), (4, 1)],
        f"a feature of an input of shape [{N}, s",
    ),
    "of a shared input": (shifted, (torch.rand(3),), [(3, 0)], "a feature of an input of shape [s"),
    "of an index": (picked, (torch.arange(7),), [(3, 0)], "a feature of an input of shape [s"),
}


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("limits", [{}, {"min": 2, "max": 4096}], ids=["any", "limits"])
@pytest.mark.parametrize("what", list(MARKS))
def test_fault_G_a_feature_that_is_marked_as_dynamic(what: str, limits: dict[str, int]) -> None:
    function, more, marks, detail = MARKS[what]
    inputs = [*data(), *(t.clone() for t in more)]
    for position, dim in marks:
        torch._dynamo.mark_dynamic(inputs[position], dim, **limits)
    (refusal,) = refusals(function, inputs)
    assert refusal.code == "dynamic-features"
    assert refusal.detail.startswith(detail)
    assert refusal.detail.endswith("marked as dynamic (mark_dynamic)")
    assert "test_faults_backend.py" in refusal.source


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("limits", [{}, {"min": 2, "max": 4096}], ids=["any", "limits"])
def test_fault_G_rows_that_are_marked_as_dynamic_are_chunked(limits: dict[str, int]) -> None:
    inputs = data()
    with collect() as reports:
        torch._dynamo.mark_dynamic(inputs[0], 0, **limits)
        torch._dynamo.mark_dynamic(inputs[2], 0, **limits)
        loss = compiled(loss_of)(*inputs)
    torch.testing.assert_close(loss, loss_of(*inputs))
    assert [row.strategy for row in reports[0].rows] == ["fused"]


@pytest.mark.usefixtures("no_codegen")
def test_fault_G_maybe_marked_is_no_promise() -> None:
    inputs = data()
    with collect() as reports:
        torch._dynamo.maybe_mark_dynamic(inputs[1], 0)
        loss = compiled(loss_of)(*inputs)
    torch.testing.assert_close(loss, loss_of(*inputs))
    assert [row.strategy for row in reports[0].rows] == ["fused"]


# ---- Y2: derivatives in the graph ---------------------------------------------------------------


def gradient_of_the_loss(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
    loss = loss_of(x_NH, w_VH, y_N)
    (grad_VH,) = torch.autograd.grad(loss, w_VH)
    return loss.detach(), grad_VH


def gradient_penalty(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    loss = loss_of(x_NH, w_VH, y_N)
    (grad_NH,) = torch.autograd.grad(loss, x_NH, create_graph=True)
    return loss + grad_NH.square().sum()


def backward_inside(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    loss = loss_of(x_NH, w_VH, y_N)
    loss.backward()
    return loss.detach()


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("function", [gradient_of_the_loss, gradient_penalty, backward_inside])
def test_fault_Y2_the_graph_differentiates_the_loss(function: Callable[..., Any]) -> None:
    inputs = data()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        (refusal,) = refusals(function, inputs, fullgraph=True)
    assert refusal.code == "unsupported-graph"
    assert refusal.op == "grad"
    assert refusal.detail == "the graph differentiates what the logits lead to"
    assert "autograd.grad(" in refusal.source or "backward()" in refusal.source


def energy_first(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    """A derivative that the head reads, and that does not read the head."""
    (step_NH,) = torch.autograd.grad(x_NH.square().sum(), x_NH)
    return loss_of(x_NH.detach() - 0.1 * step_NH, w_VH, y_N)


@pytest.mark.usefixtures("no_codegen")
def test_fault_Y2_a_derivative_before_the_head() -> None:
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        assert chunked(energy_first, data(), fullgraph=True) == ["fused"]


def wide_derivative(x_NH: Tensor, w_VH: Tensor, y_N: Tensor, t_NV: Tensor) -> Tensor:
    """A derivative as wide as the logits, which only they read: it stays where it is."""
    (soft_NV,) = torch.autograd.grad(t_NV.logsumexp(-1).sum(), t_NV)
    return -(F.linear(x_NH, w_VH).log_softmax(-1) * soft_NV.detach()).sum(-1).mean()


@pytest.mark.usefixtures("no_codegen")
def test_fault_Y2_a_derivative_that_only_the_loss_reads() -> None:
    t_NV = torch.randn(N, V, requires_grad=True)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        assert chunked(wide_derivative, (*data(), t_NV), fullgraph=True) == ["fused"]


class Halves(torch.autograd.Function):
    """Two results as wide as the logits, of a call that is left as it is."""

    @staticmethod
    def forward(ctx: Any, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        return t_NV / 2, t_NV / 3

    @staticmethod
    def backward(ctx: Any, a_NV: Tensor, b_NV: Tensor) -> Tensor:
        return a_NV / 2 + b_NV / 3


def halves(x_NH: Tensor, w_VH: Tensor, y_N: Tensor, t_NV: Tensor) -> Tensor:
    half_NV, third_NV = Halves.apply(t_NV)
    return F.mse_loss(F.linear(x_NH, w_VH), half_NV) + third_NV.mean() * 0


@pytest.mark.usefixtures("no_codegen")
def test_fault_Y2_one_of_several_wide_results() -> None:
    """Found beside Y2: what takes one of several results moved without what makes them."""
    t_NV = torch.randn(N, V, requires_grad=True)
    assert chunked(halves, (*data(), t_NV)) == ["fused"]


# ---- X4: tensor subclasses -----------------------------------------------------------------------


class Quantised(Tensor):
    """A weight of 8 bits with a scale for each row, as torchao's are made: a wrapper."""

    @staticmethod
    def __new__(cls, int8_VH: Tensor, scale_V1: Tensor) -> Quantised:
        made: Quantised = Tensor._make_wrapper_subclass(
            cls, int8_VH.shape, dtype=scale_V1.dtype, device=int8_VH.device
        )
        return made

    def __init__(self, int8_VH: Tensor, scale_V1: Tensor) -> None:
        self.int8_VH, self.scale_V1 = int8_VH, scale_V1

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Quantised({tuple(self.shape)})"  # a log of the compiler's shows it

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["int8_VH", "scale_V1"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Quantised:
        return Quantised(inner["int8_VH"], inner["scale_V1"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            alias = Quantised(args[0].int8_VH, args[0].scale_V1)
            return return_and_correct_aliasing(func, args, kwargs or {}, alias)
        args, kwargs = tree_map_only(
            Quantised, lambda t: t.int8_VH.to(t.scale_V1.dtype) * t.scale_V1, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def quantised(rows: int = V) -> Quantised:
    return Quantised(torch.randint(-99, 99, (rows, H), dtype=torch.int8), torch.rand(rows, 1) / 99)


def two(tensor: Tensor) -> Tensor:
    made: Tensor = TwoTensor(tensor.detach(), tensor.detach().clone())
    return made.requires_grad_(tensor.requires_grad)


def logits_of(x_NH: Tensor, w_VH: Tensor, *_: Tensor) -> Tensor:
    return F.linear(x_NH, w_VH)


@pytest.mark.parametrize("function", [loss_of, logits_of])
def test_fault_X4_a_quantised_weight(function: Callable[..., Tensor]) -> None:
    """Refused before anything runs, whether the loss is inside or outside."""
    x_NH, _, y_N = data()
    (refusal,) = refusals(function, (x_NH, quantised(), y_N))
    assert refusal.code == "tensor-subclass"
    assert refusal.detail.endswith("_w_vh_ is a test_faults_backend.Quantised")
    assert "test_faults_backend.py" in refusal.source


def test_fault_X4_a_quantised_layer_below_the_head() -> None:
    """Its output is an ordinary tensor."""
    x_NH, w_VH, y_N = data()
    layer = quantised(H)

    def deep(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        return loss_of(F.linear(x_NH, layer), w_VH, y_N)

    with collect() as reports:
        loss = compiled(deep)(x_NH, w_VH, y_N)
    torch.testing.assert_close(loss, deep(x_NH, w_VH, y_N))
    assert [row.strategy for row in reports[0].rows] == ["fused"]


def weighted(x_NH: Tensor, w_VH: Tensor, y_N: Tensor, weight_N: Tensor) -> Tensor:
    return (rowwise(x_NH, w_VH, y_N) * weight_N).mean()


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("levels", [1, 2])
def test_fault_X4_a_wrapper_anywhere_near_the_head(position: int, levels: int) -> None:
    inputs = [*data(), torch.rand(N)]
    for _ in range(levels):
        if levels == 2 and isinstance(inputs[position], TwoTensor):
            inner = inputs[position]
            inputs[position] = TwoTensor(inner.detach(), inner.detach().clone())
        else:
            inputs[position] = two(inputs[position])
    with collect() as reports:
        loss = compiled(weighted)(*inputs)
        expected = weighted(*inputs)
    for found, wanted in ((loss.a, expected.a), (loss.b, expected.b)):
        torch.testing.assert_close(tree_map_only(TwoTensor, lambda t: t.a, found), found)
        assert type(found) is type(wanted)
    (row,) = reports[0].rows
    assert row.refusal is not None
    assert row.refusal.code == "tensor-subclass"
    assert row.refusal.detail.endswith("is a torch.testing._internal.two_tensor.TwoTensor")


def jagged(rows_JH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows_JH, w_VH).values(), y_N)


def of_the_values(rows_JH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    return loss_of(rows_JH.values(), w_VH, y_N)


@pytest.mark.usefixtures("no_codegen")
def test_fault_X4_a_jagged_tensor() -> None:
    x_NH, w_VH, y_N = data()
    parts = list(x_NH.detach().split([20, N - 20]))
    rows_JH = torch.nested.nested_tensor(parts, layout=torch.jagged)
    (refusal,) = refusals(jagged, (rows_JH, w_VH, y_N))
    assert refusal.code == "tensor-subclass"
    assert refusal.detail.endswith("is a torch.nested._internal.nested_tensor.NestedTensor")
    with collect() as reports:
        loss = compiled(of_the_values)(rows_JH, w_VH, y_N)
    torch.testing.assert_close(loss, loss_of(x_NH, w_VH, y_N))
    assert [row.strategy for row in reports[0].rows] == ["fused"]


@pytest.mark.usefixtures("no_codegen")
def test_fault_X4_a_distributed_weight(tmp_path: Path) -> None:
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("no gloo")
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        inputs = [distribute_tensor(t, mesh, [Replicate()]) for t in data()]
        with collect() as reports:
            loss = compiled(loss_of)(*inputs)
        torch.testing.assert_close(loss.to_local(), loss_of(*inputs).to_local())
    finally:
        dist.destroy_process_group()
    (row,) = reports[0].rows
    assert row.refusal is not None
    assert row.refusal.code == "tensor-subclass"
    assert "DTensor" in row.refusal.detail


def test_fault_X4_the_functional_form_says_so() -> None:
    x_NH, _, y_N = data()
    with pytest.raises(autochunk.RefusedError, match=r"is a test_faults_backend\.Quantised"):
        autochunk.chunked_linear(F.cross_entropy, x_NH, quantised(), y_N)
