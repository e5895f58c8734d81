"""Hugging Face transformers' experts and routers, as its models call them; imported when a run asks for them.

A variant is a model and the way in which its experts are computed (`config._experts_implementation`): expert by expert
(`eager`), or by grouped matrix products (`grouped_mm`). Each model is a class here, since each has capabilities of its
own.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cases import ExpertsCase, LayerCase, RoutingCase
from ..numerics import Numerics
from ..spec import ROUTINGS
from ..subject import Capabilities, Subject

_IMPLEMENTATIONS = ("eager", "grouped_mm")
_HIDDEN_ACT = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# Their one_hot takes no id of -1.
_VALID = tuple(routing for routing in ROUTINGS if not routing.endswith("invalid"))


def _class_of(model: str, prefix: str, name: str) -> type[nn.Module]:
    return getattr(import_module(f"transformers.models.{model}.modeling_{model}"), f"{prefix}{name}")


class TransformersSubject(Subject):
    """`Qwen3MoeExperts`, whose twins are in most models, and `Qwen3MoeTopKRouter`."""

    name = "transformers"
    variants = _IMPLEMENTATIONS
    last_run = "transformers 5.24.0, CPU, 2026-11-28"
    # The router ranks by softmax, where far lower logits all become 0, and torch.topk promises no order of ties; of a
    # row without a finite logit it makes NaN.
    capabilities = Capabilities(
        routings=_VALID,
        maps=("none",),
        logits=("unit", "negative"),
        activations=tuple(_HIDDEN_ACT),
        weight_on_input=False,
        padded_rows=False,
        hidden_multiple=8,
        intermediate_multiple=8,
    )
    numerics = Numerics(
        gate="storage",
        expert_output="storage",
        weighted="storage",
        combine="storage",
        routing_weight="storage",
    )
    deviations: ClassVar[dict[str, str]] = {
        "gate": "activations return the storage dtype",
        "expert_output": "linear layers return the storage dtype",
        "combine": "index_add_ adds in the storage dtype",
        "routing_weight": "routers return weights in the storage dtype, by which the blocks multiply",
    }
    # The names of the model's classes, and its config's of E and I.
    model: ClassVar[tuple[str, str]] = ("qwen3_moe", "Qwen3Moe")
    router: ClassVar[str] = "TopKRouter"
    sizes: ClassVar[tuple[str, str]] = ("num_experts", "moe_intermediate_size")

    def _config(self, num_experts: int, hidden: int, intermediate: int, **more: Any) -> Any:
        import transformers

        names = dict(zip(self.sizes, (num_experts, intermediate), strict=True))
        config = getattr(transformers, f"{self.model[1]}Config")
        return config(num_hidden_layers=1, vocab_size=16, hidden_size=hidden, **names, **more)

    def prepare(self, case: LayerCase, variant: str) -> nn.Module:
        """The model's experts module with the case's weights."""
        num_experts, hidden, intermediate = case.w2.shape
        config = self._config(num_experts, hidden, intermediate, **self._activation(case))
        config._experts_implementation = variant
        with torch.device("meta"):
            module = _class_of(*self.model, "Experts")(config)
        for name, weight in self._weights(case).items():
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
        return module.eval()

    def _activation(self, case: LayerCase) -> dict[str, Any]:
        return {"hidden_act": _HIDDEN_ACT[case.activation.name]}

    def _weights(self, case: LayerCase) -> dict[str, Tensor]:
        return {"gate_up_proj": case.w13, "down_proj": case.w2}

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """The experts module, with routing weights in the activations' dtype, as its router returns them."""
        x = case.hidden_states
        with torch.no_grad():
            return case.prepared(x, case.topk_ids.long(), case.topk_weights.to(x.dtype))

    def _router(self, case: RoutingCase, **more: Any) -> nn.Module:
        """The model's router, whose linear layer is the identity: it sees the case's logits as they are."""
        num_experts, device = case.router_logits.shape[1], case.router_logits.device
        config = self._config(num_experts, num_experts, 16, num_experts_per_tok=case.top_k, **more)
        router = _class_of(*self.model, self.router)(config).to(device)
        router.weight = nn.Parameter(torch.eye(num_experts, device=device), requires_grad=False)
        return router

    def route(self, case: RoutingCase, variant: str) -> tuple[Tensor, Tensor]:
        """The model's router in float32."""
        router = self._router(case, norm_topk_prob=case.renormalize)
        with torch.no_grad():
            _, weights, ids = router(case.router_logits.float())
        return weights, ids.int()


