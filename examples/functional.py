"""The functional form: a loss of logits that are never made, without a model to compile.

    python examples/functional.py                          batch 4 × 512, hidden 1024
    python examples/functional.py --tokens 4096 --hidden 4096   batch 4 × 4096, hidden 4096

Cross entropy with ignored labels over a vocabulary of 128 000 in bfloat16: the plain expression
and ``autochunk.chunked_linear``, one step each in a process of its own. Prints loss, gradient
norms, peak memory and time; exits with 1 if they disagree. ``--skip-plain`` leaves the plain
expression out where its logits do not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from tabulate import tabulate

from autochunk import chunked_linear
from autochunk.bench.memory import MIB, PEAK_ENVIRONMENT, PeakMemory


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Any function of the logits; this one is the mean over labels that are not -100."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def main() -> int:
    """Runs both forms in child processes, or is one of them; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--batch-chunk", type=int, default=1)
    parser.add_argument("--sequence-chunk", type=int, default=256)
    parser.add_argument("--skip-plain", action="store_true")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(step(args)))
        return 0
    forms = ["chunked_linear"] if args.skip_plain else ["plain", "chunked_linear"]
    found = {}
    for form in forms:
        command = [sys.executable, *sys.argv, "--worker", form]
        environment = {**os.environ, **PEAK_ENVIRONMENT}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"the process that runs {form} ended with status {done.returncode}; see above")
        found[form] = json.loads(done.stdout.splitlines()[-1])
    rows = [[form, *values.values()] for form, values in found.items()]
    headers = ["", "loss", "norm of dx", "norm of dw", "peak above base, MiB", "seconds"]
    print(f"{args.batch} × {args.tokens} tokens, {args.hidden} × {args.vocabulary}, bfloat16")
    print(tabulate(rows, headers, floatfmt=("", ".6f", ".5e", ".5e", ".0f", ".1f")))
    if args.skip_plain:
        return 0
    plain, ours = (list(found[form].values())[:3] for form in forms)
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, plain, strict=True))
    print(f"\nlargest relative difference: {worst:.1e}")
    return 0 if worst < 1e-3 else 1


def step(args: argparse.Namespace) -> dict[str, float]:
    """The second of two forward and backward passes, measured."""
    torch.manual_seed(0)
    device = torch.device(args.device)

    def normal(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, dtype=torch.bfloat16, device=device)
        return made.mul_(args.hidden**-0.25).requires_grad_()

    x = normal(args.batch, args.tokens, args.hidden)
    weight = normal(args.vocabulary, args.hidden)
    labels = torch.randint(args.vocabulary, x.shape[:2], device=device)
    labels[:, : args.tokens // 8] = -100
    memory = PeakMemory(device)
    for _ in range(2):
        x.grad = weight.grad = None
        memory.start()
        begin = time.perf_counter()
        if args.worker == "plain":
            loss = loss_of(F.linear(x, weight), labels)
        else:
            sizes = {"batch_chunk": args.batch_chunk, "sequence_chunk": args.sequence_chunk}
            loss = chunked_linear(loss_of, x, weight, labels, **sizes)
        loss.backward()
        value = loss.item()
        above, _ = memory.stop()
        seconds = time.perf_counter() - begin
    return {
        "loss": value,
        "dx": x.grad.float().norm().item(),
        "dw": weight.grad.float().norm().item(),
        "peak": above / MIB,
        "seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
