"""The adapters of engines hand over what these engines' functions take: stand-ins of these compute with it.

A stand-in has the signature and the conventions of the real function, as its project documents them.
"""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moegate.conformance.cases import build_align, build_experts, build_routing
from moegate.conformance.operands import ExpertsOperands
from moegate.conformance.properties.align import judge_alignment
from moegate.conformance.properties.num import budget_of, judge_values, reference_of
from moegate.conformance.properties.route import judge_routing
from moegate.conformance.spec import AlignSpec, ExpertsSpec, RoutingSpec
from moegate.conformance.subjects.eager import EagerSubject
from moegate.conformance.subjects.flashinfer_experts import FlashinferSubject
from moegate.conformance.subjects.sglang_experts import SglangSubject
from moegate.conformance.subjects.vllm_experts import VllmSubject
from moegate.reference.alignment import pairs_of_each_expert
from moegate.reference.quantization import ActivationQuantization, QuantizedWeight
from moegate.reference.routing import route

PLAIN = ExpertsSpec(M=19, H=128, I=128, E=5, top_k=2)
BLOCKS = replace(PLAIN, scheme="fp8_block", block_n=32, block_k=32)


@pytest.fixture
def module(monkeypatch):
    """Makes a module of an engine, its parents included, out of named values."""

    def make(name, **values):
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            path = ".".join(parts[:count])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
        vars(sys.modules[name]).update(values)

    return make


def computed(x, w13, w2, weights, ids, scales=None, block_shape=None, **more):
    """What an engine gives: the float64 layer in the activations' dtype."""
    quantize = None
    if scales is not None:
        w13 = QuantizedWeight(w13, scales[0], None, tuple(block_shape), 2)
        w2 = QuantizedWeight(w2, scales[1], None, tuple(block_shape))
        quantize = ActivationQuantization(torch.float8_e4m3fn, "group", group=block_shape[1])
    call = ExpertsOperands(x, w13, w2, weights, ids, quantize_input=quantize, quantize_hidden=quantize, **more)
    return call.trace().output.to(x.dtype)


def judged(subject, spec):
    """The verdicts on the subject's output for a spec."""
    case = build_experts(spec)
    trace = reference_of(case)
    case = replace(case, prepared=subject.prepare(case, subject.variants[0]))
    output = subject.experts(case, subject.variants[0])
    return judge_values(case, output, trace, budget_of(case, trace, subject.numerics))


