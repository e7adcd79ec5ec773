"""--lora_forward: the fast LoRA layer in a run and its twin, PEFT's forward."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import log_of, run, write_rows

STEPS = 6


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fast_lora_matches_peft_over_a_run(dropout: float, tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    losses = {}
    for forward, said in (("fast", "own forward in 14 layers"), ("peft", "PEFT's forward in 14 layers")):
        out = tmp_path / forward
        _, text = run(
            tiny_llama_dir, rows, out, max_steps=STEPS, lora_forward=forward, lora_dropout=dropout, self_check="on"
        )
        assert f"  lora       {said}" in text
        losses[forward] = [entry["loss"] for entry in log_of(out)]
    assert len(losses["fast"]) == STEPS
    assert losses["fast"] == pytest.approx(losses["peft"], abs=1e-5)
    assert losses["fast"][-1] < losses["fast"][0] - 0.1


def test_dora_goes_through_peft_and_the_header_says_so(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    _, text = run(tiny_llama_dir, rows, tmp_path / "out", max_steps=1, use_dora=True)
    assert "  lora       PEFT's forward in 14 layers (DoRA x14); fused norms: 5\n" in text


def test_fast_norm_matches_stock_over_a_run(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    losses = {}
    for forward, said in (("fast", "own forward in 14 layers; fused norms: 5"), ("stock", "own forward in 14 layers")):
        out = tmp_path / forward
        _, text = run(tiny_llama_dir, rows, out, max_steps=STEPS, norm_forward=forward, self_check="on")
        assert f"  lora       {said}" in text
        losses[forward] = [entry["loss"] for entry in log_of(out)]
    assert len(losses["fast"]) == STEPS
    assert losses["fast"] == pytest.approx(losses["stock"], abs=1e-5)
