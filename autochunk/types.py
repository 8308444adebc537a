"""The values that flow from stage to stage; frozen, no behaviour beyond small derived facts.

Terms
    head        a linear layer whose output is much larger than its input: the candidate.
    row         one token: every dimension of the logits but the vocabulary, flattened.
    wide        a value with about as many features a row as the logits have.
    narrow      a value with far fewer features a row (a log-probability, a top-5).
    body        the graph of one region on ``[rows, *features]`` tensors, any number of rows.
    outer       everything that stays in the user's graph.
    boundary    an op that touches rows (a sum over tokens): the body ends before it.
    tail        the outer nodes that depend on the body's outputs, down to the loss.
    cotangent   the derivative of the loss with respect to a body's output, one per output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import ShortenTraceback

#: A value is narrow if its features per row are at most this share of the logits'.
NARROW = 8

#: Every code a refusal can carry, and what it tells the user. The docs' table is made of this.
REFUSAL_CODES: Mapping[str, str] = {
    "small": "The logits take fewer bytes than `min_bytes`; chunking would not pay.",
    "single-row": "The head is applied to one row, or to none; there is nothing to chunk.",
    "dynamic-features": "A number of features (the vocabulary, the hidden size) is symbolic and "
    "does not come from a parameter, so each new number would be compiled anew; or it is marked "
    "as dynamic, and then it must not be specialised.",
    "feeds-layer": "The wide output feeds another layer (an MLP's or attention's projection), "
    "so it is not a head whose output is reduced.",
    "weight": "The product is made of parameters and constants alone (an adapter's "
    "`lora_B @ lora_A`), and what a layer makes of a batch is scaled with it: its rows are no "
    "tokens.",
    "other-product": "The head is no linear: a product with another weight for each batch (`bmm`, "
    "`matmul`, `einsum`), or a convolution whose kernel reads several positions.",
    "not-reduced": "Nothing reduces the logits to a few numbers per row: nothing uses them, or the "
    "function given to `chunked_linear` returns them.",
    "mixes-rows": "An op on the logits mixes rows (a softmax over the batch, a sort across "
    "tokens, a cumulative sum over time), so no chunk of rows can compute it alone.",
    "no-rule": "No rule states that this op treats rows independently.",
    "misaligned": "An op combines the logits with a tensor whose rows are not theirs: another "
    "order, another selection or another number of rows.",
    "two-pass": "An op on the logits, or the head itself, needs a number that is computed from "
    "all the logits of this head or of another.",
    "random": "The op draws random numbers; a chunk would draw others.",
    "mutation": "The head's computation writes to a tensor, or shares it with a call that does, in "
    "a way that has no functional form: unseen by autograd although the tensor has a gradient, "
    "inside of an op (running statistics, a custom operator), to memory that two inputs share; or "
    "the logits are written to a tensor that outlives the call.",
    "higher-order": "The head is inside a higher-order op (`torch.cond`, `while_loop`, "
    "`torch.utils.checkpoint`) or a `torch.func` transform, or its output enters one.",
    "tensor-subclass": "A tensor that the head's computation reads is of a subclass with ops of "
    "its own (quantised, nested, distributed), so what they compute cannot be known here.",
    "custom-function": "The logits enter a custom autograd Function or a custom operator.",
    "not-fusable": 'The option `strategy="fused"` was given, but the loss is not affine in the '
    "per-row values, or they reach more than one loss; their gradients are not known in advance.",
    "unsupported-graph": "The graph has a construct that cannot be lowered to ATen ops here: it "
    "calls `torch.autograd.grad` or `backward` on what the logits lead to "
    "(`torch._dynamo.config.trace_autograd_ops`), or returns logits whose number of rows depends "
    "on data (`logits[mask]` with `capture_dynamic_output_shape_ops`).",
    "internal-error": "The rewrite of this head raised an exception that nobody expected, a fault "
    "of autochunk: please report it. The other heads of the graph are chunked.",
}


@dataclass(frozen=True)
class Refusal:
    """Why a head was left alone.

    Attributes:
        code: A key of :data:`REFUSAL_CODES`.
        op: The op that ended the analysis, as the user would write it.
        detail: One sentence with the particulars.
        source: ``file:line`` and the code there, the user's own, empty where unknown.
    """

    code: str
    op: str
    detail: str
    source: str = ""

    def __post_init__(self) -> None:
        if self.code not in REFUSAL_CODES:
            raise KeyError(f"no refusal code {self.code!r}")


class RefusedError(ShortenTraceback, ValueError):
    """What was asked to be chunked cannot be (only raised by ``autochunk.chunked_linear``).

    Attributes:
        refusal: The reason.
    """

    def __init__(self, refusal: Refusal) -> None:
        where = f" ({refusal.source})" if refusal.source else ""
        message = f"autochunk: cannot chunk this: {refusal.op}: {refusal.detail}{where}"
        help_ = f"{refusal.code}: {REFUSAL_CODES[refusal.code]}"
        super().__init__(f"{message}. {help_}", first_useful_frame=None)  # type: ignore[call-arg]
        self.refusal = refusal


@dataclass(frozen=True)
class Candidate:
    """A head found in the Dynamo graph.

    Attributes:
        node: The linear's node.
        x, weight, bias: Nodes of its operands.
        weight_layout: ``"VH"`` (``F.linear``) or ``"HV"`` (``x @ W``); ``"KVH"`` or ``"KHV"`` where
            V is several dimensions of the weight; ``"conv"`` for a kernel of one, with the features
            in dimension 1 of the operand and of the result.
        rows: Number of rows, an int or a SymInt.
        in_features, out_features: H and V.
        logits_bytes: Bytes of the output in its own dtype, from size hints.
        source: The user's line.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    weight_layout: str
    rows: int | torch.SymInt
    in_features: int
    out_features: int
    logits_bytes: int
    source: str

    @property
    def name(self) -> str:
        return self.node.name


