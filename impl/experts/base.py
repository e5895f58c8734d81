"""What every experts backend is: a capability predicate that it owns, and one call for its activation format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from ..config import Activation, MoEConfig, QuantScheme
from ..platform import Platform
from .readiness import READY, Readiness


def unshipped_feature(config: MoEConfig) -> str | None:
    """What `config` needs and no kernel of this build computes yet, in words for the user; None where all is there."""
    if config.scheme is not QuantScheme.NONE:
        return f"this build ships no kernel for the scheme {config.scheme} yet"
    if config.activation is not Activation.SILU:
        return f"this build ships no kernel for the activation {config.activation} yet"
    if config.is_lora_enabled:
        return "this build ships no LoRA kernel yet"
    return None


class Experts(ABC):
    """One backend's way to compute a layer's routed experts.

    Attributes:
        backend: the name under which the oracle knows it and a user asks for it.
    """

    backend: ClassVar[str]

    @classmethod
    @abstractmethod
    def refusal(cls, config: MoEConfig, platform: Platform) -> str | None:
        """Why this backend cannot run `config` on `platform`, in words for the user; None where it can.

        It speaks of what the kernel can compute and on which hardware, never of what is installed.
        """

    @classmethod
    def readiness(cls, config: MoEConfig, platform: Platform) -> Readiness:
        """Whether this process has the kernel that `config` needs on its own `platform`: shipped, installed, compiled.

        Nothing is imported or compiled to find out.
        """
        del config, platform
        return READY


class StandardExperts(Experts):
    """A backend of the standard activation format."""

    @abstractmethod
    def apply(
        self,
        out: torch.Tensor,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        activation: Activation,
        apply_router_weight_on_input: bool,
        expert_map: torch.Tensor | None,
        global_num_experts: int,
        allow_tf32: bool,
    ) -> None:
        """Write the experts' weighted sum into `out [M, H]`; arguments are as `fused_experts` documents and checked.

        M is at least 1. Nothing but `out` is written.
        """


class BatchedExperts(Experts):
    """A backend of the batched activation format."""

    @abstractmethod
    def apply(
        self,
        out: torch.Tensor,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        expert_num_tokens: torch.Tensor,
        *,
        activation: Activation,
        allow_tf32: bool,
    ) -> None:
        """Write each token through its expert into `out [E_local, max_tokens, H]`, without any routing weight.

        Arguments are as `batched_experts` documents and checked; no size is 0. Rows behind an expert's count are
        neither read nor written, and nothing but `out` is written.
        """
