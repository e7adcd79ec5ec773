"""Tiny models of many architectures with random weights, and a tree of rows to train them on."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from espalier.encode.encode import IGNORE_INDEX, Encoded
from espalier.model.load import exact_attention

VOCAB = 97

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}

# name -> (model type, config fields beyond _SHAPE)
TREE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama_grouped": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral_window": ("mistral", {"sliding_window": 16}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, **_WINDOW}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, **_WINDOW}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "attn_pdrop": 0,
            "resid_pdrop": 0,
            "embd_pdrop": 0,
        },
    ),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "falcon": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    ),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", {"sliding_window": 16, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, **_WINDOW}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "glm": ("glm", {"head_dim": 8}),
    "glm4": ("glm4", {"head_dim": 8}),
    "ernie4_5": ("ernie4_5", {"head_dim": 8}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 8}),
    "mixtral": ("mixtral", _EXPERTS),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, **_EXPERTS}),
    "gpt_oss": ("gpt_oss", {"head_dim": 8, **_EXPERTS, **_WINDOW}),
}
# name -> (model type, config fields, words of the reason)
PADDED_MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3_next": ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8}, "linear_attention"),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "conv"),
    "falcon_alibi": ("falcon", {"alibi": True}, "ALiBi"),
    "mixtral_router_loss": ("mixtral", {"output_router_logits": True, **_EXPERTS}, "router"),
}


def tiny_config(model_type: str, fields: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **{**_SHAPE, **fields})


def tiny_model(config: PretrainedConfig, *, seed: int = 0, head: bool = False, **lora: Any) -> PeftModel:
    """Random weights wide enough that attention is far from uniform; LoRA r 4 on all linear layers, B not zero."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=exact_attention(config))
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            elif "bias" in name or "sinks" in name:
                parameter.normal_(0.0, 0.1)
    targets: Any = "all-linear"
    if head:
        targets = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    with warnings.catch_warnings():  # peft's own calls of what transformers has renamed
        warnings.simplefilter("ignore")
        model = get_peft_model(
            base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **lora)
        )
    model.train()
    return model


def row(prompt: list[int], answer: list[int], *, line: int = 1, weight: float | None = None) -> Encoded:
    """A row that learns its answer."""
    ids = np.array(prompt + answer, np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    labels[len(prompt) :] = answer
    weights = None if weight is None else np.full(len(ids), weight, np.float32)
    return Encoded(ids, labels, weights, "rows.jsonl", line)


def tree_rows() -> list[Encoded]:
    """Nine rows behind 20 shared tokens: two levels of branches, a repeated row, a row that is the beginning of
    another, a one-token answer, a weighted row, a row with two answers, and one row that shares nothing."""
    rng = np.random.default_rng(7)

    def some(count: int) -> list[int]:
        return [int(token) for token in rng.integers(3, VOCAB, count)]

    system, branch = some(20), some(7)
    first, second = some(6), some(9)
    two_answers = row(system + some(4), some(12))
    two_answers.labels[27:30] = IGNORE_INDEX
    rows = [
        row(system, first),
        row(system, first),
        row(system + first, some(5)),
        row(system + branch, some(3)),
        row(system + branch, second),
        row(system + branch + some(3), [5]),
        row(system + some(2), some(8), weight=0.5),
        two_answers,
        row(some(9), some(6)),
    ]
    return [Encoded(r.input_ids, r.labels, r.weights, r.file, line) for line, r in enumerate(rows, 1)]
