"""The compiler's caches: the same results from a cold and a warm one, never another graph's.

Three processes share a cache directory. The first compiles with donated buffers and calls each
backward pass once, the second does the same again, the third switches donation off and calls each
backward pass three times. Each does so with and without ``autochunk/donation.py``.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from autochunk import backend, runtime

N, H, V = 21, 16, 128
OPTIONS: dict[str, Any] = {"min_bytes": 0, "chunk_rows": 6, "strict": True}

SCRIPT = '''
"""Runs each case in this process and prints what came out of it, as JSON."""
import hashlib, json, sys
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch._dynamo.utils import counters
import autochunk.backend

retain = sys.argv[1] == "retain"
torch._functorch.config.donated_buffer = not retain
aware = autochunk.backend.donation_aware

def loss_of(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)

def returning(x, w, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits, y), logits

def case(function, donation=aware, **options):
    torch._dynamo.reset()
    counters.clear()
    autochunk.backend.donation_aware = donation
    dynamic = options.pop("dynamic", None)
    options = {"min_bytes": 0, "chunk_rows": 6, "strict": True, **options}
    compiled = torch.compile(function, backend="autochunk", options=options, dynamic=dynamic)
    torch.manual_seed(0)
    x, w = torch.randn(21, 16, requires_grad=True), torch.randn(128, 16, requires_grad=True)
    y = torch.randint(0, 128, (21,))
    result = compiled(x, w, y)
    loss = result[0] if isinstance(result, tuple) else result
    exact = torch.autograd.grad(loss_of(x, w, y), [x, w], torch.tensor(3.0))
    errors = []
    for _ in range(3 if retain else 1):
        x.grad = w.grad = None
        loss.backward(torch.tensor(3.0), retain_graph=retain)
        pairs = zip((x.grad, w.grad), exact)
        errors.append(max(float((g - e).norm() / e.norm()) for g, e in pairs))
    values = [loss, x.grad, w.grad]
    if isinstance(result, tuple):
        values.append(result[1].materialize())
        errors.append(float((result[1] - F.linear(x, w)).abs().max()))
    blob = b"".join(v.detach().contiguous().numpy().tobytes() for v in values)
    return {
        "digest": hashlib.sha256(blob).hexdigest(),
        "errors": errors,
        "aot": dict(counters["aot_autograd"]),
        "fx": {k: v for k, v in counters["inductor"].items() if k.startswith("fxgraph_cache")},
    }

def unaware(patches):
    return dict(patches)

results = {
    "fused": case(loss_of, strategy="fused"),
    "recompute": case(loss_of, strategy="recompute"),
    "unaware fused": case(loss_of, unaware, strategy="fused"),
    "unaware recompute": case(loss_of, unaware, strategy="recompute"),
}
if not retain:
    results["dynamic"] = case(loss_of, dynamic=True)
    results["logits"] = case(returning)
print(json.dumps(results))
'''


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the three processes found, by name."""
    directory = tmp_path_factory.mktemp("caches")
    script = directory / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(directory / "cache")}
    found = {}
    for name, argument in (("cold", "once"), ("warm", "once"), ("retaining", "retain")):
        done = subprocess.run(
            [sys.executable, str(script), argument],
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


CASES = ["fused", "recompute", "dynamic", "logits"]


@pytest.mark.parametrize("case", CASES)
def test_cold_and_warm(processes: dict[str, dict[str, Any]], case: str) -> None:
    """AOTAutograd's cache is hit although our ops are in the graph, to the same last bit."""
    cold, warm = processes["cold"][case], processes["warm"][case]
    assert cold["aot"]["autograd_cache_miss"] == 1
    assert "autograd_cache_bypass" not in cold["aot"]
    assert warm["aot"]["autograd_cache_hit"] == 1
    assert "autograd_cache_miss" not in warm["aot"]
    # The chunk's kernels come from Inductor's cache.
    assert "fxgraph_cache_miss" not in warm["fx"]
    assert max(cold["errors"] + warm["errors"]) < 1e-6
    assert cold["digest"] == warm["digest"]


@pytest.mark.parametrize("case", ["fused", "recompute"])
def test_a_donating_backward_is_not_reused(processes: dict[str, dict[str, Any]], case: str) -> None:
    """The third process found two graphs in the caches, and not the backward that overwrites."""
    found = processes["retaining"][case]
    assert found["fx"]["fxgraph_cache_hit"] >= 1, "it shares a cache with the others"
    assert found["fx"]["fxgraph_cache_miss"] >= 1
    assert max(found["errors"]) < 1e-6


@pytest.mark.parametrize("case", ["unaware fused", "unaware recompute"])
def test_without_our_pass_it_is_reused(processes: dict[str, dict[str, Any]], case: str) -> None:
    """What ``donation.py`` is for: if this is skipped, it may not be needed any more."""
    found = processes["retaining"][case]
    assert found["errors"][0] < 1e-6
    if max(found["errors"]) < 1e-6:
        pytest.skip("this PyTorch's cache key names the donated inputs: remove donation.py")
    assert "fxgraph_cache_miss" not in found["fx"]


# ---- what the key of a region covers ---------------------------------------------------------


@pytest.fixture
def own_cache() -> Iterator[None]:
    with fresh_cache():
        yield


def run(function: Callable[..., Tensor], **options: Any) -> dict[str, int]:
    """Compiles from the caches, compares with eager, and returns AOTAutograd's counters."""
    torch._dynamo.reset()
    counters.clear()
    runtime.REGIONS.clear()
    x_NH, w_VH = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    y_N = torch.randint(0, V, (N,))
    compiled = torch.compile(function, backend="autochunk", options={**OPTIONS, **options})
    loss, exact = compiled(x_NH, w_VH, y_N), function(x_NH, w_VH, y_N)
    torch.testing.assert_close(loss, exact)
    got = torch.autograd.grad(loss, [x_NH, w_VH])
    for g, e in zip(got, torch.autograd.grad(exact, [x_NH, w_VH]), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)
    return dict(counters["aot_autograd"])


def scaled(scale: float, smoothing: float) -> Callable[..., Tensor]:
    """One function's code with other numbers inside: only the region's body tells them apart."""

    def function(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        logits_NV = F.linear(x_NH, w_VH) * scale
        return F.cross_entropy(logits_NV, y_N, label_smoothing=smoothing)

    return function


def test_other_numbers_inside_are_another_entry(own_cache: None) -> None:
    base = scaled(0.5, 0.1)
    assert run(base)["autograd_cache_miss"] == 1
    assert run(base)["autograd_cache_hit"] == 1
    for other in (scaled(0.25, 0.1), scaled(0.5, 0.2)):
        assert "autograd_cache_hit" not in run(other)
    assert "autograd_cache_hit" not in run(base, chunk_rows=7)
    assert run(base)["autograd_cache_hit"] == 1


def test_the_key_covers_every_field(no_codegen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field of the kernel's spec that the key forgot would be served from another's cache."""
    seen: list[Any] = []
    key_of = backend._key

    def spy(*args: Any) -> str:
        seen.append(args)
        return key_of(*args)

    monkeypatch.setattr(backend, "_key", spy)
    run(scaled(0.5, 0.1))
    spec, plan, region = seen[0]
    key = key_of(spec, plan, region)
    other_body = torch.fx.symbolic_trace(lambda a, b, c: (a, b, c))
    changes: dict[str, Any] = {
        "body": other_body,
        "rows": spec.rows[:1],
        "shared": (dataclasses.replace(spec.shared[0], strides=(1, V)),),
        "outputs": (),
        "row_grads": (),
        "shared_grads": (),
        "grad_outputs": (),
        "chunk_rows": 7,
        "symbolic": not spec.symbolic,
        "checked": not spec.checked,
        "inductor": {"max_autotune": True},
    }
    assert set(changes) == {field.name for field in dataclasses.fields(spec)}
    keys = {key_of(dataclasses.replace(spec, **{k: v}), plan, region) for k, v in changes.items()}
    for decided in (
        dataclasses.replace(plan, strategy="forward"),
        dataclasses.replace(plan, accumulate_dtype=torch.float64),
    ):
        keys.add(key_of(spec, decided, region))
    (check,) = region.checks
    for field, value in (("size", 1), ("wraps", not check.wraps), ("row_inputs", ())):
        changed = dataclasses.replace(check, **{field: value})
        keys.add(key_of(spec, plan, dataclasses.replace(region, checks=(changed,))))
    monkeypatch.setattr(backend, "__version__", "another")
    keys.add(key_of(spec, plan, region))
    assert key not in keys
    assert len(keys) == len(changes) + 2 + 3 + 1


# ---- the registry ----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_backward_after_the_function_is_gone(strategy: str) -> None:
    """What autograd keeps alive must run, as it does with Inductor."""
    x_NH, w_VH = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    y_N = torch.randint(0, V, (N,))
    function, options = scaled(0.5, 0.0), {**OPTIONS, "strategy": strategy}
    loss = torch.compile(function, backend="autochunk", options=options)(x_NH, w_VH, y_N)
    torch._dynamo.reset()
    gc.collect()
    got = torch.autograd.grad(loss, [x_NH, w_VH])
    for g, e in zip(got, torch.autograd.grad(function(x_NH, w_VH, y_N), [x_NH, w_VH]), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)


def test_an_equal_region_is_compiled_once(no_codegen: None) -> None:
    """Two compiled functions with one body share its kernels."""
    run(scaled(0.5, 0.0))
    (first,) = runtime.REGIONS.values()
    torch._dynamo.reset()
    x_NH, w_VH = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    again = torch.compile(scaled(0.5, 0.0), backend="autochunk", options=OPTIONS)
    again(x_NH, w_VH, torch.randint(0, V, (N,)))
    (second,) = runtime.REGIONS.values()
    assert second is first


def test_a_region_of_another_process() -> None:
    x_NH, w_VH = torch.randn(N, H), torch.randn(V, H)
    with pytest.raises(RuntimeError, match="region 0123 is not registered in this process"):
        torch.ops.autochunk.forward([x_NH], [w_VH], "0123")
