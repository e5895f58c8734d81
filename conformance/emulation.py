"""Honest emulations: MoE layers that round exactly where a declaration says, and accumulate in an order of their own.

The limits of the budget are fitted on these, never on a subject under test. Each seed is another implementation:
another order of the terms, another chunk of the accumulator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.experts import to_local_ids
from .cases import ExpertsCase
from .numerics import Numerics, Rounding

CHUNKS = (1, 4, 8, 16, 32)


def _rounded(values: Tensor, rounding: Rounding, storage: torch.dtype) -> Tensor:
    """Round float32 values to storage where declared; they stay float32."""
    return values.to(storage).float() if rounding == "storage" else values


def _dot(a: Tensor, b: Tensor, generator: torch.Generator, chunk: int) -> Tensor:
    """a [P, K] @ b [N, K]^T with a float32 accumulator: terms in random order, added chunk by chunk."""
    depth = a.shape[1]
    order = torch.randperm(depth, generator=generator)
    total = torch.zeros(a.shape[0], b.shape[0])
    for start in range(0, depth, chunk):
        part = order[start : start + chunk]
        # The products and sums inside a chunk are rounded once, the running sum once per chunk.
        total = total + (a[:, part].double() @ b[:, part].double().T).float()
    return total


def emulate(case: ExpertsCase, numerics: Numerics, seed: int) -> Tensor:
    """One honest output `[M, H]` of a case on the CPU under declared numerics."""
    generator = torch.Generator().manual_seed(seed)
    chunk = CHUNKS[seed % len(CHUNKS)]
    storage = case.hidden_states.dtype
    local_ids = to_local_ids(case.topk_ids, case.expert_map)
    intermediate_size = case.w2.shape[2]
    weights = _rounded(case.topk_weights, numerics.routing_weight, storage)
    contributions = torch.zeros(*case.topk_ids.shape, case.hidden_states.shape[1])
    for expert in range(case.w13.shape[0]):
        token, slot = (local_ids == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        gate_up = _dot(case.hidden_states[token].float(), case.w13[expert].float(), generator, chunk)
        if case.apply_router_weight_on_input:
            gate_up = gate_up * weights[token, slot, None]
        gate, up = _rounded(gate_up, numerics.gate_up, storage).split(intermediate_size, dim=-1)
        activated = _rounded(gate / (1 + torch.exp(-gate)), numerics.gate, storage)
        hidden = _rounded(activated * up, numerics.hidden, storage)
        output = _rounded(_dot(hidden, case.w2[expert].float(), generator, chunk), numerics.expert_output, storage)
        if not case.apply_router_weight_on_input:
            output = output * weights[token, slot, None]
        contributions[token, slot] = _rounded(output, numerics.weighted, storage)
    total = torch.zeros(case.hidden_states.shape)
    for slot in torch.randperm(case.top_k, generator=generator).tolist():
        total = _rounded(total + contributions[:, slot], numerics.combine, storage)
    return total.to(storage)
