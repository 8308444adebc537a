"""Recording and evaluating: what was found by trying the library on what its users do."""

from __future__ import annotations

import types
from collections import Counter
from typing import Any

import gallery
import pytest
import torch
import torch.nn.functional as F
from compare import check, run, widened
from gallery import GALLERY, Sizes
from torch import Tensor, nn

import autochunk
from autochunk import DeferredTensor
from autochunk.report import collect

OPTIONS = {"min_bytes": 0, "num_chunks": 3, "strict": True}


class _Outside:
    """``torch.nn.functional`` with a ``linear`` whose wide results are deferred logits."""

    def __init__(self) -> None:
        self.deferred: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if w.shape[0] < 8 * w.shape[1]:
            return F.linear(x, w, b)
        head = torch.compile(
            lambda *args: F.linear(*args), backend="autochunk", options=OPTIONS, dynamic=False
        )
        logits = head(x, w, b)
        assert type(logits) is DeferredTensor
        self.deferred.append(logits)
        return logits


def _with_linear_outside(function: Any, outside: _Outside) -> Any:
    """The function with another ``F``, in the functions it calls as well."""
    names = {**vars(gallery), "F": outside}
    for name, value in vars(gallery).items():
        if isinstance(value, types.FunctionType) and value.__module__ == "gallery":
            made = types.FunctionType(value.__code__, names, name, value.__defaults__)
            names[name] = made
    return names[function.__name__]


#: Entries of the gallery that compute the logits outside of the compiled function, and why.
COMPUTED = {
    "margin_in_place": "writes to the logits",
    "banned_tokens_in_place": "writes to the logits",
}

_LINEAR = [e for e in GALLERY if e.expect == "chunked" and "linear" in e.function.__code__.co_names]


def _is_computed_outside(function: Any, inputs: list[Any], caplog: Any) -> bool:
    """Whether ``function(F, *inputs)`` computes logits; its numbers are compared."""
    dtype = torch.float32
    caplog.set_level("INFO", logger="autochunk.deferred")
    outside = _Outside()
    actual = run(lambda *args: function(outside, *args), inputs)
    check(
        actual,
        run(lambda *args: function(F, *args), inputs),
        run(lambda *args: function(F, *args), widened(inputs)),
        dtype,
    )
    assert outside.deferred
    return "computes logits" in caplog.text or any(type(z) is Tensor for z in outside.deferred)


@pytest.mark.parametrize("entry", _LINEAR, ids=lambda e: e.name)
def test_fault_I_what_is_chunked_inside_is_chunked_outside(entry, no_codegen, caplog):
    def function(outside, *args):
        return _with_linear_outside(entry.function, outside)(*args)

    inputs = entry.inputs(Sizes(), torch.float32)
    assert _is_computed_outside(function, inputs, caplog) == (entry.name in COMPUTED)


def _signs(t: Tensor) -> Tensor:
    return torch.where(t > 0, 1.0, -1.0).to(t)


