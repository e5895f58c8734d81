"""A layer with LoRA adapters beside the same layer without, timed in one run: what adapters cost.

Three contenders: adapters over the whole batch, a batch that only the device knows to have none (every id is -1), and
one that the host knows to have none (its own graph).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..impl.fused_moe import fused_experts
from ..impl.lora.adapter import Adapter, LowRank
from ..impl.lora.table import AdapterTable, StackedLowRank
from .operands import ExpertsCall, Operands
from .plain import Added, plain_experts
from .record import Record
from .verification import RowErrorVerdict, judge_rows
from .workloads import Model, Workload

ADAPTED, DEVICE_KNOWN, HOST_KNOWN = "lora", "lora-device-none", "lora-host-none"


@dataclass(frozen=True)
class LoraOptions:
    """What `--lora RANK --adapters N` says.

    Raises:
        ValueError: a rank or a number out of its range.
    """

    rank: int
    adapters: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 256:
            raise ValueError(f"lora: expected a rank in [1, 256], got {self.rank}")
        if not 1 <= self.adapters <= 64:
            raise ValueError(f"adapters: expected a number in [1, 64], got {self.adapters}")


class LoraContender:
    """`fused_experts` with a table of adapters; a contender of `measure_workload` that brings its judge.

    Args:
        table: full.
        lora_ids: `[M]` int32, or None.
    """

    def __init__(self, table: AdapterTable, lora_ids: torch.Tensor | None) -> None:
        self.table, self.lora_ids = table, lora_ids

    def __call__(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """The layer with adapters."""
        return fused_experts(*arguments, **options, adapters=self.table, lora_ids=self.lora_ids)

    def judge(self, experts: ExpertsCall, operands: Operands) -> RowErrorVerdict:
        """All rows against the layer with adapters in plain torch."""
        added: Added | None = None
        if self.lora_ids is not None:
            added = partial(_added, self.table, self.lora_ids)
        return judge_rows(operands.pass_to(experts), plain_experts(operands, added), operands.hidden_states.dtype)


def _added(table: AdapterTable, lora_ids: torch.Tensor, name: str, expert: int, rows: torch.Tensor, inner: Any) -> Any:
    """`[P, N]`: what the adapters of tokens `rows [P]` add to their product with `inner [P, K]`."""
    stacked: StackedLowRank = table.w13 if name == "w13" else table.w2
    total = inner.new_zeros(len(rows), stacked.b.shape[2])
    for slot in lora_ids[rows].unique().tolist():
        if slot < 0:
            continue
        mine = lora_ids[rows] == slot
        for part, rank in enumerate(stacked.ranks[slot, expert].tolist()):
            start, place = part * stacked.width, stacked.rows_of(part)
            a = stacked.a[slot, expert, start : start + rank].to(inner.dtype)
            b = stacked.b[slot, expert, place, :rank].to(inner.dtype)
            delta = torch.zeros_like(total)
            delta[:, place] = stacked.scales[slot, expert, part] * (inner @ a.T @ b.T)
            total += torch.where(mine[:, None], delta, 0.0)
    return total


def full_table(model: Model, options: LoraOptions, dtype: torch.dtype, device: torch.device) -> AdapterTable:
    """Adapters of random values on every expert of the rank, about as large as the weights."""
    table = AdapterTable(
        options.adapters,
        options.rank,
        num_experts=model.num_experts,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        dtype=dtype,
        device=device,
        expert_map=model.expert_map(),
        is_gated=model.is_gated,
        interleaved=model.interleaved,
    )
    generator = torch.Generator(device).manual_seed(2000)
    h, i, rank = model.hidden_size, model.intermediate_size, options.rank

    def low_rank(n: int, k: int) -> LowRank:
        a, b = (torch.empty(s, dtype=dtype, device=device).normal_(generator=generator) for s in ((rank, k), (n, rank)))
        return LowRank(a / math.sqrt(k), b / math.sqrt(rank), 0.5)

    for _ in range(options.adapters):
        # One rank's experts are enough: nobody else's are stored.
        held = range(model.local_experts)
        parts = {"gate": (i, h), "down": (h, i)} | ({"up": (i, h)} if model.is_gated else {})
        table.load(Adapter(**{name: {e: low_rank(*size) for e in held} for name, size in parts.items()}))
    return table


class LoraContenders:
    """The contenders of each workload; the last model's table is kept for its next workload."""

    def __init__(self, options: LoraOptions, device: torch.device) -> None:
        self.options, self.device = options, device
        self._made: tuple[Model, torch.dtype, AdapterTable] | None = None

    def of(self, workload: Workload) -> dict[str, ExpertsCall]:
        """By name.

        Raises:
            ValueError: a workload of quantised weights: their deltas are judged by conformance, not timed here.
        """
        if workload.format.is_quantized:
            raise ValueError(f"lora: expected plain weights, got {workload.dtype}")
        dtype = workload.torch_dtype
        if self._made is None or self._made[:2] != (workload.model, dtype):
            self._made = None
            self._made = (workload.model, dtype, full_table(workload.model, self.options, dtype, self.device))
        table = self._made[2]
        ids = torch.arange(workload.num_tokens, dtype=torch.int32, device=self.device) % self.options.adapters
        return {
            ADAPTED: LoraContender(table, ids),
            DEVICE_KNOWN: LoraContender(table, torch.full_like(ids, -1)),
            HOST_KNOWN: LoraContender(table, None),
        }


def extra_times(records: tuple[Record, ...]) -> list[str]:
    """A line for each workload and contender: what it takes beyond the layer without LoRA, in the same run."""
    ours = {record.workload: record for record in records if record.subject not in (ADAPTED, DEVICE_KNOWN, HOST_KNOWN)}
    lines = []
    for record in records:
        base = ours.get(record.workload)
        if base is None or record.subject not in (ADAPTED, DEVICE_KNOWN, HOST_KNOWN):
            continue
        extra = (record.timing.median - base.timing.median) * 1e6
        ratio = 1 / base.versus[record.subject].median
        lines.append(
            f"{record.model} M={record.num_tokens} {record.subject}: {extra:+.2f} us, {ratio:.3f} of the layer alone"
        )
    return lines
