"""Several adapters as one: the ranks side by side, so that its change is the weighted sum of theirs.

Sum of w s B A over the adapters = [w1 s1 B1, w2 s2 B2, ...] [A1; A2; ...], with each adapter's scaling s, in float32:
nothing is approximated, as it is where the sum is brought back to a small rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import AdapterError
from espalier.model.load_adapter import CONFIG, RECORD, WEIGHTS, read_record
from espalier.use.merged_weights import adapted_model, plain_layers, tables

if TYPE_CHECKING:
    import torch

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def weighted_sum(weights: Mapping[Path, float], config: Any, output: Path, trust_remote_code: bool = False) -> Path:
    """Write the sum of the adapters as an adapter's folder, `output`, and return it.

    weights: adapter's folder -> weight, all for the base of `config`. Tokenizer and template are the first's. Raises
    AdapterError where their tokenizers or templates differ, and for what has no weighted sum: DoRA, whole tensors,
    trained biases and token rows.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    _check_companions(list(weights))
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for folder, weight in weights.items():
        for name, (a, b, scaling) in _linear_layers(
            adapted_model(config, folder, trust_remote_code=trust_remote_code), folder
        ):
            parts.setdefault(name, []).append((a, b * (weight * scaling)))
    tensors, ranks = {}, {}
    for name, pairs in parts.items():
        a, b = (torch.cat([pair[side] for pair in pairs], side).contiguous() for side in (0, 1))
        tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"] = a, b
        ranks[name] = a.shape[0]
    first = next(iter(weights))
    rank = max(ranks.values())
    others = {name: size for name, size in ranks.items() if size != rank}
    settings: Any = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=list(ranks),
        fan_in_fan_out=json.loads((first / CONFIG).read_text(encoding="utf-8")).get("fan_in_fan_out", False),
    )
    output.mkdir(parents=True)
    settings.save_pretrained(output)
    save_file(tensors, output / WEIGHTS)
    for name in COMPANIONS:
        if (first / name).is_file():
            shutil.copyfile(first / name, output / name)
    (output / RECORD).write_text(json.dumps(_record(weights)), encoding="utf-8")
    return output


def _check_companions(folders: list[Path]) -> None:
    prints = {folder: read_record(folder).get("fingerprints") for folder in folders}
    known = {folder: found for folder, found in prints.items() if isinstance(found, dict)}
    for name in ("tokenizer", "template"):
        if len({str(found.get(name)) for found in known.values()}) > 1:
            raise AdapterError(
                f"the adapters were trained with other {name}s",
                details=[str(folder) for folder in known],
                todo="Their sum would have no prompt of its own. Train them with one, or merge one of them.",
            )


def _record(weights: Mapping[Path, float]) -> dict[str, Any]:
    """The first adapter's record, with the end tokens of all, and a run that names all."""
    records = {folder: read_record(folder) for folder in weights}
    found = dict(next(iter(records.values())))
    found.pop("data", None)
    found["run"] = " + ".join(
        f"{weight:g} * {records[folder].get('run') or folder.name}" for folder, weight in weights.items()
    )
    found["stop_ids"] = sorted({i for record in records.values() for i in record.get("stop_ids", [])})
    return found


def _linear_layers(adapted: Any, folder: Path) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor, float]]]:
    whole = [name for name, _ in tables(adapted.get_base_model())]
    if whole:
        raise AdapterError(
            f"adapters with whole tensors have no weighted sum: {len(whole)} besides LoRA",
            where=str(folder),
            details=whole[:5],
            todo="Merge it alone.",
        )
    for name, found in plain_layers(adapted):
        if found is None:
            raise AdapterError(
                f"what the adapter does to {name} has no weighted sum: it is no plain LoRA of a linear layer",
                where=str(folder),
                todo="Merge it alone.",
            )
        yield name, found
