"""GGUF: transformers' own reader, which shares no code with the writer, computes what base + adapter computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import pre_tokenizers
from typer.testing import CliRunner

from espalier.cli import app
from espalier.errors import AdapterError, ModelError, UsageError
from espalier.model.load import load_model, load_tokenizer
from espalier.model.load_adapter import load_adapter
from espalier.use.export import export_gguf
from espalier.use.gguf import _context_length, family_of
from espalier.use.gguf_vocab import LLAMA3_SPLIT, _check_sentencepiece, _space_prefix, add_vocabulary, split_name
from espalier.use.merge_command import run_merge

IDS = torch.tensor([[0, 51, 28, 279, 287]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loaded(path: Path) -> Any:
    return load_model(path, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(("quantize", "difference"), [("f32", 1e-4), ("f16", 0.05), ("q8_0", 0.5)])
def test_whole_model(
    tiny_llama_dir: Path, adapter_good_dir: Path, tmp_path: Path, quantize: str, difference: float
) -> None:
    lines = export_gguf(adapter_good_dir, tmp_path / "g", str(tiny_llama_dir), quantize)
    file = tmp_path / "g" / f"model-{quantize}.gguf"
    assert lines[0].startswith(f"merged into {file} ({quantize}, ")
    expected = logits(load_adapter(loaded(tiny_llama_dir), adapter_good_dir))
    assert (logits(loaded(file)) - expected).abs().max() < difference
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert "{%" in fields["tokenizer.chat_template"].contents()


def test_adapter_alone(tiny_llama_dir: Path, adapter_good_dir: Path, tmp_path: Path) -> None:
    export_gguf(adapter_good_dir, tmp_path / "g", str(tiny_llama_dir), None)
    reader = gguf.GGUFReader(tmp_path / "g" / "adapter.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert sorted(tensors)[:2] == ["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"]
    assert tensors["blk.0.attn_q.weight.lora_a"].data.shape == (4, 32)
    assert len(tensors) == 8


def test_adapter_with_whole_tables_is_sent_to_merge(cases: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    adapter = cases / "D07_server_rejects" / "modules_to_save"
    with pytest.raises(AdapterError, match="cannot hold what the adapter does to lm_head") as caught:
        export_gguf(adapter, tmp_path / "g", str(tiny_llama_dir), None)
    assert caught.value.todo == "Merge first: --format gguf."
    assert list(tmp_path.iterdir()) == []


def test_unknown_architecture_is_refused_by_name(shared: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "a"
    base = shared / "tiny-phi3"
    model = get_peft_model(loaded(base), LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"]))
    model.save_pretrained(adapter)
    for file in (shared / "tok-bos").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="no GGUF can be written for models of type 'phi3'"):
        export_gguf(adapter, tmp_path / "g", str(base))


def test_tokenizer_with_more_ids_than_rows(tiny_llama_dir: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer has 340 ids, model has 300 rows"):
        add_vocabulary(gguf.GGUFWriter(None, "llama"), load_tokenizer(tiny_llama_dir), rows=300)


def test_names_of_splits() -> None:
    byte_level = {"type": "ByteLevel", "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    llama3 = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}}
    assert split_name(byte_level) == "gpt-2"
    assert split_name({"type": "Sequence", "pretokenizers": [digits, byte_level]}) == "smollm"
    assert split_name({"type": "Sequence", "pretokenizers": [llama3, byte_level]}) == "llama-bpe"
    with pytest.raises(ModelError, match=r"no name for this tokenizer's split \(Digits\)"):
        split_name(digits)


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--dtype float32 has no effect on --format gguf"):
        run_merge(["a"], None, "o", None, "float32", "gguf", None, False, False)
    with pytest.raises(UsageError, match="--quantize q8_0 has no effect on --format folder"):
        run_merge(["a"], None, "o", None, None, "folder", "q8_0", False, False)


def test_command(tiny_llama_dir: Path, adapter_good_dir: Path, tmp_path: Path) -> None:
    argv = ["merge", "--adapter", str(adapter_good_dir), "--model_path", str(tiny_llama_dir)]
    result = CliRunner().invoke(app, [*argv, "--output_dir", str(tmp_path / "g"), "--format", "gguf-lora"])
    assert result.exit_code == 0, result.output
    assert "(8 tensors, float32), every one read back and equal" in result.output


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Gemma2", "Mistral"])
def test_other_families(shared: Path, tmp_path: Path, family: str) -> None:
    """Random models of two layers, with biases, q and k norms or norms that hold 1 less, as the family has them."""
    base, adapter = tmp_path / "base", tmp_path / "a"
    torch.manual_seed(5)
    settings = {"vocab_size": 344, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    # transformers' reader takes 128 for every Qwen 3, and hidden / heads for Qwen 2.
    settings |= {} if family == "Qwen2" else {"head_dim": 128 if family == "Qwen3" else 8}
    settings |= {"head_dim": 256} if family == "Gemma2" else {}  # the reader takes 256 for query_pre_attn_scalar
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / file).write_bytes((shared / "tiny-llama" / file).read_bytes())
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    adapted.save_pretrained(adapter)
    export_gguf(adapter, tmp_path / "g", str(base), "f32")
    expected = logits(load_adapter(loaded(base), adapter))
    assert (expected - logits(loaded(base))).abs().max() > 0.01
    assert (logits(loaded(tmp_path / "g" / "model-f32.gguf")) - expected).abs().max() < 1e-3


def gemma3(**settings: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 4, "head_dim": 8}
    return transformers.Gemma3TextConfig(**{"vocab_size": 344, "query_pre_attn_scalar": 8, **sizes, **settings})


def test_gemma_that_llama_cpp_would_compute_otherwise() -> None:
    assert family_of(gemma3()).arch == "gemma3"
    with pytest.raises(
        ModelError, match="scales this model's attention by 8, its config says query_pre_attn_scalar 16"
    ):
        family_of(gemma3(query_pre_attn_scalar=16))
    with pytest.raises(ModelError, match="lets every layer 6 see all"):
        family_of(gemma3(layer_types=["full_attention"] * 12))


def sentencepiece(**parts: Any) -> dict[str, Any]:
    model = {"vocab": {text: i for i, text in enumerate(("a", "b", "c", "ab", "bc", "abc"))}}
    model["merges"] = [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]]
    return {"normalizer": {"type": "Prepend", "prepend": "\u2581"}, "added_tokens": [], "model": model} | parts


def test_sentencepiece_that_llama_cpp_would_read_otherwise() -> None:
    _check_sentencepiece(sentencepiece())
    with pytest.raises(ModelError, match="does not do what this tokenizer does to a text first: NFKC"):
        _check_sentencepiece(sentencepiece(normalizer={"type": "NFKC"}))
    form = sentencepiece()
    form["model"]["merges"].pop()
    with pytest.raises(ModelError, match="would join tokens otherwise than this tokenizer does, in 1 cases") as caught:
        _check_sentencepiece(form)
    assert caught.value.details == ("'a' + 'bc'",)
    form["model"]["merges"].insert(0, ["a", "bc"])
    with pytest.raises(ModelError, match="in 1 cases") as caught:
        _check_sentencepiece(form)
    assert caught.value.details == ("'abc', whose pairs have ranks of their own",)


def test_context_ends_at_a_window_that_llama_cpp_does_not_know() -> None:
    family = family_of(transformers.MistralConfig())
    assert (
        _context_length(transformers.MistralConfig(max_position_embeddings=32768, sliding_window=4096), family) == 4096
    )
    assert (
        _context_length(transformers.MistralConfig(max_position_embeddings=32768, sliding_window=None), family) == 32768
    )
    assert _context_length(gemma3(max_position_embeddings=32768), family_of(gemma3())) == 32768


@pytest.mark.parametrize(
    ("scheme", "template", "prefix"),
    [
        ("always", "Q: {{ messages[0]['content'] }}", True),
        ("never", "Q: {{ messages[0]['content'] }}", False),
        ("first", "{{ bos_token }}Q: {{ messages[0]['content'] }}", False),
        ("first", "Q: {{ messages[0]['content'] }}", None),
    ],
)
def test_blank_in_front(shared: Path, scheme: Any, template: str, prefix: bool | None) -> None:
    """One before every text, before none, or before the first only: then no prompt may begin with a text."""
    tokenizer = load_tokenizer(shared / "tok-meta")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.chat_template = template
    if prefix is None:
        with pytest.raises(ModelError, match="puts a blank before the first text only"):
            _space_prefix(tokenizer)
    else:
        assert _space_prefix(tokenizer) is prefix
