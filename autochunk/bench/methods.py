"""Methods: the table of what is compared, what each can do, and what it was told.

To add a method, write its function in ``steps.py`` and a row of ``METHODS``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autochunk.bench import steps
from autochunk.bench.cases import Variant
from autochunk.bench.losses import Loss
from autochunk.bench.steps import Options, Step
from autochunk.config import OptionError, did_you_mean
from autochunk.config import Options as OwnOptions
from autochunk.report import Report


def boolean(text: str) -> bool:
    """``True`` or ``False`` from the word."""
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


_OURS: Mapping[str, Callable[[str], Any]] = {
    "chunk_rows": int,
    "num_chunks": int,
    "memory_budget": str,
    "autotune": boolean,
    "strategy": str,
    "accumulate_dtype": str,
    "min_bytes": str,
}
_CROSS_ENTROPY = ("cross_entropy",)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        meaning: One line for ``--list``.
        compile: For a method that takes any function: (function, options, fullgraph) to the
            compiled one.
        build: For a method that takes a loss: (loss, options) to the step.
        options: What may be given, and how its text is read.
        unchunked: Whether all logits exist at once: others are compared to the fastest of these.
        module: That must be installed, if any.
        install: What to give to ``pip install`` for it.
        losses: That it has; None if it takes any.
        cuda: Losses that it has on CUDA only.
    """

    meaning: str
    compile: Callable[[Callable[..., Any], Options, bool], Callable[..., Any]] | None = None
    build: Callable[[Loss, Options], Step] | None = None
    options: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)
    unchunked: bool = False
    module: str = ""
    install: str = ""
    losses: tuple[str, ...] | None = None
    cuda: tuple[str, ...] = ()

    def step(self, loss: Loss, options: Options) -> Step:
        """The method applied to a loss."""
        if self.build is not None:
            return self.build(loss, options)
        assert self.compile is not None
        return self.compile(steps.plain(loss), options, True)


METHODS: dict[str, Method] = {
    "eager": Method("the plain expression", compile=steps.eager, unchunked=True),
    "inductor": Method("torch.compile", compile=steps.inductor, unchunked=True),
    "auto_chunker": Method(
        "torch.compile with Inductor's auto_chunker",
        compile=steps.auto_chunker,
        options={"num_chunk": int, "amplify_ratio_threshold": int},
    ),
    "linear_cross_entropy": Method(
        "torch.nn.functional.linear_cross_entropy with LinearCrossEntropyOptions",
        build=steps.linear_cross_entropy,
        options={"batch_chunk_size": int, "chunking_method": str, "acc_policy": str},
        losses=_CROSS_ENTROPY,
    ),
    "liger": Method(
        "Liger's fused linear losses",
        build=steps.liger,
        options={"accum_dtype": str, "chunk_rows": int},
        module="liger_kernel",
        install="liger-kernel",
        losses=("cross_entropy", "label_smoothing", "z_loss", "grpo"),
        cuda=("cross_entropy", "label_smoothing", "z_loss"),
    ),
    "cce": Method(
        "Cut Cross-Entropy",
        build=steps.cce,
        options={"impl": str, "filter_eps": str},
        module="cut_cross_entropy",
        install="cut-cross-entropy",
        losses=_CROSS_ENTROPY,
        cuda=_CROSS_ENTROPY,
    ),
    "quack": Method(
        "quack's chunked linear cross entropy",
        build=steps.quack,
        options={"chunk_size": int},
        module="quack",
        install="quack-kernels",
        losses=_CROSS_ENTROPY,
        cuda=_CROSS_ENTROPY,
    ),
    "checkpoint": Method(
        "a Python loop over chunks with torch.utils.checkpoint",
        build=steps.checkpointed,
        options={"chunk_rows": int, "num_chunks": int},
    ),
    "autochunk": Method('torch.compile(backend="autochunk")', compile=steps.ours, options=_OURS),
    "chunked_linear": Method("autochunk.chunked_linear", build=steps.functional, options=_OURS),
}


def read_variant(text: str) -> Variant:
    """A method as the command line has it: ``autochunk`` or ``autochunk:chunk_rows=64``.

    Raises:
        ValueError: naming what is unknown or ill-typed, and what is valid.
    """
    variant = Variant.split(text)
    if variant.method not in METHODS:
        raise ValueError(_unknown("method", variant.method, METHODS))
    try:
        read_options(variant)
    except OptionError as error:
        raise ValueError(str(error).removeprefix("autochunk: ")) from None
    return variant


def read_options(variant: Variant) -> dict[str, Any]:
    """A variant's options with values of the right types.

    Raises:
        ValueError: naming what is unknown or ill-typed, and what is valid.
    """
    method = METHODS[variant.method]
    found: dict[str, Any] = {}
    for name, value in variant.options:
        if name not in method.options:
            raise ValueError(_unknown(f"option of {variant.method}", name, method.options))
        try:
            found[name] = method.options[name](value)
        except ValueError:
            kind = method.options[name].__name__
            article = "an" if kind == "int" else "a"
            raise ValueError(f"{name} is {value!r}; it takes {article} {kind}") from None
        if type(found[name]) is int and found[name] < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if method.options is _OURS:
        OwnOptions.parse(found)
    return found


def _unknown(kind: str, name: str, valid: Mapping[str, Any]) -> str:
    return (
        f"unknown {kind} {name!r}{did_you_mean(name, valid)}; valid: {', '.join(valid) or 'none'}"
    )


def why_not(name: str, loss: str, device: str, whole_model: bool = False) -> str:
    """The short reason why a method cannot run, or nothing."""
    method = METHODS[name]
    if whole_model and method.compile is None:
        return "does not compile models"
    if method.losses is not None and loss not in method.losses:
        return f"has no {loss}"
    if method.module and not _is_installed(method.module):
        return f"not installed (pip install {method.install})"
    if name == "linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has none"
    if loss in method.cuda and device != "cuda":
        return "needs CUDA"
    return ""


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def note(name: str, reports: Sequence[Report]) -> str:
    """What a method said about the graphs it has just compiled."""
    if name == "auto_chunker":
        from torch._inductor import metrics

        return "" if metrics.num_auto_chunking else "did not fire: the logits were whole"
    found = []
    for report in reports:
        found += [f"{row.strategy}, {row.chunks} rows" for row in report.chunked]
    if name == "autochunk" and not found:
        codes = [row.refusal.code for report in reports for row in report.refused if row.refusal]
        found = [f"left alone: {code}" for code in codes] or ["no head was found"]
    return "; ".join(dict.fromkeys(found))
