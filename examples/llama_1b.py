"""Trains a model of Llama-3.2-1B's shape with Inductor and with autochunk.

The same steps with the same data, each method in a process of its own; then the losses side by
side, peak memory, time, and the memory saved as a share of the logits in full precision
(tokens x vocabulary x 4 bytes: 1002 MiB by default). The weights are random unless ``--model``
names real ones:

    python examples/llama_1b.py
    python examples/llama_1b.py --layers 2 --dtype float32
    python examples/llama_1b.py --model meta-llama/Llama-3.2-1B

The two processes hold their weights at the same time: with 16 layers in bfloat16 that takes about
10 GiB of memory.

Exits with status 1 if a loss of autochunk differs from Inductor's by more than 5e-4 (relative: 3
significant decimals) in bfloat16 or 1e-5 in float32, or if less than 80 % of the logits is saved.
"""

from __future__ import annotations

import argparse
import sys

import torch
from _compare import (
    MIB,
    add_arguments,
    backend_options,
    check_arguments,
    conclude,
    failures,
    language_reference,
    print_losses,
    print_summary,
    run_methods,
    split,
    work,
)
from tabulate import tabulate

TOLERANCE = {"bfloat16": 5e-4, "float32": 1e-5}
LEAST_SAVED = 0.8
METHODS = ("inductor", "autochunk")
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
LEARNING_RATES = {"sgd": 0.02, "adamw": 1e-5}


def main() -> int:
    """Runs the comparison, or with ``--worker`` one method of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", metavar="PATH_OR_NAME", help="a causal language model for transformers to load"
    )
    parser.add_argument("--layers", type=int, help="keep this many layers only")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=sorted(TOLERANCE), help="default: %(default)s"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--optimizer",
        default="sgd",
        choices=sorted(OPTIMIZERS),
        help="default: %(default)s, which has no state",
    )
    parser.add_argument("--learning-rate", type=float, help=f"default: {LEARNING_RATES}")
    add_arguments(parser)
    args = parser.parse_args()
    check_arguments(parser, args)
    if args.model is not None and args.tiny:
        parser.error("--tiny has random weights; it can't be combined with --model")
    if args.worker is None:
        return compare(args)
    torch.manual_seed(0)
    model = load(args).to(args.device).train()
    rate = args.learning_rate or LEARNING_RATES[args.optimizer]
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=rate)
    batches = read_tokens(parser, args, model.config.vocab_size)
    work(args.worker, model, batches, optimizer, backend_options(args))
    return 0


def compare(args: argparse.Namespace) -> int:
    """Runs both methods and prints what they did; returns the exit status."""
    runs = run_methods(METHODS, args.steps)
    inductor, chunked = runs
    print_losses(runs)
    print(chunked.report, end="\n\n")
    print_summary(runs)
    logits_bytes = args.tokens * make_config(args).vocab_size * 4
    saved_bytes = inductor.peak_bytes - chunked.peak_bytes
    print(
        tabulate(
            [
                ["logits in full precision", f"{logits_bytes / MIB:.0f} MiB"],
                ["peak memory saved", f"{saved_bytes / MIB:.0f} MiB"],
                ["share", f"{saved_bytes / logits_bytes:.0%}"],
            ],
            tablefmt="plain",
        ),
        end="\n\n",
    )
    found = failures(chunked, inductor, TOLERANCE[args.dtype])
    if not args.tiny and saved_bytes < LEAST_SAVED * logits_bytes:
        found.append(f"less than {LEAST_SAVED:.0%} of the logits' bytes were saved")
    accepted = f"{TOLERANCE[args.dtype]:.0e} (relative)"
    return conclude(found, f"All {args.steps} losses agree with Inductor's to {accepted}.")


def make_config(args: argparse.Namespace):
    """The configuration of the model: of ``--model``, or of Llama-3.2-1B."""
    from transformers import AutoConfig, LlamaConfig

    if args.model is not None:
        return AutoConfig.from_pretrained(args.model)
    if args.tiny:
        shape = {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    else:
        shape = {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
    return LlamaConfig(
        **shape,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def load(args: argparse.Namespace) -> torch.nn.Module:
    """The model, with random weights unless ``--model`` names real ones."""
    from transformers import AutoModelForCausalLM

    config = make_config(args)
    config.use_cache = False
    if args.layers is not None:
        config.num_hidden_layers = min(args.layers, config.num_hidden_layers)
    dtype = getattr(torch, args.dtype)
    if args.model is not None:
        return AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype=dtype)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def read_tokens(
    parser: argparse.ArgumentParser, args: argparse.Namespace, vocabulary: int
) -> torch.Tensor:
    """Token ids ``[steps, 1, tokens]``: real text for real weights, else random ones.

    Random ids are drawn with a density that falls with the id, as frequencies of words do, so
    that there is something to learn.
    """
    if args.model is None:
        uniform = torch.rand(args.steps, 1, args.tokens, dtype=torch.float64)
        return (uniform**4 * vocabulary).long()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(language_reference(), verbose=False).input_ids)
    return split(parser, args, ids, batch=1)


if __name__ == "__main__":
    sys.exit(main())
