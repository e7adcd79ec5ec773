"""A base that is stored in 4 or 8 bits, unpacked once, so that a sum can be written in 16 or 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espalier.errors import ModelError
from espalier.model.load import ModelPath, load_model
from espalier.model.load_adapter import check_base, read_record


def dequantized(base: ModelPath, config: Any, adapters: list[Path], output: Path) -> str:
    """Write the unpacked weights of `base` to `output`; returns what to say of it. The whole model is in memory.

    Which base it is is compared here, while it is as training loaded it. Raises ModelError for a kind of quantisation
    that cannot be unpacked, AdapterError for another base.
    """
    import torch

    fields = config.quantization_config
    fields = fields if isinstance(fields, dict) else fields.to_dict()
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method", "unknown")))
    if method != "bitsandbytes":
        raise ModelError(
            f"weights of kind {method} cannot be de-quantised here",
            where=base.said,
            todo="Give the 16-bit original with --model_path. Known: bitsandbytes 4 and 8 bit, GGUF.",
        )
    dtype = config.dtype if config.dtype in (torch.float32, torch.float16) else torch.bfloat16
    model: Any = load_model(base, device="cpu", dtype=dtype)
    for folder in adapters:
        if read_record(folder).get("base", {}).get("fingerprint"):
            check_base(folder, model)
    bits = "4" if fields.get("load_in_4bit") else "8"
    model = model.dequantize(dtype)
    model.save_pretrained(output, max_shard_size="1GB")
    name = str(dtype).removeprefix("torch.")
    return (
        f"the base's {bits}-bit weights were de-quantised to {name}: the sum is with what was trained on, and not with "
        "the original of these weights"
    )
