"""Hugging Face's MoE blocks, which nobody here wrote, judge the layer: the same checkpoint, the same output.

transformers writes the checkpoint, by the names that public ones have, and computes its block in float64. The layer is
loaded from that file and may be off by its derived budget: of the experts, of the shared experts, and of the routing
weights, which both compute in float32.
"""

import json
from dataclasses import dataclass

import pytest
import torch

from moegate.conformance.budget import experts_budget
from moegate.conformance.calibration import limits
from moegate.conformance.numerics import FLOAT32, Format, Numerics
from moegate.conformance.operands import ExpertsOperands
from moegate.conformance.rounding import accumulation, rounding
from moegate.conformance.routing_budget import EXP_ROUNDOFFS, score_error, weight_error
from moegate.conformance.values import on_grid
from moegate.impl.checkpoint import load_layer
from moegate.impl.config import ParallelConfig
from moegate.reference.activations import Activation
from moegate.reference.routing import route, scores_of

transformers = pytest.importorskip("transformers", reason="transformers is a tool of development")

H, I, M = 64, 32, 19
COMMON = {"hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 16, "intermediate_size": I}
MOE = {"num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 16}
MODELS = {
    "mixtral": ("Mixtral", "MixtralSparseMoeBlock", {"num_local_experts": 8, **MOE}),
    "qwen2_moe": (
        "Qwen2Moe",
        "Qwen2MoeSparseMoeBlock",
        {"num_experts": 8, "moe_intermediate_size": I, "shared_expert_intermediate_size": 48, **MOE},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        "Qwen3MoeSparseMoeBlock",
        {"num_experts": 8, "moe_intermediate_size": I, "norm_topk_prob": True, **MOE},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        "DeepseekV3MoE",
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": I,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 0,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "gpt_oss": ("GptOss", "GptOssMLP", {"num_local_experts": 8, **MOE}),
}


@dataclass
class Model:
    """A checkpoint, and its block in float64."""

    name: str
    folder: object
    config: dict
    block: torch.nn.Module
    dtype: torch.dtype

    def answer(self, x):
        """The block's output, `[M, H]` float64."""
        with torch.no_grad():
            output = self.block(x.double()[None])
        return (output[0] if isinstance(output, tuple) else output)[0]

    def loaded(self, **options):
        """The layer, its router in float32."""
        return load_layer(self.folder, self.config, dtype=self.dtype, router_dtype=torch.float32, **options)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def dtype(request):
    return getattr(torch, request.param)


@pytest.fixture(scope="module", params=MODELS)
def model(request, dtype, tmp_path_factory):
    return _made(request.param, dtype, tmp_path_factory.mktemp(request.param))


def _made(name, dtype, folder):
    family, block_class, sizes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**COMMON, **sizes)
    config._experts_implementation = "eager"
    whole = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    block = whole.model.layers[0].mlp
    assert type(block).__name__ == block_class
    with torch.no_grad():
        for entry, tensor in block.state_dict().items():
            # As large as trained weights, and biases that matter.
            is_bias = "bias" in entry
            fan_in = tensor.shape[-2] if name == "gpt_oss" and tensor.ndim == 3 else tensor.shape[-1]
            exponent = 0 if is_bias else 2 - (fan_in.bit_length() - 1) // 2
            tensor.copy_(on_grid(3, entry, tuple(tensor.shape), dtype, exponent=exponent))
    whole.save_pretrained(folder)
    return Model(name, folder, json.loads((folder / "config.json").read_text()), block.double(), dtype)


@pytest.fixture
def x(dtype):
    return on_grid(5, "x", (M, H), dtype, exponent=1)


def _routing_error(layer, x, ids):
    """Variance of routing weights `[M, top_k]` that are computed in float32 from float32 logits."""
    u, routing = FLOAT32.unit_roundoff, layer.routing
    weight = layer.gate.weight.double()
    logits = x.double() @ weight.T
    of_logits = accumulation(H, logits, x.double() ** 2 @ (weight**2).T, u)
    if layer.gate.bias is not None:
        logits = logits + layer.gate.bias.double()
        of_logits = of_logits + (u * logits) ** 2
    scores = scores_of(logits, routing.scoring_func)
    # No score moves faster than itself with its own logit, and a softmax's with the sum of the others.
    moved = of_logits.sqrt() + (scores**2 * of_logits).sum(dim=1, keepdim=True).sqrt()
    of_scores = (score_error(logits, scores, routing.scoring_func) ** 2 + (scores * moved) ** 2).sqrt()
    error = weight_error(
        scores.gather(1, ids),
        of_scores.gather(1, ids),
        renormalize=routing.renormalize,
        routed_scaling_factor=routing.routed_scaling_factor,
    )
    return error**2


def _routed(layer, x):
    """The float64 routing of a layer's own parameters."""
    routing = layer.routing
    logits = x.double() @ layer.gate.weight.double().T
    if layer.gate.bias is not None:
        logits = logits + layer.gate.bias.double()
    grouped = {}
    if routing.num_expert_group is not None:
        ranking = "max" if layer.gate.e_score_correction_bias is None else "top2_sum"
        grouped = {"num_expert_group": routing.num_expert_group, "topk_group": routing.topk_group}
        grouped["group_ranking"] = ranking
    return route(
        logits,
        routing.top_k,
        scoring_func=routing.scoring_func,
        renormalize=routing.renormalize,
        e_score_correction_bias=layer.gate.e_score_correction_bias,
        routed_scaling_factor=routing.routed_scaling_factor,
        **grouped,
    )


def _operands(experts, x, weights, ids):
    function = experts.function
    return ExpertsOperands(
        x,
        experts.w13,
        experts.w2,
        weights,
        ids,
        w13_bias=experts.w13_bias,
        w2_bias=experts.w2_bias,
        activation=Activation(str(function.kind), alpha=function.alpha, limit=function.limit),
    )


def used_budget(layer, x, output, expected, partial=()):
    """The largest error over its bound, of an output against the judge's.

    Args:
        layer: whole, whose parameters the bound follows.
        x: `[M, H]`.
        output: `[M, H]`.
        expected: `[M, H]` float64.
        partial: the outputs of ranks that were summed, each rounded once more.
    """
    numerics, storage = Numerics(), Format.of(x.dtype)
    weights, ids = _routed(layer, x)
    call = _operands(layer.experts, x, weights, ids)
    trace = call.trace()
    budget = experts_budget(trace, call, numerics)
    variance = budget.sigma**2 + budget.last**2
    # Both sides route in float32.
    of_weights = _routing_error(layer, x, ids.long())
    variance = variance + 2 * (of_weights[..., None] * trace.expert_output**2).sum(dim=1)
    if layer.shared_experts is not None:
        shared = layer.shared_experts
        gate = torch.ones(len(x), 1, dtype=torch.float64)
        of_gate = torch.zeros_like(gate)
        if shared.gate is not None:
            w, u = shared.gate.double(), FLOAT32.unit_roundoff
            logit = x.double() @ w.T
            gate = torch.sigmoid(logit)
            of_logit = accumulation(H, logit, x.double() ** 2 @ (w**2).T, u) + (u * logit) ** 2
            of_gate = ((1 - gate) ** 2 * of_logit + (u * EXP_ROUNDOFFS) ** 2) * gate**2
        call = _operands(shared.expert, x, gate, torch.zeros(len(x), 1, dtype=torch.int32))
        trace = call.trace()
        budget = experts_budget(trace, call, numerics)
        variance = variance + budget.sigma**2 + budget.last**2 + of_gate * trace.expert_output[:, 0] ** 2
    for part in partial:
        variance = variance + 2 * rounding(part.double(), storage)
    last = rounding(expected, storage).sqrt()
    beyond = ((output.double() - expected).abs() - last).clamp(min=0)
    return float((beyond / variance.sqrt()).max()) / limits().elementwise


def test_the_layer_is_the_block(model, x):
    layer = model.loaded()
    expected = model.answer(x)
    used = used_budget(layer, x, layer(x), expected)
    assert used <= 1
    assert used > 0.05, "a budget that nobody comes near judges nothing"


def _swapped(layer):
    gate, up = layer.experts.w13.clone().chunk(2, dim=1)
    layer.experts.w13.copy_(torch.cat([up, gate], dim=1))


def _one_expert_off(layer):
    layer.experts.w2[1] *= 1.1


def _without_shared(layer):
    if layer.shared_experts is not None:
        layer.shared_experts.expert.w2.zero_()
    else:
        layer.experts.w2.zero_()


def _other_routing(layer):
    layer.gate.weight.copy_(layer.gate.weight.roll(1, 0))


@pytest.mark.parametrize("wrong", [_swapped, _one_expert_off, _without_shared, _other_routing])
def test_a_layer_that_was_loaded_wrong_is_not_the_block(model, x, wrong):
    right, layer = model.loaded(), model.loaded()
    wrong(layer)
    assert used_budget(right, x, layer(x), model.answer(x)) > 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_shards_add_up_to_the_block(model, x, ranks):
    partial = []
    for rank in range(ranks):
        shard = model.loaded(parallel=ParallelConfig(tp_size=ranks, tp_rank=rank))
        assert shard.experts.intermediate_size == I // ranks
        partial.append(shard(x))
    output = sum(part.float() for part in partial).to(x.dtype)
    assert used_budget(model.loaded(), x, output, model.answer(x), partial) <= 1


def test_expert_parallel_ranks_add_up_to_the_block_and_their_shared_output_once(model, x):
    routed, reduced = [], []
    for total in (None, lambda: sum(part.float() for part in routed).to(x.dtype)):
        for rank in range(3):  # 8 experts: 3, 3 and 2
            layer = model.loaded(parallel=ParallelConfig(ep_size=3, ep_rank=rank), prepare=False)
            if total is None:
                layer.reduce = lambda mine: routed.append(mine.clone()) or mine
                layer(x)
            else:
                layer.reduce = lambda mine, total=total: total()
                reduced.append(layer(x))
    whole, expected = model.loaded(), model.answer(x)
    for output in reduced:
        assert used_budget(whole, x, output, expected, routed) <= 1


def test_the_block_s_own_stacked_state_dict_loads_as_the_checkpoint_does(model, x):
    stacked = {name: tensor.to(model.dtype) for name, tensor in model.block.state_dict().items()}
    from_block = load_layer(stacked, model.config, prefix="", dtype=model.dtype, router_dtype=torch.float32)
    assert torch.equal(from_block(x), model.loaded()(x))


def test_mxfp4_blocks_are_the_numbers_that_transformers_unpacks(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from moegate.impl.mxfp4 import dequantize_mxfp4

    blocks = torch.arange(256, dtype=torch.uint8).view(2, 4, 2, 16)
    scales = torch.randint(100, 150, (2, 4, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = dequantize_mxfp4(blocks, scales, torch.bfloat16)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(ours, theirs.transpose(1, 2))