@dataclass(frozen=True)
class Lowered:
    """The candidates' cones as one functional ATen graph.

    Attributes:
        graph: Placeholders are the cone's inputs; outputs the cone's values that the Dynamo
            graph returns, then what it writes to tensors that exist before. Every node has
            ``meta["val"]`` (a fake tensor or a number).
        inputs: The Dynamo node of each placeholder.
        outputs: The Dynamo node of each output but the writes.
        writes: The Dynamo node that each of the last outputs is written to.
        heads: The candidate of each head's ``mm``/``addmm`` node.
        needs_grad: Nodes through which a gradient flows.
        cone: The Dynamo nodes that this graph replaces.
        inside: The Dynamo nodes that it computes: the cone, and what is needed for it alone or
            computed twice.
    """

    graph: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]
    heads: Mapping[fx.Node, Candidate]
    needs_grad: frozenset[fx.Node]
    cone: frozenset[fx.Node]
    inside: frozenset[fx.Node]

    @property
    def sources(self) -> Mapping[fx.Node, fx.Node]:
        """The Dynamo node of each placeholder."""
        placeholders = (node for node in self.graph.graph.nodes if node.op == "placeholder")
        return dict(zip(placeholders, self.inputs, strict=True))

    @property
    def results(self) -> tuple[Any, ...]:
        """The values of ``outputs`` and of ``writes``."""
        output = self.graph.graph.output_node()
        return tuple(output.args[0])

    @property
    def written(self) -> Mapping[fx.Node, Any]:
        """The value that each of ``writes`` gets."""
        return dict(zip(self.writes, self.results[len(self.outputs) :], strict=True))


@dataclass(frozen=True, eq=False)
class RowOp:
    """A selection or reordering of rows: applied to the body's inputs instead of the logits.

    Compared by identity (a SymInt has no hash); a walk makes equal ones the same object.

    Attributes:
        target: The ATen op. Its first argument is ``[*in_shape, *features]``.
        args: Its other arguments, in terms of row dimensions; tensors are lowered nodes.
        in_shape: Row shape before.
        out_shape: Row shape after.
    """

    target: Any
    args: tuple[Any, ...]
    in_shape: tuple[int | torch.SymInt, ...]
    out_shape: tuple[int | torch.SymInt, ...]


