"""adapter_config.json, of ours or of another tool: read, and refused where it asks for what cannot be right here."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import AdapterError
from espalier.model.locate import first_line

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
# Starts of A and B that take something away from the base's own weights. An adapter that was saved without PEFT's
# conversion is right only on a base that has been changed in the same way.
TAKE_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Those that PEFT computes again, the same each time, when it loads the adapter.
COMPUTED_AGAIN = ("pissa", "olora")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises AdapterError."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot be read: {first_line(error)}", where=str(file), todo="Copy it again.") from error
    if not isinstance(fields, dict):
        raise AdapterError("holds no JSON object", where=str(file), todo="Copy it again.")
    return fields


def read_settings(folder: Path, notice: Callable[[str], None], *, with_weights: bool) -> Any:
    """PEFT's LoraConfig of the adapter in `folder`.

    Settings that the installed PEFT does not know, as a newer one writes them, are left out; those that are switched on
    are named. with_weights: the base's weights are loaded, so that what the adapter's start has taken from them can be
    computed again. Raises AdapterError: not LoRA, not readable, or a start that cannot.
    """
    from peft import LoraConfig, PeftConfig

    fields = read_json(folder / CONFIG)
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"the adapter is of kind {kind!r}",
            where=str(folder / CONFIG),
            todo="Only LoRA adapters can be loaded here.",
        )
    _check_start(fields, folder, with_weights)
    known = {field.name for field in dataclasses.fields(LoraConfig)} | {"peft_version", "runtime_config"}
    unknown = {
        name: value for name, value in fields.items() if name not in known and value not in (None, False, {}, [])
    }
    if unknown:
        named = ", ".join(f"{name}={str(value)[:40]}" for name, value in sorted(unknown.items()))
        made = f", it was saved by {fields['peft_version']}" if fields.get("peft_version") else ""
        notice(f"{folder}: settings that this PEFT does not know have no effect here: {named}{made}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said above
            config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # settings of any type end in any exception inside PEFT
        raise AdapterError(
            f"its settings cannot be read: {first_line(error)}", where=str(folder / CONFIG), todo="Update peft."
        ) from error
    assert isinstance(config, LoraConfig)
    return config


def check_settings(config: Any, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Refuse settings that would fill the memory, or import modules, before a tensor is compared."""
    for name in ("megatron_config", "layer_replication"):
        if getattr(config, name, None):
            raise AdapterError(
                f"its settings ask for {name}, which is not supported here",
                where=str(folder / CONFIG),
                todo="Merge the adapter with the tool that made it.",
            )
    patterns = config.rank_pattern if isinstance(config.rank_pattern, dict) else {}
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for rank in (config.r, *patterns.values()):
        if not isinstance(rank, int) or not 1 <= rank <= max(largest, 256):
            raise AdapterError(
                f"its settings ask for rank {str(rank)[:40]}, and its tensors have {largest} rows at most",
                where=str(folder / CONFIG),
                todo="Copy the adapter again, or take an earlier checkpoint.",
            )


def _check_start(fields: Mapping[str, Any], folder: Path, with_weights: bool) -> None:
    start = str(fields.get("init_lora_weights")).lower()
    if start.startswith(TAKE_FROM_BASE) and not (with_weights and start in COMPUTED_AGAIN):
        plain = f"espalier import {folder} --output_dir NEW makes a plain adapter of it."
        raise AdapterError(
            f"it was started by {start}, which takes a part out of the base's weights; here that part is not known",
            where=str(folder / CONFIG),
            todo=plain
            if start in COMPUTED_AGAIN
            else "Save it as a plain adapter: PEFT's save_pretrained(path_initial_model_for_weight_conversion=...).",
        )
