"""`espalier verify`: is this adapter whole, does it do anything, and who will serve it, by which command?"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.errors import AdapterError, EspalierError, ModelError
from espalier.model.adapter_settings import CONFIG, TAKE_FROM_BASE
from espalier.model.adapter_tensors import PREFIX, bare_name, parse_name, read_tensors
from espalier.model.load_adapter import LEGACY_WEIGHTS, WEIGHTS, check_adapter_folder, load_adapter, read_record
from espalier.use import vllm

# Layers that hold several of the usual ones: Phi 3, GPT-NeoX and Falcon, ChatGLM, Baichuan, GPT-2, MPT.
FUSED = frozenset({"qkv_proj", "gate_up_proj", "query_key_value", "dense_h_to_4h", "W_pack", "c_attn", "Wqkv"})
ANSWER_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. level: ok, note (nothing to do, or only for some servers), or problem."""

    level: str
    text: str


def verify(
    adapter: str | Path, model_path: str | None = None, trust_remote_code: bool = False, use_cpu: bool = False
) -> list[Finding]:
    """All findings about an adapter's folder, in the order of the report.

    Loads the base, since fingerprint, read-back and effect need it. Raises AdapterError and ModelError where the folder
    cannot be used at all: damaged, empty, for another base.
    """
    from espalier.encode.template import resolve_template
    from espalier.model.load import choose_device, choose_dtype, load_model
    from espalier.use.adapter_base import adapter_tokenizer, find_base

    folder = check_adapter_folder(adapter)
    base = find_base(folder, model_path)
    found = files_beside(folder)
    found.append(Finding("ok", f"base: {base.said}"))
    tokenizer, _ = adapter_tokenizer(folder, base, trust_remote_code)
    found += same_prompts(folder, tokenizer)
    template = resolve_template(tokenizer)
    device, _ = choose_device(use_cpu)
    model = load_model(base, device=device, dtype=choose_dtype(device)[0], trust_remote_code=trust_remote_code)
    notices: list[str] = []
    adapted = load_adapter(model, folder, notice=notices.append)
    recorded = bool(read_record(folder).get("base", {}).get("fingerprint"))
    found += [Finding("ok", "the base is the one that it was trained on (fingerprint)")] if recorded else []
    found.append(Finding("ok", "every tensor that the settings ask for is there, fits the base and is finite"))
    found += [Finding("note", notice) for notice in notices]
    found.append(effect(adapted, tokenizer, template))
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    names = tensor_names(folder)
    if any(name != PREFIX + bare_name(name) or name.endswith(".default.weight") for name in names):
        here = folder.resolve().name
        plain = f"espalier import {folder} --output_dir {here}-plain"
        text = "Transformers, vLLM: they find no tensor under these names, and answer as the base; make it plain"
        return [*found, Finding("note", f"{text}: {plain}"), _llama_cpp(here, folder, adapted.config)]
    whole = sorted({name.split(".")[-2] for name in names if parse_name(name) is None})
    if whole and not vllm.refusals(settings):  # tables that PEFT has saved beside the adapter (case D04)
        settings["modules_to_save"] = whole
    # Its path, not a hub name: the embedded model's weights are not quite those of the hub's.
    return [*found, *servers(settings, folder, str(base.path), adapted.config)]


def tensor_names(folder: Path) -> list[str]:
    """The names in an adapter's file, as they stand there."""
    return list(read_tensors(next(folder / name for name in (WEIGHTS, LEGACY_WEIGHTS) if (folder / name).is_file())))


def verify_trained(adapted: Any, folder: Path, base: str, trust_remote_code: bool = False) -> list[Finding]:
    """The same at the end of a run, on the model that is loaded: no base is read again, no answers are generated.

    adapted: the trained model; its tensors in the folder were compared with it before. base: what a server is given.
    """
    from espalier.encode.template import resolve_template
    from espalier.model.load import load_tokenizer

    tokenizer = load_tokenizer(folder, trust_remote_code)
    found = [*files_beside(folder), *same_prompts(folder, tokenizer)]
    found.append(effect(adapted, tokenizer, resolve_template(tokenizer), answers=False))
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return [*found, *servers(settings, folder, base, adapted.config)]


def checked_lines(adapted: Any, folder: Path, base: str, trust_remote_code: bool = False) -> list[str]:
    """`verify_trained` for the end of a run's report: what is not as it should be in full, the rest in one line."""
    try:
        found = verify_trained(adapted, folder, base, trust_remote_code)
    except EspalierError as error:  # the run is done and saved: it must not fail now
        return [f"warning: the finished adapter could not be checked: {error}"]
    shown = [f"{entry.level}: {entry.text}" for entry in found if entry.level != "ok"]
    effects = [entry.text for entry in found if entry.level == "ok" and "from the base's" in entry.text]
    return [*shown, f"checked: {'; '.join([*effects, 'who serves it, by which command'])}: espalier verify {folder}"]


def files_beside(folder: Path) -> list[Finding]:
    """Tokenizer, template and stop tokens must travel with the adapter (cases D11, D14)."""
    found = []
    named = "chat_template" in _json(folder / "tokenizer_config.json")
    has_template = named or (folder / "chat_template.jinja").is_file()
    for there, name, otherwise in (
        ((folder / "tokenizer.json").is_file(), "tokenizer.json", "servers will use the base's tokenizer"),
        (has_template, "chat template", "servers will use the base's own layout"),
    ):
        found.append(Finding("ok", f"{name} is beside it") if there else Finding("problem", f"no {name}: {otherwise}"))
    stops = read_record(folder).get("stop_ids", [])
    listed = _json(folder / "generation_config.json").get("eos_token_id")
    listed = [listed] if isinstance(listed, int) else listed or []
    missing = sorted(set(stops) - set(listed))
    if not listed:
        found.append(Finding("problem", "no generation_config.json with end tokens: a server may never stop"))
    elif missing:
        found.append(Finding("problem", f"generation_config.json lacks end tokens {missing}: a server may not stop"))
    else:
        found.append(Finding("ok", f"generation_config.json lists the end tokens {listed}"))
    return found


