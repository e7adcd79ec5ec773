"""`espalier import`: a seed-style adapter_model.bin becomes a PEFT folder, and every fault of one is one message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_runs import run, write_rows
from typer.testing import CliRunner

from espalier.cli import app
from espalier.errors import AdapterError, EspalierError, RunFolderError, UsageError
from espalier.model.load import load_model
from espalier.model.load_adapter import check_adapter_folder, load_adapter, read_record
from espalier.use.chat import run_chat
from espalier.use.import_adapter import import_adapter
from espalier.use.merge import merge
from espalier.use.verify import verify

IDS = torch.tensor([[0, 51, 28, 279, 287]])
Tensors = dict[str, torch.Tensor]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(base: Path, **settings: Any) -> Any:
    """A PEFT model whose adapter has an effect, as a training script holds it in the end."""
    torch.manual_seed(5)
    plain = load_model(base, device="cpu", dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **settings}))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.normal_(std=0.2) if "magnitude" not in name else tensor.mul_(1.1)
    return model


def raw(model: Any) -> Tensors:
    """The dict that the seed document's save_model writes."""
    return {k: v.to("cpu") for k, v in model.named_parameters() if v.requires_grad}


def seed_folder(folder: Path, tensors: Any) -> Path:
    folder.mkdir()
    torch.save(tensors, folder / "adapter_model.bin")
    torch.save({"learning_rate": 1e-4}, folder / "training_args.bin")
    return folder


def imported(source: Path, output: Path, base: Path, **options: Any) -> Any:
    return import_adapter(source, output, **{"model_path": str(base), "lora_alpha": 8, "use_cpu": True, **options})


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "one_layer", "embedding", "dora", "lora_bias", "modules_to_save"],
)
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_raw_names_give_what_was_trained(tiny_llama_dir: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    model = trained(tiny_llama_dir, **settings)
    expected = logits(model)
    tensors = raw(model)
    assert all(".default" in key for key in tensors)
    done = imported(seed_folder(tmp_path / "seed", tensors), tmp_path / "a", tiny_llama_dir)
    assert (done.rank, done.alpha) == (4, 8)
    plain = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, str(tmp_path / "a"))), expected)
    assert len(load_file(tmp_path / "a" / "adapter_model.safetensors")) == len(tensors)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: key.replace("base_model.model.model.", "base_model.model._orig_mod.model."),
        lambda key: key.replace(".default", ""),
        lambda key: key.replace(".default", ".my_adapter"),
        lambda key: key.removeprefix("base_model.model."),
    ],
    ids=["ddp", "compile", "compile_inside", "peft", "named", "bare"],
)
def test_names_that_wrappers_and_peft_give(tiny_llama_dir: Path, tmp_path: Path, spoil: Callable[[str], str]) -> None:
    model = trained(tiny_llama_dir, target_modules=["q_proj", "v_proj"])
    tensors = {spoil(key): tensor for key, tensor in raw(model).items()}
    imported(seed_folder(tmp_path / "seed", tensors), tmp_path / "a", tiny_llama_dir)
    plain = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, str(tmp_path / "a"))), logits(model))


def test_the_report_and_the_folder(tiny_llama_dir: Path, tmp_path: Path) -> None:
    seed = seed_folder(tmp_path / "seed", raw(trained(tiny_llama_dir, target_modules=["q_proj", "v_proj"])))
    (lines := list(imported(seed, tmp_path / "a", tiny_llama_dir).lines)).pop(4)  # the effect, tested below
    assert lines == [
        "8 tensors of adapter_model.bin: 4 modules have an adapter: q_proj 2 of 2, v_proj 2 of 2",
        f"base: folder {tiny_llama_dir} (--model_path)",
        "rank 4 (from the tensors), alpha 8 (--lora_alpha): scale 8 / 4",
        "template: tokenizer's own, tokenizer of the base; if it was trained in another layout, say which with "
        "--template",
        f"written to {tmp_path / 'a'}, and loaded from there: every tensor in its place",
    ]
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "v_proj"]
    assert settings["base_model_name_or_path"] == "tiny-llama"
    assert read_record(tmp_path / "a")["made_by"] == "espalier import"
    assert not (tmp_path / "a" / "adapter_model.bin").exists()


