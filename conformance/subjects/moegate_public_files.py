"""The public calls around files: tuned tiles, checkpoints, adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...impl import checkpoint
from ...impl.config import QuantScheme
from ...impl.lora.peft import load_peft
from ...impl.platform import Platform
from ...impl.tuning import kernel_config, lookup, names, writer
from ...impl.tuning.kernel_config import KernelConfig
from ..properties.bad_input import (
    Arguments,
    Bad,
    BoolKind,
    ChoiceKind,
    DtypeKind,
    IntKind,
    Kind,
    MappingKind,
    ObjectKind,
    TextKind,
    put,
)
from ..properties.public import PublicCall
from .moegate_public import E, H, I, K, entered, full

H200 = replace(Platform.parse("cuda:9.0"), name="NVIDIA H200")
SIZES = {"num_tokens": 4, "top_k": 2, "num_experts": 8, "hidden_size": 64, "intermediate_size": 32}
_SIZES: dict[str, Kind] = {name: IntKind(1) for name in SIZES}
_TILES: dict[str, Kind] = {
    "num_tokens": IntKind(1),
    "top_k": IntKind(1),
    "num_experts": IntKind(1),
    "dtype": DtypeKind(),
    "platform": ObjectKind(),
    "scheme": ChoiceKind(),
}
_LOOKUP: dict[str, Kind] = {
    **_TILES,
    "hidden_size": IntKind(1),
    "intermediate_size": IntKind(1),
    "is_gated": BoolKind(),
    "block_shape": ObjectKind(optional=True),
}
KEY = names.ConfigKey.parse("E=8,N=32,H=64,top_k=2,device_name=NVIDIA_H200.json")
TILE = KernelConfig(16, 32, 16)
# `config.json` and a state dict of one small layer.
QWEN3 = {
    "model_type": "qwen3_moe",
    "num_experts": E,
    "hidden_size": H,
    "moe_intermediate_size": I,
    "num_experts_per_tok": K,
}


def state_dict() -> dict[str, torch.Tensor]:
    """A small layer's entries."""
    entries = {"gate.weight": full(E, H)}
    for expert in range(E):
        entries |= {
            f"experts.{expert}.{name}.weight": full(*shape)
            for name, shape in (("gate_proj", (I, H)), ("up_proj", (I, H)), ("down_proj", (H, I)))
        }
    return entries


def checkpoint_arguments() -> Arguments:
    """Of `load_layer`."""
    return {"checkpoint": state_dict(), "config": dict(QWEN3), "prefix": "", "prepare": False}


ADAPTER = {"peft_type": "LORA", "lora_alpha": 8, "r": 2}
ADAPTER_PREFIX = "base_model.model.model.layers.0.mlp.experts."


def adapter_entries() -> dict[str, torch.Tensor]:
    """An adapter's tensors by PEFT's names."""
    name = f"{ADAPTER_PREFIX}0.gate_proj.lora_"
    return {f"{name}A.weight": full(2, H), f"{name}B.weight": full(I, 2)}


def write_adapter(folder: Path, config: object = ADAPTER, entries: dict[str, torch.Tensor] | None = None) -> Path:
    """An adapter in a folder, as PEFT saves it."""
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(adapter_entries() if entries is None else entries, folder / "adapter_model.safetensors")
    return folder


def adapter_folder() -> Path:
    """The same in a folder below the working directory."""
    folder = Path("adapter")
    if not folder.exists():
        folder.mkdir()
        write_adapter(folder)
    return folder


