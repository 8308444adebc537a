"""Products of parameters that the batch's logits are scaled with (DoRA): weights, not heads.

Shapes: N rows, H hidden features, V vocabulary, R the adapter's rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import Outcome, check
from torch import Tensor, nn

from autochunk.bench.memory import PEAK_ENVIRONMENT
from autochunk.report import Report, collect

N, H, V, R = 48, 32, 320, 4
OPTIONS: dict[str, Any] = {"min_bytes": 0, "chunk_rows": 7, "strict": True}
#: How the adapter's product is written: as PEFT does, or as its paper does.
SPELLINGS = ("eye", "matmul")


class Dora(nn.Module):
    """A linear with a weight-decomposed adapter, as PEFT computes it."""

    def __init__(self, n_in: int, n_out: int, spelling: str, bias: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(n_in, n_out, bias=bias)
        self.base.requires_grad_(False)
        self.lora_A = nn.Linear(n_in, R, bias=False)
        self.lora_B = nn.Linear(R, n_out, bias=False)
        self.magnitude = nn.Parameter(self.base.weight.norm(dim=1).detach() * 1.1)
        self.spelling, self.scaling = spelling, 2.0

    def forward(self, x: Tensor) -> Tensor:
        result, weight = self.base(x), self.base.weight
        if self.spelling == "eye":
            eye = torch.eye(x.shape[-1], dtype=weight.dtype)
            product = self.lora_B(self.lora_A(eye)).T
        else:
            product = self.lora_B.weight @ self.lora_A.weight
        norm = torch.linalg.norm(weight + self.scaling * product.detach(), dim=1).detach()
        scale = (self.magnitude / norm).view(1, -1)
        bias = 0 if self.base.bias is None else self.base.bias
        adapted = scale * self.lora_B(self.lora_A(x)) * self.scaling
        return result + (scale - 1) * (result - bias) + adapted


class Model(nn.Module):
    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def logits(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x), y)


def outcome(model: nn.Module, loss: Tensor) -> Outcome:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Outcome((loss.detach(),), torch.autograd.grad(loss, parameters))


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, H), torch.randint(0, V, (N,))


def compare(model: Model, where: str) -> list[Report]:
    """A step with the loss inside of the compiled function or outside against eager's."""
    x, y = data()
    with collect() as reports:
        if where == "inside":
            loss = torch.compile(model, backend="autochunk", options=OPTIONS)(x, y)
        else:
            logits = torch.compile(model.logits, backend="autochunk", options=OPTIONS)(x)
            loss = F.cross_entropy(logits, y)
        actual = outcome(model, loss)
    eager = outcome(model, model(x, y))
    model.double()
    check(actual, eager, outcome(model, model(x.double(), y)), torch.float32)
    return reports


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fault_Z3_dora_on_the_head(spelling: str, bias: bool, where: str) -> None:
    reports = compare(Model(nn.Linear(H, H), Dora(H, V, spelling, bias)), where)
    codes = [row.refusal.code if row.refusal else row.strategy for row in reports[0].rows]
    strategy = "fused" if where == "inside" else "deferred"
    assert sorted(codes) == sorted([strategy, strategy, "weight"]), reports[0]
    assert all(row.strategy == "fused" for report in reports[1:] for row in report.rows)


@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fault_Z3_dora_in_the_layers_below(spelling: str) -> None:
    body = nn.Sequential(Dora(H, H, spelling), nn.Tanh(), Dora(H, H, spelling))
    (report,) = compare(Model(body, nn.Linear(H, V)), "inside")
    found = {row.head: row.refusal.code if row.refusal else row.strategy for row in report.rows}
    assert sorted(found.values()) == ["feeds-layer", "feeds-layer", "fused", "weight", "weight"]
    (logits,) = report.chunked
    assert f"× {V}" in logits.shape


@pytest.mark.usefixtures("no_codegen")
def test_a_loss_of_parameters_alone_is_chunked() -> None:
    """A regulariser: its rows are words, but it meets the batch's loss in one number."""

    class Regularised(Model):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            near = self.head.weight @ self.head.weight.T
            return super().forward(x, y) + near.logsumexp(-1).mean()

    (report,) = compare(Regularised(nn.Linear(H, H), nn.Linear(H, V)), "inside")
    assert [row.strategy for row in report.rows] == ["fused", "fused"], report


SCRIPT = """
    import json, sys, torch, torch.nn.functional as F
    from autochunk.bench.memory import PeakMemory
    from test_weights import Dora, Model
    backend, where, spelling = json.loads(sys.argv[1])
    rows, hidden, vocabulary = 512, 256, 32768
    torch.manual_seed(0)
    model = Model(torch.nn.Linear(hidden, hidden), Dora(hidden, vocabulary, spelling))
    x, y = torch.randn(rows, hidden), torch.randint(0, vocabulary, (rows,))
    inside = torch.compile(model, backend=backend)
    logits = torch.compile(model.logits, backend=backend)
    memory = PeakMemory(torch.device("cpu"))
    for step in range(3):
        model.zero_grad()
        memory.start()
        loss = inside(x, y) if where == "inside" else F.cross_entropy(logits(x), y)
        loss.backward()
        peak = memory.stop()[0]
    print(json.dumps(peak))
"""


def peak(*settings: str) -> int:
    """Bytes of a step above what was held before, in a process of its own."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps(settings)],
        capture_output=True,
        text=True,
        env={**os.environ, **PEAK_ENVIRONMENT, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("where", "spelling"), [("inside", "eye"), ("outside", "matmul")])
def test_fault_Z3_dora_takes_less_memory_than_inductor(where: str, spelling: str) -> None:
    ours, inductor = (peak(backend, where, spelling) for backend in ("autochunk", "inductor"))
    assert ours < 0.7 * inductor, (ours / 2**20, inductor / 2**20)
