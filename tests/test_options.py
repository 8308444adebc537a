"""Options: what is accepted, what is refused in which words, and what each changes."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import autochunk
from autochunk import OptionError, Options
from autochunk.config import parse_bytes
from autochunk.report import collect

N, H, V = 21, 16, 128
VALID = (
    "accumulate_dtype, autotune, chunk_rows, debug, inductor, memory_budget, min_bytes, "
    "num_chunks, strategy, strict"
)


def loss_of(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_NH, w_VH), y_N)


def data() -> tuple[Tensor, Tensor, Tensor]:
    x_NH, w_VH = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    return x_NH, w_VH, torch.randint(0, V, (N,))


def check(function: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Loss and gradients equal eager's."""
    x_NH, w_VH, _ = inputs
    loss, exact = function(*inputs), loss_of(*inputs)
    torch.testing.assert_close(loss, exact)
    got = torch.autograd.grad(loss, [x_NH, w_VH])
    for g, e in zip(got, torch.autograd.grad(exact, [x_NH, w_VH]), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)
    return loss


# ---- what is accepted ------------------------------------------------------------------------


def test_defaults() -> None:
    parsed = Options.parse()
    assert parsed == Options()
    assert parsed.min_bytes == 32 * 2**20
    assert (parsed.strategy, parsed.strict, parsed.debug) == ("auto", False, None)
    # None stands for an option that is not given.
    assert Options.parse(dict.fromkeys(VALID.split(", "))) == Options()


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ({"chunk_rows": 256}, {"chunk_rows": 256}),
        ({"num_chunks": 4}, {"num_chunks": 4}),
        ({"memory_budget": "256MiB"}, {"memory_budget": 2**28}),
        ({"memory_budget": 1000}, {"memory_budget": 1000}),
        ({"strategy": "recompute"}, {"strategy": "recompute"}),
        ({"accumulate_dtype": "float32"}, {"accumulate_dtype": torch.float32}),
        ({"accumulate_dtype": torch.bfloat16}, {"accumulate_dtype": torch.bfloat16}),
        ({"accumulate_dtype": "auto"}, {"accumulate_dtype": None}),
        ({"min_bytes": 0}, {"min_bytes": 0}),
        ({"min_bytes": "1.5 KiB"}, {"min_bytes": 1536}),
        ({"debug": True}, {"debug": "autochunk_debug"}),
        ({"debug": False}, {"debug": None}),
        ({"debug": "here"}, {"debug": "here"}),
        ({"debug": Path("here")}, {"debug": "here"}),
        ({"strict": True}, {"strict": True}),
        ({"inductor": {"max-autotune": True}}, {"inductor": {"max_autotune": True}}),
        ({"inductor": {"triton.cudagraphs": True}}, {"inductor": {"triton.cudagraphs": True}}),
    ],
    ids=str,
)
def test_accepted(given: dict[str, Any], parsed: dict[str, Any]) -> None:
    before = copy.deepcopy(given)
    assert Options.parse(given) == Options(**parsed)
    assert given == before, "the caller's options are left as they are"
    assert autochunk.options(**given) == given


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("7B", 7), ("2kb", 2000), ("1 MB", 10**6), ("1GiB", 2**30), (" 0.5KiB ", 512)],
)
def test_bytes(text: str, number: int) -> None:
    assert parse_bytes("min_bytes", text) == number


# ---- what is refused -------------------------------------------------------------------------

