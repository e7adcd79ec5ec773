"""What vLLM takes of an adapter, and the command that serves it there; `verify` and `serve` print it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.model.adapter_settings import TAKE_FROM_BASE

# --max-lora-rank: its default, and the values that it takes (vLLM's LoRAConfig).
DEFAULT_RANK = 16
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def refusals(settings: Mapping[str, Any]) -> list[str]:
    """Why vLLM does not take an adapter of these settings (adapter_config.json) beside its base; empty: it does."""
    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(TAKE_FROM_BASE):
        return [f"{start} has changed the base"]
    whole = [name for name in ("modules_to_save", "trainable_token_indices") if settings.get(name)]
    reasons = [f"whole tensors in the adapter ({', '.join(whole)})"] if whole else []
    reasons += ["DoRA"] if settings.get("use_dora") else []
    reasons += [f"trained biases ({settings['bias']})"] if settings.get("bias", "none") != "none" else []
    return reasons


def largest_rank(settings: Mapping[str, Any]) -> int:
    """Of the adapter's layers."""
    return int(max([settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()]))


def command(base: str, adapters: Mapping[str, Path], rank: int) -> str | None:
    """The command that serves `base` with `adapters` (name -> folder); None where `rank` is over vLLM's largest.

    A server has one tokenizer, template and generation config: those of the first adapter.
    """
    limit = next((size for size in RANKS if size >= rank), None)
    if limit is None:
        return None
    words = ["vllm", "serve", base, "--enable-lora", "--lora-modules"]
    words += [f"{name}={folder}" for name, folder in adapters.items()]
    if rank > DEFAULT_RANK:
        words += ["--max-lora-rank", str(limit)]
    folder = next(iter(adapters.values()))
    if (folder / "tokenizer.json").is_file():  # without it vLLM takes the base's, with other ids for added tokens
        words += ["--tokenizer", str(folder)]
    if (folder / "chat_template.jinja").is_file():
        words += ["--chat-template", str(folder / "chat_template.jinja")]
    if (folder / "generation_config.json").is_file():
        words += ["--generation-config", str(folder)]
    return shlex.join(words)
