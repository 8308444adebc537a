"""Plan: from a byte budget to rows per chunk, and which strategy a region runs with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from autochunk.config import Options
from autochunk.find import hint
from autochunk.types import Cotangents, Plan, Region

#: Bytes one chunk's logits may take where the user does not say; their gradient overwrites them.
#: On 2048 × 512 × 128256 smaller chunks cost time (the products get thin, and the weight's
#: gradient is read and written once a chunk), larger ones only memory.
DEFAULT_BUDGET = 168 * 2**20

#: Rows of a chunk in half precision are a multiple of this: matrix units work on tiles of rows
#: (683 rows of bfloat16 took 10 % longer on a CPU with AMX than 512).
ALIGN_HALF = 32

#: Up to this many additions are made in a half precision weight gradient's own dtype: the
#: rounding of k partial sums adds about k/2 times the variance of the final rounding, which the
#: unchunked gradient has as well, along with that of the logits' gradient (docs/numerics.md).
MAX_HALF_ACCUMULATIONS = 8

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
    align = 1
    if options.chunk_rows is not None:
        chunk = options.chunk_rows
    elif options.num_chunks is not None:
        chunk = -(-rows // options.num_chunks)
    else:
        budget = options.memory_budget or DEFAULT_BUDGET
        if budget < row_bytes:
            warnings.warn(
                f"autochunk: one row of logits takes {row_bytes} bytes, more than the budget of "
                f"{budget} bytes; the chunks are single rows, which is slow. Give a memory_budget "
                "of many rows",
                stacklevel=2,
            )
        chunk = max(1, budget // row_bytes)
        if region.wide_itemsize == 2 and chunk >= ALIGN_HALF:
            align = ALIGN_HALF
            chunk -= chunk % align
    strategy, why = _strategy(region, cotangents, options, wanted)
    dynamic = isinstance(region.rows, torch.SymInt)
    count = -(-rows // chunk)
    if not dynamic:  # near-equal chunks; with a symbolic number of rows the loop does that
        even = -(-rows // count)
        chunk = min(rows, even + -even % align)
    return Plan(
        strategy=strategy,
        chunk_rows=chunk,
        num_chunks=count,
        chunk_bytes=min(chunk, rows) * row_bytes,
        accumulate_dtype=options.accumulate_dtype,
        dynamic=dynamic,
        why=why,
    )


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
