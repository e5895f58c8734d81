"""Floors against figures worked out by hand, and rotations that keep a cache cold."""

import numpy as np
import pytest

from moegate.bench.floor import H200_PUBLISHED, Ceilings, activation_bytes, expert_bytes, floor, measure_ceilings
from moegate.bench.rotation import calls_to_average, plan_rotation
from moegate.bench.workloads import MODELS, Model, Routing, Workload

H200_L2 = 60 * 2**20


@pytest.mark.parametrize(
    ("name", "tokens", "microseconds", "bound"),
    [
        # 8 experts x 3 x 2048 x 768 x 2 B + 2 x 2048 x 2 B = 75,505,664 B over 4.3 TB/s.
        ("qwen3-30b-a3b", 1, 17.56, "memory"),
        # 2 x 4096 x 8 x 3 x 2048 x 768 operations over 790 TFLOP/s.
        ("qwen3-30b-a3b", 4096, 391.44, "compute"),
        ("mixtral-8x7b", 1, 163.87, "memory"),
        ("mixtral-8x7b", 1024, 913.36, "compute"),
        ("mixtral-8x7b", 16384, 14613.76, "compute"),
        ("qwen3.5-35b-a3b", 1, 11.71, "memory"),
        ("qwen3.5-35b-a3b", 4096, 382.36, "memory"),
        ("gpt-oss-like", 1, 46.30, "memory"),
        ("gpt-oss-like", 8192, 2064.23, "compute"),
    ],
)
def test_floors_are_the_published_ones(name, tokens, microseconds, bound):
    least = floor(Workload(MODELS[name], tokens), H200_PUBLISHED)
    assert least.seconds * 1e6 == pytest.approx(microseconds, abs=0.006)
    assert least.bound == bound


def test_the_floor_counts_the_experts_that_the_routing_touches():
    workload = Workload(MODELS["qwen3-30b-a3b"], 8)
    touched = len(np.unique(workload.topk_ids()))
    least = floor(workload, H200_PUBLISHED)
    assert least.distinct_experts == touched
    assert least.bytes == touched * 3 * 2048 * 768 * 2 + 2 * 8 * 2048 * 2
    assert least.operations == 2 * 8 * 8 * 3 * 2048 * 768


def test_the_floor_of_several_rotations_is_their_mean():
    workload = Workload(MODELS["qwen3-30b-a3b"], 8)
    each = [floor(workload, H200_PUBLISHED, [rotation]) for rotation in range(4)]
    together = floor(workload, H200_PUBLISHED, range(4))
    assert together.seconds == pytest.approx(sum(one.seconds for one in each) / 4)
    assert together.bytes == pytest.approx(sum(one.bytes for one in each) / 4)
    assert len({one.distinct_experts for one in each}) > 1


def test_an_expert_parallel_rank_owes_its_own_pairs_alone():
    model = MODELS["minimax-m2.5-ep4"]
    workload = Workload(model, 32)
    ids = workload.topk_ids()
    here = int((ids < 64).sum())
    assert here < ids.size
    least = floor(workload, H200_PUBLISHED)
    assert least.operations == pytest.approx(2 * here * 3 * 3072 * 1536)
    assert least.distinct_experts == len(np.unique(ids[ids < 64]))
    assert activation_bytes(workload) == (int((ids < 64).any(axis=1).sum()) + 32) * 3072 * 2


def test_a_non_gated_expert_has_two_matrices():
    assert expert_bytes(Workload(MODELS["nemotron-3-nano"], 1)) == 2 * 2688 * 1856 * 2


def test_a_missing_peak_is_an_error():
    with pytest.raises(ValueError, match="expected a peak for fp32"):
        floor(Workload(MODELS["mixtral-8x7b"], 1, dtype="fp32"), H200_PUBLISHED)
    with pytest.raises(ValueError, match="rotations: expected at least one"):
        floor(Workload(MODELS["mixtral-8x7b"], 1), H200_PUBLISHED, [])


def test_the_ceilings_of_a_cpu_can_be_measured():
    ceilings = measure_ceilings("cpu", ["fp32"])
    assert isinstance(ceilings, Ceilings)
    assert 1e8 < ceilings.read_bandwidth < 1e13
    assert 1e8 < ceilings.copy_bandwidth < 1e13
    assert 1e8 < ceilings.peak["fp32"] < 1e14
    assert ceilings.as_dict()["source"] == "measured on cpu"


@pytest.mark.parametrize("routing", ["uniform", "zipf1.2", "all-to-one"])
@pytest.mark.parametrize("tokens", [1, 8, 64, 512])
def test_every_model_is_kept_cold_on_an_h200(tokens, routing):
    for model in MODELS.values():
        rotation = plan_rotation(Workload(model, tokens, Routing.parse(routing)), H200_L2)
        assert rotation.is_cold
        assert rotation.reuse_bytes >= 2 * H200_L2
        assert rotation.calls >= calls_to_average(tokens)
        assert rotation.calls % rotation.weight_copies == 0
        assert rotation.weight_copies * expert_bytes(Workload(model, 1)) * model.local_experts < 40e9


def test_a_rotation_with_too_few_copies_is_not_called_cold():
    workload = Workload(MODELS["qwen3-30b-a3b"], 1, Routing.parse("all-to-one"))
    rotation = plan_rotation(workload, H200_L2, max_copies=1)
    assert not rotation.is_cold
    assert rotation.weight_copies == 1


def test_nothing_is_cold_where_the_cache_size_is_not_known():
    assert not plan_rotation(Workload(MODELS["mixtral-8x7b"], 64), 0).is_cold


def test_the_reuse_distance_is_the_bytes_between_two_reads_of_the_same_weights():
    # One expert of two, a call: 3 x 64 x 64 x 2 bytes, a third of it w2.
    workload = Workload(Model("toy", 1, 1, 64, 64, "none"), 1)
    expert = 3 * 64 * 64 * 2
    for copies in (1, 2, 5):
        rotation = plan_rotation(workload, 1, multiple=(copies - 1) * expert + expert // 3, min_calls=1)
        assert rotation.weight_copies == copies
        # The other copies lie between, and of the same copy w2 (after w13) or w13 (before w2).
        assert rotation.reuse_bytes == (copies - 1) * expert + expert // 3
        assert rotation.bytes_rotated == copies * expert


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l2_bytes": -1}, "l2_bytes"),
        ({"max_copies": 0}, "max_copies"),
        ({"multiple": 0}, "multiple"),
        ({"min_calls": 0}, "min_calls"),
    ],
)
def test_bad_rotation_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_rotation(Workload(MODELS["mixtral-8x7b"], 1), **{"l2_bytes": 1, **arguments})
