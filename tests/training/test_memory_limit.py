"""A run under a real limit on its process's memory: the same losses, and the smaller plan is kept over a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA bounds memory on Linux")
SCRIPT = Path(__file__).with_name("limited_run.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder, what limited_run.py says of its five runs)."""
    folder = tmp_path_factory.mktemp("limited")
    made = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return folder, json.loads(made.stdout)


def test_a_limit_below_the_plan_is_met_before_step_1(runs: tuple[Path, dict[str, Any]]) -> None:
    _, found = runs
    planned = found["planned"]
    assert "planned smaller to fit" in planned["said"]
    assert planned["failed_in"] == []
    assert planned["predicted"] <= found["plain"]["predicted"] - 30_000_000
    assert planned["losses"] == pytest.approx(found["plain"]["losses"], abs=1e-5)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_refused_allocation_changes_no_loss(where: str, runs: tuple[Path, dict[str, Any]]) -> None:
    _, found = runs
    limited, plain = found[where], found["plain"]
    assert plain["failed_in"] == []
    assert plain["plans"] == [None] * 4
    assert limited["failed_in"][0] == where
    assert limited["said"].count("memory: an allocation failed") == len(limited["failed_in"])
    assert limited["plans"][-1] is not None
    tried = "was tried, because nothing is predicted for this model, and there is a limit: it fits with packs of"
    assert (tried in limited["said"]) == (where == "forward")  # that one fails before step 1
    assert (limited["plans"][0] is not None) >= (where == "forward")
    assert len(limited["losses"]) == 4
    assert limited["losses"] == pytest.approx(plain["losses"], abs=1e-5)


def test_a_resumed_run_keeps_its_smaller_plan(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, found = runs
    whole, resumed = found["forward"], found["resumed"]
    assert f"from checkpoint-{resumed['stop']}, step {resumed['stop']}" in resumed["said"]
    assert resumed["stop"] < 4
    assert whole["plans"][-1] is not None
    assert resumed["plans"] == whole["plans"]
    assert resumed["failed_in"] == []  # what it is allowed now is enough for the largest plan
    for name in ("adapter_model.safetensors", "checkpoint-4/optimizer.safetensors"):
        assert (folder / "resumed" / name).read_bytes() == (folder / "forward" / name).read_bytes(), name
