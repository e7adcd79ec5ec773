"""llama.cpp (xllamacpp, in an environment of its own) gives the greedy tokens of base + adapter in float32.

$ESPALIER_TEST_ADAPTER names an adapter of the default model (the demo's).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from espalier.cli import app
from espalier.encode.template import resolve_template
from espalier.model.embedded import EMBEDDED, _installed_gguf
from espalier.model.load import load_model, load_tokenizer
from espalier.model.load_adapter import load_adapter
from espalier.use.chat import find_base
from espalier.use.export import export_gguf
from espalier.use.generate import generate
from espalier.use.probes import prompt_ids

pytestmark = pytest.mark.clients
HERE = Path(__file__).parent
ROWS = HERE.parents[1] / "examples" / "triage" / "heldout.jsonl"
NUM_PROMPTS, NUM_TOKENS = 20, 16


@pytest.fixture(scope="session")
def xllamacpp_python(client_python: Any) -> Path:
    return client_python("xllamacpp", "xllamacpp")


def ask(
    python: Path,
    tmp_path: Path,
    model: Path,
    lora: Path | None,
    prompts: Any,
    chats: Any,
    max_new_tokens: int = NUM_TOKENS,
    talk: bool = False,
) -> Any:
    request = {"model": str(model), "lora": lora and str(lora), "prompts": prompts, "chats": chats, "talk": talk}
    (tmp_path / "request.json").write_text(json.dumps(request | {"max_new_tokens": max_new_tokens}))
    command = [str(python), str(HERE / "llama_answers.py"), str(tmp_path / "request.json"), str(tmp_path / "out.json")]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize("form", ["gguf", "gguf-lora", "gguf-lora on the base's own GGUF"])
def test_greedy_tokens_are_ours(xllamacpp_python: Path, tmp_path: Path, form: str) -> None:
    adapter = os.environ.get("ESPALIER_TEST_ADAPTER")
    if adapter is None:
        pytest.skip("ESPALIER_TEST_ADAPTER names no adapter of the default model")
    base = find_base(Path(adapter), None)
    tokenizer = load_tokenizer(adapter)
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()[:NUM_PROMPTS]]
    chats = [_prompt(row) for row in rows]
    prompts = [prompt_ids(tokenizer, resolve_template(tokenizer), chat) for chat in chats]
    if form == "gguf":
        export_gguf(adapter, tmp_path / "g", None, "f16")
        model, lora = tmp_path / "g" / "model-f16.gguf", None
    else:
        export_gguf(adapter, tmp_path / "a", None, None)
        model, lora = _base_gguf(base, tokenizer, tmp_path / "base.gguf"), tmp_path / "a" / "adapter.gguf"
        if form.endswith("own GGUF"):
            own = _installed_gguf(EMBEDDED["smollm2-135m"])
            if own is None:
                pytest.skip("the file that the default model comes from is not here")
            model = own
    theirs = ask(xllamacpp_python, tmp_path, model, lora, prompts, chats)
    live = load_adapter(load_model(base, device="cpu", dtype=torch.float32), adapter)
    stops = [tokenizer.eos_token_id]
    ours = generate(live, tokenizer, prompts, max_new_tokens=NUM_TOKENS, stop_ids=stops)
    assert theirs["chats"] == prompts
    equal = total = 0
    for mine, answer in zip(ours, theirs["answers"], strict=True):
        wanted = list(mine.ids)
        got = [token for token in answer["ids"] if token not in stops]
        equal += sum(a == b for a, b in zip(wanted, got, strict=False))
        total += max(len(wanted), len(got))
    off = _first_difference(live, prompts, theirs["answers"])
    print(f"{form}: {equal} of {total} greedy tokens equal; next token's log-probabilities {off:.4f} apart on average")
    assert total > 100
    assert equal >= 0.95 * total


def test_the_demos_adapter_goes_the_whole_way(xllamacpp_python: Path, tmp_path: Path) -> None:
    """Evaluated, merged, written as GGUF, all verified; llama.cpp's chat answers five held-out questions as we do."""
    adapter = os.environ.get("ESPALIER_TEST_ADAPTER")
    if adapter is None:
        pytest.skip("ESPALIER_TEST_ADAPTER names no adapter of the default model")
    merged, files = str(tmp_path / "merged"), str(tmp_path / "g")
    lines = ROWS.read_text(encoding="utf-8").splitlines()[::15][:5]
    (tmp_path / "five.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for argv in (
        ["verify", adapter, "--use_cpu"],
        ["evaluate", "--adapter", adapter, "--dataset_path", str(tmp_path / "five.jsonl"), "--generate", "--use_cpu"],
        ["merge", "--adapter", adapter, "--output_dir", merged],
        ["verify", merged],
        ["merge", "--adapter", adapter, "--output_dir", files, "--format", "gguf"],
        ["verify", files],
    ):
        result = CliRunner().invoke(app, argv)
        assert result.exit_code == 0, result.output
        print(f"$ espalier {' '.join(argv)}\n{result.output}")
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()][::15][:5]
    chats = [_prompt(row) for row in rows]
    theirs = ask(xllamacpp_python, tmp_path, tmp_path / "g" / "model-f16.gguf", None, [], chats, talk=True)
    base, tokenizer = find_base(Path(adapter), None), load_tokenizer(adapter)
    live = load_adapter(load_model(base, device="cpu", dtype=torch.float32), adapter)
    prompts = [prompt_ids(tokenizer, resolve_template(tokenizer), chat) for chat in chats]
    assert theirs["chats"] == prompts
    ours = generate(live, tokenizer, prompts, max_new_tokens=64, stop_ids=[tokenizer.eos_token_id])
    for row, mine, answer in zip(rows, ours, theirs["said"], strict=True):
        print(f"{row['input']!r}: wanted {row['output']!r}, ours {mine.text!r}, llama.cpp {answer!r}")
        assert re.fullmatch(
            r"queue: (billing|access|delivery|hardware|privacy); level: (urgent|fault|question)", answer
        )
        assert answer == mine.text


def _prompt(row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}]


def _base_gguf(base: Any, tokenizer: Any, file: Path) -> Path:
    from espalier.model.load import load_config
    from espalier.use.gguf import write_model
    from espalier.use.merged_weights import empty_base
    from espalier.use.shards import Shards

    empty = empty_base(load_config(base))
    names = [name for name, _ in empty.named_parameters()]
    write_model(file, empty.config, tokenizer, names, Shards(Path(base.path), empty.all_tied_weights_keys), "f16")
    return file


def _first_difference(live: Any, prompts: list[list[int]], theirs: Any) -> float:
    """Mean |difference| of the first token's log-probabilities, over the five that llama.cpp names."""
    found = []
    with torch.no_grad():
        for ids, answer in zip(prompts, theirs, strict=True):
            log_probs = live(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
            found += [abs(float(log_probs[int(token)]) - value) for token, value in answer["first"].items()]
    return sum(found) / len(found)
