"""The openai package, in an environment of its own, talks to a running `espalier serve`, streaming and not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_process import free_port, serving

import espalier
from espalier.encode.template import resolve_template
from espalier.model.load import choose_dtype, load_model, load_tokenizer
from espalier.model.load_adapter import load_adapter
from espalier.use.generate import generate
from espalier.use.probes import prompt_ids
from whole_adapter import whole

pytestmark = pytest.mark.clients
HERE = Path(__file__).parent
SOURCE = {"PYTHONPATH": str(Path(espalier.__file__).parents[1])}
PEAR = [{"role": "user", "content": "a pear"}]


@pytest.fixture(scope="session")
def openai_python(client_python: Any) -> Path:
    return client_python("openai", "openai")


def theirs(python: Path, url: str, key: str, model: str, answers: Path) -> Any:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), str(HERE / "openai_answers.py"), url, key, model, str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 0, done.stderr
    return json.loads(answers.read_text(encoding="utf-8"))


def test_openai_package(openai_python: Path, tmp_path: Path, shared: Path) -> None:
    base, adapter = shared / "tiny-llama", whole(shared, tmp_path / "pear")
    port = free_port()
    command = [sys.executable, "-m", "espalier", "serve", "--adapter", str(adapter), "--model_path", str(base)]
    command += ["--port", str(port), "--use_cpu", "--api_key", "secret"]
    with serving(command, port, tmp_path / "log", SOURCE, 120) as process:
        found = theirs(openai_python, f"http://127.0.0.1:{port}/v1", "secret", "pear", tmp_path / "answers.json")
    assert process.returncode == 0
    print(f"openai {found['version']}: {len(found['chunks'])} chunks")
    assert found["models"] == ["pear", "tiny-llama"]
    model = load_adapter(load_model(base, device="cpu", dtype=choose_dtype("cpu")[0]), adapter)
    tokenizer = load_tokenizer(adapter)
    ids = prompt_ids(tokenizer, resolve_template(tokenizer), PEAR)
    [ours] = generate(model, tokenizer, [ids], max_new_tokens=24, stop_ids=[1])
    choice = found["whole"]["choices"][0]
    assert choice["message"]["content"] == ours.text
    assert choice["finish_reason"] == ("stop" if ours.stopped else "length")
    num_answer = len(ours.ids) + ours.stopped
    counts = {"prompt_tokens": len(ids), "completion_tokens": num_answer, "total_tokens": len(ids) + num_answer}
    assert {name: found["whole"]["usage"][name] for name in counts} == counts
    assert {name: found["chunks"][-1]["usage"][name] for name in counts} == counts
    pieces = [chunk["choices"][0]["delta"]["content"] or "" for chunk in found["chunks"][:-1]]
    assert "".join(pieces) == ours.text
    assert sum(map(bool, pieces)) > 3
    assert found["second"]["usage"]["completion_tokens"] <= 4
    assert found["errors"] == {
        "model": ["NotFoundError", "there is no model 'fig' here; there is pear, tiny-llama", "model"],
        "field": ["BadRequestError", "n: 2 is not done here; leave it out", "n"],
        "key": ["AuthenticationError", "this server needs its API key: Authorization: Bearer KEY", None],
    }
