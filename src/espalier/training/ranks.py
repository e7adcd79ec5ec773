"""The processes of a run: who they are, what they decide together, how they end together.

`torchrun` and `accelerate launch` start N processes (ranks) and restart them; torch.distributed carries what they say.
Two ways of talking are used, and no third:

- one all-reduce of a few numbers and one of the adapter's gradients, each step; with a sharded base (model/shard.py)
  one more, of the number of micro-steps;
- the launcher's key-value store, for all that happens seldom: waiting for rank 0, errors, signs of life.

An error of any rank is put into the store. A thread of every rank looks there each second, and leaves a sign of life:
so a rank that waits for another one learns that there is nothing to wait for. One process needs nothing of this, and
every function here then does the obvious thing at once.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from espalier import errors
from espalier.errors import EspalierError, TrainingError
from espalier.training.faults import Interrupted
from espalier.training.watch import Place, Watch

if TYPE_CHECKING:
    import torch
    from torch import nn

_joined = 0  # runs of this process so far: each has names of its own in the store
GRACE_SECONDS = 10.0  # what a rank has to end by itself once another one has failed


def place() -> Place:
    """Where the launcher's environment says that this process stands; one of one without a launcher."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    if any(name not in os.environ for name in names):
        return Place()
    rank, local_rank, world = (int(os.environ[name]) for name in names[:3])
    return Place(rank, local_rank, world, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


class Ranks:
    """All ranks of the run, as seen from one of them.

    Every rank calls the methods in the same order, but for `post` and `ending`. Values are what JSON holds.
    hint: what the last message adds, such as how to go on.
    """

    def __init__(self, place: Place | None = None, watch: Watch | None = None):
        place = place or Place()
        self.rank, self.local_rank, self.world = place.rank, place.local_rank, place.world
        self.restarts = place.restarts
        self.hint: Callable[[], str] = lambda: ""
        self._watch = watch
        self._count = 0
        if watch is not None:
            watch.print_failure = self._print_failure

    @property
    def leads(self) -> bool:
        """Rank 0 speaks and writes."""
        return self.rank == 0

    # ---- seldom: through the store -------------------------------------------------------------------------------

    def exchange(self, value: Any = None) -> list[Any]:
        """The values of all ranks, by rank, on every rank. Raises what another rank has failed with."""
        if self._watch is None:
            return [value]
        store, self._count = self._watch.store, self._count + 1
        store.set(f"{self._count}/{self.rank}", json.dumps(value))
        if self.leads:
            names = [f"{self._count}/{rank}" for rank in range(self.world)]
            values = [json.loads(self._wait(name)) for name in names]
            for name in (*names, f"{self._count - 1}/all"):  # whoever has come here has read the one before
                store.delete_key(name)
            store.set(f"{self._count}/all", json.dumps(values))
            return values
        told: list[Any] = json.loads(self._wait(f"{self._count}/all"))
        return told

    def _wait(self, name: str) -> bytes:
        assert self._watch is not None
        pause = 0.002
        while not self._watch.store.check([name]):
            if self._watch.failure is not None:
                raise _as_error(self._watch.failure)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        value: bytes = self._watch.store.get(name)
        return value

    def share(self, value: Any = None) -> Any:
        """Rank 0's value."""
        return self.exchange(value if self.leads else None)[0]

    def led(self, work: Callable[[], Any]) -> None:
        """Rank 0 does `work` while the others wait. An EspalierError of it is raised on every rank."""
        problem = None
        if self.leads:
            try:
                work()
            except EspalierError as error:
                problem = error
        told = self.share(None if problem is None else _as_dict(problem))
        if told is not None:
            raise problem or _as_error(told)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 first, then the first rank of every machine, then the rest: what one has built, the others find."""
        turn = 0 if self.leads else 1 if self.local_rank == 0 else 2
        for now in range(3):
            if now == turn:
                yield
            self.exchange()

    # ---- each step: two all-reduces ------------------------------------------------------------------------------

    def settle(
        self, sums: Iterable[float], *, error: Exception | None = None, stop_signal: int | None = None
    ) -> list[float]:
        """The sums over all ranks, in float64.

        All ranks raise together: `error` where one came with one, `Interrupted` where one was asked to stop.
        """
        if self._watch is None:
            if error is not None:
                raise error
            if stop_signal is not None:
                raise Interrupted(stop_signal)
            return list(sums)
        import torch

        if error is not None:
            self.post(error)
        flags = (error is not None, stop_signal == signal.SIGINT, stop_signal == signal.SIGTERM)
        vector = torch.tensor([*sums, *(float(flag) for flag in flags)], dtype=torch.float64)
        self._all_reduce(vector)
        *totals, failed, interrupted, terminated = vector.tolist()
        if failed:
            raise error or _as_error(json.loads(self._wait("failure")))
        if interrupted or terminated:
            raise Interrupted(signal.SIGINT if interrupted else signal.SIGTERM)
        return totals

    def most(self, count: int) -> int:
        """The largest `count` of any rank."""
        if self._watch is None:
            return count
        import torch
        import torch.distributed as dist

        largest = torch.tensor([count])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    @contextmanager
    def gathering(self, sharded: bool = True) -> Iterator[None]:
        """Around a computation on a sharded base: a rank that waits for a piece cannot hear that another has failed,
        and has nothing to finish, so it is ended at once (Watch)."""
        if self._watch is None or not sharded:
            yield
            return
        self._watch.is_gathering = True
        try:
            yield
        finally:
            self._watch.is_gathering = False

    def send_from_0(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every rank rank 0's values: a start that is computed (PiSSA) may differ in the last bit by hardware."""
        if self._watch is None:
            return
        import torch.distributed as dist

        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all ranks: one float32 all-reduce. A rank without rows adds nothing.

        A parameter that has no gradient on any rank keeps none: the optimizer passes it over, as in one process.
        """
        if self._watch is None:
            return
        import torch

        trained = [parameter for parameter in parameters if parameter.requires_grad]
        device = trained[0].device
        has_one = torch.tensor([float(parameter.grad is not None) for parameter in trained], device=device)
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in trained]
        flat = torch.cat([*parts, has_one])
        self._all_reduce(flat)
        *sums, counts = flat.split([*(p.numel() for p in trained), len(trained)])
        for parameter, total, count in zip(trained, sums, counts.tolist(), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if count else None

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        import torch.distributed as dist

        dist.all_reduce(tensor)

    # ---- the end -------------------------------------------------------------------------------------------------

    def post(self, error: BaseException) -> None:
        """Tell all ranks that this one has failed; the first one to say so is heard."""
        assert self._watch is not None
        self._watch.post(_as_dict(error, rank=self.rank))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around a whole run: all ranks end it, in success, after a signal or with one error."""
        if self._watch is None:
            yield
            return
        try:
            yield
            self._leave()
        except SystemExit:  # after a signal, on every rank; a checkpoint was saved
            _ignore_sigterm()
            with suppress(Exception):
                self._leave()
            raise
        except BaseException as error:
            raise self.ending(error) from None

    def _leave(self) -> None:
        """Go when all are ready to go, and rank 0, whose process may hold the store, last."""
        assert self._watch is not None
        self.exchange()
        store = self._watch.store
        if not self.leads:
            store.set(f"gone/{self.rank}", "1")
        for rank in range(1, self.world) if self.leads else ():
            self._wait(f"gone/{rank}")
        self._watch.close()

    def ending(self, error: BaseException) -> EspalierError:
        """What to raise: the error of the rank that failed first. `told_elsewhere` where another rank prints it."""
        assert self._watch is not None
        watch = self._watch
        watch.is_ending.set()
        _ignore_sigterm()
        if _is_broken_line(error):
            failure = watch.why_broken(str(error))
        else:
            self.post(error)
            failure = watch.failure or _as_dict(error, rank=self.rank)
        _hang_up()  # a rank that waits for this one in an all-reduce must not
        result = _as_error(failure)
        if watch.speaks(failure):
            self._add_hint(result, failure)
            watch.said(failure)
        else:
            result.told_elsewhere = True
            watch.wait_for_speaker(failure, GRACE_SECONDS)
        watch.close()
        return result

    def _add_hint(self, result: EspalierError, failure: dict[str, Any]) -> None:
        # A rank is lost: nothing is wrong with the run. Without the store the network is gone, and the run's folder
        # may be on it.
        hint = self.hint() if failure["rank"] is None and not failure.get("no_store") else ""
        result.todo = "\n  ".join(text for text in (result.todo, hint) if text) or None

    def _print_failure(self, failure: dict[str, Any]) -> None:
        import sys

        result = _as_error(failure)
        self._add_hint(result, failure)
        print(f"error: {result}", file=sys.stderr, flush=True)


def join(*, use_cpu: bool = False) -> Ranks:
    """Meet the other processes that the launcher has started; alone, where there is none."""
    here = place()
    if here.world == 1:
        return Ranks()
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if not dist.is_initialized():
        on_gpu = torch.cuda.is_available() and not use_cpu
        if on_gpu:
            torch.cuda.set_device(here.local_rank % torch.cuda.device_count())
        # A store of its own for each attempt: the launcher's holds the addresses of processes that have ended.
        store, _, _ = next(rendezvous("env://", here.rank, here.world))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.distributed_c10d.PrefixStore(f"espalier/attempt-{here.restarts}", store),
            rank=here.rank,
            world_size=here.world,
            timeout=timedelta(hours=12),  # rank 0 may encode for long; that a rank is lost is for Watch to find out
        )
        atexit.register(_hang_up)
    global _joined
    _joined += 1
    return Ranks(here, Watch(here, f"espalier/{here.restarts}/{_joined}", GRACE_SECONDS))


