"""The GPU suite: heads of known models next to all peers, and a whole model's training step.

The order is by interest: where the time is used up, what comes last is not run, and its rows say
so.
"""

from __future__ import annotations

import dataclasses

from autochunk.bench.cases import Case, Variant

Work = tuple[tuple[Case, tuple[Variant, ...]], ...]

#: Nothing is begun after seven minutes, and what was begun before is ended after eight.
SUITE_SECONDS = 420.0
#: A peer that compiles for longer is left out.
SUITE_SILENCE_SECONDS = 180.0

#: Hidden size and vocabulary.
_HEADS = {
    "Llama-3.2-1B": (2048, 128_256),
    "Llama-3-8B": (4096, 128_256),
    "Gemma-2-2B": (2304, 256_000),
    "SmolLM2": (576, 49_152),
}
_LAYERS = 16  # of Llama-3.2-1B
#: Model, tokens, loss, whole model.
_ORDER = (
    ("Llama-3.2-1B", 8192, "cross_entropy", False),
    ("Gemma-2-2B", 8192, "cross_entropy", False),
    ("Llama-3-8B", 8192, "cross_entropy", False),
    ("Llama-3.2-1B", 8192, "cross_entropy", True),
    ("Llama-3.2-1B", 8192, "grpo", False),
    ("Llama-3-8B", 32768, "cross_entropy", False),
    ("SmolLM2", 32768, "cross_entropy", False),
    ("Gemma-2-2B", 16384, "cross_entropy", False),
    ("Llama-3.2-1B", 32768, "cross_entropy", False),
    ("Llama-3-8B", 16384, "grpo", False),
    ("Gemma-2-2B", 32768, "cross_entropy", False),
)
#: ``chunked_linear`` is left out: it runs the same kernels as ``autochunk``.
_METHODS = (
    "inductor",
    "autochunk",
    "eager",
    "auto_chunker",
    "liger",
    "cce",
    "quack",
    "linear_cross_entropy",
    "checkpoint",
)
_MODEL_METHODS = ("inductor", "autochunk")


def suite() -> Work:
    """The cases in order, each with its variants, in bfloat16 on CUDA."""
    found = []
    for name, tokens, loss, whole in _ORDER:
        hidden, vocabulary = _HEADS[name]
        layers = _LAYERS if whole else 0
        case = Case(vocabulary, tokens, hidden, "bfloat16", loss, "cuda", name, layers)
        methods = _MODEL_METHODS if whole else _METHODS
        found.append((case, tuple(Variant(method) for method in methods)))
    return tuple(found)


def shrunk(work: Work) -> Work:
    """The same, tiny and on the CPU: to see whether everything runs, not how fast.

    The logits are so small that autochunk would leave them alone, so it is told to cut them.
    """
    found = []
    for case, variants in work:
        small = dataclasses.replace(
            case,
            vocabulary=case.vocabulary // 64,
            tokens=case.tokens // 64,
            hidden=case.hidden // 32,
            layers=min(case.layers, 1),
            device="cpu",
        )
        cut = (("min_bytes", "0"), ("num_chunks", "4"))
        own = tuple(
            dataclasses.replace(v, options=cut) if v == Variant("autochunk") else v
            for v in variants
        )
        found.append((small, own))
    return tuple(found)
