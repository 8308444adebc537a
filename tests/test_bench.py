"""``autochunk bench``: its figures are right, its failures are rows, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from autochunk.bench import arguments, breaking, measure, methods, suite
from autochunk.bench.cases import Case, Job, Search, Variant
from autochunk.bench.child import short_reason
from autochunk.bench.losses import LOSSES
from autochunk.bench.measure import Plan
from autochunk.bench.memory import is_out_of_memory
from autochunk.bench.methods import METHODS, read_variant, why_not
from autochunk.bench.problems import errors, make
from autochunk.bench.processes import End, run_child
from autochunk.bench.progress import Progress
from autochunk.bench.results import Results, Row
from autochunk.bench.search import FAILED, FITS, TOO_LARGE, Probe, search
from autochunk.bench.summary import dominated, ratio, summarize
from autochunk.bench.tables import results_table
from autochunk.cli import main

needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from Linux's /proc/self"
)
CASE = Case(
    vocabulary=640, tokens=64, hidden=16, dtype="float32", loss="cross_entropy", device="cpu"
)
QUIET = Progress(quiet=True)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Tiny tensors on a busy machine: waiting for a second thread would take most of the time."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def agrees(case, variant):
    problem = make(case)
    reference = problem.reference()
    loss = problem.step(problem.call(variant))
    found = errors(loss, problem.leaves, reference)
    assert max(found.values()) < 2e-6, found


# ---- losses and methods -------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_both_forms_of_a_loss_agree(name):
    problem = make(dataclasses.replace(CASE, loss=name))
    x, w = problem.leaves
    loss = LOSSES[name]
    logits = (x @ w.t()).double()
    whole = loss.whole(logits, *problem.tensors)
    parts = loss.total(loss.per_row(logits, *problem.tensors), *problem.tensors)
    torch.testing.assert_close(whole, parts)
    gradients = [torch.autograd.grad(v, [x, w], retain_graph=True) for v in (whole, parts)]
    torch.testing.assert_close(*gradients)


def test_ratios_of_grpo_are_not_at_the_clipping_bounds():
    problem = make(dataclasses.replace(CASE, loss="grpo", tokens=1024))
    x, w = problem.leaves
    labels, _, old, mask = problem.tensors
    found = torch.exp((x @ w.t()).log_softmax(-1)[torch.arange(1024), labels] - old)
    assert ((found - 0.8).abs() > 0.05).all()
    assert ((found - 1.2).abs() > 0.05).all()
    assert (found < 0.8).any()
    assert (found > 1.2).any()
    assert 0 < mask.mean() < 1


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "method",
    ["eager", "checkpoint:num_chunks=3", "autochunk:min_bytes=0,chunk_rows=16", "chunked_linear"],
)
def test_every_loss(method, name, no_codegen):
    agrees(dataclasses.replace(CASE, loss=name), Variant.split(method))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_is_here(method):
    """With real kernels."""
    reason = why_not(method, "cross_entropy", "cpu")
    if reason:
        pytest.skip(reason)
    agrees(CASE, Variant(method))


def test_variants_do_not_share_compiled_code(no_codegen):
    """Dynamo runs a function eagerly once eight versions of its code have been compiled."""
    from autochunk.report import collect

    problem = make(CASE)
    with collect() as reports:
        for count in range(2, 14):
            text = f"autochunk:min_bytes=0,num_chunks={count}"
            problem.step(problem.call(Variant.split(text)))
    assert len(reports) == 12
    assert all(report.chunked for report in reports)


@pytest.mark.parametrize(
    ("method", "loss", "device", "whole_model", "reason"),
    [
        ("quack", "grpo", "cuda", False, "has no grpo"),
        ("liger", "simpo", "cuda", False, "has no simpo"),
        ("cce", "cross_entropy", "cpu", True, "does not compile models"),
        ("inductor", "cross_entropy", "cpu", True, ""),
        ("checkpoint", "mse", "cpu", False, ""),
    ],
)
def test_why_not(method, loss, device, whole_model, reason):
    assert why_not(method, loss, device, whole_model) == reason


def test_why_not_without_a_package_or_cuda(monkeypatch):
    monkeypatch.setattr(methods, "_is_installed", lambda module: False)
    assert (
        why_not("cce", "cross_entropy", "cuda") == "not installed (pip install cut-cross-entropy)"
    )
    monkeypatch.setattr(methods, "_is_installed", lambda module: True)
    assert why_not("cce", "cross_entropy", "cpu") == "needs CUDA"
    assert why_not("liger", "grpo", "cpu") == ""


def test_variants_are_read():
    text = "autochunk:chunk_rows=64,strategy=recompute"
    variant = read_variant(text)
    assert str(variant) == text
    assert methods.read_options(variant) == {"chunk_rows": 64, "strategy": "recompute"}


# ---- pure functions -----------------------------------------------------------------------------


def fake(largest, tried=None):
    def probe(size):
        if tried is not None:
            tried.append(size)
        return Probe(size, FITS if size <= largest else TOO_LARGE)

    return probe


@pytest.mark.parametrize("largest", [0, 1, 99, 100, 101, 777, 5000, 123456])
@pytest.mark.parametrize("start", [1, 100, 1000, 99999])
def test_search(largest, start):
    tried = []
    found = search(fake(largest, tried), start, granularity=100, maximum=2**20)
    assert found.failure == ""
    assert found.largest == largest // 100 * 100
    assert found.too_large == found.largest + 100
    assert all(size % 100 == 0 and size > 0 for size in tried)
    assert len(tried) == len(set(tried)) < 30
    assert [probe.size for probe in found.probes] == tried


def test_search_without_a_limit():
    found = search(fake(10**9), 10, granularity=10, maximum=999)
    assert (found.largest, found.too_large) == (990, None)


def test_search_ends_at_a_failure():
    def probe(size):
        return Probe(size, FAILED, "ValueError: no") if size > 300 else Probe(size, FITS)

    found = search(probe, 100, granularity=100, maximum=2**20)
    assert (found.largest, found.too_large, found.failure) == (200, None, "at 400: ValueError: no")


def test_pareto():
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 6.0), (3.0, 5.0), (4.0, 1.0), (4.0, 1.0)]
    assert dominated(points) == [None, None, 1, 1, None, None]
    assert dominated([]) == []


def row(method, seconds=(), peak=(), status="measured", **more):
    variant = Variant.split(method)
    return Row(
        CASE, variant, status, seconds=seconds, additional_bytes=peak, total_bytes=peak, **more
    )


def test_summary():
    rows = [
        row("eager", (4.0, 4.0, 40.0), (300, 310), floor_seconds=(1.0, 2.0, 10.0)),
        row("inductor", (2.0, 2.0, 20.0), (200,), floor_seconds=(1.0, 2.0, None)),
        row("autochunk", (3.0, 3.0, 30.0), (50, 40)),
        row("auto_chunker", (5.0, 1.0, 99.0), (60,)),
        row("liger", status="unavailable", reason="needs CUDA"),
    ]
    eager, inductor, ours, chunker, liger = summarize(rows)
    assert [s.is_baseline for s in (eager, inductor, ours)] == [False, True, False]
    assert (ours.median_seconds, ours.least_seconds, ours.most_seconds) == (3.0, 3.0, 30.0)
    assert ours.time_ratio == 1.5  # in every round, however slow the machine was in the last
    assert eager.floor_ratio == 4.0
    assert inductor.floor_ratio == 1.5  # the median of the rounds that have a floor
    assert (ours.additional_bytes, ours.memory_ratio) == (50, 0.25)
    assert (eager.dominated_by, inductor.dominated_by, ours.dominated_by) == ("inductor", "", "")
    assert chunker.dominated_by == "autochunk"
    assert liger.median_seconds is liger.time_ratio is liger.memory_ratio is None


def test_ratio_of_an_interrupted_round():
    assert ratio((2.0, 8.0, 5.0), (1.0, 2.0)) == 3.0
    assert ratio((), (1.0,)) is None


def test_out_of_memory_is_recognised():
    text = "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"
    assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert short_reason(MemoryError()) == "out of memory"
    assert short_reason(ValueError("\nfirst\nsecond")) == "ValueError: first"
    assert len(short_reason(ValueError("x" * 999))) == 200


def test_a_job_travels_as_json():
    job = Job(CASE, (Variant.split("autochunk:chunk_rows=3"),), repeats=4, reference="file")
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_the_suite():
    work = suite.suite()
    shapes = {(case.hidden, case.vocabulary) for case, _ in work}
    assert shapes == {(2048, 128256), (4096, 128256), (2304, 256000), (576, 49152)}
    assert {case.loss for case, _ in work} == {"cross_entropy", "grpo"}
    assert {case.tokens for case, _ in work} == {8192, 16384, 32768}
    assert sum(bool(case.layers) for case, _ in work) == 1
    assert all(case.dtype == "bfloat16" and case.device == "cuda" for case, _ in work)
    for case, variants in suite.shrunk(work):
        assert case.device == "cpu"
        assert case.tokens * case.vocabulary < 2**22
        assert Variant("autochunk", (("min_bytes", "0"), ("num_chunks", "4"))) in variants


# ---- events of child processes ------------------------------------------------------------------


class Children:
    """Stands for ``run_child``: each child says the next list of events and ends in some way."""

    def __init__(self, monkeypatch, *children):
        self.children, self.orders = list(children), []
        monkeypatch.setattr(measure, "run_child", self)

    def __call__(self, order, hear, timeout_seconds, environment, until=None):
        self.orders.append(order)
        events, end = self.children.pop(0)
        for event in events:
            hear(dict(event))
        if isinstance(end, BaseException):
            raise end
        return end


def event(kind, variant=None, **more):
    return {"event": kind, **({"variant": variant} if variant else {}), **more}


def warm(variant):
    return event("warm", variant, loss=1.0, first_seconds=0.5, note="")


TIMES = [
    event("begin", "eager"),
    warm("eager"),
    event("peak", "eager", additional_bytes=7, total_bytes=8),
    event("begin", "checkpoint"),
    warm("checkpoint"),
    event("floor", round=0, seconds=0.5),
    event("begin", "eager"),
    event("time", "eager", round=0, seconds=1.0),
    event("begin", "checkpoint"),
]
SHARED = Plan(repeats=1, shared=True)


def shared(results, plan=SHARED):
    measure.measure([(CASE, [Variant("eager"), Variant("checkpoint")])], plan, results, QUIET)


def test_a_process_that_dies_takes_one_method_along(monkeypatch):
    rest = [
        event("job", number=0),
        event("floor", round=0, seconds=0.5),
        event("time", "eager", round=0, seconds=3.0),
        event("end"),
    ]
    killed = End(False, "the process was ended by SIGKILL", signal=9)
    children = Children(monkeypatch, (TIMES, killed), (rest, End(True)))
    results = Results({}, None)
    shared(results)
    eager, checkpoint = results.of(CASE)
    assert children.orders[1]["jobs"][0]["variants"] == ["eager"]
    assert (eager.status, eager.seconds, eager.own_process) == ("measured", (3.0,), False)
    assert (checkpoint.status, checkpoint.reason) == ("failed", "the process was ended by SIGKILL")
    assert "FAILED: the process was ended by SIGKILL" in results_table(results)


def test_what_was_measured_survives_ctrl_c(monkeypatch, tmp_path, capsys):
    Children(
        monkeypatch,
        (TIMES[:3], End(True)),
        ([*TIMES[:2], *TIMES[5:8]], KeyboardInterrupt()),
    )
    path = tmp_path / "found.json"
    sizes = ["--vocabulary", "640", "--tokens", "64", "--hidden", "16"]
    given = ["bench", *sizes, "--methods", "eager", "liger:chunk_rows=3", "--device", "cpu"]
    monkeypatch.setattr(methods, "_is_installed", lambda module: False)
    status = main([*given, "--no-accuracy", "--json", str(path), "--quiet"])
    assert status == 130
    data = json.loads(path.read_text())
    assert data["finished"] is False
    assert data["command"].startswith("autochunk bench --vocabulary 640")
    assert data["rows"][0]["status"] == "interrupted"
    assert data["rows"][0]["additional_bytes"] == [7]
    assert data["rows"][0]["seconds"] == [1.0]
    assert data["rows"][1]["reason"] == "not installed (pip install liger-kernel)"
    out = capsys.readouterr()
    assert "INTERRUPTED: not all steps were done" in out.out
    assert "interrupted; what was measured before is above" in out.err
    assert list(tmp_path.iterdir()) == [path]


def test_after_the_time_limit_nothing_is_begun(monkeypatch):
    children = Children(monkeypatch)
    results = Results({}, None)
    shared(results, dataclasses.replace(SHARED, deadline=1.0))
    assert children.orders == []
    assert {(r.status, r.reason) for r in results.of(CASE)} == {
        ("not run", "the time limit was reached")
    }


def test_what_the_time_limit_cuts_off_is_not_called_failed(monkeypatch):
    cut = End(False, "no answer", timed_out=True)
    Children(monkeypatch, ([event("job", number=0), event("begin", "eager")], cut))
    results = Results({}, None)
    plan = dataclasses.replace(SHARED, deadline=2e9)
    late = iter([False, True, True])
    monkeypatch.setattr(Plan, "late", property(lambda self: next(late)))
    shared(results, plan)
    assert {r.status for r in results.of(CASE)} == {"not run"}


@pytest.mark.parametrize(
    ("code", "reason", "signal"),
    [
        ("raise ValueError('the reason')", "ValueError: the reason", None),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL, as the kernel does where", 9),
        ("import time; time.sleep(60)", "no answer within 0.5 s", None),
    ],
)
def test_how_a_process_ends(monkeypatch, code, reason, signal):
    start = subprocess.Popen

    def started(command, **options):
        return start([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "Popen", started)
    end = run_child({}, lambda event: None, 0.5 if "sleep" in code else 30.0, {})
    assert not end.complete
    assert reason in end.reason
    assert end.signal == signal
    assert end.timed_out == ("sleep" in code)


def test_sizes_that_are_tried(monkeypatch):
    """Out of memory and a signal are no fit; anything else is a failure."""

    def answer(events, end):
        def run(order, hear, timeout_seconds, environment):
            for found in events:
                hear(found)
            return end

        monkeypatch.setattr(breaking, "run_child", run)
        return breaking.try_size(CASE, Variant("eager"), "tokens", 128, 2**20, 1.0)

    assert answer([event("fits", fits=True, note="")], End(True)).outcome == FITS
    assert answer([event("fits", fits=False, note="")], End(True)).outcome == TOO_LARGE
    assert answer([], End(False, "ended by SIGABRT", signal=6)).outcome == TOO_LARGE
    tried = answer([], End(False, "ImportError: no"))
    assert (tried.outcome, tried.reason) == (FAILED, "ImportError: no")
    assert answer([], End(False, "no answer", timed_out=True, signal=9)).outcome == FAILED


# ---- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--methods autochunc", "--methods autochunc: unknown method 'autochunc' (did you mean"),
        ("--methods autochunk:rows=3", "unknown option of autochunk 'rows'"),
        ("--methods autochunk:chunk_rows=x", "chunk_rows is 'x'; it takes an int"),
        ("--methods autochunk:chunk_rows=0", "chunk_rows is 0; it must be at least 1"),
        ("--methods autochunk:chunk_rows", "'chunk_rows' is not OPTION=VALUE"),
        ("--methods autochunk:strategy=fast", "option 'strategy' is 'fast'; it takes one of"),
        ("--methods autochunk:autotune=maybe", "autotune is 'maybe'; it takes a boolean"),
        ("--methods autochunk:chunk_rows=2,num_chunks=2", "contradict each other"),
        ("--methods eager eager", "--methods eager is there twice"),
        ("--methods eager:chunk_rows=2", "unknown option of eager 'chunk_rows'; valid: none"),
        ("--vocabulary 100 0", "--vocabulary is 0; it must be at least 1"),
        ("--repeats 0", "--repeats is 0; it must be at least 1"),
        ("--timeout 0", "--timeout is 0; it must be above 0"),
        ("--loss focal", "--loss: unknown 'focal'; valid: cross_entropy"),
        ("--dtype int8", "--dtype: unknown 'int8'; valid: bfloat16, float16, float32"),
        ("--loss simpo --tokens 12", "--tokens is 12; simpo needs a multiple of 8"),
        ("--memory-limit 2GiB", "--memory-limit belongs to --breaking-point"),
        ("--largest 9", "--largest belongs to --breaking-point"),
        (
            "--breaking-point tokens --memory-limit 1GiB --largest 100",
            "--largest is 100; it must be at least --granularity 256",
        ),
        ("--breaking-point tokens --device cpu", "on the CPU needs --memory-limit, as 2GiB"),
        (
            "--breaking-point tokens --memory-limit much",
            "--memory-limit is 'much'; it takes a number of bytes",
        ),
        (
            "--breaking-point tokens --memory-limit 2GiB --tokens 3",
            "--tokens is what is searched for; leave it out",
        ),
        ("--suite gpu --device cpu", "--suite gpu needs CUDA; --dry-run tries it"),
        ("--suite gpu --dry-run --hidden 3", "--hidden can't be combined with --suite"),
        ("--dry-run", "--dry-run shrinks a suite; give --suite gpu as well"),
        ("--json /missing/directory/x.json", "its directory is missing or not writable"),
    ],
)
def test_wrong_arguments(capsys, given, message):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *given.split()])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_charts_need_matplotlib(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["bench", "--charts", str(tmp_path / "charts")])
    assert "pip install 'autochunk[bench]'" in capsys.readouterr().err
    assert not (tmp_path / "charts").exists()


def test_list(capsys):
    assert main(["bench", "--list", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*METHODS, *LOSSES))


@needs_proc
def test_end_to_end(tmp_path, capsys):
    path = tmp_path / "found.json"
    given = "--vocabulary 640 --tokens 64 --hidden 16 --device cpu --repeats 2 --warmup 1 --methods"
    tried = ["eager", "autochunk:min_bytes=0,chunk_rows=16", "cce"]
    status = main(["bench", *given.split(), *tried, "--json", str(path)])
    out = capsys.readouterr()
    assert status == 0, "what is not installed is no failure"
    data = json.loads(path.read_text())
    assert data["finished"] is True
    assert data["hardware"]["cores"] == os.cpu_count()
    assert data["versions"]["torch"] == torch.__version__
    eager, ours, cce = data["rows"]
    for found in (eager, ours):
        assert found["status"] == "measured"
        assert len(found["seconds"]) == len(found["floor_seconds"]) == 2
        assert all(0 < b < 64 * 2**20 for b in found["additional_bytes"])
        assert all(b > 100 * 2**20 for b in found["total_bytes"])
        assert set(found["errors"]) == {"loss", "dx", "dw"}
        assert max(found["errors"].values()) < 2e-6
    assert ours["note"] == "fused, 4 × 16 rows"
    assert cce["status"] == "unavailable"
    assert "fastest unchunked" in out.out
    assert "eager" in out.err, "no progress was shown"


@needs_proc
def test_a_real_breaking_point(tmp_path):
    """Eager holds three tensors of the logits' size: here 3 kB a word."""
    results = Results({}, tmp_path / "found.json")
    case = dataclasses.replace(CASE, vocabulary=0, tokens=256)
    wanted = Search("vocabulary", limit_bytes=64 * 2**20, granularity=16384)
    breaking.break_points(
        [(case, [Variant("eager"), Variant("cce")])], wanted, Plan(), results, QUIET
    )
    eager, cce = results.points
    assert eager.found is not None
    assert (eager.found.largest, eager.found.too_large) == (16384, 32768), eager.found
    assert {probe.outcome for probe in eager.found.probes} == {FITS, TOO_LARGE}
    assert cce.found is None
    assert cce.reason
    assert json.loads((tmp_path / "found.json").read_text())["breaking_points"]
    assert "Largest vocabulary within 64 MiB, to within 16384" in results_table(results)
    capped = dataclasses.replace(wanted, largest=16384)
    breaking.break_points([(case, [Variant("eager")])], capped, Plan(), results, QUIET)
    assert "fits; more was not tried" in results_table(results)


