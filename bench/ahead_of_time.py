"""What calls would launch on a platform that this machine need not have, and what their kernels compile to there.

A call runs on meta tensors, with the launcher replaced by a recorder and the platform by the imagined one: the path,
the number of launches, the tiles and the kernels' resources are then known without a GPU and without a clock.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime import jit

from ..impl import path
from ..impl.config import Activation, ActivationFunction
from ..impl.experts.base import ExpertsCall
from ..impl.experts.kernel_form import FormDecision
from ..impl.experts.triton_forms import form_of_call
from ..impl.fused_moe import fused_experts
from ..impl.path import PathRecord, record_path
from ..impl.platform import Platform, Vendor
from ..impl.weights import ExpertsWeights
from .adapters import empty_table
from .formats import Format
from .operands import WeightBank
from .workloads import Model, Workload

_GFX = {(9, 0): "gfx90a", (9, 4): "gfx942", (9, 5): "gfx950"}


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: the kernel.
        grid: its programs.
        args: positional arguments.
        meta: constants and options.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Of the variant that is compiled."""
        return f"{self.kernel.__name__} {self.meta}"


@dataclass(frozen=True)
class Imagined:
    """What a call would do.

    Attributes:
        path: decisions and launches.
        launches: each launch.
    """

    path: PathRecord
    launches: list[Launch] = field(default_factory=list)


@contextmanager
def imagine(platform: Platform) -> Iterator[Imagined]:
    """Calls in this block, on meta tensors, take every device for `platform` and launch nothing."""
    with record_path() as record:
        imagined = Imagined(record)

        def launch(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
            record.launches[kernel.__name__] += 1
            imagined.launches.append(Launch(kernel, tuple(grid) if not callable(grid) else (), args, meta))

        with mock.patch.object(path, "launch", launch), mock.patch.object(Platform, "of", return_value=platform):
            yield imagined


def imagine_workload(workload: Workload, platform: Platform) -> Imagined:
    """What our Triton experts would do with a workload's layer on `platform`."""
    bank = _meta_bank(workload.model, workload.format)
    tokens, model, lora = workload.num_tokens, workload.model, workload.lora
    with imagine(platform) as imagined:
        fused_experts(
            torch.empty((tokens, model.hidden_size), dtype=workload.torch_dtype, device="meta"),
            bank.w13,
            bank.w2,
            torch.empty((tokens, model.top_k), dtype=torch.float32, device="meta"),
            torch.empty((tokens, model.top_k), dtype=torch.int32, device="meta"),
            activation=model.activation,
            expert_map=bank.expert_map,
            global_num_experts=model.num_experts,
            w13_bias=bank.w13_bias,
            w2_bias=bank.w2_bias,
            quant=bank.quant,
            interleaved=model.interleaved,
            adapters=None if lora is None else empty_table(model, lora, workload.torch_dtype, torch.device("meta")),
            lora_ids=None if lora is None else torch.empty(tokens, dtype=torch.int32, device="meta"),
            backend="triton",
        )
    return imagined


def form_of_workload(workload: Workload, platform: Platform) -> FormDecision:
    """In which form of the kernels our Triton experts would run a workload's layer on `platform`."""
    bank, model = _meta_bank(workload.model, workload.format), workload.model
    pairs = (workload.num_tokens, model.top_k)
    call = ExpertsCall(
        hidden_states=torch.empty((workload.num_tokens, model.hidden_size), dtype=workload.torch_dtype, device="meta"),
        weights=ExpertsWeights(bank.w13, bank.w2, bank.w13_bias, bank.w2_bias, bank.quant),
        topk_weights=torch.empty(pairs, dtype=torch.float32, device="meta"),
        topk_ids=torch.empty(pairs, dtype=torch.int32, device="meta"),
        activation=ActivationFunction(Activation(model.activation), interleaved=model.interleaved),
        apply_router_weight_on_input=False,
        expert_map=bank.expert_map,
        global_num_experts=model.num_experts,
        allow_tf32=False,
    )
    return form_of_call(call, workload.torch_dtype, platform)


class MetaBank:
    """A layer's parameters without their values."""

    def __init__(self, model: Model, stored: Format) -> None:
        bank = WeightBank(model, stored, torch.device("meta"))
        weights = bank.copy(0)
        self.w13, self.w2, self.quant = weights.w13, weights.w2, weights.quant
        self.w13_bias, self.w2_bias, self.expert_map = weights.w13_bias, weights.w2_bias, bank.expert_map


_meta_bank = lru_cache(maxsize=32)(MetaBank)


def target(platform: Platform) -> GPUTarget:
    """Triton's name for a platform."""
    capability = platform.capability or (0, 0)
    if platform.vendor is Vendor.AMD:
        return GPUTarget("hip", _GFX[capability], 64)
    return GPUTarget("cuda", capability[0] * 10 + capability[1], 32)


def compile_launch(platform: Platform, launch: Launch) -> CompiledKernel:
    """The kernel of a launch as it would be compiled on `platform`; not in a process that interprets kernels."""
    kernel, gpu = launch.kernel, target(platform)
    backend = make_backend(gpu)
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*launch.args, **launch.meta, debug=False, instrumentation_mode="")
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=gpu, options=options.__dict__)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack (where spills live), as cuobjdump reads them off the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        "registers": int(re.findall(r"REG:(\d+)", text)[-1]),
        "spilled": int(re.findall(r"STACK:(\d+)", text)[-1]) + int(re.findall(r"LOCAL:(\d+)", text)[-1]),
    }


def wide_loads_in_flight(cubin: bytes) -> int:
    """The most loads of 16 bytes a thread that a kernel asks for before it multiplies what one of them brought.

    A matrix-vector kernel is as fast as memory where a step's loads are all under way at once. Whether they are is the
    compiler's decision, and nothing but time would show it.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout
    most = run = 0
    for instruction in re.findall(r"\b(LDG\.E\.128|FFMA|FMUL)\b", text):
        run = run + 1 if instruction.startswith("LDG") else 0
        most = max(most, run)
    return most
