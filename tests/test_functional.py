"""The functional form, with Inductor's real kernels where memory or compilation is the point."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import check, run, widened
from torch._dynamo.testing import CompileCounter

import autochunk
from autochunk import OptionError, RefusedError, chunked_linear
from autochunk.report import collect

B, T, H, V = 3, 5, 8, 160


def data(dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(B, T, H).to(dtype).requires_grad_()
    w = (torch.randn(V, H) * 0.5).to(dtype).requires_grad_()
    bias = torch.randn(V).to(dtype).requires_grad_()
    y = torch.randint(0, V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, -100)
    return [x, w, bias, y]


def cross_entropy(logits, y):
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


def squares(logits, y):
    return F.relu(logits).square().mean(-1)


def two(logits, y):
    logp = logits.log_softmax(-1)
    return logp.gather(-1, y.clamp(min=0).unsqueeze(-1)).sum(), (logp.exp() * logp).sum(-1)


SIZES = [
    {"batch_chunk": 1, "sequence_chunk": 2},
    {"sequence_chunk": 2},
    {"chunk_rows": 4},
    {"num_chunks": 15},
    {"memory_budget": 3000},
    {},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("function", [cross_entropy, squares, two])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: " ".join(s) or "default")
def test_same_numbers(function, size, dtype, no_codegen):
    def ours(x, w, bias, y):
        return chunked_linear(function, x, w, y, bias=bias, **size)

    def plain(x, w, bias, y):
        return function(F.linear(x, w, bias), y)

    inputs = data(dtype)
    check(run(ours, inputs), run(plain, inputs), run(plain, widened(inputs)), dtype)


@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_mean_is_over_counted_tokens(strategy, no_codegen):
    """Ignored tokens do not count, however they fall into chunks."""
    x, w, _, y = data()
    y[0] = -100  # the first chunks have no token that counts
    loss = chunked_linear(cross_entropy, x, w, y, chunk_rows=2, strategy=strategy)
    torch.testing.assert_close(loss, cross_entropy(F.linear(x, w), y))


def test_chunk_size_per_batch_and_sequence(no_codegen):
    x, w, _, y = data()
    with collect() as reports:
        chunked_linear(cross_entropy, x, w, y, batch_chunk=2, sequence_chunk=3)
    ((row,),) = (report.rows for report in reports)
    assert row.chunks == "3 × 5"  # 15 rows, 6 at most, near-equal


def test_ratio_of_features_does_not_matter(no_codegen):
    x, y = torch.randn(6, 32, requires_grad=True), torch.randint(0, 40, (6,))
    w = torch.randn(40, 32, requires_grad=True)
    with collect() as reports:
        chunked_linear(F.cross_entropy, x, w, y, chunk_rows=2)
    assert reports[0].chunked


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows, no_codegen):
    x, w = torch.randn(rows, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    chunked_linear(lambda z: z.logsumexp(-1).sum(), x, w).backward()
    assert x.grad.shape == x.shape
    assert w.grad.shape == w.shape


def test_refusal_is_an_error(no_codegen):
    x, w, _, _ = data()
    with pytest.raises(RefusedError, match=r"softmax.*test_functional.py:\d+.*mixes-rows") as info:
        chunked_linear(lambda z: z.softmax(0).square().sum(), x, w)
    assert info.value.refusal.code == "mixes-rows"
    assert isinstance(info.value, ValueError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_chunk": 0}, "batch_chunk is 0; it must be an int ≥ 1"),
        ({"sequence_chunk": True}, "sequence_chunk is True"),
        ({"batch_chunk": 1, "chunk_rows": 2}, "and so does chunk_rows; give one"),
        ({"chunk_row": 2}, "unknown option 'chunk_row' .did you mean 'chunk_rows'"),
        ({"x": torch.randn(4, H), "batch_chunk": 1}, r"need x of .batch, sequence.*\[4, 8\]"),
    ],
)
def test_bad_options(change, message):
    x, w, _, y = data()
    with pytest.raises(OptionError, match=message):
        chunked_linear(cross_entropy, change.pop("x", x), w, y, **change)


def test_bad_arguments():
    x, w, _, _ = data()
    with pytest.raises(TypeError, match="function is 3; it must be callable"):
        chunked_linear(3, x, w)
    with pytest.raises(TypeError, match="weight is None; it must be a tensor"):
        chunked_linear(cross_entropy, x, None)


def test_lambdas_and_closures_are_compiled_once(no_codegen):
    """A lambda of a loop is one function; what it closes over is not forgotten."""
    x, w, _, _ = data()
    with collect() as reports:
        for divisor in (1.0, 1.0, 2.0, 3.0, 4.0):
            loss = chunked_linear(lambda z, d=divisor: (z / d).logsumexp(-1).sum(), x, w)
            torch.testing.assert_close(loss, (F.linear(x, w) / divisor).logsumexp(-1).sum())
    assert len(reports) <= 2  # the second with a symbolic number


def _with_cell(divisor):
    return lambda z: ((z / divisor).exp() * (1 / divisor) - divisor).logsumexp(-1).sum()


def test_numbers_that_change(no_codegen):
    """A schedule's numbers become inputs of the chunks, not another kernel for each."""
    x, w, _, _ = data()
    with collect() as reports:
        for divisor in (1.5, 2.5, 3.5, 4.5, 7):
            ours = chunked_linear(_with_cell(divisor), x, w, chunk_rows=4)
            theirs = _with_cell(divisor)(F.linear(x, w))
            for a, b in zip(
                torch.autograd.grad(ours, (x, w)), torch.autograd.grad(theirs, (x, w)), strict=True
            ):
                torch.testing.assert_close(a, b)
    assert len(reports) <= 3
    assert all(report.chunked for report in reports)


