"""The public calls of layers, adapters and number formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...impl import fused_shared, mxfp4, quantize, shared_experts
from ...impl.checks import debug_checks
from ...impl.experts_module import RoutedExperts, SharedExperts
from ...impl.layer import Gate, MoELayer, RoutingMethod
from ...impl.lora.adapter import Adapter, LowRank, lora_scaling
from ...impl.lora.table import AdapterTable
from ...impl.quantization import ActivationScale, WeightScale
from ...impl.replay import replaying
from ..properties.bad_input import (
    Arguments,
    Bad,
    BoolKind,
    Change,
    ChoiceKind,
    DtypeKind,
    IntKind,
    Kind,
    MappingKind,
    NumberKind,
    ObjectKind,
    SequenceKind,
    TensorKind,
    TextKind,
    bad_arguments,
    mapped,
    on_meta,
    put,
)
from ..properties.public import PublicCall
from .moegate_public import E, H, I, K, M, adapter, entered, full, layer, low_rank, routed, table, weights
from .moegate_public_values import Alone


def quantizing(**changes: Any) -> Arguments:
    """Arguments of the functions that quantise weights."""
    return {"scheme": "fp8_w8a8", "weight_scale": WeightScale.BLOCK, "block_shape": (16, 16)} | changes


_QUANTIZING: dict[str, Kind] = {
    "scheme": ChoiceKind(),
    "weight_scale": ChoiceKind(),
    "zero_points": BoolKind(),
}


ROUTING: dict[str, Kind] = {
    "top_k": IntKind(1, E),
    "scoring_func": ChoiceKind(),
    "renormalize": BoolKind(),
    "routed_scaling_factor": NumberKind(),
    "custom_routing_function": ObjectKind(optional=True),
}


def _routing(bad: Bad) -> Change:
    """A layer whose way of routing is wrong."""
    return lambda good: {**good, "routing": RoutingMethod(**bad.change({"top_k": K}))}


def _layer_call() -> PublicCall:
    return PublicCall(
        "layer.MoELayer",
        MoELayer,
        lambda: {"gate": Gate(full(E, H)), "experts": routed(), "routing": RoutingMethod(K)},
        {
            "gate": ObjectKind(),
            "experts": ObjectKind(),
            "routing": ObjectKind(),
            "shared_experts": ObjectKind(optional=True),
            "setting": ObjectKind(optional=True),
            "num_fused_shared_experts": IntKind(0),
            "expert_map": ObjectKind(optional=True),
            "aux_stream": ObjectKind(optional=True),
            "max_captured_tokens": IntKind(1, optional=True),
            "reduce": ObjectKind(optional=True),
            "adapters": ObjectKind(optional=True),
            "parallel": ObjectKind(optional=True),
        },
        (
            Bad("gate.weight", "is of another H", put(gate=Gate(full(E, H + 1)))),
            *(replace(bad, change=_routing(bad)) for bad in bad_arguments(ROUTING)),
            Bad("topk_group", "is missing", put(routing=RoutingMethod(K, num_expert_group=2))),
            Bad("experts", "are fewer than the gate's", put(gate=Gate(full(E + 1, H)))),
            Bad("setting", "speaks of shared experts", put(setting=shared_experts.SharedExpertsSetting())),
            Bad(
                "adapters",
                "are of another layer",
                put(adapters=AdapterTable(1, 4, num_experts=E, hidden_size=H + 1, intermediate_size=I, device="cpu")),
            ),
            Bad("expert_map", "is int64", put(expert_map=torch.arange(E))),
            Bad("expert_map", "has another length", put(expert_map=torch.arange(E + 1, dtype=torch.int32))),
        ),
    )


LAYER_CALLS: tuple[PublicCall, ...] = (
    # --- the layer and its parts
    PublicCall(
        "checks.debug_checks",
        lambda **a: entered(debug_checks(**a)),
        lambda: {"enabled": False},
        {"enabled": BoolKind()},
    ),
    PublicCall(
        "replay.replaying",
        lambda **a: entered(replaying(**a)),
        lambda: {"after": 1},
        {"after": IntKind(0, optional=True)},
    ),
    PublicCall(
        "experts_module.RoutedExperts",
        RoutedExperts,
        lambda: weights() | {"w13_bias": full(E, 2 * I), "w2_bias": full(E, H)},
        {
            "w13": TensorKind(),
            "w2": TensorKind(),
            "dtype": DtypeKind(),
            "w13_bias": TensorKind(optional=True),
            "w2_bias": TensorKind(optional=True),
            "quant": ObjectKind(optional=True),
            "activation": ChoiceKind(),
            "swiglu_alpha": NumberKind(),
            "swiglu_limit": NumberKind(),
            "interleaved": BoolKind(),
            "apply_router_weight_on_input": BoolKind(),
            "backend": ChoiceKind(),
            "allow_tf32": BoolKind(),
        },
    ),
    PublicCall(
        "experts_module.RoutedExperts.forward",
        lambda self, **a: self(**a),
        lambda: {
            "self": routed(),
            "hidden_states": full(M, H),
            "topk_weights": full(M, K, dtype=torch.float32),
            "topk_ids": torch.zeros(M, K, dtype=torch.int32),
        },
        {
            **dict.fromkeys(("hidden_states", "topk_weights", "topk_ids"), TensorKind()),
            "global_num_experts": IntKind(1, E, optional=True),
            "adapters": ObjectKind(optional=True),
            "expert_map": ObjectKind(optional=True),
            "dp_size": IntKind(1),
        },
    ),
    PublicCall(
        "experts_module.SharedExperts",
        SharedExperts,
        lambda: {"w13": full(2 * I, H), "w2": full(H, I), "gate": full(1, H)},
        {
            "w13": TensorKind(),
            "w2": TensorKind(),
            "gate": TensorKind(optional=True),
            "quant": ObjectKind(optional=True),
            "dtype": DtypeKind(),
            "activation": ChoiceKind(),
        },
    ),
    PublicCall(
        "experts_module.SharedExperts.forward",
        lambda self, **a: self(**a),
        lambda: {"self": SharedExperts(full(2 * I, H), full(H, I), gate=full(1, H)), "hidden_states": full(M, H)},
        {"hidden_states": TensorKind()},
        (Bad("hidden_states", "has another H", mapped("hidden_states", lambda t: t[:, :-1].contiguous())),),
    ),
    *(
        PublicCall(
            f"fused_shared.{function.__name__}",
            function,
            lambda: weights() | {"shared_w13": full(4 * I, H), "shared_w2": full(H, 2 * I)},
            dict.fromkeys(("w13", "w2", "shared_w13", "shared_w2"), TensorKind(takes=takes)),
        )
        for function, takes in (
            # The first says of other dtypes and devices why they do not do.
            (fused_shared.can_fuse_shared_experts, ("is float64", "is complex", "is bool")),
            (fused_shared.fuse_shared_experts, ("is float64", "is complex", "is bool")),
        )
    ),
    PublicCall(
        "fused_shared.append_shared_experts",
        fused_shared.append_shared_experts,
        lambda: {
            "topk_weights": full(M, K, dtype=torch.float32),
            "topk_ids": torch.zeros(M, K, dtype=torch.int32),
            "num_experts": E,
            "num_shared_experts": 1,
        },
        {
            "topk_weights": TensorKind(),
            "topk_ids": TensorKind(),
            "num_experts": IntKind(1),
            "num_shared_experts": IntKind(1),
        },
        (
            Bad("topk_weights", "has another M", mapped("topk_weights", lambda t: t[1:])),
            Bad("topk_weights", "is bfloat16", mapped("topk_weights", lambda t: t.bfloat16())),
            Bad("topk_weights", "is on another device", mapped("topk_weights", on_meta)),
            Bad("topk_ids", "is int16", mapped("topk_ids", lambda t: t.short())),
        ),
    ),
    PublicCall(
        "layer.Gate",
        Gate,
        lambda: {"weight": full(E, H), "bias": full(E), "e_score_correction_bias": full(E)},
        {
            "weight": TensorKind(named="gate.weight"),
            "bias": TensorKind(optional=True, named="gate.bias"),
            "e_score_correction_bias": TensorKind(optional=True),
        },
    ),
    PublicCall(
        "layer.Gate.forward",
        lambda self, **a: self(**a),
        lambda: {"self": Gate(full(E, H)), "hidden_states": full(M, H)},
        {"hidden_states": TensorKind(takes=("is float64",))},
        (Bad("hidden_states", "has another H", mapped("hidden_states", lambda t: t[:, :-1].contiguous())),),
    ),
    _layer_call(),
    PublicCall(
        "layer.MoELayer.forward",
        lambda self, **a: self(**a),
        lambda: {"self": layer(), "hidden_states": full(M, H)},
        {
            "hidden_states": TensorKind(takes=("has one dimension too few", "has one dimension too many")),
            "lora_ids": ObjectKind(optional=True),
            "padded_tokens": ObjectKind(optional=True),
        },
        (
            Bad("hidden_states", "has no dimension", put(hidden_states=torch.tensor(1.0, dtype=torch.bfloat16))),
            Bad("hidden_states", "has another H", mapped("hidden_states", lambda t: t[:, :-1].contiguous())),
            Bad("hidden_states", "is on another device", mapped("hidden_states", on_meta)),
            Bad("lora_ids", "is given without adapters", put(lora_ids=torch.zeros(M, dtype=torch.int32))),
        ),
    ),
    PublicCall(
        "layer.MoELayer.prepare",
        lambda self, **a: self.prepare(**a),
        lambda: {"self": layer(), "num_tokens": (1,)},
        {"num_tokens": SequenceKind()},
        (Bad("num_tokens", "holds a negative number", put(num_tokens=(1, -1))),),
    ),
    # --- adapters
    PublicCall(
        "lora.adapter.lora_scaling",
        lora_scaling,
        lambda: {"alpha": 16.0, "rank": 8},
        {"alpha": NumberKind(low=None), "rank": IntKind(1), "rank_stabilized": BoolKind()},
    ),
    PublicCall(
        "lora.adapter.LowRank",
        LowRank,
        lambda: {"a": full(2, H), "b": full(I, 2)},
        {
            "a": TensorKind(takes=("has strided columns",)),
            "b": TensorKind(takes=("has strided columns",)),
            "scale": NumberKind(low=None),
        },
        (
            Bad("b", "has another rank", put(b=full(I, 3))),
            Bad("b", "has another dtype", put(b=full(I, 2, dtype=torch.float16))),
            Bad("b", "has rank 0", put(a=full(0, H), b=full(I, 0))),
        ),
    ),
    PublicCall(
        "lora.adapter.Adapter",
        Adapter,
        lambda: {"gate": {0: low_rank()}, "num_experts": E},
        {
            **dict.fromkeys(("gate", "up", "gate_up", "down"), MappingKind()),
            "num_experts": IntKind(1, optional=True),
        },
        (
            Bad("gate", "holds tensors", put(gate={0: full(2, H)})),
            Bad("gate", "has a string for an expert", put(gate={"0": low_rank()})),
            Bad("down", "has a negative expert", put(down={-1: low_rank()})),
        ),
    ),
    PublicCall(
        "lora.table.AdapterTable",
        AdapterTable,
        lambda: {
            "num_slots": 2,
            "max_rank": 4,
            "num_experts": E,
            "hidden_size": H,
            "intermediate_size": I,
            "device": "cpu",
        },
        {
            "num_slots": IntKind(1, 1024),
            "max_rank": IntKind(1, 256),
            "num_experts": IntKind(1),
            "hidden_size": IntKind(1),
            "intermediate_size": IntKind(1),
            "dtype": DtypeKind(),
            "num_local_experts": IntKind(E, optional=True),
            "is_gated": BoolKind(),
            "interleaved": BoolKind(),
            "expert_map": SequenceKind(optional=True),
            "device": TextKind(),
            "fully_sharded_over": ObjectKind(optional=True),
        },
        (
            Bad("fully_sharded_over", "is on another device", put(device="meta", fully_sharded_over=Alone())),
            Bad("interleaved", "is on without a gate", put(is_gated=False, interleaved=True)),
            Bad("expert_map", "has another length", put(expert_map=[0, 1])),
            Bad("expert_map", "has a local id twice", put(expert_map=[0, 0, 1, 2])),
            Bad("expert_map", "has a local id of -2", put(expert_map=[0, 1, 2, -2])),
            Bad("expert_map", "holds floats", put(expert_map=[0.0, 1.0, 2.0, 3.0])),
            Bad("expert_map", "is a tensor of two dimensions", put(expert_map=torch.zeros(4, 1, dtype=torch.int32))),
        ),
    ),
    PublicCall(
        "lora.table.AdapterTable.load",
        lambda self, **a: self.load(**a),
        lambda: {"self": table(loaded=True), "adapter": adapter(), "slot": 0},
        {"adapter": ObjectKind(), "slot": IntKind(0, 1, optional=True)},
        (
            Bad("adapter", "is for more experts", put(adapter=Adapter(num_experts=E + 1))),
            Bad("adapter.gate[0].a", "is of another H", put(adapter=Adapter(gate={0: low_rank(k=H + 1)}))),
            Bad("adapter.down[9]", "has an expert above E", put(adapter=Adapter(down={9: low_rank(H, I)}))),
            Bad("adapter.gate[0]", "has a larger rank", put(adapter=Adapter(gate={0: low_rank(rank=5)}))),
            Bad(
                "adapter.gate[0].a",
                "holds NaN",
                put(adapter=Adapter(gate={0: LowRank(full(2, H) * float("nan"), full(I, 2))})),
            ),
            Bad(
                "adapter.gate_up[0]",
                "has gate_up beside gate",
                put(adapter=Adapter(gate={0: low_rank()}, gate_up={0: low_rank(2 * I)})),
            ),
        ),
    ),
    PublicCall(
        "lora.table.AdapterTable.evict",
        lambda self, **a: self.evict(**a),
        lambda: {"self": table(loaded=True), "slot": 1},
        {"slot": IntKind(0, 1)},
        (Bad("slot", "holds nothing", put(slot=0)),),
    ),
    PublicCall(
        "lora.table.AdapterTable.adapter_of",
        lambda self, **a: self.adapter_of(**a),
        lambda: {"self": table(loaded=True), "slot": 1},
        {"slot": IntKind(0, 1)},
        (Bad("slot", "is of a fully sharded table", put(self=table(fully_sharded_over=Alone()))),),
    ),
    PublicCall(
        "lora.table.AdapterTable.slices_of",
        lambda self, **a: self.slices_of(**a),
        lambda: {"self": table(loaded=True), "slot": 1},
        {"slot": IntKind(0, 1)},
    ),
    # --- formats
    PublicCall(
        "mxfp4.dequantize_mxfp4",
        mxfp4.dequantize_mxfp4,
        lambda: {
            "blocks": torch.zeros(E, 2, 16, dtype=torch.uint8),
            "scales": torch.zeros(E, 2, dtype=torch.uint8),
            "dtype": torch.bfloat16,
        },
        {
            "blocks": TensorKind(takes=("has one dimension too few", "has one dimension too many")),
            "scales": TensorKind(),
            "dtype": DtypeKind(),
        },
        (
            Bad("scales", "has other leading dimensions", put(blocks=torch.zeros(2, 16, dtype=torch.uint8))),
            Bad("blocks", "has no dimension", put(blocks=torch.tensor(1, dtype=torch.uint8))),
        ),
    ),
    PublicCall(
        "quantize.quantize_activations",
        quantize.quantize_activations,
        lambda: {"x": full(M, H), "dtype": torch.int8, "scale": ActivationScale.GROUP, "group": 16},
        {
            "x": TensorKind(),
            "dtype": DtypeKind(),
            "scale": ChoiceKind(),
            "group": IntKind(1),
            "backend": ChoiceKind(optional=True),
        },
        (
            Bad("static_scale", "stands beside a group", put(static_scale=torch.ones(1))),
            Bad("static_scale", "is missing", put(scale="static", group=0)),
            Bad("static_scale", "is float64", put(scale="static", group=0, static_scale=torch.ones(1).double())),
            Bad("group", "stands beside a token", put(scale="token")),
        ),
    ),
    PublicCall(
        "quantize.quantize_weights",
        quantize.quantize_weights,
        lambda: {"w": full(E, 2 * I, H), "parts": 2} | quantizing(),
        {"w": TensorKind(), "parts": IntKind(1, 32), **_QUANTIZING},
        (
            Bad("block_shape", "is missing", put(block_shape=None)),
            Bad("block_shape", "is of floats", put(block_shape=(16.0, 16.0))),
            Bad("parts", "does not divide N", put(parts=3)),
        ),
    ),
    PublicCall(
        "quantize.quantize_experts",
        quantize.quantize_experts,
        lambda: weights() | quantizing(),
        {
            "w13": TensorKind(named="w13"),
            "w2": TensorKind(named="w2"),
            "is_gated": BoolKind(),
            "per_act_token_quant": BoolKind(),
            **_QUANTIZING,
        },
        (
            Bad("w13", "has another H", mapped("w13", lambda t: t[..., :-16].contiguous())),
            Bad("w13", "has another E", mapped("w13", lambda t: t[1:])),
            Bad("w13", "has odd rows", mapped("w13", lambda t: t[:, 1:])),
        ),
    ),
)
