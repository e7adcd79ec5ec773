"""PEFT alone, in an environment without espalier, computes what we compute with the same adapter.

A small adapter on a tiny base; with $ESPALIER_TEST_ADAPTER, an adapter of the default model (the demo's), that one too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from espalier.encode.template import resolve_template
from espalier.model.load import load_model, load_tokenizer
from espalier.model.load_adapter import load_adapter
from espalier.use.chat import find_base
from espalier.use.probes import prompt_ids

pytestmark = pytest.mark.clients
HERE = Path(__file__).parent
ROWS = HERE.parents[1] / "examples" / "triage" / "heldout.jsonl"
NUM_PROMPTS = 8


@pytest.fixture(scope="session")
def peft_python(client_python: Any) -> Path:
    """With the versions that run here, so that a difference is ours."""
    packages = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers", "peft")]
    return client_python("peft", *packages)


def theirs(python: Path, scratch: Path, base: Path, adapter: Path, messages: Any) -> dict[str, torch.Tensor]:
    request, answer = scratch / "request.json", scratch / "logits.safetensors"
    request.write_text(json.dumps({"base": str(base), "adapter": str(adapter), "messages": messages}))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), str(HERE / "peft_logits.py"), str(request), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 0, done.stderr
    return load_file(answer)


def largest_difference(python: Path, scratch: Path, base: Path, adapter: Path, messages: Any) -> float:
    """Largest |logit difference| over every place of every prompt; the prompts' ids are compared first."""
    answers = theirs(python, scratch, base, adapter, messages)
    tokenizer = load_tokenizer(adapter)
    template = resolve_template(tokenizer)
    model = load_adapter(load_model(base, device="cpu", dtype=torch.float32), adapter, notice=lambda line: None)
    found, effect = [], []
    for number, conversation in enumerate(messages):
        ids = prompt_ids(tokenizer, template, conversation)
        assert answers[f"ids.{number}"].tolist() == ids
        with torch.no_grad():
            ours = model(input_ids=torch.tensor([ids])).logits[0]
            with model.disable_adapter():
                effect.append(float((model(input_ids=torch.tensor([ids])).logits[0] - ours).abs().max()))
        found.append(float((answers[f"logits.{number}"] - ours).abs().max()))
    assert len(found) == len(messages)
    assert min(effect) > 1  # the adapter was on
    print(f"{len(found)} prompts, largest difference {max(found):.3g}, the adapter's effect {min(effect):.3g} or more")
    return max(found)


def test_small_adapter(peft_python: Path, tmp_path: Path, tiny_llama_dir: Path, adapter_good_dir: Path) -> None:
    adapter = Path(shutil.copytree(adapter_good_dir, tmp_path / "a"))
    load_tokenizer(tiny_llama_dir).save_pretrained(adapter)
    messages = [[{"role": "user", "content": text}] for text in ("a pear", "List three fruits.")]
    assert largest_difference(peft_python, tmp_path, tiny_llama_dir, adapter, messages) <= 1e-5


def test_trained_adapter_on_real_prompts(peft_python: Path, tmp_path: Path) -> None:
    named = os.environ.get("ESPALIER_TEST_ADAPTER")
    if named is None:
        pytest.skip("ESPALIER_TEST_ADAPTER names no adapter of the default model")
    base = find_base(Path(named), None)
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()[:NUM_PROMPTS]]
    messages = [[{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}] for row in rows]
    assert largest_difference(peft_python, tmp_path, Path(base.path), Path(named), messages) <= 1e-5
