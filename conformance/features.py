"""The feature table of the README, from what moegate's own subject declares: `python -m moegate.conformance.features`.

Every cell that says yes is a set of pinned specs, which the suite runs (`coverage.py`); a test keeps the README so.
"""

from __future__ import annotations

from .coverage import declared_pairs
from .loading import load_subject
from .spec import SCHEMES, Scheme
from .subject import Capabilities

BEGIN, END = "<!-- features: begin -->", "<!-- features: end -->"
_WEIGHTS = {"tensor": "an expert", "channel": "a channel", "block": "a block", "group": "a group along K"}
_ACTIVATIONS = {
    "static": "given",
    "tensor": "the tensor",
    "token": "a token",
    "group": "a token's block",
    None: "not quantised",
}
# Columns of the table: a feature of the suite's specs, and whether it is one of the batched format.
PLACES = {
    "aligned": ("path=aligned", False),
    "naive blocks": ("path=naive", False),
    "batched format": ("format=batched", True),
}


def _named(scheme: Scheme) -> tuple[str, str, str]:
    if scheme.weight is None:
        return "bf16, fp16, fp32", "-", "not quantised"
    bits = "w4a16" if scheme.weight == "int4" else "w8a8" if scheme.activation_scale else "w8a16"
    zeros = ", zero points" if scheme.zero_points else ""
    return (
        f"{scheme.weight} {bits}",
        f"{_WEIGHTS[scheme.weight_scale]}{zeros}",
        _ACTIVATIONS[scheme.activation_scale],
    )


def cells(capabilities: Capabilities) -> dict[tuple[str, str], bool]:
    """For each scheme and place, whether the suite pins specs of it."""
    pairs = {batched: declared_pairs("cpu", capabilities, batched=batched) for batched in (False, True)}
    return {
        (name, place): any({f"{feature} & scheme={name}"} & pairs[batched])
        for name in SCHEMES
        for place, (feature, batched) in PLACES.items()
    }


def as_markdown() -> str:
    """The table, between its marks."""
    capabilities = load_subject("moegate").capabilities
    held = cells(capabilities)
    lines = [
        "| weights | one weight scale for | one activation scale for | " + " | ".join(PLACES) + " |",
        "|---|---|---|" + ":-:|" * len(PLACES),
    ]
    for name in SCHEMES:
        marks = ["yes" if held[name, place] else "" for place in PLACES]
        lines.append(f"| {' | '.join([*_named(SCHEMES[name]), *marks])} |")
    lines += [
        "",
        f"Activations: {', '.join(capabilities.activations)}. Biases: {', '.join(capabilities.biases)}. Expert maps: "
        f"{', '.join(capabilities.maps)}.",
    ]
    return "\n".join([BEGIN, *lines, END]) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
