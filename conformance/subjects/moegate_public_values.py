"""The public calls that make and ask values: configuration, platform, oracle, ranks, shared experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ...impl import overlap, platform, quantization, shared_experts
from ...impl.config import MoEConfig, ParallelConfig, QuantScheme, expect_block_shape
from ...impl.oracle import available, backends, choose, select
from ...impl.parallel import placement
from ...impl.parallel.collectives import Group
from ...impl.parallel.experts import ParallelExperts
from ...impl.parallel.mesh import Mesh
from ...impl.parallel.ranks import Ranks, connect
from ...impl.platform import Platform
from ..properties.bad_input import (
    Bad,
    BoolKind,
    ChoiceKind,
    DtypeKind,
    IntKind,
    MappingKind,
    ObjectKind,
    SequenceKind,
    TensorKind,
    TextKind,
    put,
)
from ..properties.public import PublicCall
from .moegate_public import E, K, M, config


class Done:
    """Work that nobody needs to wait for."""

    def wait(self) -> None:
        """It is done."""


class Alone(Group):
    """A group of one rank: what it receives is what it has."""

    def __init__(self) -> None:
        super().__init__("world", 0, 1, "cpu")

    def _all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Any:
        out.copy_(x.view(out.shape))
        return Done()

    _reduce_scatter = _all_gather

    def _all_reduce(self, x: torch.Tensor) -> Any:
        del x
        return Done()

    def _all_to_all(self, out: torch.Tensor, x: torch.Tensor, received: Sequence[int], sent: Sequence[int]) -> Any:
        del received, sent
        return self._all_gather(out, x)


def alone() -> Ranks:
    """Ranks of one."""
    return Ranks(Mesh(), Alone(), None, None, None)


H200 = replace(Platform.parse("cuda:9.0"), name="NVIDIA H200")

VALUE_CALLS: tuple[PublicCall, ...] = (
    # --- values
    PublicCall(
        "config.ParallelConfig",
        ParallelConfig,
        lambda: {"tp_size": 2, "dp_size": 2, "ep_size": 2},
        {
            **{f"{name}_size": IntKind(1) for name in ("tp", "dp", "ep")},
            **{f"{name}_rank": IntKind(0, 1) for name in ("tp", "dp", "ep")},
        },
    ),
    PublicCall(
        "config.MoEConfig",
        MoEConfig,
        lambda: {"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 32},
        {
            **{name: IntKind(1) for name in ("num_experts", "hidden_size", "intermediate_size")},
            "top_k": IntKind(1, 8),
            "dtype": DtypeKind(),
            **dict.fromkeys(("scheme", "activation", "activation_format"), ChoiceKind()),
            **dict.fromkeys(("apply_router_weight_on_input", "is_lora_enabled", "has_bias"), BoolKind()),
            "parallel": ObjectKind(),
            "expert_map": ObjectKind(optional=True),
        },
        (
            Bad("expert_map", "has another length", put(expert_map=(0, 1))),
            Bad("expert_map", "has a local id twice", put(expert_map=(0, 0, 1, 2, 3, 4, 5, 6))),
            Bad("tp_size", "does not divide I", put(parallel=ParallelConfig(tp_size=3))),
            Bad("ep_size", "is above E", put(parallel=ParallelConfig(ep_size=9))),
            Bad("block_shape", "is without a scheme", put(block_shape=(16, 16))),
            Bad("block_shape", "cuts the groups", put(scheme="int4_w4a16", block_shape=(0, 48))),
            Bad("apply_router_weight_on_input", "needs top_k 1", put(apply_router_weight_on_input=True)),
        ),
    ),
    PublicCall(
        "config.expect_block_shape",
        expect_block_shape,
        lambda: {"scheme": QuantScheme.FP8_W8A8, "block_shape": (16, 16)},
        {"block_shape": ObjectKind(optional=True)},
    ),
    PublicCall(
        "platform.Platform",
        Platform,
        lambda: {"vendor": platform.Vendor.NVIDIA, "capability": (9, 0), "name": "NVIDIA H200"},
        {
            "vendor": ObjectKind(),
            "capability": ObjectKind(),
            "num_sms": IntKind(0),
            "shared_memory": IntKind(0),
            "interpreted": BoolKind(),
        },
        (Bad("name", "is a number", put(name=3)),),
    ),
    PublicCall(
        "platform.Platform.parse",
        Platform.parse,
        lambda: {"text": "cuda:9.0"},
        {"text": TextKind(named="platform")},
        (
            Bad("platform", "has no capability", put(text="cuda")),
            Bad("platform", "has a capability that does not exist", put(text="cuda:1.0")),
            Bad("platform", "has a capability of thousands of digits", put(text="cuda:" + "9" * 5000 + ".0")),
            Bad("platform", "is of an unknown architecture", put(text="rocm:gfx1")),
        ),
    ),
    PublicCall(
        "platform.Platform.of",
        Platform.of,
        lambda: {"device": "cpu"},
        {"device": TextKind()},
        (Bad("device", "is one that nothing runs on", put(device="meta")),),
    ),
    PublicCall(
        "quantization.ExpertsQuantization",
        quantization.ExpertsQuantization,
        lambda: {"scheme": "fp8_w8a8", "w13_scale": torch.ones(E), "w2_scale": torch.ones(E)},
        {
            "scheme": ChoiceKind(),
            # Sizes and dtypes are checked where the weights are known.
            "w13_scale": ObjectKind(),
            "w2_scale": ObjectKind(),
            "per_act_token_quant": BoolKind(),
            "block_shape": ObjectKind(optional=True),
        },
    ),
    # --- the oracle
    PublicCall(
        "oracle.select.select_backend",
        select.select_backend,
        lambda: {"config": config(), "platform": H200, "available": available.every_kernel()},
        {
            "config": ObjectKind(),
            "platform": ObjectKind(),
            "available": MappingKind(),
            "request": ChoiceKind(optional=True, named="backend"),
        },
        (
            Bad("environment", "is a list", put(environment=["triton"])),
            Bad("MOEGATE_BACKEND", "is unknown", put(environment={"MOEGATE_BACKEND": "fastest"})),
            Bad("available", "holds booleans", put(available={"triton": True})),
        ),
    ),
    PublicCall(
        "oracle.select.parse_request",
        select.parse_request,
        lambda: {"request": "triton"},
        {"request": ChoiceKind(optional=True, named="backend")},
    ),
    PublicCall(
        "oracle.choose.choose_backend",
        choose.choose_backend,
        lambda: {"config": config(), "platform": Platform.of("cpu"), "request": "cpu"},
        {
            "config": ObjectKind(),
            "platform": ObjectKind(),
            "request": ChoiceKind(optional=True, named="backend"),
        },
    ),
    PublicCall(
        "oracle.available.installed_kernels",
        available.installed_kernels,
        lambda: {"config": config(), "platform": Platform.of("cpu")},
        {"config": ObjectKind(), "platform": ObjectKind()},
    ),
    PublicCall(
        "oracle.available.every_kernel",
        available.every_kernel,
        lambda: {"without": ["triton"]},
        {},
        (Bad("without", "is a number", put(without=3)), Bad("without", "holds an unknown name", put(without=["x"]))),
    ),
    PublicCall(
        "oracle.backends.experts_class",
        backends.experts_class,
        lambda: {"backend": backends.UnquantizedMoeBackend.TRITON},
        {"backend": ChoiceKind()},
        (Bad("backend", "has no experts here", put(backend=backends.UnquantizedMoeBackend.TPU)),),
    ),
    PublicCall(
        "overlap.auxiliary_stream",
        overlap.auxiliary_stream,
        lambda: {"device": torch.device("cpu")},
        {"device": ObjectKind()},
    ),
    # --- ranks
    PublicCall(
        "parallel.mesh.Mesh",
        Mesh,
        lambda: {"tp_size": 2, "dp_size": 2, "ep_size": 2},
        {name: IntKind(1) for name in ("tp_size", "dp_size", "ep_size")},
        (Bad("dp_size", "does not divide the ranks", put(dp_size=3)),),
    ),
    *(
        PublicCall(
            f"parallel.mesh.Mesh.{method}",
            lambda self, rank, method=method: getattr(self, method)(rank),
            lambda: {"self": Mesh(2, 2, 2), "rank": 3},
            {"rank": IntKind(0, 3)},
        )
        for method in ("ep_rank", "dp_rank", "place", "replicas", "shards", "data_peers")
    ),
    PublicCall(
        "parallel.placement.ExpertPlacement",
        placement.ExpertPlacement,
        lambda: {"num_experts": 4, "experts_of_rank": ((0, 1), (2, 3))},
        {"num_experts": IntKind(1, 4), "experts_of_rank": ObjectKind()},
        (
            Bad("experts_of_rank", "has no rank", put(experts_of_rank=())),
            Bad("experts_of_rank[0]", "has an expert twice", put(experts_of_rank=((0, 0, 1), (2, 3)))),
            Bad("experts_of_rank[1]", "has an expert above E", put(experts_of_rank=((0, 1), (2, 3, 4)))),
            Bad("experts_of_rank", "lacks one", put(experts_of_rank=((0, 1), (2,)))),
            Bad("experts_of_rank", "holds numbers", put(experts_of_rank=(0, 1, 2, 3))),
        ),
    ),
    *(
        PublicCall(
            f"parallel.placement.ExpertPlacement.{method}",
            lambda self, rank, method=method: getattr(self, method)(rank),
            lambda: {"self": placement.linear_placement(4, 2), "rank": 1},
            {"rank": IntKind(0, 1)},
        )
        for method in ("first_physical", "expert_map", "local_experts")
    ),
    PublicCall(
        "parallel.placement.ExpertPlacement.tables",
        lambda self, device: self.tables(device),
        lambda: {"self": placement.linear_placement(4, 2), "device": "cpu"},
        {"device": TextKind()},
    ),
    *(
        PublicCall(
            f"parallel.placement.{function.__name__}",
            function,
            lambda: {"num_experts": 8, "num_ranks": 2},
            {"num_experts": IntKind(1), "num_ranks": IntKind(1, 8)},
        )
        for function in (placement.linear_placement, placement.round_robin_placement)
    ),
    PublicCall(
        "parallel.placement.balanced_placement",
        placement.balanced_placement,
        lambda: {"load": [1.0, 2.0, 3.0, 4.0], "num_ranks": 2, "slots_per_rank": 3},
        {"load": SequenceKind(), "num_ranks": IntKind(1, 1 << 16), "slots_per_rank": IntKind(1, 4)},
        (
            Bad("load", "is negative", put(load=[1.0, -1.0, 1.0, 1.0])),
            Bad("load", "is NaN", put(load=[1.0, float("nan"), 1.0, 1.0])),
            Bad("load", "is infinite", put(load=[1.0, float("inf"), 1.0, 1.0])),
            Bad("load", "is empty", put(load=[])),
            Bad("slots_per_rank", "is too few", put(slots_per_rank=1)),
        ),
    ),
    PublicCall(
        "parallel.placement.choose_copies",
        placement.choose_copies,
        lambda: {
            "topk_ids": torch.zeros(M, K, dtype=torch.int32),
            "tables": placement.linear_placement(E, 2).tables("cpu"),
        },
        {"topk_ids": TensorKind(), "tables": ObjectKind(), "offset": IntKind(0)},
    ),
    PublicCall(
        "parallel.experts.ParallelExperts",
        ParallelExperts,
        lambda: {"ranks": alone(), "placement": placement.linear_placement(E, 1), "max_tokens": 8},
        {
            "ranks": ObjectKind(),
            "placement": ObjectKind(),
            "max_tokens": IntKind(1),
            "exchange": ChoiceKind(),
            "shared_part": ChoiceKind(),
            "overlap": BoolKind(),
            "own_first": BoolKind(),
            "expect_rows": BoolKind(),
            "activation_format": ChoiceKind(),
        },
        (
            Bad("placement", "is of more ranks", put(placement=placement.linear_placement(E, 2))),
            Bad("shared_part", "is a shard without replicas", put(shared_part="shard")),
            Bad("own_first", "is of slabs", put(own_first=True, activation_format="batched")),
        ),
    ),
    PublicCall(
        "parallel.ranks.connect",
        connect,
        lambda: {"mesh": Mesh()},
        {"mesh": ObjectKind(), "group": ObjectKind(optional=True)},
        (Bad("group", "is not initialised", put(group=None)),),
        needs="an initialised process group",
    ),
    # --- shared experts
    PublicCall(
        "shared_experts.SharedExpertsSetting",
        shared_experts.SharedExpertsSetting,
        dict,
        {
            **dict.fromkeys(
                ("has_shared_experts", "uses_eplb", "fully_sharded_lora", "dispatch_runs_shared_experts"), BoolKind()
            ),
            "uses_external_experts": BoolKind(),
            "all_to_all": ChoiceKind(optional=True),
        },
    ),
    PublicCall(
        "shared_experts.shared_experts_order",
        shared_experts.shared_experts_order,
        lambda: {
            "setting": shared_experts.SharedExpertsSetting(),
            "platform": H200,
            "has_auxiliary_stream": True,
            "num_tokens": 4,
        },
        {
            "setting": ObjectKind(),
            "platform": ObjectKind(),
            "has_auxiliary_stream": BoolKind(),
            "num_tokens": IntKind(0),
        },
    ),
)
