"""Measures the gallery of losses and the model families, and writes docs/coverage.md.

    python docs/coverage.py                    everything, about half an hour on two cores
    python docs/coverage.py --only grpo dpo    some entries, printed and not written
    python docs/coverage.py --results DIR      keeps each result in DIR, and goes on from there

Each entry runs with Inductor and with autochunk, each in a process of its own that measures one
entry after the other: the second of two steps counts. A third process computes float64 gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from families import FAMILIES, arguments, build  # noqa: E402
from gallery import GALLERY, Sizes  # noqa: E402

from autochunk.bench.memory import (  # noqa: E402
    MIB,
    PEAK_ENVIRONMENT,
    PeakMemory,
    status_bytes,
)

METHODS = ("float64", "inductor", "autochunk")
LOSSES = Sizes(batch=4, time=256, hidden=64, vocabulary=32768)
#: Short sequences: some state-space models loop over time in Python.
MODELS = Sizes(batch=32, time=32, hidden=32, vocabulary=32768)
OPTIONS = {"memory_budget": "8MiB", "strict": True}
HEADER = """# Coverage

What people write after a big linear layer (`tests/gallery.py`) and model families of transformers
(`tests/families.py`), as `python docs/coverage.py` measured them: {rows} tokens, vocabulary
{vocabulary}, float32, {logits} MiB of logits, chunks of 8 MiB, on a CPU with torch {torch}.

- **peak**: of a forward and backward pass above what was held before it, next to Inductor's.
- **error**: of the worst gradient from float64, next to Inductor's, both relative to its norm (0
  for Inductor: an op has no float64 kernel, and Inductor's gradients are the reference).

{summary}
"""


def main() -> int:
    """Measures in child processes, or is one of them; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, metavar="DIR")
    args = parser.parse_args()
    names = [name for name, _, _ in _entries()]
    unknown = [name for name in args.only if name not in names]
    if unknown:
        parser.error(f"--only: no entry {unknown[0]!r}; there are {', '.join(names)}")
    if args.worker:
        _work(args.worker, args.results, args.only)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.results or Path(temporary)
        directory.mkdir(exist_ok=True)
        for method in METHODS:
            command = [sys.executable, __file__, "--worker", method, "--results", str(directory)]
            if args.only:
                command += ["--only", *args.only]
            environment = {**os.environ, **PEAK_ENVIRONMENT}
            subprocess.run(command, check=True, env=environment)
        page, wrong = _page(directory, args.only)
    print(page)
    if not args.only:
        (ROOT / "docs" / "coverage.md").write_text(page)
    return 1 if wrong else 0


# ---- measuring -------------------------------------------------------------------------------


def _entries() -> list[tuple[str, str, Any]]:
    """(name, group, entry) of everything."""
    found: list[tuple[str, str, Any]] = [(e.name, e.group, e) for e in GALLERY]
    return found + [(f.name, "transformers", f) for f in FAMILIES]


def _case(name: str, entry: Any) -> tuple[Callable[..., Any], list[Any], list[torch.Tensor], bool]:
    """(function, arguments, what it is differentiated by, whether sizes depend on data)."""
    if hasattr(entry, "function"):
        inputs = entry.inputs(LOSSES, torch.float32)
        leaves = [t for t in inputs if t.requires_grad]
        return entry.function, inputs, leaves, entry.unbacked
    model = build(entry, MODELS.vocabulary)
    ids = torch.randint(4, MODELS.vocabulary, (MODELS.batch, MODELS.time))
    named = arguments(entry, model, ids)
    return model, [named], [p for p in model.parameters() if p.requires_grad], False


def _work(method: str, directory: Path, only: list[str]) -> None:
    warnings.simplefilter("ignore")
    for name, _, entry in _entries():
        path = directory / f"{method}-{name}.json"
        if (only and name not in only) or path.exists():
            continue
        torch._dynamo.reset()
        try:
            found = _measure(method, name, entry, directory)
        except Exception as error:  # one that fails is a row of the table
            found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        path.write_text(json.dumps(found))
        print(method, name, found, file=sys.stderr, flush=True)


