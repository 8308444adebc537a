"""Memory: which tensors share storage in a Dynamo graph, and which calls write to it.

    out = torch.zeros(2)
    out[0] = loss             # a setitem node without users: the edges of the graph do not say
    return out.sum()          # that this sum has to run after it

Two calls keep their order if one of them writes to a storage that the other one reads or writes.
The fake tensors that Dynamo leaves tell storages apart: a view, a detached alias and the result of
an in-place op share theirs. What a call writes to is told by its name, by its schema or by its
arguments. (The versions of the fakes tell nothing: making them moves some.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autochunk.find import fake, is_grad_function, is_inplace, op_name

_aten = torch.ops.aten

#: A storage, by the address of its record.
Storage = int

#: Calls that update arguments of theirs without saying so in their name: the positions and names
#: of those, and of the switch that turns this on.
_HIDDEN: Mapping[Any, tuple[tuple[tuple[int, str], ...], tuple[int, str]]] = {
    F.batch_norm: (((1, "running_mean"), (2, "running_var")), (5, "training")),
    F.instance_norm: (((1, "running_mean"), (2, "running_var")), (5, "use_input_stats")),
    **dict.fromkeys(
        (
            torch.batch_norm,
            torch.native_batch_norm,
            _aten.native_batch_norm.default,
            _aten.batch_norm.default,
        ),
        (((3, "running_mean"), (4, "running_var")), (5, "training")),
    ),
    torch.instance_norm: (((3, "running_mean"), (4, "running_var")), (5, "use_input_stats")),
    F.embedding: (((1, "weight"),), (3, "max_norm")),
    F.embedding_bag: (((1, "weight"),), (3, "max_norm")),
}
_MISSING = object()


@dataclass(frozen=True)
class Access:
    """What one call does to memory.

    Attributes:
        reads: Storages of its arguments, but for a view, which reads nothing.
        writes: Storages that it writes to.
        hidden: Whether functionalisation does not see the writes.
    """

    reads: frozenset[Storage] = frozenset()
    writes: frozenset[Storage] = frozenset()
    hidden: bool = False


@dataclass(frozen=True)
class Memory:
    """The memory of one Dynamo graph.

    Attributes:
        accesses: Of each call that takes tensors; empty if nothing in the graph is written to.
        holders: The nodes whose values live in a storage, in graph order.
        written: Storages that some call writes to.
    """

    accesses: Mapping[fx.Node, Access]
    holders: Mapping[Storage, tuple[fx.Node, ...]]
    written: frozenset[Storage]

    @staticmethod
    def of(graph: fx.Graph) -> Memory:
        """The memory of a graph whose nodes carry ``meta["example_value"]``."""
        holders: dict[Storage, list[fx.Node]] = {}
        for node in graph.nodes:
            for storage in storages(fake(node)):
                holders.setdefault(storage, []).append(node)
        writers = {node: found for node in graph.nodes if (found := _written_by(node)) is not None}
        written = frozenset().union(*(access.writes for access in writers.values()))
        accesses = {}
        for node in graph.nodes if written else ():
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            write = writers.get(node, Access())
            reads = _taken(node) if node in writers else _taken(node) - _viewed(node)
            accesses[node] = Access(reads, write.writes, write.hidden)
        return Memory(accesses, {s: tuple(nodes) for s, nodes in holders.items()}, written)

    def access(self, node: fx.Node) -> Access:
        return self.accesses.get(node, Access())

    def base(self, storage: Storage) -> fx.Node | None:
        """The node that made a storage; None where several inputs of the graph share it."""
        nodes = [n for n in self.holders[storage] if isinstance(fake(n), Tensor)]
        inputs = [n for n in nodes if n.op in ("placeholder", "get_attr")]
        return nodes[0] if nodes and len(inputs) <= 1 else None

    def is_input(self, storage: Storage) -> bool:
        """Whether a storage exists before the graph runs, and after it."""
        nodes = self.holders.get(storage, ())
        return any(n.op in ("placeholder", "get_attr") for n in nodes)

    def dependents(
        self, graph: fx.Graph, heads: Collection[fx.Node]
    ) -> dict[fx.Node, Conflict | None]:
        """Nodes that have to run after ``heads``, themselves included, without the output.

        Returns:
            In graph order. For each node why: None, if one of its arguments is such a node.
        """
        reached: dict[fx.Node, Conflict | None] = {}
        last_reader: dict[Storage, fx.Node] = {}
        last_writer: dict[Storage, fx.Node] = {}
        for node in graph.nodes:
            if node.op == "output":
                continue
            access = self.access(node)
            if node in heads or any(arg in reached for arg in node.all_input_nodes):
                reached[node] = None
            else:
                conflict = _first_conflict(node, access, last_reader, last_writer)
                if conflict is None:
                    continue
                reached[node] = conflict
            last_reader.update(dict.fromkeys(access.reads, node))
            last_writer.update(dict.fromkeys(access.writes, node))
        return reached

    def reordered(
        self, graph: fx.Graph, inside: Collection[fx.Node]
    ) -> tuple[fx.Node, fx.Node] | None:
        """Two calls whose order matters and would change if ``inside`` ran after all others.

        Returns:
            The one that is inside and runs first today, and the one that is not. None if there
            are no such calls.
        """
        touched: dict[Storage, list[tuple[fx.Node, bool]]] = {}
        for node in graph.nodes:
            access = self.access(node)
            for storage in access.reads | access.writes:
                writes = storage in access.writes
                if node not in inside:
                    for earlier, wrote in touched.get(storage, ()):
                        if writes or wrote:
                            return earlier, node
                else:
                    touched.setdefault(storage, []).append((node, writes))
        return None


@dataclass(frozen=True)
class Conflict:
    """Why a node has to stay behind one that it does not take a value of.

    Attributes:
        storage: What both of them use.
        reader, writer: The two nodes, by what they do to it; both may write.
    """

    storage: Storage
    reader: fx.Node
    writer: fx.Node


def _first_conflict(
    node: fx.Node,
    access: Access,
    last_reader: Mapping[Storage, fx.Node],
    last_writer: Mapping[Storage, fx.Node],
) -> Conflict | None:
    for storage in sorted(access.reads | access.writes):
        if storage in last_writer:
            return Conflict(storage, reader=node, writer=last_writer[storage])
        if storage in last_reader and storage in access.writes:
            return Conflict(storage, reader=last_reader[storage], writer=node)
    return None


def storages(value: Any) -> frozenset[Storage]:
    """The storages that a value's tensors live in; those inside of a wrapper subclass."""
    if isinstance(value, (tuple, list)):
        return frozenset().union(*map(storages, value))
    if not isinstance(value, Tensor):
        return frozenset()
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        return frozenset().union(*(storages(getattr(value, name)) for name in names))
    try:
        return frozenset({value.untyped_storage()._cdata})
    except (RuntimeError, NotImplementedError):  # sparse and opaque tensors have none
        return frozenset()


