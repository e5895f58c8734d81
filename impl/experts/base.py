"""What every experts backend is: a capability predicate that it owns, and one call for its activation format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..config import ActivationFunction, MoEConfig
from ..lora.table import TokenAdapters
from ..platform import Platform
from ..quantization import ActivationScale
from ..quantize import dequantize_activations
from ..weights import ExpertsWeights
from .readiness import READY, Readiness


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


@dataclass(frozen=True, eq=False)
class ExpertsCall:
    """One call in the standard activation format; arguments are as `fused_experts` documents and checked.

    Attributes:
        hidden_states: [M, H], M at least 1.
        weights: the experts held here, at least one.
        topk_weights: [M, top_k] float32.
        topk_ids: [M, top_k], global ids.
        activation: between the two GEMMs.
        apply_router_weight_on_input: routing weights multiply the experts' input.
        expert_map: [E] int32, global to local id, or None.
        global_num_experts: E.
        allow_tf32: float32 operands may be rounded to TF32.
        lora: each token's adapter, ids `[M]`; None where the host knows of none.
        input_scale: of hidden states that come quantised; None where they are of the activations' dtype.
    """

    hidden_states: torch.Tensor
    weights: ExpertsWeights
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    activation: ActivationFunction
    apply_router_weight_on_input: bool
    expert_map: torch.Tensor | None
    global_num_experts: int
    allow_tf32: bool
    lora: TokenAdapters | None = None
    input_scale: torch.Tensor | None = None

    def adapted_states(self, dtype: torch.dtype) -> torch.Tensor:
        """The hidden states that adapters see, [M, H]: before they are quantised, or what `dtype` can tell of them."""
        if self.input_scale is None:
            return self.hidden_states
        quant = self.weights.quant
        group = quant.group if quant is not None and quant.activation_scale is ActivationScale.GROUP else 0
        return dequantize_activations(self.hidden_states, self.input_scale, group, dtype)


class StandardExperts(Experts):
    """A backend of the standard activation format."""

    @abstractmethod
    def apply(self, out: torch.Tensor, call: ExpertsCall) -> None:
        """Write the experts' weighted sum into `out [M, H]`, and nothing else."""


@dataclass(frozen=True, eq=False)
class BatchedCall:
    """One call in the batched activation format; arguments are as `batched_experts` documents and checked.

    Attributes:
        hidden_states: [E_local, max_tokens, H]; no size is 0.
        weights: the experts held here.
        expert_num_tokens: [E_local] int32.
        activation: between the two GEMMs.
        allow_tf32: float32 operands may be rounded to TF32.
        lora: each row's adapter, ids `[E_local, max_tokens]`; None where the host knows of none.
    """

    hidden_states: torch.Tensor
    weights: ExpertsWeights
    expert_num_tokens: torch.Tensor
    activation: ActivationFunction
    allow_tf32: bool
    lora: TokenAdapters | None = None


class BatchedExperts(Experts):
    """A backend of the batched activation format."""

    @abstractmethod
    def apply(self, out: torch.Tensor, call: BatchedCall) -> None:
        """Write each token through its expert into `out [E_local, max_tokens, H]`, without any routing weight.

        Rows behind an expert's count are neither read nor written, and nothing but `out` is written.
        """
