"""The operands of one call of the routed experts, as the reference takes them and the budget follows them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..reference.activations import SILU, Activation
from ..reference.experts import Trace, trace_experts
from ..reference.lora import TokenAdapters
from ..reference.quantization import ActivationQuantization, QuantizedWeight


@dataclass(frozen=True)
class ExpertsOperands:
    """Arguments of `reference.experts.trace_experts`, under their names."""

    hidden_states: Tensor
    w13: Tensor | QuantizedWeight
    w2: Tensor | QuantizedWeight
    topk_weights: Tensor
    topk_ids: Tensor
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    activation: Activation = SILU
    expert_map: Tensor | None = None
    apply_router_weight_on_input: bool = False
    quantize_input: ActivationQuantization | None = None
    quantize_hidden: ActivationQuantization | None = None
    adapters: TokenAdapters | None = None

    def trace(self) -> Trace:
        """What the reference says of them."""
        return trace_experts(**vars(self))

    def of_tokens(self, rows: Tensor) -> ExpertsOperands:
        """The same call of some tokens alone."""
        return replace(
            self,
            hidden_states=self.hidden_states[rows],
            topk_weights=self.topk_weights[rows],
            topk_ids=self.topk_ids[rows],
            adapters=None if self.adapters is None else replace(self.adapters, lora_ids=self.adapters.lora_ids[rows]),
        )
