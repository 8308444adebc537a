"""Evaluation: an expression of deferred logits with a narrow result, as one compiled function."""

from __future__ import annotations

import ast
import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from autochunk.deferred import (
    DeferredTensor,
    Formula,
    alias,
    never_compiled,
    no_gradients,
    no_saved_tensors_hooks,
)
from autochunk.donation import undonated
from autochunk.source import define, place
from autochunk.stance import NotCompiledError, compiled_code_only, reason_not_compiled
from autochunk.steps import (
    Step,
    StepFormula,
    edge,
    gradients,
    gradients_of,
    modes_of_backward,
    numbers_of,
    single_rows,
)
from autochunk.types import RefusedError

LOG = logging.getLogger("autochunk.deferred")


@dataclass(frozen=True)
class Program:
    """A compiled expression, and what it is called with.

    Attributes:
        run: Takes the values of ``inputs``.
        others: Tensors that the formulas and the recorded steps read.
        own: Tensors among the arguments of the last op that are not deferred.
        inputs: For each argument ``("other", i)``, ``("own", i)`` or ``("number", value)``.
        formulas: Of all deferred tensors in it.
        static: For each of ``others`` and ``own`` the dimensions of a size that never changes;
            None where the sizes of the first call are taken for those of all calls.
        owner: Whose it is.
        use: What is remembered from call to call.
    """

    run: Callable[..., Any]
    others: tuple[Tensor, ...]
    own: tuple[Tensor, ...]
    inputs: tuple[tuple[str, Any], ...]
    formulas: tuple[Any, ...]
    static: tuple[tuple[int, ...], ...] | None
    owner: Programs
    use: _Use

    def copies(self, last: Step) -> dict[int, Tensor]:
        """Of the tensors that its steps read, by ``id``."""
        steps = [formula.step for formula in self.formulas if isinstance(formula, StepFormula)]
        pairs = [(step, i) for step in (*steps, last) for i in step.copies]
        return {id(step.leaves[i]): step.copies[i] for step, i in pairs}

    def call(self, tensors: Sequence[Tensor]) -> Any:
        """Runs it on ``others`` and ``own``, or aliases of them that nobody else has."""
        if self.static is not None:
            for tensor, dims in zip(tensors, self.static, strict=True):
                torch._dynamo.mark_static(tensor, list(dims))
        n = len(self.others)
        values = {"other": tensors[:n], "own": tensors[n:]}
        args = [v if kind == "number" else values[kind][v] for kind, v in self.inputs]
        return self.run(*args)


