"""The peak of a step is what docs/how-it-works.md says it is, with Inductor's real kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from autochunk.bench.memory import PEAK_ENVIRONMENT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MIB = 2**20
ROWS_HIDDEN_VOCABULARY = (2048, 128, 65536)
SCRIPT = """
    import json, sys, torch, torch.nn.functional as F
    from autochunk.bench.memory import PeakMemory
    name, rows, hidden, vocabulary, dtype, options = json.loads(sys.argv[1])
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    x = torch.randn(rows, hidden).to(dtype).requires_grad_()
    w = (torch.randn(vocabulary, hidden) * 0.05).to(dtype).requires_grad_()
    b = torch.randn(vocabulary).to(dtype).requires_grad_()
    y = torch.randint(0, vocabulary, (rows,))

    def cross_entropy(x, w, b, y):
        return F.cross_entropy(F.linear(x, w).float(), y)

    def bias(x, w, b, y):
        return F.cross_entropy(F.linear(x, w, b).float(), y)

    def tied(x, w, b, y):
        return cross_entropy(x + F.embedding(y, w), w, b, y)

    def ratio(x, w, b, y):  # the picked log-probability is a factor of the gradient
        logp = F.linear(x, w).float().log_softmax(-1).gather(-1, y[:, None])
        return -(logp - logp.detach() + 0.01 * x.float().mean(-1, keepdim=True)).exp().mean()

    def margin(x, w, b, y):
        z = F.linear(x, w).float()
        return (1 + z - z.gather(-1, y[:, None])).clamp(min=0).sum(-1).mean()

    options = {**options, "min_bytes": 0, "strict": True}
    compiled = torch.compile(globals()[name], backend="autochunk", options=options)
    memory = PeakMemory(torch.device("cpu"))
    for step in range(3):
        x.grad = w.grad = b.grad = None
        memory.start()
        compiled(x, w, b, y).backward()
        peak = memory.stop()[0]
    print(json.dumps(peak))
"""


def peak(name: str, dtype: str, hidden: int = ROWS_HIDDEN_VOCABULARY[1], **options: object) -> int:
    """Bytes of a step above what was held before, in a process of its own."""
    rows, _, vocabulary = ROWS_HIDDEN_VOCABULARY
    settings = json.dumps([name, rows, hidden, vocabulary, dtype, options])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), settings],
        capture_output=True,
        text=True,
        env={**os.environ, **PEAK_ENVIRONMENT},  # holes of the heap are nobody's bytes
    )
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout))


def gradients(itemsize: int, hidden: int = ROWS_HIDDEN_VOCABULARY[1]) -> int:
    rows, _, vocabulary = ROWS_HIDDEN_VOCABULARY
    return (vocabulary + rows) * hidden * itemsize


@pytest.mark.parametrize(
    ("name", "dtype", "strategy"),
    [
        ("cross_entropy", "float32", "fused"),
        ("cross_entropy", "float32", "recompute"),
        ("cross_entropy", "bfloat16", "fused"),
        ("bias", "float32", "fused"),
        ("tied", "bfloat16", "fused"),
        ("ratio", "float32", "fused"),
        ("margin", "float32", "fused"),
    ],
)
def test_peak_is_gradients_plus_one_chunk(name, dtype, strategy):
    """Within 10 %, and so the budget is kept."""
    itemsize, budget = (4, 32 * MIB) if dtype == "float32" else (2, 48 * MIB)
    found = peak(name, dtype, memory_budget=budget, strategy=strategy)
    expected = gradients(itemsize) + budget
    assert abs(found - expected) <= 0.1 * expected, f"{found / MIB:.1f}, {expected / MIB:.1f} MiB"


def test_peak_of_many_chunks_in_half_precision():
    """The sum in float32 and the gradient itself; the chunks are gone when that is made."""
    _, hidden, vocabulary = ROWS_HIDDEN_VOCABULARY
    found = peak("cross_entropy", "bfloat16", chunk_rows=64)
    expected = gradients(2) + 4 * vocabulary * hidden
    assert abs(found - expected) <= 0.1 * expected, f"{found / MIB:.1f}, {expected / MIB:.1f} MiB"


@pytest.mark.parametrize(
    ("dtype", "itemsize", "share"),
    [("float32", 4, 1.55), ("bfloat16", 2, 1.75)],  # six chunks, as the sum's error allows
)
def test_default_is_near_the_floor(dtype, itemsize, share):
    """The floor is the gradients; logits of 2048 rows would be four times as much."""
    found = peak("cross_entropy", dtype, hidden=512)
    assert found <= share * gradients(itemsize, 512), f"{found / MIB:.1f} MiB"
