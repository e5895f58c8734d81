"""Every property that the suite declares, and what a whole run must have judged to mean anything."""

from __future__ import annotations

from itertools import combinations, product

from .judge import PROPERTIES, Ledger, Property
from .properties import align, api, hygiene, meta, num, path, route
from .spec import VALUES
from .subject import Capabilities, Subject

# Importing a family declares its properties.
FAMILIES = (route, align, num, meta, path, hygiene, api)
# A run that exercised fewer of the declared feature pairs than this proves too little to be called green.
LEAST_PAIRS = 0.5


def due(subject: Subject, device: str) -> list[Property]:
    """The properties that a whole run on `device` must judge: what the capabilities and some variant's facets allow."""
    facets = {
        frozenset(subject.facets(variant)) for variant in subject.variants if not subject.unavailable(variant, device)
    }
    allowed = [prop for prop in PROPERTIES.values() if prop.needs(subject.capabilities)]
    return [prop for prop in allowed if any(set(prop.facets) <= have for have in facets)]


def declared_pairs(capabilities: Capabilities) -> set[str]:
    """Every pair of features of an experts spec that the capabilities declare, named as `Ledger.pairs` names them."""
    features = {
        "dtype": capabilities.dtypes,
        "expert_map": capabilities.maps,
        "padded_rows": (False, True) if capabilities.padded_rows else (False,),
        "routing": capabilities.routings,
        "values": VALUES,
        "weight_on_input": (False, True) if capabilities.weight_on_input else (False,),
        "weights": capabilities.weights,
    }
    return {
        f"{a}={x} & {b}={y}"
        for (a, xs), (b, ys) in combinations(sorted(features.items()), 2)
        for x, y in product(xs, ys)
    }


def vacuity(ledger: Ledger, subject: Subject, device: str) -> list[str]:
    """Why a whole run proves too little; empty where it does not."""
    if not ledger.tallies:
        reasons = "; ".join(ledger.skipped) or "every test was skipped"
        return [f"nothing was judged: {reasons}"]
    expected = due(subject, device)
    unjudged = [prop.id for prop in expected if prop.id not in ledger.tallies]
    complaints = [f"never judged, though declared: {', '.join(unjudged)}"] if unjudged else []
    if any("experts" in prop.facets for prop in expected):
        declared = declared_pairs(subject.capabilities)
        missing = sorted(declared - set(ledger.pairs))
        if len(missing) > (1 - LEAST_PAIRS) * len(declared):
            complaints.append(
                f"only {len(declared) - len(missing)} of {len(declared)} declared feature pairs were run; "
                f"missing among others: {', '.join(missing[:5])}"
            )
    return complaints
