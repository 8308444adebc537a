"""The share of the op-by-op tests that runs with Inductor's kernels: one a day, all in turn."""

from __future__ import annotations

import datetime

import conftest
import pytest

import autochunk.backend

IDS = [f"tests/test_rules.py::test_rule[{n}]" for n in range(400)]


def test_shares_are_disjoint_and_complete():
    shares = [{i for i in IDS if conftest.has_kernels(i, f"{k}/40")} for k in range(40)]
    assert sum(map(len, shares)) == len(set.union(*shares)) == len(IDS)
    assert max(map(len, shares)) < 3 * len(IDS) / 40


def test_every_share_has_its_day():
    first = datetime.date(2026, 11, 28)
    days = [conftest.kernels_of_the_day(first + datetime.timedelta(d)) for d in range(80)]
    assert sorted(days) == sorted(f"{k}/80" for k in range(80))


def test_a_share_is_the_same_from_any_folder():
    for node_id in IDS:
        inside = node_id.removeprefix("tests/")
        assert conftest.has_kernels(node_id, "3/40") == conftest.has_kernels(inside, "3/40")


def test_all_none_and_other_files():
    assert conftest.has_kernels("tests/test_explain.py::test_a", "real")
    assert not conftest.has_kernels("tests/test_explain.py::test_a", "0/1")
    assert conftest.has_kernels("tests/test_cases.py::test_a", "0/1")
    assert not conftest.has_kernels("tests/test_cases.py::test_a", "none")


@pytest.mark.parametrize("text", ["some", "3", "40/40", "-1/40", "1/0", ""])
def test_other_values_are_an_error(text):
    with pytest.raises(pytest.UsageError) as error:
        conftest.has_kernels(IDS[0], text)
    assert str(error.value) == f"AUTOCHUNK_KERNELS is {text!r}; it takes 'real', 'none' or '3/80'"


def test_the_fixture_follows(monkeypatch, request):
    """The fixture replaces Inductor, or leaves it."""
    inductor = autochunk.backend.compile_fx
    monkeypatch.setenv(conftest.KERNELS, "real")
    request.getfixturevalue("no_codegen")
    assert autochunk.backend.compile_fx is inductor


def test_the_fixture_replaces_inductor_elsewhere(monkeypatch, request):
    inductor = autochunk.backend.compile_fx
    monkeypatch.setenv(conftest.KERNELS, "none")
    request.getfixturevalue("no_codegen")
    assert autochunk.backend.compile_fx is not inductor


@pytest.mark.parametrize("given", [None, "7/40"])
def test_the_header_names_the_share(given, monkeypatch):
    """A share that is given stays, otherwise it is the day's."""
    monkeypatch.delenv(conftest.KERNELS)
    if given:
        monkeypatch.setenv(conftest.KERNELS, given)
    conftest.pytest_configure(None)
    expected = given or conftest.kernels_of_the_day(datetime.date.today())
    assert conftest.pytest_report_header(None) == f"AUTOCHUNK_KERNELS={expected}"
