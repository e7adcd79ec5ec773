"""The command `espalier merge`: its options, checked before anything is loaded, and its report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from espalier.errors import UsageError
from espalier.use.source import Adapters


def run_merge(
    adapters: Sequence[str],
    weights: str | None,
    output_dir: str,
    model_path: str | None,
    dtype: str | None,
    format: str,
    quantize: str | None,
    trust_remote_code: bool,
    dequantize: bool,
) -> int:
    """The command: merges, prints the report, returns the exit code."""
    from espalier.model.embedded import quiet_transformers
    from espalier.use.export import export_gguf
    from espalier.use.merge import merge

    if dtype is not None and format != "folder":
        raise UsageError(f"--dtype {dtype} has no effect on --format {format}", todo="Say it with --quantize.")
    if quantize is not None and format != "gguf":
        raise UsageError(f"--quantize {quantize} has no effect on --format {format}", todo="Leave it out.")
    adapter = weighted(adapters, weights)
    with quiet_transformers():
        if format == "folder":
            lines = merge(adapter, output_dir, model_path, dtype, trust_remote_code, dequantize).lines()
        else:
            kind = None if format == "gguf-lora" else quantize or "f16"
            lines = export_gguf(adapter, output_dir, model_path, kind, trust_remote_code, dequantize)
    for line in lines:
        print(line)
    return 0


def weighted(adapters: Sequence[str], weights: str | None) -> Adapters:
    """The adapter of a merge, or adapter -> weight. weights: numbers with commas between. Raises UsageError."""
    if weights is None:
        if len(adapters) == 1:
            return adapters[0]
        raise UsageError(
            f"{len(adapters)} adapters, and no weights for their sum",
            where="--weights",
            todo="As in --weights 0.7,0.3.",
        )
    try:
        numbers = [float(text) for text in weights.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(math.isfinite(number) for number in numbers):
        raise UsageError(f"{weights!r} is no list of numbers", where="--weights", todo="As in --weights 0.7,0.3.")
    if len(numbers) != len(adapters):
        raise UsageError(
            f"{len(adapters)} adapters, {len(numbers)} weights", where="--weights", todo="Give one for each."
        )
    if len(set(adapters)) != len(adapters):
        raise UsageError(
            "an adapter is named twice", where="--adapter", todo="Name it once, with the sum of its weights."
        )
    return dict(zip(adapters, numbers, strict=True))
