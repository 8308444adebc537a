"""Entering: deferred logits as arguments of another function that this backend compiles.

    loss = compiled_loss(compiled_model(x), y)      # or one function, with a graph break in it

To the first, the second's graph is one more op on its logits: it is evaluated as recorded ops are,
and the logits never exist. Views of the logits that it returns are made one by one, so that they
share the logits' memory. Where that is not possible, the graph is compiled as it is and the logits
are computed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from autochunk.deferred import DeferredTensor
from autochunk.evaluation import Programs, evaluate
from autochunk.find import fake, is_grad_function, is_inplace, is_random, op_name, source_line
from autochunk.memory import Memory, storages
from autochunk.modes import MODES
from autochunk.sink import ancestors
from autochunk.source import as_function
from autochunk.stance import reason_not_compiled
from autochunk.steps import is_intercepted, is_open, record
from autochunk.writes import name_of

LOG = logging.getLogger("autochunk.deferred")


def enter(gm: fx.GraphModule, compiler: Callable[..., Any]) -> Entered | None:
    """The compiled function for a graph with deferred logits among its inputs.

    Args:
        gm: Dynamo's graph.
        compiler: Compiles a graph, and refuses where a head is not chunked if ``required``.

    Returns:
        None if no input is deferred, or if the graph is to be called with the logits' values.
    """
    has_deferred, has_views = _has_deferred(gm), any(map(_is_view, gm.graph.nodes))
    if not has_deferred and not has_views:
        return None
    memory = Memory.of(gm.graph)
    if has_deferred:
        views = _views_of_deferred(gm.graph)
        reason = _refusal(gm, memory, views)
        if reason is None:
            function = as_function(gm.graph)
            return Entered(function, compiler, _is_dynamic(gm), split(gm.graph, views))
        LOG.info("logits that enter a compiled function are computed: %s", reason)
    written = _written(gm.graph, memory)
    if has_views or written:
        # AOTAutograd does not compile a write to a tensor subclass that has a gradient. And it
        # would take the history that a view had before somebody wrote to the whole.
        function = as_function(gm.graph)
        return Entered(function, compiler, _is_dynamic(gm), with_values=True, written=written)
    return None


def _has_deferred(gm: fx.GraphModule) -> bool:
    """Whether deferred logits that are not computed yet are among a Dynamo graph's inputs."""
    return any(map(_is_deferred, gm.graph.nodes))


def _is_deferred(node: fx.Node) -> bool:
    example = _example(node)
    return example is not None and is_open(example)


def _is_view(node: fx.Node) -> bool:
    """Whether an input is a view of deferred logits, computed or not."""
    example = _example(node)
    return example is not None and getattr(example._formula, "is_view", False)


def _example(node: fx.Node) -> DeferredTensor | None:
    argument = node.meta.get("grapharg") if node.op == "placeholder" else None
    example = argument.example if argument is not None else None
    return example if type(example) is DeferredTensor else None


def _written(graph: fx.Graph, memory: Memory) -> frozenset[int]:
    """Positions of the inputs that are deferred tensors, computed or not, and are written to."""
    given = [node for node in graph.nodes if node.op == "placeholder"]
    return frozenset(
        i
        for i, node in enumerate(given)
        if (_is_deferred(node) or _is_view(node))
        and not memory.written.isdisjoint(storages(fake(node)))
    )


def _views_of_deferred(graph: fx.Graph) -> dict[int, fx.Node]:
    """What a graph returns that shares memory with deferred logits, by position."""
    given = [storages(fake(node)) for node in graph.nodes if _is_deferred(node)]
    logits = frozenset().union(*given)
    return {
        i: node
        for i, node in enumerate(_returned(graph))
        if isinstance(node, fx.Node) and not logits.isdisjoint(storages(fake(node)))
    }


def _returned(graph: fx.Graph) -> Sequence[Any]:
    return graph.output_node().args[0]  # Dynamo's is a tuple


@dataclass(frozen=True)
class Parts:
    """A graph in two functions of the same arguments.

    Attributes:
        views: Makes the views of deferred logits that it returns.
        rest: Computes its other results; None if there are none.
        places: Of the views among the results.
    """

    views: Callable[..., Any]
    rest: Callable[..., Any] | None
    places: tuple[int, ...]

    def joined(self, rest: Sequence[Any], views: Sequence[Any]) -> tuple[Any, ...]:
        """The graph's results from those of the two."""
        others, made = iter(rest), iter(views)
        number = len(rest) + len(views)
        return tuple(next(made if i in self.places else others) for i in range(number))