_BYTES = 'a number of bytes, or a string like "256MiB"'
REFUSED = [
    ({"rows": 4}, f"unknown option 'rows'; valid: {VALID}"),
    ({"chunk_row": 4}, f"unknown option 'chunk_row' (did you mean 'chunk_rows'?); valid: {VALID}"),
    ({7: 4}, f"unknown option 7; valid: {VALID}"),
    ({"chunk_rows": 0}, "option 'chunk_rows' is 0; it takes an int of at least 1"),
    ({"chunk_rows": 4.0}, "option 'chunk_rows' is 4.0; it takes an int of at least 1"),
    ({"num_chunks": True}, "option 'num_chunks' is True; it takes an int of at least 1"),
    ({"num_chunks": "4"}, "option 'num_chunks' is '4'; it takes an int of at least 1"),
    ({"memory_budget": "256 MiBs"}, f"option 'memory_budget' is '256 MiBs'; it takes {_BYTES}"),
    ({"memory_budget": "much"}, f"option 'memory_budget' is 'much'; it takes {_BYTES}"),
    ({"memory_budget": 1.5}, f"option 'memory_budget' is 1.5; it takes {_BYTES}"),
    ({"memory_budget": 0}, "option 'memory_budget' is 0; it takes at least one byte"),
    (
        {"min_bytes": -1},
        "option 'min_bytes' is -1; it takes a number of bytes that is not negative",
    ),
    ({"min_bytes": True}, f"option 'min_bytes' is True; it takes {_BYTES}"),
    (
        {"strategy": "fuse"},
        "option 'strategy' is 'fuse'; it takes one of 'auto', 'fused', 'recompute'",
    ),
    (
        {"accumulate_dtype": "int32"},
        "option 'accumulate_dtype' is 'int32'; it takes one of 'auto', 'float32', 'float64', "
        "'bfloat16', 'float16'",
    ),
    (
        {"accumulate_dtype": torch.int64},
        "option 'accumulate_dtype' is torch.int64; it takes one of 'auto', 'float32', 'float64', "
        "'bfloat16', 'float16'",
    ),
    ({"debug": 1}, "option 'debug' is 1; it takes a bool, or a directory"),
    ({"strict": "yes"}, "option 'strict' is 'yes'; it takes a bool"),
    ({"inductor": True}, "option 'inductor' is True; it takes a dict of Inductor options"),
    (
        {"inductor": {"max_autotun": True}},
        "unknown Inductor option 'max_autotun' (did you mean 'max_autotune'?); valid: ",
    ),
    (
        {"inductor": {"max_autotune": "yes"}},
        "option inductor['max_autotune'] is 'yes'; it takes a value of type bool",
    ),
    (
        {"chunk_rows": 4, "num_chunks": 2},
        "options 'chunk_rows' and 'num_chunks' contradict each other: each decides the chunk "
        "size; give one of them",
    ),
    (
        {"memory_budget": 4, "num_chunks": 2},
        "options 'num_chunks' and 'memory_budget' contradict each other: each decides the chunk "
        "size; give one of them",
    ),
    (
        {"memory_budget": 4, "num_chunks": 2, "chunk_rows": 2},
        "options 'chunk_rows' and 'num_chunks' and 'memory_budget' contradict each other: each "
        "decides the chunk size; give one of them",
    ),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused(given: dict[Any, Any], message: str) -> None:
    with pytest.raises(OptionError) as refused:
        Options.parse(given)
    text = str(refused.value)
    if message.endswith(": "):  # a list follows
        assert text.startswith(f"autochunk: {message}")
    else:
        assert text == f"autochunk: {message}"
    assert isinstance(refused.value, ValueError)


def test_unknown_mode() -> None:
    with pytest.raises(OptionError, match=r"autochunk: unknown mode 'fast'; valid: default, "):
        Options.parse({}, mode="fast")


def test_refused_early() -> None:
    """Where the options are written, not where the compiled function is first called."""
    with pytest.raises(OptionError, match="unknown option 'rows'"):
        autochunk.options(rows=4)
    with pytest.raises(OptionError, match="unknown option 'rows'"):
        autochunk.explain(loss_of, options={"rows": 4})
    with pytest.raises(TypeError, match="the backend is autochunk; remove backend="):
        autochunk.explain(loss_of, backend="inductor")


def test_refused_at_the_first_call() -> None:
    """``torch.compile`` raises it as it is: not wrapped by Dynamo, not made a fallback."""
    function = torch.compile(loss_of, backend="autochunk", options={"chunk_row": 4})
    with pytest.raises(OptionError, match="unknown option 'chunk_row'") as refused:
        function(*data())
    assert type(refused.value) is OptionError
    assert isinstance(refused.value, ValueError)
    again = pickle.loads(pickle.dumps(OptionError("autochunk: no")))
    assert (type(again), str(again)) == (OptionError, "autochunk: no")


# ---- what they change ------------------------------------------------------------------------


def report_of(**options: Any) -> autochunk.Report:
    """Compiles and checks the loss under some options."""
    inputs = data()
    with collect() as reports:
        check(torch.compile(loss_of, backend="autochunk", options=options or None), inputs)
    (report,) = reports
    return report


def test_min_bytes() -> None:
    logits_bytes = N * V * 4
    (row,) = report_of().rows
    assert row.refusal is not None
    assert row.refusal.code == "small"
    assert str(logits_bytes) in row.refusal.detail
    assert report_of(min_bytes=logits_bytes + 1).refused
    assert report_of(min_bytes=logits_bytes).chunked


def test_budget_below_one_row() -> None:
    message = (
        f"one row of logits takes {V * 4} bytes, more than the budget of 100 bytes; the chunks are "
        "single rows, which is slow. Give a memory_budget of many rows"
    )
    with pytest.warns(UserWarning, match=message):
        (row,) = report_of(min_bytes=0, memory_budget=100).chunked
    assert row.chunks == f"{N} × 1"


def test_strategies() -> None:
    (fused,) = report_of(min_bytes=0, strategy="fused").chunked
    (recomputed,) = report_of(min_bytes=0, strategy="recompute").chunked
    assert (fused.strategy, recomputed.strategy) == ("fused", "recompute")
    assert recomputed.notes[0] == "recomputed in the backward pass: asked for"


def test_fused_where_it_is_not_provable() -> None:
    def function(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        nll_N = F.cross_entropy(F.linear(x_NH, w_VH), y_N, reduction="none")
        return F.logsigmoid(nll_N.view(3, 7).sum(1)).mean()  # of whole sequences

    options = {"min_bytes": 0, "strategy": "fused"}
    explanation = autochunk.explain(function, options=options)(*data())
    (row,) = explanation.refused
    assert row.refusal is not None
    assert row.refusal.code == "not-fusable"


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs", "default"])
def test_modes(mode: str) -> None:
    """``torch.compile`` takes a mode or options, not both; a head in chunks needs both here."""
    inputs = data()
    check(torch.compile(loss_of, backend="autochunk", mode=mode), inputs)

    def backend(gm: Any, example_inputs: Any) -> Any:
        options = {"min_bytes": 0, "chunk_rows": 6, "strict": True}
        return autochunk.autochunk(gm, example_inputs, mode=mode, options=options)

    with collect() as reports:
        check(torch.compile(loss_of, backend=backend), inputs)
    assert len(reports[0].chunked) == 1


def test_inductor_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach Inductor for the rest of the graph and for the chunk's kernel, and no further."""
    from autochunk import backend, body

    seen: list[tuple[str, bool]] = []
    outer, inner = backend.compile_fx, body.compile_fx_inner

    def spy_outer(*args: Any, **kwargs: Any) -> Any:
        seen.append(("outer", kwargs["config_patches"]["max_autotune"]))
        return outer(*args, **kwargs)

    def spy_inner(*args: Any, **kwargs: Any) -> Any:
        seen.append(("chunk", torch._inductor.config.max_autotune))
        return inner(*args, **kwargs)

    monkeypatch.setattr(backend, "compile_fx", spy_outer)
    monkeypatch.setattr(body, "compile_fx_inner", spy_inner)
    report_of(min_bytes=0, chunk_rows=6, inductor={"max_autotune": True})
    assert seen == [("chunk", True), ("outer", True)]
    assert torch._inductor.config.max_autotune is False


def test_a_pass_of_the_users_own() -> None:
    """Ours is put around it (see ``donation``); a list of passes, too."""
    seen: list[str] = []

    class Pass(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(self.name)

        def uuid(self) -> str:
            return self.name

    name = "post_grad_custom_post_pass"
    report_of(min_bytes=0, inductor={name: Pass("a")})
    assert set(seen) == {"a"}
    torch._dynamo.reset()
    seen.clear()
    report_of(min_bytes=0, inductor={name: [Pass("b"), Pass("c")]})
    assert seen[:2] == ["b", "c"]


# ---- debug -----------------------------------------------------------------------------------


def test_debug_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One file per stage, named in the order of the stages, and the report in the log."""
    with caplog.at_level(logging.WARNING, logger="autochunk"):
        report = report_of(min_bytes=0, chunk_rows=6, debug=str(tmp_path / "graphs"))
    directory = Path(report.directory)
    assert directory.parent == tmp_path / "graphs"
    assert directory.name.endswith(f"_pid{os.getpid()}")
    names = sorted(path.name for path in directory.iterdir())
    assert names == [
        "0_dynamo.txt",
        "1_lowered.txt",
        "2_region0_body.txt",
        "3_region0_cotangents.txt",
        "4_region0_full_kernel.txt",
        "5_rewritten.txt",
    ]
    texts = {path.name: path.read_text() for path in directory.iterdir()}
    assert "cross_entropy" in texts["0_dynamo.txt"]
    assert "aten.mm.default" in texts["1_lowered.txt"]
    assert "autochunk.fused" in texts["5_rewritten.txt"]
    assert "log_softmax" not in texts["5_rewritten.txt"]
    (record,) = [r for r in caplog.records if r.name == "autochunk"]
    assert "1 head, 1 chunked, 0 left alone" in record.getMessage()
    assert str(directory) in record.getMessage()


@pytest.mark.parametrize(
    ("value", "directory"),
    [("", None), ("0", None), ("1", "autochunk_debug"), ("True", "autochunk_debug"), ("d", "d")],
)
def test_debug_environment(
    value: str, directory: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOCHUNK_DEBUG", value)
    assert Options.parse().debug == directory
    assert Options.parse({"debug": False}).debug is None
    assert Options.parse({"debug": "mine"}).debug == "mine"


# ---- without importing it --------------------------------------------------------------------

SCRIPT = """
import sys, torch
import torch.nn.functional as F
assert "autochunk" in torch.compiler.list_backends()
assert "autochunk" not in sys.modules, "listed without being imported"
def loss_of(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)
x, w = torch.randn(21, 16, requires_grad=True), torch.randn(128, 16, requires_grad=True)
y = torch.randint(0, 128, (21,))
function = torch.compile(
    loss_of, backend="autochunk", options={"min_bytes": 0, "chunk_rows": 6, "strict": True}
)
loss = function(x, w, y)
loss.backward()
assert torch.allclose(loss, loss_of(x, w, y))
assert "autochunk" in sys.modules
"""


def test_by_name_in_another_process(tmp_path: Path) -> None:
    """The entry point is enough; ``AUTOCHUNK_DEBUG`` there writes the report and the graphs."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "AUTOCHUNK_DEBUG": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "1 head, 1 chunked, 0 left alone" in done.stderr
    assert list(tmp_path.glob("autochunk_debug/graph0_pid*/0_dynamo.txt"))