def same_prompts(folder: Path, tokenizer: Any) -> list[Finding]:
    """Tokenizer and template are those of training, so that every prompt has training's ids (case D12)."""
    recorded = read_record(folder).get("fingerprints")
    if not isinstance(recorded, dict):
        return [Finding("note", "no record of training's tokenizer and template: equal prompts cannot be checked")]
    now = {"tokenizer": tokenizer.backend_tokenizer.to_str(), "template": str(tokenizer.chat_template)}
    other = [name for name, text in now.items() if recorded.get(name) != hashlib.sha256(text.encode()).hexdigest()]
    if other:
        return [Finding("problem", f"not those of training: {' and '.join(other)}; prompts get other tokens")]
    return [Finding("ok", "tokenizer and template are those of training: the same prompts, token for token")]


def effect(adapted: Any, tokenizer: Any, template: Any, answers: bool = True) -> Finding:
    """Base against adapter on the probe prompts: largest logit difference and greedy answers (case D15).

    answers: False compares the likeliest next token instead of whole answers: two passes over each prompt.
    """
    import torch

    from espalier.encode.stops import generation_stop_ids
    from espalier.use.generate import generate
    from espalier.use.probes import probe_prompts

    prompts = probe_prompts(tokenizer, template)
    stops = generation_stop_ids(tokenizer, template)
    if not prompts:
        return Finding("note", "the template refuses every probe prompt: the effect cannot be shown")

    def judged() -> tuple[list[Any], list[tuple[int, ...]]]:
        with torch.no_grad():
            last = [
                adapted(input_ids=torch.tensor([ids], device=adapted.device)).logits[0, -1].float() for ids in prompts
            ]
        if not answers:
            return last, [(int(logits.argmax()),) for logits in last]
        generated = generate(adapted, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, stop_ids=stops)
        return last, [answer.ids for answer in generated]

    was_training = adapted.training
    adapted.eval()
    with adapted.disable_adapter():
        base_logits, base_said = judged()
    logits, said = judged()
    adapted.train(was_training)
    width = len(base_logits[0])
    largest = max(float((ours[:width] - theirs).abs().max()) for ours, theirs in zip(logits, base_logits, strict=True))
    differ = sum(a != b for a, b in zip(said, base_said, strict=True))
    what = "greedy answers differ" if answers else "likeliest next tokens differ"
    text = f"{differ} of {len(prompts)} {what} from the base's; largest logit difference {largest:.3g}"
    return Finding("ok" if largest > 0 else "problem", text)


def servers(settings: dict[str, Any], folder: Path, base: str, config: Any = None) -> list[Finding]:
    """Who serves this adapter, and by which command (case D07).

    settings: adapter_config.json. base: what a server is given. config: the base's, for what depends on its type.
    """
    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(TAKE_FROM_BASE):
        plain = f"espalier import {folder} --output_dir {folder.resolve().name}-plain"
        text = f"vLLM, llama.cpp, merging: {start} has changed the base, which they do not know; make it plain: {plain}"
        return [Finding("note", text)]
    reasons = vllm.refusals(settings)
    name = folder.resolve().name
    merged = f"{name}-merged"
    found = [
        Finding(
            "ok",
            f"Transformers: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {str(folder)!r})",
        )
    ]
    merge_first = f"espalier merge --adapter {folder} --output_dir {merged}"
    if reasons:
        found.append(Finding("note", f"vLLM: does not take {' or '.join(reasons)}; merge first: {merge_first}"))
        found.append(Finding("ok", f"vLLM, merged: vllm serve {merged} --generation-config {merged}"))
    else:
        rank = vllm.largest_rank(settings)
        command = vllm.command(base, {name: folder}, rank)
        if command is None:
            found.append(Finding("note", f"vLLM: rank {rank} is over its largest, {vllm.RANKS[-1]}: {merge_first}"))
        elif rank > vllm.DEFAULT_RANK:
            text = f"vLLM: rank {rank} is over its default limit of {vllm.DEFAULT_RANK}, so the limit is set"
            found.append(Finding("note", text))
        if command is not None:
            found.append(Finding("ok", f"vLLM: {command}"))
        fused = sorted(FUSED.intersection(_last_names(settings.get("target_modules"))))
        if fused:
            text = (
                f"vLLM: several layers in one ({', '.join(fused)}) are taken for some models only; if not, merge first"
            )
            found.append(Finding("note", f"{text}: {merge_first}"))
    return [*found, _llama_cpp(name, folder, config)]


def _llama_cpp(name: str, folder: Path, config: Any) -> Finding:
    from espalier.use.gguf import family_of

    if config is not None:
        try:
            family_of(config)
        except ModelError as error:
            return Finding("note", f"llama.cpp: {error}")
    gguf = f"{name}-gguf"
    return Finding(
        "ok",
        f"llama.cpp: espalier merge --adapter {folder} --output_dir {gguf} --format gguf && "
        f"llama-server -m {gguf}/model-f16.gguf --jinja",
    )


def _last_names(target_modules: Any) -> set[str]:
    """The last part of each name; for a pattern, every word in it."""
    if isinstance(target_modules, str):
        return set(re.findall(r"\w+", target_modules))
    return {str(name).rsplit(".", 1)[-1] for name in target_modules or ()}


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError("cannot be read", where=str(file), todo="Copy it again.") from error
    return fields if isinstance(fields, dict) else {}
