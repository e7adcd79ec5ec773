"""What `espalier verify` says of merged folders and GGUF files: whole, changed, cut, without effect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from espalier.cli import app
from espalier.errors import ModelError
from espalier.use.export import export_gguf
from espalier.use.merge import merge
from espalier.use.verify import Finding
from espalier.use.verify_merged import verify_gguf, verify_merged
from whole_adapter import whole

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def merged(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("merged")
    merge(whole(shared, root / "a"), root / "m", str(shared / "tiny-llama"))
    return root / "m"


def problems(found: list[Finding]) -> list[str]:
    return [entry.text for entry in found if entry.level == "problem"]


def changed_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """`name` replaced, or taken out; the record's hashes are brought up to date, so that only the tensor is wrong."""
    from espalier.use.merged_record import file_hashes

    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / WEIGHTS)
    record = json.loads((folder / "espalier.json").read_text())
    (folder / "espalier.json").write_text(json.dumps(record | {"files": file_hashes(folder)}))


def test_whole_folder(merged: Path) -> None:
    found = verify_merged(merged)
    assert {entry.level for entry in found[:-1]} == {"ok"}
    texts = [entry.text for entry in found]
    assert texts[0] == "all 6 files are those that were written (sha256)"
    assert "generation_config.json lists the end tokens [1]" in texts
    assert "tokenizer and template are those of training: the same prompts, token for token" in texts
    assert "all 21 tensors are there, fit the config and are finite" in texts
    assert "the 4 probe prompts have the token ids that they had at the merge" in texts
    assert any(text.startswith("after 4 of 4 probe prompts it says what it said at the merge") for text in texts)
    effect = json.loads((merged / "espalier.json").read_text())["merged"]["comparison"]["effect"]
    assert effect > 1
    assert any(text.startswith(f"at the merge: logits {effect:.3g} from the base's at most; ") for text in texts)
    assert f"vLLM: vllm serve {merged} --generation-config {merged}" in texts


def test_changed_and_missing_files_are_named(merged: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "m"))
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "notes.txt").write_text("mine")
    found = verify_merged(folder)
    assert problems(found)[:3] == [
        "chat_template.jinja is missing",
        "config.json is not the file that was written (sha256)",
        "no chat template: servers will use the base's own layout",
    ]
    assert Finding("note", "notes.txt was added after the merge") in found


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "model.norm.weight is missing"),
        (torch.ones(31), "model.norm.weight is [31], the config asks for [32]"),
        (torch.full((32,), torch.nan), "model.norm.weight is not finite"),
    ],
)
def test_bad_tensor_is_named(merged: Path, tmp_path: Path, value: torch.Tensor | None, said: str) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "m"))
    changed_weights(folder, "model.norm.weight", value)
    assert problems(verify_merged(folder)) == [said]


def test_other_weights_say_something_else(merged: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "m"))
    changed_weights(folder, "model.norm.weight", torch.linspace(-2, 2, 32))
    said = problems(verify_merged(folder))
    assert len(said) == 1
    assert said[0].startswith("after 0 of 4 probe prompts it says what it said at the merge; ")


def test_folder_of_another_tool(shared: Path) -> None:
    found = verify_merged(shared / "tiny-llama")
    assert problems(found) == []
    assert [entry.text for entry in found if entry.level == "note"][:2] == [
        "no record of a merge (espalier.json): whether files have changed cannot be checked",
        "no record of training's tokenizer and template: equal prompts cannot be checked",
    ]


def test_gguf(shared: Path, tmp_path: Path) -> None:
    adapter = whole(shared, tmp_path / "a")
    export_gguf(adapter, tmp_path / "g", str(shared / "tiny-llama"), "q8_0")
    file = tmp_path / "g" / "model-q8_0.gguf"
    found = verify_gguf(tmp_path / "g")
    assert {entry.level for entry in found} == {"ok"}
    texts = [entry.text for entry in found]
    assert f"{file.name}: llama model, 21 tensors, all finite" in texts
    assert "tokenizer and chat template are in it, the template is that of training" in texts
    assert "it names the end tokens [1]" in texts
    assert f"llama.cpp: llama-server -m {file} --jinja" in texts
    record = json.loads((tmp_path / "g" / "espalier.json").read_text())
    record["fingerprints"]["template"] = "0" * 64
    record["stop_ids"] = [1, 2]
    (tmp_path / "g" / "espalier.json").write_text(json.dumps(record))
    found = verify_gguf(file)
    assert problems(found) == ["its chat template is not that of training"]
    assert Finding("note", "end tokens [1]; GGUF has no place for [2], which training lists too") in found
    with open(file, "r+b") as cut:
        cut.truncate(1000)
    with pytest.raises(ModelError, match="damaged or cut off"):
        verify_gguf(file)


def test_gguf_lora(shared: Path, tmp_path: Path) -> None:
    export_gguf(whole(shared, tmp_path / "a"), tmp_path / "g", str(shared / "tiny-llama"), None)
    found = verify_gguf(tmp_path / "g")
    assert {entry.level for entry in found} == {"ok"}
    file, template = tmp_path / "g" / "adapter.gguf", tmp_path / "g" / "chat_template.jinja"
    assert found[-2].text == "4 of 4 lora_b are not zero"
    command = f"llama-server -m BASE.gguf --lora {file} --jinja --chat-template-file {template}"
    assert found[-1].text == f"llama.cpp: {command}"
    assert template.read_text() == (shared / "tiny-llama" / "chat_template.jinja").read_text()


def test_command_tells_them_apart(merged: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(merged)])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("ok       all 6 files are those that were written (sha256)\n")
    folder = Path(shutil.copytree(merged, tmp_path / "m"))
    changed_weights(folder, "model.norm.weight", None)
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 1
    assert "problem  model.norm.weight is missing" in result.output
    result = CliRunner().invoke(app, ["verify", str(merged), "--model_path", "x"])
    assert "a merged model is compared with no base" in str(result.exception)
