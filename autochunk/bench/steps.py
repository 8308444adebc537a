"""Steps: one small function for each way to get from hidden states to a loss and its gradients.

A *step* is a callable from hidden states ``x [N, H]``, weight ``w [V, H]`` and the loss's tensors
``[N]`` each to the scalar loss. Some methods compile any function, and get ``plain`` to compile;
others take the loss apart. Packages are imported when their method is used.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autochunk import autochunk, chunked_linear
from autochunk.bench.losses import CLIP, SMOOTHING, Z_SCALE, Loss

Step = Callable[..., Tensor]
Options = Mapping[str, Any]


def plain(loss: Loss) -> Step:
    """The expression itself; what the others must agree with."""
    whole = loss.whole

    def step(x: Tensor, w: Tensor, *tensors: Tensor) -> Tensor:
        return whole(F.linear(x, w), *tensors)

    return step


# ---- methods that compile any function ----------------------------------------------------------


def eager(function: Callable[..., Any], options: Options, fullgraph: bool) -> Callable[..., Any]:
    return function


def inductor(function: Callable[..., Any], options: Options, fullgraph: bool) -> Callable[..., Any]:
    return torch.compile(_own_code(function), fullgraph=fullgraph)


def auto_chunker(
    function: Callable[..., Any], options: Options, fullgraph: bool
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    # As torch.compile(options=...), which has no name for the second one: a graph from a cache
    # would not tell whether the pass has split it.
    settings = {"auto_chunker.enable": True, "force_disable_caches": True}
    settings |= {f"auto_chunker.{name}": value for name, value in options.items()}

    def backend(gm: Any, example_inputs: Any) -> Any:
        return compile_fx(gm, example_inputs, config_patches=settings)

    return torch.compile(_own_code(function), backend=backend, fullgraph=fullgraph)


def ours(function: Callable[..., Any], options: Options, fullgraph: bool) -> Callable[..., Any]:
    settings = {"strict": True, **options}
    return torch.compile(
        _own_code(function), backend=autochunk, options=settings, fullgraph=fullgraph
    )


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own.

    Dynamo keeps what it compiles per code object, and runs eagerly once it has eight: several
    variants of a method would be measured wrongly.
    """
    if not isinstance(function, types.FunctionType):
        return function
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_COPIES)}")
    copy = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_COPIES = itertools.count()


# ---- methods that take a loss apart -------------------------------------------------------------


def functional(loss: Loss, options: Options) -> Step:
    def step(x: Tensor, w: Tensor, *tensors: Tensor) -> Tensor:
        return chunked_linear(loss.whole, x, w, *tensors, **options)

    return step


def checkpointed(loss: Loss, options: Options) -> Step:
    """A loop over chunks of rows, each of them recomputed in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    def part(x: Tensor, w: Tensor, *tensors: Tensor) -> Tensor:
        return loss.per_row(F.linear(x, w), *tensors)

    def step(x: Tensor, w: Tensor, *tensors: Tensor) -> Tensor:
        rows = options.get("chunk_rows") or -(-len(x) // options.get("num_chunks", 8))
        pieces = zip(*(tensor.split(rows) for tensor in (x, *tensors)), strict=True)
        values = [checkpoint(part, own, w, *rest, use_reentrant=False) for own, *rest in pieces]
        return loss.total(torch.cat(values), *tensors)

    return step


def linear_cross_entropy(loss: Loss, options: Options) -> Step:
    settings = torch.nn.LinearCrossEntropyOptions(**options)

    def step(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, w, labels, options=settings)

    return step


def liger(loss: Loss, options: Options) -> Step:
    if loss.name == "grpo":
        return _liger_grpo(options)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    settings = {
        "cross_entropy": {},
        "label_smoothing": {"label_smoothing": SMOOTHING},
        "z_loss": {"lse_square_scale": Z_SCALE},
    }[loss.name]
    dtype = {k: getattr(torch, v) for k, v in options.items() if k == "accum_dtype"}

    def step(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return liger_fused_linear_cross_entropy(x, w, labels, **settings, **dtype)

    return step


def _liger_grpo(options: Options) -> Step:
    """Liger chunks over sequences; here each token is one."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        chunk_size=options.get("chunk_rows", 1024),
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="bnpo",
    )

    def step(
        x: Tensor, w: Tensor, labels: Tensor, advantages: Tensor, old: Tensor, mask: Tensor
    ) -> Tensor:
        columns = [tensor.unsqueeze(1) for tensor in (x, labels, mask, old)]
        x3, labels2, mask2, old2 = columns
        found = module(x3, w, labels2, mask2, advantages, old_per_token_logps=old2)
        return found[0]

    return step


def cce(loss: Loss, options: Options) -> Step:
    from cut_cross_entropy import linear_cross_entropy as cut

    def step(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return cut(x, w, labels, **options)

    return step


def quack(loss: Loss, options: Options) -> Step:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def step(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(x, w, labels, **options)

    return step