def test_many_functions(no_codegen):
    """More than Dynamo would keep for one code object."""
    x, w, _, _ = data()
    namespace = {}
    for i in range(12):
        exec(f"def f{i}(z): return (z * {i}).logsumexp(-1).sum()", namespace)
    with collect() as reports:
        for _ in range(2):
            for i in range(12):
                loss = chunked_linear(namespace[f"f{i}"], x, w)
                torch.testing.assert_close(loss, (F.linear(x, w) * i).logsumexp(-1).sum())
    assert len(reports) == 12


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.tensor(1.3))

    def forward(self, logits, y):
        return cross_entropy(logits / self.temperature, y)


def test_module_as_function(no_codegen):
    """Its parameters get gradients, too."""
    module, (x, w, _, y) = Loss(), data()
    chunked_linear(module, x, w, y, chunk_rows=4).backward()
    got, module.temperature.grad = module.temperature.grad, None
    module(F.linear(x, w), y).backward()
    torch.testing.assert_close(got, module.temperature.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "autochunk"])
def test_inside_of_a_compiled_function(backend):
    def step(x, w, y):
        h = torch.tanh(x)
        return chunked_linear(cross_entropy, h, w, y, chunk_rows=4) * 2

    x, w, _, y = data()
    with collect() as reports:
        loss = torch.compile(step, backend=backend)(x, w, y)
    gradients = torch.autograd.grad(loss, (x, w))
    expected = 2 * cross_entropy(F.linear(torch.tanh(x), w), y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (x, w)))
    assert sum(len(report.chunked) for report in reports) == 1


def test_the_surroundings_stay_compiled():
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def step(x, w, y):
        return chunked_linear(cross_entropy, x.sin(), w, y, chunk_rows=4).cos()

    step(*(data()[i] for i in (0, 1, 3)))
    assert counter.frame_count == 2


def test_autocast_and_no_grad(no_codegen):
    x, w, _, y = data()
    with torch.autocast("cpu", torch.bfloat16):
        ours = chunked_linear(cross_entropy, x, w, y, chunk_rows=4)
        theirs = cross_entropy(F.linear(x, w), y)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert not chunked_linear(cross_entropy, x, w, y).requires_grad


def test_exported():
    assert autochunk.chunked_linear is chunked_linear
