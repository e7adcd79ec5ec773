"""A base model by any name: where it is, its tokenizer, config and weights, and the device and precision for it.

Nothing here imports torch or transformers before it is needed, so that a wrong name costs no waiting.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from espalier.errors import ModelError
from espalier.model.embedded import EMBEDDED, prepare_embedded, suggest_embedded

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel

Kind = Literal["embedded", "folder", "gguf", "hub"]


@dataclass(frozen=True, slots=True)
class ModelPath:
    """A model that was found.

    path: a folder, a .gguf file, or (kind "hub") the hub's name. said: one phrase for the header.
    name: what to write down for others (never a path of this machine).
    """

    path: Path | str
    kind: Kind
    said: str
    name: str = ""


def resolve_model(name: str | os.PathLike[str]) -> ModelPath:
    """Find the model that --model_path means: an embedded name, a local folder, a .gguf file, or a hub name.

    An embedded model is made ready here (see embedded.py). A hub name is looked up in the local cache first, then on
    the network. A name that looks like a path never goes to the network. Raises ModelError.
    """
    text = os.fspath(name).strip()
    if text in EMBEDDED:
        folder, source = prepare_embedded(text)
        return ModelPath(folder, "embedded", f"{EMBEDDED[text].title} from {source}", text)
    path = Path(text).expanduser()
    if path.is_dir():
        return ModelPath(path, "folder", f"folder {text}", path.resolve().name)
    if path.is_file():
        return ModelPath(path, "gguf", f"GGUF file {text}", path.name)
    return ModelPath(text, "hub", f"hub model {text}", text)


def _source(ref: ModelPath | str | Path) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes for `ref`: (folder or name, keyword arguments)."""
    if not isinstance(ref, ModelPath):
        return str(ref), {}
    if ref.kind == "gguf":
        return str(Path(ref.path).parent), {"gguf_file": Path(ref.path).name}
    return str(ref.path), {}


def load_tokenizer(ref: ModelPath | str | Path, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    where, extra = _source(ref)
    return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)


def load_config(ref: ModelPath | str | Path, trust_remote_code: bool = False) -> Any:
    from transformers import AutoConfig

    where, extra = _source(ref)
    return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)


def load_model(
    ref: ModelPath | str | Path,
    *,
    device: str,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    where, extra = _source(ref)
    model: Any = AutoModelForCausalLM.from_pretrained(
        where, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code, **extra
    )
    return model.to(device)


def choose_device(use_cpu: bool = False) -> tuple[str, str]:
    """(device, reason): the accelerator that PyTorch sees, else the CPU."""
    import torch

    if use_cpu:
        return "cpu", "asked for with --use_cpu"
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is not None:
        return found.type, f"PyTorch sees a device of kind {found.type}"
    return "cpu", "PyTorch sees no accelerator"


def choose_dtype(device: str, requested: str | None = None) -> tuple[torch.dtype, str]:
    """(dtype of the base, reason). `requested` is "bf16", "fp16", "fp32" or None."""
    import torch

    if requested == "fp32":
        return torch.float32, "asked for"
    best, reason = _best_dtype(device)
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, None: best}
    if names[requested] == best:
        return best, reason
    return best, f"{requested} was asked for, but {reason}"


def _best_dtype(device: str) -> tuple[torch.dtype, str]:
    import torch

    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"this GPU (compute capability {major}.{minor}) multiplies bf16 fast"
        return torch.float16, f"this GPU (compute capability {major}.{minor}) has no fast bf16: fp16 with a scaler"
    if device == "cpu":
        if torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "this CPU multiplies bf16 fast (AMX)"
        if torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16, "this CPU multiplies bf16 fast (AVX512_BF16)"
        return torch.float32, "this CPU has no fast bf16"
    return torch.float32, f"bf16 on {device} has not been measured"
