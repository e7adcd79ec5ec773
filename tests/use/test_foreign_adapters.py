"""Adapters that other tools have written go through chat, merge and verify, or are refused by one clear message.

Each folder is made by PEFT itself and then dressed as the tool leaves it: TRL 1.16 as it was seen to write on this
base; LLaMA-Factory, Axolotl and Unsloth as folders on the hub show them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from espalier.cli import app
from espalier.errors import AdapterError
from espalier.model.load import load_model, load_tokenizer
from espalier.model.load_adapter import load_adapter
from espalier.use import chat
from espalier.use.adapter_base import find_base
from espalier.use.merge import merge

IDS = torch.tensor([[0, 51, 28, 279, 287]])
# Unsloth gives target_modules as one pattern where it chooses layers by kind.
PATTERN = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|v_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|v_proj)))"
)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def loaded(base: Path) -> Any:
    return load_model(base, device="cpu", dtype=torch.float32)


def peft_folder(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> torch.Tensor:
    """An adapter with an effect, saved by PEFT alone; the logits that it has to give."""
    torch.manual_seed(5)
    wanted = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    model = get_peft_model(loaded(base), LoraConfig(**wanted))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            tensor.copy_(tensor.to(dtype)) if tensor.requires_grad else None
    expected = logits(model)
    model.save_pretrained(folder)
    if dtype != torch.float32:
        file = folder / "adapter_model.safetensors"
        save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    return expected


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({name: value for name, value in fields.items() if value != "gone"}))


def as_trl(base: Path, folder: Path) -> None:
    """Template and tokenizer beside it, the base by its path, training_args.bin."""
    load_tokenizer(base).save_pretrained(folder)
    change(folder, base_model_name_or_path=str(base), target_modules=_full_names(folder))
    (folder / "training_args.bin").write_bytes(b"a pickle that nobody reads")


def as_llama_factory(base: Path, folder: Path) -> None:
    """The template as the tool rewrote it, logs of the trainer, the base by a path of another machine."""
    tokenizer = load_tokenizer(base)
    text = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    tokenizer.chat_template = text + "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer.save_pretrained(folder)
    change(folder, base_model_name_or_path="/home/sam/LLaMA-Factory/models/tiny")
    for name in ("all_results.json", "train_results.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    (folder / "trainer_log.jsonl").write_text('{"current_steps": 1}\n')
    (folder / "checkpoint-2").mkdir()


def as_axolotl(base: Path, folder: Path) -> None:
    """The base's config.json with the quantisation of a QLoRA run, the weights twice, its YAML in the README."""
    load_tokenizer(base).save_pretrained(folder)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "README.md").write_text("---\nlibrary_name: peft\ntags:\n- axolotl\n---\n```yaml\nbase_model: x\n```\n")
    change(folder, base_model_name_or_path="NousResearch/tiny-of-the-hub", peft_type="LORA", exclude_modules=None)


def as_unsloth(base: Path, folder: Path) -> None:
    """A 4-bit copy on the hub as the base, modules by a pattern, a mapping of its own, no tokenizer."""
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    change(
        folder,
        base_model_name_or_path="unsloth/tiny-llama-unsloth-bnb-4bit",
        target_modules=PATTERN,
        task_type=None,
        auto_mapping={**mapping, "unsloth_fixed": True},
    )


def as_old_peft(base: Path, folder: Path) -> None:
    """PEFT 0.4: a .bin file, few settings."""
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    names = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "fan_in_fan_out")
    fields = json.loads((folder / "adapter_config.json").read_text())
    kept = {name: fields[name] for name in names}
    (folder / "adapter_config.json").write_text(json.dumps(kept | {"base_model_name_or_path": None}))


def _full_names(folder: Path) -> list[str]:
    keys = load_file(folder / "adapter_model.safetensors")
    return sorted({key.removeprefix("base_model.model.").split(".lora_")[0] for key in keys})


Dress = Callable[[Path, Path], None]
TOOLS: list[Dress] = [as_trl, as_llama_factory, as_axolotl, as_unsloth, as_old_peft]


