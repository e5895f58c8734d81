"""Where the kernels of a launch may read and write, and the error of one that does so elsewhere.

Triton's interpreter hands addresses to C++ as they are: a kernel that leaves its tensors reads or overwrites the heap
of the process, which then dies, fails somewhere else or goes on with wrong numbers, each on another day. So every
access is compared with the memory of the launch's tensor arguments first (`interpreter.memory_bounds`).

What counts as allowed is the whole storage of each argument, not the part that a view shows: a kernel is given a
pointer and strides, and may rightly start in one part and go on in another (both halves of `w13`, rows of an expanded
tensor, elements far apart). Of an operand that the suite made it is what lies between its margins (`arena.py`), so that
also a read of them that changes no number is seen. An access that stays in the storage and yet is wrong is what poison
is for, and so is one that lands in another argument's storage.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_OWN = Path(__file__).parent
CHECKED: Counter[str] = Counter()
"""Launches of this process, by kernel, whose accesses are all compared."""

WITHOUT_MARGINS: dict[int, tuple[int, int, int]] = {}
"""By the address of a storage that has margins: its bytes, and the first and the last address between them."""


class OutOfBoundsError(RuntimeError):
    """A kernel reads or writes outside the memory of its arguments; says which kernel, where, and how far outside."""


class Memory:
    """The memory of one launch's arguments.

    Args:
        kernel: its name.
        arguments: by name; tensors count, and what holds them (tuples, tensor descriptors).

    Attributes:
        is_whole: all memory that the kernel may know is listed. An address made from an integer may be anybody's, and
            an argument that is no torch tensor has a length that nobody knows: then nothing is refused.
    """

    def __init__(self, kernel: str, arguments: Mapping[str, Any]) -> None:
        CHECKED[kernel] += 1
        self.kernel = kernel
        self.is_whole = True
        self._named: list[tuple[int, int, str]] = []
        for name, argument in arguments.items():
            self._add(name, argument)
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end, _ in sorted(self._named):
            # Storages may share memory (two arrays' views of one buffer).
            if self._ends and start < self._ends[-1]:
                self._ends[-1] = max(end, self._ends[-1])
            elif end > start:
                self._starts.append(start)
                self._ends.append(end)
        self._low, self._high = 0, 0  # the range that was met last: the next access is mostly there too

    def _add(self, name: str, argument: Any) -> None:
        if isinstance(argument, (tuple, list)):
            for number, each in enumerate(argument):
                self._add(f"{name}[{number}]", each)
            return
        if not hasattr(argument, "data_ptr"):
            base = getattr(argument, "base", None)  # of a tensor descriptor, or of triton.reinterpret
            if hasattr(base, "data_ptr"):
                self._add(name, base)
            return
        tensor: Any = argument if hasattr(argument, "untyped_storage") else getattr(argument, "base", None)
        if not hasattr(tensor, "untyped_storage"):
            self.is_whole = False
            return
        storage = tensor.untyped_storage()
        # A tensor without elements may have a null pointer, whatever its storage has.
        start = storage.data_ptr() if storage.nbytes() else tensor.data_ptr()
        size, first, last = WITHOUT_MARGINS.get(start, (0, 0, 0))
        if size == storage.nbytes() > 0:
            self._named.append((first, last, name))
        else:
            self._named.append((start, start + storage.nbytes(), name))

    def check(self, does: str, pointers: np.ndarray, mask: np.ndarray | None, size: int) -> None:
        """Compare an access with the memory.

        Args:
            does: "reads", "writes" or "updates".
            pointers: addresses, uint64, of any shape.
            mask: the active lanes, of the same shape; all where None.
            size: bytes at each address.

        Raises:
            OutOfBoundsError: an active lane reaches outside.
        """
        # `argmin` and `argmax` cost a fifth of `min` and `max` on arrays as small as a kernel's blocks.
        low, high = pointers.item(pointers.argmin()), pointers.item(pointers.argmax())
        if self._holds(low) and high + size <= self._high:
            return
        if mask is not None:
            active = pointers[mask.astype(bool, copy=False)]
            if not active.size:
                return
            low, high = active.item(active.argmin()), active.item(active.argmax())
            if self._holds(low) and high + size <= self._high:
                return
        else:
            active = pointers.reshape(-1)
        if self.is_whole:
            self._check_each(does, active, size)

    def _holds(self, address: int) -> bool:
        """Whether an address lies in some range, which is then the one that the next is compared with first."""
        if self._low <= address < self._high:
            return True
        place = bisect_right(self._starts, address) - 1
        if place < 0 or address >= self._ends[place]:
            return False
        self._low, self._high = self._starts[place], self._ends[place]
        return True

    def _check_each(self, does: str, active: np.ndarray, size: int) -> None:
        outside = [address for address in active.tolist() if not self._holds(address) or address + size > self._high]
        if outside:
            # The one that is farthest out says most of what went wrong.
            address = max(outside, key=lambda each: self._nearest(each, size)[0])
            where = self._words(*self._nearest(address, size)) if self._named else "it has no tensor"
            lanes = f"{len(outside)} of {active.size} active lanes" if active.size > 1 else "one lane"
            raise OutOfBoundsError(
                f"{self.kernel} {does} {size} byte{'s' * (size > 1)} outside its arguments: {where}; {lanes}{_line()}"
            )

    def _nearest(self, address: int, size: int) -> tuple[int, bool, str, int]:
        """How far out, whether behind the end, and the name and bytes of the argument that this is said of."""
        distances = []
        for start, end, name in self._named:
            behind = address + size > end
            distances.append((address + size - end if behind else start - address, behind, name, end - start))
        return min(distances)

    def _words(self, distance: int, is_behind: bool, name: str, length: int) -> str:
        side = "behind the end" if is_behind else "before the start"
        return f"up to {distance} bytes {side} of {name}, whose memory has {length} bytes"


def _line() -> str:
    """The line of the kernel that makes the access."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "triton" not in Path(name).parts and Path(name).parent != _OWN and not name.startswith("<"):
            return f" ({Path(name).name}:{frame.f_lineno})"
        frame = frame.f_back
    return ""


def cause_of(error: BaseException | None) -> OutOfBoundsError | None:
    """The access out of bounds that an error comes from, where it does."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OutOfBoundsError):
            return error
        seen.add(id(error))
        error = error.__cause__
    return None


def arguments_of(names: list[str], positional: Any, named: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arguments of a launch by their names."""
    yield from zip(names, positional, strict=False)
    yield from named.items()
