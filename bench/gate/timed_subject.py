"""Whose layer is timed: moegate's own, or a class or function in anybody's file, called with a workload's operands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...conformance.arena import Arena
from ...conformance.cases import ExpertsCase
from ...conformance.loading import load_subject
from ...conformance.subject import Subject
from ...conformance.words import reference_arguments
from ..operands import ExpertsCall
from ..peers import load_peer
from ..verification import Verify, verify_by_budget, verify_rows
from ..workloads import Workload
from .sides import MOEGATE

_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


class TimedSubject:
    """A subject as benchmarks call it.

    Args:
        name: "moegate", FILE.py:CLASS of a `Subject`, or FILE.py:FUNCTION with the signature of `ExpertsCall`.

    Attributes:
        experts: the call that is timed.
        verify: its judge, with the numerics that it declares.

    Raises:
        ValueError: no such subject.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.experts: ExpertsCall
        self.verify: Verify = verify_by_budget
        self._subject: Subject | None = None
        if name == MOEGATE:
            from ...impl.fused_moe import fused_experts

            self.experts = fused_experts
            return
        found = _class_in_file(name)
        if found is None:
            _, self.experts = load_peer(name)
            self.verify = verify_rows
            return
        self._subject = found
        if "experts" not in found.facets(found.variants[0]):
            raise ValueError(f"subject: expected a Subject that defines experts, got {name}")
        self.experts = _Adapted(found)
        self.verify = partial(verify_by_budget, numerics=found.numerics)

    def unsupported(self, workload: Workload, device: torch.device) -> str | None:
        """Why the subject does not run a workload, by what it declares; None where it does."""
        if workload.unsupported:
            return workload.unsupported
        if workload.lora is not None and self.name != MOEGATE:
            return f"{self.name} is called without adapters"
        if self._subject is None:
            return None
        subject, can = self._subject, self._subject.capabilities
        model = workload.model
        missing = subject.unavailable(subject.variants[0], device.type)
        if missing:
            return missing
        wanted = {
            "dtypes": (_DTYPE_NAMES[workload.torch_dtype], can.dtypes),
            "schemes": ("none" if not workload.format.is_quantized else workload.dtype, can.schemes),
            "activations": (model.activation, can.activations),
            "maps": ("none" if model.local_experts == model.num_experts else "contiguous", can.maps),
        }
        for what, (value, declared) in wanted.items():
            if value not in declared and not (what == "maps" and value != "none" and set(declared) - {"none"}):
                return f"{subject.name} declares {what} {list(declared)}, not {value}"
        if model.has_bias and set(can.biases) == {"none"}:
            return f"{subject.name} declares no biases"
        return None


def _class_in_file(name: str) -> Subject | None:
    """The subject of a file; None where what is named there is no class."""
    file, _, attribute = name.rpartition(":")
    try:
        return load_subject(name)
    except ValueError:
        if Path(file).is_file() and f"def {attribute}" in Path(file).read_text():
            return None
        raise


class _Adapted:
    """A subject's `experts` under the signature that benchmarks call; its case is made once for each operands."""

    def __init__(self, subject: Subject) -> None:
        self._call: Callable[[ExpertsCase, str], torch.Tensor] = subject.experts
        self._variant = subject.variants[0]
        self._cases: dict[int, tuple[torch.Tensor, ExpertsCase]] = {}

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        held = self._cases.get(id(hidden_states))
        # The tensor is kept beside its case, so that no other one can have its id.
        if held is None or held[0] is not hidden_states:
            if len(self._cases) >= 64:
                self._cases.clear()
            held = self._cases[id(hidden_states)] = (hidden_states, _case(hidden_states, *args, **options))
        return self._call(held[1], self._variant)


def _case(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str,
    expert_map: torch.Tensor | None,
    global_num_experts: int,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    quant: Any = None,
    interleaved: bool = False,
) -> ExpertsCase:
    if quant is not None:
        raise ValueError("quant: expected plain weights, which are what a subject is timed with")
    words = reference_arguments(w13, w2, activation=activation, interleaved=interleaved)
    function = {"activation": words["activation"]} if "activation" in words else {}
    return ExpertsCase(
        hidden_states=hidden_states,
        w13=w13,
        w2=w2,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        num_experts=global_num_experts,
        expert_map=expert_map,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        arena=Arena(),
        **function,
    )
