"""Random tails: programs composed of row ops, reductions, masks and losses, against float64.

    AUTOCHUNK_PROGRAMS=5000 python -m pytest tests/test_property.py    the nightly-style run

The end of pytest's report says how many programs were chunked and how many refused, by code.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from compare import FLOOR, Outcome, check, run, widened
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import autochunk

PROGRAMS = int(os.environ.get("AUTOCHUNK_PROGRAMS", "60"))
B, T, H, K, V = 2, 5, 4, 3, 64

#: Hidden states, weight and the weights of K heads → logits, ``[B, T, V]`` but for what is merged.
HEADS = {
    "einsum": lambda x, w, ws: torch.einsum("bth,vh->btv", x, w),
    "conv1d": lambda x, w, ws: F.conv1d(x.mT, w[..., None]).mT,
    "conv2d": lambda x, w, ws: F.conv2d(x.mT[..., None], w[..., None, None])[..., 0].mT,
    "stack first": lambda x, w, ws: _stack(x, ws, 0).flatten(0, 1),
    "stack between": lambda x, w, ws: _stack(x, ws, 1).view(-1, x.shape[1], V),
    "stack behind": lambda x, w, ws: _stack(x, ws, 2).transpose(1, 2).flatten(0, 1),
    "stack last": lambda x, w, ws: _stack(x, ws, -1).movedim(-1, 0).reshape(-1, x.shape[1], V),
    "stack in time": lambda x, w, ws: _stack(x, ws, 2).flatten(1, 2),
    "stack of unbound": lambda x, w, ws: _stack(x, ws.unbind(), 1).flatten(0, 1),
    "codebooks": lambda x, w, ws: torch.einsum("bth,kvh->btkv", x, ws).flatten(1, 2),
    "one head of all": lambda x, w, ws: (
        F.linear(x, ws.flatten(0, 1)).unflatten(-1, (-1, V)).transpose(1, 2).flatten(0, 1)
    ),
    "conv of all": lambda x, w, ws: (
        F.conv1d(x.mT, ws.flatten(0, 1)[..., None])
        .unflatten(1, (-1, V))
        .flatten(0, 1)
        .transpose(1, 2)
    ),
}
#: What time of these is: not merged, or merged with the heads.
STACKS = sorted(name for name in HEADS if name.split()[0] in ("stack", "codebooks", "one", "conv"))
IN_TIME = ("stack in time", "codebooks")


def _stack(x, ws, dim):
    return torch.stack([F.linear(x, w) for w in ws], dim)


#: Wide → wide. No rounding of its own (a cast down): the float64 run would round alike, and ours,
#: which scales gradients afterwards, not. ``p`` holds the program's side inputs.
WIDE = {
    "scale": lambda z, p: z * 0.7,
    "softcap": lambda z, p: 5 * torch.tanh(z / 5),
    "upcast": lambda z, p: z.to(torch.promote_types(z.dtype, torch.float32)),
    "bias": lambda z, p: z + p["per_feature"],
    "per row": lambda z, p: z * p["per_row"],
    "per batch": lambda z, p: z / p["per_batch"],
    "relu": lambda z, p: F.relu(z) + 0.1 * z,
    "mask": lambda z, p: z.masked_fill(p["banned"], -30.0),
    "log_softmax": lambda z, p: F.log_softmax(z, -1),
    "centre": lambda z, p: z - z.mean(-1, keepdim=True),
    "normalise": lambda z, p: z / (1 + z.norm(dim=-1, keepdim=True)),
    "detached max": lambda z, p: z - z.detach().amax(-1, keepdim=True),
    "in place": lambda z, p: z.clone().mul_(1.1),
    "vocabulary slice": lambda z, p: z[..., : z.shape[-1] // 2] + z[..., -(z.shape[-1] // 2) :],
    "softmax": lambda z, p: 8 * F.softmax(z, -1),
    "running sum": lambda z, p: 0.1 * z.cumsum(-1),
    "sort": lambda z, p: z.sort(dim=-1).values,
    "top-p": lambda z, p: z.masked_fill(z.detach().softmax(-1) < 0.01, -5.0),
    "some features": lambda z, p: z[..., torch.arange(z.shape[-1] - 1, -1, -3)],
    "append": lambda z, p: torch.cat([z, z[..., :3] * 0.5], -1),
    "stack": lambda z, p: torch.stack([z, 0.3 * z], -2).logsumexp(-2),
    "write": lambda z, p: _write(z, p),
    "margin": lambda z, p: z - 0.5 * F.one_hot(p["labels"].squeeze(-1) % z.shape[-1], z.shape[-1]),
    "groups": lambda z, p: (
        z.unflatten(-1, (2, -1)).softmax(-2).flatten(-2) if z.shape[-1] % 2 == 0 else z
    ),
    "schedule": lambda z, p: z / p["temperature"],
    "sequence first": lambda z, p: z.transpose(0, 1).contiguous().transpose(0, 1),
}

#: Wide → wide, but rows meet: a program with one of these may be refused.
MIXING = {
    "softmax over time": lambda z, p: z.softmax(1),
    "running sum over time": lambda z, p: 0.1 * z.cumsum(1),
    "centre the batch": lambda z, p: z - z.mean((0, 1)),
    "neighbours": lambda z, p: z + 0.1 * z.roll(1, 1),
}


def _write(z, p):
    z = z.clone()
    z[..., 0] = -2.0
    z[..., -2:] = 0.5 * z[..., :2]
    return z


#: Wide → one number a row.
REDUCE = {
    "logsumexp": lambda z, p: z.logsumexp(-1),
    "gather": lambda z, p: z.gather(-1, p["labels"] % z.shape[-1]).squeeze(-1),
    "nll": lambda z, p: z.logsumexp(-1) - z.gather(-1, p["labels"] % z.shape[-1]).squeeze(-1),
    "cross_entropy": lambda z, p: F.cross_entropy(
        z.flatten(0, 1), (p["labels"] % z.shape[-1]).flatten(), reduction="none"
    ).view(z.shape[:-1]),
    "mean square": lambda z, p: z.square().mean(-1),
    "entropy": lambda z, p: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "max": lambda z, p: z.amax(-1),
    "std": lambda z, p: z.std(-1),
    "argmax": lambda z, p: z.argmax(-1).to(z.dtype),
    "norm": lambda z, p: z.norm(dim=-1),
    "margin of two": lambda z, p: z.topk(2, dim=-1).values.diff(dim=-1).squeeze(-1),
    "loop": lambda z, p: torch.stack([row.logsumexp(-1) for row in z]),
    "pieces": lambda z, p: torch.cat([part.square().mean(-1) for part in z.split(2, 1)], 1),
    "top-3": lambda z, p: z.topk(3, dim=-1).values.sum(-1),
}

#: One number a row → one number a row.
NARROW = {
    "keep": lambda y, p: y,
    "tanh": lambda y, p: torch.tanh(y),
    "ratio": lambda y, p: torch.exp(0.1 * (y - y.detach())) * p["advantage"],
    "masked": lambda y, p: torch.where(p["mask"], y, torch.zeros_like(y)),
    "detach": lambda y, p: y.detach() * p["advantage"],
}

#: One number a row → the loss.
END = {
    "sum": lambda y, p: y.sum(),
    "mean": lambda y, p: y.mean(),
    "masked mean": lambda y, p: (y * p["mask"]).sum() / p["mask"].sum().clamp(min=1),
    "per sequence": lambda y, p: (y.sum(-1) / p["mask"].sum(-1).clamp(min=1)).mean(),
    "log-sigmoid": lambda y, p: -F.logsigmoid(y.sum(-1)).mean(),
    "none": lambda y, p: y,
    "square of sum": lambda y, p: y.mean().square(),
    "shifted": lambda y, p: (y[:, 1:] * y[:, :-1]).mean(),
}


@dataclass(frozen=True)
class Program:
    """One generated loss function."""

    wide: tuple[str, ...]
    mixing: str
    terms: tuple[tuple[str, str, str], ...]
    combined: bool
    shifted: bool
    dtype: torch.dtype
    weight_grad: bool
    input_grad: bool
    chunk_rows: int
    strategy: str
    dynamic: bool
    temperature: float
    head: str = ""

    @property
    def rows(self):
        """The shape of the logits' rows."""
        if self.head not in STACKS:
            return B, T
        return (B, T * K) if self.head in IN_TIME else (B * K, T)

    def __call__(self, x, w, ws, per_feature, per_row, per_batch, advantage, banned, mask, labels):
        p = {
            "per_feature": per_feature,
            "per_row": per_row,
            "per_batch": per_batch,
            "advantage": advantage,
            "banned": banned,
            "mask": mask,
            "labels": labels,
            "temperature": self.temperature,
        }
        z = HEADS[self.head](x, w, ws) if self.head else F.linear(x, w)
        if self.shifted:
            z = z[:, :-1]
            p = {k: v[:, 1:] if self._per_token(v) else v for k, v in p.items()}
        for name in self.wide:
            if name not in ("bias", "mask") or z.shape[-1] == V:
                z = WIDE[name](z, p)
        if self.mixing:
            z = MIXING[self.mixing](z, p)
        ends = [END[c](NARROW[b](REDUCE[a](z, p), p), p) for a, b, c in self.terms]
        if self.combined:
            return sum(end.mean() for end in ends)
        return tuple(ends)

    def inputs(self):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        return [
            normal(B, T, H).requires_grad_(self.input_grad),
            normal(V, H).requires_grad_(self.weight_grad),
            normal(K, V, H).requires_grad_(self.weight_grad),
            normal(V).requires_grad_(),
            (normal(*self.rows, 1).abs() + 0.5).requires_grad_(),
            normal(self.rows[0], 1, 1).abs() + 0.5,
            normal(*self.rows),
            torch.arange(V) % 7 == 6,
            torch.rand(*self.rows, generator=generator) > 0.3,
            torch.randint(0, V, (*self.rows, 1), generator=generator),
        ]

    def _per_token(self, value):
        is_tensor = isinstance(value, torch.Tensor)
        return is_tensor and value.dim() > 1 and value.shape[1] == self.rows[1]


