"""What the oracle is told: contradictory configurations and devices that do not exist are refused by name."""

import pytest
import torch

from moegate.impl.config import MoEConfig, ParallelConfig
from moegate.impl.platform import Platform, Vendor

SIZES = {"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_map": (0, 1, -1)}, "expert_map: expected one entry for each of num_experts 8, got 3"),
        ({"expert_map": (0, 0, *(-1,) * 6)}, "expert_map: expected -1 or distinct local ids"),
        ({"expert_map": (0, 2, *(-1,) * 6)}, "expert_map: expected -1 or distinct local ids"),
        ({"expert_map": (-2, *(-1,) * 7)}, "expert_map: expected -1 or distinct local ids"),
        ({"expert_map": [0] * 8}, "expert_map: expected a tuple of int"),
        ({"expert_map": (True, *(-1,) * 7)}, "expert_map: expected a tuple of int"),
        ({"parallel": ParallelConfig(tp_size=5)}, "tp_size: expected a divisor of intermediate_size 96, got 5"),
        ({"parallel": ParallelConfig(ep_size=9)}, "ep_size: expected at most num_experts 8"),
        ({"parallel": None}, "parallel: expected a ParallelConfig"),
        ({"activation": "relu"}, "activation: expected one of"),
        ({"scheme": "fp4"}, "scheme: expected one of"),
        ({"activation_format": "ragged"}, "activation_format: expected one of"),
        ({"dtype": torch.float64}, "dtype: expected bfloat16, float16 or float32"),
        ({"dtype": "bf16"}, "dtype: expected bfloat16, float16 or float32"),
        ({"is_lora_enabled": 1}, "is_lora_enabled: expected a bool"),
        ({"block_shape": (128, 128)}, "block_shape: expected None for scheme none"),
        ({"scheme": "fp8_w8a8", "block_shape": (128,)}, "block_shape: expected two integers"),
        ({"scheme": "fp8_w8a8", "block_shape": 128}, "block_shape: expected two integers"),
        ({"scheme": "fp8_w8a8", "block_shape": (True, 1)}, "block_shape: expected two integers"),
        ({"has_bias": 1}, "has_bias: expected a bool"),
        ({"scheme": "fp8_w8a8", "dtype": torch.float32}, "dtype: expected bfloat16 or float16 for scheme fp8_w8a8"),
        ({"scheme": "fp8_w8a8", "block_shape": (-1, 16)}, "block_shape: expected two integers of at least 0"),
        ({"scheme": "fp8_w8a8", "block_shape": (0, 32)}, "block_shape: expected (rows, columns) of at least one row"),
        ({"scheme": "fp8_w8a8", "block_shape": (32, 0)}, "block_shape: expected columns that 16 divides, got 0"),
        ({"scheme": "fp8_w8a8", "block_shape": (32, 40)}, "block_shape: expected columns that 16 divides, got 40"),
        ({"scheme": "fp8_w8a8", "block_shape": (32, 8)}, "block_shape: expected columns that 16 divides, got 8"),
        ({"scheme": "int8_w8a8", "block_shape": (32, 32)}, "block_shape: expected None for scheme int8_w8a8"),
        ({"scheme": "int8_w8a8", "block_shape": (0, 32)}, "block_shape: expected None for scheme int8_w8a8"),
        ({"scheme": "int8_w8a16", "block_shape": (32, 32)}, "block_shape: expected (0, group) for scheme int8_w8a16"),
        ({"scheme": "int4_w4a16"}, "block_shape: expected (0, group) for scheme int4_w4a16, got None"),
        ({"scheme": "int4_w4a16", "block_shape": (32, 32)}, "block_shape: expected (0, group) for scheme int4_w4a16"),
        ({"scheme": "int4_w4a16", "block_shape": (0, 0)}, "block_shape: expected columns that 16 divides, got 0"),
        (
            {"scheme": "int4_w4a16", "block_shape": (0, 64)},
            "block_shape: expected groups that divide intermediate_size 96, got (0, 64)",
        ),
        (
            {"scheme": "int8_w8a16", "block_shape": (0, 48)},
            "block_shape: expected groups that divide hidden_size 64, got (0, 48)",
        ),
        (
            {"scheme": "fp8_w8a8", "block_shape": (32, 32), "parallel": ParallelConfig(tp_size=2)},
            "tp_size: expected shards of whole blocks of block_shape (32, 32), got 48 of intermediate_size 96",
        ),
        (
            {"scheme": "fp8_w8a8", "block_shape": (16, 32), "parallel": ParallelConfig(tp_size=2)},
            "tp_size: expected shards of whole blocks",
        ),
        (
            {"scheme": "fp8_w8a8", "block_shape": (5, 16), "parallel": ParallelConfig(tp_size=2)},
            "tp_size: expected shards of whole blocks",
        ),
        (
            {"scheme": "int4_w4a16", "block_shape": (0, 32), "parallel": ParallelConfig(tp_size=2)},
            "tp_size: expected shards of whole groups of block_shape (0, 32), got 48 of intermediate_size 96",
        ),
        ({"apply_router_weight_on_input": True}, "apply_router_weight_on_input: expected top_k 1"),
    ],
)
def test_a_contradictory_configuration_is_refused_by_name(changes, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        MoEConfig(**SIZES | changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "local"),
    [
        ({}, 8),
        ({"parallel": ParallelConfig(ep_size=3, ep_rank=0)}, 3),
        ({"parallel": ParallelConfig(ep_size=3, ep_rank=2)}, 2),
        ({"expert_map": (-1,) * 8}, 0),
        ({"expert_map": (1, -1, 0, -1, -1, -1, 2, -1), "parallel": ParallelConfig(ep_size=16)}, 3),
    ],
)
def test_a_rank_knows_how_many_experts_it_holds(changes, local):
    assert MoEConfig(**SIZES | changes).num_local_experts == local


