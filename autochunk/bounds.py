"""Indices that come from the user's data are checked before Inductor's CPU kernels read by them.

The head's own indices are checked before its loop (``runtime.check_indices``). Others stay in the
graph that Inductor compiles: token ids into the embedding, labels into class weights, a selection
of rows. There a CPU kernel asserts the range inside of a parallel loop, where the error cannot be
caught and ends the process. Here an op before each such read raises eager's ``IndexError``.

    embedding(table, ids)  →  embedding(table, checked(ids, size, …))

Only indices computed from integers that enter the graph are checked, against sizes that are not
symbolic; a copy of them is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from autochunk.donation import OwnPass, with_pass
from autochunk.find import source_line

aten = torch.ops.aten


@torch.library.custom_op(
    "autochunk::checked",
    mutates_args=(),
    schema="(Tensor index, int dim, int size, bool wraps, str source) -> Tensor",
)
def checked(index: Tensor, dim: int, size: int, wraps: bool, source: str) -> Tensor:
    """A copy of ``index``, whose numbers all address one of ``size`` places.

    Raises:
        IndexError: naming the first number that does not, and the user's line.
    """
    bad = (index >= size) | (index < (-size if wraps else 0))
    if bad.any():
        where = f" ({source})" if source else ""
        raise IndexError(
            f"index {int(index[bad][0])} is out of bounds for dimension {dim} "
            f"with size {size}{where}"
        )
    return index.clone()


@checked.register_fake
def _(index: Tensor, dim: int, size: int, wraps: bool, source: str) -> Tensor:
    return index.clone()


def index_checking(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor options with the pass added, before passes of the user's own."""
    return with_pass(patches, "post_grad_custom_pre_pass", _CheckIndices)


class _CheckIndices(OwnPass):
    def run(self, graph: fx.Graph) -> None:
        check_indices(graph)


def check_indices(graph: fx.Graph) -> None:
    """Puts a check before each read of a CPU tensor by indices that come from the user."""
    given: dict[fx.Node, bool] = {}
    for node in list(graph.nodes):
        for index, dim, wraps in _reads(node):
            size = node.args[0].meta["val"].shape[dim]
            if not isinstance(size, int) or not _is_given(index, given):
                continue
            with graph.inserting_before(node):
                made = graph.call_function(
                    torch.ops.autochunk.checked.default,
                    (index, dim, size, wraps, source_line(node)),
                )
            made.meta = {**index.meta, "val": index.meta["val"].clone()}
            node.replace_input_with(index, made)


def _reads(node: fx.Node) -> Iterator[tuple[fx.Node, int, bool]]:
    """(index, dimension it addresses, whether negative numbers count from the end)."""
    if node.target is aten.embedding.default:
        yield node.args[1], 0, False
    elif node.target in (aten.gather.default, aten.index_select.default):
        dim = node.args[1] % max(node.args[0].meta["val"].dim(), 1)
        yield node.args[2], dim, False
    elif node.target is aten.index.Tensor:
        dim = 0
        for index in node.args[1]:
            mask = index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)
            if index is not None and not mask:
                yield index, dim, True
            dim += index.meta["val"].dim() if mask else 1


def _is_given(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether CPU indices are computed from the graph's inputs, by integers only."""
    if node not in known:
        val = node.meta.get("val")
        if not isinstance(val, Tensor) or val.dtype == torch.bool:
            return False  # a size or a mask: says nothing either way
        if val.is_floating_point() or val.is_complex() or val.device.type != "cpu":
            known[node] = False
        elif node.op == "placeholder":
            known[node] = True
        else:
            known[node] = any(_is_given(arg, known) for arg in node.all_input_nodes)
    return known[node]
