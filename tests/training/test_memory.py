"""Memory of a run: the prediction against what autograd keeps, and steps that ran out of memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import log_of, run, write_rows
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from espalier.encode.encode import Encoded
from espalier.errors import TrainingError, UsageError
from espalier.model.fast_lora import fast_lora
from espalier.model.hardware import device_memory, parse_bytes
from espalier.model.lora import add_adapter, lora_config
from espalier.model.memory import MemoryModel
from espalier.training.memory_guard import recompute_layers
from espalier.training.trainer import LoraTrainer
from espalier.tree.collate import to_tensors
from espalier.tree.loss import tree_loss
from espalier.tree.plan import Pack, plan_step

LAYERS = 3
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "gpt2": GPT2Config(n_embd=64, n_layer=LAYERS, n_head=4, vocab_size=300, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, head_dim=16, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2),
}


def rank8() -> Any:
    return lora_config(rank=8, alpha=16)  # PEFT writes the names it found into the object that it is given


def one_pack() -> Pack:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(6):
        ids = np.concatenate([np.arange(60), rng.integers(100, 300, 20)]).astype(np.int32)
        rows.append(Encoded(ids, np.where(np.arange(80) < 60, -100, ids).astype(np.int32)))
    (pack,) = plan_step(rows, max_tokens=4096, min_shared_tokens=8).packs
    assert pack.num_tokens == 60 + 6 * 19
    return pack


def real_model(config: Any, dtype: torch.dtype) -> Any:
    model = add_adapter(AutoModelForCausalLM.from_config(config).to(dtype), rank8())
    fast_lora(model)
    return model.train()


def kept_for_backward(model: Any, pack: Pack, attention: str) -> int:
    """Bytes of all storages that autograd keeps after the forward, but the weights' own."""
    kept: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        output = tree_loss(model, to_tensors(pack), attention=attention)
    assert output.loss_sum.requires_grad
    return sum(kept.values())


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # PEFT, of its own patterns for experts
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("attention", ["merged", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_prediction_covers_what_autograd_keeps(name: str, dtype: torch.dtype, attention: str) -> None:
    pack = one_pack()
    predicted = MemoryModel(CONFIGS[name], rank8(), dtype=dtype, attention=attention).part(pack)
    real = kept_for_backward(real_model(CONFIGS[name], dtype), pack, attention)
    assert predicted.kept > 0
    # `real` holds what the head's loss keeps too. Alive between two layers is a little more than what is saved.
    assert real <= predicted.kept + predicted.outside + predicted.logits
    assert 0.98 * real <= predicted.kept + predicted.outside <= 1.15 * real


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # PEFT, of its own patterns for experts
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_fixed_bytes_are_the_models_own(name: str) -> None:
    model = real_model(CONFIGS[name], torch.bfloat16)
    fixed = MemoryModel(CONFIGS[name], rank8(), dtype=torch.bfloat16, attention="merged").fixed
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert fixed.adapter == 8 * trained
    assert fixed.optimizer == 8 * trained
    assert fixed.base == pytest.approx(2 * frozen + buffers, abs=2 * buffers)


@pytest.mark.parametrize("count", [1, LAYERS])
def test_recomputed_layers_matches_plain(count: int) -> None:
    torch.manual_seed(0)
    model, pack = real_model(CONFIGS["llama"], torch.float32), one_pack()
    grads = []
    kept = []
    for again in (0, count):
        recompute_layers(model, again)
        model.zero_grad()
        kept.append(kept_for_backward(model, pack, "merged"))
        tree_loss(model, to_tensors(pack), attention="merged").loss_sum.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == 2 * 7 * LAYERS
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    memory = MemoryModel(CONFIGS["llama"], rank8(), dtype=torch.float32, attention="merged")
    assert kept[1] < kept[0]
    assert memory.part(pack, count).kept < memory.part(pack, 0).kept


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in log_of(folder) if "loss" in entry]


@pytest.mark.parametrize("fail_at", [(0,), (1, 2), (0, 1, 2)])
def test_a_failed_allocation_changes_no_loss(
    fail_at: tuple[int, ...], tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    options: dict[str, Any] = {"max_steps": 3, "save_strategy": "no"}
    run(tiny_llama_dir, rows, tmp_path / "plain", **options)
    stock, calls = LoraTrainer.part_loss, []

    def failing(self: LoraTrainer, model: Any, part: Any) -> Any:
        calls.append(part)
        output = stock(self, model, part)
        if len(calls) - 1 in fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return output

    monkeypatch.setattr(LoraTrainer, "part_loss", failing)
    _, said = run(tiny_llama_dir, rows, tmp_path / "failing", **options)
    assert said.count("an allocation failed") == len(fail_at)
    assert "the gradient is the same" in said
    assert losses(tmp_path / "failing") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    assert len(losses(tmp_path / "plain")) == 3


def test_a_step_that_fits_no_plan_stops_with_its_numbers(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: LoraTrainer, model: Any, part: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")

    monkeypatch.setattr(LoraTrainer, "part_loss", failing)
    rows = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(TrainingError, match="the longest row alone in a pack and all 2 layers computed again"):
        run(tiny_llama_dir, rows, tmp_path / "out", max_steps=1, save_strategy="no")


def test_other_errors_are_no_lack_of_memory(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: LoraTrainer, model: Any, part: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(LoraTrainer, "part_loss", failing)
    rows = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(tiny_llama_dir, rows, tmp_path / "out", max_steps=1, save_strategy="no")


def test_a_limit_is_met_by_a_smaller_plan_with_the_same_losses(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    options: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    _, said = run(tiny_llama_dir, rows, tmp_path / "plain", **options)
    assert "it fits, so nothing is computed again" in said
    made = LoraTrainer.training_step
    limits: list[int] = []

    def tight(self: LoraTrainer, model: Any, batch: Any, count: Any = None) -> Any:
        if not limits:  # one byte less than the first step's plan would take
            limits.append(self.guard.predicted(batch.packs, 0) - 1)
        self.guard.limit = limits[0]
        self.guard.device = "cpu-without-rlimit"  # the limit is far below what this process has
        return made(self, model, batch, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraTrainer, "training_step", tight)
        patch.setattr("espalier.training.memory_guard.MemoryGuard.account", lambda self: "")
        _, said = run(tiny_llama_dir, rows, tmp_path / "limited", **options)
    assert "planned again with" in said
    assert losses(tmp_path / "limited") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    state = json.loads((tmp_path / "limited" / "checkpoint-2" / "progress.json").read_text())
    assert state["memory"]["tokens"] < 4096 or state["memory"]["recompute"] > 0
    plain = json.loads((tmp_path / "plain" / "checkpoint-2" / "progress.json").read_text())
    assert plain["memory"] is None


def test_sizes_and_cards() -> None:
    assert parse_bytes("8GB", where="x") == 8_000_000_000
    assert parse_bytes("1.5 GiB", where="x") == 3 << 29
    for text in ("", "8", "0GB", "many GB", "-1GB"):
        with pytest.raises(UsageError, match="no amount of memory"):
            parse_bytes(text, where="--memory_limit")
    assert device_memory("a10")[0] == "A10"
    assert device_memory("A10 24GB") == device_memory("A10")
    assert device_memory("mine 12GB")[1] == int(12 * 2**30 * 0.94)
    with pytest.raises(UsageError, match="not among the cards"):
        device_memory("banana")


def test_plan_without_weights(tmp_path: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from espalier.runfile import build_config
    from espalier.training.plan_command import run_plan

    rows = write_rows(tmp_path / "rows.jsonl")
    for weights in tiny_llama_dir.glob("*.safetensors"):
        assert weights.is_file()
    config = build_config({"dataset_path": [str(rows)], "model_path": str(tiny_llama_dir), "fp32": True})
    assert run_plan(config, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    parts = found["bytes"]
    assert parts["peak"] == (
        parts["process"] + parts["base"] + parts["adapter"] + parts["optimizer"] + parts["activations"]
        + max(parts["logits"], parts["layer_backward"])
    )  # fmt: skip
    assert found["fits"]
    assert found["changes"] == []
    assert found["not_predicted"] == ["evaluation, samples and saving, which take less than a step as a rule"]
    config = dataclasses.replace(config, streaming=True, max_steps=3)
    assert run_plan(config, as_json=True) == 0
    streamed = json.loads(capsys.readouterr().out)
    assert streamed["not_predicted"][0].startswith("rows of the stream after the ")
    assert streamed["bytes"]["base"] == parts["base"]
    config = dataclasses.replace(config, streaming=False)
    assert run_plan(config, device="tiny 0.0001GB", as_json=True) == 1
    assert len(json.loads(capsys.readouterr().out)["changes"]) >= 4
