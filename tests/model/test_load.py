"""Finding and loading base models: what is found, and one clear message for each way it can go wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from espalier.errors import ModelError
from espalier.model import hardware
from espalier.model.load import (
    check_causal_lm,
    check_weights,
    choose_device,
    choose_dtype,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
    sane_generation_config,
)


@pytest.fixture
def copy_of_tiny(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "tiny"))


def test_folder_is_found_and_loads(tiny_llama_dir: Path) -> None:
    ref = resolve_model(str(tiny_llama_dir))
    assert (ref.kind, ref.path, ref.name) == ("folder", tiny_llama_dir, "tiny-llama")
    model = load_model(ref, device="cpu", dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert load_tokenizer(ref).eos_token_id == 1
    assert load_config(ref).vocab_size == 340


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nope", "--model_path: there is no model at './nope'"),
        ("/home/sam/models/base-v3", "--model_path: there is no model at '/home/sam/models/base-v3'"),
        ("~/nope/base", "--model_path: there is no model at '~/nope/base'"),
        ("C:\\models\\base", "--model_path: there is no model at 'C:\\\\models\\\\base'"),
        ("lost.gguf", "--model_path: there is no model at 'lost.gguf'"),
        ("", "--model_path: there is no model at ''"),
        ("smolm2-135m", "--model_path: there is no model 'smolm2-135m'\n  Did you mean 'smollm2-135m'?"),
        ("nobody/no-such", "--model_path: no model 'nobody/no-such' on this machine, and HF_HUB_OFFLINE is set"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(name)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", ["./nope", "/home/sam/x", "~/nope/base", "here/nope", "a/b/c", "lost.gguf", "C:\\x"])
def test_path_like_names_never_reach_the_hub(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("went to the network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ModelError):
        resolve_model(name)


def test_near_names_in_the_same_folder_are_shown(tmp_path: Path) -> None:
    (tmp_path / "llama-base").mkdir()
    with pytest.raises(ModelError, match="Near names there: llama-base"):
        resolve_model(str(tmp_path / "lama-base"))


def test_finding_imports_no_torch(tiny_llama_dir: Path) -> None:
    code = "import sys; from espalier.model.load import resolve_model; resolve_model(sys.argv[1]); "
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tiny_llama_dir)], check=True)


def test_adapter_in_place_of_a_model(adapter_good_dir: Path) -> None:
    with pytest.raises(ModelError, match="holds an adapter, not a base model"):
        resolve_model(adapter_good_dir)


def test_folder_with_only_gguf_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"Name the file itself: --model_path .*m\.gguf"):
        resolve_model(tmp_path)


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"<html>")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve_model(file)


def test_gguf_of_unknown_architecture(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "wombat")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ref = resolve_model(tmp_path / "odd.gguf")
    assert ref.kind == "gguf"
    with pytest.raises(ModelError, match=r"odd\.gguf.*wombat"):
        load_config(ref)


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "T5ForConditionalGeneration", "LlamaModel"])
def test_no_causal_language_model(copy_of_tiny: Path, architecture: str) -> None:
    kinds = {"BertForMaskedLM": "bert", "T5ForConditionalGeneration": "t5", "LlamaModel": "llama"}
    config = {"model_type": kinds[architecture], "architectures": [architecture]}
    (copy_of_tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"the model is {architecture}, which is no causal language model"):
        load_model(resolve_model(copy_of_tiny), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("architectures", "model_type", "auto_map"),
    [
        (["LlamaForCausalLM"], "llama", None),
        (["GPT2LMHeadModel"], "gpt2", None),
        (["Gemma3ForConditionalGeneration"], "gemma3", None),
        (["WombatModel"], "wombat", {"AutoModelForCausalLM": "code.Wombat"}),
        (None, "llama", None),
    ],
)
def test_causal_language_models(architectures: Any, model_type: str, auto_map: Any) -> None:
    check_causal_lm(SimpleNamespace(architectures=architectures, model_type=model_type, auto_map=auto_map))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_quantised_base_that_cannot_be_trained(method: str) -> None:
    config = SimpleNamespace(
        architectures=["LlamaForCausalLM"], model_type="llama", quantization_config={"quant_method": method}
    )
    with pytest.raises(ModelError, match=rf"quantised \({method}\) and cannot be trained"):
        check_causal_lm(config, said="base")


def test_config_that_is_no_json(copy_of_tiny: Path) -> None:
    (copy_of_tiny / "config.json").write_text("{")
    with pytest.raises(ModelError, match="its config cannot be read"):
        load_config(resolve_model(copy_of_tiny))


def test_missing_weights(copy_of_tiny: Path) -> None:
    (copy_of_tiny / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"weights are not whole\n  - no model\.safetensors"):
        check_weights(resolve_model(copy_of_tiny))


def test_cut_off_weights(copy_of_tiny: Path) -> None:
    file = copy_of_tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged or cut off \(5,000 bytes"):
        load_model(resolve_model(copy_of_tiny), device="cpu", dtype=torch.float32)


def test_git_lfs_pointer_in_place_of_weights(copy_of_tiny: Path) -> None:
    (copy_of_tiny / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="Git LFS pointer"):
        check_weights(resolve_model(copy_of_tiny))


def test_missing_shards_are_all_named(copy_of_tiny: Path) -> None:
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (copy_of_tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ModelError) as caught:
        check_weights(resolve_model(copy_of_tiny))
    assert caught.value.details == ("model-1.safetensors: missing", "model-2.safetensors: missing")


def test_missing_tensors_are_never_filled_with_random_numbers(copy_of_tiny: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy_of_tiny / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy_of_tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(resolve_model(copy_of_tiny), device="cpu", dtype=torch.float32)
    assert caught.value.what == "1 tensors that LlamaForCausalLM needs are not in the weights file"
    assert caught.value.details == ("model.layers.1.mlp.up_proj.weight",)


def test_model_with_its_own_code_needs_consent(copy_of_tiny: Path) -> None:
    config = json.loads((copy_of_tiny / "config.json").read_text())
    config |= {"model_type": "wombat", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (copy_of_tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="add --trust_remote_code"):
        load_config(resolve_model(copy_of_tiny))


def test_unsavable_generation_config_is_repaired(cases: Path, tmp_path: Path) -> None:
    config, notices = sane_generation_config(cases / "C04_unsavable_generation_config")
    assert notices == ["generation config: dropped temperature=0.9, top_p=0.6 (without effect: do_sample is false)"]
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["do_sample"] is False
    assert (saved["bos_token_id"], saved["eos_token_id"]) == (0, 1)
    assert not {"temperature", "top_p"} & set(saved)


def test_generation_config_beyond_repair_keeps_the_token_ids(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    assert model.generation_config is not None
    model.generation_config.num_return_sequences = 4
    config, notices = sane_generation_config(model)
    assert (config.bos_token_id, config.eos_token_id, config.num_return_sequences) == (0, 1, None)
    assert len(notices) == 1
    assert notices[0].startswith("generation config: kept only the token ids, the rest is invalid: ")
    config.save_pretrained(tmp_path)


def test_generation_config_that_cannot_be_read(copy_of_tiny: Path) -> None:
    (copy_of_tiny / "generation_config.json").write_text('{"max_new_tokens": -1}')
    config, notices = sane_generation_config(copy_of_tiny)
    assert config.eos_token_id == 1
    assert notices == [
        "generation config: taken from config.json, generation_config.json is invalid: "
        "`max_new_tokens` must be greater than 0, but is -1."
    ]


def test_sound_generation_config_is_left_alone(tiny_llama_dir: Path) -> None:
    model = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    config, notices = sane_generation_config(model)
    assert (notices, config.eos_token_id) == ([], 1)
    assert config is not model.generation_config


def test_use_cpu_is_obeyed() -> None:
    assert choose_device(use_cpu=True) == ("cpu", "asked for with --use_cpu")


@pytest.mark.parametrize(
    ("features", "requested", "dtype", "reason"),
    [
        (["_is_amx_tile_supported"], None, torch.bfloat16, "this CPU multiplies bf16 fast (AMX)"),
        (["_is_avx512_bf16_supported"], None, torch.bfloat16, "this CPU multiplies bf16 fast (AVX512_BF16)"),
        ([], None, torch.float32, "this CPU multiplies float32 best"),
        ([], "bf16", torch.float32, "--bf16 is not fast on this hardware: this CPU multiplies float32 best"),
        ([], "fp16", torch.float32, "--fp16 is not fast on this hardware: this CPU multiplies float32 best"),
        (
            ["_is_amx_tile_supported"],
            "fp16",
            torch.bfloat16,
            "--fp16 is not fast on this hardware: this CPU multiplies bf16 fast (AMX)",
        ),
        (["_is_amx_tile_supported"], "fp32", torch.float32, "asked for with --fp32"),
    ],
)
def test_precision_on_cpu(
    monkeypatch: pytest.MonkeyPatch, features: list[str], requested: str | None, dtype: torch.dtype, reason: str
) -> None:
    monkeypatch.setattr(hardware, "_cpu_has", lambda name: name in features)
    assert choose_dtype("cpu", requested) == (dtype, reason)


@pytest.mark.parametrize(
    ("capability", "requested", "dtype"),
    [
        ((8, 0), None, torch.bfloat16),
        ((9, 0), "fp16", torch.float16),
        ((7, 5), None, torch.float16),
        ((7, 5), "bf16", torch.float16),
        ((7, 5), "fp32", torch.float32),
    ],
)
def test_precision_on_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], requested: str | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("cuda", requested)[0] == dtype


def test_folder_without_a_tokenizer(shared: Path) -> None:
    with pytest.raises(ModelError) as error:
        load_tokenizer(shared / "tiny-phi3")
    assert str(error.value).startswith(f"{shared / 'tiny-phi3'}: the folder holds no tokenizer\n  Copy its")