def _ignore_sigterm() -> None:
    """A launcher sends it to all ranks as soon as one has ended: there is nothing left to stop."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _hang_up() -> None:
    import torch.distributed as dist

    with suppress(Exception):
        dist.destroy_process_group()


def _is_broken_line(error: BaseException) -> bool:
    """True for what torch.distributed raises where another rank has gone away."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "Connection" in str(error))


def _as_dict(error: BaseException, *, rank: int | None = None) -> dict[str, Any]:
    """An error as JSON holds it. rank: who has it, said in front unless the error says it itself."""
    if not isinstance(error, EspalierError):
        # Where a fault of ours or of a library is, only this process knows.
        lines = "".join(traceback.format_exception(error)).splitlines()
        known = "out of memory" in str(error).lower()
        error = TrainingError(f"{type(error).__name__}: {error}", details=[] if known else lines)
    where = error.where or ""
    if rank is not None and not where.startswith("rank"):
        where = f"rank {rank}, {where}" if where else f"rank {rank}"
    return {
        "kind": type(error).__name__,
        "exit_code": error.exit_code,
        "what": error.what,
        "where": where or None,
        "todo": error.todo,
        "details": list(error.details),
        "rank": rank,
        "lost": [],
    }


def _as_error(told: dict[str, Any]) -> EspalierError:
    kind: type[EspalierError] = getattr(errors, told["kind"], TrainingError)
    error = kind(told["what"], where=told["where"], todo=told["todo"], details=told["details"])
    error.exit_code = told["exit_code"]
    return error
