"""TRL's trainers, unmodified: the losses and parameters of the same run under eager PyTorch.

TRL gives models a head of its own, which computes log-probabilities in tiles: nothing is left to
chunk. Where a trainer reads logits they are chunked here, and so they are where the examples'
``use_plain_head`` takes TRL's head off again.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from autochunk.report import Report, collect

pytest.importorskip("trl")
pytest.importorskip("gguf")

OPTIONS = {"min_bytes": 0, "num_chunks": 3, "strict": True}
VOCABULARY = 49152
TEXT = "the quick brown fox jumps over the lazy dog and runs away from it all"
WORDS = TEXT.split()

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def examples():
    """The examples' modules."""
    directory = str(Path(__file__).parents[1] / "examples")
    sys.path.insert(0, directory)
    yield importlib.import_module
    sys.path.remove(directory)
    for name in ("_compare", "_plain_head", "finetune_smollm"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer(examples):
    try:
        path = examples("finetune_smollm").find_gguf()
    except SystemExit as missing:
        pytest.skip(str(missing))
    loaded = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded.pad_token = loaded.eos_token
    return loaded


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Trained:
    """What a run left behind."""

    history: tuple[dict[str, float], ...]
    parameters: tuple[torch.Tensor, ...]
    reports: tuple[Report, ...]
    messages: tuple[str, ...]

    @property
    def heads(self) -> list[str]:
        """What became of each head: its strategy, or why it was left alone."""
        rows = [row for report in self.reports for row in report.rows]
        return [row.strategy if row.refusal is None else row.refusal.code for row in rows]


def settings(tmp_path: Path, **kwargs: Any) -> dict[str, Any]:
    """SGD: Adam would blow up rounding where a gradient is nearly zero."""
    return {
        "output_dir": str(tmp_path),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **kwargs,
    }


def text_data() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"text": " ".join(WORDS[i % 5 :] * 3)} for i in range(8)])


def sft(tmp_path: Path, tokenizer: Any, model: Any, **kwargs: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    loss = kwargs.pop("compute_loss_func", None)
    args = SFTConfig(**settings(tmp_path, max_length=24, **kwargs))
    return SFTTrainer(
        model, args, train_dataset=text_data(), processing_class=tokenizer, compute_loss_func=loss
    )


def dpo(tmp_path: Path, tokenizer: Any, model: Any, reference: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**settings(tmp_path, max_length=20))
    return DPOTrainer(
        model, reference, args, train_dataset=preferences(), processing_class=tokenizer
    )


def preferences() -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": " ".join(WORDS[i % 3 : 5]) + " ",
                "chosen": " ".join(WORDS[i % 5 :] * 2),
                "rejected": " ".join(WORDS[::-1][i % 7 :] * 2),
            }
            for i in range(8)
        ]
    )


def orpo(tmp_path: Path, tokenizer: Any, model: Any) -> Any:
    module = pytest.importorskip("trl.experimental.orpo")
    args = module.ORPOConfig(**settings(tmp_path, max_length=20))
    return module.ORPOTrainer(model, args, train_dataset=preferences(), processing_class=tokenizer)


