"""Models of transformers with labels inside: chunked as listed, with eager's loss and gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
from compare import error
from families import FAMILIES, arguments, build

import autochunk

OPTIONS = {"min_bytes": 0, "num_chunks": 3, "strict": True}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_family(family, no_codegen):
    warnings.simplefilter("ignore")
    vocabulary = 2048
    model = build(family, vocabulary)
    ids = torch.randint(4, vocabulary, (2, 24))
    named = arguments(family, model, ids)
    expected = model(**named).loss
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    explained = autochunk.explain(model, options=OPTIONS)(**named)
    explained.result.loss.backward()
    # Blocks have wide layers of their own; those are left alone.
    codes = {row.refusal.code for row in explained.refused} - {"feeds-layer", "small"}
    if family.expect in ("chunked", "deferred"):
        # Behind a graph break the logits enter another graph, and are chunked there.
        strategies = [row.strategy == "deferred" for row in explained.chunked]
        assert strategies == ([True, False] if family.expect == "deferred" else [False])
        assert not codes, str(explained)
    else:
        assert codes == {family.expect}, str(explained)
    assert error(explained.result.loss, expected) < 1e-6
    largest = max(gradient.norm().item() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        # A softmax does not depend on the bias of its keys: that gradient is rounding alone.
        if name in gradients and gradients[name].norm() > 1e-7 * largest:
            assert error(parameter.grad, gradients[name]) < 2e-5, name