@needs_proc
def test_dry_run_of_the_suite(tmp_path, capsys):
    pytest.importorskip("transformers")
    path = tmp_path / "found.json"
    wrong = "linear_cross_entropy:chunking_method=wrong"
    given = f"--suite gpu --dry-run --methods eager checkpoint {wrong} --repeats 1 --warmup 1"
    status = main(["bench", *given.split(), "--quiet", "--json", str(path)])
    assert status == 1, "a method failed"
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 3 * len(suite.suite())
    by_method = {}
    for found in rows:
        by_method.setdefault(found["variant"], []).append(found)
    assert {found["status"] for found in by_method["eager"]} == {"measured"}
    assert {found["status"] for found in by_method["checkpoint"]} == {"measured", "unavailable"}
    assert {found["status"] for found in by_method[wrong]} == {"failed", "unavailable"}
    (model,) = (found for found in by_method["eager"] if found["case"]["layers"])
    assert model["additional_bytes"]
    assert model["floor_seconds"] == [None]
    out = capsys.readouterr().out
    assert "FAILED: ValueError: invalid chunking_method: 'wrong'" in out
    assert "Gemma-2-2B: 128 tokens × 72 hidden × 4000 words" in out
    assert "does not compile models" in out


def test_charts(tmp_path):
    pytest.importorskip("matplotlib")
    from autochunk.bench.charts import write_charts
    from autochunk.bench.results import BreakingPoint
    from autochunk.bench.search import Found

    results = Results({}, None)
    for vocabulary in (1000, 2000):
        case = dataclasses.replace(CASE, vocabulary=vocabulary)
        for n, text in enumerate(["inductor", "autochunk:chunk_rows=8", "autochunk:chunk_rows=16"]):
            found = row(text, (1.0 + n, 2.0 + n), (vocabulary * 9000 // (n + 1),))
            results.rows[case, found.variant] = dataclasses.replace(found, case=case)
    found = Found(4096, 8192, "", ())
    point = BreakingPoint(CASE, Variant("inductor"), "vocabulary", 2**30, 4096, found)
    results.points += [point, dataclasses.replace(point, variant=Variant("autochunk"))]
    written = write_charts(results, tmp_path, pareto=True)
    assert sorted(path.name.split("_64x16")[0] for path in written) == [
        "breaking_point_vocabulary.png",
        "memory_by_vocabulary",
        "pareto",
        "pareto",
        "time_by_vocabulary",
    ]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_importing_autochunk_does_not_import_the_benchmark():
    code = (
        "import autochunk, sys; print([m for m in sys.modules if m.startswith('autochunk.bench')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
