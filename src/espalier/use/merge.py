"""`espalier merge`: base + adapter as one model, written shard by shard, read back and compared before it is there."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.encode.stops import generation_stop_ids
from espalier.encode.template import ChatTemplate, resolve_template
from espalier.errors import AdapterError, EspalierError, ModelError, UsageError
from espalier.model.fingerprint import base_fingerprint, fingerprint_difference
from espalier.model.load import ModelPath, load_config, load_tokenizer, sane_generation_config
from espalier.model.load_adapter import check_adapter_folder, read_record, to_stderr
from espalier.use.chat import find_base
from espalier.use.merged_record import Probe, probe_of, write_record
from espalier.use.merged_weights import MergedWeights, adapted_model, empty_base
from espalier.use.new_folder import new_folder
from espalier.use.probes import probe_prompts
from espalier.use.shards import INDEX, NamedTensors, Shards, safetensors_folder, write_safetensors
from espalier.use.streamed import streamed_logits

if TYPE_CHECKING:
    import torch

# Above this share of the adapter's effect, rounding is worth a warning.
LOSS_WARNED = 0.1
COMPARED_POSITIONS = 32


@dataclass(frozen=True, slots=True)
class Comparison:
    """The merged model, read from disk, against base + adapter: both in float32, on `num_positions` places of prompts.

    difference: largest |logit difference|. effect: that between adapter and base. lost: root mean square of the
    difference over that of the effect. same_token: share of places with the same likeliest token. probes: what the
    merged model says after each prompt.
    """

    num_prompts: int
    num_positions: int
    difference: float
    effect: float
    lost: float
    same_token: float
    probes: tuple[Probe, ...]


@dataclass(frozen=True, slots=True)
class Merged:
    """What `merge` has written. unchanged: tensor -> share of its values that rounding left as the base's."""

    folder: Path
    dtype: str
    unchanged: dict[str, float]
    comparison: Comparison
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report, a sentence a line."""
        seen = self.comparison
        found = [
            f"merged into {self.folder} ({self.dtype}); {len(self.unchanged)} tensors changed",
            *self.notes,
            f"read back and compared with base + adapter on {seen.num_prompts} prompts ({seen.num_positions} places): "
            f"largest logit difference {seen.difference:.2g}, the adapter's own effect is {seen.effect:.2g}; "
            f"the likeliest token is the same at {100 * seen.same_token:.1f} %",
        ]
        if seen.effect == 0:
            found.append("warning: the adapter changes no logit of these prompts")
        elif seen.lost > LOSS_WARNED:
            name = max(self.unchanged, key=lambda key: self.unchanged[key])
            found.append(
                f"warning: rounding to {self.dtype} takes {100 * min(1.0, seen.lost):.0f} % of the adapter's effect: "
                f"{100 * self.unchanged[name]:.0f} % of the weights of {name} do not change at all. "
                "--dtype float32 keeps it."
            )
        return found


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


def merge(
    adapter: str | Path,
    output_dir: str | Path,
    model_path: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Write base + adapter to `output_dir`, which appears only when it was read back and compared.

    dtype: that of the weights written: float32, bfloat16 or float16; None keeps the base's own. Raises RunFolderError
    where the folder is taken or the disk does not hold it, AdapterError and ModelError for what does not fit or cannot
    be merged.
    """
    output = Path(output_dir)
    with new_folder(output) as (scratch, ready):
        source = open_source(adapter, model_path, scratch / "base", trust_remote_code)
        unchanged = write_weights(source, ready, dtype)
        write_companions(source, ready, dtype)
        comparison = compare(source, ready)
        _check_comparison(comparison, dtype or _stored_dtype(source), output)
        about = {"dtype": dtype or _stored_dtype(source), "comparison": asdict(comparison)}
        write_record(ready, read_record(source.adapter), stop_ids(source), about)
    return Merged(output, dtype or _stored_dtype(source), unchanged, comparison, source.notes)


