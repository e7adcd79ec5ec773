"""The tensors of an adapter's file, and what their names say. No code in a file is ever run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.errors import AdapterError
from espalier.model.locate import first_line

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WHOLE = "modules_to_save"
# Names as PEFT's modules give them (lora_A.default.weight) and as its files do (lora_A.weight).
NAME = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)


@dataclass(frozen=True, slots=True)
class TensorName:
    """What the name of an adapter's tensor says. module: the module's name in the bare base; kind: lora_A, ..., or
    modules_to_save for a tensor that takes the place of the base's."""

    module: str
    kind: str
    adapter: str | None
    is_bias: bool

    @property
    def in_file(self) -> str:
        """The name in a PEFT folder."""
        leaf = ".bias" if self.is_bias else ".weight" if self.kind in ("lora_A", "lora_B", WHOLE) else ""
        return f"{PREFIX}{self.module}{leaf}" if self.kind == WHOLE else f"{PREFIX}{self.module}.{self.kind}{leaf}"


def parse_name(key: str) -> TensorName | None:
    """The parts of a LoRA tensor's name, whatever wrappers have put into it; None where it is no such name."""
    found = NAME.fullmatch(bare_name(key))
    if found is None:
        return None
    return TensorName(found["module"], found["kind"], found["adapter"], found["leaf"] == "bias")


def bare_name(key: str) -> str:
    """`key` without the names of wrappers (torch.compile, DataParallel, FSDP) and without PEFT's own prefix."""
    name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor, on the CPU, of a safetensors file or of a .bin file, which is read with weights_only.

    Raises AdapterError: damaged or cut off, holds code or objects, holds something else than named tensors.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is not None:
            raise AdapterError(
                f"the file asks for {named[1]}, which is no tensor; nothing in it was run",
                where=str(file),
                todo="Do not trust it. An adapter holds tensors only: ask for a safetensors file.",
            ) from error
        # torch says at length how to read such a file without safety
        why = "no file of tensors" if "Weights only load failed" in str(error) else first_line(error)
        raise AdapterError(
            f"the weights are damaged or cut off ({file.stat().st_size:,} bytes): {why}",
            where=str(file),
            todo="Copy the adapter again, or take an earlier checkpoint.",
        ) from error
    if not isinstance(held, dict):
        others, what = [], f"holds a {type(held).__name__}, not tensors by name"
    else:
        others = [
            f"{key}: {type(value).__name__}" for key, value in held.items() if not isinstance(value, torch.Tensor)
        ]
        what = f"holds {len(others)} things besides tensors"
    if others or not isinstance(held, dict):
        raise AdapterError(
            f"the file {what}",
            where=str(file),
            details=others[:5],
            todo="Save tensors by name only: the trained ones of named_parameters(), or with save_pretrained.",
        )
    return {str(key): value.detach() for key, value in held.items()}
