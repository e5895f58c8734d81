"""Processes that run jobs one at a time each, and may fail, die or hang without taking anything else along.

What `concurrent.futures` does not give: a job that hangs is ended, a process that dies fails its own job alone, and
in both cases a new process takes the place.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function that a new process can import, and its arguments."""

NOT_TRIED = "not tried: the time was used up"
_MOST_ERROR_TEXT = 300
_JOIN_SECONDS = 5.0


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        value: what it returned; None where it failed.
        error: why it failed, else empty.
    """

    value: Any = None
    error: str = ""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: connection.Connection
    job: int = -1
    ends: float = float("inf")


class WorkerPool:
    """Up to `size` processes, started when needed and kept until `close`.

    Args:
        size: processes at most.
        is_spoiled: whether an error leaves its process unusable, so that a new one takes its place.

    Raises:
        ValueError: fewer than one process.
    """

    def __init__(self, size: int, is_spoiled: Callable[[str], bool] = lambda error: False) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.size = size
        self._is_spoiled = is_spoiled
        self._workers: list[_Worker] = []
        self._context = multiprocessing.get_context("spawn")

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        jobs: Sequence[Job],
        *,
        limit: float,
        until: float = float("inf"),
        on_done: Callable[[], None] = lambda: None,
    ) -> list[Outcome]:
        """Run jobs side by side, started in their order.

        Args:
            jobs: what to run.
            limit: seconds of one job, its process's start counted in; one that takes longer is ended.
            until: reading of `time.monotonic` after which no job is started.
            on_done: called once a job.

        Returns:
            An outcome for each job, in their order.
        """
        outcomes = [Outcome(error=NOT_TRIED)] * len(jobs)
        waiting = deque(range(len(jobs)))
        while True:
            busy = [worker for worker in self._workers if worker.job >= 0]
            while waiting and len(busy) < self.size and time.monotonic() < until:
                busy.append(self._start(waiting[0], jobs[waiting[0]], limit))
                waiting.popleft()
            if not busy:
                return outcomes
            patience = max(0.0, min(worker.ends for worker in busy) - time.monotonic())
            ready = connection.wait([worker.pipe for worker in busy], timeout=patience)
            for worker in busy:
                if worker.pipe in ready:
                    outcome = self._receive(worker)
                elif time.monotonic() >= worker.ends:
                    outcome = Outcome(error=f"ended after {limit:g} s")
                    self._end(worker)
                else:
                    continue
                outcomes[worker.job] = outcome
                worker.job = -1
                on_done()
                if outcome.error and self._is_spoiled(outcome.error):
                    self._end(worker)

    def ask(self, function: Callable[..., Any], *arguments: Any, limit: float) -> Outcome:
        """Run one job and wait for it."""
        return self.run([(function, arguments)], limit=limit)[0]

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.process.kill()  # all at once: each takes a while
        for worker in list(self._workers):
            self._end(worker)

    def _start(self, index: int, job: Job, limit: float) -> _Worker:
        worker = next((worker for worker in self._workers if worker.job < 0), None)
        if worker is not None and not self._send(worker, job):
            self._end(worker)  # it died while it had nothing to do
            worker = None
        if worker is None:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            worker = _Worker(process, ours)
            self._workers.append(worker)
            self._send(worker, job)
        worker.job, worker.ends = index, time.monotonic() + limit
        return worker

    @staticmethod
    def _send(worker: _Worker, job: Job) -> bool:
        try:
            worker.pipe.send(job)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def _receive(self, worker: _Worker) -> Outcome:
        try:
            return worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join(_JOIN_SECONDS)
            code = worker.process.exitcode
            self._end(worker)
            if code is not None and code < 0:
                return Outcome(error=f"its process died of {signal.Signals(-code).name}")
            return Outcome(error=f"its process ended with code {code}")

    def _end(self, worker: _Worker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
        worker.process.kill()
        worker.process.join(_JOIN_SECONDS)
        worker.pipe.close()


def error_text(error: BaseException) -> str:
    """An error in one short text."""
    return f"{type(error).__name__}: {error}"[:_MOST_ERROR_TEXT]


def _serve(pipe: connection.Connection) -> None:
    """A process's whole life: jobs one after the other until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asked ends this process
    while True:
        try:
            function, arguments = pipe.recv()
            outcome = Outcome(function(*arguments))
        except EOFError:
            return
        except Exception as error:  # whatever a job raises is its result
            outcome = Outcome(error=error_text(error))
        try:
            pipe.send(outcome)
        except OSError:
            return
