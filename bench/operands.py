"""The tensors of a workload: weight copies that several token counts share, tokens and routings of each call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from .floor import expert_bytes
from .workloads import Model, Workload

# Of the memory that is free: graphs keep their intermediates beside the weights.
_WEIGHTS_SHARE = 0.75


class ExpertsCall(Protocol):
    """The signature of `moegate.impl.fused_moe.fused_experts`, as far as it is timed."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        activation: str,
        expert_map: torch.Tensor | None,
        global_num_experts: int,
    ) -> torch.Tensor:
        """The experts' weighted sum, `[M, H]`."""
        ...


@dataclass(frozen=True)
class Operands:
    """The arguments of one call.

    Attributes:
        hidden_states: `[M, H]`.
        w13: `[E_local, 2I, H]`, gate rows first; `[E_local, I, H]` where the activation is not gated.
        w2: `[E_local, H, I]`.
        topk_weights: `[M, top_k]` float32.
        topk_ids: `[M, top_k]` int32 global ids.
        activation: between the two GEMMs.
        expert_map: `[E]` int32, or None where all experts are local.
        global_num_experts: E.
    """

    hidden_states: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    activation: str
    expert_map: torch.Tensor | None
    global_num_experts: int

    def pass_to(self, experts: ExpertsCall) -> torch.Tensor:
        """`experts` of these operands."""
        return experts(
            self.hidden_states,
            self.w13,
            self.w2,
            self.topk_weights,
            self.topk_ids,
            activation=self.activation,
            expert_map=self.expert_map,
            global_num_experts=self.global_num_experts,
        )


class WeightBank:
    """Copies of one model's weights on one device, made when first asked for and kept; each has other values."""

    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        expert_map = model.expert_map()
        self.expert_map = None if expert_map is None else expert_map.to(device)

    def serves(self, workload: Workload, device: torch.device) -> bool:
        """Whether these are a workload's weights."""
        return (self.model, self.dtype, self.device) == (workload.model, workload.torch_dtype, device)

    def room_for(self, workload: Workload) -> int:
        """How many copies fit, those that exist counted in; at least one."""
        if self.device.type != "cuda":
            return 1
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        more = int(free * _WEIGHTS_SHARE) // (expert_bytes(workload) * self.model.local_experts)
        return max(1, len(self._copies) + more)

    def copy(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(w13, w2) of a copy."""
        while len(self._copies) <= index:
            self._copies.append(self._make(len(self._copies)))
        return self._copies[index]

    def _make(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.model
        generator = torch.Generator(self.device).manual_seed(1000 + index)

        def weight(rows: int, columns: int) -> torch.Tensor:
            # A variance of 1 / columns keeps activations near one, so that no product is zero or overflows.
            shape = (model.local_experts, rows, columns)
            values = torch.empty(shape, dtype=self.dtype, device=self.device)
            return values.normal_(std=1 / math.sqrt(columns), generator=generator)

        return weight(model.w13_rows, model.hidden_size), weight(model.hidden_size, model.intermediate_size)


def make_operands(workload: Workload, bank: WeightBank, call: int, weight_copy: int) -> Operands:
    """The operands of one call of a rotation."""
    generator = torch.Generator(bank.device).manual_seed(call)
    shape = (workload.num_tokens, workload.model.hidden_size)
    w13, w2 = bank.copy(weight_copy)
    return Operands(
        hidden_states=torch.empty(shape, dtype=bank.dtype, device=bank.device).normal_(generator=generator),
        w13=w13,
        w2=w2,
        topk_weights=torch.from_numpy(workload.topk_weights(call)).to(bank.device),
        topk_ids=torch.from_numpy(workload.topk_ids(call)).to(bank.device),
        activation=workload.model.activation,
        expert_map=bank.expert_map,
        global_num_experts=workload.model.num_experts,
    )