programs = st.builds(
    Program,
    wide=st.lists(st.sampled_from(sorted(WIDE)), max_size=4).map(tuple),
    mixing=st.sampled_from(["", "", "", "", "", "", *MIXING]),
    terms=st.lists(
        st.tuples(*(st.sampled_from(sorted(t)) for t in (REDUCE, NARROW, END))),
        min_size=1,
        max_size=3,
    ).map(tuple),
    combined=st.booleans(),
    shifted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    weight_grad=st.booleans(),
    input_grad=st.booleans(),
    chunk_rows=st.integers(1, 12),
    strategy=st.sampled_from(["auto", "recompute"]),
    dynamic=st.booleans(),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    head=st.sampled_from([""] * len(HEADS) + sorted(HEADS)),
)

#: Programs on which an earlier version failed, as hypothesis shrank them.
REGRESSIONS = {
    # The last piece of a split has a symbolic size.
    "split of dynamic rows": Program(
        wide=(),
        mixing="",
        terms=(("pieces", "keep", "sum"),),
        combined=False,
        shifted=True,
        dtype=torch.float32,
        weight_grad=False,
        input_grad=False,
        chunk_rows=1,
        strategy="auto",
        dynamic=True,
        temperature=1.0,
    ),
}

#: Programs by what became of them, over the whole run.
OUTCOMES: Counter[str] = Counter()


