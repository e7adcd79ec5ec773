"""Real runs as processes, killed by SIGKILL at random instants, resumed to the end, compared with one never killed.

`python tests/reliability/kills.py --kills 30` prints the figures; test_kills.py runs the same in a shorter form.
Instants: while the process starts, at a random time of the training, and while a checkpoint or the adapter is being
written (seen by its hidden folder). A chain is one run that is killed several times, also while it resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CASES = Path(__file__).parent.parent / "cases"
STEPS, SAVE_EVERY = 40, 2
ADAPTER = "adapter_model.safetensors"
WORDS = ("pear", "fig", "plum", "kiwi", "lime", "date")
INSTANTS = ("start", "training", "training", "saving", "saving")


@dataclass
class Figures:
    """What happened. at: instant -> how many kills; lost: steps done after the checkpoint that was resumed from."""

    kills: int = 0
    chains: int = 0
    finished_first: int = 0
    equal: int = 0
    at: dict[str, int] = field(default_factory=dict)
    in_a_save: int = 0
    before_any_checkpoint: int = 0
    lost: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """One way to run: loader workers and further environment."""

    workers: int = 0
    environment: tuple[tuple[str, str], ...] = ()

    def env(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **dict(self.environment)}


def command(rows: Path, out: Path, setting: Setting) -> list[str]:
    """A run of the tiny model with dropout, evaluations and a checkpoint every second step."""
    options: dict[str, Any] = {
        "dataset_path": rows,
        "model_path": CASES / "_shared" / "tiny-llama",
        "output_dir": out,
        "max_steps": STEPS,
        "save_steps": SAVE_EVERY,
        "eval_fraction": 0.2,
        "eval_strategy": "steps",
        "eval_steps": SAVE_EVERY,
        "per_device_train_batch_size": 4,
        "logging_steps": 3,
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "learning_rate": 0.01,
        "save_total_limit": 3,
        "load_best_model_at_end": "true",
        "self_check": "off",
        "dataloader_num_workers": setting.workers,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "espalier", "train", "--fp32", "--use_cpu", *flags]


def write_rows(path: Path, count: int = 22) -> Path:
    """Alpaca rows with answers of unequal lengths."""
    rows = [
        {"instruction": f"say {WORDS[i % 6]} in row {i}", "output": " ".join([WORDS[i % 6]] * (1 + i % 4))}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def result_of(out: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The adapter's bytes, and the log without times."""
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = ("per_second", "runtime")
    return (out / ADAPTER).read_bytes(), [
        {k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in log
    ]


def uninterrupted(rows: Path, out: Path, setting: Setting) -> tuple[Any, float]:
    """(result of a run that nobody kills, seconds from its run file to its end)."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command(rows, out, setting), env=setting.env(), stdout=said, stderr=subprocess.STDOUT, text=True
        )
        while not (out / "run.yaml").exists() and process.poll() is None:
            time.sleep(0.01)
        started = time.monotonic()
        code = process.wait(timeout=600)
        said.seek(0)
        assert code == 0, said.read()
    return result_of(out), time.monotonic() - started


def newest_step(out: Path) -> int:
    """Step of the newest checkpoint that can be seen; 0 without one."""
    found = [int(p.parent.name.split("-")[1]) for p in out.glob("checkpoint-*/manifest.json")]
    return max(found, default=0)


def last_logged(out: Path) -> int:
    """The last step in metrics.jsonl, whose last line the kill may have cut."""
    if not (out / "metrics.jsonl").exists():
        return 0
    steps = [0]
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            steps.append(int(json.loads(line)["step"]))
        except ValueError:
            continue
    return max(steps)


def kill_chain(
    rows: Path, out: Path, setting: Setting, kills: int, seconds: float, choice: random.Random, figures: Figures
) -> Any:
    """Start a run, kill it `kills` times, let it end; its result. Every kill is counted in `figures`."""
    figures.chains += 1
    for attempt in range(kills + 1):
        fresh = not (out / "run.yaml").exists()
        arguments = command(rows, out, setting) if fresh else resume(out)
        seen = newest_step(out)
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(arguments, env=setting.env(), stdout=said, stderr=subprocess.STDOUT, text=True)
            killed = attempt < kills and kill(process, out, seconds, choice, figures)
            process.wait(timeout=600)
            said.seek(0)
            text = said.read()
        assert "passed over" not in text, text  # nothing half-written was ever visible
        if seen and "  output " in text:
            assert f"from checkpoint-{seen}, step {seen}" in text, text
        if not killed:
            # Killed between its last file and its exit, a run is finished, and says so.
            assert process.returncode == 0 or "nothing is left to do" in text, text
            return result_of(out)
        if newest_step(out) == 0:
            figures.before_any_checkpoint += 1
        figures.lost.append(max(0, last_logged(out) - newest_step(out)))
    raise AssertionError("the last attempt is never killed")


def resume(out: Path) -> list[str]:
    """The command that the tool itself advises after a stop."""
    arguments = ["--config", str(out / "run.yaml"), "--resume_from_checkpoint", "last"]
    return [sys.executable, "-m", "espalier", "train", *arguments]


def kill(process: Any, out: Path, seconds: float, choice: random.Random, figures: Figures) -> bool:
    """SIGKILL at a random instant; False where the run was finished before it."""
    instant = choice.choice(INSTANTS)
    if instant == "start":
        time.sleep(choice.uniform(0, 6))
    else:
        lock_or_log = out / ".lock"
        while not lock_or_log.exists() and process.poll() is None:
            time.sleep(0.005)
        if instant == "training":
            wait_for_output(process, out)
            time.sleep(choice.uniform(0, seconds))
        else:
            wait_for_save(process, out, choice)
    if process.poll() is not None:
        figures.finished_first += 1
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.returncode != -signal.SIGKILL:
        figures.finished_first += 1
        return False
    figures.kills += 1
    figures.at[instant] = figures.at.get(instant, 0) + 1
    figures.in_a_save += any(out.glob(".*.partial"))
    return True


def wait_for_output(process: Any, out: Path) -> None:
    """Until this process, not the one before it, has written the run file: training is about to begin."""
    before = stamp(out)
    while stamp(out) == before and process.poll() is None:
        time.sleep(0.005)


def stamp(out: Path) -> int:
    try:
        return (out / "run.yaml").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def wait_for_save(process: Any, out: Path, choice: random.Random) -> None:
    """Until a hidden folder of a save is there, for the n-th time, and then a few milliseconds."""
    for _ in range(choice.randint(1, 8)):
        while not any(out.glob(".checkpoint*.partial")) and process.poll() is None:
            pass  # a save takes milliseconds: sleeping would miss it
        while any(out.glob(".checkpoint*.partial")) and process.poll() is None and choice.random() < 0.98:
            pass
    while not any(out.glob(".*.partial")) and process.poll() is None:
        pass
    time.sleep(choice.uniform(0, 0.02))


def campaign(folder: Path, setting: Setting, kills: int, seed: int, kills_a_chain: int = 5) -> Figures:
    """So many kills in chains; every chain's result is compared with the uninterrupted run's."""
    choice, figures = random.Random(seed), Figures()
    rows = write_rows(folder / "rows.jsonl")
    whole, seconds = uninterrupted(rows, folder / "whole", setting)
    while figures.kills < kills:
        out = folder / f"chain-{figures.chains}"
        left = min(kills_a_chain, kills - figures.kills)
        result = kill_chain(rows, out, setting, left, seconds, choice, figures)
        assert result[0] == whole[0], f"{out}: the adapter differs"
        assert result[1] == whole[1], f"{out}: the log differs"
        assert not list(out.glob(".*.partial")), "something half-written was left"
        figures.equal += 1
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    perturbed = (("MALLOC_PERTURB_", "165"),)
    for setting in (Setting(0), Setting(0, perturbed), Setting(2, perturbed)):
        share = -(-options.kills // 3)
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            print(setting, campaign(Path(folder), setting, share, options.seed), flush=True)
            print(f"{time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
