"""Compile the kernels that the gate will ask for, one part of them: `python -m moegate.conformance.precompile`.

Several of these run side by side before the suite does; Triton's cache on disk carries the results to the workers.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from .cases import build_batched, build_experts, build_routing
from .selection import SELECTION
from .session import current_session
from .spec import DTYPES, BatchedSpec, ExpertsSpec, RoutingSpec
from .strategies import POOLS
from .subject import Capabilities


def warm_up_specs(device: str) -> Iterator[ExpertsSpec]:
    """Specs that between them need the kernels of every shape, dtype and tile of the pools."""
    pools = POOLS[device]
    for dtype in DTYPES:
        for hidden, intermediate in pools.shapes_of(dtype):
            base = ExpertsSpec(M=1, H=hidden, I=intermediate, E=1, top_k=1, dtype=dtype)
            for tokens in (8, 16, 32, 64):  # 16, 32, 64 and 128 rows a block
                yield replace(base, M=tokens)
            yield replace(base, E=8, top_k=4, M=8, expert_map="linear")
            yield replace(base, E=pools.many_experts[0])


def warm_up_slabs(device: str) -> Iterator[BatchedSpec]:
    """Specs that between them need the batched kernels of every shape, dtype and tile of the pools."""
    pools = POOLS[device]
    for dtype, rows in product(DTYPES, pools.slabs):
        for hidden, intermediate in pools.shapes_of(dtype):
            size = {"max_tokens": rows, "H": hidden, "I": intermediate, "E": pools.experts[-1]}
            yield BatchedSpec(**size, dtype=dtype, counts="full")


def warm_up_routings(device: str, capabilities: Capabilities) -> Iterator[RoutingSpec]:
    """Specs that between them need the routing kernels of every declared dtype, E and way of grouping of the pools."""
    pools = POOLS[device]
    for dtype in capabilities.dtypes:
        for num_experts in pools.routing_experts:
            yield RoutingSpec(M=1, E=num_experts, top_k=1, dtype=dtype)
        scorings = [scoring for scoring in capabilities.scorings if scoring not in ("softmax", "custom")]
        for num_experts in pools.scored_experts if scorings else ():
            yield RoutingSpec(M=1, E=num_experts, top_k=1, dtype=dtype, scoring=scorings[0])
        for num_experts, groups in product(pools.grouped_experts, capabilities.groups):
            spec = RoutingSpec(M=1, E=num_experts, top_k=1, dtype=dtype, groups=groups)
            if groups != "none" and "max" in capabilities.group_rankings and spec.most_choices():
                yield spec


def main(subject: str, part: int, parts: int) -> None:
    """Compile every `parts`-th spec's kernels, from `part` on, and print how many variants that took."""
    # That toy shapes have no tuned file is no news.
    logging.getLogger("moegate").setLevel(logging.ERROR)
    SELECTION.subject = subject
    session = current_session()
    for variant in session.variants():
        for number, spec in enumerate(warm_up_specs(session.device)):
            if number % parts == part:
                session.subject.experts(build_experts(spec, session.device), variant)
        if "batched" in session.subject.facets(variant):
            for number, spec in enumerate(warm_up_slabs(session.device)):
                if number % parts == part:
                    session.subject.batched(build_batched(spec, session.device), variant, None)
        if "route" in session.subject.facets(variant):
            for number, spec in enumerate(warm_up_routings(session.device, session.subject.capabilities)):
                if number % parts == part:
                    session.subject.route(build_routing(spec, session.device), variant)
    print(json.dumps(session.ledger.kernels))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
