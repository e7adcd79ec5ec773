"""One run on the workers of a Ray cluster: Ray Train's TorchTrainer around `espalier.train`.

    python ray_train.py --config run.yaml --output_dir /shared/runs/first --workers 2 [--gpu]

Ray starts the workers and joins them in one process group; espalier finds the group and deals the rows. The run file,
the rows and the output folder must lie where all workers see them.
"""

from __future__ import annotations

import argparse
import os
from typing import Any


def train_worker(options: dict[str, Any]) -> None:
    """What each worker runs."""
    from espalier import train
    from espalier.runfile import build_config

    train(build_config({"output_dir": options["output_dir"]}, options["config"]))


def main() -> None:
    """Start the run and wait for its end; an error of a worker is raised here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="run file, as espalier train --config takes it")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    args = parser.parse_args()

    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # Ray's choice on GPUs is NCCL alone, which carries no tensor of a CPU: a step's loss and counts are one.
    groups = TorchConfig(backend="cpu:gloo,cuda:nccl" if args.gpu else "gloo")
    options = {"config": os.path.abspath(args.config), "output_dir": os.path.abspath(args.output_dir)}
    TorchTrainer(
        train_worker,
        train_loop_config=options,
        torch_config=groups,
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
        run_config=RunConfig(storage_path=options["output_dir"] + "-ray"),
    ).fit()


if __name__ == "__main__":
    main()
