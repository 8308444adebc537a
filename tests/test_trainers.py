"""Training loops of other libraries, unmodified: the losses of the same run without autochunk."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from autochunk import DeferredTensor
from autochunk.report import collect

OPTIONS = {"min_bytes": 0, "num_chunks": 3, "strict": True}
VOCABULARY = 512

pytestmark = pytest.mark.filterwarnings("ignore")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
        )
    )


def dataset(n: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (n, 12), generator=generator)
    labels = ids.clone()
    labels[::3, :4] = -100
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


def history(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _argmax(logits: Any, labels: Any) -> Any:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(prediction: Any) -> dict[str, float]:
    predicted, labels = prediction.predictions, prediction.label_ids
    if predicted.ndim == 3:
        predicted = predicted.argmax(-1)
    return {"accuracy": float((predicted[:, :-1] == labels[:, 1:]).mean())}


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "bf16 autocast": {"bf16": True, "use_cpu": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


def _train(tmp_path: Any, chunked: bool, settings: dict[str, Any], **kwargs: Any) -> Trainer:
    model = llama()
    if chunked:
        model.compile(backend="autochunk", options=OPTIONS)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **{k: v for k, v in settings.items() if k != "use_cpu"},
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=dataset(), eval_dataset=dataset(8), **kwargs
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer


@pytest.mark.parametrize("name", SETTINGS)
def test_trainer(name, tmp_path):
    expected = history(_train(tmp_path, False, SETTINGS[name]))
    with collect() as reports:
        actual = history(_train(tmp_path, True, SETTINGS[name]))
    assert len(actual) == 4
    tolerance = 2e-2 if "bf16" in name else 1e-5
    assert actual == pytest.approx(expected, rel=tolerance)
    heads = [row for report in reports for row in report.rows if f"{VOCABULARY}" in row.shape]
    assert heads
    assert all(row.refusal is None for row in heads), "\n".join(map(str, reports))


@pytest.mark.parametrize("preprocess", [None, _argmax], ids=["logits", "argmax"])
def test_trainer_metrics(preprocess, tmp_path):
    found = []
    for chunked in (False, True):
        trainer = _train(
            tmp_path,
            chunked,
            {},
            compute_metrics=_accuracy,
            preprocess_logits_for_metrics=preprocess,
        )
        metrics = trainer.evaluate()
        found.append([metrics["eval_loss"], metrics["eval_accuracy"]])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


class NanoGPT(nn.Module):
    """Returns logits, as a small training script's model does."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.lm_head = nn.Linear(16, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = self.wte(idx)
        return self.lm_head(x + self.mlp(x))


def test_nano_gpt_loop():
    results = []
    for chunked in (False, True):
        torch.manual_seed(0)
        model = NanoGPT()
        step = torch.compile(model, backend="autochunk", options=OPTIONS) if chunked else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(6):
            for micro in range(2):
                x = torch.randint(0, VOCABULARY, (2, 9 + micro))
                logits = step(x[:, :-1])
                loss = F.cross_entropy(
                    logits.view(-1, logits.size(-1)), x[:, 1:].reshape(-1), ignore_index=-1
                )
                (loss / 2).backward()
                losses.append(loss.item())
                assert type(logits) is (DeferredTensor if chunked else torch.Tensor)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_accelerate():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    results = []
    for chunked in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        torch.manual_seed(0)
        model = NanoGPT()
        if chunked:
            model.compile(backend="autochunk", options=OPTIONS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        losses = []
        for _ in range(4):
            x = torch.randint(0, VOCABULARY, (2, 9))
            logits = prepared(x[:, :-1])
            assert logits.dtype == torch.float32  # accelerate converts outputs
            loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=2e-2)


def test_peft_lora():
    from peft import LoraConfig, get_peft_model

    results = []
    for chunked in (False, True):
        model = get_peft_model(
            llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
        )
        if chunked:
            model.compile(backend="autochunk", options=OPTIONS)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for row in dataset(4):
            batch = {k: v.unsqueeze(0) for k, v in row.items()}
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-5)
