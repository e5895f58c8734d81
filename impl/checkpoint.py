"""A layer from a checkpoint, by the names that public ones use: safetensors files or a state dict.

The entries of the layer are looked at before any is read; all that is missing, unexpected or misshapen is one error.
What is read is cut to this rank's shard, put in the order of the kernels (gate rows, then up rows; `[out, in]`), and
prepared once for the backend that the oracle takes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .checkpoint_models import LayerPlan, plan_of
from .checks import FLOATS, expect_bool, expect_device, expect_dtype, expect_instance, expect_int
from .config import MoEConfig, ParallelConfig, QuantScheme
from .experts_module import RoutedExperts, SharedExperts
from .layer import Gate, MoELayer
from .mxfp4 import BLOCK, dequantize_mxfp4
from .once import log_once
from .parallel.placement import linear_placement
from .quantization import ExpertsQuantization
from .shared_experts import SharedExpertsSetting

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
_FP8, _BYTES = (torch.float8_e4m3fn,), (torch.uint8,)


class CheckpointError(ValueError):
    """A checkpoint whose entries are not those of the layer.

    Attributes:
        missing: names that are not there.
        unexpected: names below the layer's prefix that nothing asks for.
        misshapen: what is there in another shape or dtype, with what was expected.
    """

    def __init__(self, prefix: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
        self.missing, self.unexpected, self.misshapen = missing, unexpected, misshapen
        parts = [
            f"{len(names)} {what}: {', '.join(names)}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
            if names
        ]
        super().__init__(f"checkpoint: expected the entries of the layer at {prefix!r}, got {'; '.join(parts)}")


# --- where entries come from -------------------------------------------------------------------------------------


class _Source(Protocol):
    """Entries by name; their shapes are known without reading them."""

    def names(self) -> Sequence[str]: ...

    def form(self, name: str) -> tuple[Shape, torch.dtype]: ...

    def read(self, name: str) -> torch.Tensor: ...


class _StateDict:
    def __init__(self, entries: Mapping[str, torch.Tensor]) -> None:
        self.entries = entries

    def names(self) -> Sequence[str]:
        return list(self.entries)

    def form(self, name: str) -> tuple[Shape, torch.dtype]:
        return tuple(self.entries[name].shape), self.entries[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self.entries[name]


_SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F64": torch.float64,
}


class _Safetensors:
    """Some files, each opened once and mapped into memory: only what is asked for is read."""

    def __init__(self, files: Sequence[Path]) -> None:
        from safetensors import safe_open

        self._where: dict[str, Any] = {}
        for file in files:
            with readable(file):
                handle = safe_open(file, framework="pt", device="cpu")
            for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                if name in self._where:
                    raise ValueError(f"checkpoint: expected each entry in one file, got {name} in two")
                self._where[name] = handle

    def names(self) -> Sequence[str]:
        return list(self._where)

    def form(self, name: str) -> tuple[Shape, torch.dtype]:
        found = self._where[name].get_slice(name)
        dtype = _SAFETENSORS_DTYPES.get(found.get_dtype())
        return tuple(found.get_shape()), self.read(name).dtype if dtype is None else dtype

    def read(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """What safetensors says of a file that it refuses (a header that lies, say), as an error with the file's name.

    Raises:
        ValueError: the file, and what is wrong with it.
    """
    from safetensors import SafetensorError

    if not file.is_file():  # opening a pipe would wait for its writer
        raise ValueError(f"{ascii(str(file))[1:-1]}: expected a safetensors file, got something else or nothing")
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{ascii(str(file))[1:-1]}: expected a safetensors file, got another: {error}") from error


def _source_of(checkpoint: Any) -> _Source:
    if isinstance(checkpoint, Mapping):
        for name, entry in checkpoint.items():
            if not (isinstance(name, str) and isinstance(entry, torch.Tensor)):
                wanted = f"checkpoint[{name!a:.80}]: expected a tensor by name"
                raise TypeError(f"{wanted}, got {type(entry).__name__} by {type(name).__name__}")
        return _StateDict(checkpoint)
    if not isinstance(checkpoint, (str, Path)):
        raise TypeError(f"checkpoint: expected a state dict, a file or a folder, got {type(checkpoint).__name__}")
    path = Path(checkpoint)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"checkpoint: expected safetensors files, got {str(path)!r}, which has none")
    return _Safetensors(files)


# --- what a layer's entries are ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One entry: its shape, the dtypes that it may have, and whether this rank needs it."""

    shape: Shape
    dtypes: tuple[torch.dtype, ...] = FLOATS
    is_needed: bool = True