#: Functions of logits ``z`` [N, V] and a tensor ``t`` like them; ``y`` [N] are labels.
FUNCTIONS: dict[str, Any] = {
    "bce": lambda z, t, y: F.binary_cross_entropy(z.sigmoid(), t.sigmoid()),
    "bce with logits": lambda z, t, y: F.binary_cross_entropy_with_logits(z, t.sigmoid()),
    "bce with logits and weights": lambda z, t, y: F.binary_cross_entropy_with_logits(
        z, t.sigmoid(), weight=t.abs(), pos_weight=torch.arange(1.0, 129).to(z.dtype)
    ),
    "soft margin": lambda z, t, y: F.soft_margin_loss(z, _signs(t)),
    "multilabel soft margin": lambda z, t, y: F.multilabel_soft_margin_loss(z, (t > 0).to(t)),
    "poisson nll": lambda z, t, y: F.poisson_nll_loss(z, t.exp()),
    "poisson nll, full": lambda z, t, y: F.poisson_nll_loss(z, t.exp(), full=True),
    "hinge embedding": lambda z, t, y: F.hinge_embedding_loss(z, _signs(t)),
    "cosine embedding": lambda z, t, y: F.cosine_embedding_loss(z, t, _signs(y - 64)),
    "margin ranking": lambda z, t, y: F.margin_ranking_loss(z, t, _signs(t), margin=0.1),
    "triplet": lambda z, t, y: F.triplet_margin_loss(z, t, t.roll(1, -1)),
    "triplet with distance": lambda z, t, y: F.triplet_margin_with_distance_loss(
        z, t, t.roll(1, -1)
    ),
    "layer norm": lambda z, t, y: F.layer_norm(z, (128,)).logsumexp(-1).mean(),
    "rms norm": lambda z, t, y: F.rms_norm(z, (128,)).logsumexp(-1).mean(),
    "normalize": lambda z, t, y: F.normalize(z, dim=-1).logsumexp(-1).mean(),
    "pairwise distance": lambda z, t, y: F.pairwise_distance(z, t).mean(),
    "smooth l1": lambda z, t, y: F.smooth_l1_loss(z, t, beta=0.5),
    "leaky relu": lambda z, t, y: F.leaky_relu(z, 0.1).square().mean(),
    "elu": lambda z, t, y: F.elu(z).mean(),
    "mish": lambda z, t, y: F.mish(z).mean(),
    "glu": lambda z, t, y: F.glu(z).square().mean(),
    "tanhshrink": lambda z, t, y: F.tanhshrink(z).mean(),
    "vector norm": lambda z, t, y: torch.linalg.vector_norm(z, dim=-1).mean(),
    "linalg.norm": lambda z, t, y: torch.linalg.norm(z, dim=-1).mean(),
    "logit": lambda z, t, y: z.sigmoid().logit(1e-3).mean(),
    "lerp": lambda z, t, y: torch.lerp(z, t, 0.3).logsumexp(-1).mean(),
    "addcmul": lambda z, t, y: torch.addcmul(t, z, t, value=0.2).logsumexp(-1).mean(),
    "special.log_softmax": lambda z, t, y: (
        torch.special.log_softmax(z, -1).gather(-1, y[:, None]).mean()
    ),
    "mT": lambda z, t, y: z.mT.logsumexp(0).mean(),
    "cumulative maximum": lambda z, t, y: z.cummax(-1).values.mean(),
    "sorted": lambda z, t, y: torch.sort(z, descending=True)[0].mul(t).mean(),
    "parts": lambda z, t, y: sum(p.logsumexp(-1).mean() for p in z.tensor_split(3)),
    "float16 and back": lambda z, t, y: z.double().logsumexp(-1).to(z.dtype).mean(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fault_I_functions_that_no_list_named(name, no_codegen, caplog):
    loss = FUNCTIONS[name]
    torch.manual_seed(0)
    x, w = torch.randn(18, 8, requires_grad=True), torch.randn(128, 8, requires_grad=True)
    t, y = torch.randn(18, 128), torch.randint(128, (18,))

    def function(functional, x, w):
        return loss(functional.linear(x, w), t.to(x.dtype), y)

    with collect() as reports:
        inside = torch.compile(lambda x, w: function(F, x, w), backend="autochunk", options=OPTIONS)
        inside(x, w)
    assert reports[0].chunked, str(reports[0])
    assert not _is_computed_outside(function, [x, w], caplog)


@pytest.mark.parametrize(
    "use",
    [
        lambda z: F.dropout(z, 0.5).logsumexp(-1),
        lambda z: torch.bernoulli(z.sigmoid()).sum(-1),
        lambda z: torch.multinomial(z.softmax(-1), 2),
        lambda z: F.rrelu(z, training=True).sum(-1),
        lambda z: torch.relu_(z).sum(-1),
        lambda z: z.nonzero(),
        lambda z: torch.equal(z, z),
        lambda z: F.hardswish(z).mean(),
        lambda z: torch.fft.rfft(z).abs().amax(-1),
        lambda z: torch.linalg.svdvals(z),
        lambda z: F.batch_norm(z, None, None, training=True).sum(-1),
    ],
)
def test_fault_I_what_must_not_be_recorded_is_computed(use, no_codegen):
    """Random numbers are drawn once and in order, writes are seen, what has no rule is eager's."""
    x, w = torch.randn(18, 8), torch.randn(128, 8)
    head = torch.compile(lambda x, w: F.linear(x, w), backend="autochunk", options=OPTIONS)
    results = []
    for function in (F.linear, head):
        torch.manual_seed(3)
        z = function(x, w)
        results.append([use(z), torch.rand(1)])
    torch.testing.assert_close(results[1], results[0])
    assert type(z) is Tensor


class Model(nn.Module):
    """Returns logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(128, 8)
        self.head = nn.Linear(8, 128)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def _loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.view(-1, 128), y.view(-1))


def _compare(model: Model, function: Any, loss: Any, ids: Tensor) -> Tensor:
    """The deferred logits, the loss of which is compared with eager's, with its gradients."""
    results = []
    for call in (model, function):
        model.zero_grad()
        logits = call(ids)
        value = loss(logits, ids)
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0])
    return logits


STANCES = ["fail_on_recompile", "eager_on_recompile", "force_eager"]


