"""Whole training steps, drawn at random, compiled with real kernels, against eager and float64.

    python tests/steps.py --steps 3000                 the nightly run
    python tests/steps.py --steps 300 --seed 7 --quick the graphs op by op: no C++ is compiled

A step is lines of Python: those of a module's ``forward``, those that use what it returned, those
after the backward pass (``step_lines.py`` draws them). It is rendered to a program that stands
alone, and that very program is what runs: a module, three or so steps of training or evaluation,
and everything they leave behind: losses, metrics, counts, logits, gradients of all parameters and
inputs, buffers, inputs that were written to.

The rule is that of ``compare.py``. What breaks it is run with plain Inductor; only where that is
right is it a failure of ours:

    wrong      a number is further from float64 than twice what eager or Inductor are
    raises     an error that plain Inductor does not have
    fallback   a ``FallbackWarning``

A failure is shrunk, line by line, and written as a program that runs without this file.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import dataclasses
import itertools
import json
import linecache
import random
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compare import FLOOR, error
from step_lines import (
    AFTER_IT,
    FLAT,
    FORWARD,
    HEADS,
    HIDDEN,
    LOSSES,
    MERGES,
    METRICS,
    SETUP,
    STACKS,
    Dice,
    outside_of_the_model,
)
from torch._dynamo.backends.debugging import aot_eager

import autochunk
import autochunk.backend
import autochunk.body
import autochunk.report
import autochunk.runtime

OPTIONS = {"strict": False, "min_bytes": 0, "chunk_rows": 7}

PRELUDE = '''
import contextlib
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

B, H, K, V, LONGEST = 2, 8, 2, 96, 24


def up(t):
    """At least float32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


@torch.compiler.disable
def opaque(t):
    return t * 1.0


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        return t * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(H, H)
        self.block = nn.Sequential(nn.Linear(H, H), nn.GELU())
        self.head = nn.Linear(H, V)
        self.second = nn.Linear(H, V, bias=False)
        self.emb = nn.Embedding(V, H)
        self.conv = nn.Conv1d(H, V, 1)
        self.wide = nn.Conv1d(H, K * V, 1, bias=False)
        self.codebooks = nn.Parameter(torch.randn(K, V, H) / 3)
        self.scale = nn.Parameter(torch.tensor(0.8))
        self.temperature = nn.Parameter(torch.tensor(0.2))
        self.logvar = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.mix = nn.Parameter(torch.tensor([0.1, 0.4]))
        self.register_buffer("hist", torch.linspace(0, 1, 8))
        self.register_buffer("table", torch.linspace(-1, 1, 24).view(3, 8))
        self.register_buffer("queue", torch.linspace(0, 1, K * B * LONGEST))
        self.register_buffer("ema", torch.tensor(1.0))
        self.register_buffer("last", torch.zeros(4, V))
        self.register_buffer("count", torch.zeros(16, dtype=torch.int64))
        self.register_buffer("steps", torch.tensor(1))
        self.note = torch.tensor(0.5)
'''

DRIVER = '''
def batch(length, number, dtype, jitter):
    """x, y, k, f, t, out, view; the same numbers for each dtype."""
    random = torch.Generator().manual_seed(number)
    N = B * (length - SHIFTED) * (K if STACKED else 1)

    def normal(*shape):
        made = torch.randn(shape, generator=random, dtype=torch.float64)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return (made * (1 + jitter * noise)).to(dtype)

    x = normal(B, length, H).requires_grad_(X_GRAD)
    y = torch.randint(0, V, (N,), generator=random)
    y[torch.rand(N, generator=random) < 0.1] = -100
    k = torch.rand(N, generator=random) > 0.3
    k[:2] = torch.tensor([True, False])
    out = normal(8)
    return x, y, k, normal(N), normal(N, V), out, out[:] if ALIASED else normal(8)


def now(value):
    """A tensor whose value is there: deferred logits would be computed after the update."""
    return value.materialize() if hasattr(value, "materialize") else value


