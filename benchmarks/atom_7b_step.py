"""One training step on a random model of Atom-7B's shape, with the memory of each part.

    python benchmarks/atom_7b_step.py --data huanhuan.jsonl --tokenizer FOLDER [--base nf4|bf16] [--steps 1]

LlamaConfig 4096 x 32 x 11008, vocabulary 65,000. Each layer has bytes of its own, drawn layer by layer: for NF4 the
packed ones, so that no 16-bit copy is ever there. Then the first 16 rows, cut at 256 tokens, rank 8 on all linear
layers, layers recomputed in backward: LoraTrainer's own step. Prints what is resident after each part, the peak, the
loss and the gradient norm. NF4 needs 8 GB, bf16 20 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from espalier.config import MAX_TOKENS_PER_PACK
from espalier.model.lora import add_adapter
from espalier.model.quantized import keep_trainable
from espalier.training.describe import describe_tree
from espalier.training.step import StepOptions
from espalier.training.trainer import LoraTrainer

ROWS, LENGTH, RANK = 16, 256, 8
SCALE = 0.04  # largest weight of a block; the 16 levels drawn evenly then have a standard deviation of 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--base", choices=["nf4", "bf16"], default="nf4")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--max_tokens_per_pack", type=int, default=MAX_TOKENS_PER_PACK)
    args = parser.parse_args()
    say("imports")
    model = add_adapter(random_base(args.base, args.layers), LoraConfig(r=RANK, target_modules="all-linear"))
    say(f"base ({args.base}) and adapter: {bytes_of(model) / 1e9:.2f} GB of tensors")
    with open(args.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, ROWS * args.steps)]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = LoraTrainer(
            model,
            TrainingArguments(
                output_dir=scratch,
                max_steps=args.steps,
                per_device_train_batch_size=ROWS,
                activation_checkpointing=True,
                save_strategy="no",
                report_to="none",
                logging_steps=1,
                disable_tqdm=True,
                use_cpu=True,
            ),
            rows,
            processing_class=AutoTokenizer.from_pretrained(args.tokenizer),
            template="atom",
            max_length=LENGTH,
            options=StepOptions(self_check=False, max_tokens_per_pack=args.max_tokens_per_pack),
            callbacks=[SayStep()],
        )
        print(trainer.lora_counts, flush=True)
        print(describe_tree(trainer), flush=True)
        say("trainer")
        trainer.train()


class SayStep(TrainerCallback):
    """Memory after each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        said = {key: logs[key] for key in ("loss", "grad_norm") if key in logs}
        say(f"step {state.global_step} {said}")


def random_base(form: str, num_layers: int) -> Any:
    """The model in bfloat16 or with NF4 layers, made one layer at a time."""
    config = LlamaConfig(
        vocab_size=65_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=0,
        num_attention_heads=32,
        num_key_value_heads=32,
        rms_norm_eps=1e-5,
        dtype=torch.bfloat16,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    config.num_hidden_layers = num_layers
    for index in range(num_layers):
        with torch.device("meta"):
            layer = LlamaDecoderLayer(config, index)
        fill(layer, form)
        model.model.layers.append(layer)
    torch.set_default_dtype(before)
    model.requires_grad_(False)
    keep_trainable(model)
    model.is_loaded_in_4bit = form == "nf4"
    return model.eval()


def fill(layer: nn.Module, form: str) -> None:
    """Give a layer on the device "meta" weights."""
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear) and form == "nf4":
            layer.set_submodule(name, packed(module))
        elif isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.empty(module.weight.shape).uniform_(-0.035, 0.035), requires_grad=False)
        elif hasattr(module, "weight"):
            module.weight = nn.Parameter(torch.ones(module.weight.shape), requires_grad=False)


def packed(full: nn.Linear) -> nn.Module:
    """An NF4 layer of the shape of `full`, with random levels and scales that are quantised too."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

    shape = full.weight.shape
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(full.in_features, full.out_features, bias=False, compute_dtype=torch.bfloat16)
    num_blocks = math.ceil(shape.numel() / 64)
    scales = QuantState(
        absmax=torch.full((math.ceil(num_blocks / 256),), SCALE / 20, dtype=torch.float32),
        code=create_dynamic_map().float(),
        blocksize=256,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(num_blocks, dtype=torch.uint8).random_(),
        shape=shape,
        code=get_4bit_type("nf4", device="cpu"),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.tensor(SCALE, dtype=torch.float32),
        state2=scales,
    )
    levels = torch.empty(shape.numel() // 2, 1, dtype=torch.uint8).random_()
    layer.weight = bnb.nn.Params4bit(
        levels, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
    )
    layer.quant_state = state
    return layer


def bytes_of(model: nn.Module) -> int:
    """Bytes of all tensors, each storage once."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(found.values())


STARTED = time.perf_counter()


def say(what: str) -> None:
    """What is resident now and was at most, from the kernel (Linux)."""
    status = Path("/proc/self/status").read_text()
    now, peak = (int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024 for key in ("VmRSS", "VmHWM"))
    seconds = time.perf_counter() - STARTED
    print(f"{seconds:6.1f} s  resident {now / 1e9:6.2f} GB, at most {peak / 1e9:6.2f} GB  {what}", flush=True)


if __name__ == "__main__":
    main()
