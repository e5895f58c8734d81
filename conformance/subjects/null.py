"""Kernels that compute nothing. A suite that accepts one of them cannot tell a kernel from nothing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..cases import ExpertsCase, RoutingCase
from ..subject import Subject


class Zeros(Subject):
    """All zeros."""

    name = "null:zeros"

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """Zeros of the right form."""
        return torch.zeros_like(case.hidden_states)

    def route(self, case: RoutingCase, variant: str) -> tuple[Tensor, Tensor]:
        """The first experts, with no weight."""
        shape = (case.router_logits.shape[0], case.top_k)
        ids = torch.arange(case.top_k, dtype=torch.int32).expand(shape)
        return torch.zeros(shape), ids.contiguous()


class Echo(Subject):
    """The input as the output."""

    name = "null:echo"

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """A copy of the hidden states."""
        return case.hidden_states.clone()


class Previous(Subject):
    """The output of the call before: a stale buffer."""

    name = "null:previous"

    def __init__(self) -> None:
        self._previous = torch.zeros(1)

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """What the last call should have returned, repeated to this call's shape."""
        size = case.hidden_states.numel()
        stale = self._previous.repeat(-(-size // max(1, self._previous.numel())) if size else 0)[:size]
        self._previous = case.operands().trace().output.flatten()
        if self._previous.numel() == 0:
            self._previous = torch.zeros(1, dtype=torch.float64)
        return stale.view(case.hidden_states.shape).to(case.hidden_states.dtype)


class MeanOfExperts(Subject):
    """The mean of all experts held here, whatever the routing."""

    name = "null:mean"

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """Every token through every local expert, averaged."""
        num_tokens, num_local = case.num_tokens, case.num_local_experts
        everyone = torch.arange(num_local, dtype=torch.int32).expand(num_tokens, num_local)
        weights = torch.full((num_tokens, num_local), 1 / num_local)
        mean = replace(
            case.operands(),
            topk_weights=weights,
            topk_ids=everyone,
            expert_map=None,
            apply_router_weight_on_input=False,
        )
        return mean.trace().output.to(case.hidden_states.dtype)


NULL_KERNELS = (Zeros, Echo, Previous, MeanOfExperts)
