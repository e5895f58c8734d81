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

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoint import readable
from ..checks import expect_bool, expect_dtype, expect_instance, expect_int, expect_number, shown
from ..json_file import JsonFileError, parse_object, read_bytes
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
_EXPERTS = re.compile(r"(?:^|\.)layers\.([0-9]{1,9})\.(?:[a-z_]+\.)?experts\.(.+)$")
_ONE = re.compile(r"([0-9]{1,9})\.([a-z0-9_]+)\.lora_([AB])\.weight")
# Of an entry or a pattern: what a module's name never reaches.
MAX_NAME = 200
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
        TypeError, ValueError: an argument of another type or range; files that are not there or broken
            (`JsonFileError` for the configuration); an adapter of another kind (no LoRA, DoRA, with biases), of another
            model's sizes, an A without its B, or a name of this layer's experts that neither layout has: by name.
    """
    expect_int("layer", layer, low=0)
    expect_int("num_experts", num_experts, low=1)
    expect_int("hidden_size", hidden_size, low=1)
    expect_int("intermediate_size", intermediate_size, low=1)
    expect_dtype("dtype", dtype, optional=True)
    if not isinstance(folder, (str, Path)) or not Path(folder).is_dir():
        raise ValueError(f"folder: expected a folder with {CONFIG} and {WEIGHTS}, got {shown(folder)}")
    folder = Path(folder)
    config = _config(folder / CONFIG)
    tensors: dict[str, torch.Tensor] = {}
    with readable(folder / WEIGHTS), safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (a file is no mapping)
            found = _EXPERTS.search(name)
            if found is not None and int(found[1]) == layer:
                if len(name) > MAX_NAME or found[2] in tensors:
                    wanted = "a name of sensible length" if len(name) > MAX_NAME else "an entry of this layer once"
                    raise ValueError(f"{_said(name)}: expected {wanted}, got another")
                tensor = file.get_tensor(name)
                tensors[found[2]] = tensor if dtype is None else tensor.to(dtype)
                prefix = name[: found.start(2)]
    if not tensors:
        return Adapter(num_experts=num_experts)
    module = prefix.removeprefix("base_model.model.").rstrip(".")
    parts: dict[str, dict[int, LowRank]] = {"gate": {}, "up": {}, "gate_up": {}, "down": {}}
    h, i = hidden_size, intermediate_size
    sizes = {"gate": (i, h), "up": (i, h), "down": (h, i)}
    singles = {name: _ONE.fullmatch(name) for name in tensors}
    stacks = {name: _STACK.fullmatch(name) for name in tensors}
    strange = [name for name in tensors if singles[name] is None and stacks[name] is None]
    if strange:
        names = ", ".join(map(_said, strange[:8])) + (f" and {len(strange) - 8} more" if len(strange) > 8 else "")
        raise ValueError(f"{WEIGHTS}: expected lora_A and lora_B of layer {layer}'s experts, got {names}")
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            raise ValueError(f"{name}: expected two dimensions, got {list(tensor.shape)}")
    for name, found in singles.items():
        if found is not None and found[3] == "A":
            expert, projection = int(found[1]), found[2]
            if projection not in _PROJECTIONS or expert >= num_experts:
                wanted = f"one of {sorted(_PROJECTIONS)} of {num_experts} experts"
                raise ValueError(f"{name}: expected {wanted}, got {projection} of expert {expert}")
            a, b = tensors[name], _partner(tensors, name)
            n, k = sizes[_PROJECTIONS[projection]]
            if a.shape[1] != k or b.shape[0] != n:
                raise ValueError(
                    f"{name}: expected A over {k} and B over {n}, got shapes {list(a.shape)} and {list(b.shape)}"
                )
            if expert in parts[_PROJECTIONS[projection]]:
                raise ValueError(f"{name}: expected one {_PROJECTIONS[projection]} of expert {expert}, got two")
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


def _config(path: Path) -> dict[str, Any]:
    """The adapter's configuration, checked.

    Raises:
        JsonFileError: the file is not there or no JSON object.
        TypeError, ValueError: another kind of adapter, or a value of another type, by its key.
    """
    content = read_bytes(path)
    if content is None:
        raise JsonFileError(path, "", "expected a file, got none")
    config = parse_object(path, content)
    _expect_lora(config)
    return config


def _expect_lora(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: expected 'LORA', got {config.get('peft_type')!a:.80}")
    for name, plain in (("use_dora", False), ("lora_bias", False), ("bias", "none"), ("fan_in_fan_out", False)):
        if config.get(name, plain) not in (plain, None):
            raise ValueError(f"{name}: expected {plain!r}, got {config[name]!a:.80}")
    expect_number("lora_alpha", config.get("lora_alpha", 8))
    if config.get("use_rslora") is not None:
        expect_bool("use_rslora", config["use_rslora"])
    patterns = config.get("alpha_pattern")
    for pattern, alpha in expect_instance("alpha_pattern", {} if patterns is None else patterns, Mapping).items():
        _expect_pattern(pattern)
        expect_number(f"alpha_pattern[{_said(pattern)}]", alpha)


def _expect_pattern(pattern: str) -> None:
    """Check a pattern that the file brings: one that takes exponentially long is refused before it is tried.

    Nothing unbounded stands around a group, at most two things are unbounded at all, and nothing refers back.
    """
    unbounded = len(re.findall(r"[*+}]", pattern))
    is_simple = len(pattern) <= MAX_NAME and unbounded <= 2 and not re.search(r"\)\s*[*+?{]|\\[0-9]|\(\?", pattern)
    try:
        if is_simple:
            re.compile(pattern)
            return
        why = "one that may take exponentially long"
    except (re.error, OverflowError) as error:
        why = str(error)
    raise ValueError(f"alpha_pattern: expected the simple end of a module's name, got {_said(pattern)}: {why}")


def _said(name: str) -> str:
    """A name from a file for a message: escaped, so that no terminal obeys it, and not without end."""
    return f"{ascii(name)[1:-1]:.200}"


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
    return lora_scaling(alpha, rank, rank_stabilized=config.get("use_rslora") or False)


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