def _measure(method: str, name: str, entry: Any, directory: Path) -> dict[str, Any]:
    function, inputs, leaves, unbacked = _case(name, entry)
    if method == "float64":
        for leaf in leaves:
            leaf.data = leaf.data.double()
        inputs = [_doubled(value) for value in inputs]
        call = function
        torch.Tensor.float = torch.Tensor.double  # ``logits.float()`` would round the reference
    elif method == "inductor":
        call = torch.compile(function)
    else:
        call = torch.compile(function, backend="autochunk", options=OPTIONS)
    from autochunk.report import collect

    memory = PeakMemory(torch.device("cpu"))
    with (
        collect() as reports,
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=unbacked),
    ):
        for _ in range(1 if method == "float64" else 2):
            for leaf in leaves:
                leaf.grad = None
            memory.start()
            _total(call(**inputs[0]) if isinstance(inputs[0], dict) else call(*inputs)).backward()
            above = status_bytes("VmHWM") - memory.base
    torch.save([leaf.grad for leaf in leaves], directory / f"{method}-{name}.pt")
    rows = [row for report in reports for row in report.rows]
    chunked = [row for row in rows if row.refusal is None]
    refused = [row.refusal.code for row in rows if row.refusal is not None]
    return {
        "peak": above,
        "strategies": sorted({s for row in chunked for s in row.strategy.split(" + ")}),
        "refused": sorted(set(refused)),
    }


def _doubled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _doubled(item) for key, item in value.items()}
    return value.double() if value.is_floating_point() and not value.requires_grad else value


def _total(result: Any) -> torch.Tensor:
    if hasattr(result, "loss"):
        return result.loss
    parts = result if isinstance(result, tuple) else (result,)
    return sum(part.sum() for part in parts if part.requires_grad)


# ---- the page --------------------------------------------------------------------------------


def _page(directory: Path, only: list[str]) -> tuple[str, list[str]]:
    """The page, and the names of entries that are wrong."""
    tables: dict[str, list[list[str]]] = {}
    wrong, failing, counted, halved = [], [], 0, 0
    for name, group, entry in _entries():
        if only and name not in only:
            continue
        found = {m: json.loads((directory / f"{m}-{name}.json").read_text()) for m in METHODS}
        failed = next(
            (f"{m}: {found[m]['failed']}" for m in METHODS[1:] if "failed" in found[m]), ""
        )
        what = f"{name}, {entry.kind}" if hasattr(entry, "kind") else name
        if failed:
            failing.append(name)
            counted += 1
            tables.setdefault(group, []).append([what, failed, "", ""])
            continue
        ours, theirs = found["autochunk"], found["inductor"]
        # Where an op has no float64 kernel, Inductor's gradients are the reference.
        exact = "inductor" if "failed" in found["float64"] else "float64"
        errors = [_error(directory, m, name, exact) for m in ("autochunk", "inductor")]
        if not errors[0] <= 2 * errors[1] + 2e-6:
            wrong.append(name)
        peak = f"{ours['peak'] / MIB:.0f} / {theirs['peak'] / MIB:.0f} MiB"
        ratio = ours["peak"] / theirs["peak"]
        result = " + ".join(ours["strategies"]) or ", ".join(ours["refused"])
        if getattr(entry, "parallel", True):
            counted += 1
            halved += bool(ours["strategies"]) and ratio <= 0.5
        tables.setdefault(group, []).append(
            [what, result, f"{peak} = {ratio:.2f}", f"{errors[0]:.1e} / {errors[1]:.1e}"]
        )
    headers = ["", "result", "peak", "error"]
    body = "\n\n".join(
        f"## {group.capitalize()}\n\n" + tabulate(rows, headers, tablefmt="github")
        for group, rows in tables.items()
    )
    summary = (
        f"{halved} of {counted} entries whose rows are independent are chunked with at most half "
        f"of Inductor's peak. Wrong: {', '.join(wrong) or 'none'}. Failed here, under `strict` "
        f"(plain Inductor without it): {', '.join(failing) or 'none'}."
    )
    header = HEADER.format(
        rows=LOSSES.batch * LOSSES.time,
        vocabulary=LOSSES.vocabulary,
        logits=LOSSES.batch * LOSSES.time * LOSSES.vocabulary * 4 // MIB,
        torch=torch.__version__,
        summary=summary,
    )
    return header + "\n" + body + "\n", wrong + failing


def _error(directory: Path, method: str, name: str, reference: str) -> float:
    """The largest distance of a gradient from the reference's, relative to its norm.

    Gradients that are zero but for rounding are measured by the largest one.
    """
    ours = torch.load(directory / f"{method}-{name}.pt")
    exact = torch.load(directory / f"{reference}-{name}.pt")
    pairs = [(a, b.double()) for a, b in zip(ours, exact, strict=True) if b is not None]
    least = 1e-4 * max(b.norm().item() for _, b in pairs)
    return max((a - b).norm().item() / max(b.norm().item(), least) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
