"""What public checkpoints call the parts of a MoE layer, and what their `config.json` says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checks import expect_bool, expect_instance, expect_int, expect_number
from .config import Activation
from .layer import RoutingMethod


@dataclass(frozen=True)
class LayerNames:
    """Names below a layer's prefix.

    Attributes:
        block: the prefix, with the layer's number to be filled in.
        router: the router's own prefix.
        gate, up, down: an expert's linear maps below `experts.<number>.`, `.weight` left out.
        shared: the shared experts' prefix, whose maps are `gate_proj`, `up_proj` and `down_proj`.
        shared_gate: of their sigmoid gate.
    """

    block: str = "model.layers.{layer}.mlp."
    router: str = "gate."
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts."
    shared_gate: str = "shared_expert_gate.weight"


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a model, whole: no rank divides it yet.

    Attributes:
        model_type: as in `config.json`.
        names: of its entries.
        num_experts: E.
        hidden_size: H.
        intermediate_size: I of one expert.
        routing: how it routes.
        shared_size: I of the shared experts together; 0 without.
        shared_is_gated: a sigmoid gate multiplies their output.
        has_router_bias: the router adds one.
        has_correction_bias: a bias ranks the experts.
        has_bias: the experts' linear maps add biases.
        is_transposed: stacked weights are `[E, in, out]`, and gate and up alternate (gpt-oss).
        activation: between the two linear maps.
        swiglu_alpha, swiglu_limit: of swigluoai.
        block_shape: of fp8 weights' scales; None where weights are plain.
    """

    model_type: str
    names: LayerNames
    num_experts: int
    hidden_size: int
    intermediate_size: int
    routing: RoutingMethod
    shared_size: int = 0
    shared_is_gated: bool = False
    has_router_bias: bool = False
    has_correction_bias: bool = False
    has_bias: bool = False
    is_transposed: bool = False
    activation: Activation = Activation.SILU
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    block_shape: tuple[int, int] | None = None


class _Config:
    """`config.json`, whose keys changed their names over time; a missing one is an error by name."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def number(self, *names: str) -> int:
        for name in names:
            value = self.config.get(name)
            if value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ValueError(f"config.{name}: expected an integer of at least 1, got {value!a:.80}")
                return value
        raise ValueError(f"config: expected {' or '.join(names)}, got none of them")

    def count(self, name: str, default: int) -> int:
        value = self.config.get(name)
        return default if value is None else expect_int(f"config.{name}", value, low=0)

    def switch(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        return default if value is None else expect_bool(f"config.{name}", value)

    def factor(self, name: str, default: float) -> float:
        value = self.config.get(name)
        return default if value is None else float(expect_number(f"config.{name}", value, above=0))

    def expect(self, name: str, *known: Any) -> None:
        """A key that is there has one of the known values."""
        value = self.config.get(name)
        if value is not None and value not in known:
            raise ValueError(f"config.{name}: expected one of {list(known)}, got {value!a:.80}")

    def block_shape(self) -> tuple[int, int] | None:
        """Of fp8 weights, which is the one quantisation that is loaded as it is."""
        quantization = self.config.get("quantization_config")
        if quantization is None:
            return None
        expect_instance("config.quantization_config", quantization, Mapping)
        if quantization.get("quant_method") == "mxfp4":
            return None
        shape = quantization.get("weight_block_size")
        is_shape = isinstance(shape, (list, tuple)) and len(shape) == 2
        if quantization.get("quant_method") == "fp8" and is_shape and all(type(n) is int and n > 0 for n in shape):
            return shape[0], shape[1]
        raise ValueError(
            "config.quantization_config: expected quant_method 'fp8' with a weight_block_size of two integers, or "
            f"'mxfp4', got {dict(quantization)!a:.200}"
        )


def _mixtral(config: _Config) -> LayerPlan:
    names = LayerNames(block="model.layers.{layer}.block_sparse_moe.", gate="w1", up="w3", down="w2")
    return LayerPlan(
        "mixtral",
        names,
        config.number("num_local_experts"),
        config.number("hidden_size"),
        config.number("intermediate_size"),
        RoutingMethod(config.number("num_experts_per_tok")),
        block_shape=config.block_shape(),
    )


def _qwen(config: _Config, model_type: str, *, has_shared: bool) -> LayerPlan:
    return LayerPlan(
        model_type,
        LayerNames(shared="shared_expert."),
        config.number("num_experts", "num_local_experts"),
        config.number("hidden_size"),
        config.number("moe_intermediate_size"),
        RoutingMethod(config.number("num_experts_per_tok"), renormalize=config.switch("norm_topk_prob", False)),
        shared_size=config.number("shared_expert_intermediate_size") if has_shared else 0,
        shared_is_gated=has_shared,
        block_shape=config.block_shape(),
    )


def _deepseek_v3(config: _Config) -> LayerPlan:
    config.expect("scoring_func", "sigmoid")
    config.expect("topk_method", "noaux_tc")
    size = config.number("moe_intermediate_size")
    routing = RoutingMethod(
        config.number("num_experts_per_tok"),
        scoring_func="sigmoid",
        renormalize=config.switch("norm_topk_prob", True),
        num_expert_group=config.number("n_group"),
        topk_group=config.number("topk_group"),
        routed_scaling_factor=config.factor("routed_scaling_factor", 1.0),
    )
    return LayerPlan(
        "deepseek_v3",
        LayerNames(),
        config.number("n_routed_experts", "num_local_experts"),
        config.number("hidden_size"),
        size,
        routing,
        shared_size=size * config.count("n_shared_experts", 0),
        has_correction_bias=True,
        block_shape=config.block_shape(),
    )


def _gpt_oss(config: _Config) -> LayerPlan:
    config.block_shape()
    return LayerPlan(
        "gpt_oss",
        LayerNames(router="router."),
        config.number("num_local_experts", "num_experts"),
        config.number("hidden_size"),
        config.number("intermediate_size"),
        # A softmax over the chosen logits is the whole softmax, renormalised.
        RoutingMethod(config.number("num_experts_per_tok", "experts_per_token")),
        has_router_bias=True,
        has_bias=True,
        is_transposed=True,
        activation=Activation.SWIGLUOAI,
        swiglu_alpha=config.factor("swiglu_alpha", 1.702),
        swiglu_limit=config.factor("swiglu_limit", 7.0),
    )


MODELS = {
    "mixtral": _mixtral,
    "qwen2_moe": lambda config: _qwen(config, "qwen2_moe", has_shared=True),
    "qwen3_moe": lambda config: _qwen(config, "qwen3_moe", has_shared=False),
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}


def plan_of(config: Mapping[str, Any]) -> LayerPlan:
    """The MoE layer of a model, from its `config.json` as a mapping.

    Sources: the model cards' `config.json` on Hugging Face: mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen2-57B-A14B,
    Qwen/Qwen3-30B-A3B, deepseek-ai/DeepSeek-V3, openai/gpt-oss-20b.

    Raises:
        ValueError: an unknown model type, or a key that is missing or has a value that is not known here, by name.
    """
    model_type = expect_instance("config", config, Mapping).get("model_type")
    if model_type not in tuple(MODELS):
        raise ValueError(f"config.model_type: expected one of {sorted(MODELS)}, got {model_type!a:.80}")
    read = _Config(config)
    read.expect("hidden_act", "silu")
    return MODELS[model_type](read)
