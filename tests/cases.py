"""The table of cases: a function, its inputs, and what is expected to become of it.

Shapes: N rows, H hidden, V vocabulary, B batch, T sequence, K as many as it says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

N, B, T, H, V = 14, 2, 7, 8, 96
IGNORE = -100


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: Of the case.
        function: Called with the inputs.
        inputs: Makes them in a dtype.
        expect: ``fused``, ``recompute``, ``forward`` or a refusal code.
        options: Options besides those every case has.
        dtypes: Dtypes it makes sense in.
    """

    name: str
    function: Callable[..., Any]
    inputs: Callable[[torch.dtype], list[Any]]
    expect: str
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float64)


CASES: list[Case] = []

#: For functions that compute in float32 whatever they are given.
LOW = (torch.float32, torch.bfloat16)


def case(
    expect: str, inputs: Callable[[torch.dtype], list[Any]] | None = None, **more: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        CASES.append(Case(function.__name__, function, inputs or flat, expect, **more))
        return function

    return add


# ---- inputs ----------------------------------------------------------------------------------


def _x(dtype, *shape):
    return (torch.randn(*shape, H, dtype=torch.float64)).to(dtype).requires_grad_()


def _w(dtype, v=V, h=H):
    return (torch.randn(v, h, dtype=torch.float64) * 0.5).to(dtype).requires_grad_()


def _labels(*shape, ignored=True, v=V):
    labels = torch.randint(0, v, shape)
    if ignored:
        labels.view(-1)[::4] = IGNORE
    return labels


def flat(dtype):
    return [_x(dtype, N), _w(dtype), _labels(N)]


def flat_valid(dtype):
    return [_x(dtype, N), _w(dtype), _labels(N, ignored=False)]


def batched(dtype):
    return [_x(dtype, B, T), _w(dtype), _labels(B, T)]


def batched_valid(dtype):
    return [_x(dtype, B, T), _w(dtype), _labels(B, T, ignored=False)]


def biased(dtype):
    return [*batched(dtype), torch.randn(V).to(dtype).requires_grad_()]


def class_weighted(dtype):
    return [*flat(dtype), (torch.rand(V) + 0.5).to(dtype)]


def soft_targets(dtype):
    return [_x(dtype, N), _w(dtype), torch.randn(N, V).softmax(-1).to(dtype)]


def regression(dtype):
    return [_x(dtype, N), _w(dtype), torch.randn(N, V).to(dtype)]


def two_heads(dtype):
    return [_x(dtype, B, T), _w(dtype), _labels(B, T), _x(dtype, B, T), _w(dtype)]


def per_token(dtype):
    return [
        _x(dtype, 4, T),
        _w(dtype),
        _labels(4, T, ignored=False),
        (-torch.rand(4, T) - 4).to(dtype),
        torch.randn(4, 1).to(dtype),
        (torch.rand(4, T) > 0.3).to(dtype),
    ]


# ---- cross entropy ---------------------------------------------------------------------------


@case("fused")
def cross_entropy_mean(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)


@case("fused")
def cross_entropy_sum(x, w, y):
    return F.cross_entropy(F.linear(x, w), y, reduction="sum")


@case("recompute")
def cross_entropy_none(x, w, y):
    return F.cross_entropy(F.linear(x, w), y, reduction="none")


@case("fused", flat_valid)
def cross_entropy_none_then_mean(x, w, y):
    return F.cross_entropy(F.linear(x, w), y, reduction="none").mean()


@case("fused")
def cross_entropy_ignore_index(x, w, y):
    return F.cross_entropy(F.linear(x, w), y.clamp(min=-1), ignore_index=-1)


@case("fused", class_weighted)
def cross_entropy_class_weights(x, w, y, c):
    return F.cross_entropy(F.linear(x, w), y, weight=c)


@case("fused")
def cross_entropy_label_smoothing(x, w, y):
    return F.cross_entropy(F.linear(x, w), y, label_smoothing=0.1)


@case("fused", class_weighted)
def cross_entropy_smoothing_and_weights(x, w, y, c):
    return F.cross_entropy(F.linear(x, w), y, weight=c, label_smoothing=0.2, reduction="sum")


@case("fused", soft_targets)
def cross_entropy_soft_targets(x, w, p):
    return F.cross_entropy(F.linear(x, w), p)


@case("fused", soft_targets)
def cross_entropy_soft_targets_smoothing(x, w, p):
    return F.cross_entropy(F.linear(x, w), p, label_smoothing=0.1, reduction="sum")


@case("fused", batched)
def cross_entropy_k_dimensional(x, w, y):
    return F.cross_entropy(F.linear(x, w).transpose(1, 2), y)


@case("fused", batched)
def cross_entropy_k_dimensional_smoothing(x, w, y):
    return F.cross_entropy(F.linear(x, w).transpose(1, 2), y, label_smoothing=0.1)


@case("fused", batched, dtypes=LOW)
def cross_entropy_upcast_and_view(x, w, y):
    return F.cross_entropy(F.linear(x, w).float().view(-1, V), y.view(-1))


@case("fused", batched, dtypes=LOW)
def cross_entropy_shift(x, w, y):
    logits = F.linear(x, w).float()
    return F.cross_entropy(
        logits[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1)
    )


@case("fused", batched, dtypes=LOW)
def cross_entropy_num_items(x, w, y):
    loss = F.cross_entropy(F.linear(x, w).float().view(-1, V), y.view(-1), reduction="sum")
    return loss / 11.0


@case("fused")
def cross_entropy_times_three_plus_aux(x, w, y):
    return 3.0 * F.cross_entropy(F.linear(x, w), y) + 0.1 * x.square().mean()


@case("fused", biased)
def cross_entropy_bias(x, w, y, b):
    return F.cross_entropy(F.linear(x, w, b).view(-1, V), y.view(-1))


# ---- forms of the head -----------------------------------------------------------------------


@case("fused")
def head_matmul_transposed(x, w, y):
    return F.cross_entropy(x @ w.t(), y)


@case("fused", lambda d: [_x(d, N), _w(d, H, V), _labels(N)])
def head_matmul(x, w, y):
    return F.cross_entropy(x @ w, y)


@case("fused", batched)
def head_matmul_3d(x, w, y):
    return F.cross_entropy(torch.matmul(x, w.T).flatten(0, 1), y.flatten())


@case("fused")
def head_mm(x, w, y):
    return F.cross_entropy(torch.mm(x, w.t()), y)


@case("fused", lambda d: [_x(d, N), _w(d), _labels(N), torch.randn(V).to(d).requires_grad_()])
def head_addmm(x, w, y, b):
    return F.cross_entropy(torch.addmm(b, x, w.t()), y)


@case("fused", batched)
def head_einsum(x, w, y):
    return F.cross_entropy(torch.einsum("bth,vh->btv", x, w).reshape(-1, V), y.reshape(-1))


@case("fused", batched)
def head_tied(x, w, y):
    hidden = F.embedding(y.clamp(min=0), w) + x
    return F.cross_entropy(F.linear(hidden, w).view(-1, V), y.view(-1))


@case("fused")
def head_weight_scaled(x, w, y):
    return F.cross_entropy(F.linear(x, w * 0.5), y)


@case("fused")
def head_weight_normalised(x, w, y):
    return F.cross_entropy(8.0 * F.linear(F.normalize(x, dim=-1), F.normalize(w, dim=-1)), y)


@case("fused")
def head_weight_sliced(x, w, y):
    return F.cross_entropy(F.linear(x, w[: V - 16]), y.clamp(max=V - 17))


@case("fused")
def head_vocabulary_sliced(x, w, y):
    return F.cross_entropy(F.linear(x, w)[..., : V - 16], y.clamp(max=V - 17))


@case("fused", lambda d: [_x(d, N), _w(d).detach(), _labels(N)])
def head_frozen_weight(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)


@case("fused", lambda d: [_x(d, N).detach(), _w(d), _labels(N)])
def head_frozen_input(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)


@case("forward", lambda d: [_x(d, N).detach(), _w(d).detach(), _labels(N)])
def head_all_frozen(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)


@case(
    "fused",
    lambda d: [
        torch.randn(H, N, dtype=torch.float64).to(d).t().requires_grad_(),
        _w(d),
        _labels(N),
    ],
)
def head_transposed_input(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)


# ---- log-probabilities -----------------------------------------------------------------------


@case("fused", batched_valid, dtypes=LOW)
def log_softmax_gather(x, w, y):
    logp = F.log_softmax(F.linear(x, w).float(), dim=-1)
    return -logp.gather(-1, y.unsqueeze(-1)).squeeze(-1).mean()


@case("fused")
def log_softmax_nll_loss(x, w, y):
    return F.nll_loss(F.log_softmax(F.linear(x, w), dim=-1), y)


@case("fused", flat_valid)
def log_softmax_indexing(x, w, y):
    logp = F.log_softmax(F.linear(x, w), dim=-1)
    return -logp[torch.arange(x.shape[0]), y].sum()


@case("fused", batched_valid)
def log_softmax_indexing_2d(x, w, y):
    logp = F.log_softmax(F.linear(x, w), dim=-1)
    b = torch.arange(x.shape[0])[:, None]
    t = torch.arange(x.shape[1])[None, :]
    return -logp[b, t, y].mean()


@case("fused", batched_valid)
def selected_minus_logsumexp(x, w, y):
    logits = F.linear(x, w)
    selected = logits.gather(-1, y[..., None]).squeeze(-1)
    return (logits.logsumexp(-1) - selected).sum()


@case("fused", flat_valid)
def one_hot_times_log_softmax(x, w, y):
    return -(F.one_hot(y, V) * F.log_softmax(F.linear(x, w), -1)).sum(-1).mean()


# ---- transformations of the logits -----------------------------------------------------------


@case("fused")
def softcap(x, w, y):
    return F.cross_entropy(30.0 * torch.tanh(F.linear(x, w) / 30.0), y)


@case("fused")
def scale_and_temperature(x, w, y):
    return F.cross_entropy(F.linear(x, w) * 0.7 / 1.3, y)


@case("fused", lambda d: [*flat(d), torch.tensor(1.2, dtype=d, requires_grad=True)])
def learned_temperature(x, w, y, t):
    return F.cross_entropy(F.linear(x, w) / t, y)


@case("fused", lambda d: [*flat(d), (torch.rand(N, 1) + 0.5).to(d).requires_grad_()])
def per_row_temperature(x, w, y, t):
    return F.cross_entropy(F.linear(x, w) / t, y)


@case("fused")
def z_loss(x, w, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits, y) + 1e-2 * logits.logsumexp(-1).square().mean()


@case("fused", dtypes=LOW)
def entropy_bonus(x, w, y):
    logits = F.linear(x, w).float()
    logp = F.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    return F.cross_entropy(logits, y) - 0.01 * entropy.mean()


@case("fused")
def masked_vocabulary(x, w, y):
    banned = torch.arange(V) % 5 == 4
    logits = F.linear(x, w).masked_fill(banned, -1e4)
    return F.cross_entropy(logits, torch.where(y % 5 == 4, y - 1, y).clamp(min=0))


@case("fused")
def in_place_scaling(x, w, y):
    logits = F.linear(x, w)
    logits /= 1.5
    return F.cross_entropy(logits, y)


@case("fused", regression)
def mse(x, w, t):
    return F.mse_loss(F.linear(x, w), t)


@case("fused", regression)
def mse_relu(x, w, t):
    return F.mse_loss(F.relu(F.linear(x, w)), t)


@case("fused", regression)
def mse_by_hand(x, w, t):
    return (F.linear(x, w) - t).pow(2).mean(-1).sum()


@case("fused", regression)
def huber(x, w, t):
    return F.huber_loss(F.linear(x, w), t) + F.l1_loss(F.linear(x, w), t)


@case("fused", regression)
def bce_with_logits(x, w, t):
    return F.binary_cross_entropy_with_logits(F.linear(x, w), (t > 0).to(t.dtype))


@case("fused")
def focal(x, w, y):
    logp = F.log_softmax(F.linear(x, w), -1)
    picked = logp.gather(-1, y.clamp(min=0)[:, None])[:, 0]
    return -((1 - picked.exp()) ** 2 * picked).mean()


@case("fused", two_heads)
def kl_to_teacher(x, w, y, x2, w2):
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(x2, w2) / 2.0, -1)
    student = F.log_softmax(F.linear(x, w) / 2.0, -1)
    return F.kl_div(
        student.view(-1, V), teacher.view(-1, V), log_target=True, reduction="batchmean"
    )


