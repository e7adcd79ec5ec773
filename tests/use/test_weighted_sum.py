"""`merge --adapter A --adapter B --weights 0.7,0.3`: the exact sum, or a refusal with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from espalier.cli import app
from espalier.errors import AdapterError, UsageError
from espalier.model.load import load_model
from espalier.use.export import export_gguf
from espalier.use.merge import merge
from espalier.use.merge_command import weighted
from whole_adapter import whole

IDS = torch.tensor([[0, 51, 28, 279, 287]])


def loaded(folder: Path) -> Any:
    return load_model(folder, device="cpu", dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def made(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """A random adapter, as PEFT saves it."""
    torch.manual_seed(seed)
    model = get_peft_model(loaded(base), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    model.save_pretrained(folder)
    return folder


def delta(folder: Path, layer: str, scaling: float) -> torch.Tensor:
    """scaling x B A of one layer, straight from the file; 0 where the adapter leaves it alone."""
    tensors = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.{layer}.lora_{{}}.weight"
    if key.format("A") not in tensors:
        return torch.zeros(())
    return scaling * tensors[key.format("B")] @ tensors[key.format("A")]


def test_sum_by_hand(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Other ranks, scalings and layers in each: 0.7 a + 0.3 b on every layer, and the logits of such a model."""
    a = made(tiny_llama_dir, tmp_path / "a", 1, r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    b = made(tiny_llama_dir, tmp_path / "b", 2, r=2, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "v_proj"])
    found = merge({a: 0.7, b: -0.3}, tmp_path / "m", str(tiny_llama_dir))
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama_dir, tmp_path / "m"))
    model = loaded(tiny_llama_dir)
    changed = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            by_hand = 0.7 * delta(a, name, 8 / 4) - 0.3 * delta(b, name, 4 / 2**0.5)
            torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + by_hand, rtol=0, atol=1e-6)
            module.weight.data += by_hand
            changed |= {name.rsplit(".")[-1]} if by_hand.any() else set()
    assert changed == {"q_proj", "v_proj", "down_proj"}
    assert (logits(loaded(tmp_path / "m")) - logits(model)).abs().max() < 1e-4
    assert found.notes[-1] == f"the sum of 0.7 x {a} and -0.3 x {b}"
    assert found.comparison.difference < 1e-4


def test_gguf_lora_of_a_sum_and_its_record(shared: Path, tmp_path: Path) -> None:
    import gguf

    a, b = whole(shared, tmp_path / "a"), whole(shared, tmp_path / "b")
    export_gguf({a: 0.5, b: 0.5}, tmp_path / "g", str(shared / "tiny-llama"), None)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "g" / "adapter.gguf").tensors}
    assert tensors["blk.0.attn_q.weight.lora_a"].data.shape == (8, 32)
    record = json.loads((tmp_path / "g" / "espalier.json").read_text())
    assert record["merged"]["adapter"] == "0.5 * a + 0.5 * b"
    assert record["stop_ids"] == [1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "model.layers.0.self_attn.q_proj has no weighted sum"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "whole tensors have no weighted sum"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "embed_tokens has no weighted sum"),
    ],
    ids=["dora", "whole", "tokens"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_has_no_sum(tiny_llama_dir: Path, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    a = made(tiny_llama_dir, tmp_path / "a", 1, target_modules=["q_proj"])
    b = made(tiny_llama_dir, tmp_path / "b", 2, **settings)
    with pytest.raises(AdapterError, match=said) as caught:
        merge({a: 1.0, b: 1.0}, tmp_path / "m", str(tiny_llama_dir))
    assert caught.value.where == str(b)
    assert not (tmp_path / "m").exists()


def test_other_base_and_other_template(shared: Path, tmp_path: Path) -> None:
    a, b = whole(shared, tmp_path / "a"), whole(shared, tmp_path / "b")
    record = json.loads((b / "espalier.json").read_text())
    record["fingerprints"]["template"] = "0" * 64
    (b / "espalier.json").write_text(json.dumps(record))
    with pytest.raises(AdapterError, match="the adapters were trained with other templates"):
        merge({a: 1.0, b: 1.0}, tmp_path / "m", str(shared / "tiny-llama"))
    record["base"]["fingerprint"]["weights"] = "0" * 64
    record["base"]["fingerprint"]["sample"] = [value + 1 for value in record["base"]["fingerprint"]["sample"]]
    (b / "espalier.json").write_text(json.dumps(record))
    with pytest.raises(AdapterError, match="trained on another base: same shape, other weights") as caught:
        merge({a: 1.0, b: 1.0}, tmp_path / "m", str(shared / "tiny-llama"))
    assert caught.value.where == str(b)


def test_options() -> None:
    assert weighted(["a"], None) == "a"
    assert weighted(["a", "b"], "0.7, .3") == {"a": 0.7, "b": 0.3}
    for adapters, weights, said in (
        (["a", "b"], None, "2 adapters, and no weights for their sum"),
        (["a", "b"], "1", "2 adapters, 1 weights"),
        (["a"], "one", "'one' is no list of numbers"),
        (["a"], "nan", "'nan' is no list of numbers"),
        (["a", "a"], "1,1", "an adapter is named twice"),
    ):
        with pytest.raises(UsageError, match=said):
            weighted(adapters, weights)


def test_command(shared: Path, tmp_path: Path) -> None:
    a, b = whole(shared, tmp_path / "a"), whole(shared, tmp_path / "b")
    argv = ["merge", "--adapter", str(a), "--adapter", str(b), "--weights", "0.7,0.3", "--output_dir"]
    result = CliRunner().invoke(app, [*argv, str(tmp_path / "m"), "--model_path", str(shared / "tiny-llama")])
    assert result.exit_code == 0, result.output
    assert f"the sum of 0.7 x {a} and 0.3 x {b}" in result.output
    merge(a, tmp_path / "one", str(shared / "tiny-llama"))
    one, both = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "m"))
    assert one.keys() == both.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(both[name], tensor, rtol=0, atol=1e-6)
