"""Products whose rows and columns are both reduced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import check, run, widened

import autochunk
from autochunk import DeferredTensor

N, M, H = 20, 40, 4
OPTIONS = {"min_bytes": 0, "num_chunks": 3, "strict": True}


def _both(z):
    rows, columns = torch.arange(z.shape[0]), torch.arange(z.shape[1]) % z.shape[0]
    return F.cross_entropy(z, rows) + F.cross_entropy(z.T, columns)


def _scaled_by_random(z):
    return _both(z * F.dropout(z.amax(1, keepdim=True), 0.0))


def _sinkhorn(z):
    """Columns, then rows of the result: neither direction is enough."""
    return (z - z.logsumexp(0)).logsumexp(1).square().sum()


#: Functions of two matrices, and how many products run in chunks.
CHUNKED = {
    "clip": (lambda a, b: _both(a @ b.T), 2),
    "scaled after": (lambda a, b: _both(torch.tanh((a @ b.T) * 3).float()), 2),
    "linear": (lambda a, b: _both(F.linear(a, b)), 2),
    "method t": (lambda a, b: _both(a @ b.t()) + (a @ b.t()).t().softmax(-1).square().sum(), 3),
    "transposed": (lambda a, b: (a @ b.T).T.logsumexp(-1).sum(), 1),
    "returned": (lambda a, b: (lambda z: (_both(z), z))(a @ b.T), 2),
}

REFUSED = {
    "rows after columns": lambda a, b: _sinkhorn(a @ b.T),
    "random": lambda a, b: _scaled_by_random(a @ b.T),
    "columns alone": lambda a, b: (a @ b.T).log_softmax(0)[0].sum(),
    "sorted columns": lambda a, b: (a @ b.T).sort(0).values.logsumexp(1).sum(),
    "with a bias": lambda a, b: _both(F.linear(a, b, b[:, 0])),
    "written to": lambda a, b: _both((a @ b.T).mul_(2)),
}


def _inputs(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(n, H).to(dtype).requires_grad_() for n in (N, M)]


def _run(function):
    found = []

    def explained(*args):
        found.append(autochunk.explain(function, options=OPTIONS)(*args))
        return found[0].result

    inputs = _inputs()
    actual = run(explained, inputs)
    check(actual, run(function, inputs), run(function, widened(inputs)), torch.float32)
    return found[0]


@pytest.mark.parametrize("name", CHUNKED)
def test_twin(name, no_codegen):
    function, products = CHUNKED[name]
    explanation = _run(function)
    assert explanation.refused == ()
    assert len(explanation.chunked) == products, explanation


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, no_codegen):
    explanation = _run(REFUSED[name])
    assert explanation.chunked == ()
    assert [row.refusal.code for row in explanation.refused] == ["mixes-rows"]


def test_report(no_codegen):
    """The report says what it costs."""
    text = " ".join(str(_run(CHUNKED["clip"][0])).split())
    assert "its columns are reduced, too; the product runs once more for them" in text


def test_one_matrix_on_both_sides():
    """Gradients of the product and of its twin meet in one tensor."""

    def similarity(a, b):
        z = a @ a.T + 0 * b.sum()
        return z.t().logsumexp(1).sum() + z.logsumexp(1).square().sum()

    explanation = _run(similarity)
    assert len(explanation.chunked) == 2


def test_bfloat16():
    function = CHUNKED["clip"][0]
    inputs = _inputs(torch.bfloat16)
    compiled = torch.compile(function, backend="autochunk", options=OPTIONS)
    check(
        run(compiled, inputs), run(function, inputs), run(function, widened(inputs)), torch.bfloat16
    )


def test_hugging_face_clip():
    """It returns the logits of both directions, too: they are deferred."""
    transformers = pytest.importorskip("transformers")
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 100, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    ids, pixels = torch.randint(3, 100, (96, 8)), torch.randn(96, 3, 16, 16)
    batch = {"input_ids": ids, "pixel_values": pixels, "return_loss": True}
    results = []
    for function in (model, torch.compile(model, backend="autochunk", options=OPTIONS)):
        model.zero_grad()
        out = function(**batch)
        out.loss.backward()
        # The keys' biases have a gradient of zero, and roundings.
        gradients = [p.grad for n, p in model.named_parameters() if "k_proj.bias" not in n]
        results.append([out.loss.detach(), *gradients, out])
    *ours, returned = results[1]
    *theirs, expected = results[0]
    assert type(returned.logits_per_text) is type(returned.logits_per_image) is DeferredTensor
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(returned.logits_per_image + 0, expected.logits_per_image)
