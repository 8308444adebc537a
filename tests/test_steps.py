"""Whole training steps, drawn at random, against eager and float64; and the ones that once failed.

AUTOCHUNK_STEPS=3000 python -m pytest tests/test_steps.py    the nightly run
python tests/steps.py --steps 3000                           the same, each batch in a process
"""

from __future__ import annotations

import itertools
import os

import pytest
import steps
import torch
from steps import Outcome, Step, check, draw, shrink

STEPS = int(os.environ.get("AUTOCHUNK_STEPS", "36"))
#: A run of the whole suite has time for a few C++ kernels only; the others run op by op.
NIGHTLY = "AUTOCHUNK_STEPS" in os.environ
WITH_KERNELS = 2

#: Steps on which an earlier version failed, shrunk.
REGRESSIONS = {
    # Autograd does not see the write; the head's gradient was 10 % off.
    "logits written to under no_grad": Step(
        forward=(
            "q1 = self.head(x)",
            "z2 = q1.flatten(0, 1)",
            "with torch.no_grad():\n    z2[:, 5] = -3.0",
            "r3 = z2.topk(3, -1).values.sum(-1)",
            "s4 = r3.mean()",
        ),
        loss=("s4",),
        seen=("s4",),
    ),
    # IndexError: slice() cannot be applied to a 0-dim tensor.
    "a stack of rows in inference mode": Step(
        forward=(
            "q1 = self.head(x)",
            "z2 = q1.reshape(-1, V)",
            "z3 = torch.stack([row for row in z2])",
            "s4 = F.cross_entropy(z3, y)",
        ),
        loss=("s4",),
        steps=((12, "inference"),),
    ),
    # Fault U: the row was a copy.
    "a row written to behind a graph break": Step(
        forward=(
            "q3 = self.second(opaque(x))",
            "z4 = q3.reshape(-1, V)",
            "z7 = torch.where(k[:, None], z4, z4)",
            "s9 = z7.mean()",
        ),
        outside=(
            "r10 = F.kl_div(z4.log_softmax(-1), t.softmax(-1), reduction='none').sum(-1)",
            "z7[1].mul_(0.5)",
            "r11 = F.kl_div(z7.log_softmax(-1), t.softmax(-1), reduction='none').sum(-1)",
        ),
        loss=("s9",),
        seen=("r11",),
        unit="step",
        x_grad=False,
    ),
    # Fault A: the logits were deferred without a gradient.
    "a loss outside of a reentrant checkpoint": Step(
        forward=("q1 = self.head(x)", "z2 = q1.reshape(-1, V)"),
        outside=("s3 = F.cross_entropy(z2, y)",),
        loss=("s3",),
        seen=("z2",),
        checkpoint="reentrant",
    ),
    # Fault Y3: derivative for aten::copy is not implemented.
    "a copy of logits in a reentrant checkpoint": Step(
        forward=(
            "q1 = self.head(x)",
            "z2 = q1.reshape(-1, V)",
            "z3 = torch.zeros_like(z2)\nz3[:] = z2",
            "s4 = z2.mean()",
        ),
        loss=("s4",),
        seen=("z3",),
        checkpoint="reentrant",
    ),
    # Fault K: TensorifyScalarRestartAnalysis was taken for a failure.
    "a float in a graph of changing lengths": Step(
        forward=(
            "q1 = self.head(x) / self.temperature.exp()",
            "z2 = q1.flatten(0, 1)",
            "i3 = z2.argmax(-1)",
            "s4 = sum(F.cross_entropy(a, b) for a, b in zip(z2.split(8), y.clamp(min=0).split(8)))",
        ),
        outside=(
            "model.count[i3 % 16] += 1",
            "s5 = x.new_tensor(s4.item())",
            "s6 = s5.clamp(max=5.0)",
        ),
        loss=("s4",),
        seen=("s6",),
        unit="both",
    ),
    # Fault W: the reader of a memory ran before its writer.
    "losses written into fresh memory": Step(
        forward=(
            "q1 = self.head(x)",
            "z2 = q1.flatten(0, 1)",
            "m3 = x.new_zeros(8)",
            "for j, (a, b) in enumerate(zip(z2.split(8), y.clamp(min=0).split(8))):\n"
            "    m3[j % 8] = F.cross_entropy(a, b)",
            "s4 = m3.sum()",
        ),
        loss=("s4",),
        seen=("s4", "m3"),
        steps=((12, "train"), (12, "train")),
    ),
    "a metric written into a buffer and read": Step(
        forward=(
            "q1 = self.head(x)",
            "z2 = q1.flatten(0, 1)",
            "s3 = F.cross_entropy(z2, y)",
            "p4 = self.table[1]",
            "p4[3] = s3.detach()",
            "self.ema.mul_(0.9).add_(s3.detach(), alpha=0.1)",
            "s5 = self.table.sum()",
            "s6 = self.ema * 1.0",
        ),
        loss=("s3",),
        seen=("s5", "s6"),
        unit="step",
        steps=((12, "train"), (12, "train")),
    ),
    # Faults D and U.
    "labels written to between two losses": Step(
        forward=(
            "q1 = self.head(x)",
            "z2 = q1.flatten(0, 1)",
            "r3 = F.cross_entropy(z2, y, reduction='none')",
            "y.masked_fill_(k, 3)",
            "q4 = self.second(x)",
            "z5 = q4.flatten(0, 1)",
        ),
        outside=("s6 = F.cross_entropy(z5, y)",),
        loss=("s6",),
        seen=("r3",),
        unit="both",
    ),
    # What returns its argument keeps its gradients in any mode; they were cut.
    "a cast that does nothing under no_grad": Step(
        forward=(
            "q1 = self.head(x)",
            "z2 = q1.flatten(0, 1)",
            "with torch.no_grad():\n    z3 = up(z2)",
            "s4 = F.cross_entropy(z3, y)",
            "s5 = z2.square().mean()",
        ),
        loss=("s4", "s5"),
    ),
    # Inference tensors do not track version counter.
    "deferred logits that mix rows in inference mode": Step(
        forward=("q1 = self.second(x)", "z2 = q1.reshape(-1, V)", "s3 = self.note * 1.0"),
        outside=("z4 = z2 + z2.softmax(0)", "z5 = z4 - z4.mean(-1, keepdim=True)"),
        loss=("s3",),
        steps=((12, "inference"),),
    ),
    # ValueError: min() arg is an empty sequence.
    "a mean outside of all logits, behind a graph break": Step(
        forward=(
            "q1 = self.second(x)",
            "z2 = q1[:, :-1].flatten(0, 1)",
            "s3 = view.sum()",
            "if s3.item() > -1e9:\n    s4 = s3 * 2.0",
            "s5 = F.binary_cross_entropy_with_logits(z2, t.sigmoid())",
        ),
        outside=("s6 = z2.mean()",),
        loss=("s6",),
        steps=((12, "train"),) * 3,
        shifted=True,
    ),
    # What the backward pass reads was written to: the graph ran as plain Inductor.
    "a buffer that a recomputed region reads and the graph writes": Step(
        forward=(
            "q1 = self.head(x)",
            "z2 = q1.flatten(0, 1)",
            "s3 = z2[0, 0] * 1.0",
            "self.ema.lerp_(s3.detach(), 0.1)",
        ),
        loss=("s3",),
        seen=("s3",),
    ),
    # Found in aten._has_compatible_shallow_copy_type: computed while a compiler's fakes were on.
    "deferred logits behind a graph break in inference mode": Step(
        forward=("q1 = self.head(x)", "z2 = q1.flatten(0, 1)"),
        outside=(
            "z3 = opaque(z2)",
            "s4 = model.hist.sum()",
            "r5 = (1 - z3.sigmoid()).cumprod(-1)[:, :4].sum(-1)",
        ),
        loss=("s4",),
        unit="step",
        steps=((24, "inference"),),
    ),
    # Fault A again: it returns None, which was taken for its argument retain_graph=None.
    "backward of deferred logits": Step(
        forward=("q1 = self.head(x)", "z2 = q1.flatten(0, 1)"),
        outside=("z2.backward(torch.ones_like(z2))", "s3 = self.scale * 1.0"),
        loss=("s3",),
    ),
    # Fault AA: StaleError in the backward pass.
    "logits written to after a loss of their double": Step(
        forward=("q1 = self.head(x)", "z2 = q1.reshape(-1, V)"),
        outside=(
            "z3 = z2 * 1.0",
            "s4 = z3.logsumexp(-1).mean()",
            "z2[:, 5] = -3.0",
        ),
        loss=("s4",),
        seen=("s4",),
    ),
    # Fault AD (with kernels only): the backward pass raised.
    "an element of logits of changing lengths": Step(
        forward=("q1 = self.head(x)", "z2 = q1.reshape(-1, V)"),
        outside=("s4 = z2[0, 0] * 1.0",),
        loss=("s4",),
        seen=("s4",),
        steps=((12, "train"), (16, "train"), (24, "train")),
    ),
    # Fault J.
    "a learned weight of a loss": Step(
        forward=(
            "q1 = self.head(x)",
            "z2 = q1.flatten(0, 1)",
            "s3 = F.cross_entropy(z2, y)",
            "s4 = s3 * torch.exp(-self.logvar[0]) + self.logvar[0]",
        ),
        loss=("s4",),
    ),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_earlier_failures(name: str):
    outcome = check(REGRESSIONS[name], quick=not NIGHTLY)
    assert outcome.kind == "right", outcome.detail


def test_drawn_steps():
    """A failure is shrunk, and its message is a program that runs alone."""
    checked = 0
    for seed in itertools.count():
        if checked >= STEPS:
            return
        step = draw(seed)
        quick = not NIGHTLY and seed >= WITH_KERNELS
        outcome = check(step, quick)
        if outcome.is_failure:
            step = shrink(step, outcome, quick)
            pytest.fail(
                f"seed {seed}: {outcome.cause}\n{outcome.detail}\n{step!r}\n{step.render()}"
            )
        checked += len(step.steps) * step.calls


SIMPLE = Step(
    forward=("q1 = self.head(x)", "z2 = q1.flatten(0, 1)", "s3 = F.cross_entropy(z2, y)"),
    loss=("s3",),
    seen=("s3",),
)


def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch):
    """A gradient that is a thousandth off counts."""
    whole = steps._compiled

    def off(step: Step, backend: str, dtype: torch.dtype):
        played = whole(step, backend, dtype)
        if backend == "autochunk":
            played.left[0]["gradient of head.weight"][0].mul_(1.001)
        return played

    monkeypatch.setattr(steps, "_compiled", off)
    outcome = check(SIMPLE, quick=True)
    assert outcome.kind == "wrong"
    assert outcome.detail.startswith("step 0: gradient of head.weight: error 1.0e-03")


