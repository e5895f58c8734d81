"""Compile the kernels that the gate will ask for, one part of them: `python -m moegate.conformance.precompile`.

Several of these run side by side before the suite does; Triton's cache on disk carries the results to the workers.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

from .cases import build_batched, build_experts, build_quantize, build_routing
from .coverage import once, pinned_experts, pinned_slabs
from .guarded import CallError
from .selection import SELECTION
from .session import Session, current_session
from .spec import BatchedSpec, ExpertsSpec, RoutingSpec
from .strategies import compiled_dtypes, is_declared, pinned_quantizers, pinned_routings, pools_of, routing_dtypes
from .subject import Capabilities


def warm_up_specs(device: str, capabilities: Capabilities) -> Iterator[ExpertsSpec]:
    """Specs that between them need the kernels of every shape, dtype, tile, scheme and activation of the pools."""
    pools = pools_of(device, capabilities)
    for dtype in capabilities.dtypes:
        for hidden, intermediate, _, _ in pools.shapes_of("none", dtype):
            base = ExpertsSpec(M=1, H=hidden, I=intermediate, E=1, top_k=1, dtype=dtype)
            for tokens in (8, 16, 32, 64):  # 16, 32, 64 and 128 rows a block
                yield replace(base, M=tokens)
            yield replace(base, E=8, top_k=4, M=8, expert_map="linear")
            yield replace(base, E=pools.many_experts[0])
    for dtype, scheme in product(pools.scaled_dtypes, capabilities.schemes):
        if scheme == "none":
            continue
        for hidden, intermediate, block_n, block_k in pools.shapes_of(scheme):
            size = {"H": hidden, "I": intermediate, "block_n": block_n, "block_k": block_k}
            base = ExpertsSpec(M=8, **size, E=1, top_k=1, dtype=dtype, scheme=scheme)
            yield from (replace(base, M=most) for _, most in pools.scaled_rows)
            yield replace(base, M=1, E=pools.many_experts[0])
    yield from once(pinned_experts(device, capabilities))


def warm_up_slabs(device: str, capabilities: Capabilities) -> Iterator[BatchedSpec]:
    """Specs that between them need the batched kernels of every shape, dtype, tile and scheme of the pools."""
    pools = pools_of(device, capabilities)
    dtypes = compiled_dtypes(device, capabilities)
    for dtype, rows, scheme in product(dtypes, pools.slabs, capabilities.of_slabs().schemes):
        if scheme != "none" and dtype not in pools.scaled_dtypes:
            continue
        for hidden, intermediate, block_n, block_k in pools.shapes_of(scheme):
            size = {"max_tokens": rows, "H": hidden, "I": intermediate, "E": pools.experts[-1]}
            blocks = {"block_n": block_n, "block_k": block_k}
            yield BatchedSpec(**size, **blocks, dtype=dtype, counts="full", scheme=scheme)
    yield from once(pinned_slabs(device, capabilities))


def warm_up_routings(device: str, capabilities: Capabilities) -> Iterator[RoutingSpec]:
    """Specs that between them need the routing kernels of every declared dtype, E and way of grouping of the pools."""
    pools = pools_of(device, capabilities)
    for num_experts in pools.routing_experts:
        for dtype in routing_dtypes(device, capabilities, num_experts):
            yield RoutingSpec(M=1, E=num_experts, top_k=1, dtype=dtype)
    scorings = [scoring for scoring in capabilities.scorings if scoring not in ("softmax", "custom")]
    for num_experts in pools.scored_experts if scorings else ():
        for dtype in routing_dtypes(device, capabilities, num_experts):
            yield RoutingSpec(M=1, E=num_experts, top_k=1, dtype=dtype, scoring=scorings[0])
    yield from pinned_routings(device, capabilities)


def main(subject: str, part: int, parts: int) -> None:
    """Compile every `parts`-th spec's kernels, from `part` on, and print how many variants that took."""
    # That toy shapes have no tuned file is no news.
    logging.getLogger("moegate").setLevel(logging.ERROR)
    SELECTION.subject = subject
    session = current_session()
    can = session.subject.capabilities
    for variant in session.variants():
        facets = session.subject.facets(variant)
        warm_ups: dict[str, Iterable[Any]] = {
            "experts": filter(lambda spec: is_declared(spec, can), warm_up_specs(session.device, can)),
            "batched": warm_up_slabs(session.device, can),
            "quantize": pinned_quantizers(session.device, can),
            "route": warm_up_routings(session.device, can),
        }
        for facet in warm_ups.keys() & set(facets):
            for number, spec in enumerate(warm_ups[facet]):
                # What fails here fails in the suite, which says what and why.
                if number % parts == part:
                    with suppress(CallError):
                        _CALLS[facet](session, spec, variant)
    print(json.dumps(session.ledger.kernels))


def _experts(session: Session, spec: ExpertsSpec, variant: str) -> None:
    session.subject.experts(session.prepared(build_experts(spec, session.device), variant), variant)


def _batched(session: Session, spec: BatchedSpec, variant: str) -> None:
    session.subject.batched(session.prepared(build_batched(spec, session.device), variant), variant, None)


_CALLS: dict[str, Callable[[Session, Any, str], Any]] = {
    "experts": _experts,
    "batched": _batched,
    "quantize": lambda session, spec, variant: session.subject.quantize(build_quantize(spec, session.device), variant),
    "route": lambda session, spec, variant: session.subject.route(build_routing(spec, session.device), variant),
}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