def is_alias(node: fx.Node) -> bool:
    """Whether a call only gives an argument's storage another name."""
    return bool(_viewed(node)) and _written_by(node) is None


def written_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments that an in-place call writes to; the first one is what it returns."""
    if _written_by(node) is None:
        return ()
    written = node.kwargs.get("out")
    if written is None:
        written = node.args[0] if node.args else None
    return tuple(n for n in pytree.tree_leaves(written) if isinstance(n, fx.Node))


def _viewed(node: fx.Node) -> frozenset[Storage]:
    """Storages that a call's results share with its arguments, and that it does not read then."""
    if node.op not in ("call_function", "call_method"):
        return frozenset()
    if node.target is getattr or op_name(node) in ("size", "dim", "numel", "stride"):
        return _taken(node)
    return storages(fake(node)) & _taken(node)


def _taken(node: fx.Node) -> frozenset[Storage]:
    """Storages of a call's arguments."""
    return storages([fake(arg) for arg in node.all_input_nodes])


def _written_by(node: fx.Node) -> Access | None:
    """What a call writes to; None for one that writes to nothing."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return None
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _written_by_body(node, target)
    if target in _HIDDEN:
        arguments, switch = _HIDDEN[target]
        on = _argument(node, *switch) not in (_MISSING, None, False)
        written = (_argument(node, *argument) for argument in arguments)
        return _writing(written, hidden=True) if on else None
    if isinstance(target, torch._ops.OpOverload):
        return _written_by_schemas(node, [target])
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
        return _written_by_schemas(node, [o for o in overloads if "out" not in o._overloadname])
    if node.op == "call_module" or is_grad_function(target):
        return None  # neither enters a cone
    if node.kwargs.get("out") is not None:
        return _writing([node.kwargs["out"]])
    if is_inplace(node) or _is_inplace_function(node):
        return _writing(node.args[:1])
    return None


def _is_inplace_function(node: fx.Node) -> bool:
    """``F.relu(x, inplace=True)``, ``torch._foreach_add_``: an in-place call of a function."""
    if node.op != "call_function" or not node.args:
        return False
    name = op_name(node)
    if name.endswith("_") and not name.endswith("__"):
        return True
    # An in-place switch is the last argument of a function whose result is its first argument.
    switched = any(arg is True for arg in (*node.args[1:], node.kwargs.get("inplace")))
    return switched and bool(storages(fake(node)) & storages(_fake_of(node.args[0])))


def _written_by_schemas(node: fx.Node, targets: Sequence[torch._ops.OpOverload]) -> Access | None:
    written = [
        value
        for target in targets
        for i, spec in enumerate(target._schema.arguments)
        if spec.alias_info is not None
        and spec.alias_info.is_write
        and (value := _argument(node, i, spec.name)) is not _MISSING
    ]
    known = all(target.namespace in ("aten", "prims") for target in targets)
    return _writing(written, hidden=not known) if written else None


def _written_by_body(node: fx.Node, target: Any) -> Access | None:
    """A higher-order op writes to all of its arguments if a body writes to one of them."""
    if "mutation" in str(target) or "functionalized" in str(target):
        return _writing(node.all_input_nodes, hidden=True)
    module = node.graph.owning_module
    for arg in node.all_input_nodes:
        body = getattr(module, str(arg.target), None) if arg.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            inner = Memory.of(body.graph)
            if any(map(inner.is_input, inner.written)):
                return _writing(node.all_input_nodes, hidden=True)
    return None


def _writing(values: Iterable[Any], hidden: bool = False) -> Access:
    found = storages([_fake_of(value) for value in values])
    return Access(found, found, hidden)


def _fake_of(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_fake_of(v) for v in value]
    return fake(value) if isinstance(value, fx.Node) else None


def _argument(node: fx.Node, position: int, name: str) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if position < len(node.args) else _MISSING
