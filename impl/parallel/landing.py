"""Memory in which rows of an all-to-all land again and again, and the experts' work on them as one CUDA graph.

Behind an all-to-all the device has nothing to do until the host, which learned only then how many rows come, has
launched the experts. A graph is one launch where they are six, and wants the same memory each time. So rows of a number
that comes again land where they landed before; layers share that memory, as each one's call ends before the next
begins. Whoever has a `Hold` uses it; another call meanwhile takes memory of its own, and no graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple
from weakref import ref

import torch

from .. import path
from ..replay import replaying
from .wire import Tokens, Wire

# Of each number of rows: memory for rows and their sums, and what the experts need beside.
_MOST_LANDINGS = 16
_MOST_GRAPHS = 256


class Hold:
    """Somebody uses a landing's memory, as long as this lives.

    Attributes:
        landing: whose.
    """

    def __init__(self, landing: Landing) -> None:
        self.landing = landing


@dataclass(frozen=True, eq=False)
class _Graph:
    graph: torch.cuda.CUDAGraph
    heard: path.PathRecord


class Landing:
    """Memory for so many rows, of calls on one stream.

    Args:
        num_rows: that land.
        row_bytes: of one.
        hidden_size: H of the sums.
        dtype: of the sums.
        device: a GPU.

    Attributes:
        rows: `[num_rows, row_bytes]` uint8.
        sums: `[num_rows, H]`, where the experts write.
        views: tokens in `rows`, by what says how they lie there.
        first_padding: no row from this one on is a token's, as whoever had the memory last left it.
    """

    def __init__(self, num_rows: int, row_bytes: int, hidden_size: int, dtype: torch.dtype, device: torch.device):
        self.rows = torch.empty((num_rows, row_bytes), dtype=torch.uint8, device=device)
        self.sums = torch.empty((num_rows, hidden_size), dtype=dtype, device=device)
        self.views: dict[Hashable, Tokens] = {}
        self.first_padding = num_rows
        # None: seen once; a string: why there is no graph.
        self._graphs: dict[Hashable, _Graph | str | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._hold: ref[Hold] | None = None

    def pad_from(self, first: int, wire: Wire, like: Tokens) -> None:
        """Make tokens that are not there of all rows from `first` on; those before are about to be written."""
        if first < self.first_padding:
            wire.pad(self.rows, first, like)
        self.first_padding = first

    @property
    def is_held(self) -> bool:
        """Whether somebody uses the memory."""
        return self._hold is not None and self._hold() is not None

    def hold(self) -> Hold:
        """Use the memory; nobody else may."""
        hold = Hold(self)
        self._hold = ref(hold)
        return hold

    def work(self, key: Hashable, call: Callable[[], object]) -> torch.Tensor:
        """`call`, which works on `rows` and writes `sums`: as it stands at first, and from the second time on a graph.

        Args:
            key: everything that `call` depends on but the values in `rows`, with the addresses of other tensors.
            call: launches kernels and takes memory, and does nothing else; the host must not wait in it.
        """
        known = self._graphs.get(key)
        if known is None and key in self._graphs:
            known = self._graphs[key] = self._captured(call)
        if isinstance(known, _Graph):
            listener = path.listener()
            if listener is not None:
                listener.add(known.heard.facts, known.heard.launches)
            known.graph.replay()
            return self.sums
        if isinstance(known, str):
            path.note("no_graph", known)
        else:
            self._remember(key)
        call()
        return self.sums

    def _remember(self, key: Hashable) -> None:
        # The oldest is of a layer that may long be gone.
        is_full = len(self._graphs) >= _MOST_GRAPHS
        oldest = self._graphs.pop(next(iter(self._graphs))) if is_full else None
        if isinstance(oldest, _Graph):
            torch.cuda.synchronize(self.rows.device)  # it may still run
        self._graphs[key] = None

    def _captured(self, call: Callable[[], object]) -> _Graph | str:
        try:
            return self._capture(call)
        except RuntimeError as error:  # as it stands the call either works, or says better what is wrong with it
            return str(error)

    def _capture(self, call: Callable[[], object]) -> _Graph:
        device = self.rows.device
        here, beside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        graph, heard = torch.cuda.CUDAGraph(), path.PathRecord()
        beside.wait_stream(here)
        with torch.cuda.stream(beside), path.record_path(heard), replaying(None):
            # Other threads, such as NCCL's, may ask the device meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
        here.wait_stream(beside)
        return _Graph(graph, heard)


_lock = Lock()
# By what landings are for: one, or None where that came once.
_landings: OrderedDict[Hashable, Landing | None] = OrderedDict()


class Site(NamedTuple):
    """For which calls landings are: those of one stream, with such rows and sums.

    Attributes:
        device: torch's number of it.
        stream: CUDA's handle of it.
        row_bytes, hidden_size, dtype: as `Landing` has them.
    """

    device: int
    stream: int
    row_bytes: int
    hidden_size: int
    dtype: torch.dtype


def site_of(row_bytes: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Site:
    """The current stream's; to be asked before the host waits for the number of rows, and the device for the host."""
    stream = torch.cuda.current_stream(device)
    return Site(stream.device_index, stream.cuda_stream, row_bytes, hidden_size, dtype)


def take_landing(site: Site, num_rows: int) -> Hold | None:
    """A landing for the next call; None where this number comes for the first time, or one is in use."""
    if not num_rows:
        return None
    key = (site, num_rows)
    with _lock:
        if key not in _landings:
            _landings[key] = None
            _forget_the_oldest()
            return None
        landing = _landings[key]
        if landing is None:
            device = torch.device("cuda", site.device)
            landing = _landings[key] = Landing(num_rows, site.row_bytes, site.hidden_size, site.dtype, device)
        _landings.move_to_end(key)
        return None if landing.is_held else landing.hold()


def _forget_the_oldest() -> None:
    while len(_landings) > _MOST_LANDINGS:
        _, landing = _landings.popitem(last=False)
        if landing is not None:
            torch.cuda.synchronize(landing.rows.device)  # a graph of it may still run


def forget_landings() -> None:
    """Give the memory of all landings back (tests; and where a server no longer needs it)."""
    with _lock:
        if any(landing is not None for landing in _landings.values()):
            torch.cuda.synchronize()
        _landings.clear()
