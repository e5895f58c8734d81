"""Which path ran: assignments, backends, configurations and kernel launches, recorded while somebody listens.

A lost fast path changes no number, so only a record of it can be tested without a clock. Recording costs one test of
a context variable per event when nobody listens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class PathRecord:
    """What ran inside one `record_path` block.

    Attributes:
        facts: decisions by name, in the order made: `backend`, `assignment` ("naive" or "aligned"), `config`
            (mapping of the tile choice, with `source`), `config_w2` where the second GEMM has its own, ...
        launches: how often each Triton kernel was launched, by the kernel's name.
    """

    facts: list[tuple[str, Any]] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)

    def all(self, name: str) -> list[Any]:
        """Every value recorded under `name`, first to last."""
        return [value for fact, value in self.facts if fact == name]

    def last(self, name: str, default: Any = None) -> Any:
        """The newest value recorded under `name`, or `default`."""
        values = self.all(name)
        return values[-1] if values else default

    def launch(self, kernel: Any, grid: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Any:
        """Launch a kernel, counted."""
        self.launches[kernel.__name__] += 1
        return kernel[grid](*args, **meta)

    def operate(self, function: Callable[..., Any], tensors: tuple[Any, ...]) -> Any:
        """Run a library's operation."""
        return function(*tensors)

    def add(self, facts: Iterable[tuple[str, Any]], launches: Mapping[str, int]) -> None:
        """Take over what another record heard."""
        self.facts.extend(facts)
        self.launches.update(launches)

    def as_dict(self) -> Mapping[str, Any]:
        """Plain data: every fact under its name, and the launches."""
        return {**{name: self.all(name) for name, _ in self.facts}, "launches": dict(self.launches)}


_listener: ContextVar[PathRecord | None] = ContextVar("moegate_path_listener", default=None)


@contextmanager
def record_path(record: PathRecord | None = None) -> Iterator[PathRecord]:
    """Collect what runs in this block, in this thread or task; blocks nest, and the innermost one listens.

    Args:
        record: that collects; None makes one.
    """
    record = PathRecord() if record is None else record
    token = _listener.set(record)
    try:
        yield record
    finally:
        _listener.reset(token)


def listener() -> PathRecord | None:
    """The record of the innermost block; None where nobody listens."""
    return _listener.get()


def is_recording() -> bool:
    """Whether somebody listens: ask before building a value that costs something."""
    return _listener.get() is not None


def note(name: str, value: Any) -> None:
    """Record a decision, where somebody listens."""
    record = _listener.get()
    if record is not None:
        record.facts.append((name, value))


def launch(kernel: Any, grid: Any, *args: Any, **meta: Any) -> Any:
    """`kernel[grid](*args, **meta)`, counted. Every Triton launch of `impl` goes through here."""
    record = _listener.get()
    return kernel[grid](*args, **meta) if record is None else record.launch(kernel, grid, args, meta)


def operate(function: Callable[..., Any], *tensors: Any) -> Any:
    """`function(*tensors)`, a library's operation that returns a tensor of its own and reads these alone, or None."""
    record = _listener.get()
    return function(*tensors) if record is None else record.operate(function, tensors)