def test_goes_through_chat_merge_and_verify(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(tiny_llama_dir, target_modules=["q_proj", "v_proj"])
    imported(seed_folder(tmp_path / "seed", raw(model)), tmp_path / "a", tiny_llama_dir)
    found = verify(tmp_path / "a", str(tiny_llama_dir), use_cpu=True)
    assert [entry for entry in found if entry.level == "problem"] == []
    assert any(entry.text == "the base is the one that it was trained on (fingerprint)" for entry in found)
    merge(tmp_path / "a", tmp_path / "m", str(tiny_llama_dir))
    assert (logits(load_model(tmp_path / "m", device="cpu", dtype=torch.float32)) - logits(model)).abs().max() < 1e-4
    assert run_chat(tmp_path / "a", str(tiny_llama_dir), ["a pear"], max_new_tokens=4, use_cpu=True) == 0
    assert capsys.readouterr().out.strip()


def test_settings_beside_the_tensors_are_used(tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True}
    model = trained(tiny_llama_dir, target_modules=["q_proj", "v_proj"], **settings)
    seed = seed_folder(tmp_path / "seed", raw(model))
    model.peft_config["default"].save_pretrained(str(seed))
    done = imported(seed, tmp_path / "a", tiny_llama_dir, lora_alpha=None)
    plain = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, str(tmp_path / "a"))), logits(model))
    assert done.lines[2] == "rank 2, 4 (from the tensors), alpha 8 (adapter_config.json): scale 8 / sqrt of 4"
    over = imported(seed, tmp_path / "b", tiny_llama_dir, lora_alpha=16)
    assert "alpha 16 (--lora_alpha; adapter_config.json says 8)" in over.lines[2]


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}],
    ids=["plain", "rslora", "patterns"],
)
def test_start_that_changed_the_base_becomes_plain(
    tiny_llama_dir: Path, tmp_path: Path, start: str, settings: dict[str, Any]
) -> None:
    """The adapter alone, on the base as it is, gives what was trained: in PEFT, and merged."""
    model = trained(tiny_llama_dir, target_modules=["q_proj", "v_proj"], init_lora_weights=start, **settings)
    expected = logits(model)
    model.save_pretrained(tmp_path / "started")
    done = imported(tmp_path / "started", tmp_path / "a", tiny_llama_dir, lora_alpha=None)
    assert done.rank == 8
    assert done.lines[3] == f"what {start} took from the base is part of the adapter now: rank 8, a plain start"
    plain = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    before = logits(plain)
    found = logits(PeftModel.from_pretrained(plain, str(tmp_path / "a")))
    assert (found - expected).abs().max() < 1e-4
    assert (found - before).abs().max() > 0.1
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["init_lora_weights"] is True
    merge(tmp_path / "a", tmp_path / "m", str(tiny_llama_dir))
    assert (logits(load_model(tmp_path / "m", device="cpu", dtype=torch.float32)) - expected).abs().max() < 1e-4


