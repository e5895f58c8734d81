"""The oracle's decision table: which backend computes which kind of layer on which platform, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...impl.config import ActivationFormat, MoEConfig, ParallelConfig, QuantScheme
from ...impl.oracle.available import every_kernel
from ...impl.oracle.decision import BackendRefusedError
from ...impl.oracle.select import select_backend
from ...impl.platform import Platform

PLATFORMS = ("cuda:8.0", "cuda:9.0", "cuda:10.0", "rocm:gfx942", "xpu", "cpu")
_LAYER: dict[str, Any] = {
    "num_experts": 128,
    "top_k": 8,
    "hidden_size": 2048,
    "intermediate_size": 768,
    "dtype": torch.bfloat16,
    "activation": "silu",
}
LAYERS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp16": {"dtype": torch.float16},
    "fp8, blocks of 128 x 128": {"scheme": QuantScheme.FP8_W8A8, "block_shape": (128, 128)},
    "int8, activations too": {"scheme": QuantScheme.INT8_W8A8},
    "int4, groups of 128": {"scheme": QuantScheme.INT4_W4A16, "block_shape": (0, 128)},
    "bf16, swigluoai and biases": {"activation": "swigluoai", "has_bias": True},
    "bf16, LoRA": {"is_lora_enabled": True},
    "bf16, 2 data-parallel ranks": {"parallel": ParallelConfig(dp_size=2)},
    "bf16, 4 expert-parallel ranks": {"parallel": ParallelConfig(ep_size=4)},
    "bf16, batched": {"activation_format": ActivationFormat.BATCHED},
    "bf16, weight on input": {"apply_router_weight_on_input": True, "top_k": 1},
}


@dataclass(frozen=True)
class Cell:
    """One decision.

    Attributes:
        backend: its name; "" where every backend refuses.
        reasons: of every candidate, as `Reason.as_dict`.
        refusal: why none may serve, "" where one may.
    """

    backend: str
    reasons: tuple[dict[str, Any], ...]
    refusal: str = ""


def decision_table() -> dict[str, dict[str, Cell]]:
    """The decisions by layer and platform, with every kernel there and nothing asked for."""
    return {
        name: {platform: _decide(MoEConfig(**(_LAYER | changes)), platform) for platform in PLATFORMS}
        for name, changes in LAYERS.items()
    }


def _decide(config: MoEConfig, platform: str) -> Cell:
    try:
        decision = select_backend(config, Platform.parse(platform), every_kernel())
    except BackendRefusedError as error:
        return Cell("", tuple(reason.as_dict() for reason in error.reasons), str(error))
    return Cell(decision.backend.value, tuple(reason.as_dict() for reason in decision.reasons))
