"""README.md of a run: its exact text, what a user's text may not do in it, and that a resumed run writes the same."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import log_of, run, write_rows

from espalier import __version__
from espalier.training import model_card as module
from espalier.training.model_card import CARD, MARK, CardFacts, cell, code, fenced, model_card, plain, portable_options

EXPECTED = """\
---
base_model: tiny-llama
library_name: peft
pipeline_tag: text-generation
tags:
- espalier
- lora
---
{mark}

# first

A LoRA adapter for `tiny-llama`, trained by Espalier {espalier}.

## Data

| file | bytes | sha256 |
|---|---|---|
| `rows.jsonl` | {bytes} | {sha256} |

14 rows read, 9 trained, 3 held out, 2 left out.

- 2: no answer

Chat template: tokenizer's own; an answer ends with `</s>`; rows of up to 128 tokens.

## Training

6 steps of 4 rows (2.00 epochs). Adapter: q_proj x2, v_proj x2; 896 trainable numbers, 2.40 % of the base's 37,280.

| rows | loss | perplexity | token accuracy |
|---|---|---|---|
| training, step 1 | {first} |
| training, step 6 | {last} |
| held out, step 3 | {held_first} |
| held out, step 6 | {held_last} |

Base in float32, adapter in float32, on a test machine; {versions}.

## Make it again

With the files above, and this as `run.yaml` (names without their folders):

```yaml
{options}```

```sh
espalier train --config run.yaml --output_dir again
```

## Use it

ADAPTER is this folder. Tokenizer and chat template beside it are those of training.

