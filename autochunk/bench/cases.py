"""What is measured, with which method, and in which process: plain data that travels as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Sequences of a whole model's batch.
MODEL_BATCH = 4


@dataclass(frozen=True)
class Case:
    """A head with its loss, or a training step of a whole model.

    Attributes:
        vocabulary: Rows of the head's weight.
        tokens: Rows of the hidden states.
        hidden: Columns of both.
        dtype: Of both, as ``bfloat16``.
        loss: A name of ``losses.LOSSES``.
        device: ``cpu`` or ``cuda``.
        name: Of the model whose sizes these are, or empty.
        layers: 0 for a head alone; else the layers of a Llama with these sizes, whose step ends
            with AdamW's.
    """

    vocabulary: int
    tokens: int
    hidden: int
    dtype: str
    loss: str
    device: str
    name: str = ""
    layers: int = 0

    @property
    def title(self) -> str:
        """As ``"2048 tokens × 512 hidden × 128256 words, bfloat16, cross_entropy"``."""
        sizes = f"{self.tokens} tokens × {self.hidden} hidden × {self.vocabulary} words"
        layers = f", {self.layers} layer{'s' * (self.layers > 1)}" if self.layers else ""
        name = f"{self.name}: " if self.name else ""
        return f"{name}{sizes}{layers}, {self.dtype}, {self.loss}, {self.device}"


@dataclass(frozen=True)
class Variant:
    """A method with its options.

    Attributes:
        method: A name of ``methods.METHODS``.
        options: (name, value as text) in the order given.
    """

    method: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options)
        return f"{self.method}:{options}" if options else self.method

    @classmethod
    def split(cls, text: str) -> Variant:
        """The inverse of ``str``; names and values are not checked.

        Raises:
            ValueError: if an option is not ``name=value``, or is given twice.
        """
        method, _, rest = text.partition(":")
        options: dict[str, str] = {}
        for part in rest.split(",") if rest else ():
            name, equals, value = part.partition("=")
            if not equals or not name or not value:
                raise ValueError(f"{part!r} is not OPTION=VALUE")
            if name in options:
                raise ValueError(f"the option {name!r} is given twice")
            options[name] = value
        return cls(method, tuple(options.items()))


@dataclass(frozen=True)
class Job:
    """What a child process does with a case.

    Attributes:
        case: What to measure.
        variants: With which methods, in turn.
        warmup: Untimed steps of each, the first of which compiles.
        repeats: Rounds in which each method does a timed step; 0 to take no times.
        peaks: Untimed steps of each whose peak memory is taken.
        reference: File with float64 gradients to compare with, or empty.
    """

    case: Case
    variants: tuple[Variant, ...]
    warmup: int = 2
    repeats: int = 0
    peaks: int = 0
    reference: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a dict of JSON's types."""
        return {
            **dataclasses.asdict(self),
            "case": dataclasses.asdict(self.case),
            "variants": [str(variant) for variant in self.variants],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """The inverse of :meth:`to_json`."""
        variants = tuple(Variant.split(text) for text in data["variants"])
        return cls(**{**data, "case": Case(**data["case"]), "variants": variants})


@dataclass(frozen=True)
class Search:
    """A breaking-point search.

    Attributes:
        dimension: ``vocabulary`` or ``tokens``.
        limit_bytes: Memory a step may take; None for all there is (CUDA only).
        granularity: To within which the point is searched.
        largest: No size above it is tried.
    """

    dimension: str
    limit_bytes: int | None
    granularity: int
    largest: int = 2**24