def _layout(plan: LayerPlan, names: set[str], prefix: str) -> str:
    """How the experts are stored: "each" in entries of its own, "stacked", or stacked in "mxfp4"."""
    if f"{prefix}experts.gate_up_proj_blocks" in names:
        return "mxfp4"
    return "stacked" if plan.is_transposed or f"{prefix}experts.gate_up_proj" in names else "each"


def _scale_shape(shape: Shape, block: tuple[int, int]) -> Shape:
    return tuple(-(-size // of) for size, of in zip(shape, block, strict=True))


def _entries(plan: LayerPlan, layout: str, experts: Sequence[int]) -> dict[str, _Entry]:
    """Every entry below the layer's prefix, by its name there."""
    names, E, H, I = plan.names, plan.num_experts, plan.hidden_size, plan.intermediate_size
    found = {f"{names.router}weight": _Entry((E, H))}
    if plan.has_router_bias:
        found[f"{names.router}bias"] = _Entry((E,))
    if plan.has_correction_bias:
        found[f"{names.router}e_score_correction_bias"] = _Entry((E,))

    def linear(name: str, shape: Shape, *, is_needed: bool = True) -> None:
        block = plan.block_shape
        found[f"{name}.weight"] = _Entry(shape, FLOATS if block is None else _FP8, is_needed)
        if block is not None:
            found[f"{name}.weight_scale_inv"] = _Entry(_scale_shape(shape, block), FLOATS, is_needed)

    if layout == "each":
        for expert in range(E):
            here = expert in experts
            for name, shape in ((names.gate, (I, H)), (names.up, (I, H)), (names.down, (H, I))):
                linear(f"experts.{expert}.{name}", shape, is_needed=here)
    else:
        for name, rows, columns in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
            if layout == "mxfp4":
                blocks = columns // BLOCK
                found[f"experts.{name}_blocks"] = _Entry((E, rows, blocks, BLOCK // 2), _BYTES)
                found[f"experts.{name}_scales"] = _Entry((E, rows, blocks), _BYTES)
            else:
                found[f"experts.{name}"] = _Entry((E, columns, rows) if plan.is_transposed else (E, rows, columns))
            if plan.has_bias:
                found[f"experts.{name}_bias"] = _Entry((E, rows))
    if plan.shared_size:
        shapes = {
            "gate_proj": (plan.shared_size, H),
            "up_proj": (plan.shared_size, H),
            "down_proj": (H, plan.shared_size),
        }
        for name, shape in shapes.items():
            linear(f"{names.shared}{name}", shape)
        if plan.shared_is_gated:
            found[names.shared_gate] = _Entry((1, H))
    return found


def _check(source: _Source, prefix: str, entries: Mapping[str, _Entry]) -> None:
    there = {name.removeprefix(prefix) for name in source.names() if name.startswith(prefix)}
    missing = [name for name, entry in entries.items() if entry.is_needed and name not in there]
    misshapen = []
    for name, entry in entries.items():
        if name not in there:
            continue
        shape, dtype = source.form(prefix + name)
        if shape != entry.shape or dtype not in entry.dtypes:
            wanted = " or ".join(str(dtype) for dtype in entry.dtypes)
            misshapen.append(f"{name} (expected {list(entry.shape)} {wanted}, got {list(shape)} {dtype})")
    unexpected = sorted(there - set(entries), key=_natural)
    if missing or misshapen or unexpected:
        raise CheckpointError(prefix, missing, unexpected, misshapen)


def _natural(name: str) -> list[Any]:
    """Sorts expert 10 behind expert 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    """This rank's part of `size` columns of I."""

    rank: int
    count: int

    def of(self, size: int) -> slice:
        part = size // self.count
        return slice(self.rank * part, (self.rank + 1) * part)


class _Reader:
    """Entries of one layer, cut to one rank."""

    def __init__(
        self, source: _Source, prefix: str, plan: LayerPlan, shard: _Shard, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.source, self.prefix, self.plan, self.shard = source, prefix, plan, shard
        self.dtype, self.device = dtype, device

    def plain(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A whole entry, always a copy: nothing here is the caller's memory."""
        found = self.source.read(self.prefix + name)
        return found.to(device=self.device, dtype=self.dtype if dtype is None else dtype, copy=True).contiguous()

    def mlp(self, gate: str, up: str, down: str, size: int) -> Iterator[torch.Tensor]:
        """w13 `[2I, H]` and w2 `[H, I]` of this rank, and behind them their scales where weights are fp8."""
        part = self.shard.of(size)
        block = self.plan.block_shape
        suffixes = [("weight", (1, 1))] if block is None else [("weight", (1, 1)), ("weight_scale_inv", block)]
        for suffix, (rows, columns) in suffixes:
            dtype = self.dtype if block is None else torch.float32 if suffix != "weight" else torch.float8_e4m3fn
            of_rows = slice(part.start // rows, -(-part.stop // rows))
            of_columns = slice(part.start // columns, -(-part.stop // columns))
            read = [self.source.read(f"{self.prefix}{name}.{suffix}") for name in (gate, up, down)]
            yield torch.cat([read[0][of_rows], read[1][of_rows]]).to(self.device, dtype)
            yield read[2][:, of_columns].to(self.device, dtype, copy=True).contiguous()

    def experts(self, layout: str, experts: Sequence[int], options: dict[str, Any]) -> RoutedExperts:
        """The experts of this rank."""
        plan = self.plan
        if layout == "each":
            names, stacks = plan.names, None
            for expert in experts:
                of_expert = [f"experts.{expert}.{name}" for name in (names.gate, names.up, names.down)]
                parts = list(self.mlp(*of_expert, plan.intermediate_size))
                # Allocated once and filled: a list of all experts and their stack would be twice the layer.
                stacks = stacks or [part.new_empty((len(experts), *part.shape)) for part in parts]
                for stack, part in zip(stacks, parts, strict=True):
                    stack[experts.index(expert)] = part
            w13, w2, *scales = stacks or []
            return RoutedExperts(w13, w2, dtype=self.dtype, quant=_quantization(plan, scales), **options)
        biases = {}
        if plan.has_bias:
            biases["w13_bias"] = self._gate_first(self._of("gate_up_proj_bias", experts))
            biases["w2_bias"] = self._of("down_proj_bias", experts)
            if self.shard.rank:
                biases["w2_bias"].zero_()  # the sum over ranks adds it once
        if layout == "mxfp4":
            gate_up, down = (self._dequantized(name, experts) for name in ("gate_up_proj", "down_proj"))
        else:
            gate_up, down = (self._of(name, experts) for name in ("gate_up_proj", "down_proj"))
            if plan.is_transposed:
                gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        w2 = down[:, :, self.shard.of(plan.intermediate_size)].contiguous()
        return RoutedExperts(self._gate_first(gate_up), w2, dtype=self.dtype, **biases, **options)

    def _of(self, name: str, experts: Sequence[int]) -> torch.Tensor:
        """A stacked entry of this rank's experts."""
        found = self.source.read(f"{self.prefix}experts.{name}")
        return found[list(experts)].to(self.device, self.dtype)

    def _gate_first(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`[E, 2I, …]` cut to this rank, gate rows first where they alternate."""
        gate, up = (gate_up[:, 0::2], gate_up[:, 1::2]) if self.plan.is_transposed else gate_up.chunk(2, dim=1)
        part = self.shard.of(self.plan.intermediate_size)
        return torch.cat([gate[:, part], up[:, part]], dim=1).contiguous()

    def _dequantized(self, name: str, experts: Sequence[int]) -> torch.Tensor:
        blocks, scales = (
            self.source.read(f"{self.prefix}experts.{name}_{part}")[list(experts)].to(self.device)
            for part in ("blocks", "scales")
        )
        return dequantize_mxfp4(blocks, scales, self.dtype)

    def shared(self, options: dict[str, Any]) -> SharedExperts | None:
        """The shared experts of this rank; None without any."""
        plan, names = self.plan, self.plan.names
        if not plan.shared_size:
            return None
        of_shared = [f"{names.shared}{name}" for name in ("gate_proj", "up_proj", "down_proj")]
        w13, w2, *scales = self.mlp(*of_shared, plan.shared_size)
        gate = self.plain(names.shared_gate, options.pop("gate_dtype")) if plan.shared_is_gated else None
        options.pop("gate_dtype", None)
        quant = _quantization(plan, [scale[None] for scale in scales])
        return SharedExperts(w13, w2, gate=gate, quant=quant, dtype=self.dtype, **options)


def _quantization(plan: LayerPlan, scales: Sequence[torch.Tensor]) -> ExpertsQuantization | None:
    if plan.block_shape is None:
        return None
    w13_scale, w2_scale = scales
    return ExpertsQuantization(QuantScheme.FP8_W8A8, w13_scale, w2_scale, block_shape=plan.block_shape)


def _placement(
    plan: LayerPlan, parallel: ParallelConfig, dtype: torch.dtype
) -> tuple[Sequence[int], torch.Tensor | None]:
    """This rank's experts, by the linear placement, and the map to them; the sizes are checked on the way."""
    # Made for its checks alone.
    MoEConfig(
        num_experts=plan.num_experts,
        top_k=plan.routing.top_k,
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        dtype=dtype,
        scheme=QuantScheme.NONE if plan.block_shape is None else QuantScheme.FP8_W8A8,
        block_shape=plan.block_shape,
        parallel=parallel,
    )
    if plan.shared_size % parallel.tp_size:
        raise ValueError(f"tp_size: expected a divisor of the shared size {plan.shared_size}, got {parallel.tp_size}")
    if parallel.tp_size > 1 and plan.block_shape is not None:
        part = plan.shared_size // parallel.tp_size
        if any(part % size for size in plan.block_shape):
            raise ValueError(
                f"tp_size: expected shards of whole blocks of {plan.block_shape}, got {part} of the shared size "
                f"{plan.shared_size}"
            )
    placement = linear_placement(plan.num_experts, parallel.ep_size)
    experts = placement.experts_of_rank[parallel.ep_rank]
    # Without copies an expert's physical id is its logical one.
    return experts, None if parallel.ep_size == 1 else placement.expert_map(parallel.ep_rank)


def load_layer(
    checkpoint: Mapping[str, torch.Tensor] | str | Path,
    config: Mapping[str, Any],
    *,
    layer: int = 0,
    prefix: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    router_dtype: torch.dtype | None = None,
    parallel: ParallelConfig | None = None,
    backend: str = "auto",
    prepare: bool = True,
    **options: Any,
) -> MoELayer:
    """A MoE layer of a public checkpoint, for one rank.

    Stacked, interleaved and transposed weights become `[E, 2I, H]` with gate rows first. fp8 weights with scales in
    blocks stay as they are. MXFP4 blocks are dequantised, which is logged and kept in the layer's `loading_notes`.

    Args:
        checkpoint: a state dict, a safetensors file, or a folder of them.
        config: the model's `config.json`.
        layer: its number.
        prefix: of the layer's entries; None takes the public name of the layer, "" a state dict of the block alone.
        dtype: of the activations, and of weights that are not quantised.
        device: where to put it.
        router_dtype: of the router's and the shared gate's logits; None: float32 for DeepSeek-V3, else `dtype`.
        parallel: this rank's place. Tensor parallelism divides I of routed and shared experts; expert parallelism the
            experts, linearly, and each rank holds the shared experts whole, as external ones, which are not summed.
        backend: of the experts.
        prepare: run it once (`MoELayer.prepare`).
        options: `MoELayer`'s other arguments.

    Raises:
        CheckpointError: entries that are missing, unexpected or misshapen, all of them.
        TypeError, ValueError: an argument that is wrong, by name.
    """
    plan = plan_of(config)
    expect_int("layer", layer, low=0)
    expect_instance("prefix", prefix, str, optional=True)
    expect_instance("parallel", parallel, ParallelConfig, optional=True)
    parallel = ParallelConfig() if parallel is None else parallel
    expect_dtype("dtype", dtype)
    expect_dtype("router_dtype", router_dtype, optional=True)
    expect_bool("prepare", prepare)
    device = expect_device("device", device)
    experts, expert_map = _placement(plan, parallel, dtype)
    source = _source_of(checkpoint)
    prefix = plan.names.block.format(layer=layer) if prefix is None else prefix
    layout = _layout(plan, set(source.names()), prefix)
    _check(source, prefix, _entries(plan, layout, experts))

    if router_dtype is None:
        router_dtype = torch.float32 if plan.has_correction_bias else dtype
    reader = _Reader(source, prefix, plan, _Shard(parallel.tp_rank, parallel.tp_size), dtype, device)
    router = plan.names.router
    gate = Gate(
        reader.plain(f"{router}weight", router_dtype),
        reader.plain(f"{router}bias", router_dtype) if plan.has_router_bias else None,
        reader.plain(f"{router}e_score_correction_bias", torch.float32) if plan.has_correction_bias else None,
    )
    function = {"activation": plan.activation, "backend": backend}
    if plan.activation == "swigluoai":
        function |= {"swiglu_alpha": plan.swiglu_alpha, "swiglu_limit": plan.swiglu_limit}
    shared = reader.shared(function | {"gate_dtype": router_dtype})
    if "setting" not in options and shared is not None:
        options["setting"] = SharedExpertsSetting(uses_external_experts=parallel.ep_size > 1)
    loaded = MoELayer(
        gate,
        reader.experts(layout, experts, function),
        plan.routing,
        shared_experts=shared,
        expert_map=None if expert_map is None else expert_map.to(device),
        **options,
    )
    if layout == "mxfp4":
        note = f"MXFP4 experts were dequantised to {dtype} on load: moegate multiplies no 4-bit floats"
        loaded.loading_notes = (note,)
        log_once(logger, logging.WARNING, note)
    return loaded.prepare() if prepare else loaded