FILE_CALLS: tuple[PublicCall, ...] = (
    # --- tiles
    PublicCall(
        "tuning.kernel_config.KernelConfig",
        KernelConfig,
        lambda: {"block_size_m": 16, "block_size_n": 32, "block_size_k": 16},
        {
            "block_size_m": IntKind(16, 256),
            "block_size_n": IntKind(16, 512),
            "block_size_k": IntKind(16, 512),
            "group_size_m": IntKind(1, 256),
            "num_warps": IntKind(1, 16),
            "num_stages": IntKind(1, 8),
            "swap_ab": BoolKind(),
        },
        tuple(Bad(name, "is no power of two", put(**{name: 48})) for name in ("block_size_m", "block_size_n")),
    ),
    PublicCall(
        "tuning.kernel_config.use_kernel_configs",
        lambda **a: entered(kernel_config.use_kernel_configs(**a)),
        lambda: {"w13": KernelConfig(16, 32, 16)},
        {"w13": ObjectKind(), "w2": ObjectKind(optional=True)},
        (Bad("w2", "has another block_size_m", put(w2=KernelConfig(32, 32, 16))),),
    ),
    PublicCall(
        "tuning.kernel_config.default_kernel_config",
        kernel_config.default_kernel_config,
        lambda: {
            "num_tokens": 4,
            "top_k": 2,
            "num_experts": 8,
            "n": 64,
            "k": 64,
            "dtype": torch.bfloat16,
            "platform": H200,
        },
        {**_TILES, "n": IntKind(1), "k": IntKind(1)},
    ),
    *(
        PublicCall(
            f"tuning.lookup.{function.__name__}",
            function,
            lambda: lookup.forget() or SIZES | {"dtype": torch.bfloat16, "platform": H200},
            _LOOKUP,
            (Bad("block_shape", "is negative", put(block_shape=(-16, 16))),),
        )
        for function in (lookup.find_kernel_configs, lookup.default_kernel_configs)
    ),
    PublicCall(
        "tuning.lookup.config_folders",
        lookup.config_folders,
        lambda: {"environment": {}},
        {"environment": MappingKind()},
        (
            Bad(lookup.FOLDER_VARIABLE, "names a file", put(environment={lookup.FOLDER_VARIABLE: __file__})),
            Bad(lookup.FOLDER_VARIABLE, "has a NUL", put(environment={lookup.FOLDER_VARIABLE: "a\0b"})),
            Bad(
                lookup.FOLDER_VARIABLE, "is of an unknown user", put(environment={lookup.FOLDER_VARIABLE: "~nobody9/x"})
            ),
        ),
    ),
    PublicCall(
        "tuning.names.ConfigKey",
        names.ConfigKey,
        lambda: {
            "num_experts": 8,
            "intermediate_size": 32,
            "device_name": "NVIDIA_H200",
            "hidden_size": 64,
            "top_k": 2,
        },
        {
            "num_experts": IntKind(1),
            "intermediate_size": IntKind(1),
            "hidden_size": IntKind(1),
            "top_k": IntKind(1),
            "group": IntKind(1, optional=True),
            "device_name": TextKind(),
            "dtype": TextKind(optional=True),
            "block_shape": ObjectKind(optional=True),
        },
    ),
    PublicCall(
        "tuning.names.ConfigKey.parse",
        names.ConfigKey.parse,
        lambda: {"file_name": KEY.file_name},
        {"file_name": TextKind(named="file name")},
        (Bad("file name", "is above a folder", put(file_name="../" + KEY.file_name)),),
    ),
    PublicCall(
        "tuning.names.ConfigKey.of_layer",
        names.ConfigKey.of_layer,
        lambda: {
            "num_local_experts": 8,
            "intermediate_size": 32,
            "hidden_size": 64,
            "top_k": 2,
            "dtype": torch.bfloat16,
            "scheme": QuantScheme.NONE,
            "block_shape": None,
            "platform": H200,
        },
        {
            "num_local_experts": IntKind(0),
            "intermediate_size": IntKind(1),
            "hidden_size": IntKind(1),
            "top_k": IntKind(1),
            "scheme": ChoiceKind(),
            "platform": ObjectKind(),
        },
    ),
    PublicCall(
        "tuning.names.normalise_device_name",
        names.normalise_device_name,
        lambda: {"name": "NVIDIA H200"},
        {},
        (Bad("name", "is a number", put(name=3)), Bad("name", "is None", put(name=None))),
    ),
    *(
        PublicCall(
            f"tuning.writer.{function.__name__}",
            function,
            lambda folder=folder: {"key": KEY, "configs": {16: (TILE, TILE)}} | folder,
            {"key": ObjectKind(), "configs": MappingKind()},
            (
                Bad("configs", "is empty", put(configs={})),
                Bad("configs", "has one tile", put(configs={16: TILE})),
                Bad("configs", "has a string for its tokens", put(configs={"16": (TILE, TILE)})),
                Bad("configs", "has 0 tokens", put(configs={0: (TILE, TILE)})),
                Bad("configs", "has no tiles", put(configs={16: (1, 2)})),
                Bad("about", "holds what JSON does not", put(about={"tile": TILE})),
                Bad("about", "holds NaN", put(about={"seconds": float("nan")})),
                Bad("about", "is a list", put(about=[1])),
                Bad("triton_version", "is a number", put(triton_version=3)),
            ),
        )
        for function, folder in ((writer.dump, {}), (writer.write_tuned_file, {"folder": Path("tuned")}))
    ),
    # --- files
    PublicCall(
        "checkpoint.load_layer",
        checkpoint.load_layer,
        checkpoint_arguments,
        {
            "checkpoint": ObjectKind(),
            "config": MappingKind(),
            "layer": IntKind(0),
            "dtype": DtypeKind(),
            "router_dtype": DtypeKind(optional=True),
            "parallel": ObjectKind(optional=True),
            "backend": ChoiceKind(),
            "device": TextKind(),
            "prepare": BoolKind(),
        },
        (
            Bad("prefix", "is a number", put(prefix=3)),
            Bad("checkpoint", "is of another prefix", put(prefix="model.")),
            Bad("checkpoint", "holds no tensors", put(checkpoint={"gate.weight": [1.0]})),
            Bad("checkpoint", "is not there", put(checkpoint="no/such/folder")),
            *(
                Bad(f"config.{key}", f"is {value!r:.20}", put(config=QWEN3 | {key: value}))
                for key in ("num_experts", "hidden_size", "moe_intermediate_size", "num_experts_per_tok")
                for value in ("8", 0, -1, 2.0, True, [8])
            ),
            *(
                Bad("config.model_type", f"is {value!r}", put(config=QWEN3 | {"model_type": value}))
                for value in (None, "llama", 3, ["qwen3_moe"], "qwen3_moe\x1b[31m")
            ),
            *(
                Bad(f"config.{key}", f"is {value!r}", put(config=QWEN3 | {key: value}))
                for key, value in (
                    ("norm_topk_prob", "no"),
                    ("hidden_act", "gelu"),
                    ("hidden_act", ["silu"]),
                    ("quantization_config", "fp8"),
                    ("quantization_config", {"quant_method": "awq"}),
                    ("quantization_config", {"quant_method": "fp8", "weight_block_size": 128}),
                    ("quantization_config", {"quant_method": "fp8", "weight_block_size": ["a", "b"]}),
                )
            ),
        ),
    ),
    PublicCall(
        "lora.peft.load_peft",
        load_peft,
        lambda: {"folder": adapter_folder(), "layer": 0, "num_experts": E, "hidden_size": H, "intermediate_size": I},
        {
            "folder": ObjectKind(),
            "layer": IntKind(0),
            "num_experts": IntKind(1),
            "hidden_size": IntKind(1),
            "intermediate_size": IntKind(1),
            "dtype": DtypeKind(optional=True),
        },
    ),
)
