"""How a run scales over processes: what is measured on this machine, and a model of 1 to 1,024 GPUs beside it.

    python benchmarks/scaling_model.py --data rows.jsonl --measure 1 2 4 --rows 8
    python benchmarks/scaling_model.py --data rows.jsonl --gpus 1 8 64 512 1024

Weak scaling: every process brings `--rows` rows to a step, so a step of N processes has N times as many. A step costs

    max over ranks of (seconds a token x unique tokens of the rank) + fixed seconds + all-reduce(adapter's gradients)

The rows of each step are dealt by the function that training uses, so the unequal shares and the beginnings that two
ranks compute are counted, not assumed. A ring all-reduce of b bytes takes 2 (N - 1) / N x b / bandwidth and 2 (N - 1)
latencies (Patarasuk and Yuan, 2009). Efficiency = step of one process / step of N.

--measure runs `torchrun` here, the threads of the machine divided by the processes, and predicts each figure from the
one-process run with as many threads and a timed all-reduce. --gpus predicts; every assumption is printed:
4 FLOPs a base parameter and token (frozen base: forward and gradient of the input), at `--utilisation` of `--tflops`;
adapters are all-reduced once a step in float32 and not overlapped; a sharded base (FSDP) is gathered once in forward
and once in backward of every pack, overlapped with the computation, so only what is longer than it counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8, help="rows a step that each process brings")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--measure", type=int, nargs="*", default=[], help="numbers of processes to run here")
    parser.add_argument("--gpus", type=int, nargs="*", default=[], help="numbers of GPUs to predict")
    parser.add_argument("--base_parameters", type=float, default=6.7e9)
    parser.add_argument("--adapter_parameters", type=float, default=20e6)
    parser.add_argument("--tflops", type=float, default=989.0, help="dense bf16 peak of a GPU")
    parser.add_argument("--utilisation", type=float, default=0.4)
    parser.add_argument("--node_gpus", type=int, default=8)
    parser.add_argument("--node_gbytes_per_second", type=float, default=400.0, help="per GPU, inside a node")
    parser.add_argument("--network_gbytes_per_second", type=float, default=40.0, help="per GPU, between nodes")
    parser.add_argument("--latency_microseconds", type=float, default=10.0)
    parser.add_argument("--all_reduce", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.all_reduce:
        print(json.dumps({"seconds": timed_all_reduce(args.all_reduce)}), flush=True)
        return
    from rows import encoded_rows

    rows = encoded_rows(args.data, args.model)
    if args.measure:
        measured(args, rows)
    if args.gpus:
        predicted(args, rows)


# ---- the model -------------------------------------------------------------------------------------------------------


def all_reduce_seconds(num_bytes: float, ranks: int, bytes_per_second: float, latency_seconds: float) -> float:
    """A ring: every rank sends and receives 2 (N - 1) pieces of 1/N."""
    if ranks == 1:
        return 0.0
    return 2 * (ranks - 1) / ranks * num_bytes / bytes_per_second + 2 * (ranks - 1) * latency_seconds


def shares(rows: Sequence[Any], ranks: int, steps: int, rows_a_rank: int) -> list[list[int]]:
    """Unique tokens of each rank, a list a step. The rows come again from the start where they are too few."""
    from espalier.training.step import StepCollator, StepOptions, StepSampler
    from espalier.tree.deal import deal_rows

    size = rows_a_rank * ranks
    sampler = StepSampler(max(len(rows), size * steps), size, seed=42)
    found = []
    for _, numbers in zip(range(steps), sampler, strict=False):
        chosen = [rows[number % len(rows)] for number in numbers]
        parts = deal_rows(chosen, ranks)
        batches = [StepCollator(StepOptions(), size)([chosen[i] for i in part]) for part in parts if part]
        found.append([batch.unique_tokens for batch in batches])
    return found


def predicted(args: argparse.Namespace, rows: Sequence[Any]) -> None:
    """One JSON line of assumptions, one a number of GPUs."""
    names = ("base_parameters", "adapter_parameters", "tflops", "utilisation", "rows", "latency_microseconds")
    names += ("node_gpus", "node_gbytes_per_second", "network_gbytes_per_second")
    print(json.dumps({"assumed": {name: getattr(args, name) for name in names}, "data": args.data.name}), flush=True)
    token_seconds = 4 * args.base_parameters / (args.utilisation * args.tflops * 1e12)
    gradient_bytes, base_bytes = 4 * args.adapter_parameters, 2 * args.base_parameters
    one: dict[str, float] = {}
    for gpus in args.gpus:
        steps = shares(rows, gpus, max(1, min(4, 4096 // (gpus * args.rows))), args.rows)
        compute = token_seconds * statistics.mean(max(step) for step in steps)
        balance = statistics.mean(statistics.mean(step) / max(step) for step in steps)
        inside = gpus <= args.node_gpus
        speed = 1e9 * (args.node_gbytes_per_second if inside else args.network_gbytes_per_second)
        reduce = all_reduce_seconds(gradient_bytes, gpus, speed, args.latency_microseconds * 1e-6)
        gather = 2 * base_bytes * (gpus - 1) / gpus / speed
        seconds = {"ddp": compute + reduce, "fsdp": max(compute, gather) + reduce}
        one = one or seconds
        line = {
            "gpus": gpus,
            "rows_a_step": gpus * args.rows,
            "unique_tokens_a_gpu": round(statistics.mean(statistics.mean(step) for step in steps)),
            "balance": round(balance, 3),
            "all_reduce_ms": round(reduce * 1e3, 2),
            "gather_ms": round(gather * 1e3, 1),
            **{f"{name}_step_ms": round(value * 1e3, 1) for name, value in seconds.items()},
            **{f"{name}_efficiency": round(one[name] / value, 3) for name, value in seconds.items()},
        }
        print(json.dumps(line), flush=True)


# ---- this machine ----------------------------------------------------------------------------------------------------


def measured(args: argparse.Namespace, rows: Sequence[Any]) -> None:
    """One JSON line a number of processes: the median step, its prediction, and the efficiency of both."""
    cores = len(os.sched_getaffinity(0))
    alone: dict[int, float] = {}  # threads -> median seconds of one process
    base = None
    for processes in args.measure:
        threads = max(1, cores // processes)
        if threads not in alone:
            alone[threads] = run(args, 1, threads)
        seconds = alone[threads] if processes == 1 else run(args, processes, threads)
        crowd = max(1.0, processes * threads / cores)  # processes that share a core
        steps = shares(rows, processes, args.steps, args.rows)[WARM_UP:]
        largest = statistics.median(max(step) for step in steps)
        own = statistics.median(step[0] for step in shares(rows, 1, args.steps, args.rows)[WARM_UP:])
        reduce = gloo_seconds(processes, threads, adapter_parameters(args)) if processes > 1 else 0.0
        guess = alone[threads] * largest / own * crowd + reduce
        base = base or (seconds, guess)
        line = {
            "processes": processes,
            "threads_each": threads,
            "rows_a_step": processes * args.rows,
            "median_seconds": round(seconds, 3),
            "predicted_seconds": round(guess, 3),
            "all_reduce_seconds": round(reduce, 4),
            "largest_share_tokens": round(largest),
            "rows_per_second": round(processes * args.rows / seconds, 2),
            # Threads are divided, so N processes can be as fast as one with all threads, not N times as fast.
            "throughput_against_first": round(processes * base[0] / (args.measure[0] * seconds), 3),
            "predicted_throughput": round(processes * base[1] / (args.measure[0] * guess), 3),
        }
        print(json.dumps(line), flush=True)


def run(args: argparse.Namespace, processes: int, threads: int) -> float:
    """Median seconds of the steps after the warm-up."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += ["-m", "espalier", "train", "--dataset_path", str(args.data), "--model_path", args.model]
        command += ["--per_device_train_batch_size", str(args.rows), "--max_steps", str(args.steps)]
        command += ["--logging_steps", "1", "--save_strategy", "no", "--self_check", "off", "--use_cpu"]
        command += ["--output_dir", f"{scratch}/run"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        lines = [json.loads(line) for line in Path(scratch, "run", "metrics.jsonl").read_text().splitlines()]
    late = [line for line in lines if "loss" in line][WARM_UP:]
    return statistics.median(line["supervised_tokens"] / line["supervised_tokens_per_second"] for line in late)


def gloo_seconds(processes: int, threads: int, numbers: int) -> float:
    """A timed all-reduce of so many float32 numbers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [__file__, "--data", "-", "--all_reduce", str(numbers)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return statistics.median(json.loads(line)["seconds"] for line in done.stdout.splitlines())


def timed_all_reduce(numbers: int) -> float:
    """Seconds of one all-reduce over gloo, median of ten after three."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    vector, times = torch.ones(numbers), []
    for _ in range(WARM_UP + 10):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(vector)
        times.append(time.perf_counter() - start)
        vector.fill_(1.0)
    dist.destroy_process_group()
    return statistics.median(times[WARM_UP:])


def adapter_parameters(args: argparse.Namespace) -> int:
    """Trainable numbers of the default adapter on the model that is run."""
    from espalier.config import RunConfig
    from espalier.model.load import load_config, resolve_model
    from espalier.model.lora import add_adapter, empty_model, lora_config

    defaults = RunConfig()
    model = empty_model(load_config(resolve_model(args.model)))
    adapter = add_adapter(model, lora_config(rank=defaults.lora_rank, alpha=defaults.lora_alpha))
    return sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)


if __name__ == "__main__":
    main()
