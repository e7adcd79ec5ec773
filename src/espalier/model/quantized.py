"""A base whose linear layers are held in 4 or 8 bits by bitsandbytes, while an adapter is trained on it.

nf4: 4 bits a weight in blocks of 64, whose scales are quantised too (QLoRA, arXiv 2305.14314). int8: 8 bits with one
scale a row (LLM.int8(), arXiv 2208.07339). Embeddings, norms and the head keep the 16-bit (or float32) form.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from espalier.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

    from espalier.config import RunConfig

Kind = Literal["nf4", "int8"]
INSTALL = "pip install 'espalier-lm[quant]', or: pip install bitsandbytes"
_SAID = {"nf4": "NF4, 4 bits a weight with double quantisation", "int8": "int8, 8 bits a weight"}
_PACKED = frozenset(
    {
        ("bitsandbytes.nn.modules", "Linear4bit"),
        ("bitsandbytes.nn.modules", "Linear8bitLt"),
        ("espalier.model.packed", "WeightOnly4bit"),
        ("espalier.model.packed", "WeightOnly8bit"),
    }
)
# Starts of A and B that are computed from the base's own weights, which PEFT cannot do on packed ones.
_STARTS_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva")


def check_quantization(config: RunConfig, model_config: Any) -> Kind | None:
    """The form that --load_in_4bit or --load_in_8bit asks for, or None. Raises UsageError that lists all that does not
    go with it, and where bitsandbytes is missing."""
    stored = getattr(model_config, "quantization_config", None) is not None
    if not (config.load_in_4bit or config.load_in_8bit or stored):
        return None
    flag = "--load_in_4bit" if config.load_in_4bit else "--load_in_8bit"
    problems = []
    if stored and (config.load_in_4bit or config.load_in_8bit):
        problems.append(f"{flag}: the model is stored quantised already, and is loaded as it is")
    if config.load_in_4bit and config.load_in_8bit:
        problems.append("--load_in_4bit and --load_in_8bit: one of them")
    if config.fp32 and not stored:
        problems.append(f"--fp32: a float32 base and {flag} exclude each other")
    if config.modules_to_save:
        problems.append("--modules_to_save: a module that is trained in full needs a float32 base")
    if config.init_lora_weights.lower().startswith(_STARTS_FROM_BASE):
        problems.append(f"--init_lora_weights {config.init_lora_weights}: it is computed from unpacked weights")
    if problems:
        raise UsageError("these options do not go with a quantised base", details=problems)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("bitsandbytes is not installed", where=flag, todo=INSTALL)
    return None if stored else "nf4" if config.load_in_4bit else "int8"


def describe(kind: Kind) -> str:
    """The form in words, for the header."""
    return _SAID[kind]


def bitsandbytes_config(kind: Kind, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What from_pretrained takes to quantise each linear layer as it is read. dtype: of the products."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_trainable(model: nn.Module) -> None:
    """Have layers of bitsandbytes compute as packed.py says, from now on."""
    for module in model.modules():
        if is_packed(module):
            from espalier.model.packed import set_forward

            set_forward(module)


def is_packed(module: nn.Module) -> bool:
    """True for a linear layer of bitsandbytes; does not import it."""
    return (type(module).__module__, type(module).__name__) in _PACKED


def unpacked(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] of a layer of bitsandbytes in `dtype`, made anew at each call."""
    if hasattr(layer.weight, "quant_state"):
        import torch
        from bitsandbytes.functional import dequantize_blockwise

        state = layer.weight.quant_state
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        # Where a block goes over a row's end, bitsandbytes 0.50 mistakes the scales on the CPU: one long row, then.
        shape = list(state.shape) if state.shape[-1] % state.blocksize == 0 else [state.shape.numel()]
        operation = torch.ops.bitsandbytes.dequantize_4bit.default
        weight: torch.Tensor = operation(layer.weight.data, scales, state.blocksize, state.quant_type, shape, dtype)
        return weight.view(state.shape)
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB  # [out]: the row's largest, float32
    return layer.weight.data.to(dtype, copy=True).mul_(scales[:, None] / 127.0)  # type: ignore[no-any-return]


def num_weights(parameter: torch.Tensor) -> int:
    """How many numbers a parameter stands for: two a byte where it is packed to 4 bits, all of one that lies in pieces
    (DeepSpeed leaves an empty one in its place)."""
    in_pieces: int | None = getattr(parameter, "ds_numel", None)
    if in_pieces is not None:
        return in_pieces
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
