"""What moegate's configurations, platforms and tiles must answer.

Each rule stands here a second time, as it is documented.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...impl.config import MoEConfig, ParallelConfig
from ...impl.platform import Platform, Vendor
from ...impl.tuning import kernel_config, lookup, names
from ...impl.tuning.kernel_config import KernelConfig
from ..configs import DEVICES
from ..oracle import CUDA, ROCM
from ..properties.bad_input import Bad, Change, put
from ..properties.public import Answer, PublicCall
from .moegate_public import equals, has
from .moegate_public_files import H200, KEY, SIZES


def _config_call() -> PublicCall:
    groups = {"scheme": "int8_w8a16", "block_shape": (0, 16)}
    blocks = {"scheme": "fp8_w8a8", "block_shape": (32, 16)}
    thirds = [ParallelConfig(ep_size=3, ep_rank=rank) for rank in range(3)]
    halves = ParallelConfig(tp_size=2)
    return PublicCall(
        "config.MoEConfig",
        MoEConfig,
        lambda: {"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 32},
        {},
        (
            Bad("dtype", "is float32 with a scheme", put(scheme="int8_w8a16", dtype=torch.float32)),
            Bad("block_shape", "has groups that do not divide H", put(**groups, hidden_size=72)),
            Bad("block_shape", "has groups that do not divide I", put(**groups, intermediate_size=40)),
            Bad("tp_size", "cuts a group", put(**groups, intermediate_size=48, parallel=halves)),
            Bad("tp_size", "cuts a block's rows alone", put(**blocks, parallel=halves)),
            Bad(
                "tp_size",
                "cuts a block's columns alone",
                put(**(blocks | {"block_shape": (16, 32)}), parallel=halves),
            ),
            Bad("expert_map", "skips a local id", put(expert_map=(0, 2, -1, -1, -1, -1, -1, -1))),
            Bad("expert_map", "has a local id of -2", put(expert_map=(0, -2, 1, 2, 3, 4, 5, 6))),
        ),
        edges=(
            ("groups that divide H and I", put(**groups)),
            ("whole groups on each rank", put(**groups, parallel=halves)),
            ("whole blocks on each rank", put(**(blocks | {"block_shape": (16, 16)}), parallel=halves)),
            ("blocks with a tail on one rank", put(**blocks, intermediate_size=40, hidden_size=72)),
            ("every expert chosen", put(top_k=8)),
            ("one expert on each rank", put(parallel=ParallelConfig(ep_size=8))),
            ("a map with more ranks than experts", put(expert_map=(-1,) * 8, parallel=ParallelConfig(ep_size=9))),
            ("weights on the input", put(top_k=1, apply_router_weight_on_input=True)),
            ("float32", put(dtype=torch.float32)),
        ),
        answers=(
            Answer("the columns of one rank", has(intermediate_size_per_partition=16), put(parallel=halves)),
            *(
                Answer(f"experts of rank {place.ep_rank} of 3", has(num_local_experts=held), put(parallel=place))
                for place, held in zip(thirds, (3, 3, 2), strict=True)
            ),
            Answer("experts of a map", has(num_local_experts=2), put(expert_map=(-1, 1, -1, 0, -1, -1, -1, -1))),
        ),
    )


def _platform_calls() -> list[PublicCall]:
    """Memory by the programming guides, as `DEVICES` has it; families by what each architecture is."""
    memory = {platform: limit for platform, limit, _ in DEVICES.values()} | {
        "cuda:7.0": 98_304, "cuda:7.2": 98_304, "cuda:8.6": 101_376, "cuda:8.7": 166_912, "cuda:10.1": 232_448,
        "cuda:10.3": 232_448, "cuda:11.0": 232_448, "cuda:12.1": 101_376, "rocm:gfx90a": 65_536,
        "rocm:gfx950": 163_840, "tpu": 0, "out_of_tree": 0,
    }  # fmt: skip
    answers = []
    for text, limit in memory.items():
        nvidia = text in CUDA
        major, minor = map(int, text.removeprefix("cuda:").split(".")) if nvidia else (0, 0)
        gpu = nvidia or text in ROCM
        wanted = {
            "shared_memory": limit,
            "is_hopper": text == "cuda:9.0",
            "is_cuda_alike": gpu,
            "runs_triton": gpu or text == "xpu",
            "has_fp8_e4m3": (major, minor) >= (8, 9) if nvidia else text in ("cpu", "rocm:gfx942", "rocm:gfx950"),
            "family": 10 * major if nvidia else 90 if text in ROCM else None,
        }
        answers.append(Answer(f"what {text} is", has(**wanted), put(text=text)))
        answers.append(Answer(f"{text} again", lambda found, text=text: equals(text)(str(found)), put(text=text)))
    rows = [Bad("platform", "has text behind a colon", put(text="cpu:9.0"))]
    return [
        PublicCall("platform.Platform.parse", Platform.parse, lambda: {"text": "cpu"}, {}, rows, answers=answers),
        PublicCall(
            "platform.Platform",
            Platform,
            lambda: {"vendor": Vendor.CPU},
            {},
            (
                Bad("capability", "is of a CPU", put(capability=(9, 0))),
                Bad("capability", "is none of NVIDIA's", put(vendor=Vendor.NVIDIA, capability=(9, 1))),
                Bad("capability", "is missing", put(vendor=Vendor.NVIDIA)),
                Bad("capability", "is none of AMD's", put(vendor=Vendor.AMD, capability=(9, 1))),
            ),
            edges=(
                ("an interpreter", put(interpreted=True)),
                ("a Hopper", put(vendor=Vendor.NVIDIA, capability=(9, 0))),
            ),
            answers=(Answer("an interpreter", has(runs_triton=True), put(interpreted=True)),),
        ),
        PublicCall(
            "platform.Platform.of",
            Platform.of,
            lambda: {"device": "cpu"},
            {},
            answers=(Answer("the CPU", has(vendor=Vendor.CPU, name="cpu", capability=None, shared_memory=0)),),
        ),
    ]


def _reasons_say(text: str) -> Callable[[Any], str]:
    """The reasons for the tiles found hold this."""
    return lambda found: "" if text in " ".join(found.reasons) else f"expected {text} in {found.reasons}"


def _tile_calls() -> list[PublicCall]:
    smallest, largest = (16, 16, 16, 1, 1, 1), (256, 512, 512, 256, 16, 8)
    fields = ("block_size_m", "block_size_n", "block_size_k", "group_size_m", "num_warps", "num_stages")

    def tile_is(sizes: Sequence[int]) -> Change:
        return lambda good: dict(zip(fields, sizes, strict=True))

    keys = [
        KEY,
        KEY.public,
        replace(KEY, group=32),
        replace(KEY, dtype="float32"),
        replace(KEY, num_experts=1, intermediate_size=1, hidden_size=1, top_k=1, group=1),
        replace(KEY, dtype="fp8_w8a8", block_shape=(1, 1)),
        replace(KEY.public, dtype="fp8_w8a8", block_shape=(128, 64)),
    ]
    spelled = [
        "E=8,N=32,H=64,top_k=2,device_name=NVIDIA_H200.json",
        "E=8,N=32,device_name=NVIDIA_H200.json",
        "E=8,N=32,H=64,top_k=2,device_name=NVIDIA_H200,group=32.json",
        "E=8,N=32,H=64,top_k=2,device_name=NVIDIA_H200,dtype=float32.json",
        "E=1,N=1,H=1,top_k=1,device_name=NVIDIA_H200,group=1.json",
        "E=8,N=32,H=64,top_k=2,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[1,1].json",
        "E=8,N=32,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,64].json",
    ]
    layer_of = {
        "num_local_experts": 8, "intermediate_size": 32, "hidden_size": 64, "top_k": 2, "dtype": torch.bfloat16,
        "scheme": "none", "block_shape": None, "platform": H200,
    }  # fmt: skip
    by_layer = [
        ({}, KEY),
        ({"dtype": torch.float16}, KEY),
        ({"dtype": torch.float32}, replace(KEY, dtype="float32")),
        ({"scheme": "fp8_w8a8", "block_shape": (128, 64)}, replace(KEY, dtype="fp8_w8a8", block_shape=(128, 64))),
        ({"scheme": "int4_w4a16", "block_shape": (0, 32)}, replace(KEY, dtype="int4_w4a16", group=32)),
        ({"scheme": "fp8_w8a8"}, replace(KEY, dtype="fp8_w8a8")),
        ({"platform": replace(H200, name="NVIDIA H200 NVL")}, KEY),
        ({"platform": replace(H200, name="")}, None),
        ({"num_local_experts": 0}, None),
        ({"num_local_experts": 1}, replace(KEY, num_experts=1)),
    ]
    devices = {
        "NVIDIA H200": "NVIDIA_H200", "NVIDIA H200 NVL": "NVIDIA_H200", " NVIDIA L40S ": "NVIDIA_L40S",
        "Intel(R) Arc(TM) B60": "Intel(R)_Arc(TM)_B60", "a/b,c=d": "a_b_c_d",
        "NVIDIA GH200 480GB": "NVIDIA_GH200_480GB", "x" * 300: "x" * 100,
    }  # fmt: skip
    looked = SIZES | {"dtype": torch.bfloat16, "platform": H200}
    pair = (KernelConfig(16, 32, 16), KernelConfig(16, 64, 16))

    def found_in(**arguments: Any) -> Any:
        with kernel_config.use_kernel_configs(*pair):
            return lookup.find_kernel_configs(**arguments)

    return [
        PublicCall(
            "tuning.kernel_config.KernelConfig",
            KernelConfig,
            lambda: dict(zip(fields, smallest, strict=True)),
            {},
            (
                Bad("block_size_k", "is no power of two", put(block_size_k=17)),
                Bad("num_warps", "is no power of two", put(num_warps=6)),
            ),
            edges=[("the largest", tile_is(largest)), ("stages of any number", put(num_stages=3, group_size_m=5))],
            answers=[
                Answer(
                    "plain data",
                    lambda found: equals(dict(zip((*fields, "swap_ab"), (*largest, True), strict=True)))(
                        found.as_dict()
                    ),
                    lambda good: tile_is(largest)(good) | {"swap_ab": True},
                ),
                # Its operands in flight, or the tile on its way out in float32.
                Answer(
                    "memory of operands",
                    lambda found: equals((32 + 64) * 16 * 2 * 3)(found.shared_memory(torch.bfloat16)),
                    tile_is((32, 64, 16, 4, 8, 3)),
                ),
                Answer(
                    "memory of a tile",
                    lambda found: equals(32 * 64 * 4)(found.shared_memory(torch.int8)),
                    tile_is((32, 64, 16, 4, 8, 1)),
                ),
                Answer(
                    "memory of float32",
                    lambda found: equals((32 + 64) * 16 * 4 * 3)(found.shared_memory(torch.float32)),
                    tile_is((32, 64, 16, 4, 8, 3)),
                ),
            ],
        ),
        PublicCall(
            "tuning.kernel_config.use_kernel_configs",
            found_in,
            lambda: dict(looked),
            {},
            answers=[Answer("these tiles", has(w13=pair[0], w2=pair[1], source="override"))],
        ),
        PublicCall(
            "tuning.lookup.find_kernel_configs",
            lookup.find_kernel_configs,
            lambda: lookup.forget() or dict(looked),
            {},
            (Bad("num_local_experts", "is negative", put(num_local_experts=-1)),),
            edges=[
                ("one of each", put(num_tokens=1, top_k=1, num_experts=1)),
                ("a rank without experts", put(num_local_experts=0)),
                ("sizes of one", put(hidden_size=1, intermediate_size=1)),
            ],
            answers=[
                Answer(
                    "of this rank's experts",
                    _reasons_say("E=3,N=32"),
                    put(num_local_experts=3),
                ),
                Answer("of all experts", _reasons_say("E=8,N=32")),
                Answer(
                    "of no expert",
                    _reasons_say("no tuned file is looked for"),
                    put(num_local_experts=0),
                ),
            ],
        ),
        PublicCall(
            "tuning.names.ConfigKey",
            names.ConfigKey,
            lambda: {"num_experts": 8, "intermediate_size": 32, "device_name": "NVIDIA_H200"},
            {},
            (
                Bad("hidden_size", "stands alone", put(hidden_size=64)),
                Bad("hidden_size", "lacks beside top_k", put(top_k=2)),
                Bad("hidden_size", "lacks beside a group", put(group=32)),
                Bad("device_name", "is empty", put(device_name="")),
                Bad("device_name", "has a space", put(device_name="NVIDIA H200")),
                Bad("dtype", "has capitals", put(dtype="FP8")),
                *(
                    Bad("block_shape", f"is {shape}", put(block_shape=shape))
                    for shape in ((0, 16), (16, 0), (16,), (16.0, 16), [16, 16])
                ),
            ),
            edges=[
                ("sizes of one", put(num_experts=1, intermediate_size=1, hidden_size=1, top_k=1, group=1)),
                ("blocks of one", put(block_shape=(1, 1))),
            ],
            answers=[
                Answer("public", has(is_native=False)),
                Answer("native", has(is_native=True), put(hidden_size=64, top_k=2)),
                *(
                    Answer(f"the name of {name}", has(file_name=name), lambda good, key=key: vars(key))
                    for key, name in zip(keys, spelled, strict=True)
                ),
                *(
                    Answer(
                        f"what {name} leaves in public",
                        lambda found, key=key: equals((None, None, None, key.dtype, key.block_shape))(
                            (
                                found.public.hidden_size,
                                found.public.top_k,
                                found.public.group,
                                found.public.dtype,
                                found.public.block_shape,
                            )
                        ),
                        lambda good, key=key: vars(key),
                    )
                    for key, name in zip(keys, spelled, strict=True)
                ),
                *(
                    Answer(
                        f"no command of {name}",
                        lambda found: equals(None)(found.tune_command()),
                        lambda good, key=key: vars(key),
                    )
                    for key, name in (
                        (replace(KEY, dtype="int4_w4a16", group=32), "groups"),
                        (keys[-1], "blocks of 128 x 64"),
                    )
                ),
                Answer(
                    "its command of blocks",
                    lambda found: equals("moegate tune --shape E=8,N=32,H=64,top_k=2 --dtype fp8-block")(
                        found.tune_command()
                    ),
                    lambda good: vars(replace(KEY, dtype="fp8_w8a8", block_shape=(128, 128))),
                ),
                Answer(
                    "its command in float32",
                    lambda found: equals("moegate tune --shape E=8,N=32,H=64,top_k=2 --dtype fp32")(
                        found.tune_command()
                    ),
                    lambda good: vars(keys[3]),
                ),
            ],
        ),
        PublicCall(
            "tuning.names.ConfigKey.parse",
            names.ConfigKey.parse,
            lambda: {"file_name": KEY.file_name},
            {},
            (
                Bad("file name", "has a padded number", put(file_name="E=08,N=32,device_name=NVIDIA_H200.json")),
                Bad("device_name", "has another H200", put(file_name="E=8,N=32,device_name=NVIDIA_H200_NVL.json")),
                Bad("num_experts", "is 0", put(file_name="E=0,N=32,device_name=NVIDIA_H200.json")),
                Bad("file name", "lacks top_k", put(file_name="E=8,N=32,H=64,device_name=NVIDIA_H200.json")),
            ),
            answers=[Answer(name, equals(key), put(file_name=name)) for key, name in zip(keys, spelled, strict=True)],
        ),
        PublicCall(
            "tuning.names.ConfigKey.of_layer",
            names.ConfigKey.of_layer,
            lambda: dict(layer_of),
            {},
            answers=[Answer(f"with {change}", equals(key), put(**change)) for change, key in by_layer],
        ),
        PublicCall(
            "tuning.names.normalise_device_name",
            names.normalise_device_name,
            lambda: {"name": "cpu"},
            {},
            answers=[Answer(name[:30], equals(spelled), put(name=name)) for name, spelled in devices.items()],
        ),
    ]


ANSWER_CALLS: tuple[PublicCall, ...] = (_config_call(), *_platform_calls(), *_tile_calls())