@pytest.mark.parametrize("stance", STANCES)
def test_fault_F_a_metric_of_a_new_kind_under_a_stance(stance, no_codegen, caplog):
    """What is compiled already runs (but for force_eager), what is not computes the logits."""
    caplog.set_level("INFO", logger="autochunk.deferred")
    model, ids = Model(), torch.randint(128, (2, 9))
    step = torch.compile(model, backend="autochunk", options=OPTIONS)
    _compare(model, step, _loss, ids)
    with collect() as reports, torch.compiler.set_stance(stance):
        logits = _compare(model, step, _loss, ids)
        assert (type(logits) is DeferredTensor) == (stance != "force_eager")
        metric = _compare(model, step, lambda z, y: z.logsumexp(-1).mean(), ids)
    assert type(metric) is Tensor
    assert not reports
    if stance != "force_eager":
        assert f"cannot be chunked: the stance is {stance}, and it is not compiled yet" in (
            caplog.text
        )
    logits = _compare(model, step, lambda z, y: z.logsumexp(-1).mean(), ids)
    assert type(logits) is DeferredTensor


def test_fault_F_logits_made_before_the_stance(no_codegen):
    model, ids = Model(), torch.randint(128, (2, 9))
    step = torch.compile(model, backend="autochunk", options=OPTIONS)
    for stance in STANCES:
        logits = step(ids)
        with torch.compiler.set_stance(stance):
            torch.testing.assert_close(_loss(logits, ids), _loss(model(ids), ids))
        assert type(logits) is Tensor


@pytest.mark.parametrize("stance", STANCES)
def test_fault_F_a_second_function_under_a_stance(stance, no_codegen):
    """Compiled for one model's logits, called with another's: Inductor would not compile again."""
    first, other, ids = Model(), Model(), torch.randint(128, (2, 9))
    nn.init.normal_(other.head.bias)
    heads = [torch.compile(m, backend="autochunk", options=OPTIONS) for m in (first, other)]
    second = torch.compile(lambda z, y: _loss(z, y), backend="autochunk", options=OPTIONS)
    second(heads[0](ids), ids)
    logits = heads[1](ids)
    with torch.compiler.set_stance(stance):
        torch.testing.assert_close(second(logits, ids), _loss(other(ids), ids))


def test_fault_F_eager_then_compile(no_codegen):
    """The first call is eager's; from the second on the logits are deferred, the loss chunked."""
    model, ids = Model(), torch.randint(128, (2, 9))
    step = torch.compile(model, backend="autochunk", options=OPTIONS)
    found = []
    with torch.compiler.set_stance("eager_then_compile"):
        for length in (9, 8, 7, 6):
            with collect() as reports:
                logits = _compare(model, step, _loss, ids[:, :length].contiguous())
            found.append((type(logits), len(reports)))
    assert found == [(Tensor, 0), (DeferredTensor, 2), (DeferredTensor, 0), (DeferredTensor, 0)]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("where", ["plain", "temperature", "mask", "second function"])
def test_fault_H_lengths_vary(where, dynamic, no_codegen):
    """A loss is compiled once for each graph of the model: static, and for all lengths."""
    second = torch.compile(
        lambda z, y: _loss(z, y), backend="autochunk", options=OPTIONS, dynamic=dynamic
    )
    loss = {
        "plain": _loss,
        "temperature": lambda z, y: _loss(z / (1 + 0.1 * y.shape[1]), y),
        "mask": lambda z, y: F.cross_entropy(z[y > 20], y[y > 20]),
        "second function": second,
    }[where]
    model = Model()
    step = torch.compile(model, backend="autochunk", options=OPTIONS, dynamic=dynamic)
    counts = []
    for length in (9, 11, 14, 6):
        with collect() as reports:
            _compare(model, step, loss, torch.randint(128, (3, length)))
        counts.append(len([r for r in reports if r.chunked]))
    first = [2, 2] if dynamic is None else [2, 0]
    assert counts == [*first, 0, 0]


@pytest.fixture
def compilations(no_codegen, monkeypatch):
    """How often Inductor is called: for graphs, and for the kernels of regions."""
    counts = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    graphs, kernels = autochunk.backend.compile_fx, autochunk.body.compile_fx_inner
    monkeypatch.setattr(autochunk.backend, "compile_fx", counted("graphs", graphs))
    monkeypatch.setattr(autochunk.body, "compile_fx_inner", counted("kernels", kernels))
    return counts


