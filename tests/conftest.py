"""Fixtures shared by all tests, and which of them run with Inductor's kernels.

The tests of ``OP_BY_OP`` run their graphs op by op (the fixture ``no_codegen``), but for a share of
them, another one each day, that has Inductor's kernels. The header of pytest's report names it:

    AUTOCHUNK_KERNELS=3/80    repeats the share of a day: the third (from 0) of 80
    AUTOCHUNK_KERNELS=real    all of them, and the other tests with the fixture
    AUTOCHUNK_KERNELS=none    none of them
"""

from __future__ import annotations

import datetime
import os
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import autochunk.backend
import autochunk.body

KERNELS = "AUTOCHUNK_KERNELS"
SHARES = 80
#: Not tests/test_property.py: each of its tests is dozens of programs, minutes with kernels.
OP_BY_OP = ("test_rules.py", "test_cases.py", "test_gallery.py", "test_writes.py")


def kernels_of_the_day(today: datetime.date) -> str:
    """``"3/80"``: the share that runs with Inductor's kernels on this day."""
    return f"{today.toordinal() % SHARES}/{SHARES}"


def has_kernels(node_id: str, kernels: str) -> bool:
    """Whether a test runs with Inductor's kernels.

    Args:
        node_id: Of pytest, such as ``"tests/test_rules.py::test_rule[exp]"``.
        kernels: ``"real"``, ``"none"`` or ``"3/80"``.

    Raises:
        pytest.UsageError: If ``kernels`` is none of these.
    """
    if kernels in ("real", "none"):
        return kernels == "real"
    share, _, shares = kernels.partition("/")
    if not (share.isdecimal() and shares.isdecimal() and int(share) < int(shares)):
        raise pytest.UsageError(f"{KERNELS} is {kernels!r}; it takes 'real', 'none' or '3/80'")
    path, _, name = node_id.partition("::")
    file = Path(path).name
    if file not in OP_BY_OP:
        return False
    # Without the folder: the same share wherever pytest was started.
    return zlib.crc32(f"{file}::{name}".encode()) % int(shares) == int(share)


def pytest_configure(config):
    """Workers of pytest-xdist inherit the share, also past midnight."""
    has_kernels("", os.environ.setdefault(KERNELS, kernels_of_the_day(datetime.date.today())))


def pytest_report_header(config):
    return f"{KERNELS}={os.environ[KERNELS]}"


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Dynamo remembers compiled code per function; tests must not see each other's."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_codegen(monkeypatch, request):
    """Runs the compiled graphs op by op: everything of ours is exercised, C++ is not compiled.

    A table of a hundred cases takes a second each this way; what Inductor makes of the graphs is
    tested by the cases marked for it, by the other test files and by a share of these tests that
    changes from day to day (AUTOCHUNK_KERNELS, above), for which nothing is replaced.
    """
    if has_kernels(request.node.nodeid, os.environ[KERNELS]):
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
