"""A base that is stored in 4 or 8 bits, unpacked once, so that a sum can be written in 16 or 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espalier.errors import AdapterError, ModelError, UsageError
from espalier.model.load import ModelPath, load_model
from espalier.model.load_adapter import check_base, read_record
from espalier.model.quantized import Kind

BITS: dict[Kind, int] = {"nf4": 4, "int8": 8}


def dequantized(base: ModelPath, config: Any, adapters: list[Path], output: Path) -> str:
    """Write the unpacked weights of `base` to `output`; returns what to say of it. The whole model is in memory.

    A base that is stored in 16 bits is packed as the adapters were trained on it first. Which base it is is compared
    here, while it is as training loaded it. Raises ModelError for a kind of quantisation that cannot be unpacked,
    AdapterError for another base, UsageError where nothing is packed.
    """
    import torch

    dtype = config.dtype if config.dtype in (torch.float32, torch.float16) else torch.bfloat16
    kind: Kind | None = None
    if is_stored_packed(base, config):
        bits = _stored_bits(base, config)
    else:
        kind = _held_as(base, adapters)
        bits = BITS[kind]
    model: Any = load_model(base, device="cpu", dtype=dtype, quantization=kind)
    for folder in adapters:
        if read_record(folder).get("base", {}).get("fingerprint"):
            check_base(folder, model)
    model = model.dequantize(dtype)
    model.save_pretrained(output, max_shard_size="1GB")
    name = str(dtype).removeprefix("torch.")
    return (
        f"the base's {bits}-bit weights were de-quantised to {name}: the sum is with what was trained on, and not with "
        "the original of these weights"
    )


def _held_as(base: ModelPath, adapters: list[Path]) -> Kind:
    found = {read_record(folder).get("base", {}).get("held_as") for folder in adapters}
    if found == {None}:
        raise UsageError(
            f"{base.said} is not quantised, nor was it held so in training", where="--dequantize", todo="Leave it out."
        )
    kind = found.pop()
    if found or kind not in BITS:
        raise AdapterError(
            "the adapters' records name no one form of the base to unpack",
            details=[str(folder) for folder in adapters],
            todo="Merge into the 16-bit base, without --dequantize.",
        )
    return kind  # type: ignore[no-any-return]


def is_stored_packed(base: ModelPath, config: Any) -> bool:
    """True for a base whose files hold quantised weights, GGUF aside, which is unpacked by whoever reads it."""
    return getattr(config, "quantization_config", None) is not None and base.kind != "gguf"


def _stored_bits(base: ModelPath, config: Any) -> int:
    fields = config.quantization_config
    fields = fields if isinstance(fields, dict) else fields.to_dict()
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method", "unknown")))
    if method != "bitsandbytes":
        raise ModelError(
            f"weights of kind {method} cannot be de-quantised here",
            where=base.said,
            todo="Give the 16-bit original with --model_path. Known: bitsandbytes 4 and 8 bit, GGUF.",
        )
    return 4 if fields.get("load_in_4bit") else 8