def test_an_error_that_inductor_has_as_well_is_no_failure(monkeypatch: pytest.MonkeyPatch):
    def fails(step: Step, backend: str, dtype: torch.dtype):
        error = "RuntimeError: no" if backend in failing else None
        return steps._Played([], error, "", [])

    monkeypatch.setattr(steps, "_compiled", fails)
    failing = {"autochunk"}
    assert check(SIMPLE, quick=True).kind == "raises"
    failing.add("aot_eager")
    assert check(SIMPLE, quick=True).kind == "inductor"


def test_shrinking_leaves_the_lines_that_matter(monkeypatch: pytest.MonkeyPatch):
    def needs_two_lines(step: Step, quick: bool = False) -> Outcome:
        text = "\n".join((*step.forward, *step.outside))
        bad = "std(-1)" in text and "self.hist[3] =" in text
        return Outcome("wrong" if bad else "right")

    monkeypatch.setattr(steps, "check", needs_two_lines)
    step = Step(
        forward=(
            "h1 = torch.tanh(self.body(x))",
            "q2 = self.head(h1)",
            "z3 = q2.flatten(0, 1)",
            "r4 = z3.std(-1)",
            "r5 = r4 * f",
            "with torch.no_grad():\n    s6 = r5.mean()",
            "self.hist[3] = s6.detach()",
            "s7 = F.cross_entropy(z3, y)",
        ),
        loss=("s7",),
        seen=("r5", "s6", "s7"),
        calls=2,
        steps=((12, "train"), (16, "no_grad")),
        unit="step",
    )
    smallest = shrink(step, Outcome("wrong"))
    assert smallest == Step(
        forward=(
            "q2 = self.head(x)",
            "z3 = q2.flatten(0, 1)",
            "r4 = z3.std(-1)",
            "s6 = r4.mean()",
            "self.hist[3] = s6.detach()",
        ),
        loss=("s6",),
        x_grad=False,
    )


def test_the_program_runs_alone(tmp_path, capsys):
    namespace = {"__name__": "__main__"}
    exec(compile(SIMPLE.render(), "step.py", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "gradient of head.weight" in printed
    assert "!!" not in printed


def test_the_same_seed_draws_the_same_step():
    assert draw(3) == draw(3)
    assert repr(draw(3)) == repr(draw(3))
