"""What people write after a big linear layer: named, as they write it, at any size.

``tests/test_gallery.py`` compares each with float64 at a small size; ``docs/coverage.py`` measures
each at a size where the logits dominate, and writes docs/coverage.md.

Shapes: B sequences, T tokens, H hidden, V vocabulary; S is a ``Sizes``. Each function takes what
its ``inputs`` makes: first the hidden states ``[B, T, H]``, then the head's weight ``[V, H]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """How large the inputs of an entry are."""

    batch: int = 2
    time: int = 9
    hidden: int = 8
    vocabulary: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Entry:
    """One line of the gallery.

    Attributes:
        name: Of the function.
        group: Heading it is listed under.
        function: Called with the inputs.
        inputs: Makes them, in a dtype.
        expect: ``chunked`` or a refusal code.
        parallel: Whether rows are independent by nature, so that chunking is possible at all.
        note: Why not, or what is to know.
        unbacked: Needs Dynamo to trace sizes that depend on data
            (``torch._dynamo.config.capture_dynamic_output_shape_ops``).
    """

    name: str
    group: str
    function: Callable[..., Any]
    inputs: Callable[[Sizes, torch.dtype], list[Any]]
    expect: str
    parallel: bool
    note: str
    unbacked: bool


GALLERY: list[Entry] = []


def entry(
    group: str,
    *inputs: Callable[[Sizes, torch.dtype], Any],
    expect: str = "chunked",
    parallel: bool | None = None,
    note: str = "",
    unbacked: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds a function to the gallery."""

    def make(sizes: Sizes, dtype: torch.dtype) -> list[Any]:
        torch.manual_seed(sizes.seed)
        return [make_one(sizes, dtype) for make_one in inputs or (hidden, weight, labels)]

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        nature = expect == "chunked" if parallel is None else parallel
        GALLERY.append(
            Entry(function.__name__, group, function, make, expect, nature, note, unbacked)
        )
        return function

    return add


# ---- inputs ----------------------------------------------------------------------------------


