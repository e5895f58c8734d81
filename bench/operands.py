"""The tensors of a workload: weight copies that several token counts share, tokens and routings of each call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from ..impl.lora.table import AdapterTable
from ..impl.quantization import ExpertsQuantization
from ..impl.quantize import quantize_weights
from .adapters import full_table
from .floor import expert_bytes
from .formats import Format
from .workloads import LoraOptions, Model, Workload

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
        w13_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
        quant: ExpertsQuantization | None = None,
        interleaved: bool = False,
        adapters: AdapterTable | None = None,
        lora_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The experts' weighted sum, `[M, H]`; the last six are passed only where they are not as by default."""
        ...


@dataclass(frozen=True)
class Operands:
    """The arguments of one call.

    Attributes:
        hidden_states: `[M, H]`.
        w13: `[E_local, 2I, H]`, gate rows first; `[E_local, I, H]` where the activation is not gated. Stored as `quant`
            says.
        w2: `[E_local, H, I]`, likewise.
        topk_weights: `[M, top_k]` float32.
        topk_ids: `[M, top_k]` int32 global ids.
        activation: between the two GEMMs.
        expert_map: `[E]` int32, or None where all experts are local.
        global_num_experts: E.
        w13_bias: `[E_local, 2I]` or None.
        w2_bias: `[E_local, H]` or None.
        quant: how the weights are stored; None where they are plain.
        interleaved: gate and up rows of w13 alternate.
        adapters: of the tokens, or None.
        lora_ids: `[M]` int32, the slot of each token's adapter, or None.
    """

    hidden_states: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    activation: str
    expert_map: torch.Tensor | None
    global_num_experts: int
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    quant: ExpertsQuantization | None = None
    interleaved: bool = False
    adapters: AdapterTable | None = None
    lora_ids: torch.Tensor | None = None

    @property
    def is_gated(self) -> bool:
        """Whether w13 holds gate and up rows."""
        return not self.activation.endswith("_no_mul")

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.w13.shape[1] // (2 if self.is_gated else 1)

    @cached_property
    def _beside(self) -> dict[str, Any]:
        """What a contender need not know of where it is not there."""
        names = ("w13_bias", "w2_bias", "quant", "adapters", "lora_ids")
        beside = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in beside.items() if value is not None}
        return given | ({"interleaved": True} if self.interleaved else {})

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
            **self._beside,
        )


@dataclass(frozen=True)
class LayerWeights:
    """One copy of a layer's parameters; fields as in `Operands`."""

    w13: torch.Tensor
    w2: torch.Tensor
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    quant: ExpertsQuantization | None = None


class WeightBank:
    """Copies of one model's weights on one device, made when first asked for and kept; each has other values."""

    def __init__(self, model: Model, stored: Format, device: torch.device) -> None:
        self.model, self.stored, self.device = model, stored, device
        self._copies: list[LayerWeights] = []
        self._adapters: tuple[LoraOptions, AdapterTable] | None = None
        expert_map = model.expert_map()
        self.expert_map = None if expert_map is None else expert_map.to(device)

    def serves(self, workload: Workload, device: torch.device) -> bool:
        """Whether these are a workload's weights."""
        return (self.model, self.stored, self.device) == (workload.model, workload.format, device)

    def room_for(self, workload: Workload) -> int:
        """How many copies fit, those that exist counted in; at least one."""
        if self.device.type != "cuda":
            return 1
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        if self.stored.is_quantized:
            # One weight as it was before, while it is quantised.
            free -= self.model.local_experts * self.model.w13_rows * self.model.hidden_size * 2
        more = int(free * _WEIGHTS_SHARE) // (expert_bytes(workload) * self.model.local_experts)
        return max(1, len(self._copies) + more)

    def copy(self, index: int) -> LayerWeights:
        """The parameters of a copy."""
        while len(self._copies) <= index:
            self._copies.append(self._make(len(self._copies)))
        return self._copies[index]

    def adapters(self, options: LoraOptions) -> AdapterTable:
        """A full table of adapters, beside every copy; the last one is kept."""
        if self._adapters is None or self._adapters[0] != options:
            self._adapters = None
            self._adapters = (options, full_table(self.model, options, self.stored.activations, self.device))
        return self._adapters[1]

    def _make(self, index: int) -> LayerWeights:
        model, stored = self.model, self.stored
        # Tensors without values need no generator, and there is none for them.
        generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(1000 + index)

        def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
            values = torch.empty(shape, dtype=stored.activations, device=self.device)
            return values.normal_(std=std, generator=generator)

        def weight(rows: int, columns: int, parts: int) -> tuple[torch.Tensor, Any, Any]:
            # A variance of 1 / columns keeps activations near one, so that no product is zero or overflows.
            plain = normal(model.local_experts, rows, columns, std=1 / math.sqrt(columns))
            if stored.weight_scale is None:
                return plain, None, None
            values, scale, zero_point = quantize_weights(
                plain,
                stored.scheme,
                weight_scale=stored.weight_scale,
                block_shape=stored.block_shape,
                zero_points=stored.zero_points,
                parts=parts,
            )
            return values, scale.to(stored.scale_dtype), zero_point

        w13, w13_scale, w13_zero_point = weight(model.w13_rows, model.hidden_size, 2 if model.is_gated else 1)
        w2, w2_scale, w2_zero_point = weight(model.hidden_size, model.intermediate_size, 1)
        w13_bias, w2_bias, quant = None, None, None
        if model.has_bias:
            w13_bias = normal(model.local_experts, model.w13_rows)
            w2_bias = normal(model.local_experts, model.hidden_size)
        if stored.is_quantized:
            quant = ExpertsQuantization(
                stored.scheme,
                w13_scale,
                w2_scale,
                w13_zero_point,
                w2_zero_point,
                stored.block_shape,
                per_act_token_quant=stored.per_act_token_quant,
            )
        return LayerWeights(w13, w2, w13_bias, w2_bias, quant)


def make_operands(workload: Workload, bank: WeightBank, call: int, weight_copy: int) -> Operands:
    """The operands of one call of a rotation."""
    generator = torch.Generator(bank.device).manual_seed(call)
    shape = (workload.num_tokens, workload.model.hidden_size)
    dtype = bank.stored.activations
    lora_ids = workload.lora_ids(call)
    return Operands(
        hidden_states=torch.empty(shape, dtype=dtype, device=bank.device).normal_(generator=generator),
        topk_weights=torch.from_numpy(workload.topk_weights(call)).to(bank.device),
        topk_ids=torch.from_numpy(workload.topk_ids(call)).to(bank.device),
        activation=workload.model.activation,
        expert_map=bank.expert_map,
        global_num_experts=workload.model.num_experts,
        interleaved=workload.model.interleaved,
        adapters=None if workload.lora is None else bank.adapters(workload.lora),
        lora_ids=None if lora_ids is None else torch.from_numpy(lora_ids).to(bank.device),
        **vars(bank.copy(weight_copy)),
    )