@dataclass(frozen=True)
class RowValue:
    """A value inside a body: ``[rows, *features]`` there, something else to the user.

    Attributes:
        node: Its node in the body's graph.
        is_row: For each of the user's dimensions, whether it is a row dimension. Dimensions of
            static size 1 are always features. Features are stored in the user's order.
        shape: The user's shape.
        chain: The row ops that led from the head's rows to these.
        heads: The heads it was computed from.
        needs_grad: Whether a gradient flows through it.
        val: A fake tensor with its dtype and device.
        selected: Row ops that are done on the result instead of the inputs: ``node`` has the rows
            before them, the user's value those after.
    """

    node: fx.Node
    is_row: tuple[bool, ...]
    shape: tuple[int | torch.SymInt, ...]
    chain: tuple[RowOp, ...]
    heads: frozenset[str]
    needs_grad: bool
    val: torch.Tensor
    selected: tuple[RowOp, ...] = ()

    @property
    def rows(self) -> int | torch.SymInt:
        return prod(self.computed_row_shape)

    @property
    def computed_row_shape(self) -> tuple[int | torch.SymInt, ...]:
        return self.selected[0].in_shape if self.selected else self.row_shape

    @property
    def row_shape(self) -> tuple[int | torch.SymInt, ...]:
        return tuple(s for s, row in zip(self.shape, self.is_row, strict=True) if row)

    @property
    def features(self) -> tuple[int | torch.SymInt, ...]:
        return tuple(s for s, row in zip(self.shape, self.is_row, strict=True) if not row)


@dataclass(frozen=True)
class RowInput:
    """A row-aligned input of a body: a lowered node, and how its dimensions lie to the rows.

    Attributes:
        source: The lowered (outer) node.
        is_row: The layout of the value it met, as ``RowValue.is_row``; the source is aligned
            from the right, as broadcasting does.
        row_shape: The rows it is expanded to.
        chain: The row ops already applied when it was met.
        own: Row ops of its own, applied before the rest of the region's chain.
        repeated: Dimensions of the source along which all its numbers are the same (it is a view
            with stride zero there): only the first of them is read.
        position: A row dimension: the input is not the source, but where a row stands in it along
            that dimension.
    """

    source: fx.Node
    is_row: tuple[bool, ...]
    row_shape: tuple[int | torch.SymInt, ...]
    chain: tuple[RowOp, ...]
    own: tuple[RowOp, ...] = ()
    repeated: tuple[int, ...] = ()
    position: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64 if self.position is not None else self.source.meta["val"].dtype

    @property
    def shape(self) -> tuple[int | torch.SymInt, ...]:
        """The source's shape, of which only the first is read where it repeats itself."""
        shape = self.source.meta["val"].shape
        return tuple(1 if d in self.repeated else s for d, s in enumerate(shape))


@dataclass(frozen=True)
class IndexCheck:
    """Indices that come from the user and pick a feature: checked before the loop.

    Attributes:
        graph: Computes them from ``row_inputs``, ``[rows, ...]``, then ``shared_inputs``.
        row_inputs: Positions in the region's row inputs.
        shared_inputs: Positions in the region's shared inputs.
        size: Number of features they may address.
        wraps: Whether negative indices count from the end.
        source: The user's line.
    """

    graph: fx.GraphModule
    row_inputs: tuple[int, ...]
    shared_inputs: tuple[int, ...]
    size: int
    wraps: bool
    source: str


