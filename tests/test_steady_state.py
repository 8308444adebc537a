"""A training loop compiles a few times, then never again, and its memory does not grow."""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autochunk import DeferredTensor, metadata, runtime
from autochunk.report import Report, collect

VOCABULARY, HIDDEN = 512, 16
OPTIONS = {"min_bytes": 0, "num_chunks": 3, "strict": True}
MIB = 2**20


class Model(nn.Module):
    """Returns logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="autochunk", options=OPTIONS)


def _resident_bytes() -> int:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _alive() -> tuple[int, int]:
    """Objects and tensors that the garbage collector knows."""
    gc.collect()
    everything = gc.get_objects()
    return len(everything), sum(issubclass(type(x), Tensor) for x in everything)


class Loop:
    """The loop of the README, with changing lengths and a schedule."""

    def __init__(self, compile_it: bool) -> None:
        self.model = Model()
        self.step = compiled(self.model) if compile_it else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.generator = torch.Generator().manual_seed(1)
        self.done = 0
        self.last: tuple[weakref.ref[Tensor], ...] = ()

    def __call__(self, steps: int) -> list[float]:
        losses = []
        for i in range(self.done, self.done + steps):
            x = torch.randint(0, VOCABULARY, (2, 17 + i % 5), generator=self.generator)
            y = x.roll(-1, 1)
            logits = self.step(x) / (1 + 0.01 * (i % 20))
            loss = F.cross_entropy(logits.view(-1, VOCABULARY), y.view(-1))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
            self.last = weakref.ref(loss), weakref.ref(logits)
        self.done += steps
        return losses


@pytest.mark.skipif(not os.access("/proc/self/statm", os.R_OK), reason="reads Linux's /proc/self")
def test_two_hundred_steps():
    expected = Loop(False)(200)
    loop = Loop(True)
    losses, counts, objects, tensors, resident = [], [], [], [], []
    with collect() as reports:
        for steps in (60, 70, 70):
            losses += loop(steps)
            counts.append(_compilations(reports))
            n_objects, n_tensors = _alive()
            objects.append(n_objects)
            tensors.append(n_tensors)
            resident.append(_resident_bytes())
    assert losses == pytest.approx(expected, rel=1e-5)
    assert [reference() for reference in loop.last] == [None, None]
    assert counts[0] == counts[1] == counts[2], "it was compiled again"
    assert counts[2][-1] <= 6, "\n".join(map(str, reports))
    assert tensors[2] <= tensors[1]
    assert objects[2] - objects[1] < 35, "objects stay alive, one for each second step"
    # The logits of one step are 68 KiB, of 70 steps 4.7 MiB; the allocator's pages come and go.
    assert min(resident[1] - resident[0], resident[2] - resident[1]) < 4 * MIB


def _compilations(reports: list[Report]) -> list[int]:
    """Of Dynamo: frames and graphs; of autochunk: loops and graphs."""
    counters = torch._dynamo.utils.counters
    dynamo = [counters["frames"]["total"], counters["stats"]["unique_graphs"]]
    return [*dynamo, len(runtime.REGIONS), len(reports)]


def test_numbers_that_never_repeat(no_codegen):
    """What is remembered of the ops is bounded, here and in PyTorch."""
    step = compiled(Model())
    fake = torch._subclasses.fake_tensor.FakeTensorMode
    sizes = []
    with torch.no_grad():
        for i in range(600):
            (step(torch.ones(2, 5, dtype=torch.long)) / (1 + 0.01 * i)).logsumexp(-1)
            sizes.append((len(fake.cache), metadata._shown.cache_info().currsize))
    assert sizes[-1] == sizes[299]


def _tokens(z: Tensor, y: Tensor, n: int) -> Tensor:
    return F.cross_entropy(z.view(z.size(0) * z.size(1), VOCABULARY), y.reshape(-1))


def _last(z: Tensor, y: Tensor, n: int) -> Tensor:
    return F.cross_entropy(z[:, -n:].flatten(0, 1), y[:, -n:].flatten())


def _first(z: Tensor, y: Tensor, n: int) -> Tensor:
    return F.cross_entropy(z.narrow(1, 0, n).flatten(0, 1), y[:, :n].flatten())


def _completions(z: Tensor, y: Tensor, n: int) -> Tensor:
    return F.cross_entropy(z[:, n - 1 : -1].flatten(0, 1), y[:, n:].flatten())


def _each(z: Tensor, y: Tensor, n: int) -> Tensor:
    return sum(F.cross_entropy(z[i], y[i]) for i in range(len(y)))


def _each_with_its_length(z: Tensor, y: Tensor, n: int) -> Tensor:
    return sum(F.cross_entropy(z[i, : n + i], y[i, : n + i]) for i in range(len(y)))


def _position(z: Tensor, y: Tensor, n: int) -> Tensor:
    return z[:, n].logsumexp(-1).mean() + z[1:, -n, :].amax(-1).sum()


def _rows_in_a_mask(z: Tensor, y: Tensor, n: int) -> Tensor:
    return F.cross_entropy(z[y > 20 * n], y[y > 20 * n])


def _loop(z: Tensor, y: Tensor, n: int) -> Tensor:
    return torch.stack([sequence.logsumexp(-1) for sequence in z]).mean()


@pytest.mark.parametrize(
    "loss",
    [
        *(_tokens, _last, _first, _completions, _position, _rows_in_a_mask),
        *(_each, _each_with_its_length, _loop),
    ],
)
def test_lengths_that_change(loss, no_codegen):
    """Sizes and positions are inputs of an expression; there is not one program for each."""
    model = Model()
    step = compiled(model)
    counts = []
    with collect() as reports:
        for i in range(10):
            x = torch.randint(0, VOCABULARY, (4, 12 + i % 6))
            grads = []
            for function in (model, step):
                model.zero_grad()
                logits = function(x)
                value = loss(logits, x.roll(-1, 1), 3 + 3 * i % 7)
                value.backward()
                grads.append([value, model.head.weight.grad.clone()])
            torch.testing.assert_close(grads[1], grads[0])
            assert type(logits) is DeferredTensor
            counts.append(len(reports))
    assert counts[-1] == counts[5] <= 9, counts


def test_programs_die_with_the_model(no_codegen):
    """A hundred models in one process leave nothing behind, and each is chunked."""
    graphs = []
    for _ in range(3):
        model = Model()
        x = torch.randint(0, VOCABULARY, (2, 9))
        logits = compiled(model)(x)
        logits.logsumexp(-1).sum().backward()
        formula = logits._formula
        assert len(formula.compiler.made) == 1
        graphs.append(weakref.ref(formula.compiler))
        del model, logits, formula
        torch._dynamo.reset()
        gc.collect()
    assert all(reference() is None for reference in graphs)