def _evaluate(function: Any, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        z = function(ids)
        loss = F.cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return [loss, (z.argmax(-1) == ids).float().mean(), z.logsumexp(-1)]


@pytest.mark.parametrize("few", [True, False])
def test_fault_Z4_an_evaluation_compiles_kernels_only(few, compilations, monkeypatch):
    """The model is one compilation; of a metric the region is one, and none if it is small."""
    if not few:
        monkeypatch.setattr(autochunk.interpret, "FEW_BYTES", 0)
    model = Model().eval()
    step = torch.compile(model, backend="autochunk", options=OPTIONS)
    found = []
    for batch in (4, 4, 4, 3):
        ids = torch.randint(128, (batch, 9))
        torch.testing.assert_close(_evaluate(step, ids), _evaluate(model, ids))
        found.append((compilations["graphs"], compilations["kernels"]))
    assert found[:3] == [(1, 0 if few else 3)] * 3
    assert found[3] == (2, 3 if few else 6)


def test_fault_Z4_the_next_token_of_each_sequence(compilations):
    model = Model().eval()
    step = torch.compile(model, backend="autochunk", options=OPTIONS)
    with torch.no_grad():
        for length in (9, 10, 11):
            ids = torch.randint(128, (4, length))
            chosen = step(ids)[:, -1, :].float().argmax(-1)
            assert torch.equal(chosen, model(ids)[:, -1, :].argmax(-1))
    assert compilations == {"graphs": 2}


def test_fault_Z4_what_is_wide_outside_is_inductor_s(compilations):
    """A one-hot tensor of labels would be there as a whole, op by op."""
    model, ids = Model().eval(), torch.randint(128, (2, 9))
    step = torch.compile(model, backend="autochunk", options=OPTIONS)
    second = torch.compile(
        lambda z, y: (z * F.one_hot(y, 128)).sum(-1).mean(), backend="autochunk", options=OPTIONS
    )
    with torch.no_grad():
        torch.testing.assert_close(
            second(step(ids), ids), (model(ids) * F.one_hot(ids, 128)).sum(-1).mean()
        )
    assert compilations["graphs"] == 2


def test_fault_Z4_training_is_compiled(compilations):
    model, ids = Model(), torch.randint(128, (2, 9))
    step = torch.compile(model, backend="autochunk", options=OPTIONS)
    _compare(model, step, _loss, ids)
    assert compilations == {"graphs": 2, "kernels": 1}


def _strategies(reports: list[Any]) -> list[str]:
    return [row.strategy for report in reports for row in report.chunked]


def test_fault_Z2_gradients_that_nobody_asks_for(no_codegen):
    """After a loss that was dropped the next is a value alone; its backward pass is still right."""
    model, ids = Model(), torch.randint(128, (2, 9))
    step = torch.compile(model, backend="autochunk", options=OPTIONS)
    expected = _loss(model(ids), ids).item()
    with collect() as reports:
        assert _loss(step(ids), ids).item() == pytest.approx(expected)
        assert _strategies(reports) == ["deferred", "fused"]
        for _ in range(3):
            assert _loss(step(ids), ids).item() == pytest.approx(expected)
        assert _strategies(reports) == ["deferred", "fused", "forward"]
        logits = step(ids)
        use = next(iter(logits._formula.compiler.made.values())).use
        assert use.later == (True,)
        _compare(model, step, _loss, ids)
        assert use.later is None
        _compare(model, step, _loss, ids)
    assert use.later is None
    assert _strategies(reports) == ["deferred", "fused", "forward"]


@torch._functorch.config.patch(donated_buffer=False)
def test_fault_Z2_a_backward_pass_of_a_value_alone(no_codegen):
    """Retained, repeated, with respect to the logits, with a second result without gradients."""
    model, ids = Model(), torch.randint(128, (2, 9))
    step = torch.compile(model, backend="autochunk", options=OPTIONS)
    second = torch.compile(
        lambda z, y: (_loss(z, y), z.detach().amax(-1).sum()), backend="autochunk", options=OPTIONS
    )
    both = lambda z, y: (_loss(z, y), z.detach().amax(-1).sum())  # noqa: E731
    for _ in range(2):
        second(step(ids), ids)
    results = []
    for function, loss in ((model, both), (step, second)):
        model.zero_grad()
        logits = function(ids)
        value, largest = loss(logits, ids)
        assert not largest.requires_grad
        value.backward(retain_graph=True)
        (3 * value).backward(retain_graph=True)
        (by_logits,) = torch.autograd.grad(value, logits)
        results.append([value.detach(), largest, by_logits, *(p.grad for p in model.parameters())])
        results[-1] = [t.clone() for t in results[-1]]
    torch.testing.assert_close(results[1], results[0])


def test_fault_Z2_weights_modified_before_the_backward_pass(no_codegen):
    model, ids = Model(), torch.randint(128, (2, 9))
    step = torch.compile(model, backend="autochunk", options=OPTIONS)
    for _ in range(2):
        _loss(step(ids), ids)
    value = _loss(step(ids), ids)
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("when", ["value", "backward"])
def test_fault_Z2_under_a_stance(when, no_codegen):
    """Code with gradients is there, and code for the value alone may not be compiled any more."""
    model, ids = Model(), torch.randint(128, (2, 9))
    step = torch.compile(model, backend="autochunk", options=OPTIONS)
    for _ in range(1 if when == "value" else 3):
        _loss(step(ids), ids).item()
    with collect() as reports, torch.compiler.set_stance("fail_on_recompile"):
        _compare(model, step, _loss, ids)
    assert not reports
