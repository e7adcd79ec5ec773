"""`espalier verify` of what `merge` wrote: a model's folder, or GGUF files. Nothing is loaded whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from espalier.errors import ModelError
from espalier.model.load_adapter import read_record
from espalier.use.merge import COMPARED_POSITIONS, LOSS_WARNED
from espalier.use.merged_record import file_hashes
from espalier.use.verify import Finding, files_beside, same_prompts

# Other thread counts and machines add in another order; a changed model is off by far more.
SAME_LOG_PROB = 0.02


def verify_merged(path: str | Path, trust_remote_code: bool = False) -> list[Finding]:
    """All findings about a merged model's folder. Raises ModelError where it cannot be read at all."""
    from espalier.model.load import load_config, load_tokenizer
    from espalier.use.merged_weights import empty_base
    from espalier.use.shards import Shards

    folder = Path(path)
    record = read_record(folder)
    empty = empty_base(load_config(folder, trust_remote_code), trust_remote_code)
    shards = Shards(folder, getattr(empty, "all_tied_weights_keys", None))
    found = [*same_files(folder, record), *files_beside(folder)]
    tokenizer = load_tokenizer(folder, trust_remote_code)
    found += [*same_prompts(folder, tokenizer), *whole_tensors(empty, shards)]
    if not any(entry.level == "problem" for entry in found):
        found += same_answers(empty, shards, tokenizer, record)
    return [*found, *recorded_effect(record), *_servers(folder)]


def same_files(folder: Path, record: dict[str, Any]) -> list[Finding]:
    """Every file against the hash that was taken when it was written."""
    recorded = record.get("files")
    if not isinstance(recorded, dict):
        return [Finding("note", "no record of a merge (espalier.json): whether files have changed cannot be checked")]
    now = file_hashes(folder)
    found = [Finding("problem", f"{name} is missing") for name in recorded if name not in now]
    found += [
        Finding("problem", f"{name} is not the file that was written (sha256)")
        for name in recorded
        if name in now and now[name] != recorded[name]
    ]
    found += [Finding("note", f"{name} was added after the merge") for name in now if name not in recorded]
    if not any(entry.level == "problem" for entry in found):
        found.append(Finding("ok", f"all {len(recorded)} files are those that were written (sha256)"))
    return found


def whole_tensors(empty: Any, shards: Any) -> list[Finding]:
    """Every parameter of the config is in the files, of its shape and finite; read one at a time."""
    import torch

    wrong, count = [], 0
    for name, parameter in empty.named_parameters():
        count += 1
        try:
            tensor = shards.view(name)
        except KeyError:
            wrong.append(f"{name} is missing")
            continue
        if tensor.shape != parameter.shape:
            wrong.append(f"{name} is {list(tensor.shape)}, the config asks for {list(parameter.shape)}")
        elif not torch.isfinite(tensor).all():
            wrong.append(f"{name} is not finite")
    if wrong:
        return [Finding("problem", text) for text in wrong[:5]]
    return [Finding("ok", f"all {count} tensors are there, fit the config and are finite")]


def same_answers(empty: Any, shards: Any, tokenizer: Any, record: dict[str, Any]) -> list[Finding]:
    """The probe prompts have the ids that they had at the merge, and the model says after them what it said then."""
    from espalier.encode.template import resolve_template
    from espalier.use.merged_record import probe_of
    from espalier.use.probes import probe_prompts
    from espalier.use.streamed import streamed_logits

    probes = record.get("merged", {}).get("comparison", {}).get("probes")
    if not probes:
        return [Finding("note", "no record of what it said at the merge: not compared")]
    prompts = probe_prompts(tokenizer, resolve_template(tokenizer))
    if prompts != [probe["prompt"] for probe in probes]:
        return [Finding("problem", "the probe prompts have other token ids than at the merge")]
    seen = [
        probe_of(ids, logits[-1])
        for ids, logits in zip(prompts, streamed_logits(empty, shards, prompts, COMPARED_POSITIONS), strict=True)
    ]
    same = sum(now.likeliest == then["likeliest"] for now, then in zip(seen, probes, strict=True))
    off = max(abs(now.log_prob - then["log_prob"]) for now, then in zip(seen, probes, strict=True))
    level = "ok" if same == len(probes) and off < SAME_LOG_PROB else "problem"
    text = f"after {same} of {len(probes)} probe prompts it says what it said at the merge; log-probability off by"
    return [
        Finding("ok", f"the {len(probes)} probe prompts have the token ids that they had at the merge"),
        Finding(level, f"{text} {off:.2g} at most"),
    ]


