"""Arguments of ``autochunk bench``: parsed and checked before anything is measured."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from autochunk.bench.cases import Case, Search, Variant
from autochunk.bench.losses import LOSSES
from autochunk.bench.measure import Plan
from autochunk.bench.memory import peak_is_readable
from autochunk.bench.methods import METHODS, read_variant
from autochunk.bench.suite import SUITE_SECONDS, SUITE_SILENCE_SECONDS, shrunk, suite
from autochunk.config import OptionError, parse_bytes

Work = tuple[tuple[Case, tuple[Variant, ...]], ...]


@dataclass(frozen=True)
class _Defaults:
    tokens: int
    hidden: int
    dtype: str
    repeats: int


_DEFAULTS = {
    "cpu": _Defaults(tokens=1024, hidden=512, dtype="float32", repeats=5),
    "cuda": _Defaults(tokens=8192, hidden=2048, dtype="bfloat16", repeats=20),
}
_VOCABULARIES = (10_000, 25_000, 50_000, 75_000, 100_000)
_SEARCH_METHODS = ("eager", "inductor", "autochunk")
_GRANULARITIES = {"vocabulary": 4096, "tokens": 256}


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    Attributes:
        device: ``cpu`` or ``cuda``.
        work: Cases and the variants for each.
        plan: How to measure.
        search: A search instead of a measurement, or None.
        pareto: Whether to mark the Pareto curve.
        json: File to write, or None.
        charts: Directory to write charts into, or None.
        quiet: Whether no progress is shown.
        listing: Whether only to list methods and losses.
    """

    device: str
    work: Work
    plan: Plan
    search: Search | None
    pareto: bool
    json: Path | None
    charts: Path | None
    quiet: bool
    listing: bool


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Settings:
    """The settings; ends the program with the parser's error for what makes no sense."""
    device = _device(parser, args)
    _check_numbers(parser, args)
    _check_output(parser, args)
    search = _search(parser, args, device)
    variants = _variants(parser, args, search)
    limit = args.time_limit
    if args.suite:
        work = _suite(parser, args, variants)
        limit = limit or SUITE_SECONDS
    else:
        cases = _cases(parser, args, device, search)
        work = tuple((case, variants) for case in cases)
    plan = Plan(
        repeats=args.repeats or (10 if args.suite else _DEFAULTS[device].repeats),
        warmup=args.warmup,
        accuracy=not (args.no_accuracy or args.suite),
        timeout_seconds=args.timeout or (SUITE_SILENCE_SECONDS if args.suite else 600.0),
        shared=bool(args.suite),
        deadline=time.time() + limit if limit else None,
    )
    if device == "cpu" and not search and not args.list and not peak_is_readable():
        parser.error(
            "--device cpu: peak memory is read from Linux's /proc/self, which is not there or not "
            "writable; run on Linux, or with --device cuda"
        )
    return Settings(
        device=device,
        work=work,
        plan=plan,
        search=search,
        pareto=bool(args.pareto),
        json=args.json,
        charts=args.charts,
        quiet=args.quiet,
        listing=args.list,
    )


def _device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    if args.dry_run and not args.suite:
        parser.error("--dry-run shrinks a suite; give --suite gpu as well")
    if args.dry_run and args.device == "cuda":
        parser.error("--dry-run is for the CPU; it can't be combined with --device cuda")
    if args.dry_run:
        return "cpu"
    there = torch.cuda.is_available()
    if args.suite and (not there or args.device == "cpu"):
        parser.error("--suite gpu needs CUDA; --dry-run tries it with tiny sizes on the CPU")
    if args.device == "cuda" and not there:
        parser.error("--device cuda: this installation of PyTorch sees no CUDA device")
    return str(args.device or ("cuda" if there else "cpu"))


def _check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in (
        "vocabulary",
        "tokens",
        "hidden",
        "pareto",
        "repeats",
        "warmup",
        "granularity",
        "largest",
    ):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                parser.error(f"--{name} is {value}; it must be at least 1")
    for name in ("timeout", "time_limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} is {value:g}; it must be above 0")


