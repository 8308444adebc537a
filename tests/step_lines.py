"""The lines that generated training steps are made of, and the dice that choose them.

A template is one Python statement, or a few, with holes. The first letter of a name is its kind:

    h  hidden states, B × T × H          z  logits, N × V              q  logits, B × T × V
    c  logits, B × V × T                 w  logits, K × B × T × V: a stack of heads
    y  labels, N                         r  a number a row, N          i  an integer a row, N
    s  a number                          m  fresh memory of 8 numbers  n  fresh memory of N numbers
    p  memory of 8 numbers that outlives the step: a buffer, an input, a view of one

``{z}`` is a name of that kind that exists, ``{z2}`` is another hole of the same kind, ``{+z}`` is a
new name, and ``{cut}`` drops the last position of each sequence in a shifted step (``{cuts}`` in
``w``, ``{cutc}`` in ``c``). In a step with a stack of heads N, and the batch of q, are K times as
many. A line that eager PyTorch rejects costs nothing: such a step is drawn again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

#: Inputs of every step, by kind; k are booleans, f and t floats (t as wide as the logits).
INPUTS = {"h": ["x"], "y": ["y"], "k": ["k"], "f": ["f"], "t": ["t"], "p": ["out", "view"]}
#: Where a number a row is wanted, memory that holds one will do.
ALSO = {"r": "rn", "m": "m", "M": "mp"}

HIDDEN = (
    "{+h} = torch.tanh(self.body({h}))",
    "{+h} = {h} + F.gelu(self.body({h}))",
    "{+h} = F.layer_norm({h}, (H,))",
    "{+h} = {h}.clone()\n{+h}[:, 0] = 0.5",
    "{+h} = {h} * 1.0\n{+h}.mul_(1.1)",
    "{+h} = {h} * 1.0\n{+h}[..., 2:4] += 0.5",
    "{+h} = self.block({h})",
    "{+h} = checkpoint(self.block, {h}, use_reentrant=False)",
    "{+h} = checkpoint(self.block, {h}, use_reentrant=True)",
    "{h}.add_(0.1)",
    "{+h} = opaque({h})",
    "{+h} = F.dropout({h}, 0.0)",
)
LABELS = (
    "{+y} = {y}.clone()\n{+y}[{+y} % 7 == 0] = -100",
    "{+y} = {y}.masked_fill({k}, -100)",
    "{+y} = torch.where({k}, {y}, -100)",
    "{+y} = {y}.clone()\n{+y}[::5] = -100",
    "{+y} = {y}.clamp(min=0)",
    "{y}[2] = -100",
    "{y}.masked_fill_({k}, 3)",
)
HEADS = (
    "{+q} = self.head({h})",
    "{+q} = self.head({h})",
    "{+q} = F.linear({h}, self.emb.weight)",
    "{+q} = {h} @ self.head.weight.T",
    "{+q} = self.second({h})",
    "{+q} = self.head({h}) + self.second({h})",
    "{+q} = checkpoint(self.head, {h}, use_reentrant=False)",
    "{+q} = torch.einsum('bth,vh->btv', {h}, self.head.weight)",
    "{+q} = self.head({h} * self.scale)",
    "{+q} = self.head({h}) / self.temperature.exp()",
    "{+c} = self.conv({h}.transpose(1, 2))\n{+q} = {+c}.transpose(1, 2)",
    "{+c} = F.conv1d({h}.transpose(1, 2), self.head.weight[..., None], self.head.bias)\n"
    "{+q} = {+c}.transpose(1, 2)",
    "{+q} = F.conv2d({h}.mT[..., None], self.conv.weight[..., None]).squeeze(-1).mT",
)
#: Logits with their features before the positions, as convolutions make them.
CHANNELS = (
    "{+q} = {c}.transpose(1, 2)",
    "{+c} = {c} * 0.7",
    "{+c} = {c}.log_softmax(1)",
    "{+c} = {c}.contiguous()",
    "{c}.mul_(0.9)",
    "{c}[:, 3] = -5.0",
    "{c}[:, :, 1] = 0.5",
    "{+s} = F.cross_entropy({c}{cutc}, {y}.view(B, -1))",
    "{+s} = F.cross_entropy({c}{cutc}, {y}.view(B, -1), label_smoothing=0.1)",
    "{+s} = {c}.logsumexp(1).square().mean()",
    "{+s} = {c}.mean()",
    "{+r} = F.cross_entropy({c}{cutc}, {y}.view(B, -1), reduction='none').flatten()",
    "{+r} = {c}{cutc}.amax(1).flatten()",
)
STACKS = (
    "{+w} = torch.stack([self.head({h}), self.second({h})])",
    "{+w} = torch.stack([self.head({h}), self.second({h})], 1).transpose(0, 1)",
    "{+w} = torch.stack([self.head({h}), self.second({h})], 2).movedim(2, 0)",
    "{+w} = torch.stack([head({h}) for head in (self.head, self.second)], -1).movedim(-1, 0)",
    "{+w} = torch.cat([self.head({h})[None], self.second({h})[None]])",
    "{+w} = torch.stack([self.head({h}), self.head({h} * self.scale)], 1).movedim(1, 0)",
    "{+w} = torch.stack([self.head({h}), self.second({h}).detach()])",
    "{+w} = torch.einsum('bth,kvh->btkv', {h}, self.codebooks).movedim(2, 0)",
    "{+w} = F.linear({h}, self.codebooks.flatten(0, 1)).unflatten(-1, (K, V)).movedim(2, 0)",
    "{+w} = self.wide({h}.transpose(1, 2)).unflatten(1, (K, V)).permute(1, 0, 3, 2)",
)
MERGES = (
    "{+q} = {w}.flatten(0, 1)",
    "{+q} = {w}.reshape(K * B, -1, V)",
    "{+q} = {w}.view(-1, {w}.shape[2], V)",
    "{+q} = {w}.transpose(0, 1).flatten(0, 1)",
    "{+q} = {w}.transpose(0, 1).reshape(-1, *{w}.shape[2:])",
    "{+q} = {w}.transpose(0, 1).view(-1, *{w}.shape[2:])",
    "{+q} = {w}.transpose(0, 1).contiguous().view(K * B, -1, V)",
    "{+q} = {w}.permute(1, 2, 0, 3).flatten(1, 2)",
    "{+q} = {w}.permute(1, 2, 0, 3).view(B, -1, V)",
)
#: A stack before it is merged.
STACKED = (
    "{+w} = {w} * 0.7",
    "{+w} = {w}.log_softmax(-1)",
    "{+w} = {w} + 0.5 * {w2}",
    "{+w} = {w}.masked_fill({k}.view(K, B, -1, 1), 0.0)",
    "{+w} = {w} - {w}.detach().amax(-1, keepdim=True)",
    "{+w} = {w} - {w}.mean(0, keepdim=True)",
    "{+w} = {w}.clone()\n{+w}[1] = -1.0",
    "{+w} = {w}.detach()",
    "{w}.mul_(0.9)",
    "{w}[1, ..., 3] = -5.0",
    "{w}[0].add_(0.5)",
    "{+s} = sum(F.cross_entropy(a{cut}.reshape(-1, V), b) for a, b in zip({w}, {y}.view(K, -1)))",
    "{+s} = F.cross_entropy({w}{cuts}.permute(1, 3, 0, 2), {y}.view(K, B, -1).transpose(0, 1))",
    "{+s} = {w}.logsumexp(-1).square().mean()",
    "{+s} = {w}[1].mean()",
    "{+r} = {w}{cuts}.logsumexp(-1).flatten()",
    "{+r} = {w}{cuts}.transpose(0, 1).amax(-1).reshape(-1)",
    "{+r} = F.cross_entropy({w}{cuts}.flatten(0, 2), {y}, reduction='none')",
    *MERGES,
)
FLAT = ("{+z} = {q}{cut}.flatten(0, 1)", "{+z} = {q}{cut}.reshape(-1, V)")
WIDE = (
    "{+z} = {z} * 0.7",
    "{+z} = 5 * torch.tanh({z} / 5)",
    "{+z} = up({z})",
    "{+z} = {z} / self.temperature.exp()",
    "{+z} = F.log_softmax({z}, -1)",
    "{+z} = {z}.masked_fill({k}[:, None], 0.0)",
    "{+z} = {z} + {f}[:, None]",
    "{+z} = {z} * {r}[:, None].detach()",
    "{+z} = {z}.detach()",
    "{+z} = {z}.clone()\n{+z}[:, 3] = -5.0",
    "{+z} = {z} * 1.0\n{+z}[{k}] = 0.5",
    "{z}.mul_(0.9)",
    "{z}[:, 5] = -3.0",
    "{z}[1].mul_(0.5)",
    "{z}[:, 5].mul_(0.5)",
    "{z}.t()[7].add_(0.1)",
    "{+z} = {z}[:]",
    "{+z} = {z}.view(-1).view({z}.shape)",
    "{+z} = {z}.contiguous()",
    "{+z} = Double.apply({z})",
    "{+z} = opaque({z})",
    "{+z} = {z} + 0.1 * {z2}",
    "{+z} = torch.where({k}[:, None], {z}, {z2})",
    "{+z} = {z} - {z}.detach().amax(-1, keepdim=True)",
    "{+z} = {z} - {z}.mean(-1, keepdim=True)",
    "{+z} = torch.zeros_like({z})\n{+z}[:] = {z}",
    "{+z} = torch.empty_like({z}).copy_({z})",
    "{+z} = {z}.new_zeros({z}.shape)\n{+z}[:, ::2] = {z}[:, ::2]",
    "{+z} = torch.stack([row for row in {z}])",
    "{+z} = torch.cat([{z}[:9], {z2}[9:]])",
)
MIXING = (
    "{+z} = {z} + {z}.softmax(0)",
    "{+z} = {z} - {z}.mean()",
    "{+z} = {z}.flip(0)",
)
ROWS = (
    "{+r} = F.cross_entropy({z}, {y}, reduction='none')",
    "{+r} = F.cross_entropy({z}, {y}, reduction='none')",
    "{+r} = {z}.logsumexp(-1)",
    "{+r} = {z}[:, 3]",
    "{+r} = {z}.log_softmax(-1).gather(-1, {y}.clamp(min=0)[:, None]).squeeze(-1)",
    "{+r} = -({z}.softmax(-1) * {z}.log_softmax(-1)).sum(-1)",
    "{+r} = {z}.square().mean(-1)",
    "{+r} = {z}.norm(dim=-1)",
    "{+r} = {z}.std(-1)",
    "{+r} = F.kl_div({z}.log_softmax(-1), {t}.softmax(-1), reduction='none').sum(-1)",
    "{+r} = (1 - {z}.sigmoid()).cumprod(-1)[:, :4].sum(-1)",
    "{+r} = torch.stack([row.logsumexp(-1) for row in {z}])",
)
PICKED = (
    "{+r} = {z}.amax(-1)",
    "{+r} = {z}.topk(3, -1).values.sum(-1)",
    "{+i} = {z}.argmax(-1)",
    "{+i} = ({z}.argmax(-1) == {y}).long()",
    "{+i} = ({z} > {z}.gather(-1, {y}.clamp(min=0)[:, None])).sum(-1)",
    "{+s} = ({z}.argmax(-1) == {y}).to(x.dtype).mean()",
    "{+s} = ({i} * {k}).sum().to(x.dtype)",
    "self.count[{i} % 16] += 1",
    "self.count.index_add_(0, {i} % 16, torch.ones_like({i}))",
    "self.count.scatter_add_(0, {i} % 16, torch.ones_like({i}))",
)
NARROW = (
    "{+r} = {r} * {f}",
    "{+r} = torch.where({k}, {r}, 0.0)",
    "{+r} = {r}.detach()",
    "{+r} = torch.exp(0.1 * ({r} - {r}.detach())) * {f}",
    "{+r} = {r}.clamp(max=3.0)",
    "{+r} = {r} + {r2}",
    "{+r} = {r}.clone()\n{+r}[1] = 0.0",
    "{+r} = {r} * 1.0\n{+r}[{k}] = 0.0",
    "{r}.mul_(0.5)",
    "{r}[{k}] = 0.0",
    "{+r} = {r} / (1 + {s}.detach().abs())",
    "{+r} = {r} * self.scale",
    "{+r} = {r} - {r}.mean()",
    "{+r} = {r} - self.queue[: {r}.shape[0]]",
)
LOSSES = (
    "{+s} = F.cross_entropy({z}, {y})",
    "{+s} = F.cross_entropy({z}, {y})",
    "{+s} = F.cross_entropy({z}, {y}, label_smoothing=0.1)",
    "{+s} = F.cross_entropy({z}, {y}, reduction='sum') / 20",
    "{+s} = F.cross_entropy({q}{cut}.transpose(1, 2), {y}.view(len({q}), -1))",
    "{+s} = F.mse_loss({z}, {t})",
    "{+s} = F.kl_div({z}.log_softmax(-1), {t}.softmax(-1), reduction='batchmean')",
    # Half of it: of itself it would be zero, and in bfloat16 noise.
    "{+s} = F.kl_div({z}.log_softmax(-1), ({z2}.detach() / 2).softmax(-1), reduction='batchmean')",
    "{+s} = F.binary_cross_entropy_with_logits({z}, {t}.sigmoid())",
    "{+s} = {z}.logsumexp(-1).square().mean()",
    "{+s} = F.nll_loss({z}.log_softmax(-1), {y}.clamp(min=0))",
    "{+s} = sum(F.cross_entropy(a, b) for a, b in zip({z}.split(8), {y}.clamp(min=0).split(8)))",
    "{+s} = {r}.mean()",
    "{+s} = {r}.mean()",
    "{+s} = {r}.sum()",
    "{+s} = ({r} * {k}).sum() / {k}.sum()",
    "{+s} = -F.logsigmoid({r}.view(B, -1).mean(-1)).mean()",
    "{+s} = {r}[3]",
    "{+s} = {r}[{k}].mean()",
    "{+s} = {z}[0, 0] * 1.0",
    "{+s} = {z}.mean()",
)
NUMBERS = (
    "{+s} = {s} + 0.3 * {s2}",
    "{+s} = {s} * torch.exp(-self.logvar[0]) + self.logvar[0]",
    "{+s} = {s} * self.scale",
    "{+s} = (torch.stack([{s}, {s2}]) * self.mix.softmax(0)).sum()",
    "{+s} = {s} / (1 + {s2}.detach().abs())",
    "{+s} = torch.stack([{s}, {s2}]).sum()",
    "{+s} = torch.where({s} > 2, {s}, {s2})",
    "{+s} = {s}.clamp(max=5.0)",
    "{+s} = {s}.square()",
    "{+s} = up({s})",
    "{+s} = {s}.detach()",
    "{+s} = {s} * self.steps",
    "{+s} = {s} * 1.0\n{+s} += {s2}",
    "if {s}.item() > -1e9:\n    {+s} = {s} * 2.0",
)
MEMORY = (
    "{+m} = x.new_zeros(8)",
    "{+m} = x.new_zeros(8)",
    "{+m} = torch.empty(8, dtype=x.dtype).fill_(0.5)",
    "{+m} = x.new_zeros(3, 8)[1]",
    "{+m} = {r}[:8].clone()",
    "{+m} = {m}.view(2, 4).flatten()",
    "{+m} = {m}[:]",
    "{+m} = {m}.detach()",
    "{+p} = self.hist",
    "{+p} = self.table[1]",
    "{+p} = self.table.view(-1)[8:16]",
    "{+p} = {p}.view(2, 4).view(8)",
    "{+n} = torch.zeros_like({r})",
    "{+n} = {r}.new_zeros({r}.shape)",
    "{+n} = {r}.new_zeros(2, {r}.shape[0])[1]",
)
_WRITES = (
    "{M}[3] = {S}",
    "{M}[1:5] = {R}[:4]",
    "{M}[torch.tensor([1, 6, 2])] = {R}[3:6]",
    "{M}.copy_({R}[:8])",
    "{M}[0].add_({S})",
    "{M}.select(0, 1).mul_({S})",
    "{M}.view(2, 4)[1].add_({R}[:4])",
    "{M}.index_add_(0, {y}.clamp(min=0) % 8, {R})",
    "{M}.scatter_add_(0, {y}.clamp(min=0) % 8, {R})",
    "{M}.index_put_((torch.tensor([0, 0, 5]),), {R}[:3], accumulate=True)",
    "{M}.masked_scatter_({M} == 0, {R})",
    "{M}.fill_({S})",
    "{M}.add_({S})",
    "{M}.mul_(0.9).add_({R}[:8], alpha=0.1)",
    "{M}.lerp_({R}[:8], 0.25)",
    "{M}.clamp_(max=1.5)",
    "{M}[{M} == 0] = 1.0",
    "{M}.zero_()",
    "{M} += {S}",
    "{M}.addcmul_({R}[:8], {R}[:8])",
    "for j, (a, b) in enumerate(zip({z}.split(8), {y}.clamp(min=0).split(8))):\n"
    "    {M}[j % 8] = F.cross_entropy(a, b){D}",
)
WRITES = (
    *(w.format(M="{m}", S="{s}", R="{r}", y="{y}", z="{z}", D="") for w in _WRITES),
    *(
        w.format(M="{p}", S="{s}.detach()", R="{r}.detach()", y="{y}", z="{z}", D=".detach()")
        for w in _WRITES
    ),
    "{n}[1:] = {r}[1:]",
    "{n}.copy_({r})",
    "{n}[{k}] = 0.25",
    "{n}.add_({r})",
    "{n}[::2] = {r}[::2]",
    "{n}[:5] += {r}[:5]",
    "{n}.masked_scatter_({k}, {r})",
    "self.queue[: {r}.shape[0]] = {r}.detach()",
    "self.hist[3] = {s}.detach()",
    "self.ema.mul_(0.9).add_({s}.detach(), alpha=0.1)",
    "self.ema.lerp_({s}.detach().to(x.dtype), 0.1)",
    "self.ema.copy_({s}.detach())",
    "self.note = {s}.detach()",
    "self.last.copy_({z}.detach()[:4])",
    "self.last[1] = {z}.detach()[3]",
    "self.count.index_add_(0, {y}.clamp(min=0) % 16, torch.ones_like({y}))",
    "self.steps.add_(1)",
    "self.steps += 1",
    "out.mul_(0.5)",
    "view[2:4] = 1.0",
)
READS = (
    "{+s} = {M}.sum()",
    "{+s} = {M}.sum()",
    "{+s} = {M}[3] * 1.0",
    "{+s} = ({M} * {M}).mean()",
    "{+s} = {M}[1:5].sum()",
    "{+m} = {M}.clone()",
    "{+m} = {M} * 1.0",
    "{+r} = {n} * 1.0",
    "{+s} = {n}.sum()",
    "{+s} = self.hist.sum()",
    "{+s} = self.ema * 1.0",
    "{+s} = self.note * 1.0",
    "{+s} = self.last.mean()",
    "{+s} = self.queue.sum()",
    "{+s} = self.table.sum()",
    "{+s} = self.count.sum().to(x.dtype)",
    "{+s} = (out * view).sum()",
)
BREAKS = ("torch._dynamo.graph_break()",)
#: What only a Python loop does with the logits that a compiled model returned.
OUTSIDE = (
    "{z}.retain_grad()",
    "{z}.register_hook(lambda g: g * 0.5)",
    "{s}.register_hook(lambda g: g * 0.5)",
    "{r}.register_hook(lambda g: g * 0.5)",
    "{+s} = x.new_tensor({z}.tolist()).mean()",
    "{+s} = x.new_tensor({s}.item())",
    "str({z})",
    "{+z} = {z}.cpu()",
    "{+z} = copy.deepcopy({z}.detach())",
    "({+z},) = torch.autograd.grad({s}, {z}, retain_graph=True)",
    "{z}.backward(torch.ones_like({z}) * 0.01, retain_graph=True)",
    "{r}.backward({f}, retain_graph=True)",
    "{z}.requires_grad",
    "del {z}",
)
SETUP = (
    "model.head.register_forward_hook(lambda module, args, z: z * 1.1)",
    "model.head.register_forward_pre_hook(lambda module, args: (args[0] * 0.9,))",
    "model.head.weight.register_hook(lambda g: g * 0.5)",
    "model.body.weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2.0))",
    "model.head.weight.requires_grad_(False)",
    "model.head.requires_grad_(False)",
    "model.body.requires_grad_(False)",
    "model.head.weight = model.emb.weight",
    "nn.utils.parametrizations.weight_norm(model.head)",
    "model.head.bias = None",
    "model.scale.requires_grad_(False)",
)

#: Families with their weights, in the compiled function and after it.
FORWARD = (
    (3, HIDDEN),
    (3, LABELS),
    (2, HEADS),
    (2, CHANNELS),
    (4, STACKED),
    (2, FLAT),
    (5, WIDE),
    (0.3, MIXING),
    (5, ROWS),
    (4, PICKED),
    (4, NARROW),
    (6, LOSSES),
    (5, NUMBERS),
    (5, MEMORY),
    (9, WRITES),
    (6, READS),
    (0.8, BREAKS),
)
AFTER_IT = (
    (1, LABELS),
    (1, FLAT),
    (1, CHANNELS),
    (2, STACKED),
    (4, WIDE),
    (0.2, MIXING),
    (4, ROWS),
    (3, PICKED),
    (2, NARROW),
    (6, LOSSES),
    (3, NUMBERS),
    (2, MEMORY),
    (4, WRITES),
    (3, READS),
    (3, OUTSIDE),
    (0.2, BREAKS),
)
METRICS = ((3, ROWS), (3, PICKED), (3, LOSSES), (1, NARROW), (1, READS))

_CUTS = {"cut": "[:, :-1]", "cuts": "[:, :, :-1]", "cutc": "[..., :-1]"}
_HOLE = re.compile(r"\{(\+?)([a-zA-Z]+)(\d?)\}")


@dataclass
class Dice:
    """Draws lines; knows the names that exist.

    Attributes:
        random: The source of every choice.
        shifted: Whether the last position of each sequence is dropped.
        exact: Whether an argmax may be compared: not where logits are rounded to ties.
        casts: Whether a block may be under autocast.
        stacked: Whether the heads of the step are stacks of K.
        names: Names by kind.
    """

    random: random.Random
    shifted: bool = False
    exact: bool = True
    casts: bool = False
    stacked: bool = False
    names: dict[str, list[str]] = field(
        default_factory=lambda: {kind: list(names) for kind, names in INPUTS.items()}
    )
    made: int = 0

    def fill(self, template: str, wrapped: bool = False) -> str | None:
        """A template's lines, or None where a name that it needs does not exist."""
        found: dict[str, str] = {}
        new: list[str] = []
        number = self.made + 1
        for plus, kind, which in _HOLE.findall(template):
            hole = plus + kind + which
            if hole in found:
                continue
            if kind in _CUTS:
                found[hole] = _CUTS[kind] if self.shifted else ""
            elif plus:
                found[hole] = f"{kind}{number}"
                new.append(kind)
            else:
                names = [n for k in ALSO.get(kind, kind) for n in self.names.get(k, [])]
                if not names:
                    return None
                # Later names are likelier: a step is a story, not a bag of lines.
                found[hole] = names[max(self.random.randrange(len(names)) for _ in range(2))]
        self.made += bool(new)
        for kind in new:
            self.names.setdefault(kind, []).append(f"{kind}{number}")
        line = _HOLE.sub(lambda m: found["".join(m.groups())], template)
        if line.startswith("del "):
            self.names["z"].remove(found["z"])
        return line

    def line(self, families: Sequence[tuple[float, Sequence[str]]]) -> str | None:
        """One line of any family."""
        family = self.random.choices([f for _, f in families], [w for w, _ in families])[0]
        if family is PICKED and not self.exact:
            return None
        if family is HEADS and self.stacked:
            family = STACKS
        filled = self.fill(self.random.choice(family))
        if filled is None or any(family is alone for alone in (BREAKS, OUTSIDE)):
            return filled
        roll = self.random.random()
        if roll < 0.08:
            return _under("torch.no_grad()", filled)
        if roll < 0.10:
            return _under("torch.enable_grad()", filled)
        if self.casts and roll < 0.2:
            return _under("torch.autocast('cpu', torch.bfloat16)", filled)
        return filled


def _under(context: str, line: str) -> str:
    return f"with {context}:\n" + "\n".join("    " + part for part in line.split("\n"))


def outside_of_the_model(line: str) -> str:
    """A line as it is written where the module is ``model``."""
    return re.sub(r"\bself\.", "model.", line)
