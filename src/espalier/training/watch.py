"""Signs of life of all ranks, and the first failure of any, in the launcher's key-value store."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import PrefixStore

BEAT_SECONDS = 1.0
LOST_SECONDS = 30.0  # without a sign of life a rank counts as lost; a minute is what a user may have to wait
STORE_SECONDS = 10.0  # an answer of the store takes no longer, unless its machine is gone

Failure = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a process stands. restarts: how often the launcher has started this job again."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    restarts: int = 0


class Watch:
    """A thread that looks after this rank's share: its own sign of life, the next rank's, and the failure of any.

    The ring of neighbours keeps the work of a thousand ranks small: a rank that is lost is missed by the one before it.
    A second thread looks after the first: where the network is gone, an answer of the store may be waited for in vain.
    store: for the main thread; the watching thread has a connection of its own, since a wait locks a connection.
    prefix: of all names in the store. failure: what a rank has failed with, once it is known here. print_failure: for
    a main thread that cannot. is_gathering: set by a main thread that waits for pieces of the base, and hears nothing.
    """

    def __init__(self, place: Place, prefix: str, grace_seconds: float):
        self.rank, self.local_rank, self.world = place.rank, place.local_rank, place.world
        self.failure: Failure | None = None
        self.is_ending = threading.Event()
        self.is_gathering = False
        self.print_failure: Callable[[Failure], None] = lambda failure: None
        self._grace = grace_seconds
        self.store, self._own = _stores(prefix)
        self._closed = threading.Event()
        self._reached = time.monotonic()  # when the store answered last
        self._thread = threading.Thread(target=self._run, name="espalier-watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._mind_store, name="espalier-store", daemon=True).start()

    def post(self, failure: Failure) -> None:
        """Say that this rank has failed. The first of all is kept, and is `failure` from now on."""
        told = self.store.compare_set("failure", "", json.dumps(failure))
        self.failure = json.loads(told)

    def speaks(self, failure: Failure) -> bool:
        """True for the rank that prints: the lowest that is alive; the first of a machine where the store is gone."""
        if failure.get("no_store"):
            return self.local_rank == 0
        return self.rank == min(rank for rank in range(self.world) if rank not in failure["lost"])

    def said(self, failure: Failure) -> None:
        """This rank prints the message, and minds no SIGTERM any more."""
        if failure.get("no_store"):
            return
        with suppress(Exception):
            self.store.set("said", "1")

    def wait_for_speaker(self, failure: Failure, grace_seconds: float) -> None:
        """A launcher ends all ranks as soon as one ends: not before the one that speaks is ready for that."""
        if failure.get("no_store"):
            time.sleep(BEAT_SECONDS)
            return
        until = time.monotonic() + grace_seconds + 5
        with suppress(Exception):
            while not self.store.check(["said"]) and time.monotonic() < until:
                time.sleep(0.02)

    def why_broken(self, said: str) -> Failure:
        """The connection to another rank broke: what has it failed with, or is it lost?"""
        before: list[bytes] = []
        with suppress(Exception):
            before = self._beats()
        until = time.monotonic() + 4 * BEAT_SECONDS
        while self.failure is None and time.monotonic() < until:
            time.sleep(0.1)
        if self.failure is None:
            self._post_lost(before, said)
        assert self.failure is not None
        return self.failure

    def close(self) -> None:
        """No more signs of life: the run is over."""
        self._closed.set()
        self._thread.join(2 * BEAT_SECONDS)

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        neighbour, last, since, number = (self.rank + 1) % self.world, b"", time.monotonic(), 0
        while not self._closed.wait(BEAT_SECONDS):
            number += 1
            try:
                self._own.set(f"beat/{self.rank}", str(number))
                beat = self._own.get(f"beat/{neighbour}") if self._own.check([f"beat/{neighbour}"]) else b""
                if self.failure is None and self._own.check(["failure"]):
                    self.failure = json.loads(self._own.get("failure"))
                self._reached = time.monotonic()
            except Exception:
                continue  # `_mind_store` counts the seconds
            if beat != last or self.is_ending.is_set():
                last, since = beat, time.monotonic()
            elif self.failure is None and time.monotonic() - since > LOST_SECONDS:
                before = self._beats()
                time.sleep(3 * BEAT_SECONDS)
                self._post_lost(before, f"no sign of life for {LOST_SECONDS:.0f} seconds")
            if self.failure is not None:
                self._end_by_force()
                return

    def _mind_store(self) -> None:
        """End this process where the store gives no answer: the first thread, and the main one, may wait for ever."""
        while not self._closed.wait(BEAT_SECONDS):
            if time.monotonic() - self._reached > LOST_SECONDS:
                said = f"the launcher's store has not answered for {LOST_SECONDS:.0f} seconds"
                self._exit({**_lost(said, []), "no_store": True})

    def _end_by_force(self) -> None:
        """The main thread hears of the failure by itself, unless it waits for a rank that will never answer."""
        failure, until = self.failure, time.monotonic() + self._grace
        assert failure is not None
        while time.monotonic() < until and not self.is_gathering:
            if self._closed.wait(0.1) or self.is_ending.is_set():
                return
        self._exit(failure)

    def _exit(self, failure: Failure) -> NoReturn:
        if self.speaks(failure):
            self.print_failure(failure)
            self.said(failure)
        else:
            self.wait_for_speaker(failure, 0)
        os._exit(failure["exit_code"])

    def _beats(self) -> list[bytes]:
        names = [f"beat/{rank}" for rank in range(self.world)]
        return [self._own.get(name) if self._own.check([name]) else b"" for name in names]

    def _post_lost(self, before: list[bytes], said: str) -> None:
        """Name the ranks that have given no sign of life since `before`."""
        try:
            lost = [r for r, (a, b) in enumerate(zip(before, self._beats(), strict=True)) if a == b and r != self.rank]
            self.post(_lost(said, lost))
        except Exception:
            self.failure = {**_lost(said, []), "no_store": True}


def _lost(said: str, ranks: list[int]) -> Failure:
    names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else "another rank"
    return {
        "what": f"{names} of the run {'are' if len(ranks) > 1 else 'is'} lost",
        "where": None,
        "details": [said],
        "todo": None,
        "kind": "TrainingError",
        "exit_code": 1,
        "rank": None,
        "lost": ranks,
    }


def _stores(prefix: str) -> tuple[PrefixStore, PrefixStore]:
    """Two connections to the store that the launcher, or rank 0, holds."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed import distributed_c10d as c10d

    # Private, and the only way to the address where the process group was given its store by somebody else (Ray).
    store: Any = c10d._get_default_store()
    while isinstance(store, c10d.PrefixStore):
        store = store.underlying_store
    timeout = timedelta(seconds=STORE_SECONDS)
    first, second = (TCPStore(store.host, store.port, is_master=False, timeout=timeout) for _ in range(2))
    return c10d.PrefixStore(prefix, first), c10d.PrefixStore(prefix, second)
