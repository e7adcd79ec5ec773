"""Every adapter that was saved is read again and compared with the live one before it is called saved."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from espalier.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

FORWARD_TOKENS = 256
# Names that wrappers put into keys; a loader that knows nothing of them finds no tensor (case C19).
WRAPPER_MARKS = ("_orig_mod.", "_fsdp_wrapped_module.", "module.base_model.")


def read_back(model: nn.Module, folder: Path) -> None:
    """Compare `adapter_model.safetensors` with the live adapter, bit for bit.

    Raises AdapterError: no tensors, other names or shapes, values that differ or are not finite, wrapper prefixes.
    The file is no adapter then; whoever asked for it deletes it.
    """
    from peft.utils import get_peft_model_state_dict

    file = folder / "adapter_model.safetensors"
    stored = load_file(str(file))
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    bad = [name for name, tensor in live.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise AdapterError(
            f"{len(bad)} of the adapter's {len(live)} tensors are not finite: nothing is saved of it",
            where=str(folder.parent),
            details=bad[:5],
            todo="Go back to the last checkpoint, and try a lower --learning_rate or --fp32.",
        )
    problems = [f"{name} has a wrapper's prefix" for name in stored if any(m in name for m in WRAPPER_MARKS)]
    if not stored:
        problems.append(f"it holds 0 of {len(live)} tensors")
    problems += [f"{name} is missing" for name in live if name not in stored]
    problems += [f"{name} belongs to nothing" for name in stored if name not in live]
    for name in stored.keys() & live.keys():
        if not torch.equal(stored[name], live[name].detach().cpu()):
            problems.append(f"{name} differs from the trained tensor")
    if problems:
        raise AdapterError(
            "the adapter that was written is not the one that was trained", where=str(file), details=problems[:10]
        )


def check_forward(
    model: nn.Module, folder: Path, input_ids: Any, written: AbstractContextManager[None] | None = None
) -> None:
    """One row through the live adapter, and again after its tensors were erased and read from the file.

    input_ids: [T] ids of a row, of which the first FORWARD_TOKENS are taken. written: holds the adapter whole while it
    is written to. Raises AdapterError where logits differ.
    """
    from peft import set_peft_model_state_dict

    device = next(model.parameters()).device
    ids = torch.tensor(input_ids[:FORWARD_TOKENS], dtype=torch.long, device=device)[None]  # [1, T]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with written or nullcontext():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
            set_peft_model_state_dict(model, load_file(str(folder / "adapter_model.safetensors")))
        after = model(input_ids=ids).logits
    model.train(was_training)
    if not torch.equal(before, after):
        difference = float((before - after).abs().max())
        raise AdapterError(
            f"the saved adapter does not compute what the trained one did: logits differ by {difference:g}",
            where=str(folder),
            todo="Take the last checkpoint, and report this.",
        )


def effect_of(folder: Path) -> float:
    """Largest absolute value of any lora_B: 0 means that the adapter changes nothing."""
    stored = load_file(str(folder / "adapter_model.safetensors"))
    return max(
        (float(t.abs().max()) for name, t in stored.items() if "lora_B" in name or "lora_embedding_B" in name),
        default=0.0,
    )
