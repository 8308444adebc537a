"""Model families of transformers with tiny configurations and a vocabulary to chunk.

Each model is called with labels, as anybody calls it; random weights, no download.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """One line of the table.

    Attributes:
        name: ``model_type`` in transformers.
        kind: What it is an example of.
        auto: Name of the class that builds the model from a configuration.
        settings: Of the configuration, besides the tiny sizes all have.
        expect: ``chunked``, ``deferred`` or a refusal code.
        inputs: Makes the keyword arguments besides ``input_ids`` and ``labels``.
    """

    name: str
    kind: str
    auto: str = "AutoModelForCausalLM"
    settings: tuple[tuple[str, Any], ...] = ()
    expect: str = "chunked"
    inputs: Callable[[Any, torch.Tensor], dict[str, Any]] | None = None


TINY = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_hidden_size": 64,
    "d_ff": 64,
    "hidden_dim": 64,
    "n_inner": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "state_size": 8,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}


def _masked(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    return {"attention_mask": torch.ones_like(ids)}


FAMILIES = [
    Family("llama", "decoder, untied", settings=(("tie_word_embeddings", False),)),
    Family("qwen2", "decoder, tied", settings=(("tie_word_embeddings", True),)),
    Family("qwen3", "decoder, tied", settings=(("tie_word_embeddings", True),)),
    Family("gemma", "decoder, tied"),
    # As wide an inner layer for its hidden size as the defaults have: Gemma 8, T5 of 11B 64.
    Family("gemma", "decoder, wide inner layers", settings=(("intermediate_size", 256),)),
    Family("gemma2", "logits softcapped"),
    Family("gemma3_text", "logits softcapped", settings=(("final_logit_softcapping", 30.0),)),
    Family("granite", "logits scaled", settings=(("logits_scaling", 8.0),)),
    Family("cohere", "logits scaled", settings=(("logit_scale", 0.0625),)),
    Family("phi", "head with a bias"),
    Family("gptj", "head with a bias", settings=(("rotary_dim", 4),)),
    # transformers logs a warning before GPT-2's loss, where Dynamo breaks the graph.
    Family("gpt2", "decoder, tied", expect="deferred"),
    Family("gpt_neox", "decoder, untied"),
    Family("opt", "decoder, tied"),
    Family("bloom", "decoder, tied"),
    Family("olmo2", "decoder, untied"),
    Family("smollm3", "decoder, tied"),
    Family("stablelm", "decoder, untied"),
    Family("mixtral", "mixture of experts"),
    Family("olmoe", "mixture of experts"),
    Family("qwen3_moe", "mixture of experts"),
    Family("gpt_oss", "mixture of experts"),
    Family("mamba", "state space"),
    Family("mamba2", "state space", settings=(("expand", 2), ("num_heads", 8), ("n_groups", 1))),
    Family("falcon_mamba", "state space"),
    Family("t5", "encoder-decoder", "AutoModelForSeq2SeqLM", (("decoder_start_token_id", 0),)),
    Family(
        "t5",
        "encoder-decoder, wide inner layers",
        "AutoModelForSeq2SeqLM",
        (("decoder_start_token_id", 0), ("d_ff", 2048)),
    ),
    Family("bart", "encoder-decoder", "AutoModelForSeq2SeqLM"),
    Family("marian", "encoder-decoder", "AutoModelForSeq2SeqLM"),
    Family("pegasus", "encoder-decoder", "AutoModelForSeq2SeqLM"),
    Family("bert", "masked language model", "AutoModelForMaskedLM", inputs=_masked),
    Family("roberta", "masked language model", "AutoModelForMaskedLM", inputs=_masked),
    Family("distilbert", "masked language model", "AutoModelForMaskedLM", inputs=_masked),
    Family("electra", "masked language model", "AutoModelForMaskedLM", inputs=_masked),
    Family("modernbert", "masked language model", "AutoModelForMaskedLM", inputs=_masked),
    Family("llava", "vision-language", "AutoModelForImageTextToText"),
]


def build(family: Family, vocabulary: int) -> torch.nn.Module:
    """A tiny model with random weights, in training mode without dropout."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    auto = getattr(transformers, family.auto)
    if family.name == "llava":
        text = CONFIG_MAPPING["llama"](**_fitting("llama"), vocab_size=vocabulary)
        vision = CONFIG_MAPPING["clip_vision_model"](
            **_fitting("clip_vision_model"), image_size=16, patch_size=8
        )
        config = CONFIG_MAPPING["llava"](
            text_config=text, vision_config=vision, image_token_id=3, image_seq_length=4
        )
    else:
        settings = {**_fitting(family.name), **dict(family.settings), "vocab_size": vocabulary}
        config = CONFIG_MAPPING[family.name](**settings)
    for name in dir(config):
        drops = "dropout" in name or name.endswith("_pdrop")
        if drops and isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
    return auto.from_config(config).train()


def _fitting(name: str) -> dict[str, Any]:
    """The tiny sizes that a configuration has a field for."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = CONFIG_MAPPING[name]()
    return {key: value for key, value in TINY.items() if hasattr(fields, key)}


def arguments(family: Family, model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of a training call on token ids ``[batch, tokens]``."""
    labels = ids.masked_fill(torch.arange(ids.shape[1]) % 5 == 4, -100)
    if family.name == "llava":
        ids = ids.clone()
        ids[:, :4] = 3
        image = torch.linspace(-1, 1, ids.shape[0] * 3 * 16 * 16).view(-1, 3, 16, 16)
        return {"input_ids": ids, "labels": labels, "pixel_values": image}
    extra = family.inputs(model, ids) if family.inputs else {}
    return {"input_ids": ids, "labels": labels, **extra}
