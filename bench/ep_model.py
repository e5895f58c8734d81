"""What more ranks would make of a layer: a model, from measured times of one device and a link that the user states.

Nothing here is a measurement of several ranks, and nothing calls itself one. What the model assumes stands in
`ASSUMPTIONS`, and is printed beside every estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import comb
from typing import Any

import numpy as np
from rich.table import Table

from .workloads import Model, Workload

SCHEMA = "moegate-ep-model/1"
MOST_RANKS = 256
EXCHANGES = ("all_gather", "all_to_all")
ASSUMPTIONS = (
    "a model, not a measurement: only the times of one device (one GPU's layer, one rank's share) were measured",
    "tokens are spread evenly over the ranks, and all ranks take as long as the measured one, which holds the first "
    "experts; the busiest of the workload's own routing is given beside it, and not in the time",
    "each rank sends and receives at the link's bandwidth at once, whatever the others do; no switch is shared",
    "all-gather and reduce-scatter go round a ring: N - 1 steps, each with the link's latency; sums travel in the "
    "activations' dtype",
    "an all-to-all sends to all peers at once: one latency for the numbers of rows, one for rows, one for sums; a "
    "token goes to a rank with the chance that a uniform choice of top_k distinct experts gives",
    "hidden states travel as the scheme stores activations, with 8 bytes for each routed pair and 4 for each scale",
    "nothing overlaps; permutation, the host's wait for the numbers of rows, and kernel launches cost nothing",
)


@dataclass(frozen=True)
class Link:
    """A rank's connection to the others.

    Attributes:
        bandwidth: bytes a second in each direction.
        latency: seconds of one step.
    """

    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(f"link-bandwidth: expected a number above 0, got {self.bandwidth}")
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"link-latency: expected a number of at least 0, got {self.latency}")


@dataclass(frozen=True)
class Estimate:
    """The model's answer for one workload, number of ranks and exchange; seconds.

    Attributes:
        share: measured, of one rank's experts over the tokens of all.
        dispatch, combine: of the link.
        one_device: measured, of the whole layer on one device.
        imbalance: pairs of the busiest rank over the mean, in the workload's routing.
    """

    workload: str
    ranks: int
    exchange: str
    share: float
    dispatch: float
    combine: float
    one_device: float
    imbalance: float

    @property
    def seconds(self) -> float:
        """The layer's time."""
        return self.share + self.dispatch + self.combine

    @property
    def communication(self) -> float:
        """Its part that is communication."""
        return (self.dispatch + self.combine) / self.seconds

    @property
    def speedup(self) -> float:
        """Over one device."""
        return self.one_device / self.seconds


def parse_ranks(text: str) -> list[int]:
    """Numbers of ranks, comma-separated.

    Raises:
        ValueError: no numbers in [2, 256].
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and 2 <= int(word[:12]) <= MOST_RANKS for word in words):
        raise ValueError(f"simulate-ep: expected numbers of ranks in [2, {MOST_RANKS}], got {text!a:.80}")
    return [int(word) for word in words]


def share_of_rank(workload: Workload, ranks: int) -> Workload:
    """What a rank with the most experts computes: its part of the experts, the tokens of all.

    Raises:
        ValueError: more ranks than experts.
    """
    model = workload.model
    if ranks > model.num_experts:
        raise ValueError(f"simulate-ep: expected at most {model.name}'s {model.num_experts} experts, got {ranks}")
    return replace(workload, model=replace(model, num_local_experts=-(-model.num_experts // ranks)))


def whole_layer(workload: Workload) -> Workload:
    """The same with every expert on one device."""
    return replace(workload, model=replace(workload.model, num_local_experts=None))


def bytes_of_row(workload: Workload) -> tuple[int, int]:
    """What a token's hidden state and all else takes on the way there, and its sum on the way back."""
    model, form = workload.model, workload.format
    back = model.hidden_size * form.activations.itemsize
    there = back
    if form.is_quantized and not form.is_weight_only:
        columns = (form.block_shape or (0, 0))[1]
        scales = -(-model.hidden_size // columns) if columns else int(form.per_act_token_quant)
        there = model.hidden_size + 4 * scales
    return there + 8 * model.top_k, back


def chance_of_rank(model: Model, ranks: int) -> float:
    """The chance that a token has an expert on a given rank, of E / ranks experts."""
    held = model.num_experts / ranks
    low = int(held)
    without = [
        comb(model.num_experts - experts, model.top_k) / comb(model.num_experts, model.top_k)
        for experts in (low, low + 1)
    ]
    return 1 - (without[0] + (held - low) * (without[1] - without[0]))


def communication_times(workload: Workload, ranks: int, exchange: str, link: Link) -> tuple[float, float]:
    """Seconds of dispatch and combine."""
    there, back = bytes_of_row(workload)
    own = -(-workload.num_tokens // ranks)
    if exchange == "all_gather":
        steps, rows = (ranks - 1) * link.latency, (ranks - 1) * own
        return steps + rows * there / link.bandwidth, steps + rows * back / link.bandwidth
    rows = own * (ranks - 1) * chance_of_rank(workload.model, ranks)
    return 2 * link.latency + rows * there / link.bandwidth, link.latency + rows * back / link.bandwidth


def imbalance(workload: Workload, ranks: int) -> float:
    """Pairs of the busiest rank over the mean, experts placed linearly."""
    experts = workload.model.num_experts
    share, more = divmod(experts, ranks)
    rank_of = np.repeat(np.arange(ranks), [share + (rank < more) for rank in range(ranks)])
    counts = np.bincount(rank_of[workload.topk_ids().ravel()], minlength=ranks)
    return float(counts.max() / counts.mean())


def estimate(workload: Workload, ranks: int, link: Link, *, share: float, one_device: float) -> list[Estimate]:
    """Both exchanges; `share` and `one_device` are measured seconds of `share_of_rank` and `whole_layer`."""
    busiest = imbalance(workload, ranks)
    return [
        Estimate(workload.id, ranks, exchange, share, *times, one_device, busiest)
        for exchange in EXCHANGES
        for times in [communication_times(workload, ranks, exchange, link)]
    ]


def as_table(estimates: Sequence[Estimate], link: Link) -> Table:
    """A table that says what it is in its title."""
    title = f"MODEL, not measured: {link.bandwidth / 1e9:g} GB/s and {link.latency * 1e6:g} us a link"
    table = Table(title=title, title_justify="left")
    columns = (
        *("workload", "ranks", "exchange", "layer, us", "share, us (measured)", "dispatch, us", "combine, us"),
        *("communication", "one device, us (measured)", "speedup", "busiest rank"),
    )
    for name in columns:
        table.add_column(name, justify="left" if name in ("workload", "exchange") else "right")
    for one in estimates:
        times = (one.seconds, one.share, one.dispatch, one.combine)
        table.add_row(
            one.workload,
            str(one.ranks),
            one.exchange,
            *(f"{seconds * 1e6:.1f}" for seconds in times),
            f"{one.communication:.0%}",
            f"{one.one_device * 1e6:.1f}",
            f"{one.speedup:.2f}",
            f"{one.imbalance:.2f}",
        )
    return table


def as_json(estimates: Sequence[Estimate], link: Link) -> dict[str, Any]:
    """Plain data, which says that it is a model."""
    return {
        "schema": SCHEMA,
        "is_model": True,
        "assumptions": list(ASSUMPTIONS),
        "link": asdict(link),
        "estimates": [
            asdict(one) | {"seconds": one.seconds, "communication": one.communication, "speedup": one.speedup}
            for one in estimates
        ],
    }