```sh
espalier chat --adapter ADAPTER
espalier verify ADAPTER
```

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = "ADAPTER"  # this folder
base = AutoModelForCausalLM.from_pretrained('path/to/tiny-llama')
model = PeftModel.from_pretrained(base, adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
```

```sh
vllm serve path/to/tiny-llama --enable-lora --lora-modules first=ADAPTER --tokenizer ADAPTER \
--chat-template ADAPTER/chat_template.jinja --generation-config ADAPTER
```
"""


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hardware", lambda device: "a test machine")


def measures(entry: dict[str, Any], prefix: str) -> str:
    perplexity = f"{entry['eval_perplexity']:.4f}" if prefix else "-"
    return f"{entry[prefix + 'loss']:.4f} | {perplexity} | {entry[prefix + 'token_accuracy']:.4f}"


def small_run(shared: Path, tmp_path: Path, **options: Any) -> str:
    rows = write_rows(tmp_path / "rows.jsonl")
    with open(rows, "a", encoding="utf-8") as file:
        file.write('{"instruction": "say it", "output": ""}\n{"instruction": "say it"}\n')
    settings = {"num_train_epochs": 2, "eval_fraction": 0.25, "eval_strategy": "epoch", "on_bad_row": "skip"}
    targets = {"target_modules": ["q_proj", "v_proj"], "save_steps": 4}
    return run(shared / "tiny-llama", rows, tmp_path / "first", **{**settings, **targets, **options})[1]


def test_exact_text_of_a_small_run(shared: Path, tmp_path: Path) -> None:
    small_run(shared, tmp_path)
    card = (tmp_path / "first" / CARD).read_text(encoding="utf-8")
    log = log_of(tmp_path / "first")
    losses, held = [e for e in log if "loss" in e], [e for e in log if "eval_loss" in e]
    stored = yaml.safe_load((tmp_path / "first" / "run.yaml").read_text())
    assert stored["output_dir"] == str(tmp_path / "first")
    shown = {k: v for k, v in stored.items() if k not in ("output_dir", "report_to")}
    shown |= {"dataset_path": ["rows.jsonl"], "model_path": "tiny-llama"}
    names = {name: version(name) for name in ("torch", "transformers", "peft")}
    versions = {"espalier": __version__, "python": platform.python_version(), **names}
    data = (tmp_path / "rows.jsonl").read_bytes()
    assert card == EXPECTED.format(
        mark=MARK,
        espalier=__version__,
        bytes=f"{len(data):,}",
        sha256=hashlib.sha256(data).hexdigest(),
        first=measures(losses[0], ""),
        last=measures(losses[-1], ""),
        held_first=measures(held[0], "eval_"),
        held_last=measures(held[-1], "eval_"),
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        options=yaml.safe_dump(shown, sort_keys=False),
    )
    assert str(tmp_path) not in card


def test_resumed_run_writes_the_same(shared: Path, tmp_path: Path) -> None:
    small_run(shared, tmp_path)
    file = tmp_path / "first" / CARD
    whole = file.read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "first" / "checkpoint-6")
    file.write_text(f"{MARK}\nan older card\n", encoding="utf-8")
    said = small_run_again(shared, tmp_path)
    assert "step 6/6" in said
    assert "step 3/6" not in said
    assert file.read_text(encoding="utf-8") == whole


def small_run_again(shared: Path, tmp_path: Path) -> str:
    """Go on from checkpoint-4 with the rows that are there."""
    settings = {"num_train_epochs": 2, "eval_fraction": 0.25, "eval_strategy": "epoch", "on_bad_row": "skip"}
    targets = {"target_modules": ["q_proj", "v_proj"], "save_steps": 4, "resume_from_checkpoint": "last"}
    return run(shared / "tiny-llama", tmp_path / "rows.jsonl", tmp_path / "first", **settings, **targets)[1]


def test_card_of_the_users_own_stays(shared: Path, tmp_path: Path) -> None:
    small_run(shared, tmp_path)
    file = tmp_path / "first" / CARD
    file.write_text("my own words\n", encoding="utf-8")
    shutil.rmtree(tmp_path / "first" / "checkpoint-6")
    assert "README.md was not written by espalier: it is left as it is" in small_run_again(shared, tmp_path)
    assert file.read_text(encoding="utf-8") == "my own words\n"


def test_disk_that_refuses_the_card_does_not_end_the_run(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from espalier.training import checkpoint_files

    before = checkpoint_files.replace_text

    def full(file: Path, text: str) -> None:
        if file.name == CARD:
            raise OSError(28, "No space left on device")
        before(file, text)

    monkeypatch.setattr(checkpoint_files, "replace_text", full)
    said = small_run(shared, tmp_path)
    assert "README.md cannot be written: No space left on device" in said
    assert "try it: espalier chat" in said
    assert not (tmp_path / "first" / CARD).exists()


FACTS = CardFacts(
    name="a run",
    base="owner/base",
    base_id="owner/base",
    base_origin=None,
    base_license=None,
    record={"data": {"files": [{"name": "a.jsonl"}], "read": 5, "trained": 5, "held_out": 0}},
    options={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_dora": True},
    template="built-in atom",
    stop_tokens=["</s>"],
    max_length=None,
    left_out={},
    adapter="q_proj x2",
    steps=9,
    epochs=1.8,
    best_step=6,
    skipped_steps=1,
    log=[{"step": step, "eval_loss": 1.0 / step, "eval_perplexity": 2.0} for step in (3, 6, 9)],
    precision="bfloat16",
    hardware="a machine",
    versions={"espalier": "1"},
    vllm=("vllm serve owner/base",),
)


def test_best_step_skipped_steps_and_no_measures() -> None:
    text = model_card(FACTS)
    assert (
        "9 steps of 4 rows (1.80 epochs). Adapter: q_proj x2. The adapter is that of step 6, the best evaluation. "
        in text
    )
    assert "1 steps were skipped: their loss or gradient was not finite." in text
    assert [line for line in text.splitlines() if line.startswith("| held")] == [
        "| held out, step 3 | 0.3333 | 2.0000 | - |",
        "| held out, step 6 | 0.1667 | 2.0000 | - |",
        "| held out, step 9 | 0.1111 | 2.0000 | - |",
    ]
    assert "No held-out rows" not in text
    assert "No held-out rows were evaluated in this run." in model_card(dataclasses.replace(FACTS, log=[]))
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["espalier", "lora", "dora"]
    assert "AutoModelForCausalLM.from_pretrained('owner/base')" in text


def test_stream_whose_rows_nobody_has_counted() -> None:
    record = {"data": {"files": [], "read": None, "trained": None, "held_out": 3}}
    assert "Rows were read once, while the run went on: 36 at most, 3 held out." in model_card(
        dataclasses.replace(FACTS, record=record)
    )


def test_texts_of_users_have_no_meaning_in_it() -> None:
    evil = "x](http://e.vil) <img src=x onerror=1> `a` | *b* _c_ &lt; \n# big"
    record = {"data": {"files": [{"name": f"{evil.replace('/', '')}.jsonl"}], "read": 5, "trained": 5}}
    options = {**FACTS.options, "input_sentence": "```\n<b>\n```` after"}
    facts = dataclasses.replace(FACTS, name=evil, base=f"b: {evil}", base_id=None, record=record, options=options)
    text = model_card(facts)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == f"b: {evil}"
    assert "\n# big" not in text.split("---", 2)[2]
    assert "# x\\](http://e.vil) \\<img src=x onerror=1\\> \\`a\\` \\| \\*b\\* \\_c\\_ \\&lt; # big\n" in text
    assert "| ``x](http:e.vil) <img src=x onerror=1> `a` \\| *b* _c_ &lt; # big.jsonl`` |  |  |" in text
    assert code("``x``") == "``` ``x`` ```"
    assert cell("a|b") == "`a\\|b`"
    assert fenced("a ```` b\n", "yaml") == "`````yaml\na ```` b\n`````\n"
    assert plain("q_proj _x_") == "q_proj \\_x\\_"
    fence = text.split("## Make it again")[1].split("yaml\n")[0].split("\n")[-1]
    assert fence == "`" * 5


def test_options_hold_no_path_and_no_secret() -> None:
    options = {
        "dataset_path": ["/home/me/a.jsonl", "hub:owner/rows", "data/*.csv", "-", "C:\\rows\\b.jsonl"],
        "model_path": "/models/base",
        "template": "/home/me/t.jinja",
        "output_dir": "/home/me/runs",
        "input_sentence": "/ or \\",
        "hub_token": "secret",
        "deepspeed": "/home/me/ds.json",
        "fsdp_config": "/home/me/fsdp.json",
        "probe_prompts": "/home/me/probes.txt",
        "torchdynamo": "/home/me/x",
        "min_shared_tokens": 16,
        "target_modules": ["q_proj"],
    }
    assert portable_options(options, "base") == {
        "dataset_path": ["a.jsonl", "hub:owner/rows", "*.csv", "-", "b.jsonl"],
        "model_path": "base",
        "template": "t.jinja",
        "input_sentence": "/ or \\",
        "deepspeed": "ds.json",
        "fsdp_config": "fsdp.json",
        "probe_prompts": "probes.txt",
        "torchdynamo": "x",
        "min_shared_tokens": 16,
        "target_modules": ["q_proj"],
    }


def test_hardware_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.undo()
    assert module.hardware(torch.device("cpu")).endswith(f", {torch.get_num_threads()} CPU threads")


def test_licence_of_the_base_is_named_where_its_card_does(tmp_path: Path) -> None:
    assert module._license_of(tmp_path) is None
    (tmp_path / CARD).write_text("---\nlicense: apache-2.0\n---\n# base\n", encoding="utf-8")
    assert module._license_of(tmp_path) == "apache-2.0"
    text = model_card(dataclasses.replace(FACTS, base_license="apache-2.0"))
    assert "trained by Espalier 1. The base's licence: apache-2.0." in text
    assert "license" not in yaml.safe_load(text.split("---")[1])
