"""Reports: every candidate has a line, and refused ones say why and where."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import autochunk
from autochunk.types import Refusal

N, H, V = 12, 8, 96
OPTIONS = {"min_bytes": 0, "chunk_rows": 5, "strict": True}


def _inputs():
    return (
        torch.randn(N, H, requires_grad=True),
        torch.randn(V, H, requires_grad=True),
        torch.randint(0, V, (N,)),
    )


def _softmax_over_the_batch(x, w, y):
    logits = F.linear(x, w)
    weights = logits.softmax(dim=0)  # this line is in the report
    return F.cross_entropy(logits, y) + weights.amax(-1).sum()


def test_refusal_names_op_and_line(no_codegen):
    explanation = autochunk.explain(_softmax_over_the_batch, OPTIONS)(*_inputs())
    (row,) = explanation.refused
    assert row.refusal.code == "mixes-rows"
    assert row.refusal.op == "softmax"
    assert "weights = logits.softmax(dim=0)  # this line is in the report" in row.refusal.source
    assert row.refusal.source.split(":")[0].endswith("test_explain.py")
    text = str(explanation)
    assert "1 head, 0 chunked, 1 left alone" in text
    assert "softmax" in text
    assert "mixes-rows: An op on the logits mixes rows" in text


def test_chunked_row(no_codegen):
    def loss(x, w, y):
        return F.cross_entropy(F.linear(x, w).float(), y)

    explanation = autochunk.explain(loss, OPTIONS)(*_inputs())
    (row,) = explanation.chunked
    assert (row.strategy, row.chunks) == ("fused", "3 × 4")
    assert row.found == "linear → float → cross_entropy"
    assert row.shape == "12 × 96 float32"
    assert row.logits_bytes == N * V * 4
    assert row.chunk_bytes == 4 * V * 4
    assert "1 head, 1 chunked, 0 left alone" in str(explanation)
    assert explanation.result.shape == ()


def test_every_candidate_has_a_row(no_codegen):
    def loss(x, w, y):
        first = F.cross_entropy(F.linear(x, w), y)
        hidden = F.linear(F.gelu(F.linear(x, w)), torch.ones(V, V))
        return first + hidden.sum() + F.linear(x, w).sort(0).values.logsumexp(-1).sum()

    explanation = autochunk.explain(loss, OPTIONS)(*_inputs())
    assert len(explanation.chunked) == 1
    assert sorted(row.refusal.code for row in explanation.refused) == ["feeds-layer", "mixes-rows"]


def test_head_in_a_checkpointed_block(no_codegen):
    def block(x, w, y):
        return F.cross_entropy(F.linear(x, w), y)

    def loss(x, w, y):
        return torch.utils.checkpoint.checkpoint(block, x, w, y, use_reentrant=False)

    inputs = _inputs()
    explanation = autochunk.explain(loss, OPTIONS)(*inputs)
    (row,) = explanation.refused
    assert row.refusal.code == "higher-order"
    assert "return F.cross_entropy(F.linear(x, w), y)" in row.source
    torch.testing.assert_close(explanation.result, loss(*inputs))


def test_equal_refusals_are_one_line(no_codegen):
    def loss(x, w, y):
        total = 0
        for _ in range(3):
            total = total + F.linear(x, w).softmax(0).amax(-1).sum()
        return total

    explanation = autochunk.explain(loss, OPTIONS)(*_inputs())
    assert len(explanation.refused) == 3
    assert "(×3)" in str(explanation)


def test_recompute_says_why(no_codegen):
    def losses(x, w, y):
        return F.cross_entropy(F.linear(x, w), y, reduction="none")

    explanation = autochunk.explain(losses, OPTIONS)(*_inputs())
    assert (
        "recomputed in the backward pass: its per-row values reach more than one differentiable "
        "output" in str(explanation)
    )


def test_nothing_to_report(no_codegen):
    def plain(x):
        return x.sin().sum()

    explanation = autochunk.explain(plain, OPTIONS)(torch.randn(3))
    assert "no linear in it is wide enough to be a head" in str(explanation)
    assert not explanation.chunked
    assert not explanation.refused


def test_no_graph():
    explanation = autochunk.explain(lambda: 3)()
    assert explanation.result == 3
    assert "Dynamo captured no graph" in str(explanation)


def test_a_backend_cannot_be_given():
    with pytest.raises(TypeError, match="the backend is autochunk; remove backend="):
        autochunk.explain(lambda x: x, backend="inductor")


def test_options_are_checked_at_once():
    with pytest.raises(autochunk.OptionError, match="unknown option 'chunk_row'"):
        autochunk.explain(lambda x: x, {"chunk_row": 3})


def test_debug_logs_and_writes_each_stage(no_codegen, tmp_path, caplog):
    def loss(x, w, y):
        return F.cross_entropy(F.linear(x, w), y)

    with caplog.at_level(logging.WARNING, logger="autochunk"):
        autochunk.explain(loss, {**OPTIONS, "debug": str(tmp_path)})(*_inputs())
    assert "1 head, 1 chunked, 0 left alone" in caplog.text
    (directory,) = tmp_path.iterdir()
    names = sorted(path.name.split("_", 1)[1] for path in directory.iterdir())
    assert names == [
        "dynamo.txt",
        "lowered.txt",
        "region0_body.txt",
        "region0_cotangents.txt",
        "region0_full_kernel.txt",
        "rewritten.txt",
    ]
    assert "autochunk.fused" in next(directory.glob("*rewritten*")).read_text()


def test_a_failed_rewrite_warns_and_runs(no_codegen, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("on purpose")

    def loss(x, w, y):
        return F.cross_entropy(F.linear(x, w), y)

    monkeypatch.setattr(autochunk.backend, "lift_unmerged", broken)
    x, w, y = _inputs()
    options = {"min_bytes": 0}
    with pytest.warns(autochunk.FallbackWarning, match="runs as plain Inductor .*on purpose"):
        explanation = autochunk.explain(loss, options)(x, w, y)
    torch.testing.assert_close(explanation.result, loss(x, w, y))
    assert "The rewrite was given up" in str(explanation)
    with pytest.raises(Exception, match="on purpose"):
        autochunk.explain(loss, {**options, "strict": True})(x, w, y)


def test_refusal_codes_are_checked():
    with pytest.raises(KeyError, match="no refusal code 'nonsense'"):
        Refusal("nonsense", "op", "detail")
