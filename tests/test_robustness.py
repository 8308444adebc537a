"""Whatever a training loop does around the head: the same losses and gradients as eager.

Errors are measured against a float64 eager run. Ours may be twice the unchunked run's own, plus
an eighth of the dtype's epsilon.

Shapes: N rows, H hidden features, V vocabulary. 21 rows in chunks of at most 6 are four chunks,
the last of which overlaps the third.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autochunk
from autochunk import body, runtime
from autochunk.report import collect

N, H, V = 21, 16, 128
OPTIONS: dict[str, Any] = {"min_bytes": 0, "chunk_rows": 6, "strict": True}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Dynamo keeps what it compiled per code object; past its limit it runs eagerly, unseen."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


# ---- helpers ---------------------------------------------------------------------------------


def loss_of(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_NH, w_VH).float(), y_N)


def gathered(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    logp_NV = F.log_softmax(F.linear(x_NH, w_VH), -1)
    return -logp_NV.gather(-1, y_N[:, None]).mean()


def indexed(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    logp_NV = F.log_softmax(F.linear(x_NH, w_VH), -1)
    return -logp_NV[torch.arange(y_N.shape[0]), y_N].mean()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    keywords = {k: options.pop(k) for k in ("dynamic", "fullgraph") if k in options}
    return torch.compile(
        function, backend="autochunk", options={**OPTIONS, **options}, **keywords
    )


def data(dtype: torch.dtype = torch.float32, rows: int = N) -> tuple[Tensor, Tensor, Tensor]:
    x_NH = torch.randn(rows, H).to(dtype).requires_grad_()
    w_VH = torch.randn(V, H).to(dtype).requires_grad_()
    return x_NH, w_VH, torch.randint(0, V, (rows,))


def leaf(tensor: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy with a gradient of its own, in another dtype if it is floating."""
    if not isinstance(tensor, Tensor):
        return tensor
    made = tensor.detach().clone(memory_format=torch.preserve_format)
    if dtype is not None and made.is_floating_point():
        made = made.to(dtype)
    return made.requires_grad_(tensor.requires_grad)


def run(
    function: Callable[..., Tensor], inputs: Sequence[Any], upstream: float = 1.0
) -> list[Tensor | None]:
    """The loss, then the gradient of each input (None where there is none)."""
    loss = function(*inputs)
    if loss.requires_grad:
        loss.backward(torch.full_like(loss, upstream))
    return [loss.detach(), *(t.grad for t in inputs if isinstance(t, Tensor))]


