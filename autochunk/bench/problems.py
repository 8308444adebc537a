"""Problems: the tensors of a case, one step of it, and what the step is compared with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autochunk.bench.cases import MODEL_BATCH, Case, Variant
from autochunk.bench.losses import LOSSES, log_probs
from autochunk.bench.methods import METHODS, read_options
from autochunk.bench.steps import checkpointed

#: The floor's product of all logits is taken of fewer rows where it would be larger than this.
_FLOOR_BYTES = 2**30
#: Logits that are held while inputs are made, at most.
_SETUP_BYTES = 2**26


class Problem:
    """The tensors of a case, the same in each process.

    Attributes:
        case: The case.
        leaves: What the loss is differentiated by; of a head ``x [N, H]`` and ``w [V, H]``.
        tensors: The loss's own, ``[N]`` each; of a model its token ids.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.device = torch.device(case.device)
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.leaves: list[Tensor] = []
        self.tensors: tuple[Tensor, ...] = ()
        self.generator = torch.Generator(self.device).manual_seed(0)

    @property
    def input_bytes(self) -> int:
        """Bytes of all tensors that a step reads."""
        return sum(tensor.nbytes for tensor in (*self.leaves, *self.tensors))

    def call(self, variant: Variant) -> Callable[[], Tensor]:
        """The forward pass with a method: a callable without arguments that returns the loss."""
        raise NotImplementedError

    def finish(self) -> None:
        """What a step does after its backward pass."""

    def step(self, call: Callable[[], Tensor]) -> Tensor:
        """One step; the gradients are left in ``leaves``. Returns the loss, detached."""
        loss = call()
        loss.backward()
        self.finish()
        return loss.detach()

    def clear(self) -> None:
        """Forgets the gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def timed(self, call: Callable[[], Tensor]) -> float:
        """Seconds of one step.

        Where CUDA's allocator keeps more than half of the memory for what other methods have
        freed, it is given back first, and an untimed step takes what this one needs: otherwise the
        clock would count the allocator's way through a full device.
        """
        if self.device.type == "cuda" and _crowded():
            torch.cuda.empty_cache()
            self.step(call)
        self.clear()
        self.synchronize()
        begin = time.perf_counter()
        self.step(call)
        self.synchronize()
        return time.perf_counter() - begin

    def floor(self) -> float | None:
        """Seconds that a step's matrix products take at least, or None where they are not known."""
        return None

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class HeadProblem(Problem):
    """A linear layer and a loss. The logits have a standard deviation of about one."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.loss = LOSSES[case.loss]
        x = self._normal(case.tokens, case.hidden)
        w = self._normal(case.vocabulary, case.hidden).mul_(case.hidden**-0.5)
        labels = torch.randint(
            case.vocabulary, (case.tokens,), generator=self.generator, device=self.device
        )
        found = self._log_probs(x, w, labels) if self.loss.needs_log_probs else None
        self.tensors = self.loss.tensors(labels, found)
        self.leaves = [x.requires_grad_(), w.requires_grad_()]

    def _normal(self, *shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=self.dtype, device=self.device)
        return empty.normal_(generator=self.generator)

    @staticmethod
    def _log_probs(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        rows = max(_SETUP_BYTES // (4 * len(w)), 1)
        pieces = zip(x.split(rows), labels.split(rows), strict=True)
        return torch.cat([log_probs(part @ w.t(), own) for part, own in pieces])

    def call(self, variant: Variant) -> Callable[[], Tensor]:
        step = METHODS[variant.method].step(self.loss, read_options(variant))
        x, w = self.leaves
        return lambda: step(x, w, *self.tensors)

    def floor(self) -> float:
        """The three products ``x wᵀ``, ``g w``, ``gᵀ x`` with plain ``torch.mm``: 6·N·H·V flops.

        Same shapes and dtype; of fewer rows and scaled up where the logits would not fit. Memory
        is taken and touched before the clock starts.
        """
        x, w = (leaf.detach() for leaf in self.leaves)
        rows = min(max(_FLOOR_BYTES // (w.shape[0] * w.itemsize), 1), len(x))
        part = x[:rows]
        logits = torch.zeros(rows, w.shape[0], dtype=w.dtype, device=w.device)
        dx, dw = torch.zeros_like(part), torch.zeros_like(w)
        self.synchronize()
        begin = time.perf_counter()
        torch.mm(part, w.t(), out=logits)
        torch.mm(logits, w, out=dx)
        torch.mm(logits.t(), part, out=dw)
        self.synchronize()
        return (time.perf_counter() - begin) * len(x) / rows

    def reference(self) -> dict[str, Tensor]:
        """Loss and gradients in float64, computed chunk by chunk."""
        x, w = (leaf.detach().double().requires_grad_() for leaf in self.leaves)
        rows = max(_SETUP_BYTES // (8 * len(w)), 1)
        step = checkpointed(self.loss, {"chunk_rows": rows})
        wide = [t.double() if t.is_floating_point() else t for t in self.tensors]
        loss = step(x, w, *wide)
        loss.backward()
        assert x.grad is not None
        assert w.grad is not None
        return {"loss": loss.detach().cpu(), "dx": x.grad.cpu(), "dw": w.grad.cpu()}


class ModelProblem(Problem):
    """A Hugging Face Llama with random weights, its loss from labels, and AdamW.

    Nothing but the loss is returned by what is compiled, which is the best that can be done for
    plain Inductor: logits that are returned as well stay in memory.
    """

    def __init__(self, case: Case) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__(case)
        config = LlamaConfig(
            vocab_size=case.vocabulary,
            hidden_size=case.hidden,
            intermediate_size=4 * case.hidden,
            num_hidden_layers=case.layers,
            num_attention_heads=max(case.hidden // 64, 4),
            num_key_value_heads=max(case.hidden // 256, 2),
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            rms_norm_eps=1e-5,
            max_position_embeddings=131072,
            tie_word_embeddings=True,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=1,
        )
        torch.manual_seed(0)
        with self.device:
            model: Any = LlamaForCausalLM._from_config(config, dtype=self.dtype)
        self.model = model.train()
        self.leaves = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.leaves, lr=1e-5, fused=self.device.type == "cuda" or None
        )
        shape = (MODEL_BATCH, case.tokens // MODEL_BATCH)
        self.tensors = (
            torch.randint(case.vocabulary, shape, generator=self.generator, device=self.device),
        )

    def call(self, variant: Variant) -> Callable[[], Tensor]:
        model = self.model

        def loss_of(ids: Tensor) -> Tensor:
            return model(input_ids=ids, labels=ids).loss

        compile_with = METHODS[variant.method].compile
        assert compile_with is not None
        compiled = compile_with(loss_of, read_options(variant), False)
        return lambda: compiled(*self.tensors)

    def finish(self) -> None:
        self.optimizer.step()


def _crowded() -> bool:
    everything = torch.cuda.get_device_properties(0).total_memory
    return torch.cuda.memory_reserved() > everything / 2


def make(case: Case) -> Problem:
    """The problem of a case."""
    return ModelProblem(case) if case.layers else HeadProblem(case)


def errors(loss: Tensor, leaves: list[Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Distances of loss and gradients from float64, relative to the reference's norm."""
    found = {"loss": _distance(loss.reshape(1), reference["loss"].reshape(1))}
    for name, leaf in zip(("dx", "dw"), leaves, strict=True):
        if leaf.grad is None:
            raise RuntimeError(f"no gradient {name} was computed")
        found[name] = _distance(leaf.grad, reference[name])
    for name, distance in found.items():
        if not math.isfinite(distance):
            raise RuntimeError(f"{name} is not finite")
    return found


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Relative distance in the Euclidean norm, block by block so that no copy has full size."""
    difference = norm = 0.0
    rows = max(_SETUP_BYTES // (8 * max(found[0].numel(), 1)), 1)
    for own, right in zip(found.split(rows), wanted.split(rows), strict=True):
        right = right.to(found.device, torch.float64)
        difference += (own.double() - right).square().sum().item()
        norm += right.square().sum().item()
    return (difference / norm) ** 0.5 if norm else float(difference > 0)
