"""Merging: equal to PEFT's own merge, bounded by one file, and nothing appears that was not read back and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from espalier.cli import app
from espalier.errors import AdapterError, ModelError, RunFolderError, UsageError
from espalier.model.fingerprint import base_fingerprint
from espalier.model.load import load_model
from espalier.use.merge import merge

IDS = torch.tensor([[0, 51, 28, 279, 287]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def loaded(folder: Path) -> Any:
    return load_model(folder, device="cpu", dtype=torch.float32)


def make_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """A random adapter with an effect, saved by PEFT alone."""
    torch.manual_seed(3)
    model = get_peft_model(loaded(base), LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.normal_(std=0.2) if "magnitude" not in name else tensor.mul_(1.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_alpha": 16},
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ],
    ids=["lora", "rslora", "dora", "patterns", "embedding", "tokens"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merged_equals_peft(tiny_llama_dir: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = make_adapter(tiny_llama_dir, tmp_path / "a", **settings)
    theirs = PeftModel.from_pretrained(loaded(tiny_llama_dir), str(adapter)).merge_and_unload()
    found = merge(adapter, tmp_path / "m", str(tiny_llama_dir))
    ours = logits(loaded(tmp_path / "m"))
    assert (ours - logits(theirs)).abs().max() < 1e-5
    assert (ours - logits(loaded(tiny_llama_dir))).abs().max() > 0.01
    assert found.comparison.same_token == 1.0
    assert found.comparison.difference < 1e-4


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapter_on_a_tied_head_unties_it(shared: Path, tmp_path: Path) -> None:
    base = shared / "tiny-llama-tied"
    adapter = make_adapter(base, tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    expected = logits(PeftModel.from_pretrained(loaded(base), str(adapter)))
    merge(adapter, tmp_path / "m", str(base))
    assert (logits(loaded(tmp_path / "m")) - expected).abs().max() < 1e-4
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False


def test_tied_head_that_nobody_touched_stays_tied(shared: Path, tmp_path: Path) -> None:
    base = shared / "tiny-llama-tied"
    merge(make_adapter(base, tmp_path / "a", target_modules=["q_proj"]), tmp_path / "m", str(base))
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is True


def test_shards_stay_shards(tiny_llama_dir: Path, adapter_good_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    loaded(tiny_llama_dir).save_pretrained(base, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(base)
    files = sorted(file.name for file in base.glob("*.safetensors"))
    assert len(files) > 2
    merge(adapter_good_dir, tmp_path / "m", str(base))
    assert sorted(file.name for file in (tmp_path / "m").glob("*.safetensors")) == files
    merge(adapter_good_dir, tmp_path / "one", str(tiny_llama_dir))
    assert torch.equal(logits(loaded(tmp_path / "m")), logits(loaded(tmp_path / "one")))


def test_transformers_alone_reads_the_folder(tiny_llama_dir: Path, adapter_good_dir: Path, tmp_path: Path) -> None:
    merge(adapter_good_dir, tmp_path / "m", str(tiny_llama_dir), "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [1]
    text = AutoTokenizer.from_pretrained(tmp_path / "m").apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == AutoTokenizer.from_pretrained(tiny_llama_dir).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )


def test_wrong_base_is_refused_before_anything_is_written(shared: Path, adapter_good_dir: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(adapter_good_dir, tmp_path / "a"))
    record = {"base": {"name": "tiny-llama", "fingerprint": base_fingerprint(loaded(shared / "tiny-llama"))}}
    (adapter / "espalier.json").write_text(json.dumps(record))
    merge(adapter, tmp_path / "good", str(shared / "tiny-llama"))
    with pytest.raises(AdapterError, match="trained on another base: same shape, other weights"):
        merge(adapter, tmp_path / "m", str(shared / "tiny-llama-other"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "good"]


def test_quantised_base_is_refused(tiny_llama_dir: Path, adapter_good_dir: Path, tmp_path: Path) -> None:
    """Case D10."""
    base = Path(shutil.copytree(tiny_llama_dir, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    base.chmod(0o755)
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(ModelError, match="the base's weights are quantised") as caught:
        merge(adapter_good_dir, tmp_path / "m", str(base))
    assert caught.value.todo == (
        "Give the 16-bit original with --model_path, or merge into these weights unpacked, by --dequantize."
    )
    for kind in ("gptq", "awq"):
        quantization = {"quant_method": kind, "bits": 4}
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        with pytest.raises(ModelError, match=f"weights of kind {kind} cannot be de-quantised here"):
            merge(adapter_good_dir, tmp_path / "m", str(base), dequantize=True)
    with pytest.raises(UsageError, match="is not quantised"):
        merge(adapter_good_dir, tmp_path / "m", str(tiny_llama_dir), dequantize=True)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_d10_dequantised_base(shared: Path, tmp_path: Path, bits: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Case D10: merged into the 16-bit original, or into the unpacked weights if asked; each says its losses."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    original = LlamaForCausalLM(LlamaConfig(vocab_size=340, initializer_range=0.2, **sizes)).to(torch.bfloat16)
    original.save_pretrained(tmp_path / "original")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}
    )
    packed.save_pretrained(tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        for folder in ("original", "packed"):
            shutil.copyfile(shared / "tiny-llama" / name, tmp_path / folder / name)
    adapter = make_adapter(tmp_path / "original", tmp_path / "a", target_modules=["q_proj", "down_proj"])
    merge(adapter, tmp_path / "m16", str(tmp_path / "original"), "float32")
    found = merge(adapter, tmp_path / "m", str(tmp_path / "packed"), "float32", dequantize=True)
    lines = found.lines()
    assert lines[2].startswith(f"the base's {bits}-bit weights were de-quantised to bfloat16")
    before, after = found.comparison.losses[1:]
    assert lines[-1].endswith(f"base + adapter {before:.4f}, merged {after:.4f}")
    assert before == pytest.approx(after, abs=1e-5)
    into_original, unpacked = (load_file(tmp_path / name / "model.safetensors") for name in ("m16", "m"))
    name = "model.layers.0.self_attn.q_proj.weight"
    base = packed.dequantize(torch.bfloat16).state_dict()[name].float()
    delta = into_original[name] - original.state_dict()[name].float()
    assert (unpacked[name] - base - delta).abs().max() < 1e-5
    assert (base - original.state_dict()[name].float()).abs().max() > 1e-3
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    theirs = logits(PeftModel.from_pretrained(packed.float(), str(adapter)))
    assert (logits(loaded(tmp_path / "m")) - theirs).abs().max() < 1e-3


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("int8", 8)])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_d10_adapter_of_a_base_that_was_held_packed(shared: Path, tmp_path: Path, kind: Any, bits: int) -> None:
    """Trained with --load_in_4bit or 8bit: into the 16-bit weights, said so; with --dequantize into those held."""
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    original = LlamaForCausalLM(LlamaConfig(vocab_size=340, initializer_range=0.2, **sizes)).to(torch.bfloat16)
    base = tmp_path / "base"
    original.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(shared / "tiny-llama" / name, base / name)
    adapter = make_adapter(base, tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(UsageError, match="is not quantised, nor was it held so in training"):
        merge(adapter, tmp_path / "m", str(base), dequantize=True)
    packed = load_model(base, device="cpu", dtype=torch.bfloat16, quantization=kind)
    record = {"base": {"name": "base", "fingerprint": base_fingerprint(packed), "held_as": kind}}
    (adapter / "espalier.json").write_text(json.dumps(record))
    plain = merge(adapter, tmp_path / "m16", str(base), "float32")
    assert any(
        note.startswith(f"trained on the base held as {kind}, merged into its own weights") for note in plain.notes
    )
    found = merge(adapter, tmp_path / "m", str(base), "float32", dequantize=True)
    assert any(note.startswith(f"the base's {bits}-bit weights were de-quantised to bfloat16") for note in found.notes)
    name = "model.layers.0.mlp.down_proj.weight"  # no adapter on it
    kept, unpacked = (load_file(tmp_path / folder / "model.safetensors")[name] for folder in ("m16", "m"))
    assert torch.equal(kept, original.state_dict()[name].float())
    assert torch.equal(unpacked, packed.dequantize(torch.bfloat16).state_dict()[name].float())
    assert not torch.equal(kept, unpacked)


def test_taken_folder_is_refused(tiny_llama_dir: Path, adapter_good_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="this folder is not empty"):
        merge(adapter_good_dir, tmp_path, str(tiny_llama_dir))


def test_command(shared: Path, adapter_good_dir: Path, tmp_path: Path) -> None:
    base, output = str(shared / "tiny-llama"), str(tmp_path / "m")
    argv = ["merge", "--adapter", str(adapter_good_dir), "--output_dir", output, "--model_path", base]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    assert f"merged into {output} (float32); 4 tensors changed" in result.output
    assert "the likeliest token is the same at 100.0 %" in result.output
