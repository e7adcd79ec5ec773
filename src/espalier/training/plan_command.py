"""`espalier plan`: what a run will take in memory and time, and whether it fits, without loading a weight."""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from espalier.config import RunConfig
from espalier.errors import UsageError
from espalier.model.hardware import choose_device, choose_dtype, device_memory, resident_bytes
from espalier.training.memory_plan import MemoryChoice, plan_memory, unpredicted
from espalier.training.prepare import Prepared, prepare
from espalier.training.report import Header, duration

# What a step takes beside its products and attention: a guess with a wide bar, not a measurement.
OVERHEAD, OVERHEAD_LOW, OVERHEAD_HIGH = 2.0, 1.4, 3.0
CALIBRATION_TOKENS, REPEATS = 512, 3


def run_plan(config: RunConfig, *, device: str | None = None, as_json: bool = False) -> int:
    """Print the plan of `config`. device: a named card, None: this machine. Returns 0 where it fits, else 1."""
    console = Console(highlight=False, stderr=as_json)
    prepared = prepare(config, Header(console))
    found = plan(prepared, device=device)
    if as_json:
        print(json.dumps(found))
        return 0 if found["fits"] else 1
    _print(found, Console(highlight=False))
    return 0 if found["fits"] else 1


def plan(prepared: Prepared, *, device: str | None = None) -> dict[str, Any]:
    """The figures of the plan, bytes and seconds, as `--json` prints them. Raises UsageError: nothing to predict by."""
    import espalier.training.trainer  # noqa: F401  # what a run imports is in its memory too

    config = prepared.config
    kind, _ = choose_device(config.use_cpu)
    requested = next((name for name in ("bf16", "fp16", "fp32") if getattr(config, name)), None)
    dtype, _ = choose_dtype(kind, requested)
    name, room, process = "this machine", None, resident_bytes() if kind == "cpu" else 0
    if device is not None:
        name, room = device_memory(device)
        kind, process = "cuda", 0
        if requested is None:
            dtype = torch.bfloat16
    bits = {"nf4": 4, "int8": 8}.get(prepared.quantization or "", 16)

    choice = plan_memory(
        config,
        prepared.model_config,
        prepared.train_rows,
        device=kind,
        dtype=dtype,
        num_steps=prepared.max_steps,
        bits=bits,
        process=process,
        room=room,
    )
    asked, fitting, seen = choice.asked, choice.prediction, choice.survey
    if asked is None or fitting is None:
        raise UsageError(choice.reason, todo="`espalier train` watches the memory of such a run as it goes on.")
    fits = asked.total <= choice.room
    return {
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": {
            "process": asked.process,
            "base": asked.fixed.base,
            "adapter": asked.fixed.adapter,
            "optimizer": asked.fixed.optimizer,
            "activations": asked.part.kept + asked.part.outside,
            "logits": asked.part.logits,
            "layer_backward": asked.part.layer_work,
            "peak": asked.total,
        },
        "room": choice.room,
        "fits": fits,
        "largest_part_tokens": asked.part.tokens,
        "recomputed_layers": asked.part.recomputed,
        "train_will_use": {
            "max_tokens_per_pack": min(choice.plan.tokens, 1 << 31),
            "recomputed_layers": choice.plan.recompute,
            "peak": fitting.total,
            "fits": fitting.total <= choice.room,
        },
        "changes": [] if fits else _changes(config, choice, bits),
        "not_predicted": unpredicted(choice),
        "steps": prepared.max_steps,
        "unique_tokens_a_step": seen.unique_tokens / seen.num_laid_out,
        "logical_tokens_a_step": seen.logical_tokens / seen.num_laid_out,
        "laid_out_steps": seen.num_laid_out,
        "seconds_a_step": None if device is not None or kind != "cpu" else _seconds(prepared, choice, dtype),
    }