@pytest.mark.parametrize("dress", TOOLS, ids=lambda dress: dress.__name__[3:])
def test_every_command_takes_it(tiny_llama_dir: Path, tmp_path: Path, dress: Dress) -> None:
    folder = tmp_path / "foreign"
    expected = peft_folder(tiny_llama_dir, folder)
    dress(tiny_llama_dir, folder)
    given = None if dress is as_trl else str(tiny_llama_dir)
    said = chat._load(folder, given, None, 4, chat.Sampling(), False, True)
    assert (logits(said.model.float()) - expected).abs().max() < 0.1  # loaded in this machine's 16 bits
    assert torch.equal(logits(load_adapter(loaded(tiny_llama_dir), folder)), expected)
    assert said.answers([[{"role": "user", "content": "a pear"}]])[0].ids
    assert said.template.source == "tokenizer's own"
    ours = "<assistant>" if dress is as_llama_factory else said.tokenizer.chat_template
    assert ours in said.tokenizer.chat_template
    merged = merge(folder, tmp_path / "m", given)
    assert (logits(loaded(tmp_path / "m")) - expected).abs().max() < 1e-4
    why = "named in adapter_config.json, by another tool" if given is None else "--model_path"
    assert merged.notes[0] == f"base: folder {tiny_llama_dir} ({why})"
    argv = ["verify", str(folder), "--use_cpu", "--json", *(["--model_path", given] if given else [])]
    result = CliRunner().invoke(app, argv)
    found = json.loads(result.stdout)
    assert {"level": "ok", "text": merged.notes[0]} in found
    assert any("no fingerprint of its base: made by another tool" in entry["text"] for entry in found)
    assert any("4 of 4 greedy answers differ from the base's" in entry["text"] for entry in found)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head", "norm"]},
        {"trainable_token_indices": [3, 5]},
        {"dtype": torch.bfloat16},
        {"bias": "lora_only"},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": ["v_proj"]},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian"},
    ],
    ids=[
        "patterns",
        "dora",
        "rslora",
        "whole",
        "tokens",
        "bf16",
        "bias",
        "layers",
        "exclude",
        "orthogonal",
        "gaussian",
    ],
)
def test_every_kind_of_settings_loads_and_merges(
    tiny_llama_dir: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    expected = peft_folder(tiny_llama_dir, tmp_path / "a", **settings)
    assert (expected - logits(loaded(tiny_llama_dir))).abs().max() > 0.01
    assert torch.equal(logits(load_adapter(loaded(tiny_llama_dir), tmp_path / "a")), expected)
    merge(tmp_path / "a", tmp_path / "m", str(tiny_llama_dir))
    assert (logits(loaded(tmp_path / "m")) - expected).abs().max() < 1e-4


def test_settings_of_a_newer_peft_are_named(tiny_llama_dir: Path, tmp_path: Path) -> None:
    expected = peft_folder(tiny_llama_dir, tmp_path / "a")
    change(tmp_path / "a", use_quickening=True, steps_of_it=3, other_new=None, runtime_config={}, peft_version="0.99.0")
    said: list[str] = []
    assert torch.equal(logits(load_adapter(loaded(tiny_llama_dir), tmp_path / "a", notice=said.append)), expected)
    assert said[0].endswith(
        "settings that this PEFT does not know have no effect here: steps_of_it=3, use_quickening=True, "
        "it was saved by 0.99.0"
    )


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_start_that_takes_from_the_base(tiny_llama_dir: Path, tmp_path: Path, start: str) -> None:
    """PEFT takes the same part out of the base when it loads; where only the adapter is read, that part is unknown."""
    expected = peft_folder(tiny_llama_dir, tmp_path / "a", init_lora_weights=start)
    assert torch.equal(logits(load_adapter(loaded(tiny_llama_dir), tmp_path / "a")), expected)
    with pytest.raises(AdapterError, match=f"it was started by {start}, which takes a part out of the base's weights"):
        merge(tmp_path / "a", tmp_path / "m", str(tiny_llama_dir))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_start_that_cannot_be_computed_again(tiny_llama_dir: Path, tmp_path: Path, start: str) -> None:
    peft_folder(tiny_llama_dir, tmp_path / "a")
    change(tmp_path / "a", init_lora_weights=start)
    with pytest.raises(AdapterError, match=f"it was started by {start}"):
        load_adapter(loaded(tiny_llama_dir), tmp_path / "a")


def test_loftq_that_was_finished_is_a_plain_adapter(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """LoftQ's scripts save the changed base apart and leave their settings in the adapter."""
    expected = peft_folder(tiny_llama_dir, tmp_path / "a")
    change(tmp_path / "a", loftq_config={"loftq_bits": 4, "loftq_iter": 1}, init_lora_weights=True)
    assert torch.equal(logits(load_adapter(loaded(tiny_llama_dir), tmp_path / "a")), expected)


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("/home/sam/old-laptop/models/base-v3", None),
        ("C:\\models\\base-v3", None),
        ("../models/llama3_1B", None),
        ("NousResearch/tiny-of-the-hub", None),
        ("unsloth/tiny-llama-unsloth-bnb-4bit", "16-bit original, probably unsloth/tiny-llama, does as well"),
        ("unsloth/tiny-llama-bnb-4bit", "16-bit original, probably unsloth/tiny-llama, does as well"),
    ],
)
def test_base_that_is_not_here(adapter_good_dir: Path, tmp_path: Path, name: str, detail: str | None) -> None:
    folder = Path(shutil.copytree(adapter_good_dir, tmp_path / "a"))
    change(folder, base_model_name_or_path=name)
    with pytest.raises(AdapterError) as caught:
        find_base(folder, None)
    assert caught.value.what == f"the adapter's base {name!r} is not found here"
    assert caught.value.todo == "Give the base with --model_path: a folder, a .gguf file or a hub name."
    assert len(caught.value.details) == 1 + (detail is not None)
    assert detail is None or caught.value.details[1].endswith(detail)


def test_tokenizer_without_a_template_takes_the_bases(
    tiny_llama_dir: Path, adapter_good_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter_good_dir, tmp_path / "a"))
    tokenizer = load_tokenizer(tiny_llama_dir)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(folder)
    said = chat._load(folder, str(tiny_llama_dir), None, 4, chat.Sampling(), False, True)
    assert said.tokenizer.chat_template == template


def test_template_inside_tokenizer_config(tiny_llama_dir: Path, adapter_good_dir: Path, tmp_path: Path) -> None:
    """As transformers before 4.50 saved it."""
    folder = Path(shutil.copytree(adapter_good_dir, tmp_path / "a"))
    load_tokenizer(tiny_llama_dir).save_pretrained(folder)
    text = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (folder / "chat_template.jinja").unlink()
    fields = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": text}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    said = chat._load(folder, str(tiny_llama_dir), None, 4, chat.Sampling(), False, True)
    assert said.tokenizer.chat_template == text
