"""Training loops of other libraries, unmodified: the losses of the same run without autochunk."""

from __future__ import annotations

import logging
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


def _lightning_module(backend: bool, metrics: bool, where: str) -> Any:
    lightning = pytest.importorskip("lightning")
    classification = pytest.importorskip("torchmetrics.classification")
    text = pytest.importorskip("torchmetrics.text")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = NanoGPT()
            self.accuracy = classification.MulticlassAccuracy(VOCABULARY, average="micro")
            self.perplexity = text.Perplexity(ignore_index=-100)
            self.losses: list[float] = []
            self.kinds: set[type] = set()
            if backend and where == "net":
                self.net.compile(backend="autochunk", options=OPTIONS)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            x, y = batch
            logits = self.net(x)
            loss = F.cross_entropy(logits.view(-1, VOCABULARY), y.view(-1))
            if where == "net":
                self.kinds.add(type(logits))
                self.log("train_loss", loss)
            if metrics:
                self.accuracy(logits.view(-1, VOCABULARY), y.view(-1))
                self.log("accuracy", self.accuracy)
                self.perplexity(logits, y)
                self.log("perplexity", self.perplexity)
                self.kinds.add(type(logits))
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            self.losses.append(outputs["loss"].item())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def _fit(module: Any, **settings: Any) -> dict[str, float]:
    import lightning

    logging.getLogger("lightning.pytorch").setLevel("ERROR")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (16, 12), generator=generator)
    pairs = torch.utils.data.TensorDataset(ids, ids.roll(-1, 1))
    trainer = lightning.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        **settings,
    )
    trainer.fit(module, torch.utils.data.DataLoader(pairs, batch_size=4))
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize(
    ("precision", "metrics"), [("32-true", True), ("bf16-mixed", False)], ids=["metrics", "bf16"]
)
def test_lightning(precision, metrics, caplog):
    """The network is compiled; the loss and torchmetrics' metrics read its logits."""
    caplog.set_level("INFO", logger="autochunk.deferred")
    modules = [_lightning_module(backend, metrics, "net") for backend in (False, True)]
    expected = _fit(modules[0], precision=precision)
    with collect() as reports:
        actual = _fit(modules[1], precision=precision)
    tolerance = 1e-5 if precision == "32-true" else 2e-3
    assert len(modules[1].losses) == 4
    assert modules[1].losses == pytest.approx(modules[0].losses, rel=tolerance)
    assert actual == pytest.approx(expected, rel=tolerance)
    assert modules[1].kinds == {DeferredTensor}
    assert not caplog.messages
    assert all(row.refusal is None for report in reports for row in report.rows)
    if precision == "32-true":
        _assert_close(modules[1].parameters(), modules[0].parameters())


def test_lightning_module_compiled(caplog):
    """``Trainer.fit(torch.compile(module))`` compiles ``training_step``, the loss inside."""
    modules = [_lightning_module(False, False, "step") for _ in range(2)]
    _fit(modules[0])
    with collect() as reports:
        _fit(torch.compile(modules[1], backend="autochunk", options=OPTIONS))
    assert modules[1].losses == pytest.approx(modules[0].losses, rel=1e-5)
    _assert_close(modules[1].parameters(), modules[0].parameters())
    assert [row.strategy for report in reports for row in report.rows] == ["fused"]


def _assert_close(actual: Any, expected: Any) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


METRICS = {
    "accuracy": lambda m: (m.classification.MulticlassAccuracy(VOCABULARY), "flat"),
    "micro accuracy": lambda m: (
        m.classification.MulticlassAccuracy(VOCABULARY, average="micro", ignore_index=-100),
        "classes second",
    ),
    "top 5": lambda m: (
        m.classification.MulticlassAccuracy(VOCABULARY, top_k=5, average="micro"),
        "flat",
    ),
    "perplexity": lambda m: (m.text.Perplexity(ignore_index=-100), "sequences"),
}


@pytest.mark.parametrize("name", METRICS)
def test_torchmetrics(name, caplog, no_codegen):
    """A metric of deferred logits: that of the logits, which are not computed for it."""
    torchmetrics = pytest.importorskip("torchmetrics")
    pytest.importorskip("torchmetrics.text")
    caplog.set_level("INFO", logger="autochunk.deferred")
    torch.manual_seed(0)
    model = NanoGPT()
    results = []
    for function in (model, torch.compile(model, backend="autochunk", options=OPTIONS)):
        metric, layout = METRICS[name](torchmetrics)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            x = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
            logits = function(x)
            y = x.clone()
            if layout == "flat":
                metric(logits.view(-1, VOCABULARY), y.view(-1))
            else:
                y[0, :3] = -100
                metric(logits.transpose(1, 2) if layout == "classes second" else logits, y)
        results.append(metric.compute())
    assert type(logits) is DeferredTensor
    assert not caplog.messages
    assert results[1].item() == pytest.approx(results[0].item(), rel=1e-5)
    assert results[1].item() > 0


def _compiled_model(backend: str, tmp_path: Any, **settings: Any) -> Trainer:
    options = {"options": OPTIONS} if backend == "autochunk" else {}
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, logging_steps=1, **settings
    )
    model = torch.compile(llama(), backend=backend, **options)
    return Trainer(model=model, args=args, train_dataset=dataset(), eval_dataset=dataset(8))


@pytest.mark.parametrize("backend", ["eager", "autochunk"])
def test_fault_T_the_trainer_drops_the_columns_of_a_compiled_model(backend, tmp_path):
    """Its own doing, with any backend; docs/troubleshooting.md says what to do."""
    with pytest.raises(ValueError, match="The batch received was empty"):
        _compiled_model(backend, tmp_path).train()


def test_fault_T_a_compiled_model_is_trained_and_evaluated(tmp_path):
    kept = {"remove_unused_columns": False, "label_names": ["labels"]}
    trainer = _compiled_model("autochunk", tmp_path, **kept)
    with collect() as reports:
        trainer.train()
        metrics = trainer.evaluate()
    assert any(row.strategy == "fused" for report in reports for row in report.chunked)
    plain = _compiled_model("eager", tmp_path, **kept)
    plain.train()
    assert history(trainer) == pytest.approx(history(plain), rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)
