"""What share of the machine's own GEMM rate a training step reaches, counting only what its unique tokens need.

    python benchmarks/roofline.py --data rows.jsonl [--batch 16] [--steps 8]

FLOPs of a step, with a frozen base: N parameters of the layers' linear modules, N_A of the adapter, T unique tokens, A
(query, key) pairs inside the tree, L layers, H x d width of all heads, M positions with a label, V x D the head:

    4 N T            the base: forward, and the gradient of the input
  + 6 N_A T          the adapter: forward, gradients of input and weight
  + 12 L H d A       attention: two products forward (4), four backward (8), each 2 d a pair and head
  + 4 V D M          the head: forward, and the gradient of the input

Nothing is counted that is computed twice or for padding. The rate is that of the same products in the same dtype: each
linear layer's forward and input gradient with T rows, in proportion to their FLOPs. The step is that of step_time.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    step = timed_step(args)
    shapes, sizes = model_shapes(args.model)
    tokens, pairs, labels = (int(step[name]) for name in ("unique_tokens", "attention_pairs", "label_positions"))
    parts = {
        "base": 4 * sizes["linear"] * tokens,
        "adapter": 6 * sizes["adapter"] * tokens,
        "attention": 12 * sizes["layers"] * sizes["heads_width"] * pairs,
        "head": 4 * sizes["head"] * labels,
    }
    rate = gemm_rate(shapes, tokens)
    total = sum(parts.values())
    seconds = step["median_seconds"]
    line = {
        "data": args.data.name,
        "unique_tokens": tokens,
        "gflop": {name: round(value / 1e9, 1) for name, value in parts.items()},
        "gflop_a_step": round(total / 1e9, 1),
        "step_seconds": seconds,
        "gflop_per_second": round(total / seconds / 1e9, 1),
        "gemm_gflop_per_second": round(rate / 1e9, 1),
        "seconds_at_gemm_rate": round(total / rate, 2),
        "utilisation": round(total / seconds / rate, 3),
        "grad_norm": step["grad_norm"],
    }
    print(json.dumps(line), flush=True)


def timed_step(args: argparse.Namespace) -> dict[str, Any]:
    """The last line of step_time.py."""
    command = [sys.executable, str(Path(__file__).with_name("step_time.py")), "--data", str(args.data), "--ours-only"]
    command += ["--model", args.model, "--batch", str(args.batch), "--steps", str(args.steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def model_shapes(model: str) -> tuple[dict[tuple[int, int], int], dict[str, int]]:
    """((out, in) -> how many linear layers have it, numbers for the formula), from the config alone."""
    from espalier.config import RunConfig
    from espalier.model.load import load_config, resolve_model
    from espalier.model.lora import add_adapter, empty_model, lora_config

    config = load_config(resolve_model(model))
    base: Any = empty_model(config)
    head = base.get_output_embeddings()
    shapes: dict[tuple[int, int], int] = {}
    for module in base.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            shape = (module.out_features, module.in_features)
            shapes[shape] = shapes.get(shape, 0) + 1
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    defaults = RunConfig()
    adapted = add_adapter(base, lora_config(rank=defaults.lora_rank, alpha=defaults.lora_alpha))
    sizes = {
        "linear": sum(out * into * count for (out, into), count in shapes.items()),
        "adapter": sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad),
        "layers": text.num_hidden_layers,
        "heads_width": text.num_attention_heads * width,
        "head": text.vocab_size * text.hidden_size,
    }
    return shapes, sizes


def gemm_rate(shapes: dict[tuple[int, int], int], tokens: int, repeats: int = 20) -> float:
    """FLOPs a second of the layers' products, in the dtype that training chooses."""
    from espalier.model.hardware import choose_device, choose_dtype

    device, _ = choose_device(False)
    dtype, _ = choose_dtype(device, None)
    flops = seconds = 0.0
    for (out, into), count in shapes.items():
        x, g = (torch.randn(tokens, size, device=device).to(dtype) for size in (into, out))
        weight = torch.randn(out, into, device=device).to(dtype)
        for product in (lambda: x @ weight.t(), lambda: g @ weight):  # noqa: B023 called in this pass of the loop
            for _ in range(3):
                product()
            best = float("inf")
            for _ in range(repeats):
                start = time.perf_counter()
                product()
                best = min(best, time.perf_counter() - start)
            seconds += count * best
            flops += count * 2 * tokens * out * into
    return flops / seconds


if __name__ == "__main__":
    main()
