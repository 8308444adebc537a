"""Weights: wide products that an adapter makes of parameters alone; they are no heads.

    norm = torch.linalg.norm(weight + scaling * (lora_B @ lora_A), dim=1)     # DoRA
    logits = (magnitude / norm) * (F.linear(x, weight) + …)

``lora_B @ lora_A``, or ``lora_B(lora_A(eye))``, widens from the adapter's rank to the hidden size,
and is reduced to a number for each of its rows. But its rows are words of the vocabulary (or hidden
features), and all rows of the logits need all of them: as one more head it would make the real one
depend on all logits of another.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, fx, nn

from autochunk.find import LAYERS, fake, hint, op_name, parse_linear, tensors_of
from autochunk.memory import Memory
from autochunk.types import NARROW, Candidate, Refusal


def refuse_weights(
    graph: fx.Graph, memory: Memory, candidates: Sequence[Candidate]
) -> dict[str, Refusal]:
    """Refusals of the candidates that take part in what the batch is multiplied with.

    Such a one depends on parameters and constants only, and meets a product that depends on the
    batch in a value of about that one's size. A loss of parameters that is added to the batch's
    meets it in one number, and stays a candidate.
    """
    given = [node for node in graph.nodes if _is_of_batch(node)]
    batch = memory.dependents(graph, given)
    constant = [candidate for candidate in candidates if candidate.node not in batch]
    if not constant:
        return {}
    met = _of_a_products_size(graph, batch.keys())
    refusals = {}
    for candidate in constant:
        cone = memory.dependents(graph, [candidate.node])
        if not met.isdisjoint(cone):
            detail = "made of parameters and constants, it enters what is computed of a batch"
            refusals[candidate.name] = Refusal(
                "weight", op_name(candidate.node), detail, candidate.source
            )
    return refusals


def _is_of_batch(node: fx.Node) -> bool:
    """Whether a node is an input of the graph that is no parameter."""
    value = fake(node)
    return (
        node.op == "placeholder"
        and isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
    )


def _of_a_products_size(graph: fx.Graph, batch: Collection[fx.Node]) -> set[fx.Node]:
    """Nodes whose value is about as large as a product of the batch that they are computed from."""
    least: dict[fx.Node, int] = {}  # elements of the smallest product behind a node
    found = set()
    for node in graph.nodes:
        sizes = [hint(tensor.numel()) for tensor in tensors_of(fake(node))]
        before = [least[arg] for arg in node.all_input_nodes if arg in least]
        if node in batch and (parse_linear(node) is not None or node.target in LAYERS):
            before += sizes
        if before:
            least[node] = min(before)
            if any(size * NARROW > least[node] for size in sizes):
                found.add(node)
    return found
