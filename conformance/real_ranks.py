"""Ranks as processes on torch.distributed, started once and given case after case, under a time limit.

Every collective is noted where torch.distributed is called, not where an implementation says so, and before it starts:
what a rank waits in is known also when it never comes back.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from .simulated_ranks import Call, DeadlockError, RankOutcome

# Seconds: a start imports torch, which two cores do one after the other; a case takes milliseconds.
START_LIMIT, CASE_LIMIT = 240.0, 60.0


class RealLinks:
    """What one process knows of the others."""

    def __init__(self, rank: int, size: int, process_group: Any) -> None:
        self.rank, self.size, self.process_group = rank, size, process_group
        self._remembered: dict[Any, Any] = {}

    def remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave when this key was first asked for; every rank asks for the same keys in one order."""
        if key not in self._remembered:
            self._remembered[key] = make()
        return self._remembered[key]


class RankProcesses:
    """Processes 0 to size - 1 of one process group.

    Args:
        size: how many.
        backend: `gloo`, or `nccl` with a GPU for each.
        limit: seconds that a case may take.
    """

    def __init__(self, size: int, backend: str = "gloo", limit: float = CASE_LIMIT) -> None:
        self.size, self.limit = size, limit
        self._folder = tempfile.TemporaryDirectory(prefix="moegate-ranks-")
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (rank, size, backend, os.path.join(self._folder.name, "store"), there, limit)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        self._gather(START_LIMIT)

    def run(self, function: str, *arguments: Any) -> list[RankOutcome]:
        """Call `function` (module:name) as `function(links, *arguments)` on every rank.

        Returns:
            How each rank ended. One that did not end in time has a `DeadlockError` that says who waits where; the
            processes are gone then.
        """
        message = pickle.dumps((function, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        return self._gather(self.limit)

    def _gather(self, limit: float) -> list[RankOutcome]:
        outcomes = [RankOutcome() for _ in self._pipes]
        at = ["at work"] * self.size
        missing, end = set(range(self.size)), time.monotonic() + limit
        while missing:
            ready = wait([self._pipes[rank] for rank in missing], timeout=max(0.0, end - time.monotonic()))
            if not ready:
                report = "; ".join(f"rank {rank} {at[rank]}" for rank in range(self.size))
                for rank in missing:
                    outcomes[rank].error = DeadlockError(f"no end within {limit:g} s: {report}")
                self.close()
                return outcomes
            for rank in sorted(missing):
                if self._pipes[rank] not in ready:
                    continue
                try:
                    kind, value = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, ConnectionError):
                    code = self._processes[rank].exitcode
                    kind, value = "error", RuntimeError(f"the process of rank {rank} died ({code})")
                if kind == "call":
                    outcomes[rank].calls.append(value)
                    at[rank] = f"in its collective {len(outcomes[rank].calls)}: {value}"
                    continue
                missing.discard(rank)
                at[rank] = f"ended after {len(outcomes[rank].calls)} collectives"
                if kind == "error":
                    outcomes[rank].error = value
                    at[rank] += f" with {value!r}"
                outcomes[rank].result = value if kind == "result" else None
        return outcomes

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()
        self._folder.cleanup()


@contextmanager
def rank_processes(size: int, backend: str = "gloo", limit: float = CASE_LIMIT) -> Iterator[RankProcesses]:
    """Processes for a block."""
    processes = RankProcesses(size, backend, limit)
    try:
        yield processes
    finally:
        processes.close()


def _serve(rank: int, size: int, backend: str, store: str, pipe: Connection, limit: float) -> None:
    """One process: join the group, then call what it is told to."""
    import torch

    torch.set_num_threads(1)
    _record_collectives(lambda call: pipe.send_bytes(pickle.dumps(("call", call))))
    from torch import distributed

    from .session import INTERPRETED

    if INTERPRETED:
        from . import interpreter

        interpreter.install()
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=2 * limit)
    )
    links = RealLinks(rank, size, distributed.group.WORLD)
    pipe.send_bytes(pickle.dumps(("result", None)))
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        module, _, name = function.partition(":")
        try:
            answer = ("result", getattr(importlib.import_module(module), name)(links, *arguments))
        except Exception as error:
            answer = ("error", type(error)(str(error)) if type(error).__module__ == "builtins" else _plain(error))
        pipe.send_bytes(pickle.dumps(answer))


def _plain(error: Exception) -> RuntimeError:
    """An error that any process can read."""
    return RuntimeError(f"{type(error).__name__}: {error}")


def _record_collectives(tell: Callable[[Call], None]) -> None:
    """Note each collective before it starts; to be called before anybody takes the functions' names."""
    from torch import distributed

    def record(name: str, function: Callable[..., Any], of: Callable[..., tuple[Any, tuple, tuple]]) -> Any:
        def recorded(*arguments: Any, group: Any = None, **options: Any) -> Any:
            x, sent, received = of(*arguments)
            ranks = tuple(distributed.get_process_group_ranks(distributed.group.WORLD if group is None else group))
            tell(Call(name, ranks, tuple(x.shape), str(x.dtype), sent, received))
            return function(*arguments, group=group, **options)

        return recorded

    def second(out: Any, x: Any) -> tuple[Any, tuple, tuple]:
        del out
        return x, (), ()

    def splits(out: Any, x: Any, received: Any, sent: Any) -> tuple[Any, tuple, tuple]:
        del out
        return x[:0], tuple(sent), tuple(received)

    for names, kind, of in (
        (("all_gather_single", "all_gather_into_tensor"), "all_gather", second),
        (("reduce_scatter_single", "reduce_scatter_tensor"), "reduce_scatter", second),
        (("all_reduce",), "all_reduce", lambda x: (x, (), ())),
        (("all_to_all_single",), "all_to_all", splits),
    ):
        for name in names:
            if hasattr(distributed, name):
                setattr(distributed, name, record(kind, getattr(distributed, name), of))
