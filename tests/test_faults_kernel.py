"""Faults of the chunk's kernel and of the derivatives in it, each as it was found.

With Inductor's kernels, unless a test takes ``no_codegen``.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import check_chunked, run
from torch import fx
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.experimental.proxy_tensor import make_fx

import autochunk
from autochunk.kernel_writes import WriteError, check_writes, functionalised, writing_nodes

aten = torch.ops.aten
N, H, V = 24, 8, 64
OPTIONS = {"strict": True, "min_bytes": 0, "chunk_rows": 7}
LABELS = torch.arange(N) * 5 % V


def _inputs(scale=1.0, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(N, H, dtype=torch.float64) * scale
    return [x.to(dtype).requires_grad_(), torch.randn(V, H).to(dtype).requires_grad_()]


def _compare(function, inputs, dtype=torch.float32):
    return check_chunked(function, inputs, dtype, OPTIONS)


# ---- B: kernels write to nothing but their buffers ---------------------------------------------


def _hazard(x, w):
    survival = (1 - (x @ w.T).sigmoid()).cumprod(-1)
    return -(survival.gather(1, LABELS[:, None]) + 1e-9).log().mean()


def _stick_breaking(x, w):
    share = F.linear(x, w).sigmoid()
    left = F.pad((1 - share).cumprod(-1), (1, 0), value=1.0)[:, :-1]
    return -((share * left).gather(1, LABELS[:, None]) + 1e-9).log().mean()


B_FUNCTIONS = {
    "hazard": _hazard,
    "stick breaking": _stick_breaking,
    "products": lambda x, w: F.linear(x, w).tanh().cumprod(-1).mean(),
}


@pytest.mark.parametrize("name", B_FUNCTIONS)
def test_fault_B_derivative_with_inplace_ops(name):
    _compare(B_FUNCTIONS[name], _inputs(0.3))


def test_fault_B_every_kernel_is_checked(no_codegen, monkeypatch):
    """A write that survives is a fallback with its reason, or an error in strict mode."""

    def untouched(gm, inputs, table=None):
        return gm

    monkeypatch.setattr(autochunk.body, "functionalised", untouched)
    x, w = _inputs()
    with pytest.raises(BackendCompilerFailed, match="modifies a tensor in place: aten"):
        torch.compile(_hazard, backend="autochunk", options=OPTIONS)(x, w)
    torch._dynamo.reset()
    with pytest.warns(autochunk.FallbackWarning, match="modifies a tensor in place"):
        explained = autochunk.explain(_hazard, options={**OPTIONS, "strict": False})(x, w)
    torch.testing.assert_close(explained.result, _hazard(x, w))


def _one_label(x, w):
    z = F.linear(x, w)
    return F.cross_entropy(z, LABELS) + z[..., 3].sum() + z[:, 5:8].t().sum()


def _metric(x, w):
    z = F.linear(x, w)
    return F.cross_entropy(z, LABELS), z[:, 3].detach(), z.detach().view(N, 4, -1)[:, 1, 2:4]


B_VIEWS = {
    "select": lambda x, w: F.linear(x, w)[..., 3].sum(),
    "slice": lambda x, w: F.linear(x, w)[:, 2:6].sum(),
    "beside a loss": _one_label,
    "as a metric": _metric,
}


@pytest.mark.parametrize("name", B_VIEWS)
def test_fault_B_a_view_of_the_logits_leaves_before_they_are_overwritten(name):
    _compare(B_VIEWS[name], _inputs())


@pytest.mark.parametrize("name", B_VIEWS)
def test_fault_B_views_op_by_op(name, no_codegen):
    _compare(B_VIEWS[name], _inputs())


def test_fault_B_writes_in_the_tail(no_codegen):
    """The tail's derivative may write: AOTAutograd functionalises the graph it becomes part of."""

    def function(x, w):
        nll = F.cross_entropy(F.linear(x, w), LABELS, reduction="none")
        return nll.as_strided((3, 2), (2, 1)).sum()

    _compare(function, _inputs())