@dataclass(frozen=True)
class Region:
    """Heads and row-parallel ops that run chunk by chunk as one loop.

    Attributes:
        name: ``region0``, …
        body: Placeholders are the row inputs, then the shared inputs; returns the outputs.
        row_inputs: ``[rows, *features]`` each, once prepared by the rewrite.
        shared_inputs: Lowered nodes passed whole to every chunk (weights, biases, scalars).
        outputs: One value of each body output (several may share a body node, as views do).
        chain: The row ops to apply to the row inputs.
        heads: Names of the heads inside.
        checks: Index ranges to verify.
        all_checked: Whether that is all indices there are; others depend on the logits.
        row_grads, shared_grads: Positions of the inputs that need a gradient.
        rows: Number of rows.
        wide_features: Elements per row of its logits, or of a wider value.
        wide_itemsize: Bytes per element of the widest value's chunk buffer.
        saved_bytes: Bytes of the logits at full size (hinted), for the report.
    """

    name: str
    body: fx.GraphModule
    row_inputs: tuple[RowInput, ...]
    shared_inputs: tuple[fx.Node, ...]
    outputs: tuple[RowValue, ...]
    chain: tuple[RowOp, ...]
    heads: frozenset[str]
    checks: tuple[IndexCheck, ...]
    all_checked: bool
    row_grads: tuple[int, ...]
    shared_grads: tuple[int, ...]
    rows: int | torch.SymInt
    wide_features: int
    wide_itemsize: int
    saved_bytes: int

    @property
    def grad_outputs(self) -> tuple[int, ...]:
        """Positions of the outputs that carry a gradient."""
        if not self.row_grads and not self.shared_grads:
            return ()
        return tuple(i for i, out in enumerate(self.outputs) if out.needs_grad)


@dataclass(frozen=True)
class Split:
    """A reduction over rows *and* features, cut in two: features in the body, rows outside.

    The outer op is the user's own, with its first argument replaced, or ``outer``.

    Attributes:
        inner: The body's part: features reduced with ``keepdim=True``.
        kwargs: Keyword arguments the outer op gets in addition.
        outer: Several ops in its place: called with a function that applies an op, and with the
            inner value in the user's shape.
    """

    inner: RowValue
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    outer: Callable[[Callable[..., Any], Any], Any] | None = None


@dataclass(frozen=True)
class Lifted:
    """The outcome of lifting: the regions, or per head the reason why not.

    Attributes:
        regions: Zero or more regions; together they hold every head that was not refused.
        refusals: By head name.
        values: The body value of each lowered node that the outer graph reads from a region.
        splits: Tail nodes whose first argument is replaced by a region's output.
        tail: Lowered nodes outside of the regions that depend on their outputs, in order.
        deferred: Lowered outputs that are wide: the logits themselves, returned to the user.
        merging: Views of wide values that merge rows with features. If there are any there is
            nothing else: they are to be moved first (``merging.py``).
    """

    regions: tuple[Region, ...]
    refusals: Mapping[str, Refusal]
    values: Mapping[fx.Node, RowValue]
    splits: Mapping[fx.Node, Split]
    tail: tuple[fx.Node, ...]
    deferred: tuple[fx.Node, ...]
    merging: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Cotangents:
    """Known in advance: the loss is affine in a region's outputs.

    Attributes:
        loss: The lowered node of the scalar that all gradients of the region pass through.
        graph: Computes the cotangents of the region's differentiable outputs, at an upstream
            gradient of one. Placeholders: the region's outputs (unused), ``inputs``, sizes.
        first: Position of the first of ``inputs`` among the placeholders.
        inputs: Lowered nodes, none of which depends on a region.
    """

    loss: fx.Node
    graph: fx.GraphModule
    first: int
    inputs: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Plan:
    """How a region runs.

    Attributes:
        strategy: ``"fused"``, ``"recompute"`` or ``"forward"`` (no gradient wanted).
        chunk_rows: Rows of a chunk, at most.
        num_chunks: Number of chunks at the hinted number of rows.
        chunk_bytes: Estimated bytes of one chunk's logits and gradient.
        sum_bytes: Bytes of sums over chunks in a wider dtype than the gradients themselves.
        accumulate_dtype: The dtype shared gradients are summed in; None decides by their number.
        dynamic: Whether the number of rows is symbolic.
        why: Why this strategy, for the report.
        tuned: What autotuning found, for the report.
        interpreted: Whether a chunk's ops run one by one, without a kernel of their own.
    """

    strategy: str
    chunk_rows: int
    num_chunks: int
    chunk_bytes: int
    sum_bytes: int
    accumulate_dtype: torch.dtype | None
    dynamic: bool
    why: str = ""
    tuned: str = ""
    interpreted: bool = False
