"""What compiling costs: a Hugging Face Llama's first step, autochunk next to Inductor.

    python examples/compile_time.py                  2 layers, a vocabulary of 128 256
    python examples/compile_time.py --pairs 5

Each first step is taken in a process of its own. "cold" starts with empty caches, "warm" with those
that the cold one left. What is shown is the first step less the second one. The methods take turns,
and the one that begins alternates. Exits with 1 if their losses disagree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from tabulate import tabulate

from autochunk.report import collect

METHODS = ("inductor", "autochunk")


def main() -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3, help="cold and warm starts of each method")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=256, help="tokens, in 2 sequences")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(first_step(args)))
        return 0
    seconds: dict[tuple[str, str], list[float]] = {
        (method, start): [] for start in ("cold", "warm") for method in METHODS
    }
    losses: dict[str, float] = {}
    for pair in range(args.pairs):
        for method in METHODS if pair % 2 == 0 else METHODS[::-1]:
            with tempfile.TemporaryDirectory() as cache:
                for start in ("cold", "warm"):
                    taken, losses[method] = in_process(method, cache)
                    seconds[method, start].append(taken)
    rows = []
    for (method, start), taken in seconds.items():
        middle, reference = (statistics.median(s) for s in (taken, seconds[METHODS[0], start]))
        spread = f"{min(taken):.1f} – {max(taken):.1f}"
        rows.append([start, method, f"{middle:.1f}", spread, f"{middle / reference:.2f}"])
    sizes = f"{args.layers} layers, {args.hidden} hidden, {args.vocabulary} words"
    print(f"compiling a Llama of {sizes}, {args.device}")
    headers = ["caches", "method", "median s", "range s", "ratio"]
    print(tabulate(rows, headers, disable_numparse=True))
    first, second = (losses[method] for method in METHODS)
    if abs(second - first) > 1e-5 * abs(first):
        print(f"the losses disagree: {losses}")
        return 1
    return 0


def in_process(method: str, cache: str) -> tuple[float, float]:
    """Seconds of compiling, and the loss."""
    command = [sys.executable, *sys.argv, "--only", method]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds, loss = json.loads(done.stdout.splitlines()[-1])
    return seconds, loss


def first_step(args: argparse.Namespace) -> tuple[float, float]:
    """The first step's seconds less the second one's, and the loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=args.vocabulary,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    net = LlamaForCausalLM(config).to(args.device)
    ids = torch.randint(0, args.vocabulary, (2, args.rows // 2), device=args.device)
    compiled = torch.compile(net, backend=args.only)
    taken = []
    with collect() as reports:
        for _ in range(2):
            begin = time.perf_counter()
            loss = compiled(input_ids=ids, labels=ids).loss
            loss.backward()
            value = loss.item()
            taken.append(time.perf_counter() - begin)
    if args.only == "autochunk" and not any(report.chunked for report in reports):
        sys.exit("nothing was chunked, so there is nothing to compare: give more --rows")
    return taken[0] - taken[1], value


if __name__ == "__main__":
    sys.exit(main())