def error(got: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm; absolute where the exact value is zero."""
    norm = exact.double().norm()
    return float((got.double() - exact.double()).norm() / (norm if norm > 0 else 1))


def assert_as_exact(
    got: Sequence[Tensor | None], plain: Sequence[Tensor | None], exact: Sequence[Tensor | None]
) -> None:
    """Ours is within twice the unchunked run's error of the float64 run, dtypes and all."""
    assert len(got) == len(plain) == len(exact)
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        if p is None or e is None:
            assert g is None, f"value {i}: eager has no gradient"
            continue
        assert g is not None, f"value {i}: eager has a gradient"
        assert (g.dtype, g.shape) == (p.dtype, p.shape), f"value {i}"
        assert torch.isfinite(g).all(), f"value {i} is not finite"
        allowed = 2 * error(p, e) + torch.finfo(p.dtype).eps / 8
        assert error(g, e) <= allowed, f"value {i}: {error(g, e):.3e}, allowed {allowed:.3e}"


def check(
    function: Callable[..., Tensor],
    inputs: Sequence[Any],
    *,
    upstream: float = 1.0,
    strategy: str | None = None,
    chunked: int = 1,
    reference: Callable[..., Tensor] | None = None,
    **options: Any,
) -> autochunk.Report:
    """Compares a compiled function with eager, and returns its report.

    Args:
        strategy: What the head must run with.
        chunked: Heads that must run in chunks.
        reference: The function in float64, where it is another one.
    """
    plain = run(function, [leaf(t) for t in inputs], upstream)
    exact = run(reference or function, [leaf(t, torch.float64) for t in inputs], upstream)
    with collect() as reports:
        got = run(compiled(function, **options), inputs, upstream)
    (report,) = reports
    assert len(report.chunked) == chunked, str(report)
    if strategy is not None:
        assert [row.strategy for row in report.chunked] == [strategy] * chunked
    assert_as_exact(got, plain, exact)
    return report


# ---- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    check(gathered, data(dtype), strategy="recompute" if dtype is torch.float16 else "fused")



def test_float16_scaled_loss() -> None:
    """Gradients that underflow in float16 without the loss scale, as GradScaler supplies it."""

    def small(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        return loss_of(x_NH, w_VH, y_N) * 1e-5

    report = check(small, data(torch.float16), upstream=65536.0)
    assert [row.strategy for row in report.chunked] == ["recompute"]


def test_grad_scaler() -> None:
    """float32 weights, float16 autocast: GradScaler finds the same gradients, and the same inf."""

    def step(function: Callable[..., Tensor], inputs: Sequence[Tensor], scale: float) -> list[Any]:
        x_NH, w_VH, y_N = inputs
        optimizer = torch.optim.SGD([w_VH], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", torch.float16):
            loss = function(x_NH, w_VH, y_N)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradient = w_VH.grad.clone()  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        return [loss.detach(), gradient, w_VH.detach(), scaler.get_scale()]

    inputs = data()
    function = compiled(loss_of)
    for scale in (65536.0, 2.0**40):  # the second overflows: the step must be skipped
        plain = step(loss_of, [leaf(t) for t in inputs], scale)
        got = step(function, [leaf(t) for t in inputs], scale)
        assert got[-1] == plain[-1]
        torch.testing.assert_close(got[0], plain[0])
        torch.testing.assert_close(got[1], plain[1], rtol=5e-3, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(got[2], plain[2], rtol=1e-4, atol=1e-4)


# ---- autocast --------------------------------------------------------------------------------


def autocast_inside(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(F.linear(x_NH, w_VH), y_N)


def autocast_island(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits_NV = F.linear(x_NH, w_VH)
        with torch.autocast("cpu", enabled=False):
            scale = (x_NH @ x_NH.t()).diagonal().mean()  # float32 matrix product in the island
            return F.cross_entropy(logits_NV.float(), y_N) + 1e-3 * scale


def autocast_head_outside(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    """The trunk under autocast, the head in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden_NH = F.linear(x_NH, torch.eye(H, dtype=x_NH.dtype))
    return F.cross_entropy(F.linear(hidden_NH.to(w_VH.dtype), w_VH), y_N)


@pytest.mark.parametrize("function", [autocast_inside, autocast_island, autocast_head_outside])
def test_autocast_inside_the_model(function: Callable[..., Tensor]) -> None:
    check(function, data())


def test_autocast_around_the_call() -> None:
    def under(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return function(*inputs)

        return call

    inputs = data()
    plain = run(under(loss_of), [leaf(t) for t in inputs])
    exact = run(loss_of, [leaf(t, torch.float64) for t in inputs])
    function = compiled(loss_of)
    got = run(under(function), inputs)
    assert_as_exact(got, plain, exact)
    # The same compiled function without autocast is another graph.
    again = [leaf(t) for t in inputs]
    assert_as_exact(run(function, again), run(loss_of, [leaf(t) for t in inputs]), exact)


# ---- what needs a gradient -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_grad", "w_grad"), [(True, False), (False, True), (False, False)],
    ids=["frozen head", "frozen input", "all frozen"],
)
@pytest.mark.parametrize("strategy", ["auto", "recompute"])
def test_frozen(x_grad: bool, w_grad: bool, strategy: str) -> None:
    x_NH, w_VH, y_N = data()
    wanted = "fused" if strategy == "auto" else "recompute"
    check(
        loss_of,
        (x_NH.requires_grad_(x_grad), w_VH.requires_grad_(w_grad), y_N),
        strategy=wanted if x_grad or w_grad else "forward",
    )


def test_lora() -> None:
    """A frozen head next to a trained low-rank one."""

    def function(x_NH: Tensor, w_VH: Tensor, a: Tensor, b: Tensor, y_N: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x_NH, w_VH) + (x_NH @ a) @ b, y_N)

    x_NH, w_VH, y_N = data()
    a, b = torch.randn(H, 4, requires_grad=True), torch.randn(4, V, requires_grad=True)
    inputs = (x_NH, w_VH.requires_grad_(False), a, b, y_N)
    plain = run(function, [leaf(t) for t in inputs])
    exact = run(function, [leaf(t, torch.float64) for t in inputs])
    with collect() as reports:
        got = run(compiled(function), inputs)
    assert reports[0].chunked, str(reports[0])
    assert_as_exact(got, plain, exact)


# ---- backward in all its uses ----------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_upstream_gradients(strategy: str) -> None:
    inputs = data()
    function = compiled(loss_of, strategy=strategy)
    for upstream in (1.0, 3.0, -0.5, 0.0):
        plain = run(loss_of, [leaf(t) for t in inputs], upstream)
        exact = run(loss_of, [leaf(t, torch.float64) for t in inputs], upstream)
        assert_as_exact(run(function, [leaf(t) for t in inputs], upstream), plain, exact)


@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_accumulation_and_added_losses(strategy: str) -> None:
    x_NH, w_VH, y_N = data()
    batches = [(leaf(x_NH) + i).detach().requires_grad_() for i in range(3)]

    def accumulate(function: Callable[..., Tensor], w: Tensor) -> Tensor:
        for i, x in enumerate(batches):
            (function(leaf(x, w.dtype), w, y_N) * (i + 1)).backward()
        return w.grad  # type: ignore[return-value]

    def added(function: Callable[..., Tensor], w: Tensor) -> Tensor:
        losses = [function(leaf(x, w.dtype), w, y_N) for x in batches]
        (losses[0] - 2 * losses[1] + losses[2] * losses[0].detach()).backward()
        return w.grad  # type: ignore[return-value]

    function = compiled(loss_of, strategy=strategy)
    for total in (accumulate, added):
        got = total(function, leaf(w_VH))
        plain, exact = total(loss_of, leaf(w_VH)), total(loss_of, leaf(w_VH, torch.float64))
        assert_as_exact([got], [plain], [exact])


@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_retain_graph(strategy: str) -> None:
    """Right twice, or PyTorch's own error, which names the donated buffers."""
    x_NH, w_VH, y_N = data()
    exact = run(loss_of, [leaf(t, torch.float64) for t in (x_NH, w_VH, y_N)])
    for donated in (True, False):
        torch._dynamo.reset()
        x, w = leaf(x_NH), leaf(w_VH)
        with torch._functorch.config.patch(donated_buffer=donated):
            loss = compiled(loss_of, strategy=strategy)(x, w, y_N)
            if donated:
                try:
                    loss.backward(retain_graph=True)
                except RuntimeError as refused:
                    assert "donated buffer" in str(refused)
                    assert x.grad is None
                    assert w.grad is None
                    continue
            else:
                loss.backward(retain_graph=True)
            for _ in range(2):
                torch.testing.assert_close(x.grad.double(), exact[1], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(w.grad.double(), exact[2], rtol=1e-5, atol=1e-6)
                x.grad = w.grad = None
                loss.backward(retain_graph=True)


@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_create_graph(strategy: str) -> None:
    """A second derivative is an error of PyTorch's, never a gradient with terms missing."""
    x_NH, w_VH, y_N = data()
    function = compiled(loss_of, strategy=strategy)
    with torch._functorch.config.patch(donated_buffer=False):
        loss = function(x_NH, w_VH, y_N)
        (gradient,) = torch.autograd.grad(loss, x_NH, create_graph=True)
        penalty = gradient.square().sum() + x_NH.square().sum()
        with pytest.raises(RuntimeError, match="double backward"):
            penalty.backward()
    assert w_VH.grad is None


def test_create_graph_of_the_ops() -> None:
    """The same where the ops run without AOTAutograd between them and the caller."""
    x_NH = torch.randn(N, H, requires_grad=True)
    loss = x_NH.square().sum()
    attached = torch.ops.autochunk.attach(loss.detach(), [x_NH], [2 * x_NH.detach()])
    (gradient,) = torch.autograd.grad(attached, x_NH, retain_graph=True)
    torch.testing.assert_close(gradient, 2 * x_NH.detach())
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(attached, x_NH, create_graph=True)


# ---- modes -----------------------------------------------------------------------------------


def test_no_grad_inference_mode_and_train_again() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.0)
            self.trunk = nn.Linear(H, H)
            self.head = nn.Linear(H, V, bias=False)

        def forward(self, x_NH: Tensor, y_N: Tensor) -> Tensor:
            return loss_of(self.dropout(self.trunk(x_NH)), self.head.weight, y_N)

    x_NH, _, y_N = data()
    model = Model()
    expected = model(x_NH, y_N)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    with collect() as reports:
        function = compiled(model)

        def train() -> None:
            model.zero_grad()
            loss = function(x_NH, y_N)
            loss.backward()
            torch.testing.assert_close(loss, expected)
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                torch.testing.assert_close(parameter.grad, gradient)

        train()
        model.eval()
        with torch.no_grad():
            loss = function(x_NH, y_N)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach())
        with torch.inference_mode():
            loss = function(x_NH, y_N)
        assert loss.is_inference()
        torch.testing.assert_close(loss.clone(), expected.detach())
        model.train()
        train()
    assert [r.chunked[0].strategy for r in reports] == ["fused", "forward", "forward"]


@pytest.mark.parametrize("tied", [True, False])
def test_hf_gradient_checkpointing(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied, use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, V, (2, 9))
    plain_loss = model(input_ids=ids, labels=ids).loss
    plain_loss.backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with collect() as reports:
        outputs = compiled(model, fullgraph=True)(input_ids=ids, labels=ids)
        outputs.loss.backward()
    assert sum(len(r.chunked) for r in reports) == 1
    torch.testing.assert_close(outputs.loss, plain_loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_around_the_head(use_reentrant: bool) -> None:
    """It is a higher-order op: right, and refused with that reason."""

    def function(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        return checkpoint(loss_of, x_NH, w_VH, y_N, use_reentrant=use_reentrant)  # type: ignore[return-value]

    inputs = data()
    plain = run(function, [leaf(t) for t in inputs])
    exact = run(function, [leaf(t, torch.float64) for t in inputs])
    with collect() as reports:
        assert_as_exact(run(compiled(function), inputs), plain, exact)
    for report in reports:
        for row in report.refused:
            assert row.refusal is not None
            assert row.refusal.code == "higher-order"


# ---- dynamic shapes --------------------------------------------------------------------------


class Counting:
    """The backend, counting how often Dynamo calls it."""

    def __init__(self, **options: Any) -> None:
        self.calls = 0
        self.options = {**OPTIONS, **options}

    def __call__(self, gm: Any, example_inputs: Any, **extra: Any) -> Any:
        self.calls += 1
        return autochunk.autochunk(gm, example_inputs, options=self.options, **extra)


def sequence_loss(x_BTH: Tensor, w_VH: Tensor, y_BT: Tensor) -> Tensor:
    """The shift-by-slice loss of language models."""
    logits_BTV = F.linear(x_BTH, w_VH)
    return F.cross_entropy(
        logits_BTV[:, :-1].reshape(-1, w_VH.shape[0]), y_BT[:, 1:].reshape(-1), ignore_index=-100
    )


def compare_rows(function: Callable[..., Tensor], rows: int) -> None:
    inputs = data(rows=rows)
    plain = run(loss_of, [leaf(t) for t in inputs])
    exact = run(loss_of, [leaf(t, torch.float64) for t in inputs])
    assert_as_exact(run(function, inputs), plain, exact)


@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_rows_vary(strategy: str) -> None:
    """One static graph, one for any number of rows, one for a single row; then no more."""
    backend = Counting(chunk_rows=50, strategy=strategy)
    function = torch.compile(loss_of, backend=backend)
    calls = []
    for rows in (130, 64, 200, 1, 257, 63, 2, 1000):
        compare_rows(function, rows)
        calls.append(backend.calls)
    assert calls == [1, 2, 2, 3, 3, 3, 3, 3]


def test_batch_and_sequence_vary() -> None:
    backend = Counting(chunk_rows=7)
    function = torch.compile(sequence_loss, backend=backend)
    w_VH = torch.randn(V, H, requires_grad=True)
    calls = []
    for batch, length in ((2, 9), (3, 7), (5, 12), (4, 2), (7, 33)):
        x = torch.randn(batch, length, H, requires_grad=True)
        y = torch.randint(0, V, (batch, length))
        y[:, 1] = -100 if length > 2 else y[:, 1]
        inputs = (x, leaf(w_VH), y)
        plain = run(sequence_loss, [leaf(t) for t in inputs])
        exact = run(sequence_loss, [leaf(t, torch.float64) for t in inputs])
        assert_as_exact(run(function, inputs), plain, exact)
        calls.append(backend.calls)
    assert calls == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("how", ["dynamic", "mark_dynamic"])
def test_dynamic_from_the_start(how: str) -> None:
    backend = Counting(chunk_rows=6)
    function = torch.compile(loss_of, backend=backend, dynamic=True if how == "dynamic" else None)
    for rows in (21, 6, 40):
        inputs = data(rows=rows)
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(inputs[0], 0)
            torch._dynamo.mark_dynamic(inputs[2], 0)
        plain = run(loss_of, [leaf(t) for t in inputs])
        exact = run(loss_of, [leaf(t, torch.float64) for t in inputs])
        assert_as_exact(run(function, inputs), plain, exact)
    assert backend.calls == 1


# ---- several heads ---------------------------------------------------------------------------


def test_two_heads_in_one_graph() -> None:
    """Next-token and next-but-one heads over the same hidden states, and a distilled one."""

    def function(
        x_NH: Tensor, w_VH: Tensor, u_VH: Tensor, t_VH: Tensor, y_N: Tensor
    ) -> Tensor:
        first = F.cross_entropy(F.linear(x_NH, w_VH), y_N)
        second = F.cross_entropy(F.linear(x_NH, u_VH)[:-1], y_N[1:], reduction="sum")
        teacher = F.linear(x_NH.detach(), t_VH).softmax(-1)
        student = F.linear(x_NH, w_VH).log_softmax(-1)
        return first + 0.1 * second - 0.5 * (teacher * student).sum(-1).mean()

    x_NH, w_VH, y_N = data()
    u_VH = torch.randn(V, H, requires_grad=True)
    check(function, (x_NH, w_VH, u_VH, torch.randn(V, H), y_N), chunked=4)


def test_two_models_in_one_process() -> None:
    """Interleaved, of one class, with vocabularies of their own."""
    x_NH, w_VH, y_N = data()
    other_VH = torch.randn(2 * V, H, requires_grad=True)
    models = [(compiled(loss_of), w_VH, loss_of), (compiled(indexed), other_VH, indexed)]
    losses = []
    for function, weight, eager in models:
        inputs = (x_NH, weight, y_N)
        exact = run(eager, [leaf(t, torch.float64) for t in inputs])
        x = leaf(x_NH)
        losses.append((function(x, weight, y_N), x, weight, exact))
    for loss, x, weight, exact in reversed(losses):
        loss.backward()
        torch.testing.assert_close(loss.detach().double(), exact[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x.grad.double(), exact[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weight.grad.double(), exact[2], rtol=1e-5, atol=1e-6)


# ---- unusual values --------------------------------------------------------------------------


def assert_same(function: Callable[..., Tensor], eager: Callable[..., Tensor], inputs: Any) -> None:
    """Equal to eager, nan and infinities included."""
    plain = run(eager, [leaf(t) for t in inputs])
    got = run(function, [leaf(t) for t in inputs])
    for g, p in zip(got, plain, strict=True):
        torch.testing.assert_close(g, p, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_all_ignored_and_not_finite(strategy: str) -> None:
    def function(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x_NH, w_VH), y_N)

    once = compiled(function, strategy=strategy)
    x_NH, w_VH, y_N = data()
    assert_same(once, function, (x_NH, w_VH, torch.full_like(y_N, -100)))
    some = y_N.clone()
    some[::2] = -100
    assert_same(once, function, (x_NH, w_VH, some))
    for value in (float("nan"), float("inf"), -float("inf"), 1e30):
        bad = x_NH.detach().clone()
        bad[3, 2] = value
        assert_same(once, function, (bad.requires_grad_(), w_VH, y_N))
        assert_same(once, function, (bad.detach().requires_grad_(), w_VH, some))
    for upstream in (float("nan"), float("inf")):
        plain = run(function, [leaf(t) for t in (x_NH, w_VH, y_N)], upstream)
        got = run(once, [leaf(t) for t in (x_NH, w_VH, y_N)], upstream)
        for g, p in zip(got[1:], plain[1:], strict=True):
            if p is not None and g is not None:
                assert not torch.isfinite(g).any()
                assert not torch.isfinite(p).any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_and_one_row(reduction: str) -> None:
    def function(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x_NH, w_VH), y_N, reduction=reduction).sum()

    for rows in (0, 1):
        assert_same(compiled(function), function, data(rows=rows))


def test_no_rows_in_a_dynamic_graph() -> None:
    function = compiled(loss_of, dynamic=True)
    for rows in (21, 0, 1, 2):
        assert_same(function, loss_of, data(rows=rows))


# ---- indices out of range --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "bad", "good"),
    [(loss_of, (V, -1, V + 1000), -100), (gathered, (V, -1), 0), (indexed, (V, -V - 1), -1)],
    ids=["cross_entropy", "gather", "index"],
)
@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_index_out_of_range(
    function: Callable[..., Tensor], bad: Sequence[int], good: int, strategy: str
) -> None:
    """An error that names the index and its row, no gradients, and a process that goes on."""
    once = compiled(function, strategy=strategy)
    x_NH, w_VH, y_N = data()
    for value in bad:
        y_N[13] = value
        with pytest.raises(Exception) as eager:
            function(x_NH, w_VH, y_N)
        assert isinstance(eager.value, IndexError | RuntimeError)
        with pytest.raises(IndexError, match=rf"Target {value} is out of bounds: row 13 ") as ours:
            once(x_NH, w_VH, y_N).backward()
        assert f"one of {V} features" in str(ours.value)
        assert x_NH.grad is None
        assert w_VH.grad is None
    y_N[13] = good
    assert_same(once, function, (x_NH, w_VH, y_N))


# ---- failures inside the loop ----------------------------------------------------------------


def loops() -> list[runtime.Loop]:
    return list(runtime.REGIONS.values())


@pytest.mark.parametrize("failure", [MemoryError("no memory"), RuntimeError("kernel failed")])
@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_failure_inside_the_loop(failure: Exception, strategy: str) -> None:
    """It reaches the caller as it is; no gradient is half written; the next call is right."""
    x_NH, w_VH, y_N = data()
    function = compiled(loss_of, strategy=strategy)
    before = set(map(id, loops()))
    assert_same(function, loss_of, (x_NH, w_VH, y_N))
    (loop,) = (loop for loop in loops() if id(loop) not in before)
    kernel = loop.full_kernel or loop.grad_kernel
    assert isinstance(kernel, body.Kernel)
    healthy, chunks = kernel.run, []

    def fails_at_third(inputs: list[Any]) -> Any:
        chunks.append(1)
        if len(chunks) == 3:
            raise failure
        return healthy(inputs)

    w_VH.grad = torch.ones_like(w_VH)
    object.__setattr__(kernel, "run", fails_at_third)
    try:
        with pytest.raises(type(failure), match=str(failure)):
            function(x_NH, w_VH, y_N).backward()
    finally:
        object.__setattr__(kernel, "run", healthy)
    assert len(chunks) == 3
    assert x_NH.grad is None
    assert torch.equal(w_VH.grad, torch.ones_like(w_VH))
    assert_same(function, loss_of, (x_NH, w_VH, y_N))


# ---- layouts ---------------------------------------------------------------------------------


def strided() -> Iterator[Any]:
    x_NH, w_VH, y_N = data()
    yield pytest.param((torch.randn(H, N).t().requires_grad_(), w_VH, y_N), id="x transposed")
    yield pytest.param((torch.randn(N, 2 * H)[:, ::2].requires_grad_(), w_VH, y_N), id="x strided")
    yield pytest.param((torch.randn(1, H).expand(N, H), w_VH, y_N), id="x expanded")
    yield pytest.param((x_NH, torch.randn(H, V).t().requires_grad_(), y_N), id="w transposed")
    yield pytest.param((x_NH, torch.randn(V, 2 * H)[:, H:].requires_grad_(), y_N), id="w sliced")
    yield pytest.param((x_NH, torch.randn(1, H).expand(V, H), y_N), id="w expanded")
    yield pytest.param((x_NH, w_VH, torch.randint(0, V, (2 * N,))[::2]), id="labels strided")


@pytest.mark.parametrize("inputs", strided())
def test_strided_inputs(inputs: Any) -> None:
    check(loss_of, inputs)


def weight_forms(kind: str) -> Callable[..., Tensor]:
    def function(x_NH: Tensor, w_VH: Tensor, b_V: Tensor, y_N: Tensor) -> Tensor:
        if kind == "scaled":
            logits = F.linear(x_NH, w_VH * 2)
        elif kind == "normalised":
            logits = 5 * F.linear(F.normalize(x_NH, dim=-1), F.normalize(w_VH, dim=-1))
        elif kind == "slice":
            return F.cross_entropy(F.linear(x_NH, w_VH[:100]), y_N % 100)
        elif kind == "bias":
            logits = F.linear(x_NH, w_VH, b_V)
        elif kind == "bias slice":
            return F.cross_entropy(F.linear(x_NH, w_VH[:100], b_V[:100]), y_N % 100)
        elif kind == "hidden stride":
            logits = F.linear(torch.stack([x_NH, 2 * x_NH], -1)[..., 1], w_VH)
        else:
            assert kind == "tied"
            return F.cross_entropy(F.linear(F.embedding(y_N, w_VH) + x_NH, w_VH), y_N.roll(1))
        return F.cross_entropy(logits, y_N)

    return function


@pytest.mark.parametrize(
    "kind", ["scaled", "normalised", "slice", "bias", "bias slice", "hidden stride", "tied"]
)
def test_weights(kind: str) -> None:
    x_NH, w_VH, y_N = data()
    check(weight_forms(kind), (x_NH, w_VH, torch.randn(V, requires_grad=True), y_N))


def test_weight_is_no_leaf() -> None:
    """Computed outside of the compiled function."""
    x_NH, w_VH, y_N = data()
    function = compiled(loss_of)

    def whole(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, y: loss(x.tanh(), F.normalize(w, dim=-1) * 3, y)

    assert_same(whole(function), whole(loss_of), (x_NH, w_VH, y_N))


# ---- chunk sizes and strategies --------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "chunks"),
    [
        ({"chunk_rows": 1}, 21),
        ({"chunk_rows": N - 1}, 2),
        ({"chunk_rows": N}, 1),
        ({"chunk_rows": N + 5}, 1),
        ({"num_chunks": 2}, 2),
        ({"num_chunks": 50}, 21),
        ({"memory_budget": "4KiB"}, 3),
        ({"memory_budget": 1}, 21),
    ],
    ids=str,
)
def test_chunk_sizes(size: dict[str, Any], chunks: int) -> None:
    options = {"chunk_rows": None, **size}
    report = check(loss_of, data(), **options)
    assert report.chunked[0].chunks.split(" × ")[0] == str(chunks)


@pytest.mark.parametrize("accumulate", ["auto", "float32", "bfloat16"])
def test_accumulate_dtype(accumulate: str) -> None:
    """With 21 additions into a bfloat16 weight gradient; one's own choice may cost accuracy."""
    inputs = data(torch.bfloat16)
    options: dict[str, Any] = {"chunk_rows": 1, "accumulate_dtype": accumulate}
    if accumulate != "bfloat16":
        check(loss_of, inputs, strategy="fused", **options)
        return
    exact = run(loss_of, [leaf(t, torch.float64) for t in inputs])
    got = run(compiled(loss_of, **options), inputs)
    assert error(got[2], exact[2]) < 5e-2


# ---- threads ---------------------------------------------------------------------------------


def test_two_threads() -> None:
    """Two threads compile and run functions that share regions, each with its own tensors."""
    functions = [compiled(loss_of), compiled(loss_of, strategy="recompute")]
    failures: list[BaseException] = []
    start = threading.Barrier(2)
    x_NH, w_VH, y_N = data()
    batches = [[(x_NH.detach() + 10 * k + i, w_VH, y_N) for i in range(10)] for k in range(2)]

    def work(k: int) -> None:
        try:
            start.wait()
            for x, w, y in batches[k]:
                for function in (functions[k], functions[1 - k]):
                    assert_same(function, loss_of, (x.clone().requires_grad_(), w, y))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


# ---- a training loop -------------------------------------------------------------------------


def test_training_loop() -> None:
    """Ten steps of AdamW with clipping, weight tying and accumulation: eager's losses."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(V, H)
            self.trunk = nn.Linear(H, H)
            self.head = nn.Linear(H, V, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids_BT: Tensor) -> Tensor:
            hidden_BTH = self.embedding(ids_BT)
            hidden_BTH = hidden_BTH + torch.tanh(self.trunk(hidden_BTH))
            return sequence_loss(hidden_BTH, self.head.weight, ids_BT)

    def train(compile_it: bool) -> list[float]:
        torch.manual_seed(1)
        model = Model()
        function = compiled(model, fullgraph=True) if compile_it else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(10):
            for _ in range(2):
                loss = function(torch.randint(0, V, (2, 9)))
                (loss / 2).backward()
                losses.append(loss.item())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return losses

    with warnings.catch_warnings():
        warnings.simplefilter("error", autochunk.FallbackWarning)
        got = train(compile_it=True)
    assert got == pytest.approx(train(compile_it=False), rel=1e-4)
