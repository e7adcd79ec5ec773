"""Nothing that comes with a model, an adapter or a data file is run, reaches out of its folder, or fills the memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from espalier.encode.template import ChatTemplate
from espalier.errors import AdapterError, ModelError, TemplateError
from espalier.model.load import check_weights, load_config, load_model, load_tokenizer, own_code
from espalier.model.load_adapter import load_adapter, recorded_base


@pytest.fixture
def base(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "base"))


@pytest.fixture
def adapter(adapter_good_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter_good_dir, tmp_path / "adapter"))


def change_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields))


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('true') }}",
    "{{ messages.append(1) }}",
    "{{ '%s'.format.__self__.__class__.mro() }}",
    "{% for i in range(10**12) %}{{ i }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 1 // 0 }}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_templates_run_in_a_sandbox(text: str, tiny_llama_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama_dir)
    tokenizer.chat_template = text
    template = ChatTemplate(tokenizer, "hostile", "a test")
    try:
        rendered = template.render([{"role": "user", "content": "a"}])
    except TemplateError:
        return
    assert "class" not in rendered  # an undefined name renders as nothing
    assert "root:" not in rendered


def test_a_models_own_code_is_named_and_not_run(base: Path) -> None:
    (base / "code.py").write_text("raise SystemExit('the code was run')\n")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "some/where--other.Model"}
    change_json(base / "config.json", model_type="wombat", auto_map=auto_map)
    with pytest.raises(ModelError) as error:
        load_config(base)
    assert error.value.what == (
        "its config cannot be read: the model brings its own code, which is not run unless you say so"
    )
    assert error.value.details == (
        "AutoConfig runs code.py (Config), 37 bytes",
        "AutoModelForCausalLM runs other.py (Model) of some/where",
    )


def test_a_tokenizers_own_code_is_named(base: Path) -> None:
    change_json(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["slow.Slow", None]})
    assert own_code(base) == ["AutoTokenizer runs slow.py (Slow)"]


def test_an_index_cannot_name_files_elsewhere(base: Path, tmp_path: Path) -> None:
    shutil.move(base / "model.safetensors", tmp_path / "model.safetensors")
    for name in ("../model.safetensors", str(tmp_path / "model.safetensors")):
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError) as error:
            check_weights(base)
        assert error.value.details == (f"model.safetensors.index.json: names {name!r}, which is not in the folder",)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 10**9}, "its settings ask for rank 1000000000, and its tensors have 32 rows at most"),
        ({"rank_pattern": {"q_proj": 10**9}}, "its settings ask for rank 1000000000"),
        ({"layer_replication": [[0, 10**9]]}, "its settings ask for layer_replication"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "its settings ask for megatron_config"),
        ({"target_modules": 5}, "the adapter does not fit this base"),
    ],
)
def test_hostile_settings_of_an_adapter(fields: Any, words: str, adapter: Path, tiny_llama_dir: Path) -> None:
    change_json(adapter / "adapter_config.json", **fields)
    model = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    with pytest.raises(AdapterError) as error:
        load_adapter(model, adapter)
    assert words in str(error.value)


@pytest.mark.parametrize("length", [0, 2**40, 2**64 - 1])
def test_hostile_safetensors_header(length: int, adapter: Path, tiny_llama_dir: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    model = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    with pytest.raises(AdapterError, match="the weights are damaged or cut off"):
        load_adapter(model, adapter)


def test_tensors_with_paths_for_names_stay_names(adapter: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    save_file({"../../escaped": torch.zeros(2)}, str(adapter / "adapter_model.safetensors"))
    model = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    with pytest.raises(AdapterError, match="0 of 8 tensors"):
        load_adapter(model, adapter)
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("record", ['{"base": [1]}', '{"base": {"name": 5, "fingerprint": [1]}}', "[" * 100_000])
def test_damaged_records(record: str, adapter: Path, tiny_llama_dir: Path) -> None:
    (adapter / "espalier.json").write_text(record)
    model = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    with pytest.raises(AdapterError):
        load_adapter(model, adapter)


def test_a_base_that_is_no_text_is_no_base(adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", base_model_name_or_path=["/etc"])
    assert recorded_base(adapter) is None