def _graph(*nodes):
    """A graph of one buffer; each of ``nodes`` is (target, indices of earlier nodes or numbers)."""
    graph = fx.Graph()
    made = [graph.placeholder("buffer")]
    for target, *args in nodes:
        args = [made[a] if isinstance(a, int) else a[0] for a in args]
        made.append(graph.call_function(target, tuple(args)))
    graph.output((made[-1],))
    return graph, made[0]


def test_fault_B_what_a_kernel_may_write():
    graph, buffer = _graph((aten.exp.default, 0), (aten.copy_.default, 0, 1), (aten.sum.default, 1))
    check_writes(graph, [buffer])
    with pytest.raises(WriteError, match="copy_"):
        check_writes(graph, [])
    graph, buffer = _graph((aten.exp.default, 0), (aten.relu_.default, 1))
    with pytest.raises(WriteError, match=r"in place: aten\.relu_"):
        check_writes(graph, [buffer])
    view = (aten._unsafe_view.default, 0, [[64]])
    graph, buffer = _graph(
        view, (aten.exp.default, 0), (aten.copy_.default, 0, 2), (aten.exp.default, 1)
    )
    with pytest.raises(WriteError, match="after it was overwritten"):
        check_writes(graph, [buffer])


def test_fault_B_functionalised_graphs_are_the_same():
    def writes(x):
        return torch.zeros(4).scatter_(0, torch.tensor([1, 2]), x).relu_()

    x = torch.tensor([-1.0, 2.0])
    gm = make_fx(writes)(x)
    assert writing_nodes(gm.graph)
    functional = functionalised(gm, [x])
    assert not writing_nodes(functional.graph)
    assert torch.equal(functional(x), writes(x))
    assert functionalised(functional, [x]) is functional


# ---- C: derivatives at saturation ----------------------------------------------------------------


def _probabilities(x, w):
    return F.binary_cross_entropy((4 * x @ w.T).sigmoid(), _soft(V))


def _soft(v):
    return (torch.arange(N * v).view(N, v) % 5 / 4).float()


C_FUNCTIONS = {
    "binary cross entropy": _probabilities,
    "with logits": lambda x, w: F.binary_cross_entropy_with_logits(
        1e4 * x @ w.T, _soft(V), pos_weight=torch.linspace(1, 2, V)
    ),
    "multi margin": lambda x, w: F.multi_margin_loss((x @ w.T).round(), LABELS),
    "smooth l1": lambda x, w: F.smooth_l1_loss((x @ w.T).round(), _soft(V).round(), beta=1.0),
    "xlogy": lambda x, w: torch.xlogy(F.relu(x @ w.T), _soft(V)).mean(),
}


