"""Plan: from a byte budget to rows per chunk, and which strategy a region runs with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch

from autochunk.config import Options
from autochunk.find import hint
from autochunk.types import Cotangents, Plan, Region

#: Where the user does not say, a chunk's logits take this share of the bytes of the weights'
#: gradients, which exist anyway: their number of rows is the share times the hidden size. Fewer
#: rows cost time (each chunk reads the weight twice, and reads and writes its gradient), more only
#: memory. At 512 hidden in float32, of Inductor's time: 128 rows 1.13, 256 rows 0.98, 512 0.98;
#: at 2048 hidden in bfloat16: 512 rows 1.07, 1024 rows 0.87, 2048 1.11.
SHARE_OF_WEIGHTS = 0.5

#: On a CPU: least rows of a chunk, and most bytes of its logits.
LEAST_ROWS, LEAST_ROWS_HALF = 128, 256
MOST_BYTES = 192 * 2**20

#: A head with fewer rows than the least would be one chunk, all its logits. Beyond this many bytes
#: it is cut all the same: into four, of at least a quarter of the least number of rows.
LARGE_BYTES = 32 * 2**20

#: Autotuning tries no smaller chunks.
LEAST_ROWS_TRIED = 16

#: On CUDA matrix units want more rows. Derived, not measured: a chunk of n rows does 6·n flops for
#: each element of the weight and moves some 16 bytes for it, which at 700 Tflop/s and 3 TB/s takes
#: as long for n = 620.
LEAST_ROWS_CUDA = 2048

#: Rows of a chunk in half precision are a multiple of this: matrix units work on tiles of rows
#: (683 rows of bfloat16 took 10 % longer on a CPU with AMX than 512).
ALIGN_HALF = 32

#: Up to this many additions are made in a half precision weight gradient's own dtype: rounding k
#: partial sums gives (k + 1)/2 times the variance of the one rounding that the unchunked gradient
#: has, √3.5 = 1.87 times its error (docs/numerics.md).
MAX_HALF_ACCUMULATIONS = 6

_HALF = (torch.bfloat16, torch.float16)


def plan(region: Region, cotangents: Cotangents | str, options: Options, wanted: bool) -> Plan:
    """Decides how a region runs.

    Args:
        region: The region.
        cotangents: From ``tail``, or the reason why they are not known in advance.
        options: The user's options.
        wanted: Whether a gradient can come back into the region at all.
    """
    rows = max(1, hint(region.rows))
    row_bytes = region.wide_features * region.wide_itemsize
    if options.chunk_rows is not None:
        chunk = options.chunk_rows
    elif options.num_chunks is not None:
        chunk = -(-rows // options.num_chunks)
    else:
        if options.memory_budget is not None:
            chunk = options.memory_budget // row_bytes
        else:
            chunk = _default_rows(region, rows)
        if chunk == 0:
            warnings.warn(
                f"autochunk: one row of logits takes {row_bytes} bytes, more than the budget of "
                f"{options.memory_budget} bytes; the chunks are single rows, which is slow. Give "
                "a memory_budget of many rows",
                stacklevel=2,
            )
        chunk = max(1, chunk)
    strategy, why = _strategy(region, cotangents, options, wanted)
    decided = Plan(
        strategy=strategy,
        chunk_rows=chunk,
        num_chunks=1,
        chunk_bytes=0,
        sum_bytes=0,
        accumulate_dtype=options.accumulate_dtype,
        dynamic=isinstance(region.rows, torch.SymInt),
        why=why,
    )
    asked = options.chunk_rows is not None or options.num_chunks is not None
    return with_rows(decided, region, chunk, exactly=asked)


def with_rows(decided: Plan, region: Region, chunk: int, exactly: bool = False) -> Plan:
    """A plan with chunks of at most ``chunk`` rows, near-equal and, unless ``exactly``, aligned."""
    rows = max(1, hint(region.rows))
    align = 1
    if not exactly and region.wide_itemsize == 2 and chunk >= ALIGN_HALF:
        align = ALIGN_HALF
        chunk -= chunk % align
    count = -(-rows // chunk)
    if not decided.dynamic:  # with a symbolic number of rows the loop makes them near-equal
        even = -(-rows // count)
        chunk = min(rows, chunk, even + -even % align)
    return replace(
        decided,
        chunk_rows=chunk,
        num_chunks=count,
        chunk_bytes=min(chunk, rows) * region.wide_features * region.wide_itemsize,
        sum_bytes=_sum_bytes(region, count, decided.accumulate_dtype),
    )


def step_bytes(chunk_bytes: int, sum_bytes: int) -> int:
    """Bytes a step needs besides the gradients.

    A sum in a wider dtype is half precision's, of twice the gradient's bytes; the chunk's buffer is
    gone when it is converted to the gradient.
    """
    return sum_bytes + max(chunk_bytes - sum_bytes // 2, 0)


def _sum_bytes(region: Region, chunks: int, requested: torch.dtype | None) -> int:
    total = 0
    for i in region.shared_grads:
        weight = region.shared_inputs[i].meta["val"]
        dtype = accumulate_dtype(weight.dtype, chunks, requested)
        total += dtype.itemsize * hint(weight.numel()) if dtype != weight.dtype else 0
    return total


def sizes_to_try(decided: Plan, region: Region, options: Options) -> list[Plan]:
    """Plans to choose from by timing, of up to four sizes, the largest first.

    The largest is the budget's, or twice the default; each is half of the one before.
    """
    largest = decided.chunk_rows * (1 if options.memory_budget is not None else 2)
    largest = min(largest, max(1, hint(region.rows)))
    sizes = [largest, *(n for i in (1, 2, 3) if (n := largest >> i) >= LEAST_ROWS_TRIED)]
    plans = [with_rows(decided, region, rows) for rows in sizes]
    return list({p.chunk_rows: p for p in plans}.values())


def _default_rows(region: Region, rows: int) -> int:
    """Rows of a chunk where the user does not say."""
    weights = [node.meta["val"] for node in region.shared_inputs]
    hidden = max((hint(w.numel()) // region.wide_features for w in weights), default=0)
    itemsize = region.wide_itemsize
    chunk = int(hidden * SHARE_OF_WEIGHTS)
    least = LEAST_ROWS_HALF if itemsize == 2 else LEAST_ROWS
    if any(w.device.type == "cuda" for w in weights):
        least = LEAST_ROWS_CUDA
        chunk = max(chunk, least)
    else:
        most = MOST_BYTES // (region.wide_features * itemsize)
        chunk = min(max(chunk, least), max(most, 1))
    if rows <= min(chunk, least) and rows * region.wide_features * itemsize > LARGE_BYTES:
        chunk = max(-(-rows // 4), least // 4)
    summed = [weights[i] for i in region.shared_grads if weights[i].dtype in _HALF]
    if summed:
        # Few chunks can be summed in half precision; more need a sum in float32 besides. Larger
        # chunks are the better use of as much.
        few = -(-rows // MAX_HALF_ACCUMULATIONS)
        few += -few % ALIGN_HALF
        row_bytes = region.wide_features * itemsize
        besides = _sum_bytes(region, MAX_HALF_ACCUMULATIONS + 1, None)
        if few * row_bytes <= step_bytes(chunk * row_bytes, besides):
            chunk = max(chunk, few)
    return chunk


def accumulate_dtype(dtype: torch.dtype, chunks: int, requested: torch.dtype | None) -> torch.dtype:
    """The dtype in which a gradient of ``dtype`` is summed over ``chunks`` chunks."""
    if requested is not None:
        return torch.promote_types(dtype, requested)
    return torch.float32 if dtype in _HALF and chunks > MAX_HALF_ACCUMULATIONS else dtype


def _strategy(
    region: Region, cotangents: Cotangents | str, options: Options, wanted: bool
) -> tuple[str, str]:
    if not wanted:
        return "forward", "no gradient is wanted"
    if options.strategy == "recompute":
        return "recompute", "asked for"
    if isinstance(cotangents, str):
        return "recompute", cotangents
    if options.strategy == "auto" and _computes_in_half(region):
        return "recompute", "float16 gradients would underflow without the upstream loss scale"
    return "fused", "the loss is affine in its per-row values"


def _computes_in_half(region: Region) -> bool:
    vals: Sequence[torch.Tensor] = [s.meta["val"] for s in region.shared_inputs]
    return any(v.dtype == torch.float16 for v in vals)
