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

STEPS = int(os.environ.get("AUTOCHUNK_STEPS", "24"))

#: Steps on which an earlier version failed, shrunk.
REGRESSIONS: dict[str, Step] = {}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_earlier_failures(name: str):
    outcome = check(REGRESSIONS[name])
    assert outcome.kind == "right", outcome.detail


def test_drawn_steps():
    """A failure is shrunk, and its message is a program that runs alone."""
    checked = 0
    for seed in itertools.count():
        if checked >= STEPS:
            return
        step = draw(seed)
        outcome = check(step)
        if outcome.is_failure:
            step = shrink(step, outcome)
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
