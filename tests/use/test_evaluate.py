"""`espalier evaluate`: figures, JSON, page and refusals, through the command's own function."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import run, write_rows

from espalier.errors import AdapterError, DataError, UsageError
from espalier.model.fingerprint import base_fingerprint
from espalier.model.load import load_model, load_tokenizer
from espalier.model.load_adapter import load_adapter
from espalier.use.evaluate import run_evaluate

METRIC = {"base", "adapter", "difference", "verdict"}
NASTY = "<script>'& 梨 🍐"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, adapter_good_dir: Path, tiny_llama_dir: Path) -> Path:
    """An adapter's folder as a run of ours leaves it."""
    folder = Path(shutil.copytree(adapter_good_dir, tmp_path_factory.mktemp("a") / "run"))
    load_tokenizer(tiny_llama_dir).save_pretrained(folder)
    shutil.copy(tiny_llama_dir / "generation_config.json", folder)
    record = {
        "base": {"name": str(tiny_llama_dir), "fingerprint": base_fingerprint(tiny_llama_dir)},
        "stop_ids": [1],
    }
    (folder / "espalier.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "held.jsonl"
    shared = "Name the fruit, a pear or a plum, in one word.\n"
    made = [{"instruction": f"{shared}{i} plums", "output": f"plum {i}"} for i in range(9)]
    made.append({"instruction": f"{shared}{NASTY}", "output": json.dumps({"fruit": "<b>", "count": 2})})
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def evaluate(adapter: Path, *files: Path | str, **options: Any) -> int:
    settings: dict[str, Any] = {
        "answers": False,
        "max_new_tokens": None,
        "as_json": True,
        "html": None,
        "draws": 200,
        "seed": 0,
        "model_path": None,
        "use_cpu": True,
        "tree": True,
        "trust_remote_code": False,
    }
    return run_evaluate(str(adapter), [str(file) for file in files], **{**settings, **options})


def result_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def plain_losses(model: Any, folder: Path, rows: Path) -> tuple[float, float]:
    """(mean loss, token accuracy) by transformers alone, a row at a time; labels follow the prompt of the template."""
    tokenizer = load_tokenizer(folder)
    loss = count = correct = 0.0
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        end = max(i for i, token in enumerate(ids) if token == 1) + 1
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : end - 1]
        wanted = torch.tensor(ids[len(prompt) : end])
        loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
        count += len(wanted)
        correct += int((logits.argmax(-1) == wanted).sum())
    return loss / count, correct / count


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espalier.model.load.choose_dtype", lambda *a: (torch.float32, "test"))


@pytest.mark.parametrize("tree", [True, False])
def test_losses_are_those_of_a_plain_loop(
    adapter: Path, rows: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str], tree: bool
) -> None:
    assert evaluate(adapter, rows, tree=tree) == 0
    found = result_of(capsys)
    model: Any = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    wanted = {"base": plain_losses(model, adapter, rows)}
    wanted["adapter"] = plain_losses(load_adapter(model, adapter), adapter, rows)
    for who, (loss, accuracy) in wanted.items():
        metrics = {name: metric[who]["value"] for name, metric in found["metrics"].items()}
        assert metrics == {
            "loss": pytest.approx(loss, rel=1e-5),
            "perplexity": pytest.approx(math.exp(loss), rel=1e-5),
            "token_accuracy": pytest.approx(accuracy),
        }
    assert wanted["base"][0] != pytest.approx(wanted["adapter"][0], rel=1e-4)
    assert (found["tokens"]["computed"] < found["tokens"]["logical"] / 2) == tree


