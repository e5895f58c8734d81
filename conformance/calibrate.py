"""Fit the budget's limits on honest emulations: `python -m moegate.conformance.calibrate`.

For each statistic the largest value of every case is collected, the upper tenth of the cases is fitted with a
generalised Pareto tail (Coles 2001, ch. 4), and the limit is the value that one case exceeds with probability 1e-6:
a false-alarm chance under 1 % in a run of 10,000 cases. The fit never sees a subject under test.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from scipy.stats import genpareto

from .calibration import KINDS, Limits
from .cases import build_experts
from .emulation import emulate
from .numerics import Numerics
from .properties.num import budget_of, reference_of
from .spec import ACTIVATIONS, BIASES, DTYPES, MAPS, ROUTINGS, SCHEMES, VALUES, WEIGHTS, ExpertsSpec
from .statistics import statistics
from .strategies import POOLS, may_go_together

# Exceedance probability of one case at the limit.
PER_CASE = 1e-6
TAIL = 0.1
# Sizes beyond the suite's own small shapes, so that the limits hold where rows are long too.
LONGER = ((128, 96), (256, 64))
EMULATED = (
    Numerics(),
    Numerics(gate="storage", weighted="float32", expert_output="storage", dequantized_weight="storage"),
    Numerics(gate_up="float32", weighted="float32", accumulator="hopper_fp8", promoted_every=128),
    Numerics(routing_weight="storage", combine="storage", accumulator="hopper_fp8"),
)
# Schemes by what their errors are made of (see `calibration.KINDS`).
SCHEMES_OF_KIND = {
    kind: [name for name, scheme in SCHEMES.items() if (scheme.activation_scale is not None) == (kind == "quantized")]
    for kind in KINDS
}


def drawn_spec(rng: random.Random, *, kind: str = "rounded", devices: tuple[str, ...] = ("cpu", "cuda")) -> ExpertsSpec:
    """A spec from the same pools as the suite's, by plain chance."""
    scheme = rng.choice(SCHEMES_OF_KIND[kind]) if kind == "quantized" or rng.random() < 0.4 else "none"
    dtype = rng.choice([d for d in DTYPES if may_go_together(scheme, "silu", d)])
    shapes = [shape for device in devices for shape in POOLS[device].shapes_of(scheme)]
    if scheme == "none" and len(devices) > 1:
        shapes += [(*shape, 0, 0) for shape in LONGER]
    hidden, intermediate, block_n, block_k = rng.choice(shapes)
    num_experts = rng.choice((1, 2, 3, 5, 8))
    top_k = rng.randint(1, min(num_experts, 6))
    return ExpertsSpec(
        M=rng.randint(1, 24),
        H=hidden,
        I=intermediate,
        E=num_experts,
        top_k=top_k,
        dtype=dtype,
        routing=rng.choice([r for r in ROUTINGS if r != "all_invalid"]),
        weights=rng.choice(WEIGHTS),
        expert_map=rng.choice([m for m in MAPS if m != "owns_nothing"]),
        values=rng.choice(VALUES),
        weight_on_input=top_k == 1 and rng.random() < 0.5,
        scheme=scheme,
        block_n=block_n,
        block_k=block_k,
        activation=rng.choice([a for a in ACTIVATIONS if may_go_together(scheme, a, dtype)]),
        bias=rng.choice(BIASES),
        seed=rng.randrange(1 << 20),
    )


def worst_statistics(spec: ExpertsSpec, numerics: Numerics, seed: int) -> dict[str, float]:
    """The largest value of each statistic that one honest emulation shows on a spec."""
    case = build_experts(spec)
    trace = reference_of(case)
    budget = budget_of(case, trace, numerics)
    measured = statistics(emulate(case, numerics, seed), trace, budget, case.operands().w2)
    return {name: float(getattr(measured, name).nan_to_num(0.0).max()) for name in (f.name for f in fields(Limits))}


def fitted_limit(worst: np.ndarray, per_case: float = PER_CASE) -> float:
    """The value that a case's worst statistic exceeds with probability `per_case`, by a fit of the upper tail.

    Raises:
        ValueError: fewer than 500 cases, which fit no tail.
    """
    if len(worst) < 500:
        raise ValueError(f"worst: expected at least 500 cases to fit a tail, got {len(worst)}")
    threshold = float(np.quantile(worst, 1 - TAIL))
    excess = worst[worst > threshold] - threshold
    # A tail heavier than exponential is not credible for sums of bounded errors, a bounded one is not relied upon.
    shape, _, scale = genpareto.fit(excess, floc=0)
    if shape < 0:
        shape, scale = 0.0, float(excess.mean())
    return threshold + float(genpareto.isf(per_case / TAIL, shape, 0, scale))


def calibrate(cases: int, seed: int) -> dict[str, object]:
    """The contents of `calibration.json` from `cases` emulations of each kind."""
    torch.set_num_threads(1)
    kinds = {}
    for kind in KINDS:
        rng = random.Random(f"{kind} {seed}")
        worst: dict[str, list[float]] = {f.name: [] for f in fields(Limits)}
        for number in range(cases):
            spec = drawn_spec(rng, kind=kind)
            measured = worst_statistics(spec, EMULATED[number % len(EMULATED)], rng.randrange(1 << 30))
            for name, value in measured.items():
                worst[name].append(value)
        arrays = {name: np.array(values) for name, values in worst.items()}
        kinds[kind] = {
            "limits": asdict(Limits(**{name: round(fitted_limit(values), 3) for name, values in arrays.items()})),
            "largest_seen": {name: round(float(values.max()), 3) for name, values in arrays.items()},
            "median": {name: round(float(np.median(values)), 3) for name, values in arrays.items()},
        }
    return {
        "schema": 2,
        "command": f"python -m moegate.conformance.calibrate --cases {cases} --seed {seed}",
        "per_case": PER_CASE,
        **kinds,
    }


def main() -> None:
    """Write `calibration.json` beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    fitted = calibrate(arguments.cases, arguments.seed)
    Path(__file__).with_name("calibration.json").write_text(json.dumps(fitted, indent=2) + "\n")
    print(json.dumps(fitted, indent=2))


if __name__ == "__main__":
    main()
