"""Shows what autochunk does to a small model: its report, and the graphs before and after.

The model has two heads. The one whose loss works on each token alone runs in chunks; the one
with a softmax over the batch can't, and the report names the operation and the line that prevent
it. ``options={"debug": DIRECTORY}`` writes the graph of every stage into a directory; the one that
Dynamo captured and the one that Inductor compiles instead are printed here.

    python examples/inspect_graph.py
    python examples/inspect_graph.py --stages

Exits with status 1 if loss or gradients disagree with eager PyTorch's.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import autochunk

TOLERANCE = 1e-5


class Model(nn.Module):
    """An embedding, a layer and two heads."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layer = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        self.contrast = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.embed(ids)))
        logits = self.head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        across_batch = torch.softmax(self.contrast(hidden), dim=0)
        return loss / labels.numel() + across_batch.square().mean()


def main() -> int:
    """Explains the model, trains one step of it, and prints graphs and tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory",
        default="autochunk_debug",
        help="where the graphs are written (default: %(default)s)",
    )
    parser.add_argument(
        "--stages", action="store_true", help="print the graphs between these two as well"
    )
    parser.add_argument("--rows", type=int, default=16, help="per chunk (default: %(default)s)")
    args = parser.parse_args()
    if args.rows < 1:
        parser.error(f"--rows is {args.rows}; it must be at least 1")

    torch.manual_seed(0)
    model = Model(vocabulary=512, hidden=32)
    ids, labels = torch.randint(512, (2, 4, 16)).unbind()
    # min_bytes: a model this small would be left alone.
    options = {"min_bytes": 0, "chunk_rows": args.rows, "strict": True}
    # The debug flag logs the report as well; here it is printed.
    logging.getLogger("autochunk").setLevel(logging.ERROR)
    debugged = autochunk.explain(model, options={**options, "debug": args.directory})
    explanation = debugged(ids, labels)
    print(explanation, end="\n\n")

    (directory,) = {Path(report.directory) for report in explanation.reports}
    stages = sorted(directory.iterdir(), key=lambda path: int(path.name.partition("_")[0]))
    shown = stages if args.stages else [stages[0], stages[-1]]
    for path in shown:
        print(f"---- {path.name} ----\n{path.read_text().strip()}\n")

    compiled = torch.compile(model, backend="autochunk", options=options)
    found = compare(model, compiled, ids, labels)
    print(tabulate(found, ["", "eager", "autochunk", "relative difference"], floatfmt=".3g"))
    failed = [name for name, *_, difference in found if not difference <= TOLERANCE]
    if failed:
        print(f"FAILED: {', '.join(failed)} disagree")
    if len(explanation.chunked) != 1 or len(explanation.refused) != 1:
        failed.append("report")
        print("FAILED: one head should have been chunked, and one refused")
    return 1 if failed else 0


def compare(model: Model, compiled, ids: Tensor, labels: Tensor) -> list[list]:
    """Loss and norms of the gradients: name, eager's, autochunk's, relative difference."""
    runs = []
    for function in (model, compiled):
        model.zero_grad()
        loss = function(ids, labels)
        loss.backward()
        gradients = {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters()}
        runs.append({"loss": loss.detach(), **gradients})
    eager, chunked = runs
    return [
        [
            name,
            eager[name].norm().item(),
            chunked[name].norm().item(),
            ((chunked[name] - eager[name]).norm() / eager[name].norm()).item(),
        ]
        for name in eager
    ]


if __name__ == "__main__":
    sys.exit(main())
