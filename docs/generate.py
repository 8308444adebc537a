"""Writes the parts of the docs that are made from the code.

    python docs/generate.py          rewrites docs/options.md, refusals.md, rules.md, walkthrough.md
    python docs/generate.py --check  exits 1 if one of them is out of date

The walkthrough holds the real graphs of one example, stage by stage; it is written but not
checked, as graphs are printed differently from one release of PyTorch to the next.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import tempfile
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path

import torch
import torch.nn.functional as F

import autochunk
from autochunk.rules import RULES

DOCS = Path(__file__).parent
NOTE = "<!-- Made by docs/generate.py; do not edit. -->\n\n"


def options() -> str:
    """The table of options, from the docstring of ``Options``."""
    text = inspect.getdoc(autochunk.Options) or ""
    described = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text, flags=re.MULTILINE))
    lines = [
        NOTE + "# Options\n",
        'Given as `torch.compile(model, backend="autochunk", options={...})`. '
        "`mode=` is handed to Inductor.\n",
        "| option | default | meaning |",
        "| --- | --- | --- |",
    ]
    for field in fields(autochunk.Options):
        default = {} if field.default is MISSING else field.default
        if field.name == "min_bytes":
            default = f"{field.default // 2**20}MiB"
        elif field.name == "accumulate_dtype":
            default = "auto"
        meaning = re.sub(r"\s+", " ", described[field.name]).replace("``", "`")
        lines.append(f"| `{field.name}` | `{default!r}` | {meaning} |")
    lines.append(
        textwrap.dedent(
            """
            Give at most one of `chunk_rows`, `num_chunks` and `memory_budget`; `autotune` goes with
            the last alone. Without any of them
            a chunk's logits take about half the bytes of the weight ([how it
            works](how-it-works.md#bytes-at-the-peak)). An option that does not exist, has the
            wrong type or contradicts another raises `autochunk.OptionError`, which names what is
            valid.
            PyTorch hands a custom backend its options at the first call of the compiled function;
            `options=autochunk.options(...)` checks them where they are written.

            `AUTOCHUNK_DEBUG=1` (or a directory) in the environment is `debug` for every function.
            """
        )
    )
    return "\n".join(lines)


def refusals() -> str:
    """The table of refusal codes."""
    lines = [
        NOTE + "# What is left alone, and why\n",
        "A head that cannot be rewritten runs as plain Inductor runs it. `autochunk.explain` and "
        "`debug` name the op and your line. The codes:\n",
        "| code | meaning |",
        "| --- | --- |",
    ]
    lines += [f"| `{code}` | {why} |" for code, why in autochunk.REFUSAL_CODES.items()]
    return "\n".join(lines) + "\n"


def rules() -> str:
    """The ops that may follow a head."""
    families: dict[str, list[str]] = {}
    for target, rule in RULES.items():
        families.setdefault(rule.family, []).append(str(target).removeprefix("aten."))
    lines = [
        NOTE + "# What may follow a head\n",
        "Every ATen op that PyTorch tags as pointwise, and the ops below. `F.cross_entropy` and "
        "its like are lowered to these first.\n",
        "| family | ops |",
        "| --- | --- |",
    ]
    lines += [
        f"| {family} | {', '.join(f'`{op}`' for op in sorted(ops))} |"
        for family, ops in families.items()
    ]
    return "\n".join(lines) + "\n"


_STAGES = {
    "dynamo": "## 1. What Dynamo hands over\n\nThe forward graph, torch-level calls.",
    "lowered": "## 2. Lowered\n\nEverything downstream of the head as functional ATen. "
    "`cross_entropy` has become a log-softmax, a gather, masks and two sums.",
    "region0_body": "## 3. Lifted\n\nThe region on `[rows, *features]`: any number of rows. The "
    "slice of the user's code is gone from it: it is applied to the hidden states instead. The "
    "sum over tokens mixes rows, so the body ends before it.",
    "region0_cotangents": "## 4. The tail\n\nThe derivative of the loss with respect to the body's "
    "output, traced through autograd. It does not use that output (`arg0_1`): the loss is affine "
    "in it, and the cotangents are known before the loop runs.",
    "region0_full_kernel": "## 5. The chunk's kernel\n\nValue and vjp of the body for one chunk, "
    "with the matrix products taken out: the loop fills `buffer0` with the chunk's logits, the "
    "kernel overwrites it with their gradient (`copy_`), and the loop multiplies that by the "
    "weight (into the hidden states' gradient) and by the hidden states (into the weight's).",
    "rewritten": "## 6. Rewritten\n\nWhat Inductor compiles. `fused_kept` is the loop; its last "
    "result is a ticket for the gradients. `attach_kept` is the loss with these gradients.",
}


def walkthrough() -> str:
    """One example with the graph of each stage."""

    def loss_function(hidden, weight, labels):
        logits = F.linear(hidden, weight)[:, :-1].float()
        return F.cross_entropy(logits.reshape(-1, 1000), labels[:, 1:].reshape(-1))

    hidden = torch.randn(2, 65, 32, requires_grad=True)
    weight = torch.randn(1000, 32, requires_grad=True)
    labels = torch.randint(0, 1000, (2, 65))
    with tempfile.TemporaryDirectory() as directory:
        explanation = autochunk.explain(
            loss_function, {"min_bytes": 0, "chunk_rows": 32, "strict": True, "debug": directory}
        )(hidden, weight, labels)
        (path,) = Path(directory).iterdir()
        graphs = {p.stem.split("_", 1)[1]: p.read_text() for p in path.iterdir()}
    source = textwrap.dedent(inspect.getsource(loss_function))
    (row,) = explanation.chunked
    parts = [
        NOTE + "# One example through every stage\n",
        f"```python\n{source}```\n",
        f"Found: {row.found}; {row.strategy}, {row.chunks} rows.\n",
    ]
    for name, text in _STAGES.items():
        parts.append(f"{text}\n\n```python\n{_tidy(graphs[name])}\n```\n")
    return "\n".join(parts)


def _tidy(graph: str) -> str:
    lines = [line for line in graph.splitlines() if line.strip() and line.strip()[0] != "#"]
    lines = [re.sub(r";  \w+ = .*None$", "", line) for line in lines]
    return textwrap.dedent("\n".join(lines))


def main() -> int:
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    stale = []
    for name, make in {"options": options, "refusals": refusals, "rules": rules}.items():
        path, text = DOCS / f"{name}.md", make()
        if check:
            stale += [path.name] if not path.exists() or path.read_text() != text else []
        else:
            path.write_text(text)
    if not check:
        (DOCS / "walkthrough.md").write_text(walkthrough())
    for name in stale:
        print(f"{name} is out of date; run python docs/generate.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
