"""Losses: each is a plain Python function of logits, as a user would write it.

``N`` rows (tokens), ``V`` words of the vocabulary. Next to the function of all logits a loss has
the same thing in two parts, for methods that loop over rows themselves: numbers per row, and what
becomes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: A label that counts for nothing; one token in 16 has it.
IGNORED = -100
SMOOTHING = 0.1
Z_SCALE = 1e-4
CLIP = 0.2


@dataclass(frozen=True)
class Loss:
    """A loss, and the tensors it takes next to the logits.

    Attributes:
        name: As on the command line.
        whole: From logits ``[N, V]`` and the tensors to a scalar.
        per_row: From logits ``[rows, V]`` and these rows of the tensors to numbers ``[rows]``.
        total: From these numbers ``[N]`` and the whole tensors to the same scalar.
        tensors: From labels ``[N]`` and their log-probabilities (or None) to the tensors, ``[N]``
            each.
        needs_log_probs: Whether ``tensors`` takes the log-probabilities.
        multiple: Of what the number of tokens must be a multiple.
    """

    name: str
    whole: Callable[..., Tensor]
    per_row: Callable[..., Tensor]
    total: Callable[..., Tensor]
    tensors: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]
    needs_log_probs: bool = False
    multiple: int = 1


def full_precision(logits: Tensor) -> Tensor:
    """Logits as float32, as models upcast them; float64 stays what it is."""
    return logits if logits.dtype == torch.float64 else logits.float()


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label ``[rows]`` under logits ``[rows, V]``."""
    chosen = labels.clamp(min=0).unsqueeze(-1)
    return full_precision(logits).log_softmax(-1).gather(-1, chosen).squeeze(-1)


# ---- cross entropy and its relatives ------------------------------------------------------------


def _only_labels(labels: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    ignored = torch.arange(len(labels), device=labels.device) % 16 == 15
    return (labels.masked_fill(ignored, IGNORED),)


def _mean_of_valid(values: Tensor, labels: Tensor) -> Tensor:
    return values.sum() / (labels != IGNORED).sum()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(full_precision(logits), labels)


def _cross_entropy_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(full_precision(logits), labels, reduction="none")


def _smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(full_precision(logits), labels, label_smoothing=SMOOTHING)


def _smoothed_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        full_precision(logits), labels, reduction="none", label_smoothing=SMOOTHING
    )


def _z_loss_rows(logits: Tensor, labels: Tensor) -> Tensor:
    normaliser = full_precision(logits).logsumexp(-1)
    return _cross_entropy_rows(logits, labels) + Z_SCALE * normaliser.square() * (labels != IGNORED)


def _z_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return _mean_of_valid(_z_loss_rows(logits, labels), labels)


# ---- policies -----------------------------------------------------------------------------------

#: Advantage, mask and old log-probability of GRPO's tokens repeat with this many rows.
_PATTERN_ROWS = 1024


def _policy(labels: Tensor, found: Tensor | None) -> tuple[Tensor, ...]:
    """Labels, advantages, old log-probabilities and mask of a batch of completions.

    The ratios of new to old probability are within 10 % of 1, or beyond the clipping bounds by
    far: at a bound itself the gradient jumps, and every rounding would look like an error.
    """
    if found is None:
        raise ValueError("the log-probabilities of the labels are missing")
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(len(labels), device=labels.device) % _PATTERN_ROWS
    advantages = torch.randn(_PATTERN_ROWS, generator=generator)
    near = torch.rand(_PATTERN_ROWS, generator=generator) * 0.2 - 0.1
    drawn = torch.rand(_PATTERN_ROWS, generator=generator)
    shift = torch.where(drawn < 0.1, -0.5, torch.where(drawn > 0.9, 0.5, near))
    mask = (torch.rand(_PATTERN_ROWS, generator=generator) < 0.9).float()
    mask[0] = 1.0
    pattern = [part.to(labels.device)[rows] for part in (advantages, shift, mask)]
    return labels, pattern[0], found - pattern[1], pattern[2]


def _grpo_rows(
    logits: Tensor, labels: Tensor, advantages: Tensor, old: Tensor, mask: Tensor
) -> Tensor:
    ratio = torch.exp(log_probs(logits, labels) - old)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * advantages, clipped * advantages) * mask


def _grpo_total(
    values: Tensor, labels: Tensor, advantages: Tensor, old: Tensor, mask: Tensor
) -> Tensor:
    return values.sum() / mask.sum()


def _grpo(logits: Tensor, labels: Tensor, advantages: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    return _grpo_rows(logits, labels, advantages, old, mask).sum() / mask.sum()


#: Preferred and rejected answers, four of each.
_ANSWERS = 8


def _simpo_total(values: Tensor, labels: Tensor) -> Tensor:
    chosen, rejected = values.view(_ANSWERS, -1).mean(1).chunk(2)
    return -F.logsigmoid(2.0 * (chosen - rejected) - 0.5).mean()


def _simpo(logits: Tensor, labels: Tensor) -> Tensor:
    return _simpo_total(log_probs(logits, labels), labels)


# ---- regression ---------------------------------------------------------------------------------


def _targets(labels: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    return ((labels % 7).float() / 7,)


def _squares(logits: Tensor, targets: Tensor) -> Tensor:
    return (F.relu(full_precision(logits)) - targets.unsqueeze(-1)).square()


def _mse(logits: Tensor, targets: Tensor) -> Tensor:
    return _squares(logits, targets).mean()


def _mse_rows(logits: Tensor, targets: Tensor) -> Tensor:
    return _squares(logits, targets).mean(-1)


def _mse_total(values: Tensor, targets: Tensor) -> Tensor:
    return values.mean()


def _labels(labels: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    return (labels,)


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", _cross_entropy, _cross_entropy_rows, _mean_of_valid, _only_labels),
        Loss("label_smoothing", _smoothed, _smoothed_rows, _mean_of_valid, _only_labels),
        Loss("z_loss", _z_loss, _z_loss_rows, _mean_of_valid, _only_labels),
        Loss("grpo", _grpo, _grpo_rows, _grpo_total, _policy, needs_log_probs=True),
        Loss("simpo", _simpo, log_probs, _simpo_total, _labels, multiple=_ANSWERS),
        Loss("mse", _mse, _mse_rows, _mse_total, _targets),
    )
}