class _Writer:
    """Writes an expression as a Python function; equal ones give the same source."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.lines: list[tuple[str, tuple[str, int] | None]] = []
        self.names: dict[str, Any] = {"torch": torch, "NotCompiled": NotCompiledError}
        self.key: list[Any] = []
        self.inputs: list[tuple[str, Any]] = []
        self.others: list[Tensor] = []
        self.own: list[Tensor] = []
        self.formulas: list[Any] = []
        self._symbolic: dict[int, tuple[int, ...]] = {}
        self._written: dict[int, str] = {}

    def tensor(self, tensor: Tensor, into: str) -> str:
        known = self.others if into == "other" else self.own
        for i, other in enumerate(known):
            if other is tensor:
                return f"a{self.inputs.index((into, i))}"
        known.append(tensor)
        self.inputs.append((into, len(known) - 1))
        return f"a{len(self.inputs) - 1}"

    def number(self, value: Any) -> str:
        self.inputs.append(("number", value))
        return f"a{len(self.inputs) - 1}"

    def deferred(self, tensor: DeferredTensor) -> str:
        if id(tensor) in self._written:
            return self._written[id(tensor)]
        formula = tensor._formula
        self.formulas.append(formula)
        if isinstance(formula, Formula):
            args = [
                self.tensor(i, "other") if isinstance(i, Tensor) else self.number(i)
                for i in formula.inputs
            ]
            for tensor, dims in zip(formula.inputs, formula.symbolic, strict=True):
                if dims is not None:
                    self._symbolic[id(tensor)] = dims
            name = f"g{len(self.names)}"
            self.names[name] = formula.graph
            self.key.append((name, id(formula.graph)))
            source, line = f"{name}({', '.join(args)})", None
        else:
            assert isinstance(formula, StepFormula)
            source, line = self.call(formula.step, "other"), formula.step.line
        source = source if formula.requires_grad else f"({source}).detach()"
        result = f"v{len(self.lines)}"
        self.write(f"{result} = {source}", line, getattr(formula, "step", None))
        self._written[id(tensor)] = result
        return result

    def call(self, step: Step, tensors: str) -> str:
        numbers = numbers_of(step)
        given = list(step.leaves)
        single = single_rows(step)
        for position, _, _ in single:
            given[position] = 0
        leaves = [
            self.deferred(leaf)
            if type(leaf) is DeferredTensor
            else self.tensor(leaf, tensors)
            if isinstance(leaf, Tensor)
            else self.number(leaf)
            if type(leaf) in step.numbers
            else self.constant(leaf, i in numbers)
            for i, leaf in enumerate(given)
        ]
        for _, dim, index in single:
            leaves[0] = f"{leaves[0]}.index_select({dim}, {self.tensor(index, 'other')})"
        args, kwargs = pytree.tree_unflatten([_Source(leaf) for leaf in leaves], step.spec)
        written = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in kwargs.items()]
        spelling = step.spelling
        if isinstance(spelling, str):
            return f"{written[0]}.{spelling}({', '.join(written[1:])})"
        name = f"f_{getattr(spelling, '__name__', 'graph').strip('_<>')}{id(spelling)}"
        self.names[name] = spelling
        return f"{name}({', '.join(written)})"

    def constant(self, leaf: Any, may_change: bool) -> str:
        if isinstance(leaf, slice) and may_change:
            start, stop = (self.constant(x, True) for x in (leaf.start, leaf.stop))
            return f"slice({start}, {stop}, {leaf.step})"
        if type(leaf) is int and abs(leaf) > 1 and may_change:
            return self.number(leaf) if leaf > 0 else f"-{self.number(-leaf)}"
        if leaf is Ellipsis:
            return "..."
        if isinstance(leaf, torch.Size):
            return repr(tuple(leaf))
        if isinstance(leaf, torch.device):
            return f"torch.{leaf!r}"
        return repr(leaf)

    def write(self, source: str, line: tuple[str, int] | None, step: Step | None) -> None:
        if step is not None and step.autocast[0]:
            dtype = step.autocast[1]
            source = f"with torch.autocast({self.device!r}, dtype={dtype}):\n        {source}"
        self.lines.append((source, line))

    @property
    def roots(self) -> list[Formula]:
        return [formula for formula in self.formulas if isinstance(formula, Formula)]

    def static(self) -> tuple[tuple[int, ...], ...]:
        """For each tensor the dimensions whose size is the same in every call.

        Of the logits' inputs these are known; in others they are those of the logits' features.
        """
        features = {root.features for root in self.roots}
        return tuple(
            tuple(dim for dim in range(t.dim()) if dim not in self._symbolic[id(t)])
            if id(t) in self._symbolic
            else tuple(dim for dim, size in enumerate(t.shape) if size in features)
            for t in (*self.others, *self.own)
        )

    def compile(self, last: Step, compiler: Any, dynamic: bool) -> Callable[..., Any]:
        """The function, whose lines are where the user's are.

        Args:
            dynamic: Whether sizes and numbers are symbolic at the first call already.
        """
        args = ", ".join(f"a{i}" for i in range(len(self.inputs)))
        name = f"deferred_logits_{next(_numbers)}"
        check = "if not torch.compiler.is_compiling(): raise NotCompiled"
        text = [f"def {name}({args}):", f"    {check}", *(f"    {line}" for line, _ in self.lines)]
        (function,) = ast.parse("\n".join(text)).body
        assert isinstance(function, ast.FunctionDef)
        file, number = last.line
        at = [line[1] if line and line[0] == file else number for _, line in self.lines]
        place(function, number, [number, *at])
        made = define(function, file, self.names)
        return torch.compile(
            made, backend=compiler, fullgraph=True, dynamic=True if dynamic else None
        )


class _Source(str):
    """Source code that is its own ``repr``, so that containers print as code."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class Programs:
    """The compiled expressions of one graph's logits. They live as long as the compiled graph.

    Attributes:
        compiler: Dynamo's compiler function for them.
        made: By their source; None for one that cannot be chunked.
        process: That they are compiled and run in. Another one is a fork of it, where compilers
            and the threads of compiled code hang.
    """

    compiler: Callable[..., Any]
    made: dict[Any, _Made | None] = field(default_factory=dict)
    process: int = field(default_factory=os.getpid)

    def is_usable(self) -> bool:
        """Whether this is their process."""
        return self.process == os.getpid()


@dataclass(frozen=True)
class _Made:
    """A compiled expression.

    Attributes:
        run: The compiled function.
        dynamic: Whether its sizes are symbolic from the first call on.
        use: Of its results.
    """

    run: Callable[..., Any]
    dynamic: bool
    use: _Use = field(default_factory=lambda: _Use())


