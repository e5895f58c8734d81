"""Fit the budget's limits on honest emulations: `python -m moegate.conformance.calibrate`; then verify them on others.

For each statistic the largest value of every case is collected, the upper tenth of the cases is fitted with an
exponential tail (the generalised Pareto tail of shape 0: Coles 2001, ch. 4), and the limit is the value that one case
exceeds with probability 1e-6: a false-alarm chance under 1 % in a run of 10,000 cases. The fit never sees a subject
under test.

`--verify` fits nothing: it counts how often the limits are exceeded by emulations of other declarations, on other
shapes and seeds, and by the eager subject, which is no emulation, and says how much of each limit the median case uses.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from .calibration import KINDS, Limits, limits
from .cases import ExpertsCase, build_experts
from .emulation import emulate
from .numerics import Numerics
from .properties.num import budget_of, reference_of
from .spec import ACTIVATIONS, BIASES, DTYPES, MAPS, ROUTINGS, SCHEMES, VALUES, WEIGHTS, ExpertsSpec
from .statistics import statistics
from .strategies import POOLS, Shape, may_go_together
from .subjects.eager import EagerSubject

# Exceedance probability of one case at the limit.
PER_CASE = 1e-6
TAIL = 0.1
# Cases that one process draws and runs at a time.
PART = 100
Samples = dict[str, list[dict[str, float]]]
"""By who was run, for each case the largest value of each statistic."""
# Sizes beyond the suite's own small shapes, so that the limits hold where rows are long too.
LONGER = ((128, 96), (256, 64))
# Tokens at most of a case: three in four are as small as most of the suite's, the others as large as a GPU's.
MOST_TOKENS = (24, 24, 24, 300)
EMULATED = (
    Numerics(),
    Numerics(gate="storage", weighted="float32", expert_output="storage", dequantized_weight="storage"),
    Numerics(gate_up="float32", weighted="float32", accumulator="hopper_fp8", promoted_every=128),
    Numerics(routing_weight="storage", combine="storage", accumulator="hopper_fp8"),
)
# What the verification draws, and the fit never saw: other declarations, and other sizes for each kind of scales.
OTHERS = (
    Numerics(gate="storage", expert_output="storage", weighted="storage", combine="storage", routing_weight="storage"),
    Numerics(weighted="float32", hidden="float32"),
    Numerics(gate_up="float32", gate="storage", expert_output="storage", accumulator="hopper_fp8", promoted_every=64),
)
OTHER_SHAPES: dict[str, tuple[Shape, ...]] = {
    "none": ((104, 72, 0, 0), (56, 136, 0, 0), (320, 48, 0, 0)),
    "tensor": ((88, 104, 0, 0), (136, 40, 0, 0)),
    "channel": ((88, 104, 0, 0), (136, 40, 0, 0)),
    "block": ((120, 88, 32, 32), (88, 136, 16, 48)),
    "group": ((96, 112, 0, 16), (144, 96, 0, 48)),
}
# Schemes by what their errors are made of (see `calibration.KINDS`).
SCHEMES_OF_KIND = {
    kind: [name for name, scheme in SCHEMES.items() if (scheme.activation_scale is not None) == (kind == "quantized")]
    for kind in KINDS
}


def _shapes(scheme: str, devices: tuple[str, ...]) -> list[Shape]:
    """The sizes of the devices' pools, and longer ones beside those of several; of no device, `OTHER_SHAPES`."""
    if not devices:
        return list(OTHER_SHAPES["none" if scheme == "none" else SCHEMES[scheme].weight_scale])
    shapes = [shape for device in devices for shape in POOLS[device].shapes_of(scheme)]
    return shapes + [(*shape, 0, 0) for shape in LONGER] if scheme == "none" and len(devices) > 1 else shapes


