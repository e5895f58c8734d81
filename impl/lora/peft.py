"""Adapters from files in PEFT's public layouts: `adapter_config.json` beside `adapter_model.safetensors`.

Two layouts of experts, by their names below a layer's `experts`:

* a module for each expert and projection: `experts.3.gate_proj.lora_A.weight [r, H]`, `.lora_B.weight [I, r]` (Qwen's
  and DeepSeek's names, or Mixtral's w1, w3, w2);
* stacked parameters (`target_parameters`): `experts.lora_A.weight [E * r, K]`, expert after expert, and
  `experts.lora_B.weight [N, r * E]`, whose columns run over the experts first. A second parameter of the same module
  lies one `base_layer.` deeper; which is which their sizes say. Earlier releases took a parameter's rows for its
  columns: such a pair has A over the rows, and is turned round.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checks import FLOATS, expect_int
from .adapter import Adapter, LowRank, lora_scaling

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PROJECTIONS = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
_STACKED = {"gate_up": "gate_up_proj", "down": "down_proj"}
_EXPERTS = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:[a-z_]+\.)?experts\.(.+)$")
_ONE = re.compile(r"(\d+)\.([a-z0-9_]+)\.lora_([AB])\.weight")
_STACK = re.compile(r"((?:base_layer\.)*)lora_([AB])\.weight")


def load_peft(
    folder: str | Path,
    *,
    layer: int,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """The adapter of one layer's experts.

    Args:
        folder: of the two files.
        layer: number of the layer.
        num_experts: E.
        hidden_size: H.
        intermediate_size: I of the whole model; an adapter is not sharded here.
        dtype: to convert to (PEFT often trains and stores float32); None: as stored.

    Returns:
        On the CPU, by global expert; without an entry where the files hold none of this layer's experts.

    Raises:
        FileNotFoundError: no such files.
        TypeError, ValueError: an adapter of another kind (no LoRA, DoRA, with biases), of another model's sizes, an A
            without its B, or a name of this layer's experts that neither layout has: by name.
    """
    expect_int("layer", layer, low=0)
    expect_int("num_experts", num_experts, low=1)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype: expected one of {[str(d) for d in FLOATS]} or None, got {dtype}")
    folder = Path(folder)
    config = json.loads((folder / CONFIG).read_text())
    _expect_lora(config)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (a file is no mapping)
            found = _EXPERTS.search(name)
            if found is not None and int(found[1]) == layer:
                tensor = file.get_tensor(name)
                tensors[found[2]] = tensor if dtype is None else tensor.to(dtype)
                prefix = name[: found.start(2)]
    if not tensors:
        return Adapter(num_experts=num_experts)
    module = prefix.removeprefix("base_model.model.").rstrip(".")
    parts: dict[str, dict[int, LowRank]] = {"gate": {}, "up": {}, "gate_up": {}, "down": {}}
    singles = {name: _ONE.fullmatch(name) for name in tensors}
    stacks = {name: _STACK.fullmatch(name) for name in tensors}
    strange = [name for name in tensors if singles[name] is None and stacks[name] is None]
    if strange:
        raise ValueError(f"{WEIGHTS}: expected lora_A and lora_B of layer {layer}'s experts, got {strange}")
    for name, found in singles.items():
        if found is not None and found[3] == "A":
            expert, projection = int(found[1]), found[2]
            if projection not in _PROJECTIONS or expert >= num_experts:
                raise ValueError(f"{name}: expected one of {sorted(_PROJECTIONS)} of {num_experts} experts")
            a, b = tensors[name], _partner(tensors, name)
            scale = _scale(config, f"{module}.{expert}.{projection}", a.shape[0])
            parts[_PROJECTIONS[projection]][expert] = LowRank(a, b, scale)
    for name, found in stacks.items():
        if found is not None and found[2] == "A":
            part, pairs = _unstacked(
                name, tensors[name], _partner(tensors, name), num_experts, hidden_size, intermediate_size
            )
            if parts[part]:
                raise ValueError(f"{name}: expected one {part} of layer {layer}, got two")
            scale = _scale(config, f"{module}.{_STACKED[part]}", pairs[0][0].shape[0])
            parts[part] = {expert: LowRank(a, b, scale) for expert, (a, b) in enumerate(pairs)}
    lone = [n for n in tensors if "lora_B" in n and n.replace("lora_B", "lora_A") not in tensors]
    if lone:
        raise ValueError(f"{lone[0]}: expected its lora_A beside it, got none")
    return Adapter(**parts, num_experts=num_experts)


def _expect_lora(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: expected 'LORA', got {config.get('peft_type')!r}")
    for name, plain in (("use_dora", False), ("lora_bias", False), ("bias", "none"), ("fan_in_fan_out", False)):
        if config.get(name, plain) not in (plain, None):
            raise ValueError(f"{name}: expected {plain!r}, got {config[name]!r}")


def _partner(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    other = name.replace("lora_A", "lora_B")
    if other not in tensors:
        raise ValueError(f"{name}: expected its lora_B beside it, got none")
    return tensors[other]


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha of the module over its rank; patterns name the ends of modules, as PEFT reads them."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return lora_scaling(alpha, rank, rank_stabilized=bool(config.get("use_rslora")))


def _unstacked(
    name: str, a: torch.Tensor, b: torch.Tensor, num_experts: int, hidden_size: int, intermediate_size: int
) -> tuple[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Which parameter a stacked pair is of, and its matrices by expert."""
    rows, columns = a.shape
    if rows % num_experts or b.shape[1] != rows:
        raise ValueError(
            f"{name}: expected {num_experts} experts of one rank, got shapes {list(a.shape)} and {list(b.shape)}"
        )
    h, i = hidden_size, intermediate_size
    sizes = {("gate_up", False): (h, 2 * i), ("down", False): (i, h), ("gate_up", True): (2 * i, h)}
    sizes[("down", True)] = (h, i)
    found = [which for which, size in sizes.items() if size == (columns, b.shape[0])]
    if not found:
        raise ValueError(
            f"{name}: expected a pair over H {h} and 2I {2 * i}, or I {i}, got A over {columns} and B over {b.shape[0]}"
        )
    part, turned = found[0]
    of_expert = list(a.reshape(num_experts, -1, columns))
    b_of_expert = list(b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1))
    pairs = [(b_e.T, a_e.T) if turned else (a_e, b_e) for a_e, b_e in zip(of_expert, b_of_expert, strict=True)]
    return part, [(x.contiguous(), y.contiguous()) for x, y in pairs]