class _Use:
    """Whether the gradients of a program's results are asked for.

    A chunked loss computes them with its value. Where a loss was dropped without a backward pass
    (``loss.item()`` without ``no_grad``), the next value is computed alone, and its gradients in
    the backward pass, should there be one.

    Attributes:
        later: Which results have a gradient, where the next evaluation leaves it for later; None
            otherwise.
    """

    def __init__(self) -> None:
        self.later: tuple[bool, ...] | None = None


class _Pending:
    """Lives as long as results whose gradients nobody has asked for."""

    def __init__(self, use: _Use, differentiable: tuple[bool, ...]) -> None:
        self._use = use
        self._differentiable: tuple[bool, ...] | None = differentiable

    def asked(self) -> None:
        self._use.later = self._differentiable = None

    def __del__(self) -> None:
        if self._differentiable is not None:
            self._use.later = self._differentiable


#: Expressions that are compiled before recording is given up: each differs from all others.
_MOST_PROGRAMS = 200


def evaluate(step: Step, programs: Programs, needs_grad: bool) -> Any:
    """The results of a step, from the formulas of the logits that it reads.

    Args:
        step: Its deferred tensors are open (:func:`autochunk.steps.is_open`).
        programs: Usable ones. Their compiler raises RefusedError where the logits cannot be left
            out.
        needs_grad: Whether a result may have a gradient.

    Returns:
        What the op returns; ``NotImplemented`` if it is to be called with the values instead.
    """
    writer = _Writer(step.device)
    result = writer.call(step, "own")
    writer.write(f"r = {result}", step.line, step)
    writer.lines.append(("return r", step.line))
    code = "\n".join(line for line, _ in writer.lines)
    key = (code, tuple(writer.key), len(writer.inputs))
    if key not in programs.made:
        if len(programs.made) >= _MOST_PROGRAMS:
            LOG.info("%s:%s: cannot be chunked: too many different expressions", *step.line)
            return NotImplemented
        dynamic = step.dynamic or any(root.is_dynamic for root in writer.roots)
        programs.made[key] = _Made(writer.compile(step, programs.compiler, dynamic), dynamic)
    made = programs.made[key]
    if made is None:
        return NotImplemented
    program = Program(
        run=made.run,
        others=tuple(writer.others),
        own=tuple(writer.own),
        inputs=tuple(writer.inputs),
        formulas=tuple(writer.formulas),
        static=writer.static() if made.dynamic else None,
        owner=programs,
        use=made.use,
    )
    try:
        with compiled_code_only():
            return _run(program, step, needs_grad)
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        reason = "Dynamo's recompile limit is reached"
    except (RefusedError, torch._dynamo.exc.Unsupported) as error:
        refusal = getattr(error, "refusal", None)
        reason = (
            f"{refusal.code}, {refusal.detail}" if refusal is not None else type(error).__name__
        )
        programs.made[key] = None
        if made.dynamic:  # as it would have been without what is known of the sizes
            programs.made[key] = _Made(writer.compile(step, programs.compiler, False), False)
            return evaluate(step, programs, needs_grad)
    except (NotCompiledError, RuntimeError) as error:
        why = reason_not_compiled(error)
        if why is None:
            raise
        reason = why
    LOG.info("%s:%s: cannot be chunked: %s", *step.line, reason)
    return NotImplemented


def _run(program: Program, step: Step, needs_grad: bool) -> Any:
    tensors = (*program.others, *program.own)
    if not needs_grad:
        with _alone(program), torch.no_grad():
            return program.call([t.detach() for t in tensors] if program.static else tensors)
    step = step.with_copies()
    edges = [edge(step.leaves[i]) for i in step.deferred]
    kept: list[Any] = []
    outputs = _Evaluated.apply(program, step, kept, len(edges), *edges, *tensors)
    for formula in program.formulas:
        if isinstance(formula, StepFormula):
            formula.used = True
    (spec,) = kept
    return pytree.tree_unflatten(outputs, spec)


@contextlib.contextmanager
def _alone(program: Program) -> Iterator[None]:
    """The modes that a program itself sets are off around it."""
    with torch.autocast(program.formulas[0].root.device, enabled=False), no_saved_tensors_hooks():
        yield


