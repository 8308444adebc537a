"""Whatever a training loop does around the head: the same losses and gradients as eager.

All but what asks for ``no_codegen`` is compiled by Inductor. Shapes: N rows, H hidden features, V
vocabulary, B batch, T sequence. 21 rows in chunks of at most 6 are four chunks, the last of which
overlaps the third.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import check, error, run, widened
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autochunk
from autochunk import runtime
from autochunk.report import collect

N, H, V = 21, 16, 128
OPTIONS: dict[str, Any] = {"min_bytes": 0, "chunk_rows": 6, "strict": True}


@pytest.fixture(autouse=True)
def _never_silently_eager() -> Iterator[None]:
    """Past its limit of recompilations Dynamo would run eagerly, and be right for no merit."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


# ---- helpers ---------------------------------------------------------------------------------


def loss_of(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    """With float32 logits for half precision, as language models have it."""
    logits_NV = F.linear(x_NH, w_VH)
    return F.cross_entropy(
        logits_NV if logits_NV.dtype is torch.float64 else logits_NV.float(), y_N
    )


def gathered(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    logp_NV = F.log_softmax(F.linear(x_NH, w_VH), -1)
    return -logp_NV.gather(-1, y_N[:, None]).mean()


def indexed(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    logp_NV = F.log_softmax(F.linear(x_NH, w_VH), -1)
    return -logp_NV[torch.arange(y_N.shape[0]), y_N].mean()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    keywords = {k: options.pop(k) for k in ("dynamic", "fullgraph") if k in options}
    return torch.compile(function, backend="autochunk", options={**OPTIONS, **options}, **keywords)


def data(dtype: torch.dtype = torch.float32, rows: int = N) -> tuple[Tensor, Tensor, Tensor]:
    x_NH = torch.randn(rows, H).to(dtype).requires_grad_()
    w_VH = torch.randn(V, H).to(dtype).requires_grad_()
    return x_NH, w_VH, torch.randint(0, V, (rows,))


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy with a gradient of its own."""
    return tensor.detach().clone().to(dtype).requires_grad_(tensor.requires_grad)


def gradients(inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The exact gradients of ``loss_of``."""
    leaves = widened(inputs)
    loss = loss_of(*leaves)
    if loss.requires_grad:
        loss.backward()
    return [t.grad for t in leaves]


def scaled(function: Callable[..., Tensor], upstream: float) -> Callable[..., Tensor]:
    """The loss times a number, outside of the compiled graph."""
    return lambda *inputs: function(*inputs) * upstream


def compare(
    function: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    inputs: Sequence[Any],
) -> None:
    """A function that is compiled already against eager, and both against float64."""
    dtype = next(t.dtype for t in inputs if isinstance(t, Tensor) and t.is_floating_point())
    check(run(function, inputs), run(eager, inputs), run(eager, widened(inputs)), dtype)


def check_chunked(
    function: Callable[..., Tensor],
    inputs: Sequence[Any],
    *,
    expect: str | None = None,
    heads: int = 1,
    **options: Any,
) -> autochunk.Report:
    """Compiles a function and compares it; its heads must all run in chunks.

    Args:
        expect: The strategy they must run with.
    """
    with collect() as reports:
        compare(compiled(function, **options), function, inputs)
    (report,) = reports
    assert len(report.chunked) == heads, str(report)
    if expect is not None:
        assert [row.strategy for row in report.chunked] == [expect] * heads
    return report


def assert_same(function: Callable[..., Tensor], eager: Callable[..., Tensor], inputs: Any) -> None:
    """Equal to eager, nan and infinities included, without the detour over float64."""
    got, plain = run(function, inputs), run(eager, inputs)
    for g, p in zip(
        (*got.outputs, *got.gradients), (*plain.outputs, *plain.gradients), strict=True
    ):
        torch.testing.assert_close(g, p, rtol=1e-5, atol=1e-6, equal_nan=True)


# ---- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    check_chunked(gathered, data(dtype), expect="recompute" if dtype is torch.float16 else "fused")


def test_float16_scaled_loss() -> None:
    """Gradients that underflow in float16 without the loss scale, as GradScaler supplies it."""

    def small(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        return loss_of(x_NH, w_VH, y_N) * 1e-5

    inputs = data(torch.float16)
    with collect() as reports:
        function = compiled(small)
        compare(scaled(function, 65536.0), scaled(small, 65536.0), inputs)
        outcome = run(scaled(function, 65536.0), inputs)
    assert [row.strategy for row in reports[0].chunked] == ["recompute"]
    assert all(g is None or (g.isfinite().all() and g.abs().max() > 0) for g in outcome.gradients)


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
    check_chunked(function, data())


def test_autocast_around_the_call() -> None:
    def under(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return function(*inputs)

        return call

    inputs = data()
    function = compiled(loss_of)
    exact = run(loss_of, widened(inputs))
    check(run(under(function), inputs), run(under(loss_of), inputs), exact, torch.float32)
    # The same compiled function without autocast is another graph.
    check(run(function, inputs), run(loss_of, inputs), exact, torch.float32)


# ---- what needs a gradient -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_grad", "w_grad"),
    [(True, False), (False, True), (False, False)],
    ids=["frozen head", "frozen input", "all frozen"],
)
@pytest.mark.parametrize("strategy", ["auto", "recompute"])
def test_frozen(x_grad: bool, w_grad: bool, strategy: str) -> None:
    x_NH, w_VH, y_N = data()
    expect = "fused" if strategy == "auto" else "recompute"
    check_chunked(
        loss_of,
        (x_NH.requires_grad_(x_grad), w_VH.requires_grad_(w_grad), y_N),
        expect=expect if x_grad or w_grad else "forward",
        strategy=strategy,
    )


@pytest.mark.usefixtures("no_codegen")
def test_lora() -> None:
    """A frozen head next to a trained low-rank one."""

    def function(x_NH: Tensor, w_VH: Tensor, a: Tensor, b: Tensor, y_N: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x_NH, w_VH) + (x_NH @ a) @ b, y_N)

    x_NH, w_VH, y_N = data()
    a, b = torch.randn(H, 4, requires_grad=True), torch.randn(4, V, requires_grad=True)
    check_chunked(function, (x_NH, w_VH.requires_grad_(False), a, b, y_N), heads=2)


# ---- backward in all its uses ----------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_upstream_gradients(strategy: str) -> None:
    inputs = data()
    function = compiled(loss_of, strategy=strategy)
    for upstream in (3.0, -0.5, 0.0):
        compare(scaled(function, upstream), scaled(loss_of, upstream), inputs)


@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_accumulation_and_added_losses(strategy: str) -> None:
    x_NH, w_VH, y_N = data()
    function = compiled(loss_of, strategy=strategy)

    def accumulate(loss: Callable[..., Tensor], w: Tensor) -> Tensor:
        for i in range(3):
            (loss(x_NH.to(w.dtype) + i, w, y_N) * (i + 1)).backward()
        assert w.grad is not None
        return w.grad

    def added(loss: Callable[..., Tensor], w: Tensor) -> Tensor:
        first, second, third = (loss(x_NH.to(w.dtype) + i, w, y_N) for i in range(3))
        (first - 2 * second + third * first.detach()).backward()
        assert w.grad is not None
        return w.grad

    for total in (accumulate, added):
        got, plain = total(function, leaf(w_VH)), total(loss_of, leaf(w_VH))
        exact = total(loss_of, leaf(w_VH, torch.float64))
        assert error(got, exact) <= 2 * error(plain, exact) + 1e-6


@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_retain_graph(strategy: str) -> None:
    """Right both times; or PyTorch's own error, which names the donated buffers."""
    x_NH, w_VH, y_N = data()
    exact = gradients((x_NH, w_VH, y_N))
    x, w = leaf(x_NH), leaf(w_VH)
    loss = compiled(loss_of, strategy=strategy)(x, w, y_N)
    # A backward graph that comes out of the cache may donate buffers; one that is compiled by this
    # very call does not.
    for _ in range(2):
        x.grad = w.grad = None
        try:
            loss.backward(retain_graph=True)
        except RuntimeError as error_:
            assert "donated buffer" in str(error_)  # noqa: PT017
            assert x.grad is None
            assert w.grad is None
        else:
            assert error(x.grad, exact[0]) < 1e-6
            assert error(w.grad, exact[1]) < 1e-6

    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        loss = compiled(loss_of, strategy=strategy)(x, w, y_N)
        for _ in range(3):
            x.grad = w.grad = None
            loss.backward(torch.tensor(3.0), retain_graph=True)
            assert error(x.grad, 3 * exact[0]) < 1e-6
            assert error(w.grad, 3 * exact[1]) < 1e-6


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


# ---- hooks and transforms --------------------------------------------------------------------


def test_step_inside_backward() -> None:
    """Hooks that scale a gradient and update the weight while the backward pass still runs."""
    x_NH, w_VH, y_N = data()

    def train(function: Callable[..., Tensor]) -> Tensor:
        weight = nn.Parameter(w_VH.detach().clone())
        weight.register_hook(lambda gradient: gradient * 3)

        @torch.no_grad()
        def step(parameter: Tensor) -> None:
            parameter.sub_(parameter.grad)
            parameter.grad = None

        weight.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            function(leaf(x_NH), weight, y_N).backward()
        return weight.detach()

    wanted = train(loss_of)
    for strategy in ("fused", "recompute"):
        torch._dynamo.reset()
        torch.testing.assert_close(train(compiled(loss_of, strategy=strategy)), wanted)


def test_weight_modified_before_backward() -> None:
    """The gradient at the weight that the loss was computed with; or autograd's own error."""
    x_NH, w_VH, y_N = data()
    exact = gradients((x_NH, w_VH, y_N))
    for strategy in ("fused", "recompute"):
        torch._dynamo.reset()
        x, w = leaf(x_NH), leaf(w_VH)
        loss = compiled(loss_of, strategy=strategy)(x, w, y_N)
        with torch.no_grad():
            w.mul_(2)
        if strategy == "fused":
            loss.backward()
            assert error(w.grad, exact[1]) < 1e-6
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@pytest.mark.usefixtures("no_codegen")
def test_hook_on_the_logits() -> None:
    def function(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        logits_NV = F.linear(x_NH, w_VH)
        logits_NV.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        return F.cross_entropy(logits_NV, y_N)

    assert refusal_of(function, data()) == "higher-order"


@pytest.mark.usefixtures("no_codegen")
def test_transforms() -> None:
    """``torch.func`` around the compiled function, and inside of it around the head."""
    x_NH, w_VH, y_N = data()
    x, w = x_NH.detach(), w_VH.detach()

    def inside(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        return torch.func.grad(loss_of, argnums=1)(x_NH, w_VH, y_N)

    def batched(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        return torch.vmap(loss_of, in_dims=(0, None, 0))(x_NH[None], w_VH, y_N[None])

    for function in (inside, batched):
        torch._dynamo.reset()
        assert refusal_of(function, (x, w, y_N)) == "higher-order"
    torch._dynamo.reset()
    around = torch.func.grad(compiled(loss_of), argnums=1)(x, w, y_N)
    torch.testing.assert_close(around, inside(x, w, y_N))


def refusal_of(function: Callable[..., Any], inputs: Sequence[Any]) -> str:
    """The code its one head is refused with; its result must be right."""
    with collect() as reports:
        assert_same(compiled(function), function, inputs)
    ((row,),) = [report.refused for report in reports]
    assert row.refusal is not None
    return row.refusal.code


def test_anomaly_detection() -> None:
    """Compiling under it works, and it still finds the nan."""
    x_NH, w_VH, y_N = data()
    with pytest.warns(UserWarning, match="Anomaly Detection has been enabled"):
        context = torch.autograd.detect_anomaly()
    with context:
        check_chunked(loss_of, (x_NH, w_VH, y_N))
        bad = x_NH.detach().clone()
        bad[3] = float("nan")
        loss = compiled(loss_of)(bad.requires_grad_(), w_VH, y_N)
        with pytest.raises(RuntimeError, match="returned nan values"):
            loss.backward()
    assert w_VH.grad is None


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


def test_hf_gradient_checkpointing() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        use_cache=False,
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


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_around_the_head(use_reentrant: bool) -> None:
    """It is a higher-order op: right, and refused with that reason."""

    def function(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        return checkpoint(loss_of, x_NH, w_VH, y_N, use_reentrant=use_reentrant)  # type: ignore[return-value]

    with collect() as reports:
        compare(compiled(function), function, data())
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


@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_rows_vary(strategy: str) -> None:
    """One static graph, one for any number of rows, one for a single row; then no more."""
    backend = Counting(chunk_rows=50, strategy=strategy)
    function = torch.compile(loss_of, backend=backend)
    calls = []
    for rows in (130, 64, 200, 1, 257, 63, 2, 1000):
        compare(function, loss_of, data(rows=rows))
        calls.append(backend.calls)
    assert calls == [1, 2, 2, 3, 3, 3, 3, 3]


def test_batch_and_sequence_vary() -> None:
    backend = Counting(chunk_rows=7)
    function = torch.compile(sequence_loss, backend=backend)
    w_VH = torch.randn(V, H, requires_grad=True)
    calls = []
    for batch, length in ((2, 9), (3, 7), (5, 12), (4, 3), (7, 33)):
        y_BT = torch.randint(0, V, (batch, length))
        y_BT[:, 1] = -100
        x_BTH = torch.randn(batch, length, H, requires_grad=True)
        compare(function, sequence_loss, (x_BTH, w_VH, y_BT))
        calls.append(backend.calls)
    assert calls == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("how", ["dynamic", "mark_dynamic"])
def test_dynamic_from_the_start(how: str) -> None:
    backend = Counting(chunk_rows=6)
    function = torch.compile(loss_of, backend=backend, dynamic=True if how == "dynamic" else None)

    def call(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x_NH, 0)
            torch._dynamo.mark_dynamic(y_N, 0)
        return function(x_NH, w_VH, y_N)

    for rows in (21, 6, 40):
        compare(call, loss_of, data(rows=rows))
    assert backend.calls == 1


# ---- several heads ---------------------------------------------------------------------------


def test_two_heads_in_one_graph() -> None:
    """Next-token and next-but-one heads over the same hidden states, and a distilled one."""

    def function(x_NH: Tensor, w_VH: Tensor, u_VH: Tensor, t_VH: Tensor, y_N: Tensor) -> Tensor:
        first = F.cross_entropy(F.linear(x_NH, w_VH), y_N)
        second = F.cross_entropy(F.linear(x_NH, u_VH)[:-1], y_N[1:], reduction="sum")
        teacher = F.linear(x_NH.detach(), t_VH).softmax(-1)
        student = F.linear(x_NH, w_VH).log_softmax(-1)
        return first + 0.1 * second - 0.5 * (teacher * student).sum(-1).mean()

    x_NH, w_VH, y_N = data()
    u_VH = torch.randn(V, H, requires_grad=True)
    check_chunked(function, (x_NH, w_VH, u_VH, torch.randn(V, H), y_N), heads=4)


def test_two_models_in_one_process() -> None:
    """Forward passes first, backward passes in another order."""
    x_NH, w_VH, y_N = data()
    eager = (loss_of, indexed, gathered)
    functions = [compiled(f) for f in eager]
    weights = [w_VH, torch.randn(2 * V, H, requires_grad=True), w_VH]
    leaves = [(leaf(x_NH), leaf(w)) for w in weights]
    losses = [f(x, w, y_N) for f, (x, w) in zip(functions, leaves, strict=True)]
    for i in (1, 2, 0):
        losses[i].backward()
        for got, exact in zip(leaves[i], gradients((x_NH, weights[i], y_N)), strict=False):
            assert error(got.grad, exact) < 1e-6


# ---- unusual values --------------------------------------------------------------------------


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
        for gradient in run(scaled(once, upstream), (x_NH, w_VH, y_N)).gradients[:2]:
            assert not gradient.isfinite().any()


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


def columns(x_NH: Tensor, w_VH: Tensor, k: Tensor) -> Tensor:
    return F.log_softmax(F.linear(x_NH, w_VH), -1)[:, k].sum()


def selected(x_NH: Tensor, w_VH: Tensor, k: Tensor) -> Tensor:
    return F.log_softmax(F.linear(x_NH, w_VH), -1).index_select(-1, k).sum()


@pytest.mark.parametrize("function", [columns, selected])
def test_index_of_features_out_of_range(function: Callable[..., Tensor]) -> None:
    """Indices that all rows share; a kernel that trusted them would read foreign memory."""
    x_NH, w_VH, _ = data()
    once = compiled(function)
    compare(once, function, (x_NH, w_VH, torch.tensor([3, V - 1, 7])))
    with pytest.raises(IndexError, match="Target 500 is out of bounds: the chunked head "):
        once(x_NH, w_VH, torch.tensor([3, 500, 7]))


def test_index_out_of_range_in_a_dynamic_graph() -> None:
    x_NH, w_VH, y_N = data()
    once = compiled(loss_of, dynamic=True)
    assert_same(once, loss_of, (x_NH, w_VH, y_N))
    y_N[5] = V
    with pytest.raises(IndexError, match=f"Target {V} is out of bounds: row 5 "):
        once(x_NH, w_VH, y_N)
    with torch.no_grad(), pytest.raises(IndexError, match=f"Target {V} is out of bounds: row 5 "):
        once(x_NH, w_VH, y_N)


def weighted(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_NH, w_VH), y_N, weight=torch.linspace(0.5, 1, V))


def selected_rows(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_NH, w_VH)[y_N], y_N)


def embedded(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(F.embedding(y_N, w_VH) + x_NH, w_VH), y_N * 0)


@pytest.mark.parametrize("function", [weighted, selected_rows, embedded])
def test_index_out_of_range_outside_of_the_loop(function: Callable[..., Tensor]) -> None:
    """Class weights, a selection of rows, the embedding: Inductor's kernels would abort."""
    rows = 5000  # more than Inductor gives to one thread
    x_NH, w_VH, _ = data(rows=rows)
    y_N = torch.randint(0, V, (rows,))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        once = compiled(function, chunk_rows=2000)
        assert_same(once, function, (x_NH, w_VH, y_N))
        y_N[4321] = 6000
        with pytest.raises((IndexError, RuntimeError)):
            function(x_NH, w_VH, y_N)
        with pytest.raises(IndexError, match="index 6000 is out of bounds for dimension ") as ours:
            once(x_NH, w_VH, y_N)
    finally:
        torch.set_num_threads(threads)
    assert "test_robustness.py" in str(ours.value)


def test_index_out_of_range_where_the_head_is_left_alone() -> None:
    """The rest of the graph is checked whether or not a head in it is chunked."""
    x_NH, w_VH, y_N = data()
    once = compiled(loss_of, min_bytes=2**40)
    assert_same(once, loss_of, (x_NH, w_VH, y_N))
    for bad in (V, -1):
        y_N[13] = bad
        with pytest.raises(IndexError, match=f"index {bad} is out of bounds for dimension 1"):
            once(x_NH, w_VH, y_N)


# ---- failures inside the loop ----------------------------------------------------------------


@pytest.mark.parametrize("failure", [MemoryError("no memory"), RuntimeError("kernel failed")])
@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_failure_inside_the_loop(
    failure: Exception, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reaches the caller as it is; no gradient is half written; the next call is right."""
    x_NH, w_VH, y_N = data()
    function = compiled(loss_of, strategy=strategy)
    assert_same(function, loss_of, (x_NH, w_VH, y_N))
    chunks, fill = [], runtime._fill

    def fails(*args: Any) -> None:
        chunks.append(1)
        if len(chunks) == (3 if strategy == "fused" else 7):  # four chunks a pass
            raise failure
        fill(*args)

    w_VH.grad = torch.ones_like(w_VH)
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "_fill", fails)
        with pytest.raises(type(failure), match=str(failure)):
            function(x_NH, w_VH, y_N).backward()
    assert x_NH.grad is None
    assert torch.equal(w_VH.grad, torch.ones_like(w_VH))
    assert_same(function, loss_of, (x_NH, w_VH, y_N))


# ---- layouts ---------------------------------------------------------------------------------


STRIDED = {
    "x transposed": lambda x, w, y: (x.detach().t().contiguous().t().requires_grad_(), w, y),
    "x strided": lambda x, w, y: (torch.randn(N, 2 * H)[:, ::2].requires_grad_(), w, y),
    "x expanded": lambda x, w, y: (x.detach()[:1].expand(N, H), w, y),
    "x offset": lambda x, w, y: (torch.randn(N + 1, H)[1:].requires_grad_(), w, y),
    "w transposed": lambda x, w, y: (x, w.detach().t().contiguous().t().requires_grad_(), y),
    "w sliced": lambda x, w, y: (x, torch.randn(V, 2 * H)[:, H:].requires_grad_(), y),
    "w expanded": lambda x, w, y: (x, w.detach()[:1].expand(V, H), y),
    "labels strided": lambda x, w, y: (x, w, torch.randint(0, V, (2 * N,))[::2]),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_strided_inputs(layout: str, strategy: str) -> None:
    """Views go into the compiled function as they are; gradients come back to them."""
    inputs = STRIDED[layout](*data())
    function = compiled(loss_of, strategy=strategy)
    for t in inputs:
        if t.requires_grad:
            t.retain_grad()
    with collect() as reports:
        loss = function(*inputs)
    assert len(reports[0].chunked) == 1
    if loss.requires_grad:
        loss.backward()
    torch.testing.assert_close(loss.detach(), loss_of(*inputs).detach(), rtol=1e-6, atol=0)
    for t, exact in zip(inputs, gradients(inputs), strict=True):
        assert (t.grad is None) == (exact is None)
        if exact is not None:
            torch.testing.assert_close(t.grad.double(), exact, rtol=1e-5, atol=1e-6)


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


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize(
    "kind", ["scaled", "normalised", "slice", "bias", "bias slice", "hidden stride", "tied"]
)
def test_weights(kind: str) -> None:
    x_NH, w_VH, y_N = data()
    check_chunked(weight_forms(kind), (x_NH, w_VH, torch.randn(V, requires_grad=True), y_N))


def test_weight_is_no_leaf() -> None:
    """Computed outside of the compiled function."""
    x_NH, w_VH, y_N = data()
    function = compiled(loss_of)

    def whole(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, y: loss(x.tanh(), F.normalize(w, dim=-1) * 3, y)

    assert_same(whole(function), whole(loss_of), (x_NH, w_VH, y_N))


# ---- chunk sizes and strategies --------------------------------------------------------------


@pytest.mark.usefixtures("no_codegen")
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
    report = check_chunked(loss_of, data(), **{"chunk_rows": None, **size})
    assert report.chunked[0].chunks.split(" × ")[0] == str(chunks)


@pytest.mark.parametrize("accumulate", ["auto", "float32", "bfloat16"])
def test_accumulate_dtype(accumulate: str) -> None:
    """With 21 additions into a bfloat16 weight gradient; one's own choice may cost accuracy."""
    inputs = data(torch.bfloat16)
    options: dict[str, Any] = {"chunk_rows": 1, "accumulate_dtype": accumulate}
    if accumulate != "bfloat16":
        check_chunked(loss_of, inputs, expect="fused", **options)
        return
    exact, got = run(loss_of, widened(inputs)), run(compiled(loss_of, **options), inputs)
    assert error(got.gradients[1], exact.gradients[1]) < 5e-2


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
                    compare(function, loss_of, (x.requires_grad_(), w, y))
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


def test_a_number_that_changes_each_step() -> None:
    """A schedule's temperature becomes an input: chunked in every step, compiled twice at most."""
    x_NH, w_VH, y_N = data()

    def step(x: Tensor, w: Tensor, y: Tensor, temperature: float) -> Tensor:
        return F.cross_entropy(F.linear(x, w) / temperature, y) * (1 / temperature)

    function = compiled(step)
    with collect() as reports:
        for temperature in (1.0, 1.5, 1.75, 2.25, 3.5):
            got = torch.autograd.grad(function(x_NH, w_VH, y_N, temperature), (x_NH, w_VH))
            want = torch.autograd.grad(step(x_NH, w_VH, y_N, temperature), (x_NH, w_VH))
            for a, b in zip(got, want, strict=True):
                assert error(a, b) < 1e-5
    assert len(reports) <= 2
    assert all(report.chunked for report in reports)


def test_a_shape_that_is_put_together() -> None:
    """With symbolic sizes Dynamo has the shape as one value, a tuple."""
    x_NH, w_VH, y_N = data()
    x = x_NH.detach()[:12].view(2, 6, -1).requires_grad_()
    y = y_N[:12].view(2, 6)

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(x, w)
        nll = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
        return -F.logsigmoid(nll.view(z.shape[:-1]).sum(-1)).mean()

    function = compiled(loss, dynamic=True)
    got = torch.autograd.grad(function(x, w_VH, y), (x, w_VH))
    for a, b in zip(got, torch.autograd.grad(loss(x, w_VH, y), (x, w_VH)), strict=True):
        assert error(a, b) < 1e-5
