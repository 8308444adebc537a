"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import autochunk.backend
import autochunk.body

KERNELS = os.environ.get("AUTOCHUNK_KERNELS", "")


def pytest_collection_modifyitems(config, items):
    """Of the tests that can run with real kernels, the share that was asked for."""
    if not KERNELS.startswith("real:"):
        return
    turn, shares = map(int, KERNELS.removeprefix("real:").split("/"))
    able = [item for item in items if "no_codegen" in item.fixturenames]
    chosen = set(able[turn % shares :: shares])
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Dynamo remembers compiled code per function; tests must not see each other's."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_codegen(monkeypatch):
    """Runs the compiled graphs op by op: everything of ours is exercised, C++ is not compiled.

    A table of a hundred cases takes a second each this way; what Inductor makes of the graphs is
    tested by the cases marked for it and by the other test files. With AUTOCHUNK_KERNELS=real in
    the environment nothing is replaced, and all of them run with Inductor's kernels;
    AUTOCHUNK_KERNELS=real:3/60 selects every 60th test, beginning with the third.
    """
    if KERNELS.startswith("real"):
        yield
        return

    def outer(gm, example_inputs, config_patches=None):
        return aot_eager(gm, example_inputs)

    def inner(gm, example_inputs):
        def run(args):
            return gm(*args)

        return run

    # Inductor computes decomposed half precision ops in float32 registers; op by op each would
    # round, so they are left whole, as eager has them.
    monkeypatch.setattr(autochunk.body, "select_decomp_table", dict)
    monkeypatch.setattr(autochunk.backend, "compile_fx", outer)
    monkeypatch.setattr(autochunk.body, "compile_fx_inner", inner)
    autochunk.runtime.REGIONS.clear()
    yield
    autochunk.runtime.REGIONS.clear()


@pytest.fixture
def batch():
    """Token ids and labels of two sequences, below 128; one label is ignored."""
    torch.manual_seed(1)
    ids, labels = torch.randint(0, 128, (2, 2, 9))
    labels[0, 3] = -100
    return ids, labels


_outcomes: Counter[str] = Counter()


def _own_outcomes():
    module = sys.modules.get("test_property")
    return dict(module.OUTCOMES) if module is not None else {}


def pytest_sessionfinish(session):
    """A worker of pytest-xdist tells the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["outcomes"] = _own_outcomes()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _outcomes.update(getattr(node, "workeroutput", {}).get("outcomes", {}))


def pytest_terminal_summary(terminalreporter):
    """What became of the generated programs, where they were run."""
    counts = _outcomes + Counter(_own_outcomes())
    if counts:
        each = ", ".join(f"{name} {n}" for name, n in counts.most_common())
        terminalreporter.write_line(
            f"generated programs: {counts.total()} (shrinking included): {each}"
        )
