"""Peak memory of `espalier merge` on a random model of some gigabytes in several shards.

usage: python benchmarks/merge_memory.py [--gigabytes 3] [--shard_gigabytes 1] [--format folder]

Builds the base (bfloat16, Llama) and a rank 8 adapter on all linear layers in a temporary folder, merges in a process
of its own, and prints that process's peak resident memory beside the largest shard. Needs twice the size on the
disk, and memory for one tensor.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig

from espalier.use.merged_weights import empty_base
from espalier.use.shards import INDEX, write_safetensors

TOKENIZER = Path(__file__).parents[1] / "tests" / "cases" / "_shared" / "tiny-llama"
HIDDEN, INNER, VOCAB, RANK = 2048, 5632, 32000, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--shard_gigabytes", type=float, default=1.0)
    parser.add_argument("--format", choices=["folder", "gguf", "gguf-lora"], default="folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge_memory.") as scratch:
        base, adapter, output = (Path(scratch) / name for name in ("base", "adapter", "merged"))
        largest, total = make_base(base, args.gigabytes, args.shard_gigabytes)
        make_adapter(base, adapter)
        command = [sys.executable, "-m", "espalier", "merge", "--adapter", str(adapter), "--model_path", str(base)]
        started = time.perf_counter()
        subprocess.run([*command, "--output_dir", str(output), "--format", args.format], check=True)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        written = sum(file.stat().st_size for file in output.iterdir())
    print(f"base {total / 1e9:.2f} GB, largest shard {largest / 1e9:.2f} GB; written {written / 1e9:.2f} GB")
    print(f"merge took {seconds:.0f} s; peak {peak / 1e9:.2f} GB, {(peak - largest) / 1e9:+.2f} GB against that shard")


def make_base(folder: Path, gigabytes: float, shard_gigabytes: float) -> tuple[int, int]:
    """(bytes of the largest shard, of all). Tensors are drawn one at a time."""
    layer = 4 * HIDDEN**2 + 3 * HIDDEN * INNER
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCAB * HIDDEN) / layer))
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=1,
    )
    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    forms = {name: tensor.to(torch.bfloat16) for name, tensor in empty_base(config).named_parameters()}
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, form in forms.items():
        if sum(2 * tensor.numel() for tensor in shards[-1].values()) + 2 * form.numel() > shard_gigabytes * 1e9:
            shards.append({})
        shards[-1][name] = form
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(
            folder / file, shard, lambda name: torch.randn(forms[name].shape).mul_(0.02).to(torch.bfloat16)
        )
        places |= dict.fromkeys(shard, file)
    sizes = [(folder / file).stat().st_size for file in set(places.values())]
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return max(sizes), sum(sizes)


def make_adapter(base: Path, folder: Path) -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=list(names)).save_pretrained(folder)
    from transformers import AutoConfig

    tensors = {}
    for name, weight in empty_base(AutoConfig.from_pretrained(base)).named_parameters():
        if name.split(".")[-2] in names:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, weight.shape[1]) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")


if __name__ == "__main__":
    main()
