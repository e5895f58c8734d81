"""Tables of adapters for a model's experts: what a workload with LoRA is timed with."""

from __future__ import annotations

import math

import torch

from ..impl.lora.adapter import Adapter, LowRank
from ..impl.lora.table import AdapterTable
from .workloads import LoraOptions, Model


def empty_table(model: Model, options: LoraOptions, dtype: torch.dtype, device: torch.device) -> AdapterTable:
    """A table of this rank's experts, which holds no adapter."""
    return AdapterTable(
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


def full_table(model: Model, options: LoraOptions, dtype: torch.dtype, device: torch.device) -> AdapterTable:
    """Adapters of random values on every expert of the rank, about as large as the weights."""
    table = empty_table(model, options, dtype, device)
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