def hidden(s: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.randn(s.batch, s.time, s.hidden).to(dtype).requires_grad_()


def weight(s: Sizes, dtype: torch.dtype) -> Tensor:
    scale = 2 / s.hidden**0.5
    return (torch.randn(s.vocabulary, s.hidden) * scale).to(dtype).requires_grad_()


def frozen_hidden(s: Sizes, dtype: torch.dtype) -> Tensor:
    return hidden(s, dtype).detach()


def frozen_weight(s: Sizes, dtype: torch.dtype) -> Tensor:
    return weight(s, dtype).detach()


def labels(s: Sizes, dtype: torch.dtype) -> Tensor:
    """[B, T], a fifth of them ignored."""
    made = torch.randint(s.vocabulary, (s.batch, s.time))
    return made.masked_fill(torch.rand(made.shape) < 0.2, -100)


def tokens(s: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.randint(s.vocabulary, (s.batch, s.time))


def mask(s: Sizes, dtype: torch.dtype) -> Tensor:
    """[B, T], bool, at least one of each sequence."""
    made = torch.rand(s.batch, s.time) < 0.7
    made[:, 0] = True
    return made


def per_token(s: Sizes, dtype: torch.dtype) -> Tensor:
    """[B, T], log-probabilities of another policy."""
    return (torch.randn(s.batch, s.time) - 4).to(dtype)


def per_sequence(s: Sizes, dtype: torch.dtype) -> Tensor:
    """[B], advantages or rewards."""
    return torch.randn(s.batch).to(dtype)


def bias(s: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.randn(s.vocabulary).to(dtype).requires_grad_()


def targets(s: Sizes, dtype: torch.dtype) -> Tensor:
    """[B, T, V], numbers to regress to."""
    return torch.randn(s.batch, s.time, s.vocabulary).to(dtype)


# ---- shared formulas -------------------------------------------------------------------------


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """[B, T] log-probabilities of ``index``."""
    return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


def entropy_of(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def clipped(logp: Tensor, old: Tensor, advantage: Tensor, low: float = 0.2, high: float = 0.2):
    """The clipped surrogate of PPO, per token (Schulman et al. 2017, equation 7)."""
    ratio = (logp - old).exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    return -torch.min(ratio * advantage, bounded * advantage)


def k3(logp: Tensor, reference: Tensor) -> Tensor:
    """Schulman's unbiased estimator of KL(policy, reference), per token."""
    delta = reference - logp
    return delta.exp() - delta - 1


def masked_mean(x: Tensor, m: Tensor) -> Tensor:
    return (x * m).sum() / m.sum()


# ---- language modelling ----------------------------------------------------------------------


@entry("language modelling")
def cross_entropy(x, w, y):
    return F.cross_entropy(F.linear(x, w).float().flatten(0, 1), y.flatten())


@entry("language modelling", hidden, weight, labels, bias)
def smoothed_with_bias(x, w, y, b):
    logits = F.linear(x, w, b).float()
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=0.1)


@entry("language modelling")
def shifted(x, w, y):
    logits = (x @ w.t()).float()
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = y[..., 1:].contiguous()
    return F.cross_entropy(shift_logits.view(-1, shift_logits.size(-1)), shift_labels.view(-1))


@entry("language modelling")
def softcap_and_z_loss(x, w, y):
    logits = 30 * torch.tanh(F.linear(x, w).float() / 30)
    z = torch.logsumexp(logits, -1)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + 1e-4 * (z**2).mean()


@entry("language modelling")
def k_dimensional(x, w, y):
    return F.cross_entropy(F.linear(x, w).float().transpose(1, 2), y)


@entry("language modelling", hidden, weight, tokens, mask)
def unlikelihood(x, w, y, repeated):
    """Welleck et al. 2019: what was said before should not be said again."""
    logits = F.linear(x, w).float()
    p = logits.softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    penalty = -torch.log((1 - p).clamp(min=1e-5)) * repeated
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + penalty.sum() / repeated.sum()


@entry("language modelling")
def per_sequence_perplexity(x, w, y):
    logits = F.linear(x, w).float()
    nll = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    return torch.exp(nll.sum(1) / (y != -100).sum(1)).mean()


# ---- policy optimisation ---------------------------------------------------------------------

POLICY = (hidden, weight, tokens, mask, per_token, per_sequence)
POLICY_REFERENCE = (*POLICY, frozen_hidden, frozen_weight)


@entry("policy optimisation", hidden, weight, tokens, mask, per_sequence)
def reinforce(x, w, y, m, advantage):
    logp = selective_log_softmax(F.linear(x, w), y)
    return -masked_mean(logp * advantage.unsqueeze(1), m)


@entry("policy optimisation", *POLICY)
def grpo(x, w, y, m, old, advantage):
    logp = selective_log_softmax(F.linear(x, w) / 0.9, y)
    loss = clipped(logp, old, advantage.unsqueeze(1))
    return ((loss * m).sum(-1) / m.sum(-1).clamp(min=1.0)).mean()


@entry("policy optimisation", *POLICY, per_token)
def grpo_with_kl(x, w, y, m, old, advantage, reference):
    logp = selective_log_softmax(F.linear(x, w) / 0.9, y)
    loss = clipped(logp, old, advantage.unsqueeze(1)) + 0.04 * k3(logp, reference)
    return ((loss * m).sum(-1) / m.sum(-1).clamp(min=1.0)).mean()


@entry("policy optimisation", *POLICY)
def grpo_with_entropy_bonus(x, w, y, m, old, advantage):
    logits = F.linear(x, w) / 0.9
    logp = selective_log_softmax(logits, y)
    loss = clipped(logp, old, advantage.unsqueeze(1)) - 0.01 * entropy_of(logits)
    return masked_mean(loss, m)


@entry("policy optimisation", *POLICY)
def grpo_on_policy(x, w, y, m, old, advantage):
    """One update a batch: the old policy is this one, detached."""
    logp = selective_log_softmax(F.linear(x, w), y)
    return masked_mean(clipped(logp, logp.detach(), advantage.unsqueeze(1)), m)


@entry("policy optimisation", *POLICY)
def gspo(x, w, y, m, old, advantage):
    """Sequence-level importance ratios (Zheng et al. 2025)."""
    logp = selective_log_softmax(F.linear(x, w), y)
    log_ratio = ((logp - old) * m).sum(-1) / m.sum(-1)
    return clipped(log_ratio, torch.zeros_like(log_ratio), advantage, 3e-4, 4e-4).mean()


@entry("policy optimisation", *POLICY)
def dapo(x, w, y, m, old, advantage):
    """Normalised by all tokens, an upper clip of its own (Yu et al. 2025)."""
    logp = selective_log_softmax(F.linear(x, w), y)
    return (clipped(logp, old, advantage.unsqueeze(1), 0.2, 0.28) * m).sum() / m.sum()


@entry("policy optimisation", *POLICY)
def bnpo(x, w, y, m, old, advantage):
    logp = selective_log_softmax(F.linear(x, w), y)
    return (clipped(logp, old, advantage.unsqueeze(1)) * m).sum() / m.sum().clamp(min=1.0)


@entry("policy optimisation", *POLICY)
def dr_grpo(x, w, y, m, old, advantage):
    """Normalised by a constant (Liu et al. 2025)."""
    logp = selective_log_softmax(F.linear(x, w), y)
    loss = clipped(logp, old, advantage.unsqueeze(1))
    return (loss * m).sum() / (loss.size(0) * loss.size(1))


@entry("policy optimisation", *POLICY_REFERENCE)
def grpo_and_reference_head(x, w, y, m, old, advantage, x_ref, w_ref):
    logp = selective_log_softmax(F.linear(x, w), y)
    with torch.no_grad():
        reference = selective_log_softmax(F.linear(x_ref, w_ref), y)
    loss = clipped(logp, old, advantage.unsqueeze(1)) + 0.04 * k3(logp, reference)
    return masked_mean(loss, m)


@entry("policy optimisation", *POLICY)
def grpo_top_entropy_tokens(x, w, y, m, old, advantage):
    """Only the tokens above a quantile of entropy (Wang et al. 2025)."""
    logits = F.linear(x, w)
    logp = selective_log_softmax(logits, y)
    with torch.no_grad():
        entropy = entropy_of(logits)
        chosen = (entropy >= torch.quantile(entropy.float(), 0.8)) & m
    return masked_mean(clipped(logp, old, advantage.unsqueeze(1)), chosen)


@entry("policy optimisation", *POLICY)
def ppo_with_entropy(x, w, y, m, old, advantage):
    logits = F.linear(x, w)
    distribution = torch.distributions.Categorical(logits=logits, validate_args=False)
    logp = distribution.log_prob(y)
    loss = masked_mean(clipped(logp, old, advantage.unsqueeze(1)), m)
    return loss - 0.01 * masked_mean(distribution.entropy(), m)


@entry("policy optimisation", *POLICY)
def cispo(x, w, y, m, old, advantage):
    """Clipped importance weights, detached (MiniMax 2025)."""
    logp = selective_log_softmax(F.linear(x, w), y)
    weight_ = (logp - old).exp().clamp(max=2.0).detach()
    return -masked_mean(weight_ * advantage.unsqueeze(1) * logp, m)


# ---- preferences -----------------------------------------------------------------------------

PAIRS = (hidden, weight, tokens, mask, frozen_hidden, frozen_weight)


def sequence_logps(logits: Tensor, y: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the chosen (first half of the batch) and the rejected sequences."""
    logps = (selective_log_softmax(logits, y) * m).sum(-1)
    half = logps.shape[0] // 2
    return logps[:half], logps[half:]


@entry("preferences", *PAIRS)
def dpo(x, w, y, m, x_ref, w_ref):
    chosen, rejected = sequence_logps(F.linear(x, w), y, m)
    with torch.no_grad():
        ref_chosen, ref_rejected = sequence_logps(F.linear(x_ref, w_ref), y, m)
    margin = (chosen - rejected) - (ref_chosen - ref_rejected)
    rewards = 0.1 * (chosen - ref_chosen).detach()
    return -F.logsigmoid(0.1 * margin).mean(), rewards


@entry("preferences", *PAIRS)
def ipo(x, w, y, m, x_ref, w_ref):
    chosen, rejected = sequence_logps(F.linear(x, w), y, m)
    with torch.no_grad():
        ref_chosen, ref_rejected = sequence_logps(F.linear(x_ref, w_ref), y, m)
    return ((chosen - rejected - ref_chosen + ref_rejected - 1 / 0.2) ** 2).mean()


@entry("preferences", *PAIRS)
def kto(x, w, y, m, x_ref, w_ref):
    logps = (selective_log_softmax(F.linear(x, w), y) * m).sum(-1)
    with torch.no_grad():
        ref = (selective_log_softmax(F.linear(x_ref, w_ref), y) * m).sum(-1)
    ratio = logps - ref
    baseline = ratio.mean().clamp(min=0).detach()
    half = ratio.shape[0] // 2
    wanted = 1 - torch.sigmoid(0.1 * (ratio[:half] - baseline))
    unwanted = 1 - torch.sigmoid(0.1 * (baseline - ratio[half:]))
    return torch.cat([wanted, 1.2 * unwanted]).mean()


@entry("preferences", hidden, weight, tokens, mask)
def orpo(x, w, y, m):
    logits = F.linear(x, w)
    logps = (selective_log_softmax(logits, y) * m).sum(-1) / m.sum(-1)
    half = logps.shape[0] // 2
    chosen, rejected = logps[:half], logps[half:]
    log_odds = chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -chosen.mean() - 0.1 * F.logsigmoid(log_odds).mean()


@entry("preferences", hidden, weight, tokens, mask)
def simpo(x, w, y, m):
    logps = (selective_log_softmax(F.linear(x, w), y) * m).sum(-1) / m.sum(-1)
    half = logps.shape[0] // 2
    return -F.logsigmoid(2.0 * (logps[:half] - logps[half:]) - 1.0).mean()


@entry("preferences", hidden, weight, tokens, mask)
def cpo(x, w, y, m):
    logits = F.linear(x, w)
    chosen, rejected = sequence_logps(logits, y, m)
    half = y.shape[0] // 2
    nll = F.cross_entropy(logits[:half].flatten(0, 1), y[:half].flatten())
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean() + nll


# ---- distillation ----------------------------------------------------------------------------

TEACHER = (hidden, weight, frozen_hidden, frozen_weight)


@entry("distillation", *TEACHER)
def forward_kl(x, w, x_t, w_t):
    with torch.no_grad():
        teacher = F.linear(x_t, w_t)
    student = F.log_softmax(F.linear(x, w) / 2, -1)
    teacher = F.log_softmax(teacher / 2, -1)
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean() * 4


@entry("distillation", *TEACHER, labels)
def reverse_kl_and_cross_entropy(x, w, x_t, w_t, y):
    logits = F.linear(x, w).float()
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(x_t, w_t).float(), -1)
    student = F.log_softmax(logits, -1)
    reverse = (student.exp() * (student - teacher)).sum(-1).mean()
    return reverse + F.cross_entropy(logits.flatten(0, 1), y.flatten())


@entry("distillation", *TEACHER, labels)
def generalised_jsd(x, w, x_t, w_t, y, beta=0.3, temperature=0.9):
    """GKD (Agarwal et al. 2023), as trl writes it."""
    student = F.log_softmax(F.linear(x, w) / temperature, -1)
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(x_t, w_t) / temperature, -1)
    share = torch.tensor(beta, dtype=student.dtype)
    mixture = torch.logsumexp(
        torch.stack([student + torch.log1p(-share), teacher + torch.log(share)]), dim=0
    )
    kl_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
    kl_student = F.kl_div(mixture, student, reduction="none", log_target=True)
    jsd = beta * kl_teacher + (1 - beta) * kl_student
    return (jsd.sum(-1) * (y != -100)).sum() / (y != -100).sum()


@entry("distillation", hidden, weight, targets)
def teacher_logits_given(x, w, teacher):
    student = F.log_softmax(F.linear(x, w), -1)
    return F.kl_div(student, F.softmax(teacher, -1), reduction="batchmean")


@entry("distillation", hidden, weight, targets, labels)
def teacher_logits_given_and_its_entropy(x, w, teacher, y):
    """Positions at which the teacher is sure count more; logits and teacher are shifted alike."""
    student = F.log_softmax(F.linear(x, w)[:, :-1].float() / 2, -1)
    logp = F.log_softmax(teacher[:, :-1].float() / 2, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    kl = (logp.exp() * (logp - student)).sum(-1) / (1 + entropy)
    return kl[y[:, 1:] != -100].mean()


def peer_logits(s: Sizes, dtype: torch.dtype) -> Tensor:
    return targets(s, dtype).requires_grad_()


@entry("distillation", hidden, weight, peer_logits)
def mutual_learning(x, w, peer):
    """The other network's logits are given and get a gradient (Zhang et al. 2018)."""
    own = F.linear(x, w)
    to_peer = F.kl_div(F.log_softmax(own, -1), F.softmax(peer, -1), reduction="batchmean")
    return to_peer + F.kl_div(F.log_softmax(peer, -1), F.softmax(own, -1), reduction="batchmean")


def wider_weight(s: Sizes, dtype: torch.dtype) -> Tensor:
    return frozen_weight(Sizes(s.batch, s.time, s.hidden, s.vocabulary + 32), dtype)


@entry("distillation", hidden, weight, frozen_hidden, wider_weight)
def vocabularies_of_different_width(x, w, x_t, w_t):
    student = F.linear(x, w)
    with torch.no_grad():
        teacher = F.linear(x_t, w_t)[..., : student.shape[-1]]
    return F.kl_div(
        F.log_softmax(student, -1).flatten(0, 1),
        F.softmax(teacher, -1).flatten(0, 1),
        reduction="batchmean",
    )


@entry("distillation", *TEACHER)
def cosine_of_logits(x, w, x_t, w_t):
    teacher = F.linear(x_t, w_t).detach()
    return 1 - F.cosine_similarity(F.linear(x, w), teacher, dim=-1).mean()


@entry("distillation", *TEACHER)
def mse_of_logits(x, w, x_t, w_t):
    return F.mse_loss(F.linear(x, w), F.linear(x_t, w_t).detach())


@entry("distillation", *TEACHER)
def top_k_distillation(x, w, x_t, w_t):
    with torch.no_grad():
        values, indices = F.linear(x_t, w_t).topk(8, dim=-1)
        teacher = values.softmax(-1)
    student = F.linear(x, w).log_softmax(-1).gather(-1, indices)
    return -(teacher * student).sum(-1).mean()


@entry("distillation", *TEACHER)
def total_variation(x, w, x_t, w_t):
    teacher = F.linear(x_t, w_t).softmax(-1).detach()
    return 0.5 * (F.linear(x, w).softmax(-1) - teacher).abs().sum(-1).mean()


@entry("distillation", hidden, weight, labels)
def r_drop(x, w, y):
    """Two passes with different dropout in one batch should agree (Liang et al. 2021)."""
    logp = F.linear(x, w).float().log_softmax(-1)
    first, second = logp.chunk(2)
    agree = F.kl_div(first, second, log_target=True, reduction="none").sum(-1)
    agree = agree + F.kl_div(second, first, log_target=True, reduction="none").sum(-1)
    return F.nll_loss(logp.flatten(0, 1), y.flatten()) + agree.mean()


@entry("distillation", hidden, weight, labels)
def classifier_free_guidance(x, w, y):
    """Conditional and unconditional logits of one batch, mixed."""
    conditional, unconditional = F.linear(x, w).float().chunk(2)
    logits = unconditional + 1.5 * (conditional - unconditional)
    return F.cross_entropy(logits.flatten(0, 1), y[: logits.shape[0]].flatten())


@entry("policy optimisation", *POLICY)
def logps_and_entropy_in_pieces(x, w, y, m, old, advantage):
    """As TRL computes them to save memory: a sequence, or 4 tokens, at a time."""
    logits = F.linear(x, w)[:, :-1]
    y, m, old = y[:, 1:], m[:, 1:], old[:, 1:]
    picked = logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    logp = picked - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    parts = []
    for part in logits.reshape(-1, logits.shape[-1]).split(4 * logits.shape[1] // 8, dim=0):
        logps = part.log_softmax(dim=-1)
        parts.append(-(torch.exp(logps) * logps).sum(-1))
    entropy = torch.cat(parts).reshape(y.shape)
    loss = clipped(logp, old, advantage.unsqueeze(1)) - 0.01 * entropy
    return masked_mean(loss, m)


# ---- several heads, several results ----------------------------------------------------------


@entry("several heads", hidden, weight, weight, weight, labels)
def multi_token_prediction(x, w_1, w_2, w_3, y):
    """Head k predicts the token k steps ahead (Gloeckle et al. 2024)."""
    total = 0.0
    for k, w in enumerate((w_1, w_2, w_3), 1):
        logits = F.linear(x, w).float()[:, :-k]
        total = total + F.cross_entropy(logits.flatten(0, 1), y[:, k:].flatten())
    return total / 3


def square(s: Sizes, dtype: torch.dtype) -> Tensor:
    return (torch.randn(s.hidden, s.hidden) / s.hidden**0.5).to(dtype).requires_grad_()


@entry("several heads", hidden, weight, square, square, labels)
def medusa(x, w, block_1, block_2, y):
    """A residual block a head, one vocabulary matrix."""
    total = F.cross_entropy(F.linear(x, w).float().flatten(0, 1), y.flatten())
    for k, block in enumerate((block_1, block_2), 1):
        h = x + F.silu(F.linear(x, block))
        logits = F.linear(h, w).float()[:, :-k]
        total = total + 0.8**k * F.cross_entropy(logits.flatten(0, 1), y[:, k:].flatten())
    return total


@entry("several heads", tokens, weight, weight)
def tied_and_untied(ids, table, head):
    x = F.embedding(ids, table)
    tied = F.cross_entropy(F.linear(x, table).float().flatten(0, 1), ids.flatten())
    untied = F.cross_entropy(F.linear(x, head).float().flatten(0, 1), ids.roll(1, 1).flatten())
    return tied + 0.5 * untied


def router(s: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.randn(4, s.hidden).to(dtype).requires_grad_()


@entry("several heads", hidden, weight, router, labels)
def router_loss_added(x, w, gate, y):
    """The load-balancing loss of a mixture of experts next to the main loss."""
    probabilities = F.linear(x, gate).softmax(-1)
    chosen = F.one_hot(probabilities.argmax(-1), 4).to(x.dtype)
    balance = 4 * (probabilities.mean((0, 1)) * chosen.mean((0, 1))).sum()
    return F.cross_entropy(F.linear(x, w).float().flatten(0, 1), y.flatten()) + 0.01 * balance


@entry("several heads", hidden, weight, labels)
def two_selections_of_rows(x, w, y):
    """A loss over the prompt and one over the answer."""
    logits = F.linear(x, w).float()
    half = y.shape[1] // 2
    prompt = F.cross_entropy(logits[:, :half].flatten(0, 1), y[:, :half].flatten())
    answer = F.cross_entropy(logits[:, half:].flatten(0, 1), y[:, half:].flatten())
    return 0.1 * prompt + answer


@entry("several results")
def loss_and_accuracy(x, w, y):
    logits = F.linear(x, w).float()
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    with torch.no_grad():
        right = (logits.argmax(-1) == y) & (y != -100)
        accuracy = right.sum() / (y != -100).sum()
    return loss, accuracy


@entry("several results", hidden, weight, tokens)
def loss_and_top5(x, w, y):
    logits = F.linear(x, w).float()
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    hits = (logits.detach().topk(5, -1).indices == y.unsqueeze(-1)).any(-1)
    return loss, hits.float().mean()


@entry("several results", hidden, weight, tokens)
def logps_and_entropy(x, w, y):
    """Both returned, both differentiable: recomputed in the backward pass."""
    logits = F.linear(x, w)
    return selective_log_softmax(logits, y), entropy_of(logits)


@entry("several results")
def loss_perplexity_and_confidence(x, w, y):
    logits = F.linear(x, w).float()
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    confidence = logits.detach().softmax(-1).amax(-1).mean()
    return loss, loss.detach().exp(), confidence


@entry("several results", hidden, weight, tokens)
def rank_of_the_label(x, w, y):
    logits = F.linear(x, w).float()
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    own = logits.detach().gather(-1, y.unsqueeze(-1))
    return loss, (logits.detach() > own).sum(-1).float().mean()


# ---- not language models ---------------------------------------------------------------------


def image(s: Sizes, dtype: torch.dtype) -> Tensor:
    """[B·T, H], one side of a contrastive batch."""
    return torch.randn(s.batch * s.time, s.hidden).to(dtype).requires_grad_()


def text(s: Sizes, dtype: torch.dtype) -> Tensor:
    """[V, H], the other side."""
    return torch.randn(s.vocabulary, s.hidden).to(dtype).requires_grad_()


def embeddings(s: Sizes, dtype: torch.dtype) -> Tensor:
    """[M, H], one side of a square batch: M is the vocabulary, 4096 at most."""
    return torch.randn(min(s.vocabulary, 4096), s.hidden).to(dtype).requires_grad_()


def log_temperature(s: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.tensor(1.5, dtype=dtype, requires_grad=True)


@entry("not language models", image, text, log_temperature)
def info_nce(a, b, scale):
    """One direction; the other batch has more entries (a queue, or gathered devices)."""
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    logits = scale.exp() * a @ b.T
    return F.cross_entropy(logits, torch.arange(a.shape[0]))


@entry("not language models", embeddings, embeddings, log_temperature)
def clip(a, b, scale):
    """Rows and columns of the same product are reduced."""
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    logits = scale.exp() * a @ b.T
    y = torch.arange(a.shape[0])
    return (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2


@entry("not language models", embeddings, embeddings, log_temperature)
def clip_with_two_products(a, b, scale):
    """As OpenCLIP writes it: a product for each direction."""
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    y = torch.arange(a.shape[0])
    images = scale.exp() * a @ b.T
    texts = scale.exp() * b @ a.T
    return (F.cross_entropy(images, y) + F.cross_entropy(texts, y)) / 2


@entry("not language models", embeddings)
def sim_clr(z):
    """NT-Xent: both views in one batch, the diagonal is masked out."""
    z = F.normalize(z, dim=-1)
    n = z.shape[0]
    logits = (z @ z.T) / 0.5
    logits = logits.masked_fill(torch.eye(n, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(logits, (torch.arange(n) + n // 2) % n)


@entry("not language models", embeddings, embeddings)
def sig_lip(a, b):
    """A sigmoid for each pair (Zhai et al. 2023)."""
    logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T * 10 - 10
    signs = 2 * torch.eye(a.shape[0], dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / a.shape[0]


def multi_hot(s: Sizes, dtype: torch.dtype) -> Tensor:
    return (torch.rand(s.batch, s.time, s.vocabulary) < 0.05).to(dtype)


@entry("not language models", hidden, weight, multi_hot, bias)
def multi_label(x, w, y, b):
    return F.binary_cross_entropy_with_logits(F.linear(x, w, b), y)


@entry("not language models", hidden, weight, tokens)
def one_hot_labels(x, w, y):
    target = F.one_hot(y, w.shape[0]).to(x.dtype)
    return -(target * F.linear(x, w).log_softmax(-1)).sum(-1).mean()


@entry("not language models", hidden, weight, tokens)
def smoothed_by_scatter(x, w, y):
    """Label smoothing as it was written before PyTorch had it."""
    logp = F.linear(x, w).flatten(0, 1).log_softmax(-1)
    target = torch.full((y.numel(), w.shape[0]), 0.1 / (w.shape[0] - 1), dtype=x.dtype)
    target.scatter_(1, y.flatten().unsqueeze(1), 0.9)
    return -(target * logp).sum(-1).mean()


def tags(s: Sizes, dtype: torch.dtype) -> Tensor:
    """[B·T, 5], numbers of the labels that are on."""
    return torch.randint(s.vocabulary, (s.batch * s.time, 5))


@entry("not language models", hidden, weight, tags)
def multi_label_by_number(x, w, ids):
    target = torch.zeros(ids.shape[0], w.shape[0], dtype=x.dtype).scatter(1, ids, 1.0)
    return F.binary_cross_entropy_with_logits(F.linear(x, w).flatten(0, 1), target)


@entry("not language models", hidden, weight, targets)
def wide_mse(x, w, y):
    return F.mse_loss(F.relu(F.linear(x, w)), y)


@entry("not language models", hidden, weight, targets)
def wide_huber(x, w, y):
    return F.huber_loss(F.linear(x, w), y) + F.smooth_l1_loss(F.linear(x, w), y)


@entry("not language models", hidden, weight, targets)
def quantile_loss(x, w, y):
    error = y - F.linear(x, w)
    return torch.maximum(0.9 * error, -0.1 * error).mean()


@entry("not language models", hidden, weight, tokens)
def arc_face(x, w, y):
    """A margin on the angle to the class's normalised weight (Deng et al. 2018)."""
    cosine = F.linear(F.normalize(x, dim=-1), F.normalize(w, dim=-1)).flatten(0, 1)
    y = y.flatten()
    one_hot = F.one_hot(y, cosine.shape[-1]).bool()
    theta = torch.acos(cosine.clamp(-1 + 1e-4, 1 - 1e-4))
    logits = torch.where(one_hot, torch.cos(theta + 0.5), cosine) * 16
    return F.cross_entropy(logits, y)


@entry("not language models", hidden, weight, tokens)
def cos_face(x, w, y):
    """A margin on the cosine, put in place by a scatter (Wang et al. 2018)."""
    cosine = F.linear(F.normalize(x, dim=-1), F.normalize(w, dim=-1)).flatten(0, 1)
    y = y.flatten()
    margin = torch.zeros_like(cosine).scatter_(1, y.unsqueeze(1), 0.35)
    return F.cross_entropy(16 * (cosine - margin), y)


@entry("not language models", hidden, weight, tokens)
def margin_in_place(x, w, y):
    """CosFace, as it is often written."""
    logits = 16 * F.linear(F.normalize(x, dim=-1), F.normalize(w, dim=-1)).flatten(0, 1)
    y = y.flatten()
    logits[torch.arange(y.shape[0]), y] -= 16 * 0.35
    return F.cross_entropy(logits, y)


@entry("language modelling")
def banned_tokens_in_place(x, w, y):
    logits = F.linear(x, w).float()
    logits[..., :4] = float("-inf")
    return F.cross_entropy(logits.flatten(0, 1), torch.where(y < 4, -100, y).flatten())


@entry("not language models", hidden, weight, tokens)
def focal(x, w, y):
    logp = selective_log_softmax(F.linear(x, w), y)
    return -((1 - logp.exp()) ** 2 * logp).mean()


@entry("not language models", hidden, weight, labels)
def poly(x, w, y):
    """Poly-1 (Leng et al. 2022)."""
    logits = F.linear(x, w).float().flatten(0, 1)
    y = y.flatten()
    cross = F.cross_entropy(logits, y, reduction="none")
    own = logits.softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return ((cross + 1 - own) * (y != -100)).sum() / (y != -100).sum()


def distribution(s: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.randn(s.batch, s.time, s.vocabulary).softmax(-1).to(dtype)


@entry("not language models", hidden, weight, distribution)
def label_distribution(x, w, p):
    return F.cross_entropy(F.linear(x, w).flatten(0, 1), p.flatten(0, 1))


@entry("not language models", hidden, weight, square, square, router, labels)
def mixture_of_softmaxes(x, w, first, second, prior, y):
    """Two softmaxes over one vocabulary, mixed by a gate (Yang et al. 2017)."""
    gate = F.linear(x, prior[:2]).log_softmax(-1)
    one = F.linear(torch.tanh(F.linear(x, first)), w).log_softmax(-1)
    two = F.linear(torch.tanh(F.linear(x, second)), w).log_softmax(-1)
    mixed = torch.logaddexp(gate[..., :1] + one, gate[..., 1:] + two)
    return F.nll_loss(mixed.flatten(0, 1), y.flatten())


@entry("not language models", hidden, weight, router, tokens)
def hierarchical_softmax(x, w, clusters, y):
    """Four clusters of equal size: the cluster's probability times the word's within it."""
    words = F.linear(x, w).unflatten(-1, (4, -1)).log_softmax(-1)
    cluster = F.linear(x, clusters).log_softmax(-1)
    logp = (words + cluster.unsqueeze(-1)).flatten(-2)
    return -logp.gather(-1, y.unsqueeze(-1)).mean()


@entry("not language models", hidden, weight, tokens)
def categorical(x, w, y):
    return -torch.distributions.Categorical(logits=F.linear(x, w)).log_prob(y).mean()


@entry("not language models", hidden, weight, tokens)
def multi_margin(x, w, y):
    return F.multi_margin_loss(F.linear(x, w).float().flatten(0, 1), y.flatten())


@entry("not language models", hidden, weight, targets)
def list_net(x, w, scores):
    """Ranking: the cross entropy of two top-one distributions (Cao et al. 2007)."""
    return -(scores.softmax(-1) * F.linear(x, w).log_softmax(-1)).sum(-1).mean()


# ---- shapes and selections -------------------------------------------------------------------


@entry("shapes")
def padded_vocabulary(x, w, y):
    logits = F.linear(x, w).float()[..., : w.shape[0] - 16]
    kept = torch.where(y < w.shape[0] - 16, y, -100)
    return F.cross_entropy(logits.flatten(0, 1), kept.flatten())


@entry("shapes", hidden, weight)
def lists_of_indices(x, w):
    z = F.linear(x, w)
    return z[:, [0, 3]].logsumexp(-1).sum() + z[..., [3, 5, 7]].square().mean()


@entry("shapes", hidden, weight, tokens, mask, unbacked=True)
def boolean_mask_of_logits(x, w, y, m):
    """A number of rows that depends on the data."""
    return F.cross_entropy(F.linear(x, w).float()[m], y[m])


@entry("shapes", hidden, weight, tokens, mask, unbacked=True)
def boolean_mask_of_hidden_states(x, w, y, m):
    return F.cross_entropy(F.linear(x[m], w).float(), y[m])


def positions(s: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.randint(s.batch * s.time, (s.batch * s.time // 2,))


@entry("shapes", hidden, weight, tokens, positions)
def index_select_of_rows(x, w, y, rows):
    logits = F.linear(x, w).float().flatten(0, 1)
    return F.cross_entropy(logits.index_select(0, rows), y.flatten()[rows])


def lengths(s: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.tensor([s.time // 2, s.time * s.batch - s.time // 2])


@entry("shapes", hidden, weight, tokens, lengths)
def packed_sequences(x, w, y, n):
    """A mean for each of the sequences that are packed into one row of tokens."""
    nll = F.cross_entropy(F.linear(x, w).float().flatten(0, 1), y.flatten(), reduction="none")
    owner = torch.repeat_interleave(torch.arange(2), n, output_size=nll.shape[0])
    return (torch.zeros(2).to(nll).index_add(0, owner, nll) / n).mean()


@entry("shapes")
def logits_to_keep(x, w, y):
    keep = y.shape[1] // 2 + 1
    logits = F.linear(x[:, -keep:], w).float()
    return F.cross_entropy(logits.flatten(0, 1), y[:, -keep:].flatten())


def strided(s: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.randn(s.time, s.batch, s.hidden).to(dtype).transpose(0, 1).requires_grad_()


@entry("shapes", strided, weight, labels)
def time_first(x, w, y):
    return F.cross_entropy(F.linear(x, w).float().reshape(-1, w.shape[0]), y.reshape(-1))


def one_sequence(s: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, s.time, s.hidden).to(dtype).requires_grad_()


@entry("shapes", one_sequence, weight, labels)
def expanded_hidden_states(x, w, y):
    logits = F.linear(x.expand(y.shape[0], -1, -1), w).float()
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def prime_rows(s: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, s.batch * s.time - 1, s.hidden).to(dtype).requires_grad_()


@entry("shapes", prime_rows, weight, labels)
def odd_number_of_rows(x, w, y):
    return F.cross_entropy(F.linear(x, w).float().flatten(0, 1), y.flatten()[1:])


@entry("shapes", hidden, weight, labels, parallel=False, note="each step's logits are small")
def time_loop(x, w, y):
    """A head a step, as a recurrent decoder has it."""
    return sum(
        F.cross_entropy(F.linear(x[:, t], w).float(), y[:, t], reduction="sum") for t in range(3)
    )


# ---- left alone, or chunked around -----------------------------------------------------------


@entry("left alone", expect="mixes-rows")
def softmax_over_rows(x, w, y):
    return F.linear(x, w).softmax(1).pow(2).sum()


def running(s: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.zeros(s.vocabulary).to(dtype)


@entry("left alone", hidden, weight, labels, running, expect="mutation")
def batch_norm_of_logits(x, w, y, mean):
    logits = F.batch_norm(F.linear(x, w).flatten(0, 1), mean.clone(), mean + 1, training=True)
    return F.cross_entropy(logits.float(), y.flatten())


@entry("left alone", expect="mixes-rows")
def sort_across_rows(x, w, y):
    best = F.linear(x, w).sort(dim=1).values
    return (best * torch.linspace(0, 1, best.shape[1]).to(x.dtype).view(1, -1, 1)).mean()


@entry("left alone", expect="mixes-rows")
def cumulative_over_time(x, w, y):
    return F.linear(x, w).cumsum(1).pow(2).mean()


@entry("left alone", hidden, weight, router, expect="feeds-layer")
def wide_mlp(x, w, down):
    wide = w[: 4 * w.shape[1]]
    return F.linear(F.gelu(F.linear(x, wide)), wide.t()).pow(2).mean()


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x * grad  # not what autograd would derive, on purpose


@entry("left alone", expect="custom-function")
def custom_autograd_function(x, w, y):
    return _Square.apply(F.linear(x, w)).mean()


@entry("left alone", expect="higher-order")
def cond_of_logits(x, w, y):
    logits = F.linear(x, w)
    return torch.cond(y.sum() > 0, lambda z: z.sin(), lambda z: z.cos(), (logits,)).mean()
