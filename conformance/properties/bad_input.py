"""The generator of bad arguments: from what an argument may be, everything that it may not be.

A table says of each argument of a call that is right which kind it has; each kind knows what it refuses. What only the
arguments together can say (another E, an overlap) stands in the tables as rows of its own.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]

# A refusal is host work of microseconds; what takes this long waits for something.
TIME_LIMIT = 20.0


@dataclass(frozen=True)
class Bad:
    """One way in which an argument is wrong.

    Attributes:
        argument: what the message must name.
        what: is wrong with it, in a few words.
        change: takes good keyword arguments and returns bad ones.
        debug: only the checks that synchronise the device can see it.
    """

    argument: str
    what: str
    change: Change
    debug: bool = False

    def __str__(self) -> str:
        return f"{self.argument}-{self.what}".replace(" ", "_")


def put(**values: Any) -> Change:
    """Arguments with these values instead."""
    return lambda good: {**good, **values}


def mapped(name: str, function: Callable[[Any], Any]) -> Change:
    """Arguments with one made of the good one."""
    return lambda good: {**good, name: function(good[name])}


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """The same on a device that no layer is on."""
    return torch.empty_like(tensor, device="meta")


def strided_columns(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, two elements apart."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


class Kind:
    """What an argument may be.

    Attributes:
        optional: None is right.
        named: what messages call it; empty where by its own name.
    """

    optional: bool = False
    named: str = ""

    def wrong(self) -> Iterator[tuple[str, Any]]:
        """What it may not be, in words and as a value, or as a function of the good one (`Of`)."""
        raise NotImplementedError

    def bad(self, name: str) -> Iterator[Bad]:
        """Every bad value of the argument `name`."""
        said = self.named or name
        wrong = self.wrong() if self.optional else [("is None", None), *self.wrong()]
        for what, value in wrong:
            yield Bad(said, what, mapped(name, value.function) if isinstance(value, Of) else put(**{name: value}))


@dataclass(frozen=True)
class Of:
    """A bad value that is made of the good one."""

    function: Callable[[Any], Any]


@dataclass(frozen=True)
class TensorKind(Kind):
    """A tensor.

    Attributes:
        takes: wrong things that are right here, by the words of `wrong`.
    """

    optional: bool = False
    named: str = ""
    takes: tuple[str, ...] = ()

    def wrong(self) -> Iterator[tuple[str, Any]]:
        """Other types, ranks, dtypes, layouts and devices."""
        changes: dict[str, Callable[[torch.Tensor], Any]] = {
            "is a list": torch.Tensor.tolist,
            "is an array": lambda t: t.float().cpu().numpy(),
            "has one dimension too few": lambda t: t[0],
            "has one dimension too many": lambda t: t[None],
            "is float64": torch.Tensor.double,
            "is complex": lambda t: t.to(torch.complex64),
            "is bool": torch.Tensor.bool,
            "has strided columns": strided_columns,
            "is sparse": lambda t: t.to_sparse(),
        }
        yield from ((what, Of(change)) for what, change in changes.items() if what not in self.takes)
        for what, value in (("is a number", 1.0), ("is a string", "tensor")):
            if what not in self.takes:
                yield what, value


@dataclass(frozen=True)
class IntKind(Kind):
    """An int in [low, high]."""

    low: int
    high: int | None = None
    optional: bool = False
    named: str = ""

    def wrong(self) -> Iterator[tuple[str, Any]]:
        """Other types, and numbers outside the range."""
        yield from (("is a string", "2"), ("is a float", 2.0), ("is NaN", float("nan")), ("is a bool", True))
        yield from (("is a list", [2]), ("is below its range", self.low - 1), ("is far below", -(2**63)))
        if self.high is not None:
            yield from (("is above its range", self.high + 1), ("is far above", 2**63))


@dataclass(frozen=True)
class NumberKind(Kind):
    """A finite number above `low`, or from it on."""

    low: float | None = 0.0
    inclusive: bool = False
    optional: bool = False
    named: str = ""

    def wrong(self) -> Iterator[tuple[str, Any]]:
        """Other types, NaN, infinities, and numbers under the bound."""
        yield from (("is a string", "1"), ("is NaN", float("nan")), ("is infinite", float("inf")))
        yield from (("is -infinity", -float("inf")), ("is a bool", True), ("is complex", 1j), ("is a list", [1.0]))
        if self.low is not None:
            yield "is below its range", self.low - 1.0
            if not self.inclusive:
                yield "is the open end of its range", self.low


@dataclass(frozen=True)
class BoolKind(Kind):
    """True or False."""

    named: str = ""

    def wrong(self) -> Iterator[tuple[str, Any]]:
        """What Python takes for one."""
        yield from (("is an int", 1), ("is a string", "yes"), ("is a float", 0.0), ("is a list", [True]))


@dataclass(frozen=True)
class ChoiceKind(Kind):
    """One of some names."""

    optional: bool = False
    named: str = ""

    def wrong(self) -> Iterator[tuple[str, Any]]:
        """Other names, also ones that a terminal would obey, and what is no name."""
        yield from (("is unknown", "fastest"), ("is empty", ""), ("is a number", 3), ("is a list", ["silu"]))
        yield "has control characters", "silu\x1b[2J\n"


@dataclass(frozen=True)
class DtypeKind(Kind):
    """One of torch's floating-point dtypes of 16 or 32 bits."""

    optional: bool = False
    named: str = ""

    def wrong(self) -> Iterator[tuple[str, Any]]:
        """Names, and dtypes that nothing here computes in."""
        yield from (("is a string", "bfloat16"), ("is int32", torch.int32), ("is float64", torch.float64))
        yield from (("is complex64", torch.complex64), ("is Python's float", float))


