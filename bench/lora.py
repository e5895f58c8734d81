"""A layer with LoRA adapters beside the same layer without, timed in one run: what adapters cost.

Three contenders: adapters over the whole batch, a batch that only the device knows to have none (every id is -1), and
one that the host knows to have none (its own graph).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..impl.fused_moe import fused_experts
from ..impl.lora.table import AdapterTable
from .operands import ExpertsCall, Operands, WeightBank
from .plain import plain_experts
from .record import Record
from .verification import RowErrorVerdict, judge_rows
from .workloads import LoraOptions, Workload

ADAPTED, DEVICE_KNOWN, HOST_KNOWN = "lora", "lora-device-none", "lora-host-none"


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
        out = operands.pass_to(experts)
        adapted = replace(operands, adapters=self.table, lora_ids=self.lora_ids)
        return judge_rows(out, plain_experts(adapted), operands.hidden_states.dtype)


def lora_contenders(workload: Workload, options: LoraOptions, bank: WeightBank) -> dict[str, ExpertsCall]:
    """The contenders of a workload by name, with the bank's table; none beside one that has adapters itself.

    Raises:
        ValueError: a workload of quantised weights: their deltas are judged by conformance, not timed here.
    """
    if workload.lora is not None:
        return {}
    if workload.format.is_quantized:
        raise ValueError(f"lora: expected plain weights, got {workload.dtype}")
    table = bank.adapters(options)
    ids = torch.from_numpy(replace(workload, lora=options).lora_ids()).to(bank.device)
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
