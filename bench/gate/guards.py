"""What is guarded without a clock: paths, launches, bytes, decisions for other platforms, registers and spills.

One side's process describes itself (`Described`), and two descriptions are compared. A fast path that is lost changes
no number and may cost less than the clock can see; here it is a difference between two words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch

from ...impl.config import ActivationFormat, MoEConfig, ParallelConfig, QuantScheme
from ...impl.oracle.available import every_kernel
from ...impl.oracle.decision import BackendRefusedError
from ...impl.oracle.select import select_backend
from ...impl.platform import Platform
from ...impl.shared_experts import SharedExpertsSetting, shared_experts_order
from ..ahead_of_time import Imagined, compile_launch, imagine_workload, resources
from ..floor import activation_bytes, adapter_bytes, expert_bytes
from ..workloads import Workload
from .record import Change

PLATFORMS = ("cuda:8.0", "cuda:9.0", "cuda:10.0", "rocm:gfx942")
_ORACLE_PLATFORMS = (*PLATFORMS, "xpu", "cpu")
_COMPILED_FOR = "cuda:9.0"
# A path's words; a change of tiles is printed and fails nothing, as tuning is what changes them.
_FAILING_FACTS = ("backend", "assignment", "shared_experts_order", "routing")
_PRINTED_FACTS = ("config", "config_w2")
_BYTES_TOLERANCE = 0.005
_ORDER_TOKENS = (1, 64, 256, 2048, 2049, 16384)


@dataclass(frozen=True)
class Described:
    """What one side says of itself.

    Attributes:
        paths: by "PLATFORM WORKLOAD": facts, `launches` by kernel, and `bytes` over the bytes needed.
        decisions: by question, the answer.
        kernels: by "PLATFORM WORKLOAD kernel": registers and spilled bytes.
    """

    paths: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    decisions: Mapping[str, str] = field(default_factory=dict)
    kernels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def describe(
    workloads: Sequence[Workload], *, compiled: int = 0, platforms: Sequence[str] = PLATFORMS
) -> dict[str, Any]:
    """What this process's moegate would do with the workloads on platforms that need not be here; as data.

    Args:
        workloads: what to imagine.
        compiled: how many kernel variants to compile for registers and spills, at most.
        platforms: where.
    """
    paths, kernels, seen = {}, {}, set()
    for workload in workloads:
        for name in platforms:
            platform = Platform.parse(name)
            try:
                imagined = imagine_workload(workload, platform)
            except ValueError as refusal:  # this platform has no such experts; that too may change
                paths[f"{name} {workload.id}"] = {"refusal": str(refusal)[:200], "launches": {}}
                continue
            paths[f"{name} {workload.id}"] = facts_of(imagined.path.as_dict()) | {
                "bytes": round(bytes_over_needed(workload, imagined.path.as_dict()), 4)
            }
            if name == _COMPILED_FOR:
                for key, launch in _variants(workload, imagined):
                    if len(seen) < compiled and launch.key not in seen:
                        seen.add(launch.key)
                        compiled_kernel = compile_launch(platform, launch)
                        kernels[f"{name} {key}"] = resources(compiled_kernel.asm["cubin"]) | {
                            "warps": compiled_kernel.metadata.num_warps
                        }
    return {"paths": paths, "decisions": decisions(), "kernels": kernels}


def _variants(workload: Workload, imagined: Imagined) -> Iterable[tuple[str, Any]]:
    counts: dict[str, int] = {}
    for launch in imagined.launches:
        name = launch.kernel.__name__
        counts[name] = counts.get(name, 0) + 1
        yield f"{workload.model.name} {workload.stored} M={workload.num_tokens} {name} {counts[name]}", launch


def facts_of(path: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of a recorded path (`PathRecord.as_dict`): its last word on each matter, and the launches."""
    facts = {name: path[name][-1] for name in (*_FAILING_FACTS, *_PRINTED_FACTS) if path.get(name)}
    return facts | {"launches": dict(path.get("launches", {}))}


