"""The collectives that the exchanges are made of, on torch.distributed process groups alone.

Each call checks its sizes and notes itself in the path's record: which collectives a rank called, in which order and
with which sizes, is what its peers must have called too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .. import path
from .rows import as_bytes


class Work(Protocol):
    """Something under way."""

    def wait(self) -> Any:
        """Go on once it is done: the caller's stream on a GPU, the caller itself on a CPU."""
        ...


class Group(ABC):
    """Some ranks that exchange tensors.

    Attributes:
        name: how records call it.
        rank: this one's number in it.
        size: how many there are.
        device: where its tensors are, as a torch device type.
    """

    def __init__(self, name: str, rank: int, size: int, device: str) -> None:
        self.name, self.rank, self.size, self.device = name, rank, size, device

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """The ranks are there once, whoever speaks of them."""
        return self

    def all_gather(self, out: torch.Tensor, x: torch.Tensor, *, in_order: bool = False) -> Work:
        """`x [n, ...]` of every rank, in turn, into `out [size * n, ...]`; `in_order` as in `all_to_all`."""
        self._expect("all_gather", out, x, len(x) * self.size)
        self._note("all_gather", x)
        # What only travels does so as bytes where a backend may not know the dtype: gloo refuses fp8.
        gather = self._all_gather_in_order if in_order else self._all_gather
        return gather(as_bytes(out), as_bytes(x))

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Work:
        """The sum over the ranks of the r-th part of `x [size * n, ...]`, into `out [n, ...]` of rank r."""
        self._expect("reduce_scatter", x, out, len(out) * self.size)
        self._note("reduce_scatter", x)
        return self._reduce_scatter(out, x)

    def all_reduce(self, x: torch.Tensor) -> Work:
        """The sum of `x` over the ranks, in place."""
        self._expect("all_reduce", x, x, len(x))
        self._note("all_reduce", x)
        return self._all_reduce(x)

    def all_to_all(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        received: Sequence[int],
        sent: Sequence[int],
        *,
        in_order: bool = False,
    ) -> Work:
        """The r-th part of `x [sum(sent), ...]` goes to rank r; `out [sum(received), ...]` takes theirs, by rank.

        With `in_order` it has its place in the caller's stream, where nothing runs beside it: that costs the host less.
        """
        self._expect("all_to_all", out, x, sum(received))
        if len(x) != sum(sent):
            raise ValueError(f"all_to_all: expected {sum(sent)} rows to send, got {len(x)}")
        self._note("all_to_all", x, sent=sent, received=received)
        if in_order:
            return self._all_to_all_in_order(as_bytes(out), as_bytes(x), list(received), list(sent))
        return self._all_to_all(as_bytes(out), as_bytes(x), list(received), list(sent))

    def _expect(self, name: str, larger: torch.Tensor, smaller: torch.Tensor, rows: int) -> None:
        alike = larger.dtype == smaller.dtype and larger.shape[1:] == smaller.shape[1:]
        if not alike or len(larger) != rows or not (larger.is_contiguous() and smaller.is_contiguous()):
            raise ValueError(
                f"{name}: expected contiguous tensors of one dtype, the larger one with {rows} rows, got "
                f"{list(larger.shape)} {larger.dtype} and {list(smaller.shape)} {smaller.dtype}"
            )

    def _note(self, name: str, x: torch.Tensor, **splits: Sequence[int]) -> None:
        """Note a call; with splits, which say how many rows there are, `x` has none."""
        if path.is_recording():
            shape = (0, *x.shape[1:]) if splits else tuple(x.shape)
            rows = {each: tuple(numbers) for each, numbers in splits.items()}
            path.note("collective", (name, self.name, shape, str(x.dtype), rows))

    def _all_gather_in_order(self, out: torch.Tensor, x: torch.Tensor) -> Work:
        return self._all_gather(out, x)

    def _all_to_all_in_order(self, out: torch.Tensor, x: torch.Tensor, received: list[int], sent: list[int]) -> Work:
        return self._all_to_all(out, x, received, sent)

    @abstractmethod
    def _all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Work: ...

    @abstractmethod
    def _reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Work: ...

    @abstractmethod
    def _all_reduce(self, x: torch.Tensor) -> Work: ...

    @abstractmethod
    def _all_to_all(self, out: torch.Tensor, x: torch.Tensor, received: list[int], sent: list[int]) -> Work: ...


# torch 2.13 gave these two other names, and calls the old ones deprecated.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Enqueued:
    """Work that has its place in the caller's stream, or is done."""

    def wait(self) -> None:
        """Nothing is to be waited for."""


_ENQUEUED = _Enqueued()


def _all_to_all_options(*, is_async: bool) -> dist.AllToAllOptions:
    options = dist.AllToAllOptions()
    options.asyncOp = is_async
    return options


_IN_ORDER, _BESIDE = _all_to_all_options(is_async=False), _all_to_all_options(is_async=True)


def _launched(work: Any) -> Work:
    if work is None:
        raise RuntimeError("group: expected one that this rank is in")
    return work


class ProcessGroup(Group):
    """A torch.distributed process group: NCCL on GPUs, gloo on CPUs.

    Args:
        name: how records call it.
        group: the process group; None: the default one.
    """

    def __init__(self, name: str, group: dist.ProcessGroup | None = None) -> None:
        device = "cuda" if "nccl" in str(dist.get_backend(group)) else "cpu"
        super().__init__(name, dist.get_rank(group), dist.get_world_size(group), device)
        self._group = group

    def _all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Work:
        return _launched(_ALL_GATHER(out, x, group=self._group, async_op=True))

    def _all_gather_in_order(self, out: torch.Tensor, x: torch.Tensor) -> Work:
        _ALL_GATHER(out, x, group=self._group, async_op=False)
        return _ENQUEUED

    def _reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Work:
        return _launched(_REDUCE_SCATTER(out, x, group=self._group, async_op=True))

    def _all_reduce(self, x: torch.Tensor) -> Work:
        return _launched(dist.all_reduce(x, group=self._group, async_op=True))

    def _all_to_all(self, out: torch.Tensor, x: torch.Tensor, received: list[int], sent: list[int]) -> Work:
        return _launched(self._exchange(out, x, received, sent, _BESIDE))

    def _all_to_all_in_order(self, out: torch.Tensor, x: torch.Tensor, received: list[int], sent: list[int]) -> Work:
        work = self._exchange(out, x, received, sent, _IN_ORDER)
        if work is not None:  # of a backend that has not done it yet
            work.wait()
        return _ENQUEUED

    @property
    def _exchange(self) -> Callable[..., Work | None]:
        """The group's own method: what `dist.all_to_all_single` does around it costs the host a sixth of a call."""
        group = dist.group.WORLD if self._group is None else self._group
        if group is None:
            raise RuntimeError("group: expected a default group of torch.distributed, got none")
        return group.alltoall_base
