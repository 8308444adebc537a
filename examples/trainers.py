"""Trainers of other libraries, unmodified: peak memory of a step under Inductor and autochunk.

    python examples/trainers.py                           all of them
    python examples/trainers.py --only lightning sft-plain

Each trainer makes a few steps on real text, twice, in a process of its own: with the model
compiled by ``backend="inductor"``, and by ``backend="autochunk"``. The model is a Llama of one
layer with random weights and the vocabulary of SmolLM2 (49152), whose logits are most of what a
step needs. The peak is that of the forward and backward pass above what was held before, without
the first step, which compiles.

"plain head" rows: TRL's trainers compute log-probabilities in tiles of their own; there the
model's own head is used instead (``_plain_head.py``).

Exits with 1 if losses or gradient norms disagree.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _compare import (
    MIB,
    PeakMemory,
    add_arguments,
    backend_options,
    check_arguments,
    conclude,
    language_reference,
    run_alone,
)
from finetune_smollm import find_gguf
from tabulate import tabulate

METHODS = ("inductor", "autochunk")
TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-4
#: TRL's trainers with TRL's own head: autochunk finds none.
TILED = ("sft", "dpo", "grpo")


def main() -> int:
    """Runs the trainers, or in a child process one of them; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TRAINERS, metavar="TRAINER")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step, an even number")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--hidden", type=int, default=64, help="a multiple of 4")
    parser.add_argument("--trainer", help=argparse.SUPPRESS)
    add_arguments(parser)
    parser.set_defaults(memory_budget="24MiB")  # of 192 MiB of logits
    args = parser.parse_args()
    check_arguments(parser, args)
    if args.batch % 2 or args.tokens < 16:
        parser.error("--batch must be even (pairs for DPO), and --tokens 16 or more")
    if args.tiny:
        args.hidden, args.tokens, args.batch = 16, 32, 2
    if args.worker is not None:
        return work(args)
    find_gguf()  # complain once, not in every child
    rows, failed = [], []
    for name in args.only or TRAINERS:
        print(f"{TRAINERS[name].title} …", file=sys.stderr)
        row, failures = compare(name)
        rows.append(row)
        failed += failures
    headers = [
        *("trainer", "losses\ndiffer by", "gradient norms\ndiffer by"),
        *("inductor,\nMiB", "autochunk,\nMiB", "ratio", "heads"),
    ]
    print(
        f"{args.batch} × {args.tokens} tokens × {args.hidden} × vocabulary 49152, float32, "
        f"{args.steps} steps; peak of a step above what was held before"
    )
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 5, "left")))
    return conclude(
        failed, f"All losses agree to {TOLERANCE:.0e}, gradient norms to {NORM_TOLERANCE:.0e}."
    )


def compare(name: str) -> tuple[list[str], list[str]]:
    """A row of the table, and what is wrong with it."""
    trainer = TRAINERS[name]
    missing = [p for p in trainer.packages if importlib.util.find_spec(p) is None]
    if missing:
        return [trainer.title, f"needs pip install {' '.join(missing)}", *[""] * 5], []
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        runs = []
        for method in METHODS:
            run = run_alone(["--trainer", name, "--worker", method], log)
            if run is None:
                print(log.read_text(), file=sys.stderr)
                return [trainer.title, f"failed with {method}"], [f"{name} failed with {method}"]
            runs.append(run)
    plain, chunked = runs
    difference = largest_difference(chunked["losses"], plain["losses"])
    of_norms = largest_difference(chunked["norms"], plain["norms"])
    peaks = [max(run["peaks"][1:]) for run in runs]
    row = [
        trainer.title,
        f"{difference:.1e}",
        f"{of_norms:.1e}",
        *(f"{peak / MIB:.0f}" for peak in peaks),
        f"{peaks[1] / peaks[0]:.2f}",
        chunked["heads"] or "none found (TRL's tiles)",
    ]
    failures = []
    if not difference <= TOLERANCE:
        failures.append(f"{name}: losses differ by {difference:.1e}")
    if not of_norms <= NORM_TOLERANCE:
        failures.append(f"{name}: gradient norms differ by {of_norms:.1e}")
    if len(plain["losses"]) != len(chunked["losses"]) or len(plain["losses"]) < 2:
        failures.append(f"{name}: {len(chunked['losses'])} losses, {len(plain['losses'])} expected")
    if not chunked["heads"] and name not in TILED:
        failures.append(f"{name}: no head was chunked")
    return row, failures


def largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Of two runs' numbers, relative where they are above 1; infinite where one is not a number."""
    pairs = zip(found, expected, strict=False)
    differences = [abs(a - b) / max(abs(b), 1) for a, b in pairs]
    return max((d if math.isfinite(d) else math.inf for d in differences), default=math.inf)


# ---- the child ---------------------------------------------------------------------------------