def bytes_over_needed(workload: Workload, path: Mapping[str, Any]) -> float:
    """The bytes that a layer's blocks ask for over those that it needs (`floor`), on average of one call.

    Each block of rows reads its expert's weights, whatever the cache then holds; without an alignment each pair is a
    block. What passes between the kernels is written and read once.
    """
    model = workload.model
    rows = workload.rows_by_local_expert()
    each_way = activation_bytes(workload) + adapter_bytes(workload)
    needed = int((rows > 0).sum()) * expert_bytes(workload) + each_way
    config = (path.get("config") or [{}])[-1]
    block = int(config.get("block_size_m", 1)) if (path.get("assignment") or [""])[-1] != "naive" else 1
    blocks = int((-(-rows // block)).sum())
    between = int(rows.sum()) * (model.w13_rows + model.intermediate_size + model.hidden_size)
    moved = blocks * expert_bytes(workload) + each_way + 2 * between * workload.torch_dtype.itemsize
    return moved / needed


@lru_cache(maxsize=1)
def decisions() -> dict[str, str]:
    """The oracle's backend for every kind of layer on every platform, and when shared experts run there."""
    answers = {}
    for name in _ORACLE_PLATFORMS:
        platform = Platform.parse(name)
        for question, config in _layers():
            try:
                answer = str(select_backend(config, platform, every_kernel(), None, {}).backend)
            except BackendRefusedError:
                answer = "refused"
            answers[f"backend on {name}: {question}"] = answer
        for question, setting in _settings().items():
            for num_tokens in _ORDER_TOKENS:
                order = shared_experts_order(setting, platform, has_auxiliary_stream=True, num_tokens=num_tokens)
                answers[f"shared experts' order on {name}: {question}, M={num_tokens}"] = str(order.order)
    return answers


def _layers() -> Iterable[tuple[str, MoEConfig]]:
    for ranks, parallel in (("one rank", ParallelConfig()), ("2 data-parallel ranks", ParallelConfig(dp_size=2))):
        for activation_format in ActivationFormat:
            for lora in (False, True):
                for dtype, scheme, block in (
                    (torch.bfloat16, QuantScheme.NONE, None),
                    (torch.float32, QuantScheme.NONE, None),
                    (torch.bfloat16, QuantScheme.FP8_W8A8, (128, 128)),
                ):
                    stored = str(dtype).removeprefix("torch.") if scheme is QuantScheme.NONE else str(scheme)
                    words = (stored, str(activation_format), *(["LoRA"] if lora else []), ranks)
                    yield (
                        ", ".join(words),
                        MoEConfig(
                            num_experts=128,
                            top_k=8,
                            hidden_size=2048,
                            intermediate_size=768,
                            dtype=dtype,
                            scheme=scheme,
                            block_shape=block,
                            activation_format=activation_format,
                            is_lora_enabled=lora,
                            parallel=parallel,
                        ),
                    )


def _settings() -> dict[str, SharedExpertsSetting]:
    return {
        "plain": SharedExpertsSetting(),
        "external experts": SharedExpertsSetting(uses_external_experts=True),
        "run by dispatch": SharedExpertsSetting(dispatch_runs_shared_experts=True),
        "EPLB": SharedExpertsSetting(uses_eplb=True),
        "fully sharded LoRA": SharedExpertsSetting(fully_sharded_lora=True),
    }


def compare_paths(where: str, base: Mapping[str, Any], head: Mapping[str, Any]) -> list[Change]:
    """What differs between two paths of one call, each as `facts_of` gives it."""
    changes = []
    for name in (*_FAILING_FACTS, *_PRINTED_FACTS, "refusal"):
        if base.get(name) != head.get(name):
            fails = name in _FAILING_FACTS or name == "refusal"
            changes.append(Change(name, where, _plain(base.get(name)), _plain(head.get(name)), fails))
    before, after = base.get("launches", {}), head.get("launches", {})
    if before != after:
        changes.append(Change("launches", where, before, after, sum(after.values()) > sum(before.values())))
    moved, moves = base.get("bytes"), head.get("bytes")
    if moved is not None and moves is not None and abs(moves / moved - 1) > _BYTES_TOLERANCE:
        changes.append(Change("bytes", where, moved, moves, moves > moved))
    return changes


def compare_kernels(base: Mapping[str, Mapping[str, int]], head: Mapping[str, Mapping[str, int]]) -> list[Change]:
    """More spilled bytes fail, and so many more registers that fewer blocks fit; what only one side has is none."""
    changes = []
    for name in base:
        if name not in head:
            continue
        before, after = base[name], head[name]
        crowded = _resident_blocks(after) < _resident_blocks(before)
        for what, fails in (("spilled", after["spilled"] > before["spilled"]), ("registers", crowded)):
            if before[what] != after[what]:
                changes.append(Change("spills" if what == "spilled" else what, name, before[what], after[what], fails))
    return changes


def _resident_blocks(kernel: Mapping[str, int]) -> int:
    """How many blocks the registers of one NVIDIA SM hold: 65,536, given out to warps by 256."""
    a_warp = -(-kernel["registers"] * 32 // 256) * 256
    return 65536 // max(1, a_warp * kernel.get("warps", 4))


def compare(base: Described, head: Described) -> list[Change]:
    """Everything that differs between two sides and belongs to no timed workload.

    A path that changes on every platform alike is said once.
    """
    changes: list[Change] = []
    by_workload: dict[tuple[Any, ...], list[Change]] = {}
    for key in base.paths:
        if key not in head.paths:
            continue
        platform, _, workload = key.partition(" ")
        for change in compare_paths(workload, base.paths[key], head.paths[key]):
            same = (change.what, workload, repr(change.base), repr(change.head))
            by_workload.setdefault(same, []).append(replace(change, where=f"{platform} {workload}"))
    for alike in by_workload.values():
        platforms = ", ".join(change.where.partition(" ")[0] for change in alike)
        changes.append(replace(alike[0], where=f"{platforms}: {alike[0].where.partition(' ')[2]}"))
    for question in sorted({*base.decisions, *head.decisions}):
        before, after = base.decisions.get(question), head.decisions.get(question)
        if before != after:
            changes.append(Change("decision", question, before, after, fails=before is not None))
    return changes + compare_kernels(base.kernels, head.kernels)


def accept(changes: Sequence[Change], patterns: Sequence[str]) -> list[Change]:
    """The changes with those marked that a pattern takes: WHAT, or WHAT:WHERE, each with shell wildcards."""
    return [replace(change, accepted=any(_takes(pattern, change) for pattern in patterns)) for change in changes]


def _takes(pattern: str, change: Change) -> bool:
    what, _, where = pattern.partition(":")
    return fnmatchcase(change.what, what) and (not where or fnmatchcase(change.where, where))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
