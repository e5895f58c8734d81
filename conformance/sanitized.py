"""The cases that run under compute-sanitizer: `python -m moegate.conformance.sanitized --subject NAME ...`.

A fixed subset that reaches each kernel family, both ways of assigning blocks, tails, ids of -1, graphs and two streams.
A tool makes kernels many times slower, so cases are few and small, and what judges them runs on the CPU: a spec gives
equal bits on every device, and the tool's time goes into the subject's kernels alone. Before each case its name is
printed, by which the findings that follow are known.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from .cases import build_align, build_batched, build_experts, build_quantize, build_routing
from .device_errors import settle_device
from .guarded import CallError
from .judge import Verdict
from .lora_cases import LoraSpec, build_lora
from .parallel_cases import ParallelSpec, build_parallel
from .properties import ep as parallel_properties
from .properties import lora as lora_properties
from .properties import shared as shared_properties
from .properties.align import judge_alignment
from .properties.batched import judge_rows, reference_of_batched
from .properties.graph import Calls, judge_replays
from .properties.hygiene import INPUTS
from .properties.num import budget_of, judge_values, reference_of
from .properties.quant import judge_quantized
from .properties.route import judge_routing
from .selection import SELECTION
from .session import Session, current_session
from .shared_cases import SharedSpec, build_shared
from .simulated_ranks import run_simulated
from .spec import AlignSpec, BatchedSpec, ExpertsSpec, QuantizeSpec, RoutingSpec, Spec

MARK = "moegate case: "
# The fast forms of the experts are kernels of their own.
SUBJECTS = ("moegate", "moegate:kernel_forms", "moegate:scaled_forms")
# H and I with tails on every tile, and with whole blocks where a scheme has blocks.
RAGGED, WHOLE = {"H": 72, "I": 56}, {"H": 64, "I": 96}
FEW = ExpertsSpec(M=2, **RAGGED, E=32, top_k=2)
MANY = ExpertsSpec(M=19, **RAGGED, E=5, top_k=3)


@dataclass(frozen=True)
class SanitizedCase:
    """One case.

    Attributes:
        name: by which a finding is known.
        spec: of the call.
        how: "graph" captures and replays, "two streams" overlaps; "" calls.
    """

    name: str
    spec: Spec
    how: str = ""

    @property
    def needs_caching(self) -> bool:
        """Nothing can be captured where every allocation goes to the driver, as tools need it to see its ends."""
        return self.how == "graph"

    @property
    def needs_gpu(self) -> bool:
        """Graphs and streams are of a GPU."""
        return bool(self.how)


CASES = (
    SanitizedCase("routing", RoutingSpec(M=5, E=60, top_k=4)),
    SanitizedCase(
        "routing in groups with a bias",
        RoutingSpec(M=5, E=64, top_k=4, scoring="sigmoid", groups="some", correction_bias="unit"),
    ),
    SanitizedCase("alignment", AlignSpec(M=37, E=70, top_k=3)),
    SanitizedCase(
        "alignment with ids of -1 and a map", AlignSpec(M=37, E=8, top_k=2, routing="some_invalid", expert_map="linear")
    ),
    SanitizedCase("few pairs, naive blocks", FEW),
    SanitizedCase("few pairs, without an expert", replace(FEW, routing="all_invalid")),
    SanitizedCase("aligned blocks with tails", replace(MANY, padded_rows=True)),
    SanitizedCase("aligned blocks, ids of -1", replace(MANY, routing="some_invalid", bias="both")),
    SanitizedCase("aligned blocks, an expert map", replace(MANY, E=6, expert_map="arbitrary")),
    SanitizedCase(
        "a tile and one more", replace(MANY, M=33, E=2, top_k=1, routing="tile_plus_1", weight_on_input=True)
    ),
    SanitizedCase("float32, an activation without a gate", replace(MANY, dtype="float32", activation="relu2_no_mul")),
    SanitizedCase("fp8 by channel and token", replace(MANY, **WHOLE, scheme="fp8_channel_token")),
    SanitizedCase("fp8 in blocks", replace(MANY, **WHOLE, scheme="fp8_block", block_n=32, block_k=32)),
    SanitizedCase("fp8 in blocks of 128", replace(MANY, H=144, I=80, scheme="fp8_block", block_n=128, block_k=128)),
    SanitizedCase("int8 weights by channel", replace(MANY, **WHOLE, scheme="int8_w8a16_channel")),
    SanitizedCase("int4 in groups with zero points", replace(MANY, **WHOLE, scheme="int4_group_zp", block_k=32)),
    SanitizedCase("slabs", BatchedSpec(max_tokens=21, **RAGGED, E=3, bias="both")),
    SanitizedCase("slabs in fp8", BatchedSpec(max_tokens=21, **WHOLE, E=3, scheme="fp8_channel_token")),
    SanitizedCase("quantised rows", QuantizeSpec(rows=7, columns=104, quantizer="fp8_group", group=8)),
    SanitizedCase("adapters", LoraSpec(9, **RAGGED, E=5, top_k=2)),
    SanitizedCase("shared experts", SharedSpec(5, **RAGGED, E=8, top_k=2, shared_size=40)),
    # Of a size whose rows and words fill what travels: gaps, which nobody writes and nobody but a copy reads, are none.
    SanitizedCase(
        "tokens that travel between ranks",
        ParallelSpec(M=9, H=54, I=56, E=5, top_k=2, exchange="all_to_all", split="uneven"),
    ),
    SanitizedCase("two streams", SharedSpec(5, **RAGGED, E=8, top_k=2, shared_size=40), "two streams"),
    SanitizedCase("a graph", SharedSpec(5, **RAGGED, E=8, top_k=2, shared_size=40), "graph"),
)


def run_case(session: Session, case: SanitizedCase, variant: str) -> list[Verdict]:
    """Run one case on the session's device, and judge it on the CPU.

    Raises:
        CallError: the subject's call gives no result; with its verdict.
    """
    return _RUNS[case.how or case.spec.facet](session, case.spec, variant)


def _run_experts(session: Session, spec: ExpertsSpec, variant: str) -> list[Verdict]:
    mine, there = build_experts(spec), build_experts(spec, session.device)
    output = session.subject.experts(session.prepared(there, variant), variant).cpu()
    trace = reference_of(mine)
    return [*judge_values(mine, output, trace, budget_of(mine, trace, session.subject.numerics)), _unchanged(there)]


def _run_batched(session: Session, spec: BatchedSpec, variant: str) -> list[Verdict]:
    mine, there = build_batched(spec), build_batched(spec, session.device)
    output = session.subject.batched(session.prepared(there, variant), variant, None).cpu()
    routed = mine.routed()
    trace = reference_of_batched(mine, routed)
    return [*judge_rows(mine, routed, output, trace, session.subject.numerics), _unchanged(there)]


def _run_route(session: Session, spec: RoutingSpec, variant: str) -> list[Verdict]:
    weights, ids = session.subject.route(build_routing(spec, session.device), variant)
    return judge_routing(build_routing(spec), weights.cpu(), ids.cpu())


def _run_align(session: Session, spec: AlignSpec, variant: str) -> list[Verdict]:
    results = session.subject.align(build_align(spec, session.device), variant)
    return judge_alignment(build_align(spec), *(each.cpu() for each in results))


def _run_quantize(session: Session, spec: QuantizeSpec, variant: str) -> list[Verdict]:
    values, scales = session.subject.quantize(build_quantize(spec, session.device), variant)
    return judge_quantized(build_quantize(spec), values.cpu(), scales.cpu())


def _run_lora(session: Session, spec: LoraSpec, variant: str) -> list[Verdict]:
    mine, there = build_lora(spec), build_lora(spec, session.device)
    layer = lora_properties.loaded(partial(session.subject.lora, variant=variant), there)
    truth = lora_properties.truth_of(mine, session.subject.numerics)
    return lora_properties.judge_element(mine, layer.run(there.lora_ids).cpu(), truth)


def _run_shared(session: Session, spec: SharedSpec, variant: str, overlapped: bool = False) -> list[Verdict]:
    there = build_shared(spec, session.device)
    output = session.subject.shared(there, variant, overlapped=overlapped, hold=None).cpu()
    return shared_properties.judge_element(
        output, shared_properties.truth_of(build_shared(spec), session.subject.numerics)
    )


def _run_parallel(session: Session, spec: ParallelSpec, variant: str) -> list[Verdict]:
    subject, there = session.subject, build_parallel(spec, session.device)
    outcomes = run_simulated(spec.world_size, lambda rank, links: subject.parallel(there, links, variant, fails=None))
    verdicts = parallel_properties.judge_meeting(outcomes)
    if all(verdict.holds for verdict in verdicts):
        results = [outcome.result.on_cpu() for outcome in outcomes]
        sums = subject.partial_sums[spec.exchange]
        verdicts += parallel_properties.judge_values(build_parallel(spec), results, subject.numerics, sums)
    return verdicts


def _run_graph(session: Session, spec: SharedSpec, variant: str) -> list[Verdict]:
    subject = session.subject
    calls = Calls(
        prepare=lambda case: subject.capture(case, variant),
        eager=lambda case: subject.shared(case, variant, overlapped=False, hold=None),
    )
    specs = [replace(spec, seed=seed) for seed in range(3)]
    case, *donors = [build_shared(each, session.device) for each in specs]
    return judge_replays(case, donors, calls)


def _unchanged(case: Any) -> Verdict:
    changed = case.arena.changed()
    return INPUTS.verdict(not changed, f"written: {changed}")


_RUNS: dict[str, Callable[[Session, Any, str], list[Verdict]]] = {
    "experts": _run_experts,
    "batched": _run_batched,
    "route": _run_route,
    "align": _run_align,
    "quantize": _run_quantize,
    "lora": _run_lora,
    "shared": _run_shared,
    "parallel": _run_parallel,
    "two streams": partial(_run_shared, overlapped=True),
    "graph": _run_graph,
}
_NEEDS = {"graph": ("capture", "shared"), "two streams": ("shared",)}


def is_defined(session: Session, case: SanitizedCase, variant: str) -> bool:
    """Whether the subject has the calls, and declares the scheme and the dtype."""
    facets, can = session.subject.facets(variant), session.subject.capabilities
    needed = _NEEDS.get(case.how, (case.spec.facet,))
    spec: Any = case.spec
    scheme, dtype = getattr(spec, "scheme", "none"), getattr(spec, "dtype", None)
    is_declared = (scheme == "none" or scheme in can.schemes) and (dtype is None or dtype in can.dtypes)
    return set(needed) <= set(facets) and is_declared and (case.how != "two streams" or can.overlap)


def plant(device: str) -> None:
    """Run a kernel that writes one element behind its tensor, which a memory checker must see."""
    planted_kernel[(1,)](torch.zeros(128, device=device), 129, BLOCK=256)
    settle_device()


@triton.jit
def planted_kernel(out, n, BLOCK: tl.constexpr):
    """Writes `n` elements into `out`, however many it has."""
    i = tl.arange(0, BLOCK)
    tl.store(out + i, 1.0, mask=i < n)


def run_cases(session: Session, *, caching: bool) -> int:
    """Run a subject's cases, a line of JSON for each; returns in how many a property was violated."""
    violated = 0
    for variant in session.variants():
        for case in CASES:
            if case.needs_caching != caching or (case.needs_gpu and session.device == "cpu"):
                continue
            if not is_defined(session, case, variant):
                continue
            print(f"{MARK}{case.name} ({session.subject.name}, {variant})", flush=True)
            try:
                verdicts = run_case(session, case, variant)
                settle_device()
            except CallError as error:
                verdicts = [error.verdict]
            wrong = [f"{v.property.id}: {v.detail}" for v in verdicts if not v.holds]
            violated += bool(wrong)
            row = {"case": case.name, "variant": variant, "judged": len(verdicts), "violated": wrong}
            print(json.dumps(row), flush=True)
    return violated


def main(arguments: list[str]) -> int:
    """Run the cases, a line of JSON for each; 1 where a property is violated."""
    parser = argparse.ArgumentParser(prog="python -m moegate.conformance.sanitized")
    parser.add_argument("--subject", action="append", help=f"may be repeated; else {', '.join(SUBJECTS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--caching", action="store_true", help="the cases that need torch's caching allocator")
    parser.add_argument("--planted", action="store_true", help="nothing but a kernel that leaves its memory")
    asked = parser.parse_args(arguments)
    if asked.planted:
        print(f"{MARK}planted", flush=True)
        plant(asked.device)
        return 0
    SELECTION.device = asked.device
    violated = 0
    for subject in asked.subject or SUBJECTS:
        SELECTION.subject = subject
        current_session.cache_clear()
        violated += run_cases(current_session(), caching=asked.caching)
    return int(violated > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
