"""Guards: for which configs the tree is exact, and the reason where it is not."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, T5Config

from espalier.tree.support import tree_support


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        ("qwen3_next", {}, "layers of type linear_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "layers of type conv"),
        ("lfm2_moe", {}, "recurrent or convolution layers"),
        ("rwkv", {}, "recurrent or convolution layers"),
        ("jamba", {}, "linear_attention"),
        ("deepseek_v32", {}, "indexed_attention"),
        ("bloom", {}, "ALiBi"),
        ("mpt", {}, "ALiBi"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("bert", {}, "not causal"),
        ("bart", {}, "not causal"),
        ("llama4_text", {}, "by a token's index, not by its position"),
        ("doge", {}, "depends on all tokens"),
        ("gpt_neo", {}, "AttentionInterface"),
        ("mixtral", {"output_router_logits": True}, "auxiliary loss of its router"),
        ("llama", {"quantization_config": {"quant_method": "compressed-tensors"}}, "scale activations"),
    ],
)
def test_what_is_not_exact_is_padded_by_name(model_type: str, fields: dict, words: str) -> None:
    support = tree_support(AutoConfig.for_model(model_type, **fields))
    assert support.mode == "padded"
    assert support.reason.startswith(f"{model_type}: ")
    assert words in support.reason


def test_unknown_models_are_padded() -> None:
    support = tree_support(T5Config())
    assert (support.mode, "not a causal language model" in support.reason) == ("padded", True)


def test_what_equality_means_is_said() -> None:
    assert tree_support(AutoConfig.for_model("llama")).reason == ""
    dropout = tree_support(AutoConfig.for_model("llama", attention_dropout=0.1))
    assert dropout.mode == "tree"
    assert dropout.reason == (
        "attention_dropout 0.1: one draw serves all rows that share a token, equal to plain rows in expectation only"
    )
    untested = tree_support(AutoConfig.for_model("opt", dropout=0.0))
    assert untested.mode == "tree"
    assert untested.reason == "opt is not among the tested architectures: rely on the first step's comparison"
