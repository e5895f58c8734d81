"""moegate's layers with adapters, in the suite's plain words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...impl.batched import batched_experts
from ...impl.checks import debug_checks
from ...impl.fused_moe import fused_experts
from ...impl.lora.adapter import Adapter, LowRank
from ...impl.lora.table import AdapterTable
from ..cases import BatchedCase
from ..lora_cases import LoraAdapter, LoraCase, LoraMatrix


def _low_ranks(part: Mapping[int, LoraMatrix]) -> dict[int, LowRank]:
    return {expert: LowRank(matrix.a, matrix.b, matrix.scale) for expert, matrix in part.items()}


def as_adapter(adapter: LoraAdapter) -> Adapter:
    """The suite's adapter as moegate's."""
    return Adapter(**{name: _low_ranks(part) for name, part in vars(adapter).items()})


class MoegateLoraLayer:
    """`fused_experts` or `batched_experts` of a case with an `AdapterTable`.

    Args:
        case: the layer.
        variant: the backend.
        num_slots: of the table.
        arguments: of the experts of a case.
    """

    def __init__(
        self, case: LoraCase, variant: str, num_slots: int, arguments: Callable[[Any], dict[str, Any]]
    ) -> None:
        layer = case.layer
        self._case, self._variant, self._arguments = case, variant, arguments(layer)
        parts = 2 if layer.activation.is_gated else 1
        self.table = AdapterTable(
            num_slots,
            case.max_rank,
            num_experts=case.num_experts,
            hidden_size=layer.hidden_states.shape[-1],
            intermediate_size=layer.w13.shape[1] // parts,
            dtype=layer.hidden_states.dtype,
            device=layer.hidden_states.device,
            expert_map=case.expert_map,
            num_local_experts=layer.num_local_experts,
            is_gated=layer.activation.is_gated,
            interleaved=layer.activation.interleaved,
        )

    def load(self, slot: int, adapter: LoraAdapter) -> None:
        """`AdapterTable.load`."""
        self.table.load(as_adapter(adapter), slot)

    def evict(self, slot: int) -> None:
        """`AdapterTable.evict`."""
        self.table.evict(slot)

    def run(self, lora_ids: Tensor | None, out: Tensor | None = None) -> Tensor:
        """The layer; a batch that is known to have no adapter is a call without the table."""
        layer = self._case.layer
        adapters = {"adapters": None if lora_ids is None else self.table, "lora_ids": lora_ids, "out": out}
        capturing = lora_ids is not None and lora_ids.is_cuda and torch.cuda.is_current_stream_capturing()
        with debug_checks(not capturing):
            if isinstance(layer, BatchedCase):
                return batched_experts(
                    layer.hidden_states,
                    expert_num_tokens=layer.expert_num_tokens,
                    **self._arguments,
                    **adapters,
                    backend=self._variant,
                )
            return fused_experts(
                layer.hidden_states,
                topk_weights=layer.topk_weights,
                topk_ids=layer.topk_ids,
                **self._arguments,
                **adapters,
                apply_router_weight_on_input=layer.apply_router_weight_on_input,
                expert_map=layer.expert_map,
                global_num_experts=layer.num_experts,
                backend=self._variant,
            )