class Meter:
    """Collects what is compared; a trainer calls ``start`` and ``stop`` around each step."""

    def __init__(self) -> None:
        self.memory = PeakMemory(torch.device("cpu"))
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.peaks: list[int] = []

    def start(self) -> None:
        self.memory.start()

    def stop(self, model: torch.nn.Module | None = None) -> None:
        """Before the optimizer's step; the norm of the model's gradients is taken."""
        self.peaks.append(self.memory.stop()[0])
        if model is not None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            self.norms.append(torch.nn.utils.get_total_norm(grads).item())


def work(args: argparse.Namespace) -> int:
    """Trains with one trainer and one backend, and prints what came of it as a line of JSON."""
    from autochunk.report import collect

    channel, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    meter = Meter()
    torch.manual_seed(0)
    with collect() as reports, tempfile.TemporaryDirectory() as directory:
        TRAINERS[args.trainer].train(Task(args, meter, directory))
    rows = [row for report in reports for row in report.chunked]
    # Generation computes the logits of one token, which are deferred first.
    strategies = dict.fromkeys(row.strategy for row in rows)
    found = {"losses": meter.losses, "norms": meter.norms, "peaks": meter.peaks}
    print(json.dumps({**found, "heads": ", ".join(strategies)}), file=channel, flush=True)
    return 0