def gkd(tmp_path: Path, tokenizer: Any, model: Any, teacher: Any) -> Any:
    from datasets import Dataset

    module = pytest.importorskip("trl.experimental.gkd")
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% endfor %}"
    )
    rows = [
        {
            "messages": [
                {"role": "user", "content": WORDS[i]},
                {"role": "assistant", "content": " ".join(WORDS[i % 3 :][:9])},
            ]
        }
        for i in range(8)
    ]
    # Given answers only, and a sharp teacher.
    args = module.GKDConfig(**settings(tmp_path, max_length=48), lmbda=0.0)
    torch.nn.init.normal_(teacher.lm_head.weight)
    return module.GKDTrainer(
        model,
        teacher,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def vowels(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward; the completions are remembered in the order they are made."""
    COMPLETIONS.extend(completions)
    return [sum(letter in "aeiou" for letter in completion) / 10 for completion in completions]


COMPLETIONS: list[str] = []


def grpo(tmp_path: Path, tokenizer: Any, model: Any) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": " ".join(WORDS[i : i + 4])} for i in range(8)]
    changed = {"max_steps": 4, "per_device_train_batch_size": 4}
    # Each batch is used for two steps: the ratio of the second one differs from 1.
    args = GRPOConfig(
        **settings(tmp_path, **changed),
        num_generations=4,
        max_completion_length=6,
        num_iterations=2,
        seed=5,
    )
    COMPLETIONS.clear()
    return GRPOTrainer(
        model,
        vowels,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def train(trainer: Any, caplog: Any) -> Trained:
    caplog.clear()
    caplog.set_level(logging.INFO, logger="autochunk.deferred")
    with collect() as reports:
        trainer.train()
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "rewards/margins", "reward")
    entries = [e for e in trainer.state.log_history if "loss" in e]
    return Trained(
        history=tuple({k: e[k] for k in keys if k in e} for e in entries),
        parameters=tuple(p.detach().clone() for p in trainer.model.parameters()),
        reports=tuple(reports),
        messages=tuple(r.getMessage() for r in caplog.records if r.name == "autochunk.deferred"),
    )


def compiled(model: Any) -> Any:
    model.compile(backend="autochunk", options=OPTIONS)
    return model


def assert_same(actual: Trained, expected: Trained, steps: int = 3) -> None:
    assert len(actual.history) == len(expected.history) == steps
    for ours, theirs in zip(actual.history, expected.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=2e-6)
        assert all(map(math.isfinite, ours.values()))
    start = llama().parameters()
    for ours, theirs, first in zip(actual.parameters, expected.parameters, start, strict=True):
        assert not torch.equal(theirs, first), "nothing was trained"
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def _mean_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


@pytest.mark.parametrize(
    ("kwargs", "programs"),
    [({"label_smoothing_factor": 0.1}, 2), ({"compute_loss_func": _mean_loss}, 1)],
    ids=["label smoothing", "compute_loss_func"],
)
def test_sft_loss_outside(kwargs, programs, tmp_path, tokenizer, caplog, no_codegen):
    """Losses of ``outputs.logits``, TRL's and the user's: recorded, and evaluated in chunks."""
    expected = train(sft(tmp_path, tokenizer, llama(), **kwargs), caplog)
    actual = train(sft(tmp_path, tokenizer, compiled(llama()), **kwargs), caplog)
    assert_same(actual, expected)
    assert not actual.messages, "logits were computed"
    assert actual.heads[0] == "deferred"
    assert len(actual.heads) == 1 + programs
    assert set(actual.heads[1:]) <= {"fused", "recompute"}


def test_orpo(tmp_path, tokenizer, caplog, no_codegen):
    """Log-probabilities a sequence at a time, cross entropy, and metrics: five expressions."""
    expected = train(orpo(tmp_path, tokenizer, llama()), caplog)
    actual = train(orpo(tmp_path, tokenizer, compiled(llama())), caplog)
    assert_same(actual, expected)
    assert not actual.messages, "logits were computed"
    assert sorted(actual.heads) == [
        *("deferred", "forward", "forward", "fused"),
        *("recompute", "recompute"),
    ]


def test_gkd(tmp_path, tokenizer, caplog, no_codegen):
    """A divergence of a student's and a teacher's logits, of the tokens in a mask."""
    expected = train(gkd(tmp_path, tokenizer, llama(), llama(1)), caplog)
    actual = train(gkd(tmp_path, tokenizer, compiled(llama()), compiled(llama(1))), caplog)
    assert_same(actual, expected)
    assert not actual.messages, "logits were computed"
    assert actual.heads[:2] == ["deferred", "deferred"]
    assert set(actual.heads[2:]) == {"fused"}


def test_sft_with_the_head_of_trl(tmp_path, tokenizer, caplog, no_codegen):
    """TRL's own tiles: there is no head to find, and nothing is lost."""
    expected = train(sft(tmp_path, tokenizer, llama()), caplog)
    actual = train(sft(tmp_path, tokenizer, compiled(llama())), caplog)
    assert_same(actual, expected)
    assert actual.heads == []


def test_sft(tmp_path, tokenizer, caplog, examples):
    expected = train(sft(tmp_path, tokenizer, llama()), caplog)
    trainer = sft(tmp_path, tokenizer, compiled(llama()))
    examples("_plain_head").use_plain_head(trainer)
    actual = train(trainer, caplog)
    assert_same(actual, expected)
    assert actual.heads == ["recompute"]


def test_dpo(tmp_path, tokenizer, caplog, examples, no_codegen):
    expected = train(dpo(tmp_path, tokenizer, llama(), llama(1)), caplog)
    trainer = dpo(tmp_path, tokenizer, compiled(llama()), compiled(llama(1)))
    examples("_plain_head").use_plain_head(trainer)
    actual = train(trainer, caplog)
    assert_same(actual, expected)
    assert sorted(actual.heads) == ["forward", "recompute"]
    assert actual.history[-1]["rewards/margins"] != 0


def test_grpo(tmp_path, tokenizer, caplog, examples, no_codegen):
    expected = train(grpo(tmp_path, tokenizer, llama()), caplog)
    completions = list(COMPLETIONS)
    trainer = grpo(tmp_path, tokenizer, compiled(llama()))
    examples("_plain_head").use_plain_head(trainer)
    actual = train(trainer, caplog)
    assert completions == COMPLETIONS
    assert_same(actual, expected, steps=4)
    assert any(abs(entry["loss"]) > 1e-3 for entry in actual.history)
    # The logits of one token of each sequence, of which generation draws; no others.
    computed = [m for m in actual.messages if "computes logits" in m]
    assert computed
    assert all("multinomial computes logits, 4×1×49152" in m for m in computed)
    assert [h for h in actual.heads if h != "deferred"] == ["forward", "recompute"]
