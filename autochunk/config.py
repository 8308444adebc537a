"""Options of the backend: parsed and checked once, then passed along frozen."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_origin

import torch
from torch._dynamo.exc import ShortenTraceback

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SWITCH = {"": False, "0": False, "false": False, "1": True, "true": True}
_STRATEGIES = ("auto", "fused", "recompute")
_ACCUMULATE_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class OptionError(ShortenTraceback, ValueError):
    """An option of the backend is unknown, ill-typed or contradicts another one.

    Dynamo wraps what a backend raises in ``BackendCompilerFailed``, except for this base class:
    with it ``except OptionError`` and ``except ValueError`` work around a compiled call, too.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)  # type: ignore[call-arg]


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., backend="autochunk", options={...})`` accepts.

    Attributes:
        chunk_rows: Rows of the logits a chunk holds, at most (an int ≥ 1). Chunks are made
            near-equal, so any number works, also one that does not divide the rows.
        num_chunks: Number of chunks (an int ≥ 1), as an alternative to ``chunk_rows``.
        memory_budget: Bytes that one chunk's logits may take (their gradient overwrites them), an
            int or a string such as ``"256MiB"``; the third way to say how large a chunk is.
        strategy: ``"fused"`` computes the gradients in the forward pass, which is possible where
            the loss is affine in the per-row values; ``"recompute"`` computes each chunk a second
            time in the backward pass; ``"auto"`` fuses where it is provably right.
        accumulate_dtype: Floating dtype in which the weight's gradient is summed over chunks, a
            ``torch.dtype`` or its name; ``"auto"`` keeps the weight's own dtype while few chunks
            are summed and takes float32 beyond (see docs/numerics.md).
        autotune: Time a few chunk sizes while compiling, on made-up numbers, and take the one that
            needs the least memory of those about as fast as the fastest. The largest tried is
            ``memory_budget``, or twice the default. The choice is remembered in Inductor's cache
            directory.
        min_bytes: Logits smaller than this many bytes are left alone (int, or "16MiB").
        debug: Log the report of each compiled graph, and write the graphs of each stage into a
            directory (True: ``./autochunk_debug``; a string: that directory).
        strict: Raise where a rewrite fails instead of falling back to plain Inductor.
        inductor: Options passed on to Inductor, as ``torch.compile(options=...)`` takes them.
    """

    chunk_rows: int | None = None
    num_chunks: int | None = None
    memory_budget: int | None = None
    strategy: str = "auto"
    accumulate_dtype: torch.dtype | None = None
    autotune: bool = False
    min_bytes: int = 32 * 2**20
    debug: str | None = None
    strict: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """Checks a user's options.

        Args:
            given: The ``options`` of ``torch.compile``.
            mode: The ``mode`` of ``torch.compile``, handed to Inductor.

        Raises:
            OptionError: naming the option, the value seen, and what is valid.
        """
        given = dict(given or {})
        valid = {f.name for f in fields(cls)}
        for name in given:
            if name not in valid:
                raise OptionError(_unknown("option", name, valid))
        checked: dict[str, Any] = {}
        for name, value in given.items():
            if value is not None:
                checked[name] = _CHECKS[name](name, value)
        sizes = [n for n in ("chunk_rows", "num_chunks", "memory_budget") if n in checked]
        if len(sizes) > 1:
            raise OptionError(
                f"autochunk: options {' and '.join(map(repr, sizes))} contradict each other: "
                "each decides the chunk size; give one of them"
            )
        if checked.get("autotune") and sizes and sizes != ["memory_budget"]:
            raise OptionError(
                f"autochunk: options 'autotune' and {sizes[0]!r} contradict each other: each "
                "decides the chunk size; give one of them (a 'memory_budget' limits 'autotune')"
            )
        if "debug" not in checked:
            env = os.environ.get("AUTOCHUNK_DEBUG", "")
            checked["debug"] = _debug("AUTOCHUNK_DEBUG", _SWITCH.get(env.lower(), env))
        inductor = dict(checked.get("inductor", {}))
        if mode is not None and mode != "default":
            modes = torch._inductor.list_mode_options()
            if mode not in modes:
                raise OptionError(_unknown("mode", mode, modes))
            inductor = {**modes[mode], **inductor}
        checked["inductor"] = inductor
        return cls(**checked)


def options(**given: Any) -> dict[str, Any]:
    """Checks options early: ``torch.compile(m, backend="autochunk", options=options(...))``.

    ``torch.compile`` hands a custom backend its options at the first call of the compiled
    function, so a misspelt one is reported there; this function reports it where it is written.

    Returns:
        The options, unchanged.

    Raises:
        OptionError: as :meth:`Options.parse`.
    """
    Options.parse(given)
    return given


def parse_bytes(name: str, value: object) -> int:
    """Bytes from an int or a string with a unit: ``parse_bytes("o", "1.5GiB") == 1610612736``."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise OptionError(_ill_typed(name, value, 'a number of bytes, or a string like "256MiB"'))
    if isinstance(value, int):
        number: float = value
    else:
        text = value.strip()
        digits = text.rstrip("KMGIBkmgib").strip()
        unit = text[len(digits) :].strip().upper() or "B"
        try:
            number = float(digits) * _UNITS[unit]
        except (ValueError, KeyError):
            raise OptionError(
                _ill_typed(name, value, 'a number of bytes, or a string like "256MiB"')
            ) from None
    if not 0 <= number < 2**63:
        raise OptionError(_ill_typed(name, value, "a number of bytes that is not negative"))
    return int(number)


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(_ill_typed(name, value, "an int of at least 1"))
    return value


