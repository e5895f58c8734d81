"""A MoE layer as anyone would write it in torch: an honest implementation that owes nothing to `impl`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import ExpertsCase, RoutingCase
from ..numerics import Numerics
from ..spec import LOGITS
from ..subject import ROUTING_METHODS, Capabilities, Subject


class EagerSubject(Subject):
    """Linear layers, silu and products in the storage dtype, expert by expert."""

    name = "torch"
    # Softmax of rows without a finite logit is NaN in torch.
    capabilities = Capabilities(
        logits=tuple(name for name in LOGITS if name not in ("nan_rows", "infinite_rows")), **ROUTING_METHODS
    )
    numerics = Numerics(
        gate="storage", expert_output="storage", weighted="storage", combine="storage", routing_weight="storage"
    )

    def route(self, case: RoutingCase, variant: str) -> tuple[Tensor, Tensor]:
        """Float32 scores, masked groups and a stable sort's first ids: torch.topk promises no order of ties."""
        real = case.num_real_tokens
        if case.custom_routing_function is not None:
            weights, ids = case.custom_routing_function(
                hidden_states=None, gating_output=case.router_logits, topk=case.top_k, renormalize=case.renormalize
            )
            weights = weights * case.routed_scaling_factor
        else:
            weights, ids = _routed(case)
        weights, ids = weights.clone(), ids.to(torch.int32, copy=True)
        weights[real:], ids[real:] = 0.0, -1
        return weights, ids

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


def _routed(case: RoutingCase) -> tuple[Tensor, Tensor]:
    logits = case.router_logits.float()
    if case.scoring_func == "softmax":
        scores = torch.softmax(logits, dim=-1)
    elif case.scoring_func == "sigmoid":
        scores = torch.sigmoid(logits)
    else:
        scores = F.softplus(logits).sqrt()
    ranking = scores if case.e_score_correction_bias is None else scores + case.e_score_correction_bias.float()
    if case.num_expert_group is not None:
        groups = ranking.unflatten(1, (case.num_expert_group, ranking.shape[1] // case.num_expert_group))
        best = groups.topk(2, dim=-1).values.sum(-1) if case.group_ranking == "top2_sum" else groups.amax(dim=-1)
        kept = _first(best, case.topk_group or 1)
        dropped = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
        ranking = groups.masked_fill(dropped[..., None], -torch.inf).flatten(1)
    elif case.scoring_func == "softmax" and case.e_score_correction_bias is None:
        ranking = logits  # they rank as their softmax does, and none underflows
    ids = _first(ranking, case.top_k)
    weights = scores.gather(1, ids)
    if case.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * case.routed_scaling_factor, ids


def _first(values: Tensor, count: int) -> Tensor:
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
