"""Every adapter that was saved is read again and compared with the live one before it is called saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from espalier.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

# Names that wrappers put into keys; a loader that knows nothing of them finds no tensor (case C19).
WRAPPER_MARKS = ("_orig_mod.", "_fsdp_wrapped_module.", "module.base_model.")


def read_back(model: nn.Module, folder: Path) -> None:
    """Compare `adapter_model.safetensors` with the live adapter, bit for bit.

    Raises AdapterError: no tensors, other names or shapes, values that differ or are not finite, wrapper prefixes.
    """
    from peft.utils import get_peft_model_state_dict

    file = folder / "adapter_model.safetensors"
    stored = load_file(str(file))
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    problems = []
    if not stored:
        problems.append(f"it holds 0 of {len(live)} tensors")
    problems += [f"{name} is missing" for name in live if name not in stored]
    problems += [f"{name} belongs to nothing" for name in stored if name not in live]
    problems += [f"{name} has a wrapper's prefix" for name in stored if any(m in name for m in WRAPPER_MARKS)]
    for name in stored.keys() & live.keys():
        if not torch.isfinite(stored[name]).all():
            problems.append(f"{name} holds values that are not finite")
        elif not torch.equal(stored[name], live[name].detach().cpu()):
            problems.append(f"{name} differs from the trained tensor")
    if problems:
        raise AdapterError(
            "the adapter that was written is not the one that was trained", where=str(file), details=problems[:10]
        )


def effect_of(folder: Path) -> float:
    """Largest absolute value of any lora_B: 0 means that the adapter changes nothing."""
    stored = load_file(str(folder / "adapter_model.safetensors"))
    return max(
        (float(t.abs().max()) for name, t in stored.items() if "lora_B" in name or "lora_embedding_B" in name),
        default=0.0,
    )
