"""A workload's identity and its routings."""

import itertools

import numpy as np
import pytest
import torch

from moegate.bench.formats import FORMATS, find_format
from moegate.bench.selection import select_workloads
from moegate.bench.workloads import MODELS, SMALL_MODELS, TOKEN_COUNTS, Model, Routing, Workload, find_model
from moegate.impl.config import Activation

QWEN = MODELS["qwen3-30b-a3b"]
ROUTINGS = ("uniform", "zipf1.2", "all-to-one")


def test_ids_are_unique_over_models_tokens_routings_seeds_dtypes_and_cache_states():
    workloads = [
        Workload(model, tokens, Routing.parse(routing + seed), dtype, cache)
        for model, tokens, routing, seed, dtype, cache in itertools.product(
            [*MODELS.values(), *SMALL_MODELS.values()],
            (1, 64),
            ROUTINGS,
            ("", "-s7"),
            ("bf16", "fp32"),
            ("cold", "warm"),
        )
    ]
    assert len({workload.id for workload in workloads}) == len(workloads)


def test_ids_are_the_same_everywhere_and_for_ever():
    # The hash in the middle is of the routing itself: a change here silently breaks every stored history.
    assert [Workload(QWEN, 64, Routing.parse(routing)).id for routing in ROUTINGS] == [
        "qwen3-30b-a3b-E128k8H2048I768-silu-bf16-M64-uniform-s0-e28c08f8-cold",
        "qwen3-30b-a3b-E128k8H2048I768-silu-bf16-M64-zipf1.2-s0-a5a518a2-cold",
        "qwen3-30b-a3b-E128k8H2048I768-silu-bf16-M64-all-to-one-s0-a077e578-cold",
    ]
    assert Workload(MODELS["minimax-m2.5-ep4"], 1).id.startswith("minimax-m2.5-ep4-E64of256k8H3072I1536-silu-bf16-M1-")


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_token_chooses_distinct_experts_in_range(name, routing):
    model = MODELS[name]
    for tokens, rotation in itertools.product((1, 33), (0, 3)):
        workload = Workload(model, tokens, Routing.parse(routing))
        ids = workload.topk_ids(rotation)
        assert ids.shape == (tokens, model.top_k)
        assert ids.dtype == np.int32
        assert ids.min() >= 0
        assert ids.max() < model.num_experts
        assert all(len(set(row)) == model.top_k for row in ids.tolist())
        weights = workload.topk_weights(rotation)
        assert weights.dtype == np.float32
        assert weights.min() > 0
        assert np.allclose(weights.sum(axis=1), 1)


def test_uniform_routing_is_uniform():
    counts = Workload(QWEN, 16384).rows_by_local_expert()
    mean = 16384 * 8 / 128
    # Each count is binomial: none of 128 is 5 standard deviations away, and their spread is as wide as it should be.
    deviation = (mean * (1 - 8 / 128)) ** 0.5
    assert np.abs(counts - mean).max() < 5 * deviation
    assert 0.8 * deviation < counts.std() < 1.2 * deviation


def test_zipf_routing_follows_its_exponent():
    workload = Workload(MODELS["mixtral-8x7b"], 16384, Routing.parse("zipf1"))
    counts = np.sort(workload.rows_by_local_expert())[::-1]
    weights = 1 / np.arange(1, 9)
    p = weights / weights.sum()
    # Two draws without replacement, so the chance to be drawn first or second.
    expected = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(8) if j != i) for i in range(8)]
    assert counts / 16384 == pytest.approx(expected, rel=0.05)


def test_rotations_of_a_zipf_routing_keep_the_hot_experts_hot():
    workload = Workload(QWEN, 512, Routing.parse("zipf1.5"))
    hottest = {int(workload.rows_by_local_expert(rotation).argmax()) for rotation in range(4)}
    assert len(hottest) == 1
    assert not np.array_equal(workload.topk_ids(0), workload.topk_ids(1))


def test_all_to_one_sends_every_token_to_the_same_experts_of_this_rank():
    for name in ("qwen3-30b-a3b", "minimax-m2.5-ep4"):
        counts = Workload(MODELS[name], 100, Routing.parse("all-to-one")).rows_by_local_expert()
        assert sorted(counts)[-9:] == [0] + [100] * 8


