"""Routing faults of the kinds that have shipped in public engines: each is caught by its property, on the CPU."""

import pytest
from planted import Fault, expect_caught

KERNEL = "kernels/topk_routing.py"
ROUTE = ("test_route.py",)

FAULTS = (
    Fault(
        "routing-ties-go-to-the-higher-id",
        KERNEL,
        "rank = (key.to(tl.int64) << 32) | (BLOCK_E - 1 - lanes).to(tl.int64)[None, :]",
        "rank = (key.to(tl.int64) << 32) | (BLOCK_E - 1 - (num_experts - 1 - lanes)).to(tl.int64)[None, :]",
        ROUTE,
        ("ROUTE-02", "ROUTE-04", "ROUTE-05"),
    ),
    Fault(
        "routing-renormalises-never",
        KERNEL,
        "        if renormalize == 0:",
        "        if renormalize <= 1:",
        ROUTE,
        ("ROUTE-06", "ROUTE-08"),
    ),
    Fault(
        "routing-softmax-is-over-the-chosen-ones-always",
        KERNEL,
        "        if renormalize == 0:",
        "        if renormalize == 2:",
        ROUTE,
        ("ROUTE-06",),
    ),
    Fault(
        "routing-lanes-past-the-last-expert-rank-above-minus-infinity",
        KERNEL,
        "    lowest = -(2**31)  #",
        "    lowest = -2139095040  #",
        ROUTE,
        ("ROUTE-02",),
    ),
    Fault(
        "routing-weighs-by-the-biased-score-at-one-shape",
        KERNEL,
        "        weights = _score(at_ids, maximum, total, scoring_func)\n",
        "        weights = _score(at_ids, maximum, total, scoring_func) + ("
        "tl.load(bias_ptr + ids) if (has_bias != 0) & (num_experts == 128) & (top_k == 8) else 0.0)\n",
        ROUTE,
        ("ROUTE-06",),
    ),
    Fault(
        "routing-drops-the-factor-where-it-renormalises",
        KERNEL,
        "    weights *= routed_scaling_factor\n",
        "    weights *= tl.where(renormalize == 1, 1.0, routed_scaling_factor)\n",
        ROUTE,
        ("ROUTE-06", "ROUTE-08"),
    ),
    Fault(
        "routing-scales-twice",
        "routing.py",
        "            return topk_routing(router_logits, top_k, **method)\n",
        "            return [t * f for t, f in zip(topk_routing(router_logits, top_k, **method),"
        " (float(routed_scaling_factor), 1))]\n",
        ROUTE,
        ("ROUTE-06", "ROUTE-08"),
    ),
    Fault(
        "routing-casts-the-bias-to-the-logits-dtype",
        KERNEL,
        "            bias = tl.load(bias_ptr + experts, mask=exists, other=0.0)\n",
        "            bias = tl.load(bias_ptr + experts, mask=exists, other=0.0)"
        ".to(router_logits_ptr.dtype.element_ty).to(tl.float32)\n",
        ROUTE,
        ("ROUTE-04", "ROUTE-05", "ROUTE-10"),
    ),
    Fault(
        "routing-masks-the-other-groups-with-0",
        KERNEL,
        "        rank = tl.where(eligible, rank, -(2**63))\n",
        "        rank = tl.where(eligible, rank, tl.where(live, rank & 0xFFFFFFFF, -(2**63)))\n",
        ROUTE,
        ("ROUTE-04", "ROUTE-10"),
    ),
    Fault(
        "routing-forgets-the-padding-ids",
        KERNEL,
        "        ids = tl.where(is_token, ids, -1)\n",
        "        ids = tl.where(is_token, ids, ids)\n",
        ROUTE,
        ("ROUTE-09",),
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_planted_fault_of_the_routing_is_caught_by_its_property(fault, tmp_path):
    expect_caught(fault, tmp_path)