@pytest.mark.parametrize(
    ("scheme", "block_shape", "tp"),
    [
        ("fp8_w8a8", None, 4),
        ("fp8_w8a8", (128, 128), 1),  # the last block of either side may be narrower
        ("fp8_w8a8", (5, 16), 1),
        ("fp8_w8a8", (48, 16), 2),
        ("int8_w8a8", None, 2),
        ("int8_w8a16", None, 4),
        ("int8_w8a16", (0, 32), 3),
        ("int4_w4a16", (0, 32), 1),
        ("int4_w4a16", (0, 16), 6),
    ],
)
def test_scales_that_no_shard_cuts_are_taken(scheme, block_shape, tp):
    config = MoEConfig(**SIZES, scheme=scheme, block_shape=block_shape, parallel=ParallelConfig(tp_size=tp))
    assert config.block_shape == block_shape


def test_a_configuration_can_be_a_key_however_its_block_shape_came():
    first = MoEConfig(**SIZES, scheme="fp8_w8a8", block_shape=[32, 32])
    assert hash(first) == hash(MoEConfig(**SIZES, scheme="fp8_w8a8", block_shape=(32, 32)))


@pytest.mark.parametrize(
    "text", ["cuda:9.1", "cuda:13.0", "cuda", "cuda:9", "rocm:gfx1100", "rocm", "cpu:1", "npu", ""]
)
def test_a_device_that_does_not_exist_is_refused_by_name(text):
    with pytest.raises(ValueError, match=r"platform: expected|capability: expected"):
        Platform.parse(text)


@pytest.mark.parametrize(
    ("text", "is_hopper", "has_fp8"),
    [
        ("cuda:8.6", False, False),
        ("cuda:8.9", False, True),
        ("cuda:9.0", True, True),
        ("cuda:10.3", False, True),
        ("cuda:11.0", False, True),
        ("cuda:12.1", False, True),
        ("rocm:gfx90a", False, False),
        ("rocm:gfx942", False, True),
        ("rocm:gfx950", False, True),
        ("xpu", False, False),
        ("cpu", False, True),
        ("tpu", False, False),
    ],
)
def test_hopper_is_nvidias_family_90_alone(text, is_hopper, has_fp8):
    platform = Platform.parse(text)
    assert (platform.is_hopper, platform.has_fp8_e4m3) == (is_hopper, has_fp8)
    assert str(platform) == text


def test_rocm_reports_capabilities_that_only_look_like_hopper():
    assert Platform(Vendor.AMD, (9, 0)).family == Platform(Vendor.NVIDIA, (9, 0)).family
    assert not Platform(Vendor.AMD, (9, 0)).is_hopper
