"""TRL's trainers, reading the model's own logits.

TRL gives every model it trains a head of its own (``add_fused_lm_head``): log-probabilities in
tiles, inside of an autograd Function with a backward pass written for them. ``torch.compile`` sees
none of it, and autochunk finds no head there: the logits are cut already. :func:`use_plain_head`
takes that head off again: the calls of TRL's losses are answered from ``model(...).logits``, with
the formulas as the books have them, and the compiler cuts the logits.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch


def use_plain_head(trainer: Any) -> None:
    """Answers the losses of a trainer from its models' own logits.

    Call it after the trainer was made, which is when TRL patches the models.

    Args:
        trainer: TRL's ``SFTTrainer``, ``DPOTrainer`` or ``GRPOTrainer``.
    """
    temperature = getattr(trainer, "temperature", 1.0)
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            base.forward = types.MethodType(_plain_forward(type(base).forward, temperature), base)


def _plain_forward(original: Any, temperature: float) -> Any:
    @functools.wraps(original)  # ``generate`` reads its signature
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any
    ) -> Any:
        if fused_lm_head:
            return scores(original(self, *args, **kwargs).logits, labels, temperature)
        if labels is not None:
            kwargs["labels"] = labels
        return original(self, *args, **kwargs)

    return forward


def scores(logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> Any:
    """What TRL's losses read of a model's output, computed from its logits.

    Args:
        logits: ``[batch, tokens, vocabulary]``.
        labels: ``[batch, tokens]``, -100 where a token does not count.
        temperature: The logits are divided by it.

    Returns:
        TRL's ``FusedCausalLMOutput``. Of each next token, ``[batch, tokens - 1]``: ``log_probs``,
        ``entropy``, ``mean_logits`` and ``is_top1``, zero where it does not count
        (``label_mask``); the mean negative log-probability, ``loss``.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    logits, labels = logits[:, :-1].float() / temperature, labels[:, 1:]
    mask = labels != -100
    index = labels.clamp(min=0)
    log_p = logits.log_softmax(-1)
    log_probs = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0.0)
    entropy = -(log_p.exp() * log_p).sum(-1)
    with torch.no_grad():
        mean_logits = logits.mean(-1).masked_fill(~mask, 0.0)
        is_top1 = (logits.argmax(-1) == index) & mask
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / mask.sum().clamp(min=1),
        log_probs=log_probs,
        entropy=entropy.masked_fill(~mask, 0.0),
        mean_logits=mean_logits,
        is_top1=is_top1,
        label_mask=mask,
    )
