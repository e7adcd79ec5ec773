"""accelerate's launcher; examples/cluster/slurm.sh as SLURM would run it: its commands are stand-ins, torchrun and the
run are real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import assert_same_run, processes_of, settings
from test_equality import write_rows

from espalier.runfile import build_config
from espalier.training.run import train

RECIPES = Path(__file__).parents[2] / "examples" / "cluster"

# Starts the command once a node, in the background, and ends with the first failure, as srun --kill-on-bad-exit does.
SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & done
status=0
for _ in $(seq "$SLURM_NNODES"); do wait -n || status=$?; done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames node[1-2]" ] || exit 1
echo localhost
sleep 0.2 # a reader of the first line alone is gone by now, and a second one meets a closed pipe
echo other
"""
TORCHRUN = f"""#!/usr/bin/env bash
exec {sys.executable} -m torch.distributed.run "$@"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes on this machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN}.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    return {**os.environ, **job, "PATH": f"{programs}:{os.environ['PATH']}", "PROCESSES_PER_NODE": "1"}


def submit(environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(RECIPES / "slurm.sh"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=180,
        check=False,
    )


def test_slurm_recipe_trains_what_one_process_does(slurm: dict[str, str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    train(**settings(rows, tmp_path / "one", per_device_train_batch_size=8))
    run_file = tmp_path / "run.yaml"
    run_file.write_text(build_config(settings(rows, tmp_path / "unused")).to_yaml(), encoding="utf-8")
    done = submit(slurm, "--config", str(run_file), "--output_dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stdout
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert processes_of(tmp_path) == []
    # SLURM starts a job again after its time limit: the run goes on, or says that nothing is left to do.
    again = submit(
        {**slurm, "SLURM_RESTART_COUNT": "1"}, "--config", str(run_file), "--output_dir", str(tmp_path / "two")
    )
    assert again.returncode != 0
    assert again.stdout.count("nothing is left to do: all 10 steps are done and the adapter is saved") == 1


def test_accelerate_launch_trains_what_one_process_does(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    train(**settings(rows, tmp_path / "one", per_device_train_batch_size=8))
    run_file = tmp_path / "run.yaml"
    run_file.write_text(build_config(settings(rows, tmp_path / "two")).to_yaml(), encoding="utf-8")
    # Without --multi_gpu accelerate starts one process where there are no GPUs.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, "-m", "espalier", "train", "--config", str(run_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "of 8 rows (4 x accumulation 1 x 2 processes)" in done.stdout
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert processes_of(tmp_path) == []