class _Evaluated(torch.autograd.Function):
    """The results of a program, as a function of its tensors and of the deferred ones."""

    @staticmethod
    @never_compiled
    def forward(
        ctx: Any, program: Program, step: Step, kept: list[Any], n_edges: int, *tensors: Tensor
    ) -> Any:
        tensors = tensors[n_edges:]
        copies = program.copies(step)
        pairs = [(t, copies.get(id(t), t)) for t in (*program.others, *program.own)]
        leaves = [value.detach().requires_grad_(t.requires_grad) for t, value in pairs]
        later = program.use.later
        results = NotImplemented if later is None else _without_gradients(program, tensors)
        is_later = results is not NotImplemented
        if not is_later:
            results = _with_gradients(program, leaves)
        found, spec = pytree.tree_flatten(results)
        kept.append(spec)
        have_grad = tuple(isinstance(r, Tensor) and r.requires_grad for r in found)
        if is_later and later is not None:
            have_grad = later
        ctx.program, ctx.step, ctx.n_edges = program, step, n_edges
        ctx.leaves, ctx.results = leaves, None if is_later else found
        # Gradients of numbers per row are computed in the backward pass in any case.
        is_loss = all(r.numel() == 1 for r, has in zip(found, have_grad, strict=True) if has)
        ctx.pending = _Pending(program.use, have_grad) if is_loss else None
        ctx.save_for_backward(*(t for t, value in pairs if value is t))
        outputs = tuple(_fresh(result) for result in found)
        ctx.mark_non_differentiable(
            *(
                output
                for output, has in zip(outputs, have_grad, strict=True)
                if isinstance(output, Tensor) and not has
            )
        )
        return outputs

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, *upstream: Any) -> Any:
        _ = ctx.saved_tensors  # raises what eager PyTorch raises if one was modified or freed
        edges, tensors = (
            ctx.needs_input_grad[4 : 4 + ctx.n_edges],
            ctx.needs_input_grad[4 + ctx.n_edges :],
        )
        if ctx.pending is not None:
            ctx.pending.asked()
        seen = any(formula.seen for formula in ctx.program.formulas)
        # Compiled code has no second derivative, and does not run in a fork.
        if torch.is_grad_enabled() or seen or not ctx.program.owner.is_usable():
            return None, None, None, None, *_through_logits(ctx, upstream, edges, tensors)
        if ctx.results is None:
            try:
                with compiled_code_only():
                    ctx.results = pytree.tree_leaves(_with_gradients(ctx.program, ctx.leaves))
            except (NotCompiledError, RuntimeError) as error:
                if reason_not_compiled(error) is None:
                    raise
                return None, None, None, None, *_through_logits(ctx, upstream, edges, tensors)
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        with undonated(retained):
            direct = gradients_of(ctx.results, upstream, ctx.leaves, tensors, retain_graph=retained)
        logits = [ctx.step.leaves[i] for i in ctx.step.deferred]
        return None, None, None, None, *no_gradients(logits, edges), *direct


def _with_gradients(program: Program, leaves: Sequence[Tensor]) -> Any:
    with torch.enable_grad(), _alone(program):
        return program.call(leaves)


def _without_gradients(program: Program, tensors: Sequence[Tensor]) -> Any:
    """The results alone; ``NotImplemented`` where a stance forbids to compile that."""
    try:
        with torch.no_grad(), _alone(program):
            return program.call([t.detach() for t in tensors])
    except (NotCompiledError, RuntimeError) as error:
        if reason_not_compiled(error) is None:
            raise
        return NotImplemented


def _through_logits(
    ctx: Any, upstream: Sequence[Any], edges: Sequence[bool], tensors: Sequence[bool]
) -> list[Any]:
    """Gradients with respect to the deferred tensors, from which they flow on."""
    step, n_others = ctx.step, len(ctx.program.others)
    own = iter(tensors[n_others:])
    wants = {id(t): want for t, want in zip(ctx.program.own, own, strict=False)}
    deferred_wants = iter(edges)
    wanted = [
        next(deferred_wants) if i in step.deferred else wants[id(step.leaves[i])]
        for i in step.tensors
    ]
    with modes_of_backward(ctx.program.formulas[0].root):
        found = dict(zip(step.tensors, gradients(step, upstream, wanted), strict=True))
    by_id = {id(step.leaves[i]): g for i, g in found.items() if i not in step.deferred}
    return [
        *(found[i] for i in step.deferred),
        *no_gradients(ctx.program.others, tensors[:n_others]),
        *(by_id[id(t)] for t in ctx.program.own),
    ]


def _fresh(result: Any) -> Any:
    """A result outside of the program's own autograd graph, that may be modified in place."""
    return alias(result) if isinstance(result, Tensor) else result
