"""What moegate's layers and adapters from files must answer, and the tiles of files beside each other.

Each rule stands here a second time, as it is documented.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...impl.checkpoint import load_layer
from ...impl.config import ParallelConfig
from ...impl.layer import MoELayer, RoutingMethod
from ...impl.lora.peft import load_peft
from ...impl.mxfp4 import dequantize_mxfp4
from ...impl.platform import Platform
from ...impl.tuning import lookup
from ..properties.bad_input import Arguments, Change, put
from ..properties.public import Answer, PublicCall
from .moegate_public import equals

# Blocks of 16 along I are cut by nobody, and the last one is half a block.
E, H, I, K, BLOCK = 4, 64, 24, 2, 16
LAYER = 3


def _numbers(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers of their own for each name."""
    count, first = torch.Size(shape).numel(), sum(map(ord, name)) * 7
    return ((torch.arange(count).view(shape) * 37 + first) % 101 / 64 - 0.75).to(dtype)


Entries = dict[str, Tensor]
Expected = dict[str, Any]


def _linears(prefix: str, names: Sequence[str], size: int, block: int = 0) -> Entries:
    """Gate, up and down of one MLP, with scales of blocks where it has some."""
    entries = {}
    for name, shape in zip(names, ((size, H), (size, H), (H, size)), strict=True):
        weight = _numbers(f"{prefix}{name}", *shape)
        entries[f"{prefix}{name}.weight"] = weight.to(torch.float8_e4m3fn) if block else weight
        if block:
            grid = (-(-shape[0] // block), -(-shape[1] // block))
            entries[f"{prefix}{name}.weight_scale_inv"] = _numbers(f"{prefix}{name} s", *grid).float().abs() + 1
    return entries


def _cut(tensor: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """A rank's run of one dimension."""
    size = tensor.shape[dim] // ranks
    return tensor.narrow(dim, rank * size, size)


def _mlp(
    entries: Entries, prefix: str, names: Sequence[str], what: str, rank: int, ranks: int
) -> tuple[Tensor, Tensor]:
    """w13, gate rows first, and w2 of a rank."""
    gate, up, down = (entries[f"{prefix}{name}.{what}"] for name in names)
    return torch.cat([_cut(gate, 0, rank, ranks), _cut(up, 0, rank, ranks)]), _cut(down, 1, rank, ranks)


_QWEN = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")  # w3 is up


def _each(
    names: Sequence[str], experts: Sequence[int], rank: int = 0, ranks: int = 1, block: int = 0
) -> tuple[Entries, Expected]:
    """Experts in entries of their own: the entries of all, and what a rank has of them."""
    entries: Entries = {}
    for expert in range(E):
        entries |= _linears(f"experts.{expert}.", names, I, block)
    weights = [_mlp(entries, f"experts.{e}.", names, "weight", rank, ranks) for e in experts]
    right: Expected = {"w13": torch.stack([w for w, _ in weights]), "w2": torch.stack([w for _, w in weights])}
    if block:
        scales = [_mlp(entries, f"experts.{e}.", names, "weight_scale_inv", 0, 1) for e in experts]
        right |= {"w13_scale": torch.stack([s for s, _ in scales]), "w2_scale": torch.stack([s for _, s in scales])}
    return entries, right


def _mixtral(rank: int = 0, ranks: int = 1) -> tuple[Arguments, Expected]:
    entries, right = _each(_MIXTRAL, range(E), rank, ranks)
    entries["gate.weight"] = right["gate"] = _numbers("gate", E, H)
    config = {"model_type": "mixtral", "num_local_experts": E, "intermediate_size": I}
    return _arguments(config, entries, rank, ranks), right | {"routing": RoutingMethod(K)}


def _qwen3(**config: Any) -> tuple[Arguments, Expected]:
    """Experts on the second of two ranks, the last two."""
    entries, right = _each(_QWEN, (2, 3))
    entries["gate.weight"] = right["gate"] = _numbers("gate", E, H)
    config = {"model_type": "qwen3_moe", "num_experts": E, "moe_intermediate_size": I} | config
    arguments = _arguments(config, entries) | {"parallel": ParallelConfig(ep_size=2, ep_rank=1)}
    routing = RoutingMethod(K, renormalize=config.get("norm_topk_prob", False))
    return arguments, right | {"routing": routing, "expert_map": torch.tensor([-1, -1, 0, 1], dtype=torch.int32)}


def _qwen2(rank: int = 0, ranks: int = 1, ep_size: int = 1) -> tuple[Arguments, Expected]:
    """Shared experts with their own gate: cut with the others, or whole and not summed where experts are spread."""
    entries, right = _each(_QWEN, range(E) if ep_size == 1 else (0, 1), rank, ranks)
    entries |= _linears("shared_expert.", _QWEN, 2 * I)
    entries["gate.weight"] = right["gate"] = _numbers("gate", E, H)
    entries["shared_expert_gate.weight"] = right["shared_gate"] = _numbers("shared gate", 1, H)
    right["shared_w13"], right["shared_w2"] = _mlp(entries, "shared_expert.", _QWEN, "weight", rank, ranks)
    config = {"model_type": "qwen2_moe", "num_experts": E, "moe_intermediate_size": I}
    arguments = _arguments(config | {"shared_expert_intermediate_size": 2 * I}, entries, rank, ranks)
    if ep_size > 1:
        arguments["parallel"] = ParallelConfig(ep_size=ep_size)
        right["expert_map"] = torch.tensor([0, 1, -1, -1], dtype=torch.int32)
    return arguments, right | {"routing": RoutingMethod(K, renormalize=False), "external": ep_size > 1}


def _deepseek(block: int = 0) -> tuple[Arguments, Expected]:
    """Two shared experts as one, a correction bias, a router in float32; and blocks of fp8, the last one cut off."""
    entries, right = _each(_QWEN, range(E), block=block)
    entries |= _linears("shared_experts.", _QWEN, 2 * I, block)
    entries["gate.weight"] = right["gate"] = _numbers("gate", E, H, dtype=torch.float32)
    entries["gate.e_score_correction_bias"] = right["correction"] = _numbers("correction", E, dtype=torch.float32) / 3
    right["shared_w13"], right["shared_w2"] = _mlp(entries, "shared_experts.", _QWEN, "weight", 0, 1)
    config = {
        "model_type": "deepseek_v3",
        "n_routed_experts": E,
        "moe_intermediate_size": I,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    }
    if block:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    routing = RoutingMethod(
        K, scoring_func="sigmoid", num_expert_group=2, topk_group=1, routed_scaling_factor=2.5, renormalize=True
    )
    return _arguments(config, entries), right | {"routing": routing}


def _gpt_oss(rank: int = 0, ranks: int = 1, *, has_bits: int = 16) -> tuple[Arguments, Expected]:
    """Stacked experts: `[E, in, out]` with alternating gate and up columns, or rows of MXFP4; the bias of w2 once."""
    size = 2 * 32  # whole blocks of MXFP4 on each of two ranks
    entries = {"router.weight": _numbers("router", E, H), "router.bias": _numbers("bias", E)}
    right: Expected = {"gate": entries["router.weight"], "gate_bias": entries["router.bias"]}
    whole = {}
    for name, rows, columns in (("gate_up_proj", 2 * size, H), ("down_proj", H, size)):
        if has_bits == 16:
            entries[f"experts.{name}"] = _numbers(name, E, columns, rows)
            whole[name] = entries[f"experts.{name}"].transpose(1, 2)
        else:
            blocks = (_numbers(name, E, rows, columns // 32, 16).float() * 4096).long() % 256
            scales = (_numbers(f"{name} s", E, rows, columns // 32).float() * 64).long() % 5 + 124
            entries[f"experts.{name}_blocks"] = blocks.to(torch.uint8)
            entries[f"experts.{name}_scales"] = scales.to(torch.uint8)
            whole[name] = _from_mxfp4(entries[f"experts.{name}_blocks"], entries[f"experts.{name}_scales"]).bfloat16()
        entries[f"experts.{name}_bias"] = whole[f"{name}_bias"] = _numbers(f"{name}_bias", E, rows)
    for name, entry in (("w13", "gate_up_proj"), ("w13_bias", "gate_up_proj_bias")):
        parts = [_cut(whole[entry][:, first::2], 1, rank, ranks) for first in (0, 1)]
        right[name] = torch.cat(parts, dim=1)
    right["w2"] = _cut(whole["down_proj"], 2, rank, ranks)
    right["w2_bias"] = whole["down_proj_bias"] * (rank == 0)
    config = {"model_type": "gpt_oss", "num_local_experts": E, "intermediate_size": size, "swiglu_limit": 5.0}
    if has_bits == 4:
        config["quantization_config"] = {"quant_method": "mxfp4"}
    right |= {"routing": RoutingMethod(K), "function": ("swigluoai", 1.702, 5.0, False)}
    return _arguments(config, entries, rank, ranks), right


def _from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The OCP Microscaling specification, number by number: a sign, two bits of exponent with a bias of 1, one more."""
    numbers = torch.stack([blocks % 16, blocks // 16], dim=-1).flatten(-2).double()
    sign, rest = torch.where(numbers >= 8, -1.0, 1.0), numbers % 8
    exponent, half = rest // 2, rest % 2 / 2
    value = torch.where(exponent == 0, half, (1 + half) * 2 ** (exponent - 1))
    scale = torch.where(scales == 255, torch.nan, 2.0 ** (scales.double() - 127))
    return (sign * value * scale[..., None]).flatten(-2)


def _arguments(config: Mapping[str, Any], entries: Entries, rank: int = 0, ranks: int = 1) -> Arguments:
    """Of `load_layer`, with entries by the public names of one layer among others."""
    block = "block_sparse_moe" if config["model_type"] == "mixtral" else "mlp"
    named = {f"model.layers.{LAYER}.{block}.{name}": entry for name, entry in entries.items()}
    return {
        "checkpoint": named | {f"model.layers.{LAYER + 1}.{block}.gate.weight": torch.zeros(E, H)},
        "config": {"hidden_size": H, "num_experts_per_tok": K, **config},
        "layer": LAYER,
        "parallel": ParallelConfig(tp_size=ranks, tp_rank=rank),
        "prepare": False,
    }


def _parts(layer: MoELayer) -> Expected:
    """All that a layer has from its checkpoint."""
    experts, shared, gate = layer.experts, layer.shared_experts, layer.gate
    function = experts.function
    return {
        "gate": gate.weight,
        "gate_bias": gate.bias,
        "correction": gate.e_score_correction_bias,
        "w13": experts.w13,
        "w2": experts.w2,
        "w13_bias": experts.w13_bias,
        "w2_bias": experts.w2_bias,
        "w13_scale": None if experts.quant is None else experts.quant.w13_scale,
        "w2_scale": None if experts.quant is None else experts.quant.w2_scale,
        "shared_w13": None if shared is None else shared.expert.w13[0],
        "shared_w2": None if shared is None else shared.expert.w2[0],
        "shared_gate": None if shared is None else shared.gate,
        "expert_map": layer.expert_map,
        "routing": layer.routing,
        "external": layer.setting.uses_external_experts,
        "function": (str(function.kind), function.alpha, function.limit, function.interleaved),
    }


def _is_layer(right: Expected) -> Callable[[MoELayer], str]:
    """The layer's parts are these, in dtype and bits, and it has no others."""
    right = {"function": ("silu", 1.702, 7.0, False), "external": False, **right}

    def wrong(found: MoELayer) -> str:
        for name, own in _parts(found).items():
            expected = right.get(name)
            if isinstance(own, Tensor) and isinstance(expected, Tensor):
                if own.dtype != expected.dtype or own.shape != expected.shape:
                    return f"{name} is {list(own.shape)} {own.dtype}, expected {list(expected.shape)} {expected.dtype}"
                if not torch.equal(own.double().nan_to_num(), expected.double().nan_to_num()):
                    return f"{name} is {own.flatten()[:4]}, expected {expected.flatten()[:4]}"
            elif own is not expected and own != expected:
                return f"{name} is {own}, expected {expected}"
        return ""

    return wrong


def _checkpoint_call() -> PublicCall:
    models = {
        "Mixtral": _mixtral(),
        **{f"Mixtral, rank {rank} of 2": _mixtral(rank, 2) for rank in (0, 1)},
        "Qwen3's experts of the second rank": _qwen3(),
        "Qwen3, renormalised": _qwen3(norm_topk_prob=True),
        "Qwen2": _qwen2(),
        "Qwen2, rank 1 of 2": _qwen2(1, 2),
        "Qwen2's experts of the first rank": _qwen2(ep_size=2),
        "DeepSeek-V3": _deepseek(),
        "DeepSeek-V3 in blocks of fp8": _deepseek(BLOCK),
        "gpt-oss": _gpt_oss(),
        **{f"gpt-oss, rank {rank} of 2": _gpt_oss(rank, 2) for rank in (0, 1)},
        "gpt-oss in MXFP4": _gpt_oss(has_bits=4),
        "gpt-oss in MXFP4, rank 1 of 2": _gpt_oss(1, 2, has_bits=4),
    }
    good, _ = models["Mixtral"]
    return PublicCall(
        "checkpoint.load_layer",
        load_layer,
        lambda: dict(good),
        {},
        answers=[Answer(name, _is_layer(right), put(**arguments)) for name, (arguments, right) in models.items()],
    )


def _mxfp4_call() -> PublicCall:
    """Every byte beside scales of small, large and no numbers."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.tensor([60, 100, 118, 125, 126, 127, 128, 129, 130, 140, 200, 230, 250, 255, 127, 255])

    def wrong(found: Tensor) -> str:
        right = _from_mxfp4(blocks, scales).float()
        same = found.shape == right.shape and torch.equal(found.nan_to_num(7.7), right.nan_to_num(7.7))
        return (
            ""
            if same and found.dtype == torch.float32
            else f"expected {right.flatten()[:4]}, got {found.flatten()[:4]}"
        )

    return PublicCall(
        "mxfp4.dequantize_mxfp4",
        dequantize_mxfp4,
        lambda: {"blocks": blocks, "scales": scales.to(torch.uint8), "dtype": torch.float32},
        {},
        answers=[Answer("every number", wrong)],
    )


# --- adapters ----------------------------------------------------------------------------------------------------

_RANK, _ALPHA = 2, 12
_EXPERTS = f"base_model.model.model.layers.{LAYER}.mlp.experts."
Pair = tuple[Tensor, Tensor]


def _pair(name: str, n: int, k: int, rank: int = _RANK) -> Pair:
    return _numbers(f"a {name}", rank, k), _numbers(f"b {name}", n, rank)


def _adapter_of(entries: Entries, **config: Any) -> Change:
    """A call on a folder with these entries, as PEFT saves them."""

    def change(good: Arguments) -> Arguments:
        folder = Path(f"adapter-{len(os.listdir())}")
        folder.mkdir()
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "lora_alpha": _ALPHA, "r": _RANK} | config)
        )
        save_file({name: entry.contiguous() for name, entry in entries.items()}, folder / "adapter_model.safetensors")
        return good | {"folder": folder}

    return change


def _is_adapter(right: Mapping[tuple[str, int], tuple[Tensor, Tensor, float]]) -> Callable[[Any], str]:
    def wrong(found: Any) -> str:
        own = {(projection, expert): pair for projection, expert, pair in found.entries()}
        if own.keys() != right.keys():
            return f"expected {sorted(right)}, got {sorted(own)}"
        for place, (a, b, scale) in right.items():
            pair = own[place]
            if not (torch.equal(pair.a, a) and torch.equal(pair.b, b)) or abs(pair.scale - scale) > 1e-9:
                return f"{place} has other numbers, or the scale {pair.scale} and not {scale}"
        return ""

    return wrong


def _modules(names: Sequence[str]) -> tuple[Entries, dict[tuple[str, int], tuple[Tensor, Tensor, float]]]:
    """A module for each expert and projection, of experts 0 and 2; down's of twice the rank."""
    entries, right = {}, {}
    sizes = zip(("gate", "up", "down"), names, ((I, H), (I, H), (H, I)), strict=True)
    for projection, name, (n, k) in sizes:
        for expert in (0, 2):
            rank = 2 * _RANK if projection == "down" else _RANK
            a, b = _pair(f"{projection} {expert}", n, k, rank)
            entries[f"{_EXPERTS}{expert}.{name}.lora_A.weight"] = a
            entries[f"{_EXPERTS}{expert}.{name}.lora_B.weight"] = b
            right[projection, expert] = (a, b, _ALPHA / rank)
    return entries, right


def _stacked(turned: bool) -> tuple[Entries, dict[tuple[str, int], tuple[Tensor, Tensor, float]]]:
    """Parameters with all experts: A has one expert after the other, B's columns run over the experts first."""
    entries, right = {}, {}
    for projection, deeper, (n, k) in (("gate_up", "", (2 * I, H)), ("down", "base_layer.", (H, I))):
        pairs = [_pair(f"{projection} {expert}", n, k) for expert in range(E)]
        first, second = (
            ([b.T for _, b in pairs], [a.T for a, _ in pairs]) if turned else tuple(zip(*pairs, strict=True))
        )
        entries[f"{_EXPERTS}{deeper}lora_A.weight"] = torch.cat(list(first))
        entries[f"{_EXPERTS}{deeper}lora_B.weight"] = torch.stack(list(second), dim=2).flatten(1)
        right |= {(projection, expert): (a, b, _ALPHA / _RANK) for expert, (a, b) in enumerate(pairs)}
    return entries, right


def _adapter_call() -> PublicCall:
    entries, right = _modules(_QWEN)
    mixtral, of_mixtral = _modules(_MIXTRAL)
    patterned = {
        (name, expert): (a, b, (5 if name == "up" else _ALPHA) / len(a)) for (name, expert), (a, b, _) in right.items()
    }
    stabilised = {place: (a, b, _ALPHA / len(a) ** 0.5) for place, (a, b, _) in right.items()}
    rows_first, of_rows = _stacked(turned=False)
    columns_first, of_columns = _stacked(turned=True)
    elsewhere = {name.replace(f"layers.{LAYER}", "layers.1"): entry for name, entry in entries.items()}
    return PublicCall(
        "lora.peft.load_peft",
        load_peft,
        lambda: _adapter_of(entries)({"layer": LAYER, "num_experts": E, "hidden_size": H, "intermediate_size": I}),
        {},
        answers=[
            Answer("a module for each", _is_adapter(right)),
            Answer("Mixtral's names", _is_adapter(of_mixtral), _adapter_of(mixtral)),
            Answer("a pattern's alpha", _is_adapter(patterned), _adapter_of(entries, alpha_pattern={"up_proj": 5})),
            Answer("rsLoRA", _is_adapter(stabilised), _adapter_of(entries, use_rslora=True)),
            Answer("stacked parameters", _is_adapter(of_rows), _adapter_of(rows_first)),
            Answer("stacked parameters, rows for columns", _is_adapter(of_columns), _adapter_of(columns_first)),
            Answer("another layer's", _is_adapter({}), _adapter_of(elsewhere)),
        ],
    )


# --- tiles -------------------------------------------------------------------------------------------------------

_H200 = replace(Platform.parse("cuda:9.0"), name="NVIDIA H200")
_PUBLIC, _NATIVE = (
    "E=8,N=32,device_name=NVIDIA_H200.json",
    "E=8,N=32,H=64,top_k=2,device_name=NVIDIA_H200.json",
)


def _tile(m: int, n: int, k: int, stages: int = 2) -> dict[str, int]:
    sizes = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k}
    return sizes | {"GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": stages}


def _native(w13: Mapping[str, int], w2: Mapping[str, int]) -> dict[str, Any]:
    return {"format": "moegate", "version": 1, "tokens": {"4": {"w13": w13, "w2": w2}}}


_SMALL, _OTHER, _LARGE = _tile(16, 32, 64), _tile(16, 64, 32), _tile(16, 512, 512, stages=8)


def _found(folders: Sequence[Mapping[str, Any]]) -> list[tuple[int, int] | str]:
    """`block_size_n` of both GEMMs' tiles, or that they are the default ones, folder after folder in one process."""
    found: list[tuple[int, int] | str] = []
    lookup.forget()
    for files in folders:
        with TemporaryDirectory() as folder, mock.patch.dict(os.environ, {lookup.FOLDER_VARIABLE: folder}):
            for name, content in files.items():
                (Path(folder) / name).write_text(json.dumps(content))
            tiles = lookup.find_kernel_configs(
                num_tokens=4,
                top_k=2,
                num_experts=8,
                hidden_size=64,
                intermediate_size=32,
                dtype=torch.bfloat16,
                platform=_H200,
            )
        found.append("default" if tiles.source == "default" else (tiles.w13.block_size_n, tiles.w2.block_size_n))
    return found


def _tile_calls() -> list[PublicCall]:
    public, native = {_PUBLIC: {"4": _SMALL}}, {_NATIVE: _native(_SMALL, _OTHER)}
    return [
        PublicCall(
            "tuning.lookup.find_kernel_configs",
            _found,
            lambda: {"folders": [public]},
            {},
            answers=[
                Answer("a public file", equals([(32, 32)])),
                Answer("a native file, before a public one", equals([(32, 64)]), put(folders=[public | native])),
                Answer(
                    "another folder, in the same process",
                    equals([(32, 32), (64, 64), "default", (32, 32)]),
                    put(folders=[public, {_PUBLIC: {"4": _OTHER}}, {}, public]),
                ),
                *(
                    Answer(f"too large a tile of {which}", equals(["default"]), put(folders=[{_NATIVE: content}]))
                    for which, content in (("w13", _native(_LARGE, _SMALL)), ("w2", _native(_SMALL, _LARGE)))
                ),
            ],
        ),
        PublicCall(
            "tuning.lookup.config_folders",
            lookup.config_folders,
            lambda: {"environment": {}},
            {},
            answers=[
                Answer("the shipped one", equals((lookup.SHIPPED,))),
                Answer("none by an empty name", equals((lookup.SHIPPED,)), _folder("")),
                Answer("the user's first", equals((Path("/tmp"), lookup.SHIPPED)), _folder("/tmp")),
                Answer("the user's home", equals((Path.home(), lookup.SHIPPED)), _folder("~")),
            ],
        ),
    ]


def _folder(name: str) -> Change:
    return put(environment={lookup.FOLDER_VARIABLE: name})


LOADED_CALLS: tuple[PublicCall, ...] = (_checkpoint_call(), _mxfp4_call(), _adapter_call(), *_tile_calls())
