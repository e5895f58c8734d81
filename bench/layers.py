"""Whole layers of real models, with their router and shared experts: what is timed where two streams are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..impl.experts_module import RoutedExperts, SharedExperts
from ..impl.layer import Gate, MoELayer, RoutingMethod
from .floor import expert_bytes
from .formats import FORMATS, Format
from .operands import LayerWeights, WeightBank
from .workloads import MODELS, Model, Workload


@dataclass(frozen=True)
class LayerModel:
    """One layer of a model, as one rank holds it.

    Attributes:
        routed: its routed experts.
        dtype: how routed and shared experts are stored, a key of `FORMATS`.
        routing: how it routes.
        shared_size: I of the shared experts of one rank.
        shared_is_gated: a sigmoid gate multiplies their output.
        router_dtype: in which the logits of router and shared gate are computed.
        has_correction_bias: a bias ranks the experts.
    """

    routed: Model
    dtype: str
    routing: RoutingMethod
    shared_size: int
    shared_is_gated: bool = False
    router_dtype: torch.dtype = torch.bfloat16
    has_correction_bias: bool = False

    @property
    def name(self) -> str:
        """The routed experts' name."""
        return self.routed.name

    @property
    def format(self) -> Format:
        """How experts are stored."""
        return FORMATS[self.dtype]

    @cached_property
    def shared(self) -> Model:
        """The shared experts, as one expert to which every token goes."""
        routed = self.routed
        return replace(
            routed,
            name=f"{routed.name}-shared",
            num_experts=1,
            top_k=1,
            num_local_experts=None,
            intermediate_size=self.shared_size,
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert."""
        return expert_bytes(Workload(self.routed, 1, dtype=self.dtype))

    @property
    def shared_bytes(self) -> int:
        """Bytes of the shared experts, with their gate."""
        gate = self.routed.hidden_size * self.router_dtype.itemsize if self.shared_is_gated else 0
        return expert_bytes(Workload(self.shared, 1, dtype=self.dtype)) + gate

    @property
    def router_bytes(self) -> int:
        """Bytes of the router's weight."""
        return self.routed.num_experts * self.routed.hidden_size * self.router_dtype.itemsize

    def bytes_of_call(self, num_tokens: int, distinct_experts: float) -> float:
        """Bytes that one call must move: weights once, each token read by both parts, and the output."""
        activations = 3 * num_tokens * self.routed.hidden_size * self.format.activations.itemsize
        return distinct_experts * self.expert_bytes + self.router_bytes + self.shared_bytes + activations


LAYERS = {
    layer.name: layer
    for layer in (
        # n_shared_experts 1 of moe_intermediate_size 2048, over 8 ranks as the routed ones.
        LayerModel(
            MODELS["deepseek-v3-tp8"],
            "fp8-block",
            RoutingMethod(8, "sigmoid", True, num_expert_group=8, topk_group=4, routed_scaling_factor=2.5),
            shared_size=256,
            router_dtype=torch.float32,
            has_correction_bias=True,
        ),
        # shared_expert_intermediate_size 512.
        LayerModel(MODELS["qwen3.5-35b-a3b"], "bf16", RoutingMethod(8), shared_size=512, shared_is_gated=True),
        # moe_intermediate_size 2560 and shared_expert_intermediate_size 20480 over 4 ranks; norm_topk_prob is false.
        LayerModel(
            Model("qwen2-57b-a14b-tp4", 64, 8, 3584, 640, "Hugging Face Qwen/Qwen2-57B-A14B config.json over 4 ranks"),
            "bf16",
            RoutingMethod(8, renormalize=False),
            shared_size=5120,
            shared_is_gated=True,
        ),
    )
}


def find_layer(name: str) -> LayerModel:
    """The layer of this name.

    Raises:
        ValueError: an unknown name, with those that are.
    """
    if name not in LAYERS:
        raise ValueError(f"models: expected some of {', '.join(LAYERS)} with --overlap, got {name!r}")
    return LAYERS[name]


class LayerBank:
    """Copies of one layer's weights on one device, made when first asked for; routed and shared ones apart."""

    def __init__(self, model: LayerModel, device: torch.device) -> None:
        self.model, self.device = model, device
        self.routed = WeightBank(model.routed, model.format, device)
        self._shared = WeightBank(model.shared, model.format, device)
        self._gates: list[tuple[Gate, torch.Tensor | None]] = []

    def gate(self, index: int) -> Gate:
        """A router of its own for each index."""
        return self._routers(index)[0]

    def layer(self, routed_copy: int, shared_copy: int) -> MoELayer:
        """A layer of a copy of the routed experts and one of router and shared experts."""
        gate, _ = self._routers(shared_copy)
        experts = RoutedExperts(**self._options(self.routed.copy(routed_copy)))
        shared = self.shared(shared_copy)
        return MoELayer(gate, experts, self.model.routing, shared_experts=shared)

    def routed_alone(self, routed_copy: int, shared_copy: int) -> MoELayer:
        """The same layer without its shared experts."""
        experts = RoutedExperts(**self._options(self.routed.copy(routed_copy)))
        return MoELayer(self.gate(shared_copy), experts, self.model.routing)

    def shared(self, shared_copy: int) -> SharedExperts:
        """The shared experts of a copy."""
        options = self._options(self._shared.copy(shared_copy))
        w13, w2 = options.pop("w13")[0], options.pop("w2")[0]
        return SharedExperts(w13, w2, gate=self._routers(shared_copy)[1], **options)

    def _options(self, weights: LayerWeights) -> dict:
        model = self.model
        return {**vars(weights), "dtype": model.format.activations, "activation": model.routed.activation}

    def _routers(self, index: int) -> tuple[Gate, torch.Tensor | None]:
        model = self.model
        num_experts, hidden_size = model.routed.num_experts, model.routed.hidden_size
        while len(self._gates) <= index:
            generator = torch.Generator(self.device).manual_seed(5000 + len(self._gates))

            def normal(*shape: int, std: float, dtype: torch.dtype, generator: torch.Generator = generator):
                return torch.empty(shape, dtype=dtype, device=self.device).normal_(std=std, generator=generator)

            # Logits of a variance near one: experts are chosen about evenly.
            weight = normal(num_experts, hidden_size, std=1 / math.sqrt(hidden_size), dtype=model.router_dtype)
            bias, shared_gate = None, None
            if model.has_correction_bias:
                bias = normal(num_experts, std=0.01, dtype=torch.float32)
            if model.shared_is_gated:
                shared_gate = normal(1, hidden_size, std=1 / math.sqrt(hidden_size), dtype=model.router_dtype)
            self._gates.append((Gate(weight, e_score_correction_bias=bias), shared_gate))
        return self._gates[index]


def hidden_states_of(model: LayerModel, num_tokens: int, call: int, device: torch.device) -> torch.Tensor:
    """`[M, H]` of one call of a rotation."""
    generator = torch.Generator(device).manual_seed(call)
    shape = (num_tokens, model.routed.hidden_size)
    return torch.empty(shape, dtype=model.format.activations, device=device).normal_(generator=generator)


def choose_layers(names: Sequence[str] | None = None) -> list[LayerModel]:
    """The layers of these names; all of them without any."""
    return list(LAYERS.values()) if names is None else [find_layer(name) for name in names]