@pytest.mark.parametrize("name", C_FUNCTIONS)
def test_fault_C_saturated(name):
    x, w = _inputs(2.0)
    function = C_FUNCTIONS[name]
    found = autochunk.explain(function, options=OPTIONS)
    actual = run(lambda *a: found(*a).result, [x, w])
    expected = run(function, [x, w])
    for ours, theirs in zip(
        (*actual.outputs, *actual.gradients),
        (*expected.outputs, *expected.gradients),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


# ---- C2: ties between rows -----------------------------------------------------------------------


def _rounded(x, w, shape=(N, V)):
    z = F.linear(x, w)
    clamped = z.detach().clamp(-9, 9)
    return (clamped + (z - z.detach())).view(shape)  # many ties, unequally many in a row


def _integers(dtype):
    return [t.detach().mul(2).round().requires_grad_() for t in _inputs(dtype=dtype)]


C2_FUNCTIONS = {
    "max": lambda x, w: _rounded(x, w).max(),
    "min": lambda x, w: _rounded(x, w).min() * 3,
    "amax": lambda x, w: _rounded(x, w).amax((0, 1)),
    "amin, kept": lambda x, w: _rounded(x, w).amin((0, 1), keepdim=True).square().sum(),
    "some rows": lambda x, w: (_rounded(x, w, (4, 6, V)).amax((0, 2)) * torch.arange(6)).sum(),
    "features first": lambda x, w: _rounded(x, w).t().max(),
    "a half of features": lambda x, w: _rounded(x, w, (N, 2, 32)).amax((0, 2)).square().sum(),
    "beside a loss": lambda x, w: F.cross_entropy(F.linear(x, w), LABELS) + _rounded(x, w).max(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", C2_FUNCTIONS)
def test_fault_C2_ties_between_rows(name, dtype, no_codegen):
    """All that tie share the gradient evenly, as in eager."""
    _compare(C2_FUNCTIONS[name], _integers(dtype), dtype)


def test_fault_C2_infinite(no_codegen):
    def function(x, w):
        z = F.linear(x, w)
        return (z + torch.where(z.detach() > 9, torch.inf, 0.0)).max()

    inputs = _integers(torch.float32)
    actual = run(lambda *a: autochunk.explain(function, options=OPTIONS)(*a).result, inputs)
    expected = run(function, inputs)
    assert actual.outputs[0] == torch.inf
    for ours, theirs in zip(actual.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fault_C2_with_kernels():
    _compare(C2_FUNCTIONS["max"], _integers(torch.float32))
    _compare(C2_FUNCTIONS["some rows"], _integers(torch.float32))


# ---- C3: labels that are padded ------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_fault_C3_multilabel_margin_loss_with_padded_labels(reduction):
    """As eager has it, where ``torch.compile`` has another value."""
    labels = torch.stack([(torch.arange(V) * 3 + row) % V for row in range(N)])
    labels[torch.arange(N), torch.arange(N) % 6] = -1
    _compare(
        lambda x, w: F.multilabel_margin_loss(F.linear(x, w), labels, reduction=reduction),
        _inputs(),
    )


# ---- AC: Inductor's local buffers in tiled loops (pytorch/pytorch#185702) -----------------------


def test_fault_AC_local_buffer_of_a_tile_of_rows():
    """All rows of a tile had the gradient of the last one."""
    labels, weights = torch.arange(10), torch.linspace(-1, 1, 10).view(2, 5)

    def function(x, w):
        z = F.linear(x.view(2, 5, 4), w)
        z = z / (1 + z.norm(dim=-1, keepdim=True))
        entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
        first = F.cross_entropy(z.flatten(0, 1), labels, reduction="none").view(2, 5)
        second = F.cross_entropy(z.flatten(0, 1), labels, reduction="none").view(2, 5)
        ratio = (torch.exp(0.1 * (first - first.detach())) * weights).mean()
        return entropy.mean(), ratio.square(), second

    torch.manual_seed(0)
    inputs = [torch.randn(10, 4), torch.randn(64, 4, requires_grad=True)]
    with torch._inductor.config.patch(force_disable_caches=True):
        check_chunked(function, inputs, torch.float32, {"min_bytes": 0, "chunk_rows": 11})


# ---- AE: Inductor's C++ backend declares the accumulator of two equal sums twice ----------------


@pytest.mark.parametrize("name", ["twice", "scaled"])
def test_fault_AE_equal_bias_gradients(name):
    """Two equal sums in half precision were two results of the kernel, which did not compile."""
    labels, mask = torch.arange(20), torch.arange(20) % 3 > 0

    def function(x, w, b):
        first, second = (b, b) if name == "twice" else (b * 2, b * 3)
        z = torch.tanh(F.linear(x, w) + first + second)
        losses = F.cross_entropy(z, labels, reduction="none")
        return (losses * mask).sum() / mask.sum()

    torch.manual_seed(0)
    inputs = [torch.randn(size, dtype=torch.bfloat16) for size in [(20, 16), (256, 16), (256,)]]
    inputs[2].requires_grad_()
    with torch._inductor.config.patch(force_disable_caches=True):
        check_chunked(function, inputs, torch.bfloat16, {"min_bytes": 0, "chunk_rows": 10})