def run_merge(
    adapter: str,
    output_dir: str,
    model_path: str | None,
    dtype: str | None,
    format: str,
    quantize: str | None,
    trust_remote_code: bool,
) -> int:
    """The command: merges, prints the report, returns the exit code."""
    from espalier.model.embedded import quiet_transformers
    from espalier.use.export import export_gguf

    if dtype is not None and format != "folder":
        raise UsageError(f"--dtype {dtype} has no effect on --format {format}", todo="Say it with --quantize.")
    if quantize is not None and format != "gguf":
        raise UsageError(f"--quantize {quantize} has no effect on --format {format}", todo="Leave it out.")
    with quiet_transformers():
        if format == "folder":
            lines = merge(adapter, output_dir, model_path, dtype, trust_remote_code).lines()
        else:
            kind = None if format == "gguf-lora" else quantize or "f16"
            lines = export_gguf(adapter, output_dir, model_path, kind, trust_remote_code)
    for line in lines:
        print(line)
    return 0


def open_source(adapter: str | Path, model_path: str | None, scratch: Path, trust_remote_code: bool = False) -> Source:
    """Find and check all that a merge needs. `scratch`: where a base that is no safetensors folder is unpacked."""
    folder = check_adapter_folder(adapter)
    base = find_base(folder, model_path)
    config = load_config(base, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None and base.kind != "gguf":
        raise ModelError(
            "the base's weights are quantised: a sum rounded to so few bits is not the adapter that was trained",
            where=base.said,
            todo="Give the 16-bit original with --model_path.",
        )
    where, note = safetensors_folder(base, scratch)
    if note is not None:
        config = load_config(where, trust_remote_code)
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = load_tokenizer(folder if own else base, trust_remote_code)
    notes = [] if note is None else [note]
    empty = empty_base(config, trust_remote_code)
    shards = Shards(where, getattr(empty, "all_tied_weights_keys", None))
    _check_base(folder, base, empty, shards)
    adapted = adapted_model(config, folder, trust_remote_code=trust_remote_code, notice=notes.append)
    weights = MergedWeights(shards, adapted)
    template = resolve_template(tokenizer)
    return Source(folder, base, config, tokenizer, template, shards, weights, adapted, tuple(notes), trust_remote_code)


def _check_base(folder: Path, base: ModelPath, empty: Any, shards: Shards) -> None:
    recorded = read_record(folder).get("base", {}).get("fingerprint")
    if not recorded:
        to_stderr(
            f"{folder}: this adapter carries no fingerprint of its base, so whether the base is right is unchecked"
        )
        return
    difference = fingerprint_difference(recorded, base_fingerprint(NamedTensors(empty, shards)))
    if difference is not None:
        raise AdapterError(
            f"the adapter was trained on another base: {difference}",
            where=str(folder),
            todo=f"Give the base that it was trained on as --model_path; this is {base.said}.",
        )


def write_weights(source: Source, folder: Path, dtype: str | None) -> dict[str, float]:
    """The base's files again, each with its changed tensors; one tensor is in memory at a time.

    Returns for each changed tensor the share of its values that are the base's own after rounding.
    """
    shards, weights = source.shards, source.weights
    changed = {shards.stored_name(name): name for name in weights.changed if name not in weights.untied}
    unchanged: dict[str, float] = {}
    places: dict[str, str] = {}
    last = list(shards.files)[-1]

    def final(stored: str) -> torch.Tensor:
        name = changed.get(stored, stored)
        before = shards[name]
        after = _rounded(weights[name], before.dtype, dtype)
        if name in weights.changed:
            unchanged[name] = _same_share(before, after)
        return after

    for file, names in shards.files.items():
        names = [*names, *(weights.untied if file == last else ())]
        shapes = {stored: _written_form(weights, changed.get(stored, stored), dtype) for stored in names}
        write_safetensors(folder / file, shapes, final)
        places |= dict.fromkeys(names, file)
    if len(shards.files) > 1:
        total = sum((folder / file).stat().st_size for file in shards.files)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return unchanged


def _written_form(weights: MergedWeights, name: str, dtype: str | None) -> torch.Tensor:
    """An empty tensor of the shape and dtype that will be written."""
    import torch

    view = weights.base.view(name)
    shape = weights.tables[name].shape if name in weights.tables else view.shape
    return _rounded(torch.empty(shape, dtype=view.dtype, device="meta"), view.dtype, dtype)


def _rounded(tensor: torch.Tensor, stored: torch.dtype, dtype: str | None) -> torch.Tensor:
    import torch

    if not tensor.is_floating_point():
        return tensor
    return tensor.to(getattr(torch, dtype) if dtype else stored)


def _same_share(before: torch.Tensor, after: torch.Tensor) -> float:
    if before.shape != after.shape:  # rows were added
        return 0.0
    return float((before.to(after.dtype) == after).float().mean())


def _stored_dtype(source: Source) -> str:
    """The dtype of the base's tensors that the adapter changes, as the files (not the config) say it."""
    return str(source.shards[source.weights.changed[0]].dtype).removeprefix("torch.")


def _check_comparison(seen: Comparison, dtype: str, output: Path) -> None:
    """In float32 nothing but the order of additions may differ. Raises AdapterError."""
    if dtype == "float32" and seen.difference > 1e-3 * max(1.0, seen.effect):
        raise AdapterError(
            f"the merged model does not compute what base + adapter does: logits differ by {seen.difference:.3g}",
            where=str(output),
            todo="Nothing was written. Please report this with the adapter's adapter_config.json.",
        )


def write_companions(source: Source, folder: Path, dtype: str | None) -> None:
    """config, tokenizer with template, generation config with every turn end (case D14), the model's code."""
    config = copy.deepcopy(source.config)
    config.dtype = dtype or _stored_dtype(source)
    config.get_text_config().vocab_size = source.weights.vocab_size
    if source.weights.untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    config.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    generation, _ = sane_generation_config(source.base if source.base.kind != "gguf" else source.shards.folder)
    generation.eos_token_id = stop_ids(source)
    generation.save_pretrained(folder)
    if source.trust_remote_code:
        for file in source.shards.folder.glob("*.py"):
            shutil.copyfile(file, folder / file.name)


def stop_ids(source: Source) -> list[int]:
    """Every id at which an answer ends: what training recorded, the template's turn ends, both generation configs'."""
    found = set(read_record(source.adapter).get("stop_ids", []))
    own = source.adapter if (source.adapter / "generation_config.json").is_file() else None
    for place in (own, source.shards.folder):
        if place is not None:
            generation, _ = sane_generation_config(place)
            found.update(generation_stop_ids(source.tokenizer, source.template, generation.eos_token_id))
    return sorted(found)


def compare(source: Source, merged: Path, rows: Sequence[Sequence[int]] | None = None) -> Comparison:
    """The merged folder against base + adapter, all in float32 with one module in memory at a time.

    rows: token ids; None takes the probe prompts. Raises AdapterError where the merged model is something else.
    """
    import torch

    if rows is None:
        rows = probe_prompts(source.tokenizer, source.template)
    if not rows:
        raise EspalierError("the template refuses every probe: nothing to compare on", where=str(source.adapter))
    adapter = streamed_logits(source.adapted, source.shards, rows, COMPARED_POSITIONS)
    config = load_config(merged, source.trust_remote_code)
    empty = empty_base(config, source.trust_remote_code)
    after = streamed_logits(
        empty, Shards(merged, getattr(empty, "all_tied_weights_keys", None)), rows, COMPARED_POSITIONS
    )
    empty = empty_base(source.config, source.trust_remote_code)
    before = streamed_logits(empty, source.shards, rows, COMPARED_POSITIONS)
    width = before[0].shape[-1]  # an adapter with added tokens has more
    theirs, ours = torch.cat(adapter), torch.cat(after)
    error, effect = ours - theirs, theirs[:, :width] - torch.cat(before)
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    spread = float(effect.square().mean().sqrt())
    return Comparison(
        num_prompts=len(rows),
        num_positions=len(ours),
        difference=float(error.abs().max()),
        effect=float(effect.abs().max()),
        lost=float(error.square().mean().sqrt()) / spread if spread else 0.0,
        same_token=float(same),
        probes=tuple(probe_of(ids, logits[-1]) for ids, logits in zip(rows, after, strict=True)),
    )
