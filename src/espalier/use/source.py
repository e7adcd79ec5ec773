"""What a merge reads: an adapter (or a weighted sum of some) and its base, found, checked and opened, not loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.encode.stops import generation_stop_ids
from espalier.encode.template import ChatTemplate, resolve_template
from espalier.errors import AdapterError, ModelError
from espalier.model.fingerprint import base_fingerprint, fingerprint_difference
from espalier.model.load import ModelPath, load_config, sane_generation_config
from espalier.model.load_adapter import NO_FINGERPRINT, check_adapter_folder, read_record, to_stderr
from espalier.use.adapter_base import adapter_tokenizer, find_base
from espalier.use.dequantize import dequantized, is_stored_packed
from espalier.use.merged_weights import MergedWeights, adapted_model, empty_base
from espalier.use.shards import NamedTensors, Shards, safetensors_folder
from espalier.use.weighted_sum import weighted_sum

Adapters = str | Path | Mapping[str | Path, float]


@dataclass(frozen=True)
class Source:
    """An adapter and its base, opened for reading: nothing is loaded but the adapter's own tensors."""

    adapter: Path
    base: ModelPath
    config: Any
    tokenizer: Any
    template: ChatTemplate
    shards: Shards
    weights: MergedWeights
    adapted: Any
    notes: tuple[str, ...]
    trust_remote_code: bool


def open_source(
    adapter: Adapters, model_path: str | None, scratch: Path, trust_remote_code: bool = False, dequantize: bool = False
) -> Source:
    """Find and check all that a merge needs. `scratch`: a folder for what has to be unpacked or summed first.

    dequantize: unpack a base that is stored in 4 or 8 bits, which is refused else.
    """
    weights_of = dict(adapter) if isinstance(adapter, Mapping) else {adapter: 1.0}
    folders = [check_adapter_folder(each) for each in weights_of]
    folder = folders[0]
    base = find_base(folder, model_path)
    config = load_config(base, trust_remote_code)
    if is_stored_packed(base, config) and not dequantize:
        raise ModelError(
            "the base's weights are quantised: a sum rounded to so few bits is not the adapter that was trained",
            where=base.said,
            todo="Give the 16-bit original with --model_path, or merge into these weights unpacked, by --dequantize.",
        )
    note: str | None
    if dequantize:
        where, note = scratch / "base", dequantized(base, config, folders, scratch / "base")
    else:
        where, note = safetensors_folder(base, scratch / "base")
    if note is not None:
        config = load_config(where, trust_remote_code)
    tokenizer, notices = adapter_tokenizer(folder, base, trust_remote_code)
    notes = [f"base: {base.said}", *([] if note is None else [note]), *notices]
    held = {str(read_record(each).get("base", {}).get("held_as")) for each in folders} - {"None"}
    if held and not dequantize:
        notes.append(
            f"trained on the base held as {' and '.join(sorted(held))}, merged into its own weights; --dequantize "
            "takes those that were trained on"
        )
    empty = empty_base(config, trust_remote_code)
    shards = Shards(where, getattr(empty, "all_tied_weights_keys", None))
    if not dequantize:
        _check_bases(folders, base, empty, shards)
    if isinstance(adapter, Mapping):
        folder = weighted_sum(
            dict(zip(folders, weights_of.values(), strict=True)), config, scratch / "sum", trust_remote_code
        )
        notes.append(f"the sum of {' and '.join(f'{weight:g} x {each}' for each, weight in weights_of.items())}")
    adapted = adapted_model(config, folder, trust_remote_code=trust_remote_code, notice=notes.append)
    weights = MergedWeights(shards, adapted)
    template = resolve_template(tokenizer)
    return Source(folder, base, config, tokenizer, template, shards, weights, adapted, tuple(notes), trust_remote_code)


def _check_bases(folders: Sequence[Path], base: ModelPath, empty: Any, shards: Shards) -> None:
    found = None
    for folder in folders:
        recorded = read_record(folder).get("base", {}).get("fingerprint")
        if not recorded:
            to_stderr(f"{folder}: {NO_FINGERPRINT}")
            continue
        found = found or base_fingerprint(NamedTensors(empty, shards))
        difference = fingerprint_difference(recorded, found)
        if difference is not None:
            raise AdapterError(
                f"the adapter was trained on another base: {difference}",
                where=str(folder),
                todo=f"Give the base that it was trained on as --model_path; this is {base.said}.",
            )


def stored_dtype(source: Source) -> str:
    """The dtype of the base's tensors that the adapter changes, as the files (not the config) say it."""
    return str(source.shards[source.weights.changed[0]].dtype).removeprefix("torch.")


def stop_ids(source: Source) -> list[int]:
    """Every id at which an answer ends: what training recorded, the template's turn ends, both generation configs'."""
    found = set(read_record(source.adapter).get("stop_ids", []))
    own = source.adapter if (source.adapter / "generation_config.json").is_file() else None
    for place in (own, source.shards.folder):
        if place is not None:
            generation, _ = sane_generation_config(place)
            found.update(generation_stop_ids(source.tokenizer, source.template, generation.eos_token_id))
    return sorted(found)