@dataclass(frozen=True)
class Task:
    """What a trainer is given.

    Attributes:
        args: The command line.
        meter: Collects losses and peaks.
        directory: A temporary one, for what a library writes.
    """

    args: argparse.Namespace
    meter: Meter
    directory: str

    def compiled(self, model: torch.nn.Module) -> Any:
        """The model, compiled in place."""
        options = {"options": backend_options(self.args)} if self.args.worker == "autochunk" else {}
        model.compile(backend=self.args.worker, **options)
        return model

    def llama(self) -> Any:
        """A Llama of one layer."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=self.args.hidden,
            intermediate_size=4 * self.args.hidden,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2 * self.args.tokens,
            tie_word_embeddings=True,
            use_cache=False,
            pad_token_id=0,
        )
        torch.manual_seed(1)
        return LlamaForCausalLM(config)

    def tokenizer(self) -> Any:
        """SmolLM2's."""
        from transformers import AutoTokenizer

        path = find_gguf()
        loaded = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        loaded.pad_token = loaded.eos_token
        return loaded

    def sequences(self, length: int) -> torch.Tensor:
        """Token ids of real text ``[steps · batch, length]``."""
        count = self.args.steps * self.args.batch
        text = language_reference()[: 8 * count * length]
        ids = self.tokenizer()(text, verbose=False).input_ids
        return torch.tensor(ids[: count * length]).view(count, length)

    def batches(self) -> torch.Tensor:
        """Token ids ``[steps, batch, tokens]``."""
        ids = self.sequences(self.args.tokens)
        return ids.view(self.args.steps, self.args.batch, self.args.tokens)

    def settings(self, batch: int) -> dict[str, Any]:
        """Arguments of all trainers that descend from transformers'."""
        return {
            "output_dir": self.directory,
            "max_steps": self.args.steps,
            "per_device_train_batch_size": batch,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
        }

    def run(self, trainer: Any) -> None:
        """Lets a trainer that descends from transformers' train, with the meter as a callback."""
        from transformers import TrainerCallback

        meter = self.meter

        class Callback(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                meter.start()

            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                meter.stop()

        trainer.add_callback(Callback())
        trainer.train()
        entries = [e for e in trainer.state.log_history if "loss" in e]
        meter.losses += [e["loss"] for e in entries]
        meter.norms += [e["grad_norm"] for e in entries]

    def loop(self, model: Any, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """A plain training loop."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        for ids in self.batches():
            self.meter.start()
            loss = loss_of(ids)
            loss.backward()
            self.meter.stop(model)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.meter.losses.append(loss.item())


# ---- the trainers ------------------------------------------------------------------------------


def _next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def transformers_trainer(task: Task, **settings: Any) -> None:
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": ids, "labels": ids} for ids in task.sequences(task.args.tokens)]
    args = TrainingArguments(**task.settings(task.args.batch), **settings)
    task.run(Trainer(task.compiled(task.llama()), args, train_dataset=data))


def nano_gpt(task: Task) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden = task.args.hidden
            self.wte = torch.nn.Embedding(49152, hidden)
            self.mlp = torch.nn.Sequential(
                torch.nn.LayerNorm(hidden),
                torch.nn.Linear(hidden, 4 * hidden),
                torch.nn.GELU(),
                torch.nn.Linear(4 * hidden, hidden),
            )
            self.lm_head = torch.nn.Linear(hidden, 49152, bias=False)
            self.lm_head.weight = self.wte.weight

        def forward(self, idx: torch.Tensor) -> torch.Tensor:
            x = self.wte(idx)
            return self.lm_head(x + self.mlp(x))

    model = task.compiled(Model())

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids[:, :-1])
        return F.cross_entropy(logits.view(-1, logits.size(-1)), ids[:, 1:].reshape(-1))

    task.loop(model, loss_of)


def accelerate_loop(task: Task) -> None:
    from accelerate import Accelerator

    model = task.compiled(task.llama())
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    for ids in task.batches():
        task.meter.start()
        loss = _next_token_loss(model(input_ids=ids).logits, ids)
        accelerator.backward(loss)
        task.meter.stop(model)
        optimizer.step()
        optimizer.zero_grad()
        task.meter.losses.append(loss.item())


def lora(task: Task) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(task.llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model = task.compiled(model)
    task.loop(model, lambda ids: model(input_ids=ids, labels=ids).loss)


def lightning(task: Task) -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = task.compiled(task.llama())

        def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
            return _next_token_loss(self.net(input_ids=ids).logits, ids)

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            task.meter.start()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            task.meter.stop(self)

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            task.meter.losses.append(outputs["loss"].item())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    trainer = Trainer(
        max_steps=task.args.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(task.batches(), batch_size=None))


def _run_trl(task: Task, trainer: Any, plain: bool) -> None:
    from _plain_head import use_plain_head

    if plain:
        use_plain_head(trainer)
    task.run(trainer)


def sft(task: Task, plain: bool = False, **settings: Any) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**task.settings(task.args.batch), max_length=task.args.tokens, **settings)
    data = Dataset.from_dict({"input_ids": task.sequences(task.args.tokens).tolist()})
    model = task.compiled(task.llama())
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=task.tokenizer())
    _run_trl(task, trainer, plain)


def _preferences(task: Task) -> Any:
    from datasets import Dataset

    tokenizer = task.tokenizer()
    texts = tokenizer.batch_decode(task.sequences(2 * task.args.tokens))
    rows = [
        {"prompt": "Continue: ", "chosen": chosen, "rejected": rejected}
        for chosen, rejected in zip(texts, reversed(texts), strict=True)
    ]
    return Dataset.from_list(rows)


def dpo(task: Task, plain: bool = False) -> None:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**task.settings(task.args.batch // 2), max_length=task.args.tokens)
    trainer = DPOTrainer(
        task.compiled(task.llama()),
        task.compiled(task.llama()),
        args,
        train_dataset=_preferences(task),
        processing_class=task.tokenizer(),
    )
    _run_trl(task, trainer, plain)


def orpo(task: Task) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    args = ORPOConfig(**task.settings(task.args.batch // 2), max_length=task.args.tokens)
    trainer = ORPOTrainer(
        task.compiled(task.llama()),
        args,
        train_dataset=_preferences(task),
        processing_class=task.tokenizer(),
    )
    task.run(trainer)


def grpo(task: Task, plain: bool = False) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def vowels(completions: list[str], **kwargs: Any) -> list[float]:
        return [sum(letter in "aeiou" for letter in c) / len(c) if c else 0.0 for c in completions]

    tokenizer = task.tokenizer()
    length = task.args.tokens // 4
    texts = tokenizer.batch_decode(task.sequences(length))
    same = [text for text in texts if len(tokenizer(text).input_ids) == length]
    args = GRPOConfig(
        **task.settings(task.args.batch),
        num_generations=task.args.batch,
        max_completion_length=task.args.tokens - length,
    )
    trainer = GRPOTrainer(
        task.compiled(task.llama()),
        vowels,
        args,
        train_dataset=Dataset.from_list([{"prompt": text} for text in same]),
        processing_class=tokenizer,
    )
    _run_trl(task, trainer, plain)


@dataclass(frozen=True)
class Trainer:
    """A row of the table.

    Attributes:
        title: Its name.
        train: Does it.
        packages: That it needs.
    """

    title: str
    train: Callable[[Task], None]
    packages: tuple[str, ...] = ()


_TRL = ("trl", "datasets")
TRAINERS: dict[str, Trainer] = {
    "transformers": Trainer("transformers Trainer", transformers_trainer),
    "transformers-smoothing": Trainer(
        "transformers Trainer, label smoothing",
        lambda task: transformers_trainer(task, label_smoothing_factor=0.1),
    ),
    "nanogpt": Trainer("nanoGPT loop", nano_gpt),
    "accelerate": Trainer("Accelerate loop", accelerate_loop, ("accelerate",)),
    "lora": Trainer("PEFT LoRA", lora, ("peft",)),
    "lightning": Trainer("Lightning", lightning, ("lightning",)),
    "sft": Trainer("TRL SFT", sft, _TRL),
    "sft-plain": Trainer("TRL SFT, plain head", lambda task: sft(task, plain=True), _TRL),
    "sft-smoothing": Trainer(
        "TRL SFT, label smoothing", lambda task: sft(task, label_smoothing_factor=0.1), _TRL
    ),
    "dpo": Trainer("TRL DPO", dpo, _TRL),
    "dpo-plain": Trainer("TRL DPO, plain head", lambda task: dpo(task, plain=True), _TRL),
    "orpo": Trainer("TRL ORPO", orpo, _TRL),
    "grpo": Trainer("TRL GRPO", grpo, _TRL),
    "grpo-plain": Trainer("TRL GRPO, plain head", lambda task: grpo(task, plain=True), _TRL),
}


if __name__ == "__main__":
    sys.exit(main())
