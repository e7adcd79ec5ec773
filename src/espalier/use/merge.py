"""`espalier merge`: base + adapter as one model, written shard by shard, read back and compared before it is there."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.errors import AdapterError, EspalierError
from espalier.model.load import load_config, sane_generation_config
from espalier.model.load_adapter import read_record
from espalier.use.merged_record import Probe, probe_of, write_record
from espalier.use.merged_weights import MergedWeights, empty_base
from espalier.use.new_folder import new_folder
from espalier.use.probes import probe_prompts
from espalier.use.shards import INDEX, Shards, write_safetensors
from espalier.use.source import Adapters, Source, open_source, stop_ids, stored_dtype
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
    difference over that of the effect. same_token: share of places with the same likeliest token. losses: nats a token
    of the prompts' own text, by base, base + adapter, merged. probes: what the merged model says after each prompt.
    """

    num_prompts: int
    num_positions: int
    difference: float
    effect: float
    lost: float
    same_token: float
    losses: tuple[float, float, float]
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
            "loss on the text of these prompts: base {:.4f}, base + adapter {:.4f}, merged {:.4f}".format(*seen.losses),
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


def merge(
    adapter: Adapters,
    output_dir: str | Path,
    model_path: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = False,
) -> Merged:
    """Write base + adapter to `output_dir`, which appears only when it was read back and compared.

    adapter: a folder, or folders with the weight of each: the sum of the weighted changes is written then. dequantize:
    unpack a base that is stored in 4 or 8 bits, which is refused else.
    dtype: that of the weights written: float32, bfloat16 or float16; None keeps the base's own. Raises RunFolderError
    where the folder is taken or the disk does not hold it, AdapterError and ModelError for what does not fit or cannot
    be merged.
    """
    output = Path(output_dir)
    with new_folder(output) as (scratch, ready):
        source = open_source(adapter, model_path, scratch, trust_remote_code, dequantize)
        unchanged = write_weights(source, ready, dtype)
        write_companions(source, ready, dtype)
        comparison = compare(source, ready)
        _check_comparison(comparison, dtype or stored_dtype(source), output)
        about = {"dtype": dtype or stored_dtype(source), "comparison": asdict(comparison)}
        write_record(ready, read_record(source.adapter), stop_ids(source), about)
    return Merged(output, dtype or stored_dtype(source), unchanged, comparison, source.notes)


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
    config.dtype = dtype or stored_dtype(source)
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
        losses=(_loss(rows, before), _loss(rows, adapter), _loss(rows, after)),
        probes=tuple(probe_of(ids, logits[-1]) for ids, logits in zip(rows, after, strict=True)),
    )


def _loss(rows: Sequence[Sequence[int]], logits: Sequence[torch.Tensor]) -> float:
    """Nats a token of the rows' own next tokens; logits: float32 [T, V] of each row's last T places."""
    import torch

    kept = [(found[:-1], torch.tensor(list(ids[1 - len(found) :]))) for ids, found in zip(rows, logits, strict=True)]
    values, targets = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return float(torch.nn.functional.cross_entropy(values, targets))
