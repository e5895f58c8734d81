"""A MoE layer as anyone would write it in torch: an honest implementation that owes nothing to `impl`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import ExpertsCase, RoutingCase
from ..numerics import Numerics
from ..subject import Capabilities, Subject


class EagerSubject(Subject):
    """Linear layers, silu and products in the storage dtype, expert by expert."""

    name = "torch"
    # Softmax of rows without a finite logit is NaN in torch.
    capabilities = Capabilities(logits=("unit", "wide", "ties", "tie_at_k", "equal", "negative"))
    numerics = Numerics(
        gate="storage", expert_output="storage", weighted="storage", combine="storage", routing_weight="storage"
    )

    def route(self, case: RoutingCase, variant: str) -> tuple[Tensor, Tensor]:
        """`torch.softmax` at a stable sort's first ids: weights underflow, and torch.topk promises no order of ties."""
        logits = case.router_logits.float()
        ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, : case.top_k]
        weights = torch.softmax(logits, dim=-1).gather(1, ids)
        if case.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, ids.to(torch.int32)

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """One expert at a time."""
        x = case.hidden_states
        out = torch.zeros_like(x)
        ids = case.topk_ids.long()
        if case.expert_map is not None:
            ids = torch.where(ids < 0, ids, case.expert_map.long()[ids.clamp(min=0)])
        weights = case.topk_weights.to(x.dtype)
        for expert in range(case.w13.shape[0]):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            if case.apply_router_weight_on_input:
                # The weight passes through the linear map, so that it costs one rounding and not one a term.
                product = F.linear(x[token].float(), case.w13[expert].float())
                gate_up = (product * weights[token, slot, None].float()).to(x.dtype)
            else:
                gate_up = F.linear(x[token], case.w13[expert])
            gate, up = gate_up.chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, case.w2[expert])
            if not case.apply_router_weight_on_input:
                y = y * weights[token, slot, None]
            out.index_add_(0, token, y)
        return out
