"""Two "hosts" on one machine: network namespaces joined by a veth pair, and a torchrun job of one process on each.

    python tests/distributed/two_hosts.py [killed] [unplugged]

Needs root and iproute2; prints what each scenario has shown, in seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import ADAPTER, WORKER, assert_same_run, settings
from test_equality import write_rows

from espalier.training.run import train

LINK = "veth0"  # the name inside both namespaces
SUBNET = f"10.99.{os.getpid() % 250}"
# How often a host sends again to one that does not answer. With the kernel's 15, torchrun on a host without a network
# waits a quarter of an hour for its store, whatever the timeouts that it is given; with 6 half a minute.
RETRIES = 6
SLOW = {"kind": "slow", "rank": None, "step": None}  # every step takes a while: time to take a host away


def ip(*words: str) -> str:
    """Run `ip`, return what it says."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def why_not() -> str | None:
    """Why namespaces cannot be made here; None where they can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made: {error.stderr.strip()}"


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """The names of two namespaces that reach each other as SUBNET.1 and SUBNET.2; gone afterwards, and all in them."""
    names = f"espalier-{os.getpid()}-1", f"espalier-{os.getpid()}-2"
    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"{SUBNET}.{number}/24", "dev", LINK)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", LINK, "up")
            ip("netns", "exec", name, "sh", "-c", f"echo {RETRIES} > /proc/sys/net/ipv4/tcp_retries2")
        yield names
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                kill_host(name)
                ip("netns", "del", name)


def processes_on(host: str) -> list[int]:
    """Ids of the processes that live in a namespace."""
    return [int(word) for word in ip("netns", "pids", host).split()]


def kill_host(host: str) -> None:
    """SIGKILL to every process in the namespace."""
    for process in processes_on(host):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@dataclass
class Job:
    """One torchrun on each host, and what each has printed."""

    folder: Path
    hosts: tuple[str, str]
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, options: dict[str, Any], fault: dict[str, Any] | None = None) -> Job:
        runs = self.folder / "runs.json"
        runs.write_text(json.dumps([{"options": options, "fault": fault}]), encoding="utf-8")
        for number, host in enumerate(self.hosts, start=1):
            command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"]
            command += ["--nnodes", "2", "--nproc_per_node", "1", "--local_addr", f"{SUBNET}.{number}"]
            command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{SUBNET}.1:29400", "--rdzv_id", "two-hosts"]
            command += ["--rdzv_conf", f"is_host={int(number == 1)}", str(WORKER), str(runs)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK}
            with open(self.folder / f"said-{number}", "wb") as said:
                self.launchers.append(subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment))
        return self

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        for launcher in self.launchers:
            launcher.kill()
            launcher.wait()

    def said(self, number: int) -> str:
        """What host 1 or 2 has printed so far."""
        return (self.folder / f"said-{number}").read_text(encoding="utf-8", errors="replace")

    def wait_for_file(self, path: Path, seconds: float) -> None:
        """Until `path` is there; TimeoutError otherwise, or where the job has ended before."""
        end = time.monotonic() + seconds
        while not path.exists():
            if time.monotonic() > end or any(launcher.poll() is not None for launcher in self.launchers):
                raise TimeoutError(f"no {path.name}:\n{self.said(1)}\n{self.said(2)}")
            time.sleep(0.05)

    def wait(self, numbers: Sequence[int], seconds: float) -> dict[int, tuple[float | None, float]]:
        """By host: seconds until it has printed an error, if it has, and until no process is left on it."""
        started = time.monotonic()
        messages: dict[int, float] = {}
        ended: dict[int, float] = {}
        while len(ended) < len(numbers):
            passed = time.monotonic() - started
            if passed > seconds:
                raise TimeoutError(f"a host goes on after {seconds} s:\n{self.said(1)}\n{self.said(2)}")
            for number in numbers:
                if number not in messages and "error: " in self.said(number):
                    messages[number] = passed
                is_over = self.launchers[number - 1].poll() is not None and not processes_on(self.hosts[number - 1])
                if number not in ended and is_over:
                    ended[number] = passed
            time.sleep(0.1)
        return {number: (messages.get(number), ended[number]) for number in numbers}


def run_whole(folder: Path, options: dict[str, Any]) -> str:
    """A job that must end well; what both hosts have printed."""
    with two_hosts() as hosts, Job(folder, hosts).start(options) as job:
        job.wait((1, 2), 600)
        text = job.said(1) + job.said(2)
        assert [launcher.returncode for launcher in job.launchers] == [0, 0], text
    return text


def equal(folder: Path) -> dict[str, Any]:
    """Ten steps on two hosts are those of one process. Leaves folder/two for the others to compare with."""
    options = settings(write_rows(folder / "rows.jsonl"), folder / "two", save_steps=4)
    started = time.monotonic()
    run_whole(folder, options)
    seconds = time.monotonic() - started
    train(**{**options, "output_dir": str(folder / "one"), "per_device_train_batch_size": 8})
    assert_same_run(folder / "one", folder / "two")
    return {"ten steps on two hosts": "those of one process to 1e-5", "seconds": round(seconds, 1)}


def lost(folder: Path, how: str) -> dict[str, Any]:
    """Host 2 is "killed", or the link is "unplugged", in mid-run; then the job goes on. Needs folder/two."""
    options = settings(folder / "rows.jsonl", folder / how, save_steps=4)
    seen: dict[str, Any] = {}
    with two_hosts() as hosts, Job(folder, hosts).start(options, SLOW) as job:
        job.wait_for_file(folder / how / "checkpoint-4", 600)
        if how == "killed":
            kill_host(hosts[1])
        else:
            ip("-n", hosts[1], "link", "set", LINK, "down")
        for number, (message, ended) in job.wait((1,) if how == "killed" else (1, 2), 120).items():
            assert message is not None, job.said(number)
            said = next(line for line in job.said(number).splitlines() if "error: " in line)
            seen[f"host {number}"] = {"message after": round(message, 1), "ended after": round(ended, 1), "said": said}
        assert not (folder / how / "checkpoint-8").exists()  # it was in mid-run
    text = run_whole(folder, {**options, "resume_from_checkpoint": "last"})
    assert "from checkpoint-4, step 4" in text, text
    assert (folder / how / ADAPTER).read_bytes() == (folder / "two" / ADAPTER).read_bytes()
    return {**seen, "started again": "bit-equal to the run that was not lost"}


def main() -> None:
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("equal", json.dumps(equal(folder)), flush=True)
        for how in sys.argv[1:] or ["killed", "unplugged"]:
            print(how, json.dumps(lost(folder, how), indent=1), flush=True)


if __name__ == "__main__":
    main()
