"""One thread that answers, one request after the other, and a bounded line before it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

GivenUp = Callable[[], bool]


class Full(Exception):
    """The line is full. seconds: about how long until there is room."""

    def __init__(self, seconds: int):
        super().__init__(seconds)
        self.seconds = seconds


class Job:
    """Work in the line. future: its result; cancel() takes it out, or ends it at its next token."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self.future: Future[Any]

    def given_up(self) -> bool:
        return self._over.is_set()

    def cancel(self) -> None:
        self._over.set()
        self.future.cancel()


class Worker:
    """max_queue: jobs that may wait while one runs. Its methods are for one thread (the event loop's)."""

    def __init__(self, max_queue: int):
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._limit = max_queue + 1
        self._jobs: list[Job] = []
        self._lock = threading.Lock()
        self._last_seconds = 1.0
        self.stopping = False

    @property
    def num_jobs(self) -> int:
        """Running and waiting."""
        with self._lock:
            return len(self._jobs)

    def submit(self, work: Callable[[GivenUp], Any]) -> Job:
        """Put `work` in the line; it is called with a function that says when to give up. Raises Full."""
        job = Job()

        def timed() -> Any:
            begin = time.monotonic()
            try:
                return work(job.given_up)
            finally:
                self._last_seconds = time.monotonic() - begin

        with self._lock:
            if len(self._jobs) >= self._limit:
                raise Full(max(1, math.ceil(self._last_seconds)))
            self._jobs.append(job)
        job.future = self._executor.submit(timed)
        job.future.add_done_callback(lambda _: self._remove(job))
        return job

    def stop(self, seconds: float) -> None:
        """Take no more jobs, drop those that wait, and give the running one so many seconds to its end."""
        self.stopping = True
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.future.cancel()
        if seconds <= 0:
            self._end_all(jobs)
        else:
            timer = threading.Timer(seconds, self._end_all, [jobs])
            timer.daemon = True
            timer.start()

    def close(self) -> None:
        """End everything and wait for the thread, which looks up after each token."""
        self.stop(0)
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _end_all(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.cancel()

    def _remove(self, job: Job) -> None:
        with self._lock:
            self._jobs.remove(job)
