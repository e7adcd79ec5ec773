"""The Atom recipe's train.sh runs as it is written, against a small random Llama that has LLaMA-2's tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TOKENIZER = ROOT / ".assets" / "tokenizer-llama2"
ROWS = [
    {"instruction": "你是谁?", "input": "", "output": "家父是大理寺少卿甄远道。"},
    {"instruction": "Translate to French.", "input": "Good morning.", "output": "Bonjour."},
    {"instruction": "皇上驾到!", "input": "", "output": "皇上万福金安。"},
]


@pytest.mark.skipif(not TOKENIZER.is_dir(), reason="scripts/fetch_test_assets.py fetches the tokenizer")
def test_train_sh_runs_with_the_atom_template(tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "base")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MODEL": str(tmp_path / "base"),
        "DATA": str(data),
        "OUTPUT": str(tmp_path / "out"),
    }
    script = ROOT / "examples" / "atom-7b-chat" / "train.sh"
    done = subprocess.run(
        ["bash", str(script), "--template", "atom", "--max_steps", "2", "--logging_steps", "1"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "built-in atom" in done.stdout
    assert "3 read, 3 kept, 0 left out" in done.stdout
    record = json.loads((tmp_path / "out" / "espalier.json").read_text())
    assert record["base"]["name"] == "base"
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = saved.apply_chat_template(
        [{"role": "user", "content": "你是谁?"}], add_generation_prompt=True, return_dict=False
    )
    assert saved.decode(ids) == "<s>Human: 你是谁?\n</s><s>Assistant:"
    assert ids.count(1) == 2  # the start token of the conversation and the one before the answer
