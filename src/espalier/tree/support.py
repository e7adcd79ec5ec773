"""Which models the tree is exact for, from the config alone; the others train on padded rows, and the reason is said.

The tree needs a token's hidden state to depend on its ancestors alone, and through attention alone: then a state
that k rows share is the same in all of them. Whatever passes state along the *sequence* (recurrence, convolution),
counts tokens (auxiliary losses), or looks at a token's index instead of its position breaks that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

# Held equal to plain rows by tests/parity. Others that pass the checks below are compared in a run's first step.
# fmt: off
TESTED_MODEL_TYPES = frozenset((
    "cohere", "cohere2", "ernie4_5", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2",
    "gpt_neox", "gpt_oss", "granite", "hunyuan_v1_dense", "llama", "mistral", "mixtral", "olmo", "olmo2",
    "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
))
# fmt: on
# Take a ready mask through their stock attention, though not transformers' AttentionInterface.
STOCK_MASK_MODEL_TYPES = frozenset({"falcon"})

_EXACT_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
_STATE_MODEL_TYPES = frozenset({"lfm2", "lfm2_moe", "lfm3"})  # convolutions that their default config does not name
# Encoders that transformers also lists as causal models.
# fmt: off
_ENCODER_MODEL_TYPES = frozenset((
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
))
# fmt: on
_DROPOUT_KEYS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "resid_dropout")


@dataclass(frozen=True, slots=True)
class Support:
    """tree: share beginnings. padded: plain rows only. `reason` says why not, or what equality means; may be empty."""

    mode: Literal["tree", "padded"]
    reason: str = ""


def tree_support(config: PretrainedConfig) -> Support:
    """Whether prompt sharing gives a model of this config the gradients of plain rows."""
    text = config.get_text_config()
    obstacles = _obstacles(config, text)
    if obstacles:
        return Support("padded", f"{config.model_type}: {'; '.join(obstacles)}")
    notes = []
    rates = {key: getattr(text, key, 0.0) for key in _DROPOUT_KEYS}
    active = [f"{key} {rate}" for key, rate in rates.items() if isinstance(rate, float) and rate > 0]
    if active:
        notes.append(
            f"{', '.join(active)}: one draw serves all rows that share a token, equal to plain rows in expectation only"
        )
    if text.model_type not in TESTED_MODEL_TYPES:
        notes.append(f"{config.model_type} is not among the tested architectures: rely on the first step's comparison")
    return Support("tree", "; ".join(notes))


def _obstacles(config: PretrainedConfig, text: PretrainedConfig) -> list[str]:
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if model_class is None:
        return ["not a causal language model that transformers knows, so nothing is known of its layers"]
    found = []
    foreign = sorted(set(getattr(text, "layer_types", None) or ()) - _EXACT_LAYERS)
    if foreign:
        found.append(f"layers of type {', '.join(foreign)} are not attention over a token's own past")
    elif getattr(model_class, "_is_stateful", False) or text.model_type in _STATE_MODEL_TYPES:
        found.append("recurrent or convolution layers carry state along the sequence, from branch to branch")
    if config.is_encoder_decoder or text.model_type in _ENCODER_MODEL_TYPES:
        found.append("its attention is not causal")
    if getattr(text, "alibi", False) or text.model_type in {"bloom", "mpt"}:
        found.append("ALiBi counts distances by index, not by position")
    if getattr(text, "attn_temperature_tuning", False):
        found.append("attention temperature tuning goes by a token's index, not by its position")
    if text.model_type == "doge":
        found.append("its attention mask depends on all tokens of the sequence")
    if getattr(text, "output_router_logits", False) and getattr(text, "router_aux_loss_coef", 0.0):
        found.append("the auxiliary loss of its router (output_router_logits) averages over the plain rows' tokens")
    method = _quantisation(config)
    if method in {"compressed-tensors", "quark"}:
        found.append(f"{method} may scale activations by the largest of all tokens")
    takes_mask = model_class._can_set_attn_implementation() or text.model_type in STOCK_MASK_MODEL_TYPES
    if not takes_mask and not found:
        found.append("its attention does not go through transformers' AttentionInterface")
    return found


def _quantisation(config: PretrainedConfig) -> str | None:
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))