def split(graph: fx.Graph, views: Mapping[int, fx.Node]) -> Parts | None:
    """A graph without the ``views`` that it returns, and these; None if it returns none."""
    if not views:
        return None
    rest = [node for i, node in enumerate(_returned(graph)) if i not in views]
    behind = ancestors(list(views.values()))
    return Parts(
        views=as_function(_with_outputs(graph, list(views.values()), behind)),
        rest=as_function(_with_outputs(graph, rest, set(graph.nodes))) if rest else None,
        places=tuple(views),
    )


def _with_outputs(graph: fx.Graph, outputs: Sequence[Any], kept: Collection[fx.Node]) -> fx.Graph:
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or (node in kept and node.op != "output"):
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(fx.map_arg(tuple(outputs), copies.__getitem__))
    return made


def _is_dynamic(gm: fx.GraphModule) -> bool:
    """Whether the graph is compiled for more than one size."""
    values = [fake(node) for node in gm.graph.nodes if node.op == "placeholder"]
    sizes = [s for v in values for s in (v.shape if isinstance(v, Tensor) else [v])]
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _refusal(gm: fx.GraphModule, memory: Memory, views: Mapping[int, fx.Node]) -> str | None:
    """Why a graph cannot be evaluated as an op on its inputs, if it cannot.

    Writes to tensors that the graph has made are its own business.
    """
    for node in gm.graph.nodes:
        name = op_name(node)
        if views and node.target in MODES:
            return f"a view is returned, and {name} is called, {source_line(node)}"
        if isinstance(node.target, torch._ops.HigherOrderOperator) or is_grad_function(node.target):
            return f"{name} is a higher-order op, {source_line(node)}"
        if node.op in ("call_module", "get_attr"):
            return f"{name} is an attribute"
        if name.endswith("_increment_nesting"):
            return f"inside of a torch.func transform, {source_line(node)}"
        if is_random(node):
            return f"{name} may be random, {source_line(node)}"
        written = memory.access(node).writes
        given = [storage for storage in sorted(written) if memory.is_input(storage)]
        if given:
            return f"{name} writes to {name_of(memory, given[0])}, {source_line(node)}"
        if is_inplace(node) and not written:
            return f"{name} writes to a tensor, {source_line(node)}"
    return None


class Entered:
    """A compiled function that deferred logits are passed to.

    With ``with_values`` it is always called with the logits' values. The graph writes to those of
    its arguments whose positions are ``written``.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        compiler: Callable[..., Any],
        dynamic: bool,
        parts: Parts | None = None,
        *,
        with_values: bool = False,
        written: frozenset[int] = frozenset(),
    ) -> None:
        self._function = function
        self._dynamic = dynamic
        self._parts = parts
        self._with_values = with_values
        self._written = written
        self._programs = Programs(functools.partial(compiler, required=True))
        alone = functools.partial(compiler, required=False)
        self._alone = torch.compile(function, backend=alone, fullgraph=True)

    def __call__(self, *args: Any) -> Any:
        found = NotImplemented if self._with_values else self._evaluate(args)
        if found is not NotImplemented:
            return found
        values = [
            a._become(i in self._written) if type(a) is DeferredTensor else a
            for i, a in enumerate(args)
        ]
        if not self._programs.is_usable():
            return self._function(*values)
        try:
            return self._alone(*values)
        except torch._dynamo.exc.Unsupported as error:
            LOG.warning("a graph that deferred logits enter runs op by op: %s", error.msg)
            return self._function(*values)
        except RuntimeError as error:
            if reason_not_compiled(error) is None:
                raise
            return self._function(*values)

    def _evaluate(self, args: Sequence[Any]) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        deferred = [tensor for tensor in tensors if type(tensor) is DeferredTensor]
        if not deferred or is_intercepted() or not all(map(is_open, deferred)):
            return NotImplemented
        if not self._programs.is_usable():
            return NotImplemented
        if self._parts is None:
            return self._evaluated(self._function, args)
        rest: Any = ()
        if self._parts.rest is not None:
            rest = self._evaluated(self._parts.rest, args)
        if rest is NotImplemented:
            return NotImplemented
        return self._parts.joined(rest, self._parts.views(*args))

    def _evaluated(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        leaves, spec = pytree.tree_flatten((args, {}))
        needs_grad = torch.is_grad_enabled() and any(
            arg.requires_grad for arg in args if isinstance(arg, Tensor)
        )
        step = record(function, function, leaves, spec, (float, int), self._dynamic)
        return evaluate(step, self._programs, needs_grad)