def _changes(config: RunConfig, choice: MemoryChoice, bits: int) -> list[dict[str, Any]]:
    """Each change alone, with its predicted peak."""
    assert choice.model is not None
    layers = choice.model.num_layers
    tries: list[tuple[str, dict[str, int]]] = []
    if not config.gradient_checkpointing:
        tries.append(("--gradient_checkpointing: all layers computed again", {"recompute": layers}))
    if choice.survey.largest.packs:
        tries += [(f"--max_tokens_per_pack {tokens}", {"tokens": tokens}) for tokens in (2048, 1024, 512)]
    if bits == 16 and not config.fp32 and not config.modules_to_save:
        tries.append(("--load_in_4bit: NF4 base", {"bits": 4}))
        both = {"recompute": layers, "tokens": 1024, "bits": 4}
        tries.append(("--load_in_4bit --gradient_checkpointing --max_tokens_per_pack 1024", both))
    peaks = [(said, choice.changed(**changes)) for said, changes in tries]
    return [{"change": said, "peak": peak, "fits": peak <= choice.room} for said, peak in peaks]


def _seconds(prepared: Prepared, found: MemoryChoice, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of a mean step: its products at this machine's rate, times what the rest of a step was measured to add.

    FLOPs: 4 N T for frozen weights forward and backward, 6 for the adapter, 12 L d A for attention's pairs."""
    assert found.survey is not None
    assert found.model is not None
    text = prepared.model_config.get_text_config()
    size, layers = int(text.hidden_size), int(text.num_hidden_layers)
    inner = int(getattr(text, "intermediate_size", None) or 4 * size)
    count = found.survey.num_laid_out
    tokens, pairs = found.survey.unique_tokens / count, found.survey.num_pairs / count
    weights = found.model.num_linear
    trained = found.model.fixed.adapter / 8
    again = found.plan.recompute / layers
    flops = (4 + 2 * again) * weights * tokens + 6 * trained * tokens + 12 * layers * size * pairs
    rate = gemm_rate(size, inner, dtype)
    best = flops / rate
    return {
        "expected": best * OVERHEAD,
        "low": best * OVERHEAD_LOW,
        "high": best * OVERHEAD_HIGH,
        "gemm_gflops": rate / 1e9,
    }


def gemm_rate(size: int, inner: int, dtype: torch.dtype) -> float:
    """FLOP/s of products [tokens, size] x [size, inner] and back, as in an MLP: the median of a few."""
    x = torch.randn(CALIBRATION_TOKENS, size).to(dtype)
    weight = torch.randn(inner, size).to(dtype)
    taken = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        (x @ weight.t()) @ weight
        taken.append(time.perf_counter() - started)
    return 4 * CALIBRATION_TOKENS * size * inner / statistics.median(taken[1:])


def _print(found: dict[str, Any], console: Console) -> None:
    table = Table(show_header=True, box=None)
    table.add_column("memory of the largest step")
    table.add_column("", justify="right")
    for name, count in found["bytes"].items():
        table.add_row(name.replace("_", " "), f"{count / 1e9:,.3f} GB")
    console.print(table)
    saved = found["logical_tokens_a_step"] / found["unique_tokens_a_step"]
    console.print(
        f"largest part {found['largest_part_tokens']:,} tokens; a mean step computes "
        f"{found['unique_tokens_a_step']:,.0f} of {found['logical_tokens_a_step']:,.0f} tokens "
        f"({saved:.1f} times less)",
        soft_wrap=True,
    )
    seconds = found["seconds_a_step"]
    if seconds:
        whole = duration(seconds["expected"] * found["steps"])
        console.print(
            f"about {seconds['expected']:.1f} s a step ({seconds['low']:.1f} to {seconds['high']:.1f}; products run at "
            f"{seconds['gemm_gflops']:,.0f} GFLOP/s here, now), {found['steps']:,} steps: {whole}",
            soft_wrap=True,
        )
    verdict = "fits" if found["fits"] else "does not fit"
    console.print(
        f"{verdict}: {found['bytes']['peak'] / 1e9:.2f} GB of {found['room'] / 1e9:.2f} GB, {found['device']}"
    )
    console.print(f"not predicted: {'; '.join(found['not_predicted'])}", soft_wrap=True)
    will = found["train_will_use"]
    if not found["fits"]:
        for change in found["changes"]:
            fits = "fits" if change["fits"] else "does not fit"
            console.print(f"  {change['change']}: {change['peak'] / 1e9:.2f} GB, {fits}", soft_wrap=True)
        console.print(
            f"by itself, train takes packs of up to {will['max_tokens_per_pack']:,} tokens and computes "
            f"{will['recomputed_layers']} layers again: {will['peak'] / 1e9:.2f} GB"
            + ("" if will["fits"] else ", which does not fit either"),
            soft_wrap=True,
        )