@dataclass(frozen=True)
class ObjectKind(Kind):
    """An object of one class."""

    optional: bool = False
    named: str = ""

    def wrong(self) -> Iterator[tuple[str, Any]]:
        """Everything else."""
        yield from (("is a string", "it"), ("is a number", 3), ("is a dict", {}), ("is an object", object()))


@dataclass(frozen=True)
class MappingKind(ObjectKind):
    """A mapping."""

    def wrong(self) -> Iterator[tuple[str, Any]]:
        """Everything else."""
        yield from (("is a string", "it"), ("is a number", 3), ("is a list", [1]), ("is an object", object()))


@dataclass(frozen=True)
class SequenceKind(ObjectKind):
    """A sequence of numbers."""

    def wrong(self) -> Iterator[tuple[str, Any]]:
        """No sequence, and one of other things."""
        yield from (("is a number", 3), ("is an object", object()), ("holds strings", ["a"]), ("holds None", [None]))


@dataclass(frozen=True)
class TextKind(Kind):
    """A string that a parser reads."""

    optional: bool = False
    named: str = ""

    def wrong(self) -> Iterator[tuple[str, Any]]:
        """What no parser takes, and what is no string."""
        yield from (("is a number", 3), ("is a list", ["a"]), ("is bytes", b"a"), ("has a NUL", "a\0b"))
        yield from (("has control characters", "a\x1b[2Jb\n"), ("is very long", "a" * 100_000))


def bad_arguments(kinds: Mapping[str, Kind]) -> list[Bad]:
    """Every bad value of every argument, one at a time."""
    return [bad for name, kind in kinds.items() for bad in kind.bad(name)]


# --- what a call did ---------------------------------------------------------------------------------------------


@contextmanager
def time_limit(seconds: float = TIME_LIMIT) -> Iterator[None]:
    """Raise TimeoutError inside the block once it has lasted too long; without effect where signals are not ours."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"still running after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refusal_of(call: Callable[[], Any], argument: str) -> str:
    """What is wrong with how a bad call is refused; empty where its error names argument, expectation and what came."""
    try:
        with time_limit():
            call()
    except (ValueError, TypeError) as error:
        said = str(error)
        if not re.search(rf"(?<!\w){re.escape(argument)}(?!\w)", said):
            return f"the error does not name {argument}: {said!r}"
        if not ("expected" in said and "got" in said):
            return f"the error does not say what was expected and what came: {said!r}"
        if any(not character.isprintable() for character in said.replace("\n", "")):
            return f"the error holds control characters: {said!r}"
        return ""
    except Exception as error:  # any other class is the finding
        return f"raised {type(error).__name__}: {error}"
    return "accepted"


class Contents:
    """The tensors among some values, as they are now; also those in their lists, dicts and fields."""

    def __init__(self, values: Any) -> None:
        self._tensors = dict(_tensors_in("", values, set()))
        self._before = {name: bits(tensor) for name, tensor in self._tensors.items()}

    def changed(self) -> list[str]:
        """The names of those that are no longer as they were."""
        return [name for name, tensor in self._tensors.items() if not _equal(bits(tensor), self._before[name])]


def bits(tensor: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
    """Form and bytes of a tensor of any layout."""
    form = (tensor.shape, tensor.dtype, tensor.layout)
    if tensor.device.type == "meta":
        return form, None
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    # An expanded axis is one element in memory, however long it is.
    dense = dense[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in dense.stride())]
    return form, dense.detach().clone().flatten().contiguous().view(torch.uint8)


def _equal(one: tuple[Any, torch.Tensor | None], other: tuple[Any, torch.Tensor | None]) -> bool:
    if one[1] is None or other[1] is None:
        return one[0] == other[0] and one[1] is other[1]
    return one[0] == other[0] and torch.equal(one[1], other[1])


def _tensors_in(name: str, value: Any, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    if isinstance(value, Mapping):
        inside = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, (list, tuple)):
        inside = [(str(index), each) for index, each in enumerate(value)]
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        inside = list(vars(value).items())
    else:
        return
    for key, each in inside:
        yield from _tensors_in(f"{name}.{key}" if name else key, each, seen)
