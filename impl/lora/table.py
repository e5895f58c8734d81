"""The adapters that a layer holds: slots of stacked tensors on the device, where kernels look a token's adapter up.

A slot's ranks say what is in it: rank 0 of an expert's projection means that nothing is added there. Memory behind a
rank, and all memory of an empty slot, holds whatever it held before: finite numbers, which kernels multiply by zero at
most. Ranks and scales lie on the device, so a captured CUDA graph sees adapters come and go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..checks import (
    debugging,
    expect_bool,
    expect_device,
    expect_dtype,
    expect_instance,
    expect_int,
    expect_tensor,
    shown,
)
from ..config import ActivationFunction
from ..parallel.collectives import Group
from ..parallel.shards import shard_of_adapter
from .adapter import Adapter, LowRank
from .sharded import Between, Gathered, Summed

# Widths of a slot: few, so that few kernels are compiled. A matrix instruction takes 16 columns at least.
RANKS = (16, 32, 64, 128, 256)
# Slots are counted in 32 bits and walked one by one; more adapters than this belong in host memory.
MOST_SLOTS = 1024
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class StackedLowRank:
    """One projection of every slot.

    Attributes:
        a: `[slots, E_local, parts * R, K]`; of a part the first rows, as many as its rank.
        b: `[slots, E_local, N, R]`, rows in the weight's order; of a row the first columns.
        ranks: `[slots, E_local, parts]` int32, of a's rows; 0 where the slot adds nothing to this expert's part.
        scales: `[slots, E_local, parts]` float32.
        interleaved: rows of the parts alternate; else one part follows the other.
        between: what ranks that hold the other slices do to the product with a; None where a and b are whole.
            `Gathered`: of a part a has `R / ranks` rows, and b's columns are as many blocks of this size. `Summed`: a
            has some of K, and b some of N.
    """

    a: torch.Tensor
    b: torch.Tensor
    ranks: torch.Tensor
    scales: torch.Tensor
    interleaved: bool = False
    between: Between | None = None

    @property
    def num_parts(self) -> int:
        """2 where gate and up rows have an A each, else 1."""
        return self.ranks.shape[2]

    @property
    def width(self) -> int:
        """R: columns of a part."""
        return self.b.shape[3]

    @property
    def width_of_a(self) -> int:
        """Rows of a part that a has: R, or a slice of it."""
        return self.a.shape[2] // self.num_parts

    @property
    def num_rows(self) -> int:
        """N of the weight, of which b may have a slice."""
        return self.b.shape[2] * (self.between.shards.size if isinstance(self.between, Summed) else 1)

    @property
    def first_row(self) -> int:
        """The row of the weight that b's first one belongs to."""
        return self.between.shards.rank * self.b.shape[2] if isinstance(self.between, Summed) else 0

    @staticmethod
    def empty(
        shape: tuple[int, int],
        parts: int,
        width: int,
        n: int,
        k: int,
        like: torch.Tensor,
        *,
        interleaved: bool = False,
        between: Between | None = None,
    ) -> StackedLowRank:
        """Slots without an adapter; n is the weight's N, k the K that is held here."""
        size = 1 if between is None else between.shards.size
        slices = size if isinstance(between, Gathered) else 1
        rows = n // size if isinstance(between, Summed) else n

        def ints(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((*shape, parts), dtype=dtype, device=like.device)

        return StackedLowRank(
            like.new_zeros((*shape, parts * width // slices, k)),
            like.new_zeros((*shape, rows, width)),
            ints(torch.int32),
            ints(torch.float32),
            interleaved,
            between,
        )

    def rows_of(self, part: int) -> slice:
        """The rows of b that belong to a part."""
        n = self.b.shape[2]
        if self.interleaved:
            return slice(part, None, self.num_parts)
        return slice(part * n // self.num_parts, (part + 1) * n // self.num_parts)

    def write(self, slot: int, expert: int, part: int, low_rank: LowRank, b: torch.Tensor) -> int:
        """Store what is held here of one part of one expert; `b` are its rows.

        Returns:
            How many of a's rows that is.
        """
        a, rank, start = low_rank.a, low_rank.rank, part * self.width_of_a
        if isinstance(self.between, Gathered):
            shards = self.between.shards
            rank //= shards.size
            a, b = a[shards.rank * rank :][:rank], b.unflatten(1, (shards.size, rank))
        if isinstance(self.between, Summed):
            b = b[self.first_row : self.first_row + self.b.shape[2]]
        self.a[slot, expert, start : start + rank].copy_(a)
        self._columns(slot, expert, part, rank).copy_(b)
        return rank

    def _columns(self, slot: int, expert: int, part: int, rank: int) -> torch.Tensor:
        """b's columns of a rank of a: `[rows, rank]`, or `[rows, ranks that share it, rank]`, in place."""
        rows = self.b[slot, expert, self.rows_of(part)]
        if isinstance(self.between, Gathered):
            return rows.unflatten(1, (self.between.shards.size, -1))[..., :rank]
        return rows[:, :rank]

    def read(self, slot: int, expert: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is held here of one part of one expert: rows of A, and rows of B with the adapter's columns."""
        rank, start = int(self.ranks[slot, expert, part]), part * self.width_of_a
        b = self._columns(slot, expert, part, rank)
        return self.a[slot, expert, start : start + rank], b.flatten(1) if b.dim() == 3 else b


class AdapterTable:
    """Slots for the adapters of one layer's experts on one rank.

    Changes are enqueued on the current stream: a call or a graph's replay that is enqueued after them sees them.

    Args:
        num_slots: adapters that are held at once.
        max_rank: the largest rank that is taken, up to 256; memory is taken for the next of 16, 32, 64, 128, 256.
        num_experts: E, global.
        hidden_size: H.
        intermediate_size: I of this rank.
        dtype: of the adapters, which is the activations'.
        device: where.
        expert_map: for each global expert its local id, -1 where another rank holds it (a tensor or a sequence); None
            where all are local. Adapters of other ranks' experts are left out.
        num_local_experts: E_local, at least the experts that the map names; None: as many.
        is_gated: w13 has gate and up rows.
        interleaved: they alternate.
        fully_sharded_over: the ranks that share the experts' columns (`Ranks.shards`), over which both matrices of
            every adapter are cut; None: they are whole, but for the columns of I. Then every rank loads the same
            adapters, of whole experts, and keeps slices; every call is one of all these ranks, with the same rows.

    Raises:
        TypeError, ValueError: by name.
    """

    def __init__(
        self,
        num_slots: int,
        max_rank: int,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        expert_map: torch.Tensor | Sequence[int] | None = None,
        num_local_experts: int | None = None,
        is_gated: bool = True,
        interleaved: bool = False,
        fully_sharded_over: Group | None = None,
    ) -> None:
        expect_int("num_slots", num_slots, low=1, high=MOST_SLOTS)
        expect_int("max_rank", max_rank, low=1, high=RANKS[-1])
        expect_int("num_experts", num_experts, low=1)
        expect_int("hidden_size", hidden_size, low=1)
        expect_int("intermediate_size", intermediate_size, low=1)
        expect_bool("is_gated", is_gated)
        expect_bool("interleaved", interleaved)
        expect_dtype("dtype", dtype)
        device = expect_device("device", device)
        if interleaved and not is_gated:
            raise ValueError("interleaved: expected False where is_gated is False, got True")
        shards = expect_instance("fully_sharded_over", fully_sharded_over, Group, optional=True)
        if shards is not None and shards.device != device.type:
            raise ValueError(f"fully_sharded_over: expected ranks on {device.type}, got ranks on {shards.device}")
        if shards is not None and hidden_size % shards.size:
            raise ValueError(f"hidden_size: expected a multiple of the {shards.size} ranks, got {hidden_size}")
        self.shards: Group | None = shards
        self.num_slots, self.max_rank, self.num_experts = num_slots, max_rank, num_experts
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.is_gated, self.interleaved = is_gated, interleaved
        self._local = _local_experts(expert_map, num_experts)
        if num_local_experts is not None:
            expect_int("num_local_experts", num_local_experts, low=len(self._local))
        self.num_local_experts = len(self._local) if num_local_experts is None else num_local_experts
        width = next(rank for rank in RANKS if rank >= max_rank)
        if shards is not None:
            # Slices of one size, and still whole steps of 16.
            step = math.lcm(RANKS[0], shards.size)
            width = -(-width // step) * step
        gathered, summed = (None, None) if shards is None else (Gathered(shards), Summed(shards))
        like = torch.empty(0, dtype=dtype, device=device)
        shape, parts = (num_slots, self.num_local_experts), 2 if is_gated else 1
        w13_rows = parts * intermediate_size
        self.w13 = StackedLowRank.empty(
            shape, parts, width, w13_rows, hidden_size, like, interleaved=interleaved, between=gathered
        )
        self.w2 = StackedLowRank.empty(shape, 1, width, hidden_size, intermediate_size, like, between=summed)
        self._adapters: list[Adapter | None] = [None] * num_slots

    @property
    def dtype(self) -> torch.dtype:
        """Of the adapters."""
        return self.w2.a.dtype

    @property
    def device(self) -> torch.device:
        """Where the slots are."""
        return self.w2.a.device

    @property
    def loaded(self) -> tuple[int, ...]:
        """The slots that hold an adapter, ascending."""
        return tuple(slot for slot, adapter in enumerate(self._adapters) if adapter is not None)

    @property
    def experts(self) -> tuple[int, ...]:
        """The global experts whose adapters are held, in the order of their local ids."""
        return tuple(sorted(self._local, key=self._local.__getitem__))

    def adapter_of(self, slot: int) -> Adapter | None:
        """What a slot was loaded with.

        Raises:
            TypeError, ValueError: no slot, or a fully sharded table, which keeps slices alone (`slices_of`).
        """
        if self.shards is not None:
            raise ValueError("slot: expected one of a table of whole adapters, got one of a fully sharded table")
        return self._adapters[expect_int("slot", slot, low=0, high=self.num_slots - 1)]

    def slices_of(self, slot: int) -> list[tuple[str, int, torch.Tensor, torch.Tensor]]:
        """What is held here of a slot's adapter; asks the device.

        Returns:
            `gate`, `up` (each with an A, which may be one for both) or `down`; the global expert; and of `[r, K]` and
            `[N, r]` what this rank has: slices of a fully sharded table.

        Raises:
            TypeError, ValueError: no slot.
        """
        expect_int("slot", slot, low=0, high=self.num_slots - 1)
        held = [
            (name, expert, *stacked.read(slot, self._local[expert], part))
            for stacked, names in ((self.w13, ("gate", "up")), (self.w2, ("down",)))
            for expert in self.experts
            for part, name in enumerate(names[: stacked.num_parts])
        ]
        return [entry for entry in held if len(entry[2])]

    def load(self, adapter: Adapter, slot: int | None = None) -> int:
        """Put an adapter into a slot, over whatever the slot holds.

        Args:
            adapter: of this layer, in the table's dtype; on any device. A fully sharded table takes one of whole
                experts, whose ranks for w13 are multiples of the number of ranks that share it.
            slot: which; None takes the first empty one.

        Returns:
            The slot: the id that its tokens bear in `lora_ids`.

        Raises:
            TypeError, ValueError: no adapter, one of another model (sizes, experts), dtype or a larger rank, one with
                numbers that are not finite, no such slot, or no empty one, by name. The table is as it was.
        """
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapter: expected an Adapter, got {type(adapter).__name__}")
        if slot is None:
            slot = next((s for s, held in enumerate(self._adapters) if held is None), None)
            if slot is None:
                raise ValueError(f"adapter: expected an empty slot, got a full table of {self.num_slots}: evict one")
        expect_int("slot", slot, low=0, high=self.num_slots - 1)
        self._expect_fitting(adapter)
        # The slot adds nothing until all of it is there.
        self._clear(slot)
        self._write(slot, adapter)
        self._adapters[slot] = adapter if self.shards is None else _IN_SLICES
        return slot

    def _write(self, slot: int, adapter: Adapter) -> None:
        ranks13, ranks2 = (torch.zeros(stacked.ranks.shape[1:], dtype=torch.int32) for stacked in (self.w13, self.w2))
        scales13, scales2 = ranks13.float(), ranks2.float()
        if self.shards is not None:
            kind = {"is_gated": self.is_gated, "interleaved": self.interleaved}
            adapter = shard_of_adapter(adapter, self.shards.rank, self.shards.size, **kind)
        for projection, expert, low_rank in adapter.entries():
            local = self._local.get(expert)
            if local is None:
                continue
            if projection == "down":
                ranks2[local, 0] = self.w2.write(slot, local, 0, low_rank, low_rank.b)
                scales2[local, 0] = low_rank.scale
                continue
            parts = {"gate": (0,), "up": (1,), "gate_up": tuple(range(self.w13.num_parts))}[projection]
            for part in parts:
                b = low_rank.b[self.w13.rows_of(part)] if projection == "gate_up" else low_rank.b
                ranks13[local, part] = self.w13.write(slot, local, part, low_rank, b)
                scales13[local, part] = low_rank.scale
        for stacked, ranks, scales in ((self.w13, ranks13, scales13), (self.w2, ranks2, scales2)):
            stacked.scales[slot].copy_(scales)
            stacked.ranks[slot].copy_(ranks)

    def evict(self, slot: int) -> None:
        """Empty a slot: it adds nothing from now on.

        Raises:
            TypeError, ValueError: no slot, or one that holds nothing.
        """
        expect_int("slot", slot, low=0, high=self.num_slots - 1)
        if self._adapters[slot] is None:
            raise ValueError(f"slot: expected one of the loaded {list(self.loaded)}, got {slot}")
        self._clear(slot)

    def debug_expect_ids(self, name: str, lora_ids: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """In debug mode, check that every id is -1 or a slot that holds an adapter.

        Args:
            name: of the argument.
            lora_ids: of any shape.
            rows: a mask of its shape: which of them say something; None: all.

        Raises:
            ValueError: another id, with the first one found.
        """
        if not debugging() or not lora_ids.numel():
            return
        known = torch.tensor([-1, *self.loaded], device=lora_ids.device, dtype=lora_ids.dtype)
        bad = ~torch.isin(lora_ids, known)
        bad = bad if rows is None else bad & rows
        if bool(bad.any()):
            raise ValueError(
                f"{name}: expected -1 or a loaded slot of {list(self.loaded)}, got {int(lora_ids[bad][0])}"
            )

    def expect_layer(
        self,
        num_local_experts: int,
        hidden_states: torch.Tensor,
        intermediate_size: int,
        activation: ActivationFunction,
    ) -> None:
        """Check that this is a table of the layer that is called.

        Raises:
            TypeError, ValueError: `adapters`, with what differs.
        """
        like = hidden_states
        have = (self.num_local_experts, self.hidden_size, self.intermediate_size)
        want = (num_local_experts, hidden_states.shape[-1], intermediate_size)
        for what, mine, asked in zip(("E_local", "H", "I"), have, want, strict=True):
            if mine != asked:
                raise ValueError(f"adapters: expected a table with {what} {asked}, got {mine}")
        kind = (self.is_gated, self.interleaved)
        if kind != (activation.kind.is_gated, activation.interleaved):
            raise ValueError(
                f"adapters: expected a table with is_gated {activation.kind.is_gated} and interleaved "
                f"{activation.interleaved}, got {self.is_gated} and {self.interleaved}"
            )
        if self.dtype != like.dtype:
            raise TypeError(f"adapters: expected a table of dtype {like.dtype}, got {self.dtype}")
        if self.device != like.device:
            raise ValueError(f"adapters: expected a table on {like.device}, got {self.device}")

    def _clear(self, slot: int) -> None:
        for stacked in (self.w13, self.w2):
            stacked.ranks[slot].zero_()
        self._adapters[slot] = None

    def _expect_fitting(self, adapter: Adapter) -> None:
        """Check everything before anything is written."""
        if adapter.num_experts not in (None, self.num_experts):
            raise ValueError(f"adapter: expected one for {self.num_experts} experts, got {adapter.num_experts}")
        shared_by = 1 if self.shards is None else self.shards.size
        h, i = self.hidden_size, self.intermediate_size * shared_by
        sizes: Mapping[str, tuple[int, int]] = {
            "gate": (i, h),
            "up": (i, h),
            "gate_up": (self.w13.num_parts * i, h),
            "down": (h, i),
        }
        for projection, expert, low_rank in adapter.entries():
            where = f"adapter.{projection}[{expert}]"
            if type(expert) is not int or not 0 <= expert < self.num_experts:
                raise ValueError(f"{where}: expected a global expert in [0, {self.num_experts}), got {expert!r}")
            if not isinstance(low_rank, LowRank):
                raise TypeError(f"{where}: expected a LowRank, got {type(low_rank).__name__}")
            n, k = sizes[projection]
            if projection == "up" and not self.is_gated:
                raise ValueError(f"{where}: expected no up rows where the activation is not gated, got some")
            if projection == "gate_up" and (expert in adapter.gate or expert in adapter.up):
                raise ValueError(f"{where}: expected gate_up, or gate and up, of one expert, got both")
            expect_tensor(f"{where}.a", low_rank.a, shape=(low_rank.rank, k), dtypes=(self.dtype,))
            expect_tensor(f"{where}.b", low_rank.b, shape=(n, low_rank.rank), dtypes=(self.dtype,))
            if low_rank.rank > self.max_rank:
                raise ValueError(f"{where}: expected a rank of at most max_rank {self.max_rank}, got {low_rank.rank}")
            if projection != "down" and low_rank.rank % shared_by:
                raise ValueError(
                    f"{where}: expected a rank that the {shared_by} ranks of a fully sharded table divide, "
                    f"got {low_rank.rank}"
                )
        _expect_finite(adapter)


# In a slot of a fully sharded table: the adapter that it was loaded with would be whole matrices.
_IN_SLICES = Adapter()


def _expect_finite(adapter: Adapter) -> None:
    """Check every number: one look at the device for all matrices.

    Rows of other adapters meet these numbers times zero, which NaN and infinity do not survive.
    """
    found: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for projection, expert, low_rank in adapter.entries():
        for name, matrix in (("a", low_rank.a), ("b", low_rank.b)):
            where = f"adapter.{projection}[{expert}].{name}"
            found.setdefault(matrix.device, []).append((where, matrix.isfinite().all()))
    for flags in found.values():
        for (where, _), finite in zip(flags, torch.stack([flag for _, flag in flags]).tolist(), strict=True):
            if not finite:
                raise ValueError(f"{where}: expected finite numbers, got NaN or infinity")


def _local_experts(expert_map: torch.Tensor | Sequence[int] | None, num_experts: int) -> dict[int, int]:
    """The local id of each global expert that is held here.

    Raises:
        ValueError: a map of another length, or whose local ids are not 0, 1, 2, ...
    """
    if expert_map is None:
        return {expert: expert for expert in range(num_experts)}
    if isinstance(expert_map, torch.Tensor):
        entries = expect_tensor("expert_map", expert_map, shape=(num_experts,), dtypes=INTEGERS).tolist()
    else:
        entries = list(expect_instance("expert_map", expert_map, Sequence))
    if any(type(entry) is not int for entry in entries):
        raise TypeError(f"expert_map: expected integers, got {shown(entries)}")
    if len(entries) != num_experts:
        raise ValueError(f"expert_map: expected one entry for each of {num_experts} experts, got {len(entries)}")
    local = {expert: place for expert, place in enumerate(entries) if place >= 0}
    if sorted(local.values()) != list(range(len(local))) or any(place < -1 for place in entries):
        raise ValueError(f"expert_map: expected -1, or each local id of 0, 1, ... once, got {entries}")
    return local


@dataclass(frozen=True, eq=False)
class TokenAdapters:
    """What a call knows of adapters.

    Attributes:
        table: of the layer, checked.
        lora_ids: int32, contiguous: the slot of each token's (or slab row's) adapter, -1 for none.
    """

    table: AdapterTable
    lora_ids: torch.Tensor


def expect_token_adapters(
    adapters: AdapterTable | None,
    lora_ids: torch.Tensor | None,
    shape: Sequence[int],
    num_local_experts: int,
    hidden_states: torch.Tensor,
    intermediate_size: int,
    activation: ActivationFunction,
) -> TokenAdapters | None:
    """Check a call's adapters against its layer.

    Args:
        adapters: or None.
        lora_ids: or None, which says that no token has one.
        shape: that lora_ids must have.
        num_local_experts: E_local of the weights.
        hidden_states: of the call.
        intermediate_size: I of the weights.
        activation: says how w13's rows lie.

    Returns:
        None where there is nothing to add.

    Raises:
        TypeError, ValueError: by name.
    """
    if adapters is None:
        if lora_ids is not None:
            raise ValueError("lora_ids: expected None without adapters, got ids")
        return None
    if not isinstance(adapters, AdapterTable):
        raise TypeError(f"adapters: expected an AdapterTable or None, got {type(adapters).__name__}")
    adapters.expect_layer(num_local_experts, hidden_states, intermediate_size, activation)
    if lora_ids is None:
        return None
    expect_tensor("lora_ids", lora_ids, shape=shape, dtypes=(torch.int32,), like=hidden_states, contiguous=True)
    return TokenAdapters(adapters, lora_ids)
