"""TRL's own GRPO and DPO losses on SmolLM2-135M, with logits that never exist as a whole.

    python examples/trl_losses.py                GRPO
    python examples/trl_losses.py --loss dpo     DPO, the reference model's head in the same graph

What is compiled is ``GRPOTrainer._compute_loss`` or ``DPOTrainer._compute_loss`` of the installed
``trl`` package, not a copy of it. TRL patches models with a chunked head written for its losses;
here the model keeps its ordinary one: ``PlainHead`` answers TRL's calls from ``model(...).logits``
with the formulas as the books have them, and autochunk does the rest. Needs
``pip install -c constraints.txt trl``.

Eager, Inductor and autochunk take the same steps on real text with made-up rewards. Exits with 1
if losses disagree, or the gradients of the first step.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

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
from _plain_head import scores
from finetune_smollm import find_gguf, load_smollm, load_tiny

METHODS = ("eager", "inductor", "autochunk")
#: DPO's loss is a difference of sums of some 200 log-probabilities: eager and Inductor differ by
#: 2e-5 there.
TOLERANCES = {"grpo": 1e-5, "dpo": 5e-5}
GRADIENT_TOLERANCE = 1e-4


def main() -> int:
    """Runs all methods, or in a child process one of them; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loss", choices=["grpo", "dpo"], default="grpo")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4, help="sequences (DPO: two of each pair)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    add_arguments(parser)
    parser.set_defaults(memory_budget="24MiB")  # of 192 MiB of logits
    args = parser.parse_args()
    check_arguments(parser, args)
    if args.loss == "dpo" and args.batch % 2:
        parser.error(f"--batch is {args.batch}; DPO needs pairs, an even number")
    if args.worker is None:
        if not args.tiny:
            find_gguf()
        runs = run_methods(METHODS, args.steps)
        print_losses(runs)
        print(runs[-1].report, end="\n\n")
        print_summary(runs)
        tolerance = TOLERANCES[args.loss]
        return conclude(
            failures(runs[-1], runs[0], tolerance, GRADIENT_TOLERANCE),
            f"All {args.steps} losses agree with eager's to {tolerance:.0e} (relative), the first "
            f"step's gradients to {GRADIENT_TOLERANCE:.0e}.",
        )
    torch.manual_seed(0)
    text = language_reference()
    model, ids = load_tiny(text) if args.tiny else load_smollm(text)
    model = model.to(args.device).train()
    policy = PlainHead(model)
    loss = grpo(policy) if args.loss == "grpo" else dpo(policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    batches = split(parser, args, ids, args.batch)
    work(args.worker, model, batches, optimizer, backend_options(args), loss, gradients=True)
    return 0


class PlainHead(torch.nn.Module):
    """A model that answers TRL's calls from its own logits (``_plain_head.scores``)."""

    is_gradient_checkpointing = False

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: torch.Tensor, fused_lm_head: bool = True, **inputs: Any) -> Any:
        return scores(self.model(**inputs).logits, labels)


class _OneProcess:
    """The part of an ``Accelerator`` that the losses use, with nothing to gather from."""

    num_processes = 1
    device = torch.device("cpu")
    sync_gradients = True

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        return x

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _Trainer:
    """The attributes of a trainer that its ``_compute_loss`` reads, without a trainer."""

    def __init__(self, **settings: Any) -> None:
        self.accelerator = _OneProcess()
        self.args = SimpleNamespace(delta=None, use_bias_correction_kl=False)
        self.aux_loss_enabled = False
        self.forget_metrics()
        self.__dict__.update(settings)

    def forget_metrics(self) -> None:
        """Dynamo would compile anew for each length of the lists of past metrics."""
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}


def grpo(policy: PlainHead) -> Any:
    """A function from token ids ``[batch, tokens]`` to TRL's GRPO loss, entropy bonus included."""
    from trl import GRPOTrainer

    class Trainer(_Trainer):
        # Without the decorator that reports times to wandb.
        _get_per_token_logps_and_entropies = (
            GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__
        )

    trainer = Trainer(
        model=policy,
        loss_type="grpo",
        importance_sampling_level="token",
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=True,
        use_adaptive_entropy=False,
        entropy_coef=0.01,
    )

    def loss(ids: torch.Tensor) -> torch.Tensor:
        trainer.forget_metrics()
        batch, tokens = ids.shape
        start = tokens // 4
        lengths = tokens - start - torch.arange(batch) * (tokens // 16)
        mask = (torch.arange(tokens - start) < lengths[:, None]).long()
        inputs = {
            "prompt_ids": ids[:, :start],
            "prompt_mask": torch.ones_like(ids[:, :start]),
            "completion_ids": ids[:, start:],
            "completion_mask": mask,
            "advantages": torch.linspace(-1, 1.5, batch),
        }
        return GRPOTrainer._compute_loss(trainer, policy, inputs)

    return loss


def dpo(policy: PlainHead) -> Any:
    """A function from token ids ``[2 · pairs, tokens]``, the chosen first, to TRL's DPO loss."""
    from trl import DPOTrainer

    trainer = _Trainer(
        model=policy,
        ref_model=copy.deepcopy(policy).requires_grad_(False),
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=0.1,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer.args.gradient_checkpointing_kwargs = None

    def loss(ids: torch.Tensor) -> torch.Tensor:
        trainer.forget_metrics()
        tokens = ids.shape[1]
        mask = (torch.arange(tokens) >= tokens // 4).long().expand_as(ids)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "completion_mask": mask,
        }
        return DPOTrainer._compute_loss(trainer, policy, inputs, False)

    return loss


if __name__ == "__main__":
    sys.exit(main())
