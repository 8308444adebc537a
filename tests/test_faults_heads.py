"""Heads that are several, or no plain linear: what was once refused, wrongly named or not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import check, check_chunked, run, widened
from torch import Tensor

from autochunk.report import collect

OPTIONS: dict[str, Any] = {"min_bytes": 0, "chunk_rows": 7, "strict": True}
N, H, K, V = 24, 8, 3, 64


def compiled(function: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="autochunk", options=OPTIONS, **keywords)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def labels(*shape: int) -> Tensor:
    made = torch.randint(V, shape)
    made.view(-1)[::5] = -100
    return made


# ---- R1: a stack of heads --------------------------------------------------------------------

B, T = 4, 6


def stacked(x: Tensor, weights: Sequence[Tensor], dim: int) -> Tensor:
    return torch.stack([F.linear(x, w) for w in weights], dim)


def _flattened(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
    z = stacked(x, weights, 1).flatten(0, 1)
    return F.cross_entropy(z.reshape(-1, V), y.reshape(-1))


def _smoothed(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
    z = stacked(x, weights, 1).flatten(0, 1).flatten(0, 1).float()
    return F.cross_entropy(z, y.flatten(), label_smoothing=0.1, weight=torch.ones(V))


def _last_but_one(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
    z = stacked(x, weights, -2)
    return F.cross_entropy(z.view(-1, V), y.movedim(1, -1).reshape(-1), reduction="sum")


def _of_flat_rows(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
    """The rows are split again by the view: ``[B·T, K, V]`` as ``[B, T·K, V]``."""
    z = stacked(x.flatten(0, 1), weights, 1).view(B, T * len(weights), V)
    return F.cross_entropy(z.transpose(1, 2), y.movedim(1, -1).reshape(B, -1))


def _k_dimensional(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
    z = stacked(x, weights, 1).flatten(0, 1).transpose(1, 2)
    return F.cross_entropy(z, y.flatten(0, 1))


def _stacked_before(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
    return F.cross_entropy(stacked(x, weights, 0).view(-1, V), y.transpose(0, 1).flatten())


def _logps(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
    """Log-probabilities by indices, weighted by position, and an entropy beside them."""
    logp = stacked(x, weights, 1).view(-1, V).log_softmax(-1)
    picked = logp[torch.arange(logp.shape[0]), y.flatten().clamp(min=-3)]
    entropy = -(logp.exp() * logp).sum(-1)
    scale = torch.linspace(0, 1, picked.numel(), dtype=picked.dtype)
    return (picked * scale).view(B, -1).sum(1).mean() - entropy.mean()


def _per_token(x: Tensor, y: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What leaves is in the order of the merged rows."""
    z = stacked(x, weights, 1).view(-1, V)
    return F.cross_entropy(z, y.flatten(), reduction="none"), z.argmax(-1), z.amax(-1, keepdim=True)


