"""Claim: a LoRA layer's forward and backward cost little more than the frozen layer's alone.

    python benchmarks/lora_layer.py [--repeats 15] [--rank 8] [--tokens 1000,2000]

For the layer shapes of SmolLM2-135M (576 -> 576, 576 -> 1536, 1536 -> 576), bf16 and float32: PEFT's forward, PEFT's
with dropout 0.1, the fast form, and the frozen linear layer, one after the other in each repeat, so that other work on
the machine falls on all alike. One JSON line a case: median milliseconds of forward and backward (processor time of
all threads), ratios to the frozen layer, and the norm of the gradient of A and B, which says that the same was
computed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from espalier.model.fast_lora import fast_lora

SHAPES = ((576, 576), (576, 1536), (1536, 576))


def layer(size_in: int, size_out: int, dtype: torch.dtype, rank: int, dropout: float = 0.0) -> Any:
    """A bias-free linear layer with an adapter whose B is not zero."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"proj": nn.Linear(size_in, size_out, bias=False)}).to(dtype)
    config = LoraConfig(
        r=rank, lora_alpha=4 * rank, lora_dropout=dropout, target_modules=["proj"], init_lora_weights=False
    )
    return get_peft_model(base, config).base_model.model.proj.train()


def pass_of(module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        module.zero_grad()
        module(x).backward(grad)

    return run


def measure(passes: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median processor milliseconds of each, after two rounds of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats + 2):
        for name, run in passes.items():
            begin = time.process_time()
            run()
            seconds[name].append(time.process_time() - begin)
    return {name: 1e3 * statistics.median(values[2:]) for name, values in seconds.items()}


def grad_norm(module: nn.Module) -> float:
    return float(torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", default="1000,2000")
    options = parser.parse_args()
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}))
    for dtype in (torch.bfloat16, torch.float32):
        for size_in, size_out in SHAPES:
            for tokens in map(int, options.tokens.split(",")):
                x = torch.randn(1, tokens, size_in).to(dtype).requires_grad_()
                grad = torch.randn(1, tokens, size_out).to(dtype)
                modules = {name: layer(size_in, size_out, dtype, options.rank) for name in ("peft", "fast")}
                modules["peft_dropout"] = layer(size_in, size_out, dtype, options.rank, 0.1)
                assert fast_lora(modules["fast"]).fast == 1
                modules["frozen"] = modules["peft"].base_layer
                passes = {name: pass_of(module, x, grad) for name, module in modules.items()}
                ms = measure(passes, options.repeats)
                line = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "layer": f"{size_in}->{size_out}",
                    "tokens": tokens,
                    "ms": {name: round(value, 2) for name, value in ms.items()},
                    "to_frozen": {name: round(value / ms["frozen"], 2) for name, value in ms.items()},
                    "peft_to_fast": round(ms["peft"] / ms["fast"], 2),
                    # What the adapter adds to the frozen layer.
                    "added_peft_to_fast": round((ms["peft"] - ms["frozen"]) / (ms["fast"] - ms["frozen"]), 1),
                    "grad_norm": {name: round(grad_norm(modules[name]), 1) for name in ("peft", "fast")},
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