@pytest.fixture
def vllm(module):
    name = "vllm.model_executor.layers.fused_moe"

    def fused_experts(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        inplace=False,
        activation="silu",
        apply_router_weight_on_input=False,
        global_num_experts=-1,
        expert_map=None,
        quant_config=None,
    ):
        assert not inplace
        assert global_num_experts == (len(w1) if expert_map is None else len(expert_map))
        stored = {} if quant_config is None else vars(quant_config)
        return computed(
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            **stored,
        )

    def fused_topk(hidden_states, gating_output, topk, renormalize, indices_type=None):
        assert len(hidden_states) == len(gating_output)
        weights, ids = route(gating_output, topk, renormalize=renormalize)
        return weights.float(), ids.long(), torch.zeros(ids.shape)

    def quant_config(w1_scale, w2_scale, a1_scale=None, a2_scale=None, block_shape=None):
        return SimpleNamespace(scales=(w1_scale, w2_scale), block_shape=block_shape)

    def align(topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False, ignore_invalid_experts=False):
        local = num_experts if expert_map is None else int(expert_map.max()) + 1
        rows, owners = [], []
        for expert, pairs in enumerate(pairs_of_each_expert(topk_ids, local, expert_map)):
            padding = -len(pairs) % block_size
            rows += [*pairs.tolist(), *([topk_ids.numel()] * padding)]
            owners += [expert] * ((len(pairs) + padding) // block_size)
        return tuple(torch.tensor(values, dtype=torch.int32) for values in (rows, owners, [len(rows)]))

    module(name, fused_experts=fused_experts, fused_topk=fused_topk)
    module(f"{name}.config", fp8_w8a8_moe_quant_config=quant_config)
    module(f"{name}.moe_align_block_size", moe_align_block_size=align)
    return VllmSubject()


@pytest.fixture
def sglang(module):
    def fused_experts(
        hidden_states,
        w1,
        w2,
        topk_output,
        moe_runner_config,
        b1=None,
        b2=None,
        use_fp8_w8a8=False,
        w1_scale=None,
        w2_scale=None,
        block_shape=None,
    ):
        assert not moe_runner_config.inplace
        assert moe_runner_config.num_experts == moe_runner_config.num_local_experts == len(w1)
        on_input = moe_runner_config.apply_router_weight_on_input
        weights, ids, _ = topk_output
        scales = (w1_scale, w2_scale) if use_fp8_w8a8 else None
        more = {"apply_router_weight_on_input": on_input}
        return computed(hidden_states, w1, w2, weights, ids, scales, block_shape, **more)

    published = []
    arguments = {"ServerArgs": SimpleNamespace, "set_global_server_args_for_scheduler": published.append}
    module("sglang.srt.server_args", **arguments)
    module("sglang.srt.layers.moe.fused_moe_triton", fused_experts=fused_experts)
    module("sglang.srt.layers.moe.topk", StandardTopKOutput=lambda *parts: parts)
    module("sglang.srt.layers.moe.moe_runner", MoeRunnerConfig=SimpleNamespace)
    return SglangSubject()


@pytest.fixture
def flashinfer(module):
    def cutlass_fused_moe(
        input,
        token_selected_experts,
        token_final_scales,
        fc1_expert_weights,
        fc2_expert_weights,
        output_dtype,
        quant_scales,
        *,
        activation_type,
        use_fused_finalize=True,
    ):
        assert (quant_scales, activation_type, use_fused_finalize) == ([], "Swiglu", False)
        up, gate = fc1_expert_weights.chunk(2, dim=1)
        w13 = torch.cat((gate, up), dim=1)
        return [computed(input, w13, fc2_expert_weights, token_final_scales, token_selected_experts).to(output_dtype)]

    kinds = SimpleNamespace(Swiglu="Swiglu")
    module("flashinfer.fused_moe", cutlass_fused_moe=cutlass_fused_moe, ActivationType=kinds)
    return FlashinferSubject()


@pytest.mark.parametrize(
    ("engine", "spec"),
    [
        ("vllm", PLAIN),
        ("vllm", BLOCKS),
        ("vllm", replace(PLAIN, expert_map="linear")),
        ("vllm", replace(PLAIN, top_k=1, weight_on_input=True)),
        ("sglang", PLAIN),
        ("sglang", BLOCKS),
        ("sglang", replace(PLAIN, top_k=1, weight_on_input=True)),
        ("flashinfer", PLAIN),
    ],
    ids=str,
)
def test_an_engine_that_computes_right_is_found_right(engine, spec, request):
    verdicts = judged(request.getfixturevalue(engine), spec)
    assert verdicts
    assert all(verdict.holds for verdict in verdicts), [v.detail for v in verdicts if not v.holds]


def test_vllms_routing_and_alignment_are_asked_as_they_are(vllm):
    case = build_routing(RoutingSpec(M=7, E=8, top_k=3, renormalize=False))
    assert all(verdict.holds for verdict in judge_routing(case, *vllm.route(case, "triton")))
    align = build_align(AlignSpec(M=33, E=5, top_k=2, expert_map="linear"))
    assert all(verdict.holds for verdict in judge_alignment(align, *vllm.align(align, "triton")))


def test_the_engines_run_on_a_gpu_alone():
    for subject in (VllmSubject(), SglangSubject(), FlashinferSubject()):
        assert "not cpu" in str(subject.unavailable(subject.variants[0], "cpu"))
    assert EagerSubject().unavailable("default", "cpu") is None
