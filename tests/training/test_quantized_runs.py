"""Runs on 4- and 8-bit bases: header, record, resume, and what is done with the adapter afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import log_of, run, write_rows

from espalier.errors import CheckpointError, UsageError
from espalier.model.fingerprint import base_fingerprint
from espalier.model.load import load_model
from espalier.use.merge import merge
from espalier.use.verify import verify

pytest.importorskip("bitsandbytes")
SAID = {
    "load_in_4bit": "base NF4, 4 bits a weight with double quantisation; computed in",
    "load_in_8bit": "base int8, 8 bits a weight; computed in",
}
EVALUATED = {"eval_fraction": 0.3, "eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize("flag", SAID)
def test_a_run_on_a_packed_base(flag: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    settings = {"fp32": False, flag: True, "self_check": "on", "save_steps": 2, **EVALUATED}
    _, text = run(tiny_llama_dir, rows, out, max_steps=4, **settings)
    assert SAID[flag] in text
    assert "  lora       own forward in 14 layers; fused norms: 5\n" in text
    assert "self-check on 3 rows" in text
    losses = [entry["loss"] for entry in log_of(out) if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    base = json.loads((out / "espalier.json").read_text())["base"]
    assert base["held_as"] == {"load_in_4bit": "nf4", "load_in_8bit": "int8"}[flag]
    assert f"{base['held_as'].replace('nf4', 'NF4')}, " in (out / "README.md").read_text()
    assert "uint8" not in (out / "README.md").read_text()
    full = load_model(tiny_llama_dir, device="cpu", dtype=torch.bfloat16)
    assert base["fingerprint"] == base_fingerprint(full)

    # From its checkpoint, the same adapter to the bit; and not with a base in another form.
    finished = load_file(out / "adapter_model.safetensors")
    for name in ("adapter_model.safetensors", "checkpoint-4"):
        (out / name).rename(tmp_path / name)
    run(tiny_llama_dir, rows, out, max_steps=4, resume_from_checkpoint="last", **settings)
    again = load_file(out / "adapter_model.safetensors")
    assert again.keys() == finished.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in finished.items())
    with pytest.raises(CheckpointError, match="other settings") as caught:
        run(tiny_llama_dir, rows, out, max_steps=4, resume_from_checkpoint="last", **{**settings, flag: False})
    assert f"--{flag}: True -> False" in caught.value.details

    # Everything else takes the 16-bit base.
    findings = verify(out, use_cpu=True)
    assert [entry.text for entry in findings if entry.level == "problem"] == []
    assert any("fingerprint" in entry.text for entry in findings)
    merge(out, tmp_path / "merged")
    assert load_model(tmp_path / "merged", device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_peft_s_forward_gives_the_same_run(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    losses = {}
    for forward in ("fast", "peft"):
        settings = {"fp32": False, "load_in_4bit": True, "lora_forward": forward}
        _, text = run(tiny_llama_dir, rows, tmp_path / forward, max_steps=3, **settings)
        assert ("own forward in 14" if forward == "fast" else "PEFT's forward in 14") in text
        losses[forward] = [entry["loss"] for entry in log_of(tmp_path / forward)]
    assert losses["fast"] == pytest.approx(losses["peft"], abs=2e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_plain_rows_give_the_same_run(checkpointing: bool, tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    losses = {}
    for tree in ("on", "off"):
        settings = {"fp32": False, "load_in_4bit": True, "tree": tree, "gradient_checkpointing": checkpointing}
        run(tiny_llama_dir, rows, tmp_path / tree, max_steps=3, **settings)
        losses[tree] = [entry["loss"] for entry in log_of(tmp_path / tree)]
    assert losses["on"] == pytest.approx(losses["off"], abs=2e-2)


def test_refused_before_the_model_is_read(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match="do not go with a quantised base"):
        run(tiny_llama_dir, rows, tmp_path / "out", max_steps=1, load_in_4bit=True)  # small_runs asks for --fp32
    assert not (tmp_path / "out").exists()