def drawn_spec(
    rng: random.Random,
    *,
    kind: str = "rounded",
    devices: tuple[str, ...] = ("cpu", "cuda"),
    most_tokens: int = 24,
) -> ExpertsSpec:
    """A spec from the same pools as the suite's, by plain chance; without devices, of sizes that no pool has."""
    scheme = rng.choice(SCHEMES_OF_KIND[kind]) if kind == "quantized" or rng.random() < 0.4 else "none"
    dtype = rng.choice([d for d in DTYPES if may_go_together(scheme, "silu", d)])
    hidden, intermediate, block_n, block_k = rng.choice(_shapes(scheme, devices))
    num_experts = rng.choice((1, 2, 3, 5, 8))
    top_k = rng.randint(1, min(num_experts, 6))
    return ExpertsSpec(
        M=rng.randint(1, most_tokens),
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


def worst_statistics(spec: ExpertsSpec, numerics: Numerics, run: Callable[[ExpertsCase], Tensor]) -> dict[str, float]:
    """The largest value of each statistic that an honest implementation of `numerics` shows on a spec."""
    case = build_experts(spec)
    trace = reference_of(case)
    budget = budget_of(case, trace, numerics)
    measured = statistics(run(case), trace, budget, case.operands().w2)
    return {name: float(getattr(measured, name).nan_to_num(0.0).max()) for name in (f.name for f in fields(Limits))}


def fitted_limit(worst: np.ndarray, per_case: float = PER_CASE) -> float:
    """The value that a case's worst statistic exceeds with probability `per_case`, by a fit of the upper tail.

    Raises:
        ValueError: fewer than 500 cases, which fit no tail.
    """
    if len(worst) < 500:
        raise ValueError(f"worst: expected at least 500 cases to fit a tail, got {len(worst)}")
    threshold = float(np.quantile(worst, 1 - TAIL))
    # Sums of bounded errors have tails like a normal number's. A fit of the shape is ruled by the few largest cases (of
    # 250 it made a limit of 8 where the largest was 3), and a tail that ends is not relied upon.
    scale = float((worst[worst > threshold] - threshold).mean())
    return threshold + scale * math.log(TAIL / per_case)


def fitted_limits(columns: dict[str, np.ndarray]) -> Limits:
    """The limit of every statistic from each one's largest values; of a row no less than all errors at their largest.

    That is what `Budget.of_row` says without chance: roundings that all go one way are honest, however rarely drawn.
    """
    found = {name: round(fitted_limit(values), 3) for name, values in columns.items()}
    return Limits(**found | {"row_rms": max(found["row_rms"], 1.0)})


def _parts(kind: str, cases: int, seed: int, what: str) -> list[tuple[str, str, int]]:
    """The work of one kind in parts that are drawn by themselves: (kind, seed of the part, cases)."""
    return [(kind, f"{what} {kind} {seed} {first}", min(PART, cases - first)) for first in range(0, cases, PART)]


def _in_parts(
    work: Callable[[tuple[str, str, int]], Samples], what: str, cases: int, seed: int, workers: int | None
) -> dict[str, Samples]:
    """For each kind, what all of its parts gave, in order, however many processes share them."""
    parts = [part for kind in KINDS for part in _parts(kind, cases, seed, what)]
    gathered: dict[str, Samples] = {kind: {} for kind in KINDS}
    with ProcessPoolExecutor(workers) as pool:
        for (kind, _, _), samples in zip(parts, pool.map(work, parts), strict=True):
            for who, some in samples.items():
                gathered[kind].setdefault(who, []).extend(some)
    return gathered


def _emulated(part: tuple[str, str, int]) -> Samples:
    """The worst statistics of each case of a part of the fit."""
    kind, own, cases = part
    torch.set_num_threads(1)
    rng, worst = random.Random(own), []
    for number in range(cases):
        spec = drawn_spec(rng, kind=kind, most_tokens=MOST_TOKENS[number // len(EMULATED) % len(MOST_TOKENS)])
        numerics = EMULATED[number % len(EMULATED)]
        worst.append(worst_statistics(spec, numerics, partial(emulate, numerics=numerics, seed=rng.randrange(1 << 30))))
    return {"emulations": worst}


def calibrate(cases: int, seed: int, workers: int | None = None) -> dict[str, object]:
    """The contents of `calibration.json` from `cases` emulations of each kind."""
    kinds = {}
    for kind, samples in _in_parts(_emulated, "fit", cases, seed, workers).items():
        arrays = _columns(samples["emulations"])
        kinds[kind] = {
            "limits": asdict(fitted_limits(arrays)),
            "largest_seen": {name: round(float(values.max()), 3) for name, values in arrays.items()},
            "median": {name: round(float(np.median(values)), 3) for name, values in arrays.items()},
        }
    return {
        "schema": 2,
        "command": f"python -m moegate.conformance.calibrate --cases {cases} --seed {seed}",
        "per_case": PER_CASE,
        **kinds,
    }


def _unseen(part: tuple[str, str, int]) -> Samples:
    """The shares of the limits that each case of a part of the verification uses, of emulations and of torch."""
    kind, own, cases = part
    torch.set_num_threads(1)
    eager, limit, rng = EagerSubject(), limits(kind == "quantized"), random.Random(own)
    used: Samples = {"emulations": [], "torch": []}
    for number in range(cases):
        spec = drawn_spec(rng, kind=kind, devices=(), most_tokens=MOST_TOKENS[number // len(OTHERS) % len(MOST_TOKENS)])
        numerics = OTHERS[number % len(OTHERS)]
        for who, declared, run in (
            ("emulations", numerics, partial(emulate, numerics=numerics, seed=rng.randrange(1 << 30))),
            ("torch", eager.numerics, partial(eager.experts, variant="default")),
        ):
            worst = worst_statistics(spec, declared, run)
            used[who].append({name: value / getattr(limit, name) for name, value in worst.items()})
    return used


def verify(cases: int, seed: int, workers: int | None = None) -> dict[str, object]:
    """What honest implementations that the fit never saw use of the limits, on `cases` of each kind and each of them.

    Returns:
        For each kind, for the emulations and for the eager subject: the cases, how many exceed a limit, the largest and
        the median share of each limit.
    """
    found = _in_parts(_unseen, "verify", cases, seed, workers)
    kinds = {kind: {who: _summary(shares) for who, shares in used.items()} for kind, used in found.items()}
    return {"command": f"python -m moegate.conformance.calibrate --verify --cases {cases} --seed {seed}", **kinds}


def _columns(samples: list[dict[str, float]]) -> dict[str, np.ndarray]:
    return {f.name: np.array([sample[f.name] for sample in samples]) for f in fields(Limits)}


def _summary(shares: list[dict[str, float]]) -> dict[str, Any]:
    columns = _columns(shares)
    exceeded = sum(max(share.values()) > 1 for share in shares)
    return {
        "cases": len(shares),
        "exceeded": exceeded,
        # Clopper and Pearson's one-sided bound of the chance that a case exceeds a limit.
        "exceeded_95": round(float(beta.ppf(0.95, exceeded + 1, max(len(shares) - exceeded, 1))), 5),
        "largest": {name: round(float(values.max()), 3) for name, values in columns.items()},
        "median": {name: round(float(np.median(values)), 3) for name, values in columns.items()},
    }


def main() -> None:
    """Write `calibration.json` beside this file, or what verifies it into it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=4000, help="of each kind (default: 4000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verify", action="store_true", help="count what exceeds the limits that there are")
    parser.add_argument("--workers", type=int, help="processes, which change no result (default: one a core)")
    arguments = parser.parse_args()
    file = Path(__file__).with_name("calibration.json")
    if arguments.verify:
        found = {"verified": verify(arguments.cases, arguments.seed, arguments.workers)}
        file.write_text(json.dumps(json.loads(file.read_text()) | found, indent=2) + "\n")
    else:
        found = calibrate(arguments.cases, arguments.seed, arguments.workers)
        file.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