@case("fused", two_heads)
def two_heads_one_loss(x, w, y, x2, w2):
    first = F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1))
    return first + 0.3 * F.cross_entropy(F.linear(x2, w2).view(-1, V), y.view(-1))


@case("fused", two_heads)
def two_heads_two_losses(x, w, y, x2, w2):
    first = F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1))
    return first, 0.3 * F.cross_entropy(F.linear(x2, w2).view(-1, V), y.view(-1))


# ---- policy gradients ------------------------------------------------------------------------


@case("fused", per_token, dtypes=LOW)
def grpo(x, w, y, old, advantage, mask):
    logp = F.log_softmax(F.linear(x, w).float() / 0.9, -1).gather(-1, y[..., None]).squeeze(-1)
    ratio = torch.exp(logp - old)
    loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


@case("recompute", per_token, dtypes=LOW)
def grpo_sequence_ratio(x, w, y, old, advantage, mask):
    logp = F.log_softmax(F.linear(x, w).float(), -1).gather(-1, y[..., None]).squeeze(-1)
    ratio = (((logp - old) * mask).sum(-1) / mask.sum(-1).clamp(min=1)).exp()
    return -(ratio * advantage[:, 0]).mean()


@case("recompute", per_token)
def dpo(x, w, y, ref, advantage, mask):
    logp = F.log_softmax(F.linear(x, w), -1).gather(-1, y[..., None]).squeeze(-1)
    chosen, rejected = ((logp - ref) * mask).sum(-1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


# ---- several results -------------------------------------------------------------------------


@case("fused")
def loss_and_accuracy(x, w, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits, y), (logits.argmax(-1) == y).float().mean()


@case("fused", dtypes=LOW)
def loss_and_detached_metrics(x, w, y):
    logits = F.linear(x, w).float()
    loss = F.cross_entropy(logits, y)
    with torch.no_grad():
        confidence = logits.softmax(-1).amax(-1).mean()
        top = logits.topk(5, dim=-1).indices
    return loss, confidence, top, loss.detach().exp()


@case("recompute", dtypes=LOW)
def loss_and_differentiable_entropy(x, w, y):
    logits = F.linear(x, w).float()
    logp = F.log_softmax(logits, -1)
    return F.cross_entropy(logits, y), -(logp.exp() * logp).sum(-1).mean()


@case("fused", batched, dtypes=LOW)
def loss_and_logits(x, w, y):
    logits = F.linear(x, w).float()
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits


@case("fused", batched)
def two_selections_of_rows(x, w, y):
    logits = F.linear(x, w)
    first = F.cross_entropy(logits[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))
    return first + F.cross_entropy(logits[:, :-2].reshape(-1, V), y[:, 2:].reshape(-1))


@case("fused", batched)
def rows_by_integers(x, w, y):
    rows = torch.tensor([5, 0, 3])
    return F.cross_entropy(F.linear(x, w)[:, rows].reshape(-1, V), y[:, rows].reshape(-1))


@case("fused", batched)
def last_position_only(x, w, y):
    return F.cross_entropy(F.linear(x, w)[:, -1], y[:, -1].clamp(min=0))


@case("fused", batched)
def sequence_first(x, w, y):
    logits = F.linear(x, w).transpose(0, 1)
    return F.cross_entropy(logits.reshape(-1, V), y.t().reshape(-1))


@case("fused", lambda d: [_x(d, 13), _w(d), _labels(13)], options={"chunk_rows": 1})
def one_row_chunks(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)


@case("fused", lambda d: [_x(d, 13), _w(d), torch.full((13,), IGNORE)])
def all_rows_ignored(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)


@case("recompute", options={"strategy": "recompute"})
def asked_to_recompute(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)


# ---- left alone ------------------------------------------------------------------------------


@case("mixes-rows")
def softmax_over_rows(x, w, y):
    return F.linear(x, w).softmax(0).amax(-1).sum()


@case("mixes-rows")
def cumsum_over_rows(x, w, y):
    return F.linear(x, w).cumsum(0).logsumexp(-1).sum()


@case("mixes-rows")
def sort_across_rows(x, w, y):
    return F.linear(x, w).sort(0).values.logsumexp(-1).sum()


@case("mixes-rows")
def mean_over_rows(x, w, y):
    return F.linear(x, w).mean(0).logsumexp(-1)


@case("two-pass")
def centred_by_global_mean(x, w, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits - logits.mean(), y)


@case("deferred", dtypes=(torch.float32,))
def only_returned(x, w, y):
    return F.linear(x, w)


@case("feeds-layer", lambda d: [_x(d, N), _w(d), torch.randn(V, V).to(d)])
def feeds_another_layer(x, w, u):
    return F.linear(F.gelu(F.linear(x, w)), u).sum()


@case("fused")
def rows_meet_other_rows(x, w, y):
    logits = F.linear(x, w)
    return (logits[1:] - logits[:-1]).square().sum()


@case("not-fusable", options={"strategy": "fused"}, dtypes=(torch.float32,))
def asked_to_fuse_in_vain(x, w, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits, y), logits.logsumexp(-1).mean()


@case("small", options={"min_bytes": "1MiB"}, dtypes=(torch.float32,))
def small_head(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)


@case("single-row", lambda d: [_x(d, 1), _w(d), _labels(1, ignored=False)])
def one_row(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)