class DeepseekV3Subject(TransformersSubject):
    """`DeepseekV3TopkRouter`: sigmoid scores, groups by the sum of their best two, and a correction bias."""

    name = "transformers:deepseek_v3"
    variants = ("eager",)
    model = ("deepseek_v3", "DeepseekV3")
    router = "TopkRouter"
    sizes = ("n_routed_experts", "moe_intermediate_size")
    capabilities = Capabilities(
        logits=("unit",),
        scorings=("sigmoid",),
        groups=("some", "one_kept", "all_kept", "one_group"),
        group_rankings=("top2_sum",),
        correction_biases=("unit", "negative"),
        scalings=("one", "above_one", "below_one"),
        padded_rows=False,
        min_experts=2,  # a group is worth its best two
    )

    def facets(self, variant: str) -> tuple[str, ...]:
        """Its experts are those of Qwen3-MoE."""
        return ("route",)

    def route(self, case: RoutingCase, variant: str) -> tuple[Tensor, Tensor]:
        """The model's router, whose choice is sorted: it returns experts in no order."""
        groups = {"n_group": case.num_expert_group or 1, "topk_group": case.topk_group or 1}
        scaling = {"routed_scaling_factor": case.routed_scaling_factor}
        router = self._router(case, norm_topk_prob=case.renormalize, **groups, **scaling)
        if case.e_score_correction_bias is not None:
            router.e_score_correction_bias = case.e_score_correction_bias
        with torch.no_grad():
            logits, weights, ids = router(case.router_logits.float())
        by_id = ids.argsort(dim=1)
        weights, ids = weights.gather(1, by_id), ids.gather(1, by_id)
        ranking = logits.sigmoid() + router.e_score_correction_bias
        order = ranking.gather(1, ids).argsort(dim=1, descending=True, stable=True)
        return weights.gather(1, order), ids.gather(1, order).int()


class GptOssSubject(TransformersSubject):
    """`GptOssExperts`: biases, gate and up rows in turn, and a clamped SwiGLU."""

    name = "transformers:gpt_oss"
    model = ("gpt_oss", "GptOss")
    sizes = ("num_local_experts", "intermediate_size")
    # Its SwiGLU is five operations, each of which rounds to the storage dtype; one rounding can be declared.
    capabilities = Capabilities(
        dtypes=("float32",),
        routings=_VALID,
        maps=("none",),
        activations=("swigluoai_interleaved",),
        biases=("both",),
        weight_on_input=False,
        padded_rows=False,
        hidden_multiple=8,
        intermediate_multiple=8,
    )

    def facets(self, variant: str) -> tuple[str, ...]:
        """Its router renormalises whatever is asked."""
        return ("experts",)

    def _activation(self, case: LayerCase) -> dict[str, Any]:
        return {"swiglu_alpha": case.activation.alpha, "swiglu_limit": case.activation.limit}

    def _weights(self, case: LayerCase) -> dict[str, Tensor]:
        """As its checkpoints hold them: input channels first."""
        if case.w13_bias is None or case.w2_bias is None:
            raise ValueError("biases: expected both, got a case without one")
        weights = {"gate_up_proj": case.w13.transpose(1, 2), "down_proj": case.w2.transpose(1, 2)}
        return weights | {"gate_up_proj_bias": case.w13_bias, "down_proj_bias": case.w2_bias}