def _check_output(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.json is not None:
        parent = args.json.absolute().parent
        if args.json.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
            parser.error(f"--json {args.json}: its directory is missing or not writable")
    if args.charts is not None:
        if importlib.util.find_spec("matplotlib") is None:
            parser.error("--charts needs matplotlib: pip install 'autochunk[bench]'")
        try:
            args.charts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--charts {args.charts}: {error.strerror}")


def _search(
    parser: argparse.ArgumentParser, args: argparse.Namespace, device: str
) -> Search | None:
    dimension = args.breaking_point
    if dimension is None:
        for name in ("memory_limit", "granularity", "largest"):
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} belongs to --breaking-point")
        return None
    for name in ("suite", "pareto", dimension):
        if getattr(args, name):
            reason = "what is searched for" if name == dimension else "a measurement of its own"
            parser.error(f"--{name} is {reason}; leave it out with --breaking-point {dimension}")
    limit = None
    if args.memory_limit is not None:
        try:
            limit = parse_bytes("--memory-limit", args.memory_limit)
        except OptionError as error:
            parser.error(str(error).removeprefix("autochunk: option ").replace("'", "", 2))
        if limit < 2**20:
            parser.error(f"--memory-limit is {limit} bytes; give at least 1MiB")
    elif device == "cpu":
        parser.error("--breaking-point on the CPU needs --memory-limit, as 2GiB")
    granularity = args.granularity or _GRANULARITIES[dimension]
    for name in args.loss or ():
        multiple = LOSSES[name].multiple if name in LOSSES else 1
        if dimension == "tokens" and granularity % multiple:
            parser.error(f"--granularity is {granularity}; {name} needs a multiple of {multiple}")
    largest = args.largest or Search.largest
    if largest < granularity:
        parser.error(f"--largest is {largest}; it must be at least --granularity {granularity}")
    return Search(dimension, limit, granularity, largest)


def _variants(
    parser: argparse.ArgumentParser, args: argparse.Namespace, search: Search | None
) -> tuple[Variant, ...]:
    default = _SEARCH_METHODS if search else () if args.suite else tuple(METHODS)
    found: list[Variant] = []
    sizes = [f"autochunk:chunk_rows={rows}" for rows in args.pareto or ()]
    for text in (*(args.methods or default), *sizes):
        try:
            variant = read_variant(text)
        except ValueError as error:
            parser.error(f"--methods {text}: {error}")
        if variant in found:
            parser.error(f"--methods {text} is there twice")
        found.append(variant)
    return tuple(found)


def _cases(
    parser: argparse.ArgumentParser, args: argparse.Namespace, device: str, search: Search | None
) -> list[Case]:
    default = _DEFAULTS[device]
    dtypes = args.dtype or [default.dtype]
    losses = args.loss or ["cross_entropy"]
    _check_names(parser, "--dtype", dtypes, ("bfloat16", "float16", "float32"))
    _check_names(parser, "--loss", losses, tuple(LOSSES))
    vocabularies = args.vocabulary or list(_VOCABULARIES)
    tokens = args.tokens or [default.tokens]
    if search is not None:
        vocabularies = [0] if search.dimension == "vocabulary" else args.vocabulary or [128_256]
        tokens = [0] if search.dimension == "tokens" else tokens
    hidden = args.hidden or [default.hidden]
    for name, count in itertools.product(losses, tokens):
        multiple = LOSSES[name].multiple
        if count % multiple:
            parser.error(f"--tokens is {count}; {name} needs a multiple of {multiple}")
    product = itertools.product(dtypes, losses, hidden, tokens, vocabularies)
    found = [Case(v, n, h, dtype, loss, device) for dtype, loss, h, n, v in product]
    return list(dict.fromkeys(found))


def _check_names(
    parser: argparse.ArgumentParser, option: str, names: Sequence[str], valid: Sequence[str]
) -> None:
    for name in names:
        if name not in valid:
            parser.error(f"{option}: unknown {name!r}; valid: {', '.join(valid)}")


def _suite(
    parser: argparse.ArgumentParser, args: argparse.Namespace, variants: tuple[Variant, ...]
) -> Work:
    for name in ("vocabulary", "tokens", "hidden", "dtype", "loss", "pareto"):
        if getattr(args, name) is not None:
            parser.error(f"--{name} can't be combined with --suite, which has sizes of its own")
    work = suite()
    if variants:
        work = tuple((case, variants) for case, _ in work)
    return shrunk(work) if args.dry_run else work
