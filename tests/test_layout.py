"""Which kernels have their logits transposed in memory, and where gathers end up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autochunk import runtime

ROWS, HIDDEN = 48, 16


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


def ratio(z: Tensor, y: Tensor) -> Tensor:
    logp = z.log_softmax(-1).gather(-1, y[:, None])
    return (logp - logp.detach()).exp().mean()


def margin(z: Tensor, y: Tensor) -> Tensor:
    return (1 + z - z.gather(-1, y[:, None])).clamp(min=0).sum(-1).mean()


def softcapped(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(30 * torch.tanh(z / 30), y, label_smoothing=0.1)


def picked_of_a_product(z: Tensor, y: Tensor) -> Tensor:
    scale = torch.linspace(0.5, 2, z.shape[-1])
    return (z * scale).gather(-1, torch.stack([y, y.flip(0)], -1)).square().sum(-1).mean()


def top_k(z: Tensor, y: Tensor) -> Tensor:
    return z.topk(3, -1).values.sum(-1).mean()


def cumulated(z: Tensor, y: Tensor) -> Tensor:
    return z.softmax(-1).cumsum(-1).square().mean()


def picked_of_sorted(z: Tensor, y: Tensor) -> Tensor:
    return z.sort(-1).values.gather(-1, y[:, None]).mean()


@pytest.mark.parametrize(
    ("loss", "features", "dtype", "transposed"),
    [
        (cross_entropy, 96, torch.float32, True),
        (cross_entropy, 96, torch.bfloat16, True),
        (cross_entropy, 29 * 3, torch.float32, True),
        (cross_entropy, 251, torch.float32, False),  # no block divides a prime number
        (ratio, 96, torch.float32, True),
        (margin, 96, torch.float32, True),
        (softcapped, 96, torch.float32, True),
        (picked_of_a_product, 96, torch.float32, True),
        (top_k, 96, torch.float32, False),
        (cumulated, 96, torch.float32, False),
        (picked_of_sorted, 96, torch.float32, False),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_layout(loss, features, dtype, transposed, dynamic):
    torch.manual_seed(0)
    x = torch.randn(ROWS, HIDDEN).to(dtype).requires_grad_()
    w = torch.randn(features, HIDDEN).to(dtype).requires_grad_()
    y = torch.randint(0, features, (ROWS,))

    def step(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return loss(F.linear(x, w).float(), y)

    before = set(runtime.REGIONS)
    options = {"chunk_rows": 20, "min_bytes": 0, "strict": True}
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="autochunk", options=options, dynamic=dynamic)
    found = compiled(x, w, y)
    gradients = torch.autograd.grad(found, (x, w))
    expected = step(x, w, y)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    )
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (x, w)), **tolerance)
    (name,) = set(runtime.REGIONS) - before
    loop = runtime.REGIONS[name]
    kernel = loop.full_kernel or loop.grad_kernel
    assert kernel.transposed == transposed