def _masked(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
    nll = F.cross_entropy(stacked(x, weights, 1).view(-1, V), y.flatten(), reduction="none")
    mask = y.flatten() != -100
    return (nll * mask).sum() / mask.sum()


def _shifted(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
    z = stacked(x, weights, 1).flatten(0, 1)[:, :-1]
    return F.cross_entropy(z.reshape(-1, V), y.flatten(0, 1)[:, 1:].reshape(-1))


def _distilled(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
    z = stacked(x, weights, 1).view(-1, V).log_softmax(-1)
    teacher = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).sin().view_as(z).softmax(-1)
    return F.kl_div(z, teacher, reduction="batchmean")


def _everything(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
    """No dimension is left: only the sums of elements."""
    z = stacked(x, weights, 1).flatten()
    return z.square().mean() + z.tanh().sum()


def _musicgen(x: Tensor, y: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """The loop of MusicGen's forward, which returns the merged logits as well."""
    z = stacked(x, weights, 1)
    logits, y = z[:, :, -y.shape[2] :], y.movedim(1, -1)
    loss = torch.zeros([], dtype=x.dtype)
    for k in range(len(weights)):
        codebook = logits[:, k].contiguous().view(-1, logits.shape[-1])
        loss += F.cross_entropy(codebook, y[..., k].contiguous().view(-1))
    return loss / len(weights), z.reshape(-1, *z.shape[2:])


def _musicgen_masked(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
    z, y = stacked(x, weights, 1), y.movedim(1, -1)
    loss = torch.zeros([], dtype=x.dtype)
    for k in range(len(weights)):
        mask = (y[..., k] != -100).view(-1)
        nll = F.cross_entropy(z[:, k].reshape(-1, V), y[..., k].reshape(-1), reduction="none")
        loss = loss + (nll * mask).sum() / mask.sum()
    return loss


def _dia(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """One head for all codebooks, as Dia's forward has it."""
    z = F.linear(x, w).view((B, -1, K, V)).transpose(1, 2).contiguous().view(B * K, -1, V)
    return F.cross_entropy(z.float().view(-1, V), y.view(-1))


def _dia_returned(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(x, w).view((B, -1, K, V)).transpose(1, 2).contiguous().view(B * K, -1, V)
    return F.cross_entropy(z.view(-1, V), y.view(-1)), z


STACKS = [
    *(_flattened, _smoothed, _last_but_one, _of_flat_rows, _k_dimensional, _stacked_before),
    *(_logps, _per_token, _masked, _shifted, _distilled, _everything, _musicgen),
    *(_musicgen_masked, _dia, _dia_returned),
]


def data_of(function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = torch.randn(B, T, H, dtype=dtype, requires_grad=True)
    if function in (_dia, _dia_returned):
        weights = [torch.randn(K * V, H, dtype=dtype, requires_grad=True)]
    else:
        weights = [torch.randn(V, H, dtype=dtype, requires_grad=True) for _ in range(K)]
    return [x, labels(B, K, T), *weights]


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("function", STACKS, ids=lambda f: f.__name__)
def test_fault_R1_stacked_heads_are_chunked(function: Callable[..., Any]) -> None:
    check_chunked(function, data_of(function), torch.float32, OPTIONS)


VARYING = [_flattened, _last_but_one, _k_dimensional, _logps, _shifted, _musicgen]


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("function", VARYING, ids=lambda f: f.__name__)
def test_fault_R1_stacked_heads_with_lengths_that_vary(function: Callable[..., Any]) -> None:
    inputs = data_of(function, torch.float64)
    with collect() as reports:
        actual = run(compiled(function, dynamic=True), inputs)
    assert not [row.refusal for report in reports for row in report.refused], str(reports[0])
    check(actual, run(function, inputs), run(function, inputs), torch.float64)


@pytest.mark.parametrize("function", [_per_token, _dia_returned])
def test_fault_R1_stacked_heads_with_kernels(function: Callable[..., Any]) -> None:
    check_chunked(function, data_of(function), torch.float32, OPTIONS)


@pytest.mark.usefixtures("no_codegen")
def test_fault_R1_a_loss_outside_of_stacked_heads() -> None:
    def logits(x: Tensor, *weights: Tensor) -> Tensor:
        return stacked(x, weights, 1).flatten(0, 1)

    inside = compiled(logits)

    def outside(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        return F.cross_entropy(inside(x, *weights).view(-1, V), y.view(-1))

    inputs = data_of(_flattened)
    with collect() as reports:
        actual = run(outside, inputs)
    assert [row.strategy for row in reports[-1].rows] == ["fused"] * K, reports[-1]
    check(actual, run(_flattened, inputs), run(_flattened, widened(inputs)), torch.float32)


@pytest.mark.usefixtures("no_codegen")
def test_fault_R1_narrow_values_of_stacked_heads_are_viewed() -> None:
    """A region's output has other strides than eager's value: a view of it raised."""

    def function(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        z = torch.stack([F.linear(x, w).logsumexp(-1) for w in weights], 1)
        return z.view(-1).square().mean()

    check_chunked(function, data_of(function), torch.float32, OPTIONS)


MIXING: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "softmax": (lambda z, y: z.view(-1, V).softmax(0).amax(-1).sum(), "mixes-rows", "softmax"),
    "sort": (lambda z, y: z.view(B, -1, V).sort(1)[0].amax(-1).sum(), "mixes-rows", "sort"),
    "mask": (
        lambda z, y: z.view(-1, V)[torch.arange(2, 9)].logsumexp(-1).sum(),
        "misaligned",
        "index",
    ),
    "cat": (
        lambda z, y: torch.cat([z.view(-1, V), z.view(-1, V)]).logsumexp(-1).sum(),
        "no-rule",
        "cat",
    ),
    "view": (lambda z, y: z.view(B, 14, 9, V).logsumexp(1).amax(-1).sum(), "mixes-rows", "view"),
}


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("name", list(MIXING))
def test_fault_R1_what_mixes_merged_rows_is_named(name: str) -> None:
    """The op that needs the merged rows, at its own line; not the view before it."""
    loss, code, op = MIXING[name]

    def function(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        z = stacked(x, weights, 1)
        return loss(z, y)

    x, y, *weights = data_of(function)
    inputs = [x.detach().repeat(1, 7, 1).requires_grad_(), y, *weights]
    with collect() as reports:
        actual = run(compiled(function), inputs)
    check(actual, run(function, inputs), run(function, widened(inputs)), torch.float32)
    assert len(reports[0].rows) == K
    for row in reports[0].rows:
        assert row.refusal is not None
        assert (row.refusal.code, row.refusal.op) == (code, op), row.refusal
        assert "lambda z, y" in row.refusal.source


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("merge", ["before", "behind"])
def test_fault_R1_nothing_of_merged_rows(merge: str) -> None:
    """A fallback: ZeroDivisionError."""

    def function(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        z = stacked(x, weights, 1)
        nothing = z[:, :, :0].flatten(0, 1) if merge == "before" else z.view(-1, V)[:0]
        return F.cross_entropy(z.view(-1, V), y.view(-1)) + nothing.logsumexp(-1).sum()

    inputs = data_of(_flattened)
    actual = run(compiled(function), inputs)
    check(actual, run(function, inputs), run(function, widened(inputs)), torch.float32)


@pytest.mark.usefixtures("no_codegen")
def test_fault_R1_a_number_of_all_merged_rows_is_broadcast() -> None:
    """Its dimension of one element, reduced from merged ones, lines up with all rows."""

    def function(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        z = stacked(x, weights, 1).view(-1, V)
        return (z - z.mean((0, 1), keepdim=True)).square().mean()

    x, y, *weights = data_of(_flattened)
    with collect() as reports:
        actual = run(compiled(function), [x, y, *weights])
    exact = run(function, widened([x, y, *weights]))
    check(actual, run(function, [x, y, *weights]), exact, torch.float32)
    assert {row.refusal.code for row in reports[0].rows if row.refusal} == {"two-pass"}


# ---- R2: heads that are no linear ------------------------------------------------------------


def _first(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of logits whose features come last, of labels in the same order."""
    return F.cross_entropy(logits.movedim(-1, 1), y)


OTHER: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
    "bmm": (lambda x, w, y: _first(torch.bmm(x, w), y), [leaf(K, N, H), leaf(K, H, V)]),
    "baddbmm": (
        lambda x, w, y: _first(torch.baddbmm(torch.ones(1), x, w), y),
        [leaf(K, N, H), leaf(K, H, V)],
    ),
    "a weight for each codebook": (
        lambda x, w, y: _first((x[:, :, None] @ w[None]).squeeze(2), y.view(N, K)),
        [leaf(N, K, H), leaf(K, H, V)],
    ),
    "einsum": (
        lambda x, w, y: _first(torch.einsum("knh,kvh->knv", x, w), y),
        [leaf(K, N, H), leaf(K, V, H)],
    ),
    "a wide kernel": (
        lambda x, w, y: F.cross_entropy(F.conv1d(x, w, padding=1), y),
        [leaf(K, 4, N), leaf(V, 4, 3)],
    ),
    "groups": (
        lambda x, w, y: F.cross_entropy(F.conv1d(x, w, groups=2), y),
        [leaf(K, 4, N), leaf(V, 2, 1)],
    ),
}


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", list(OTHER))
def test_fault_R2_a_head_that_is_no_linear_has_a_line(name: str, dynamic: bool) -> None:
    function, inputs = OTHER[name]
    y = labels(K, N)
    with collect() as reports:
        result = compiled(function, dynamic=dynamic)(*inputs, y)
    torch.testing.assert_close(result, function(*inputs, y))
    (row,) = reports[0].rows
    assert row.refusal is not None
    assert row.refusal.code == "other-product"
    assert "test_faults_heads.py" in row.refusal.source
    assert row.shape.endswith(f"× {V} float32")


LAYERS: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
    "attention": (
        lambda q, k: ((q @ k.transpose(1, 2)).softmax(-1) @ k).sum(),
        [leaf(K, V, H), leaf(K, V, H)],
    ),
    "attention by einsum": (
        lambda q, k: torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k), k).sum(),
        [leaf(K, V, H), leaf(K, V, H)],
    ),
    "depthwise": (
        lambda x, w: F.conv1d(x, w, groups=V).square().sum(),
        [leaf(K, V, N), leaf(V, 1, 3)],
    ),
    "expanding": (
        lambda x, w, v: F.conv1d(F.conv1d(x, w, padding=1).relu(), v, padding=1).square().sum(),
        [leaf(K, 4, N), leaf(V, 4, 3), leaf(4, V, 3)],
    ),
    "a score of a row": (
        lambda x, w: torch.einsum("nh,h->n", x, w).square().sum(),
        [leaf(N, H), leaf(H)],
    ),
}


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("name", list(LAYERS))
def test_fault_R2_a_layer_has_no_line(name: str) -> None:
    function, inputs = LAYERS[name]
    with collect() as reports:
        compiled(function)(*inputs)
    assert not reports[0].rows, str(reports[0])


# ---- R2: heads that are a linear, written otherwise ------------------------------------------


def _einsum(equation: str) -> Callable[..., Tensor]:
    def function(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.einsum(equation, x, w).flatten(0, -2), y.flatten())

    return function


def _segmentation(x: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy(F.conv2d(x, w, b), y, label_smoothing=0.1)


def _dice(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two losses per pixel and the predictions of each."""
    z = F.conv2d(x, w)
    p = z.softmax(1).gather(1, y.clamp(min=0)[:, None])
    return 1 - p.mean() + F.cross_entropy(
        z.permute(0, 2, 3, 1).reshape(-1, V), y.flatten()
    ), z.argmax(1)


LINEARS: dict[str, tuple[Callable[..., Any], Sequence[Tensor]]] = {
    "nh,kvh->nkv": (_einsum("nh,kvh->nkv"), [leaf(N, H), leaf(K, V, H), labels(N, K)]),
    "nh,hkv->nkv": (_einsum("nh,hkv->nkv"), [leaf(N, H), leaf(H, K, V), labels(N, K)]),
    "bth,kvh->btkv": (_einsum("bth,kvh->btkv"), [leaf(B, T, H), leaf(K, V, H), labels(B, T, K)]),
    "conv1d": (
        lambda x, w, y, b: F.cross_entropy(F.conv1d(x, w, b, padding="same"), y),
        [leaf(B, H, T), leaf(V, H, 1), labels(B, T), leaf(V)],
    ),
    "conv2d": (_segmentation, [leaf(B, H, 5, 7), leaf(V, H, 1, 1), labels(B, 5, 7), leaf(V)]),
    "conv2d twice": (_dice, [leaf(B, H, 5, 7), leaf(V, H, 1, 1), labels(B, 5, 7)]),
    "conv2d viewed": (
        lambda x, w, y: F.cross_entropy(F.conv2d(x, w).view(B, V, -1), y.view(B, -1)),
        [leaf(B, H, 5, 7), leaf(V, H, 1, 1), labels(B, 5, 7)],
    ),
    "conv3d": (
        lambda x, w, y: F.cross_entropy(F.conv3d(x, w), y),
        [leaf(B, H, 2, 3, 4), leaf(V, H, 1, 1, 1), labels(B, 2, 3, 4)],
    ),
}


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("name", list(LINEARS))
def test_fault_R2_a_linear_written_otherwise_is_chunked(name: str) -> None:
    function, inputs = LINEARS[name]
    check_chunked(function, inputs, torch.float32, OPTIONS)


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("name", ["bth,kvh->btkv", "conv2d"])
def test_fault_R2_a_linear_written_otherwise_with_dynamic_sizes(name: str) -> None:
    function, inputs = LINEARS[name]
    with collect() as reports:
        actual = run(compiled(function, dynamic=True), inputs)
    check(actual, run(function, inputs), run(function, widened(inputs)), torch.float32)
    assert reports[0].rows


class _PerPixel(torch.nn.Module):
    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.head = torch.nn.Conv2d(H, V, 1)
        if channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.head(x)
        return F.cross_entropy(z, y), z


@pytest.mark.parametrize("channels_last", [False, True])
def test_fault_R2_a_module_per_pixel_that_returns_its_logits(channels_last: bool) -> None:
    model = _PerPixel(channels_last)
    x, y = torch.randn(B, H, 5, 7, requires_grad=True), labels(B, 5, 7)
    if channels_last:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    inputs = [x, *model.parameters()]
    loss, z = model(x, y)
    expected = torch.autograd.grad(loss + z.square().mean(), inputs)
    with collect() as reports:
        loss, z = compiled(model)(x, y)
        actual = torch.autograd.grad(loss + z.square().mean(), inputs)
    assert [row.strategy for row in reports[0].rows] == ["fused"], str(reports[0])
    assert z.stride() == model(x, y)[1].stride()
    torch.testing.assert_close(actual, expected)