def _positive_bytes(name: str, value: object) -> int:
    if (number := parse_bytes(name, value)) == 0:
        raise OptionError(_ill_typed(name, value, "at least one byte"))
    return number


def _strategy(name: str, value: object) -> str:
    if value not in _STRATEGIES:
        raise OptionError(_ill_typed(name, value, f"one of {', '.join(map(repr, _STRATEGIES))}"))
    return str(value)


def _accumulate_dtype(name: str, value: object) -> torch.dtype | None:
    if value == "auto":
        return None
    dtype = _ACCUMULATE_DTYPES.get(value) if isinstance(value, str) else value
    if dtype not in _ACCUMULATE_DTYPES.values():
        valid = ", ".join(map(repr, ["auto", *_ACCUMULATE_DTYPES]))
        raise OptionError(_ill_typed(name, value, f"one of {valid}"))
    return dtype


def _debug(name: str, value: object) -> str | None:
    if isinstance(value, bool):
        return "autochunk_debug" if value else None
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    raise OptionError(_ill_typed(name, value, "a bool, or a directory"))


def _bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise OptionError(_ill_typed(name, value, "a bool"))
    return value


def _inductor(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(_ill_typed(name, value, "a dict of Inductor options"))
    known = torch._inductor.list_options()
    checked = {}
    for key, item in value.items():
        key = str(key).replace("-", "_")
        if key not in known:
            raise OptionError(_unknown("Inductor option", key, known))
        # As torch.compile checks its own: what isinstance cannot tell is let through.
        wanted = torch._inductor.config.get_type(key)
        if get_origin(wanted) is None and not isinstance(item, wanted):
            shown = getattr(wanted, "__name__", str(wanted))
            raise OptionError(_ill_typed(f"{name}[{key!r}]", item, f"a value of type {shown}"))
        checked[key] = item
    return checked


_CHECKS = {
    "chunk_rows": _positive_int,
    "num_chunks": _positive_int,
    "memory_budget": _positive_bytes,
    "strategy": _strategy,
    "accumulate_dtype": _accumulate_dtype,
    "autotune": _bool,
    "min_bytes": parse_bytes,
    "debug": _debug,
    "strict": _bool,
    "inductor": _inductor,
}


def _ill_typed(name: str, value: object, wanted: str) -> str:
    shown = name if "[" in name else repr(name)
    return f"autochunk: option {shown} is {value!r}; it takes {wanted}"


def _unknown(kind: str, name: object, valid: Iterable[str]) -> str:
    names = sorted(valid)
    shown = ", ".join(names) if len(names) <= 20 else f"{len(names)} names, see torch._inductor"
    return f"autochunk: unknown {kind} {name!r}{did_you_mean(name, names)}; valid: {shown}"


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """``" (did you mean 'chunk_rows'?)"`` where a valid name is close, or nothing."""
    close = difflib.get_close_matches(str(name), list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