def play(compiler, dtype, jitter=0.0):
    """Runs all steps; ``compiler(function)`` compiles. Returns what each step left, by name."""
    torch.manual_seed(0)
    model = Model().double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, dtype=torch.float64)
            parameter.mul_(1 + jitter * noise)
    model.to(dtype)
    model.note = model.note.to(dtype)
    setup(model)
    run, rest, whole = model, outside, call
    if UNIT in ("model", "both"):
        run = compiler(model)
    if UNIT == "both":
        rest = compiler(outside)
    if UNIT == "step":
        whole = compiler(call)
    left = []
    for number, (length, mode) in enumerate(STEPS):
        model.train(mode == "train")
        batches = [batch(length, 10 * number + i, dtype, jitter) for i in range(CALLS)]
        left.append(step(model, run, rest, whole, batches, mode))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.95)
                parameter.grad = None
    return left


def step(model, run, rest, whole, batches, mode):
    modes = {"train": contextlib.nullcontext, "no_grad": torch.no_grad}
    context = modes.get(mode, torch.inference_mode)()
    seen, total = {}, 0.0
    with context:
        for i, (x, y, k, f, t, out, view) in enumerate(batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
                loss, given = whole(run, rest, model, x, y, k, f, t, out, view)
            total = total + loss
            seen.update({f"{name} of call {i}": value for name, value in given.items()})
        if mode == "train":
            total.backward()
        seen.update(after(model, given, x, y, k, f, t, out, view))
    seen["loss"] = total
    for name, parameter in model.named_parameters():
        seen[f"gradient of {name}"] = parameter.grad
    for name, buffer in model.named_buffers():
        seen[f"buffer {name}"] = buffer
    seen["note"] = model.note
    for i, (x, y, k, f, t, out, view) in enumerate(batches):
        seen[f"gradient of x {i}"] = x.grad
        seen.update({f"input y {i}": y, f"input out {i}": out, f"input view {i}": view})
    with torch.no_grad():
        return {
            name: (now(value).detach().clone(), value.requires_grad) if value is not None else None
            for name, value in seen.items()
        }
'''

MAIN = """
if __name__ == "__main__":
    options = {OPTIONS}
    compiler = lambda f: torch.compile(f, backend="autochunk", options=options, dynamic=DYNAMIC)
    exact, eager = play(lambda f: f, torch.float64), play(lambda f: f, DTYPE)
    for number, left in enumerate(play(compiler, DTYPE)):
        for name in exact[number]:
            values = [side[number][name] for side in (exact, eager)] + [left[name]]
            exact_one, eager_one, ours = (v and v[0].double() for v in values)
            if exact_one is None or ours is None:
                different = (exact_one is None) != (ours is None)
            else:
                scale = exact_one.norm().clamp(min=1e-3)
                different = (ours - exact_one).norm() / scale > 1e-3
            print("  !!" if different else "    ", number, name)
            if different:
                print("float64", exact_one, "eager", eager_one, "ours", ours, sep="\\n")
"""

#: What every function of a step is given.
ARGUMENTS = "x, y, k, f, t, out, view"
_FALLBACK = "autochunk: a rewrite failed and the graph runs as plain Inductor "
COEFFICIENTS = (1.0, 0.5, 0.25, 0.125)
_OWN = re.compile(r"^[a-z]\d+$")


@dataclass(frozen=True)
class Step:
    """A few steps of training.

    Attributes:
        forward: Lines of the module's ``forward``.
        outside: Lines on what it returned.
        after: Lines after the backward pass.
        setup: Lines on the module before it is compiled.
        loss: Names of the numbers whose sum is the loss.
        seen: Names that are compared, those of logits among them.
        unit: What is compiled: "model", "both" (the model, and its outside as a second function)
            or "step" (both in one).
        checkpoint: The model is called in a checkpoint: "", "reentrant" or "not reentrant".
        autocast: Around the call.
        dtype: Of the model.
        dynamic: As ``torch.compile`` takes it.
        steps: Length and mode ("train", "no_grad", "inference") of each.
        calls: Of the model before one backward pass.
        shifted: Whether the last position of each sequence is dropped.
        stacked: Whether there is a label for each of K heads' rows.
        aliased: Whether the input ``view`` is a view of the input ``out``.
        x_grad: Whether the hidden states want a gradient.
        strategy: The option.
    """

    forward: tuple[str, ...]
    loss: tuple[str, ...]
    outside: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    unit: str = "model"
    checkpoint: str = ""
    autocast: bool = False
    dtype: str = "float32"
    dynamic: bool | None = None
    steps: tuple[tuple[int, str], ...] = ((12, "train"),)
    calls: int = 1
    shifted: bool = False
    stacked: bool = False
    aliased: bool = False
    x_grad: bool = True
    strategy: str = "auto"

    @property
    def options(self) -> dict[str, Any]:
        return {**OPTIONS, "strategy": self.strategy}

    @property
    def rounds(self) -> bool:
        """Whether anything is computed in bfloat16."""
        lines = (*self.forward, *self.outside, *self.after)
        return self.autocast or self.dtype == "bfloat16" or any("autocast" in n for n in lines)

    @property
    def returned(self) -> list[str]:
        """Names that ``forward`` has to return."""
        there = _defined(self.forward)
        wanted = [*self.seen, *self.loss]
        for line in self.outside:
            wanted += _uses(line)[0]
        return [name for name in there if name in wanted]

    def render(self) -> str:
        """The program."""
        returned = ", ".join(self.returned) + ("," if self.returned else "")
        call = f"run({ARGUMENTS})"
        if self.checkpoint:
            reentrant = self.checkpoint == "reentrant"
            call = f"checkpoint(run, {ARGUMENTS}, use_reentrant={reentrant})"
        loss = [f"{c} * {n}" for c, n in zip(COEFFICIENTS, self.loss, strict=False)]
        seen = ", ".join(f"{n!r}: {n}" for n in self.seen)
        there = _defined((*self.forward, *self.outside))
        later = [n for n in _defined(self.after) if n not in there]
        given = [f"{n} = given[{n!r}]" for n in self.seen]
        return "\n".join(
            [
                PRELUDE.strip("\n"),
                f"    def forward(self, {ARGUMENTS}):",
                *_indented(self.forward, 8),
                f"        return ({returned})",
                "\n",
                f"def outside(model, {returned} {ARGUMENTS}):",
                *_indented(map(outside_of_the_model, self.outside), 4),
                f"    return {' + '.join(loss) or '0.0'}, {{{seen}}}",
                "\n",
                f"def call(run, rest, model, {ARGUMENTS}):",
                f"    ({returned}) = {call}" if returned else f"    {call}",
                f"    return rest(model, {returned} {ARGUMENTS})",
                "\n",
                f"def after(model, given, {ARGUMENTS}):",
                *_indented([*given, *map(outside_of_the_model, self.after)], 4),
                f"    return {{{', '.join(f'{n!r}: {n}' for n in later)}}}",
                "\n",
                "def setup(model):",
                *_indented([*self.setup, "pass"], 4),
                "\n",
                f"UNIT, AUTOCAST, DYNAMIC = {self.unit!r}, {self.autocast}, {self.dynamic}",
                f"DTYPE, STEPS, CALLS = torch.{self.dtype}, {self.steps}, {self.calls}",
                f"SHIFTED, ALIASED, X_GRAD = {self.shifted}, {self.aliased}, {self.x_grad}",
                f"STACKED = {self.stacked}",
                "\n",
                DRIVER.strip("\n"),
                "\n",
                MAIN.replace("{OPTIONS}", repr(self.options)).strip("\n"),
                "",
            ]
        )

    def __repr__(self) -> str:
        """Only what differs from the defaults, one field a line."""
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or value != field.default:
                shown.append(f"    {field.name}={_shown(value)},")
        return "Step(\n" + "\n".join(shown) + "\n)"


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and any(isinstance(v, str) for v in value):
        return "(\n" + "".join(f"        {v!r},\n" for v in value) + "    )"
    return repr(value)


def _indented(lines: Any, by: int) -> list[str]:
    return [" " * by + part for line in lines for part in line.split("\n")]


def _uses(line: str) -> tuple[list[str], list[str], list[str]]:
    """Names that a line reads, makes and deletes."""
    reads: dict[str, None] = {}
    makes: dict[str, None] = {}
    deletes: list[str] = []
    for statement in ast.walk(ast.parse(line)):
        if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
            reads[statement.target.id] = None
        if isinstance(statement, ast.Name) and _OWN.match(statement.id):
            if isinstance(statement.ctx, ast.Store):
                makes[statement.id] = None
            elif isinstance(statement.ctx, ast.Del):
                deletes.append(statement.id)
                reads[statement.id] = None
            else:
                reads[statement.id] = None
    # A line that makes a name uses it only after that.
    return [n for n in reads if n not in makes], list(makes), deletes


def _defined(lines: Any) -> list[str]:
    there: dict[str, None] = {}
    for line in lines:
        _, makes, deletes = _uses(line)
        there.update(dict.fromkeys(makes))
        for name in deletes:
            there.pop(name, None)
    return list(there)


# ---- drawing ------------------------------------------------------------------------------------


def draw(seed: int) -> Step:
    """A step that eager PyTorch runs."""
    for attempt in itertools.count():
        step = _draw(random.Random(f"{seed} {attempt}"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if step is not None and _runs(step):
                return step
    raise AssertionError


def _runs(step: Step) -> bool:
    """Whether eager runs it in both dtypes, to finite numbers of a sane size."""
    try:
        namespace = load(step)
        for dtype in (torch.float64, getattr(torch, step.dtype)):
            for left in namespace["play"](_eager, dtype):
                values = [v[0] for v in left.values() if v is not None]
                if not all(bool((v.abs() < 1e6).all()) for v in values):  # neither is nan
                    return False
    except Exception:
        return False
    return True


def _draw(dice: random.Random) -> Step | None:
    dtype = dice.choice(["float32"] * 5 + ["float64"] * 3 + ["bfloat16"])
    autocast = dtype == "float32" and dice.random() < 0.15
    casts = dtype == "float32" and dice.random() < 0.1
    lines = Dice(
        dice,
        shifted=dice.random() < 0.3,
        exact=dtype != "bfloat16" and not autocast and not casts,
        casts=casts,
        stacked=dice.random() < 0.35,
    )
    forward = [lines.fill(dice.choice(HIDDEN)) for _ in range(dice.randrange(3))]
    heads = (STACKS, MERGES) if lines.stacked else (HEADS,)
    forward += [lines.fill(dice.choice(family)) for family in (*heads, FLAT)]
    forward += [lines.line(FORWARD) for _ in range(dice.randint(1, 12))]
    inside = not lines.names.get("s") or dice.random() < 0.6
    if inside:
        forward.append(lines.fill(dice.choice(LOSSES)))
    n_outside = dice.choice([0, 0, 1, 2, 3, 4, 5])
    outside = [lines.line(AFTER_IT) for _ in range(n_outside)]
    if not lines.names.get("s"):
        outside.append(lines.fill(dice.choice(LOSSES)))
    forward, outside = ([line for line in part if line] for part in (forward, outside))
    outside = [outside_of_the_model(line) for line in outside]
    there = _defined([*forward, *outside])
    numbers = [n for n in there if n[0] == "s"]
    if not numbers:
        return None
    loss = dice.sample(numbers, min(len(numbers), dice.choice([1, 1, 2, 3])))
    seen = [n for n in there if n[0] in "srimnpzywc" and dice.random() < (0.5, 0.15)[n[0] in "zwc"]]
    lines.names = {**{k: [n for n in v if n in seen] for k, v in lines.names.items()}}
    lines.names.update({"y": ["y"], "k": ["k"], "f": ["f"], "t": ["t"], "h": ["x"]})
    after = [lines.line(METRICS) for _ in range(dice.choice([0, 0, 0, 1, 2]))]
    length = dice.choice([12, 16, 24])
    lengths = dice.choice([(length,) * 3, (length, length, 13), (12, 16, 24), (length,) * 2])
    modes = [dice.choice(["train"] * 6 + ["no_grad", "inference"]) for _ in lengths]
    # Autograd takes a buffer that a reentrant checkpoint returns for its result: it never ends.
    plain = not any("self." in line and "_(" in line for line in forward)
    plain &= not any(name[0] == "p" for name in _defined(forward))
    return _tidy(
        Step(
            forward=tuple(forward),
            outside=tuple(outside),
            after=tuple(_in_no_grad(line) for line in after if line),
            setup=tuple(dice.choice(SETUP) for _ in range(dice.choice([0, 0, 0, 1, 1, 2]))),
            loss=tuple(loss),
            seen=tuple(seen),
            unit=dice.choice(["model", "model", "model", "step", "step", "both"]),
            checkpoint=dice.choice(["reentrant", "not reentrant"])
            if plain and dice.random() < 0.12
            else "",
            autocast=autocast,
            dtype=dtype,
            dynamic=dice.choice([None, None, None, True, False]),
            steps=tuple(zip(lengths, modes, strict=True)),
            calls=dice.choice([1, 1, 1, 1, 2]),
            shifted=lines.shifted,
            stacked=lines.stacked,
            aliased=dice.random() < 0.3,
            x_grad=dice.random() < 0.8,
            strategy=dice.choice(["auto", "auto", "auto", "recompute"]),
        )
    )


def _in_no_grad(line: str) -> str:
    return "with torch.no_grad():\n" + "\n".join("    " + part for part in line.split("\n"))


def _tidy(step: Step) -> Step | None:
    """Without the lines whose names do not exist; None where no loss is left."""
    forward, there = _possible(step.forward, set())
    outside, there = _possible(step.outside, there)
    seen = tuple(n for n in step.seen if n in there)
    loss = tuple(n for n in step.loss if n in there)
    after, _ = _possible(step.after, set(seen))
    if not loss:
        return None
    return replace(step, forward=forward, outside=outside, after=after, seen=seen, loss=loss)


def _possible(lines: Any, there: set[str]) -> tuple[tuple[str, ...], set[str]]:
    kept = []
    there = set(there)
    for line in lines:
        reads, makes, deletes = _uses(line)
        if there.issuperset(reads):
            kept.append(line)
            there = (there | set(makes)) - set(deletes)
    return tuple(kept), there


# ---- running ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
        kind: "right", "wrong", "raises", "fallback", or "inductor": it fails alike.
        detail: What was wrong.
        heads: Heads, by "chunked" or the code and op of their refusal.
    """

    kind: str
    detail: str = ""
    heads: tuple[str, ...] = ()

    @property
    def is_failure(self) -> bool:
        return self.kind in ("wrong", "raises", "fallback")

    @property
    def cause(self) -> str:
        """Two failures of one cause have the same; several causes may have it, too."""
        text = self.detail.split("\n")[0].removeprefix(_FALLBACK)
        text = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "N", text)
        return f"{self.kind}: {text if self.kind != 'wrong' else ''}"[:140].strip()


def _eager(function: Any) -> Any:
    return function


def load(step: Step) -> dict[str, Any]:
    """The program's names."""
    source = step.render()
    # A file that does not exist, but tracebacks and reports show its lines.
    name = f"/step/{abs(hash(source)):x}.py"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": "step"}
    exec(compile(source, name, "exec"), namespace)
    return namespace


def check(step: Step, quick: bool = False) -> Outcome:
    """Runs a step and compares.

    Args:
        step: The step.
        quick: Run the graphs op by op instead of with Inductor's kernels.
    """
    dtype = getattr(torch, step.dtype)
    play = load(step)["play"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact, eager = play(_eager, torch.float64), play(_eager, dtype)
    with _op_by_op() if quick else contextlib.nullcontext():
        found = _compiled(step, "autochunk", dtype)
    heads = tuple(found.heads)
    if found.error is not None:
        plain = _compiled(step, "aot_eager" if quick else "inductor", dtype)
        kind = "raises" if plain.error is None else "inductor"
        return Outcome(kind, found.error, heads)
    rounded = torch.bfloat16 if step.rounds else dtype
    differences = _differences(found.left, [eager], exact, rounded)
    if differences:
        plain = _compiled(step, "aot_eager" if quick else "inductor", dtype)
        if plain.error is not None:
            return Outcome("inductor", plain.error, heads)
        differences = _differences(found.left, [eager, plain.left], exact, rounded)
        # Eager may be nearly exact by luck: it is not after a rounding of its inputs.
        noise = FLOOR[rounded]
        nearby = [eager, play(_eager, torch.float64, noise)]
        nearby += [play(_eager, dtype, noise * part) for part in (1, -1, 0.7, -0.7)]
        inductors = _differences(plain.left, [eager], exact, rounded)
        beyond = _differences(found.left, nearby, exact, rounded)
        differences = {
            name: text
            for name, text in differences.items()
            if name not in inductors and name in beyond
        }
    if differences:
        return Outcome("wrong", "\n".join(differences.values()), heads)
    if found.fallback:
        return Outcome("fallback", found.fallback, heads)
    return Outcome("right", "", heads)


@dataclass
class _Played:
    left: list[dict[str, Any]]
    error: str | None
    fallback: str
    heads: list[str]


def _compiled(step: Step, backend: str, dtype: torch.dtype) -> _Played:
    torch._dynamo.reset()
    kwargs: dict[str, Any] = {"backend": backend, "dynamic": step.dynamic}
    if backend == "autochunk":
        kwargs["options"] = step.options
    left, error = [], None
    with warnings.catch_warnings(record=True) as caught, autochunk.report.collect() as reports:
        warnings.simplefilter("always")
        try:
            left = load(step)["play"](lambda f: torch.compile(f, **kwargs), dtype)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    torch._dynamo.reset()
    fallbacks = [str(w.message) for w in caught if w.category is autochunk.FallbackWarning]
    heads = []
    for report in reports:
        for row in report.rows:
            refusal = row.refusal
            heads.append(f"{refusal.code}({refusal.op})" if refusal else "chunked")
    return _Played(left, error, fallbacks[0] if fallbacks else "", heads)


def _differences(
    left: list[dict[str, Any]],
    unchunked: list[list[dict[str, Any]]],
    exact: list[dict[str, Any]],
    dtype: torch.dtype,
) -> dict[str, str]:
    """What is worse than twice the worst of ``unchunked``, by step and name."""
    found = {}
    for number, (ours, true) in enumerate(zip(left, exact, strict=True)):
        for name in true:
            sides = [side[number][name] for side in unchunked]
            text = _difference(ours.get(name), sides, true[name], dtype)
            if text:
                found[f"{number} {name}"] = f"step {number}: {name}: {text}"
    return found


def _difference(ours: Any, sides: list[Any], true: Any, dtype: torch.dtype) -> str:
    if true is None or ours is None:
        there = ours if true is None else true
        if (true is None) != (ours is None) and there[0].any():
            return "is missing" if ours is None else "should not exist"
        return ""
    value, wants = ours
    first, first_wants = sides[0]
    if (value.shape, value.dtype) != (first.shape, first.dtype):
        return f"{value.dtype} {list(value.shape)} is not {first.dtype} {list(first.shape)}"
    if wants != first_wants:
        return f"requires_grad is {wants}"
    if not value.is_floating_point():
        return "" if torch.equal(value, first) else f"{value.tolist()} is not {first.tolist()}"
    true = true[0].double()
    if not value.isfinite().all():
        return "is not finite"
    theirs = max(error(side[0], true) for side in sides)
    norm = true.norm().item() or 1.0
    floor = 2 * FLOOR[dtype] * (1 + true.numel() ** -0.5 + 0.01 * true.numel() ** 0.5 / norm)
    distance = error(value, true)
    if distance <= 2 * theirs + floor:
        return ""
    shown = f" ({value.item():.6g} is not {true.item():.6g})" if value.numel() == 1 else ""
    return f"error {distance:.1e}, unchunked {theirs:.1e}{shown}"


@contextlib.contextmanager
def _op_by_op() -> Iterator[None]:
    """The compiled graphs run op by op; nothing is compiled by a C++ compiler."""

    def outer(gm: Any, example_inputs: Any, config_patches: Any = None) -> Any:
        return aot_eager(gm, example_inputs)

    def inner(gm: Any, example_inputs: Any) -> Any:
        return lambda args: gm(*args)

    kept = (
        autochunk.backend.compile_fx,
        autochunk.body.compile_fx_inner,
        autochunk.body.select_decomp_table,
    )
    autochunk.backend.compile_fx = outer
    autochunk.body.compile_fx_inner = inner
    autochunk.body.select_decomp_table = dict
    autochunk.runtime.REGIONS.clear()
    try:
        yield
    finally:
        autochunk.backend.compile_fx = kept[0]
        autochunk.body.compile_fx_inner = kept[1]
        autochunk.body.select_decomp_table = kept[2]
        autochunk.runtime.REGIONS.clear()


# ---- shrinking ----------------------------------------------------------------------------------

_SIMPLER: dict[str, Any] = {
    "checkpoint": "",
    "autocast": False,
    "calls": 1,
    "setup": (),
    "after": (),
    "outside": (),
    "seen": (),
    "dynamic": None,
    "strategy": "auto",
    "shifted": False,
    "aliased": False,
    "x_grad": False,
    "dtype": "float32",
    "steps": ((12, "train"),),
    "unit": "model",
}


def shrink(step: Step, outcome: Outcome, quick: bool = False, seconds: float = 300) -> Step:
    """The smallest step found that fails the same way."""
    until = time.monotonic() + seconds
    tried: set[Step] = {step}
    again = True
    while again:
        again = False
        for smaller in _smaller(step):
            if time.monotonic() > until:
                return step
            if smaller in tried:
                continue
            tried.add(smaller)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if not _runs(smaller):
                    continue
            if check(smaller, quick).cause == outcome.cause:
                step, again = smaller, True
                break
    return step


def _smaller(step: Step) -> Iterator[Step]:
    candidates = itertools.chain(
        _simpler_flags(step),
        _fewer_lines(step, 3),
        _fewer_lines(step, 1),
        _fewer_names(step),
        _simpler_lines(step),
    )
    for candidate in candidates:
        tidy = _tidy(candidate)
        if tidy is not None and tidy != step:
            yield tidy


def _simpler_flags(step: Step) -> Iterator[Step]:
    for name, value in _SIMPLER.items():
        if getattr(step, name) != value:
            yield replace(step, **{name: value})
    for i in range(len(step.steps)):
        if len(step.steps) > 1:
            yield replace(step, steps=step.steps[:i] + step.steps[i + 1 :])


def _fewer_lines(step: Step, at_once: int) -> Iterator[Step]:
    for name in ("after", "outside", "forward", "setup"):
        lines = getattr(step, name)
        for i in reversed(range(len(lines) - at_once + 1)):
            yield replace(step, **{name: lines[:i] + lines[i + at_once :]})


def _fewer_names(step: Step) -> Iterator[Step]:
    for name in _defined((*step.forward, *step.outside)):
        if name[0] == "s" and step.loss != (name,):
            yield replace(step, loss=(name,))
    for name in ("loss", "seen"):
        names = getattr(step, name)
        for i in range(len(names)):
            yield replace(step, **{name: names[:i] + names[i + 1 :]})


def _simpler_lines(step: Step) -> Iterator[Step]:
    """A line without its block, or with an earlier name of the same kind."""
    for name in ("after", "outside", "forward"):
        lines = getattr(step, name)
        for i, line in enumerate(lines):
            head, _, body = line.partition("\n")
            others = []
            if head.startswith("with "):
                others.append("\n".join(part[4:] for part in body.split("\n")))
            reads, makes, _ = _uses(line)
            for made, read in itertools.product(makes, [*reads, "x"]):
                if made[0] == (
                    "h" if read == "x" else read[0]
                ):  # nobody needs the line: its users take what it took
                    yield _renamed(replace(step, **{name: lines[:i] + lines[i + 1 :]}), made, read)
            for other in others:
                yield replace(step, **{name: (*lines[:i], other, *lines[i + 1 :])})


def _renamed(step: Step, old: str, new: str) -> Step:
    def in_each(lines: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(re.sub(rf"\b{old}\b", new, line) for line in lines)

    changed = {n: in_each(getattr(step, n)) for n in ("forward", "outside", "after", "loss")}
    return replace(step, **changed)


# ---- the command --------------------------------------------------------------------------------


def _work(arguments: argparse.Namespace) -> None:
    """Checks some steps; prints one JSON line before and one after each."""
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        step = draw(seed)
        print(json.dumps({"seed": seed, "step": repr(step)}), flush=True)
        begun = time.monotonic()
        outcome = check(step, arguments.quick)
        took = time.monotonic() - begun
        line = {
            "kind": outcome.kind,
            "cause": outcome.cause,
            "detail": outcome.detail,
            "heads": outcome.heads,
            "steps": len(step.steps) * step.calls,
            "seconds": round(took, 1),
        }
        print(json.dumps(line), flush=True)


def _shrink_one(arguments: argparse.Namespace) -> None:
    step = draw(arguments.shrink)
    outcome = check(step, arguments.quick)
    print(f"# {outcome.cause}\n# {len(step.forward)} lines", file=sys.stderr)
    if outcome.is_failure:
        step = shrink(step, outcome, arguments.quick, arguments.seconds)
        outcome = check(step, arguments.quick)
    comments = "".join(f"# {line}\n" for line in (repr(step) + "\n" + outcome.detail).split("\n"))
    print(comments + step.render())


def _campaign(arguments: argparse.Namespace) -> int:
    """Draws and checks in processes of their own: a crash or a hang costs one step."""
    until = time.monotonic() + arguments.seconds
    kinds: Counter[str] = Counter()
    heads: Counter[str] = Counter()
    causes: dict[str, list[int]] = collections.defaultdict(list)
    seed, steps = arguments.seed, 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    while steps < arguments.steps and time.monotonic() < until:
        command = [sys.executable, __file__, "--work", "--seed", str(seed), "--count", "40"]
        child = subprocess.Popen(
            [*command, *["--quick"] * arguments.quick], stdout=subprocess.PIPE, text=True
        )
        begun: dict[str, Any] | None = None
        assert child.stdout is not None
        for text in child.stdout:
            line = json.loads(text)
            if "step" in line:
                begun = line
                continue
            assert begun is not None
            seed = begun["seed"] + 1
            steps += line["steps"]
            kinds[line["kind"]] += 1
            heads.update(line["heads"])
            if line["kind"] in ("wrong", "raises", "fallback", "inductor"):
                causes[line["cause"]].append(begun["seed"])
            if line["kind"] in ("wrong", "raises", "fallback"):
                _keep(arguments.out, begun, line)
            begun = None
            if steps >= arguments.steps or time.monotonic() > until:
                child.kill()
        if child.wait() and begun is not None and time.monotonic() < until:
            seed = begun["seed"]
            plain = [sys.executable, __file__, "--plain", str(seed), *["--quick"] * arguments.quick]
            died = subprocess.run(plain, stdout=subprocess.DEVNULL, check=False).returncode != 0
            kinds["inductor" if died else "crash"] += 1
            causes[f"crash: exit status {child.returncode}, Inductor's: {died}"].append(seed)
            if not died:
                _keep(arguments.out, begun, {"cause": "crash", "detail": str(child.returncode)})
            seed += 1
    print(f"{kinds.total()} programs, {steps} steps: {dict(kinds.most_common())}")
    print("heads:", ", ".join(f"{name} {n}" for name, n in heads.most_common()))
    for cause, seeds in sorted(causes.items(), key=lambda item: -len(item[1])):
        print(f"{len(seeds):4} {cause}   --shrink {seeds[0]}; seeds {seeds[:6]}")
    failed = sum(kinds[kind] for kind in ("wrong", "raises", "fallback", "crash"))
    return int(failed > 0)


def _plain(arguments: argparse.Namespace) -> int:
    """Whether plain Inductor fails, too; a crash says so by itself."""
    step = draw(arguments.plain)
    backend = "aot_eager" if arguments.quick else "inductor"
    return int(_compiled(step, backend, getattr(torch, step.dtype)).error is not None)


def _keep(folder: Path, begun: dict[str, Any], line: dict[str, Any]) -> None:
    text = f"{line['cause']}\n{line['detail']}\n{begun['step']}\n"
    (folder / f"{begun['seed']}.txt").write_text(text)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000, help="checked steps, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--quick", action="store_true", help="op by op, without kernels")
    parser.add_argument("--out", type=Path, default=Path("step-failures"))
    parser.add_argument("--shrink", type=int, metavar="SEED", help="shrink one failure, print it")
    parser.add_argument("--show", type=int, metavar="SEED", help="print a program")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=40, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.show is not None:
        print(draw(arguments.show).render())
    elif arguments.shrink is not None:
        _shrink_one(arguments)
    elif arguments.plain is not None:
        return _plain(arguments)
    elif arguments.work:
        _work(arguments)
    else:
        return _campaign(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