def recorded_effect(record: dict[str, Any]) -> list[Finding]:
    """What the merge found about the adapter's effect; it is not measured again, since that needs the base."""
    seen = record.get("merged", {}).get("comparison")
    if not seen:
        return []
    text = (
        f"at the merge: logits {seen['effect']:.3g} from the base's at most; likeliest token of base + adapter at "
        f"{100 * seen['same_token']:.1f} %; rounding took {100 * min(1.0, seen['lost']):.2g} % of the adapter's effect"
    )
    level = "problem" if seen["effect"] == 0 else "note" if seen["lost"] > LOSS_WARNED else "ok"
    return [Finding(level, text)]


def _servers(folder: Path) -> list[Finding]:
    return [
        Finding("ok", f"Transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r})"),
        Finding("ok", f"vLLM: vllm serve {folder} --generation-config {folder}"),
        Finding("note", "llama.cpp, Ollama: they take GGUF: espalier merge --format gguf, from the adapter"),
    ]


def verify_gguf(path: str | Path) -> list[Finding]:
    """All findings about a .gguf file, or about every one in a folder. Raises ModelError for one that is damaged."""
    given = Path(path)
    folder = given if given.is_dir() else given.parent
    record = read_record(folder)
    found = same_files(folder, record)
    for file in sorted(folder.glob("*.gguf")) if given.is_dir() else [given]:
        found += _one_gguf(file, record)
    return found


def _one_gguf(file: Path, record: dict[str, Any]) -> Iterator[Finding]:
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # a cut file ends in any exception inside the package
        raise ModelError("this GGUF file is damaged or cut off", where=str(file), todo="Write it again.") from error
    broken = [tensor.name for tensor in reader.tensors if not _finite(tensor)]
    kind = f"{fields.get('general.architecture')} {fields.get('general.type', 'model')}"
    text = f"{file.name}: {kind}, {len(reader.tensors)} tensors"
    if broken:
        yield Finding("problem", f"{text}; not finite: {', '.join(broken[:5])}")
    else:
        yield Finding("ok", f"{text}, all finite")
    if fields.get("general.type") == "adapter":
        moved = sum(bool(tensor.data.any()) for tensor in reader.tensors if tensor.name.endswith("lora_b"))
        yield Finding("ok" if moved else "problem", f"{moved} of {len(reader.tensors) // 2} lora_b are not zero")
        yield Finding("ok", f"llama.cpp: llama-server -m BASE.gguf --lora {file} --jinja{_template_of(file)}")
        return
    yield from _gguf_vocabulary(fields, record)
    yield Finding("ok", f"llama.cpp: llama-server -m {file} --jinja")
    yield Finding("ok", f"LM Studio: lms import {file}")
    if file.with_name("Modelfile").is_file():
        yield Finding("ok", f"Ollama: ollama create {file.parent.resolve().name} -f {file.with_name('Modelfile')}")


def _gguf_vocabulary(fields: dict[str, Any], record: dict[str, Any]) -> Iterator[Finding]:
    template = fields.get("tokenizer.chat_template")
    trained = record.get("fingerprints", {}).get("template")
    if "tokenizer.ggml.tokens" not in fields or template is None:
        yield Finding("problem", "it holds no tokenizer or no chat template: a server will lay prompts out otherwise")
    elif trained is None:
        yield Finding("note", "tokenizer and chat template are in it; there is no record of training's to compare with")
    elif hashlib.sha256(template.encode()).hexdigest() != trained:
        yield Finding("problem", "its chat template is not that of training")
    else:
        yield Finding("ok", "tokenizer and chat template are in it, the template is that of training")
    named = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    ends = {int(end) for end in named if end is not None}
    missing = sorted(set(record.get("stop_ids", [])) - ends)
    if not ends:
        yield Finding("problem", "it names no end token: a server may never stop")
    elif missing:
        yield Finding("note", f"end tokens {sorted(ends)}; GGUF has no place for {missing}, which training lists too")
    else:
        yield Finding("ok", f"it names the end tokens {sorted(ends)}")


def _finite(tensor: Any) -> bool:
    import gguf
    import numpy as np

    return bool(np.isfinite(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).all())


def _template_of(file: Path) -> str:
    beside = file.with_name("chat_template.jinja")
    return f" --chat-template-file {beside}" if beside.is_file() else ""
