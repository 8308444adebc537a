"""The peak of a step is what docs/how-it-works.md says it is, with Inductor's real kernels."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

MIB = 2**20
SCRIPT = """
    import json, sys, torch, torch.nn.functional as F
    rows, hidden, vocabulary, dtype, strategy, budget, tied = json.loads(sys.argv[1])
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    x = torch.randn(rows, hidden).to(dtype).requires_grad_()
    w = (torch.randn(vocabulary, hidden) * 0.05).to(dtype).requires_grad_()
    y = torch.randint(0, vocabulary, (rows,))

    def loss(x, w, y):
        if tied:
            x = x + F.embedding(y, w)
        return F.cross_entropy(F.linear(x, w).float(), y)

    def status(key):
        fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return int(fields[key].split()[0]) * 1024

    options = {"memory_budget": budget, "strategy": strategy, "min_bytes": 0, "strict": True}
    compiled = torch.compile(loss, backend="autochunk", options=options)
    for step in range(3):
        x.grad = w.grad = None
        open("/proc/self/clear_refs", "w").write("5")
        base = status("VmRSS")
        compiled(x, w, y).backward()
        peak = status("VmHWM") - base
    print(json.dumps(peak))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "strategy", "tied"),
    [
        ("float32", "fused", False),
        ("float32", "recompute", False),
        ("bfloat16", "fused", False),
        ("bfloat16", "fused", True),
    ],
)
def test_peak_is_gradients_plus_one_chunk(dtype, strategy, tied):
    rows, hidden, vocabulary, budget = 2048, 128, 65536, 32 * MIB
    itemsize = 4 if dtype == "float32" else 2
    settings = json.dumps([rows, hidden, vocabulary, dtype, strategy, budget, tied])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), settings], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    gradients = (vocabulary + rows) * hidden * itemsize
    logits = rows * vocabulary * itemsize
    assert peak <= 1.1 * (gradients + budget) + 4 * MIB, f"{peak / MIB:.1f} MiB"
    assert peak < logits / 2