def test_run_of_ours_with_such_a_start_loads_and_becomes_plain(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    run(tiny_llama_dir, rows, tmp_path / "run", num_train_epochs=2, init_lora_weights="pissa")
    plain = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    expected = logits(load_adapter(plain, tmp_path / "run"))
    imported(tmp_path / "run", tmp_path / "a", tiny_llama_dir, lora_alpha=None)
    said: list[str] = []
    plain = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    assert (logits(load_adapter(plain, tmp_path / "a", notice=said.append)) - expected).abs().max() < 1e-4
    assert said == []
    assert read_record(tmp_path / "a")["data"] == read_record(tmp_path / "run")["data"]


def test_start_that_cannot_be_computed_again(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = trained(tiny_llama_dir, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {"init_lora_weights": "corda"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(AdapterError, match="it was started by corda"):
        imported(tmp_path / "a", tmp_path / "b", tiny_llama_dir)


def test_alpha_and_base_must_be_said(tiny_llama_dir: Path, tmp_path: Path) -> None:
    seed = seed_folder(tmp_path / "seed", raw(trained(tiny_llama_dir, target_modules=["q_proj"])))
    with pytest.raises(UsageError, match="alpha is nowhere") as caught:
        imported(seed, tmp_path / "a", tiny_llama_dir, lora_alpha=None)
    assert caught.value.where == "--lora_alpha"
    with pytest.raises(UsageError, match="does not say which base it belongs to"):
        import_adapter(seed, tmp_path / "a", lora_alpha=8)
    assert not (tmp_path / "a").exists()


class Malicious:
    """What a pickle can do to whoever loads it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_code_in_the_file_is_never_run(tiny_llama_dir: Path, tmp_path: Path) -> None:
    seed = seed_folder(tmp_path / "seed", {"x": Malicious(tmp_path / "ran")})
    with pytest.raises(AdapterError, match=r"the file asks for \S+, which is no tensor; nothing in it was run"):
        imported(seed, tmp_path / "a", tiny_llama_dir)
    assert not (tmp_path / "ran").exists()


Q0, V1 = (
    "base_model.model.model.layers.0.self_attn.q_proj.lora_",
    "base_model.model.model.layers.1.self_attn.v_proj.lora_",
)


def without(tensors: Tensors, *keys: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key not in keys}


@pytest.mark.parametrize(
    ("spoil", "message", "detail"),
    [
        (
            lambda t: without(t, Q0 + "B.default.weight"),
            "1 of 7 lack their other half",
            f"{Q0}A.default.weight: no lora_B",
        ),
        (
            lambda t: t | {V1 + "A.default.weight": torch.ones(2, 32), V1 + "B.default.weight": torch.ones(16, 2)},
            "its modules have ranks 2, 4, and one alpha means another scale for each",
            "rank 2: model.layers.1.self_attn.v_proj",
        ),
        (
            lambda t: t | {Q0 + "B.default.weight": torch.ones(32, 2)},
            "1 of 4 have another rank in A than in B",
            "A [4, 32]",
        ),
        (
            lambda t: {key.replace("self_attn.q_proj", "W_pack"): tensor for key, tensor in t.items()},
            "4 of 8 name a module that this base does not have",
            "base_model.model.model.layers.0.W_pack.lora_A.default.weight",
        ),
        (
            lambda t: t | {Q0 + "A.default.weight": torch.ones(4, 48)},
            "1 of 4 do not fit this base",
            "B [32, 4]; (32, 32) in this base",
        ),
        (
            lambda t: t | {Q0 + "A.default.weight": torch.full((4, 32), float("nan"))},
            "1 of 8 hold values that are not finite",
            f"{Q0}A.default.weight",
        ),
        (
            lambda t: {key: tensor * ("lora_A" in key) for key, tensor in t.items()},
            "4 of 4 are all zero, so the adapter changes nothing",
            f"{Q0}B.default.weight",
        ),
        (
            lambda t: t | {"model.norm.weight": torch.ones(32)},
            "1 of its 9 tensors are no LoRA tensors",
            "model.norm.weight",
        ),
        (
            lambda t: {"model.norm.weight": torch.ones(32)},
            "none of its 1 tensors is one of a LoRA",
            "model.norm.weight",
        ),
        (lambda t: t | {V1 + "A.second.weight": torch.ones(4, 32)}, "the file holds 2 adapters: default, second", ""),
        (
            lambda t: t | {f"module.{Q0}A.default.weight": torch.ones(4, 32)},
            "1 tensors are there twice",
            "q_proj.lora_A",
        ),
        (lambda t: {**t, "step": 3}, "the file holds 1 things besides tensors", "step: int"),
        (lambda t: list(t.values()), "the file holds a list, not tensors by name", ""),
    ],
    ids=[
        "pair",
        "ranks",
        "uneven",
        "names",
        "shape",
        "nan",
        "zero",
        "others",
        "no_lora",
        "two",
        "twice",
        "int",
        "list",
    ],
)
def test_each_fault_is_one_message(
    tiny_llama_dir: Path, tmp_path: Path, spoil: Callable[[Tensors], Any], message: str, detail: str
) -> None:
    tensors = {k: v.detach() for k, v in raw(trained(tiny_llama_dir, target_modules=["q_proj", "v_proj"])).items()}
    with pytest.raises(EspalierError) as caught:
        imported(seed_folder(tmp_path / "seed", spoil(tensors)), tmp_path / "a", tiny_llama_dir)
    assert message in caught.value.what
    assert detail in "\n".join(caught.value.details)
    assert [file.name for file in tmp_path.iterdir()] == ["seed"]


def test_settings_of_another_adapter(tiny_llama_dir: Path, tmp_path: Path) -> None:
    seed = seed_folder(tmp_path / "seed", raw(trained(tiny_llama_dir, target_modules=["q_proj"])))
    (seed / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 8}')
    with pytest.raises(AdapterError, match=r"adapter_config.json says rank 8, the tensors have rank 4"):
        imported(seed, tmp_path / "a", tiny_llama_dir)
    (seed / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(AdapterError, match="these are no settings of a LoRA adapter"):
        imported(seed, tmp_path / "a", tiny_llama_dir)


def test_nothing_there_and_a_taken_folder(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no such file or folder"):
        imported(tmp_path / "none", tmp_path / "a", tiny_llama_dir)
    (tmp_path / "runs").mkdir()
    seed_folder(tmp_path / "runs" / "checkpoint-5", {})
    with pytest.raises(AdapterError, match="neither") as caught:
        imported(tmp_path / "runs", tmp_path / "a", tiny_llama_dir)
    assert caught.value.todo == f"Adapters below it: {tmp_path / 'runs' / 'checkpoint-5'}"
    seed = seed_folder(tmp_path / "seed", raw(trained(tiny_llama_dir, target_modules=["q_proj"])))
    with pytest.raises(RunFolderError, match="this folder is not empty"):
        imported(seed, tmp_path / "runs", tiny_llama_dir)


def test_command(tiny_llama_dir: Path, tmp_path: Path) -> None:
    seed = seed_folder(tmp_path / "seed", raw(trained(tiny_llama_dir, target_modules=["q_proj"])))
    argv = ["import", str(seed), "--output_dir", str(tmp_path / "a"), "--model_path", str(tiny_llama_dir)]
    result = CliRunner().invoke(app, [*argv, "--lora_alpha", "8", "--use_cpu"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].startswith("4 tensors of adapter_model.bin: 2 modules have an adapter")
    assert result.stdout.splitlines()[-1] == f"try it: espalier chat --adapter {tmp_path / 'a'}"


@pytest.mark.parametrize("alpha", [0.0, -8.0, float("nan"), float("inf")])
def test_alpha_that_is_no_scale(alpha: float, adapter_good_dir: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no number above 0"):
        import_adapter(adapter_good_dir, tmp_path / "new", model_path=str(tiny_llama_dir), lora_alpha=alpha)
    assert not list(tmp_path.iterdir())


def test_tensors_without_settings_lead_to_import(adapter_good_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(adapter_good_dir, folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=f"`espalier import {folder} --output_dir NEW"):
        check_adapter_folder(folder)
