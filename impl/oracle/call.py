"""The oracle as a call asks it: decided once for a layer, and remembered."""

from __future__ import annotations

import os
from functools import cache, lru_cache
from typing import Any

import torch

from ..config import Activation, ActivationFormat, MoEConfig, ParallelConfig, QuantScheme
from ..experts.base import Experts
from ..platform import Platform
from .backends import AUTO
from .choose import choose_backend
from .select import ENVIRONMENT_VARIABLE


def experts_of_call(backend: str, *layer: Any) -> Any:
    """The experts that the oracle decides on for a call, of the base class of its activation format.

    Args:
        backend: a backend's name; `auto` leaves it to `MOEGATE_BACKEND`, and to the oracle where that is not set.
        layer: platform, activation format, E, top_k, H, I, dtype, scheme, block shape, activation, whether the GEMMs
            add biases, whether routing weights multiply the input, whether adapters may be applied, and how many ranks
            have tokens of their own.

    Raises:
        TypeError, ValueError: no name, an unknown one, or no backend that can serve, with the reasons.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a str, got {type(backend).__name__} {backend!r}")
    return _decide(None if backend == AUTO else backend, os.environ.get(ENVIRONMENT_VARIABLE), *layer)


@lru_cache(maxsize=4096)
def _decide(
    request: str | None,
    environment: str | None,
    platform: Platform,
    activation_format: ActivationFormat,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    scheme: QuantScheme,
    block_shape: tuple[int, int] | None,
    activation: Activation,
    has_bias: bool,
    apply_router_weight_on_input: bool,
    is_lora_enabled: bool,
    dp_size: int,
) -> Experts:
    """The oracle's decision; `environment` is what the process asks for, and part of the question."""
    del environment
    config = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        dtype=dtype,
        scheme=scheme,
        block_shape=block_shape,
        activation=activation,
        has_bias=has_bias,
        activation_format=activation_format,
        apply_router_weight_on_input=apply_router_weight_on_input,
        is_lora_enabled=is_lora_enabled,
        parallel=ParallelConfig(dp_size=dp_size),
    )
    decision = choose_backend(config, platform, request)
    if decision.experts is None:
        raise ValueError(f"backend: expected a platform whose experts moegate has, got {platform}")
    return _instance(decision.experts)


@cache
def _instance(experts: type[Experts]) -> Experts:
    return experts()