def test_more_tokens_keep_the_routing_of_the_first_ones():
    for routing in ROUTINGS:
        few, many = (Workload(QWEN, tokens, Routing.parse(routing)).topk_ids() for tokens in (5, 50))
        assert np.array_equal(few, many[:5])


def test_an_expert_parallel_rank_maps_its_own_experts_and_no_others():
    mapping = MODELS["minimax-m2.5-ep4"].expert_map()
    assert mapping is not None
    assert mapping.dtype == torch.int32
    assert mapping[:64].tolist() == list(range(64))
    assert (mapping[64:] == -1).all()
    assert QWEN.expert_map() is None


def test_models_keep_their_true_activation():
    assert MODELS["nemotron-3-nano"].activation == "relu2_no_mul"
    assert not MODELS["nemotron-3-nano"].is_gated
    assert MODELS["gpt-oss-120b"].activation == "swigluoai"
    assert MODELS["gpt-oss-120b"].has_bias
    assert MODELS["gpt-oss-120b"].interleaved
    for model in MODELS.values():
        assert Activation(model.activation).is_gated == model.is_gated
        assert model.source
    assert TOKEN_COUNTS[-1] == 16384


def test_layers_that_cannot_be_stored_so_are_left_out_unless_they_are_named():
    device = torch.device("cuda")
    every = select_workloads(device, dtype="int4-g128", tokens="1")
    assert "gpt-oss-120b" not in {workload.model.name for workload in every}
    assert "deepseek-v3-tp8" in {workload.model.name for workload in every}
    (named,) = select_workloads(device, models="gpt-oss-120b", dtype="int4-g128", tokens="1")
    assert named.unsupported == "int4-g128 needs H and I that 128 divides, got 2880 and 2880"
    (alternating,) = select_workloads(device, models="gpt-oss-120b", dtype="fp8-block", tokens="1")
    assert "needs all gate rows before the up rows" in (alternating.unsupported or "")
    assert alternating not in select_workloads(device, dtype="fp8-block", tokens="1")
    (block,) = select_workloads(device, models="deepseek-v3-tp8", dtype="fp8-block", tokens="1")
    assert block.id.startswith("deepseek-v3-tp8-E256k8H7168I256-silu-fp8-block-M1-")
    assert named.id.startswith("gpt-oss-120b-E128k4H2880I2880-swigluoai-interleaved-bias-int4-g128-M1-")


def test_every_format_is_known_by_its_own_name():
    assert all(find_format(name).name == name for name in FORMATS)
    assert find_format("fp8-block").block_shape == (128, 128)


def test_default_workloads_fit_the_device():
    on_cpu = select_workloads(torch.device("cpu"))
    assert {workload.dtype for workload in on_cpu} == {"fp32"}
    assert all("/" in workload.model.name and workload.cache_state == "warm" for workload in on_cpu)
    on_gpu = select_workloads(torch.device("cuda"))
    assert all(workload.unsupported is None and workload.cache_state == "cold" for workload in on_gpu)
    assert {workload.num_tokens for workload in on_gpu} == {1, 8, 64, 512, 4096}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: find_model("qwen"), "model: expected one of .* got 'qwen'"),
        (lambda: Workload(QWEN, 0), "num_tokens: expected at least 1, got 0"),
        (lambda: Workload(QWEN, 1, dtype="int8"), "dtype: expected one of bf16, fp16, fp32, .* got 'int8'"),
        (lambda: select_workloads(torch.device("cuda"), dtype="fp4"), "dtype: expected one of bf16"),
        (lambda: Workload(QWEN, 1, cache_state="hot"), "cache_state: expected cold or warm, got 'hot'"),
        (lambda: Routing.parse("zipf"), "exponent: expected more than 0 for zipf"),
        (lambda: Routing.parse("uniform2"), "exponent: expected more than 0 for zipf and 0 elsewhere"),
        (lambda: Routing.parse("random"), "routing: expected uniform"),
        (lambda: QWEN.scaled_down(5), "divisor: expected a common divisor"),
        (lambda: Model("m", 4, 5, 8, 8, "none"), "top_k: expected at most num_experts 4, got 5"),
        (lambda: Model("m", 4, 2, 8, 8, "none", num_local_experts=8), "num_local_experts: expected at most"),
        (lambda: select_workloads(torch.device("cpu"), tokens="1,x"), "tokens: expected a number"),
        (lambda: select_workloads(torch.device("cpu"), models=","), "expected names separated by commas"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