@given(program=programs)
@settings(
    max_examples=PROGRAMS,
    deadline=None,
    derandomize=PROGRAMS <= 60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_generated_programs(program: Program, no_codegen):
    OUTCOMES.update(_check(program))


@pytest.mark.parametrize("name", REGRESSIONS)
def test_earlier_failures(name: str, no_codegen):
    assert _check(REGRESSIONS[name]) == ["chunked"]


def _check(program: Program) -> list[str]:
    """Compares with float64; returns what became of the program."""
    torch._dynamo.reset()
    inputs = program.inputs()
    found = []

    def chunked(*args):
        if program.dynamic:
            for arg in args:
                if arg.dim() > 1 and arg.shape[0] == program.rows[0] and arg is not args[2]:
                    dims = [d for d in (0, 1) if arg.shape[d] > 1]
                    torch._dynamo.maybe_mark_dynamic(arg, dims)
            torch._dynamo.maybe_mark_dynamic(args[0], [0, 1])
        explanation = autochunk.explain(
            program,
            options={
                "min_bytes": 0,
                "chunk_rows": program.chunk_rows,
                "strategy": program.strategy,
                "strict": True,
            },
        )(*args)
        found.append(explanation)
        return explanation.result

    try:
        actual = run(chunked, inputs)
    except torch._dynamo.exc.BackendCompilerFailed:
        if any(isinstance(plain, Exception) for plain in _plain(program)):
            return ["Inductor's error"]
        raise
    assert found[0].reports, "Dynamo captured nothing"
    codes = {row.refusal.code for row in found[0].refused}
    assert codes <= set(autochunk.REFUSAL_CODES)
    if not program.mixing and program.head not in STACKS:
        assert found[0].chunked, found[0]
    eager, exact = run(program, inputs), run(program, widened(inputs))
    try:
        check(actual, eager, exact, program.dtype)
    except AssertionError:
        if _is_inductors(program, actual, eager, exact):
            return ["Inductor's error"]
        check(actual, eager, exact, program.dtype, nearby=list(_nearby(program)))
    return ["chunked"] if found[0].chunked else sorted(codes)


def _is_inductors(program: Program, actual: Outcome, eager: Outcome, exact: Outcome) -> bool:
    """Whether plain Inductor is no closer to float64, or is wrong by the same rule."""
    return any(
        isinstance(plain, Outcome)
        and (
            _is_right(actual, plain, exact, program.dtype)
            or not _is_right(plain, eager, exact, program.dtype)
        )
        for plain in _plain(program)
    )


def _plain(program: Program) -> Iterator[Outcome | Exception]:
    """What plain Inductor makes of a program, of fixed and of symbolic sizes."""
    for dynamic in (None, True):
        torch._dynamo.reset()
        try:
            yield run(torch.compile(program, dynamic=dynamic), program.inputs())
        except torch._dynamo.exc.BackendCompilerFailed as error:
            yield error


def _nearby(program: Program) -> Iterator[tuple[Outcome, Outcome]]:
    """Eager and exact runs of inputs that differ by a rounding from the program's."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        inputs = []
        for t in program.inputs():
            if t.is_floating_point():
                noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
                moved = t.detach().double() * (1 + FLOOR[program.dtype] * noise)
                t = moved.to(t.dtype).requires_grad_(t.requires_grad)
            inputs.append(t)
        yield run(program, inputs), run(program, widened(inputs))


def _is_right(actual: Outcome, baseline: Outcome, exact: Outcome, dtype: torch.dtype) -> bool:
    try:
        check(actual, baseline, exact, dtype)
    except AssertionError:
        return False
    return True