def test_json_holds_everything(adapter: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(adapter, rows, answers=True, max_new_tokens=6)
    found = result_of(capsys)
    assert list(found) == [
        "espalier_version", "adapter", "base", "dataset", "device", "dtype", "rows", "tokens", "bootstrap", "metrics",
        "generation", "json_fields", "results", "seconds",
    ]  # fmt: skip
    assert found["dataset"] == [str(rows)]
    assert found["rows"] == {"evaluated": 10, "left_out": 0}
    assert found["bootstrap"] == {"draws": 200, "seed": 0, "confidence": 0.95}
    names = ["loss", "perplexity", "token_accuracy", "exact_match", "json_valid", "json_fields"]
    assert list(found["metrics"]) == names
    for name, metric in found["metrics"].items():
        assert set(metric) == METRIC
        value, low, high = (metric["difference"][key] for key in ("value", "low", "high"))
        assert value == pytest.approx(metric["adapter"]["value"] - metric["base"]["value"], rel=1e-9)
        if name.startswith("json"):  # one row has a JSON answer
            assert (low, high, metric["verdict"]) == (None, None, "too few rows")
        else:
            assert low <= value <= high
    assert found["generation"]["max_new_tokens"] == 6
    assert found["generation"]["stop_ids"] == [1]
    assert found["json_fields"] == {
        "fruit": {"rows": 1, "base": 0, "adapter": 0},
        "count": {"rows": 1, "base": 0, "adapter": 0},
    }
    assert [(row["file"], row["line"]) for row in found["results"]] == [(str(rows), line) for line in range(1, 11)]
    assert found["results"][3]["wanted"] == " plum 3"
    assert found["results"][3]["base_answer"] is not None
    weights = [row["base_loss"] for row in found["results"]]
    assert np.mean(weights) == pytest.approx(found["metrics"]["loss"]["base"]["value"], rel=0.2)


def test_the_table_says_what_is_chance(
    adapter: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    evaluate(adapter, rows, answers=True, as_json=False)
    out, err = capsys.readouterr()
    assert "10 held-out rows" in out
    assert "within chance" in out  # neither has one exact answer
    assert "Within chance: that of the difference holds 0." in out
    assert "answers of the adapter were cut off at" in out
    assert "the longest wanted one has" in err


def test_page_is_escaped_and_stands_alone(
    adapter: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    evaluate(adapter, rows, html=str(page))
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;&#x27;&amp; 梨 🍐" in text
    assert "src=" not in text
    assert "http" not in text
    losses = [(row["base_loss"], row["adapter_loss"]) for row in result_of(capsys)["results"]]
    assert f"Better with the adapter: {sum(a < b for b, a in losses)}" in text
    assert f"Worse with the adapter: {sum(a > b for b, a in losses)}" in text
    assert text.count("Name the fruit") == 1  # what all prompts begin with is shown once


def test_refusals_come_before_the_model(
    adapter: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("espalier.model.load.load_model", None)
    with pytest.raises(UsageError, match="held none out"):
        evaluate(adapter)
    with pytest.raises(UsageError) as wrong:
        evaluate(adapter, rows, max_new_tokens=0, draws=3)
    assert wrong.value.details == (
        "--max_new_tokens 0: must be 1 or more",
        "--max_new_tokens 0: changes nothing without --generate",
        "--draws 3: must be 100 or more for an interval",
    )
    with pytest.raises(DataError, match="its folder is not there"):
        evaluate(adapter, rows, html=str(tmp_path / "none" / "page.html"))
    with pytest.raises(AdapterError):
        evaluate(tmp_path, rows)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": ""}\nno json\n')
    with pytest.raises(DataError, match="2 of 3 rows cannot be used") as named:
        evaluate(adapter, bad)
    assert [detail.split(": ")[0] for detail in named.value.details] == [f"{bad}:2", f"{bad}:3"]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="empty"):
        evaluate(adapter, empty)
    with pytest.raises(DataError, match=r"none\.jsonl|no such|not found"):
        evaluate(adapter, tmp_path / "none.jsonl")


def test_bad_rows_are_skipped_where_asked(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = tmp_path / "some.jsonl"
    some.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": ""}\n')
    evaluate(adapter, some, on_bad_row="skip")
    assert result_of(capsys)["rows"] == {"evaluated": 1, "left_out": 1}


def test_a_run_s_own_rows(tmp_path: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a file: the rows that the run held out, found again from its split; the loss is that of its last
    evaluation. Of changed files nothing is evaluated."""
    rows = write_rows(tmp_path / "rows.jsonl")
    folder = tmp_path / "run"
    result, _ = run(
        tiny_llama_dir, rows, folder, max_steps=2, eval_fraction=0.3, eval_strategy="steps", eval_steps=2, seed=3
    )
    capsys.readouterr()
    evaluate(folder)
    found = result_of(capsys)
    assert found["dataset"] == [str(rows)]
    assert found["metrics"]["loss"]["adapter"]["value"] == pytest.approx(result.metrics["eval_loss"], rel=1e-5)
    assert 3 <= found["rows"]["evaluated"] <= 5
    write_rows(rows, 13)
    with pytest.raises(DataError, match="no longer the rows of the run"):
        evaluate(folder)
