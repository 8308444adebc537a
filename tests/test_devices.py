"""What depends on the device: each test runs on the CPU, and on CUDA where there is a GPU.

Small sizes and Inductor's real kernels. ``python -m pytest tests/test_devices.py`` is the first
thing to run on a CUDA machine; ``autochunk bench --suite gpu`` measures.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import Outcome, check, run, widened
from torch import Tensor, nn
from torch._dynamo.utils import counters

import autochunk
from autochunk.bench.memory import MIB, PeakMemory
from autochunk.report import collect

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
N, H, V = 150, 32, 1024
OPTIONS: dict[str, Any] = {"min_bytes": 0, "chunk_rows": 40, "strict": True}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def cross_entropy(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_NH, w_VH).float(), y_N, label_smoothing=0.1)


def per_token(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
    logp_NV = F.linear(x_NH, w_VH).float().log_softmax(-1)
    entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    return logp_NV.gather(-1, y_N[:, None]).squeeze(-1), entropy_N


def policy(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    logp_N, entropy_N = per_token(x_NH, w_VH, y_N)
    ratio_N = (logp_N - logp_N.detach()).exp()
    return -ratio_N.clamp(0.8, 1.2).mean() - 0.01 * entropy_N.mean()


def softcap(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    logits_NV = 30 * torch.tanh(F.linear(x_NH, w_VH) / 30)
    return F.cross_entropy(logits_NV, y_N) + 1e-4 * logits_NV.logsumexp(-1).pow(2).mean()


def squares(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
    return F.mse_loss(F.linear(x_NH, w_VH), F.one_hot(y_N, V).to(x_NH.dtype))


LOSSES = [cross_entropy, per_token, policy, softcap, squares]


def data(device: str, dtype: torch.dtype) -> list[Tensor]:
    x_NH, w_VH = torch.randn(N, H), torch.randn(V, H) * 0.3
    x_NH[7] *= 5
    leaves = [t.to(device, dtype).requires_grad_() for t in (x_NH, w_VH)]
    return [*leaves, torch.randint(0, V, (N,)).to(device)]


def compared(function: Any, inputs: list[Tensor], **options: Any) -> None:
    """Errors against float64 are at most about twice the unchunked ones."""
    compiled = torch.compile(function, backend="autochunk", options={**OPTIONS, **options})
    with collect() as reports:
        actual = run(compiled, inputs)
    assert len(reports[0].chunked) == 1, reports[0]
    exact, baseline = run(function, widened(inputs)), run(function, inputs)
    check(actual, baseline, exact, inputs[0].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_as_exact_as_unchunked(loss, dtype, device):
    compared(loss, data(device, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [75, 10])
def test_sums_in_half_precision_and_float32(rows, dtype, device):
    """Two chunks and fifteen; on CUDA the latter's products are written in float32."""
    compared(cross_entropy, data(device, dtype), chunk_rows=rows, strategy="fused")


@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_rows_that_change(strategy, device):
    options = {**OPTIONS, "strategy": strategy}
    compiled = torch.compile(cross_entropy, backend="autochunk", options=options, dynamic=True)
    x_NH, w_VH, y_N = data(device, torch.float32)
    for rows in (N, 97, 41, 3):
        part = [x_NH[:rows].detach().requires_grad_(), w_VH, y_N[:rows]]
        exact, baseline = run(cross_entropy, widened(part)), run(cross_entropy, part)
        check(run(compiled, part), baseline, exact, torch.float32)


def test_functional_form(device):
    inputs = data(device, torch.float32)

    def form(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        return autochunk.chunked_linear(F.cross_entropy, x_NH, w_VH, y_N, chunk_rows=40)

    def plain(x_NH: Tensor, w_VH: Tensor, y_N: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x_NH, w_VH), y_N)

    exact, baseline = run(plain, widened(inputs)), run(plain, inputs)
    check(run(form, inputs), baseline, exact, torch.float32)


def test_autotune(device):
    inputs = data(device, torch.bfloat16)
    compared(cross_entropy, inputs, chunk_rows=None, memory_budget=64 * V * 2, autotune=True)


class Net(nn.Module):
    """An embedding tied to the head, with a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.table(ids)))
        logits = F.linear(hidden, self.table.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_with_autocast_and_a_loss_scale(dtype, device):
    """Ten steps of a tied model; float16 with a GradScaler, whose scale arrives from upstream."""
    ids = torch.randint(0, V, (4, 32), device=device)
    first = Net().to(device)
    losses = []
    for backend in ("eager", "autochunk"):
        net = copy.deepcopy(first)
        options = OPTIONS if backend == "autochunk" else None
        compiled = torch.compile(net, backend=backend, options=options)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        own = []
        for _ in range(10):
            with torch.autocast(device, dtype):
                loss = compiled(ids)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            own.append(loss.item())
        losses.append(own)
    assert losses[1][-1] < losses[1][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@needs_cuda
def test_nothing_waits_for_the_device():
    """PyTorch raises where an op of a step would synchronise."""
    inputs = data("cuda", torch.bfloat16)
    compiled = torch.compile(cross_entropy, backend="autochunk", options=OPTIONS)
    run(compiled, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compiled(*inputs).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("strategy", ["fused", "recompute"])
def test_cuda_graphs(strategy):
    """``mode="reduce-overhead"``: captured, replayed, and right with other numbers."""
    inductor = torch._inductor.list_mode_options()["reduce-overhead"]
    options = {**OPTIONS, "strategy": strategy, "inductor": inductor}
    compiled = torch.compile(cross_entropy, backend="autochunk", options=options)
    counters.clear()
    for _ in range(5):
        inputs = data("cuda", torch.float32)
        torch.compiler.cudagraph_mark_step_begin()
        found = run(compiled, inputs)
        actual = Outcome(
            tuple(o.clone() for o in found.outputs),
            tuple(None if g is None else g.clone() for g in found.gradients),
        )
        exact, baseline = run(cross_entropy, widened(inputs)), run(cross_entropy, inputs)
        check(actual, baseline, exact, torch.float32)
    assert counters["inductor"]["cudagraph_skips"] == 0


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_gradients_plus_one_chunk_on_cuda(dtype):
    rows, hidden, vocabulary = 4096, 256, 65536
    budget = 64 * MIB
    x_NH = torch.randn(rows, hidden, device="cuda").to(dtype).requires_grad_()
    w_VH = torch.randn(vocabulary, hidden, device="cuda").to(dtype).requires_grad_()
    y_N = torch.randint(0, vocabulary, (rows,), device="cuda")
    options = {"memory_budget": budget, "strict": True, "accumulate_dtype": dtype}
    compiled = torch.compile(cross_entropy, backend="autochunk", options=options)
    memory = PeakMemory(torch.device("cuda"))
    for _ in range(3):
        x_NH.grad = w_VH.grad = None
        memory.start()
        compiled(x_NH, w_VH, y_N).backward()
        peak = memory.stop()[0]
    expected = (vocabulary + rows) * hidden * dtype.itemsize + budget
    assert abs(peak - expected) <= 0.1 * expected, f"{peak / MIB:.1f}, {expected / MIB:.1f} MiB"
