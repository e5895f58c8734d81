"""Engines that this environment has installed, timed beside ours in one process: `--peer vllm`, `--peer flashinfer`."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..impl.fused_moe import fused_experts
from .operands import ExpertsCall


def _vllm() -> ExpertsCall:
    """vLLM's Triton experts."""
    module = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
    theirs = module.fused_experts
    takes = inspect.signature(theirs).parameters

    def call(
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        activation: str,
        expert_map: torch.Tensor | None,
        global_num_experts: int,
        **beside: Any,
    ) -> torch.Tensor:
        # Its other activations and schemes have had several names over its releases: nothing is guessed.
        if activation != "silu" or beside:
            raise ValueError(f"vllm is timed with silu and plain weights, got {activation}, {', '.join(beside) or '-'}")
        options: dict[str, Any] = {"expert_map": expert_map, "global_num_experts": global_num_experts}
        if "inplace" in takes:
            options["inplace"] = False
        return theirs(hidden_states, w13, w2, topk_weights, topk_ids, **options)

    return call


def _flashinfer() -> ExpertsCall:
    """FlashInfer's CUTLASS experts, through the adapter that the oracle's backend is."""
    importlib.import_module("flashinfer.fused_moe")

    def call(*args: Any, **options: Any) -> torch.Tensor:
        return fused_experts(*args, **options, backend="flashinfer_cutlass")

    return call


_PEERS: dict[str, tuple[str, Callable[[], ExpertsCall]]] = {
    "vllm": ("vllm", _vllm),
    "flashinfer": ("flashinfer-python", _flashinfer),
}
NAMES = tuple(_PEERS)


def installed_peer(name: str) -> tuple[str, ExpertsCall]:
    """The engine of this name with its version, and its experts.

    Raises:
        ValueError: it is not installed, or does not load.
    """
    distribution, load = _PEERS[name]
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"peer: expected {name} installed here (pip install {distribution}), found none") from None
    try:
        return f"{name} {version}", load()
    except Exception as error:  # an engine that does not load says why in its own way
        raise ValueError(f"peer: {name} {version} failed to load: {type(error).__name__}: {error}") from error
