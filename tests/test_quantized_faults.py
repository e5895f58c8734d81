"""Faults of quantised experts, activations and biases, each in an otherwise honest layer: NUM flags them.

A fault is an honest emulation on operands that somebody got wrong, or with a quantiser that is wrong, judged against
the right operands. Beside each stands the share of cases in which it must be flagged; those in which it changes too
little to be seen (a tail block without a tail, zero points of eight) are among the others.
"""

import random
from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch

from moegate.conformance import emulation
from moegate.conformance.cases import build_experts
from moegate.conformance.emulation import emulate
from moegate.conformance.numerics import Numerics
from moegate.conformance.properties.num import budget_of, judge_values, reference_of
from moegate.conformance.spec import SCHEMES, VALUES, ExpertsSpec
from moegate.conformance.strategies import POOLS

CASES = 24
NUMERICS = Numerics()
QUANTIZED = [name for name, scheme in SCHEMES.items() if scheme.activation_scale]
DYNAMIC = [name for name in QUANTIZED if "static" not in name]
SCALED = [name for name in SCHEMES if name != "none"]


def specs(schemes, **features):
    """Plain routings of each scheme in turn."""
    rng = random.Random(0)
    for number in range(CASES):
        scheme = schemes[number % len(schemes)]
        h, i, bn, bk = rng.choice([s for s in POOLS["cpu"].shapes_of(scheme) if s[1] > 20])
        base = ExpertsSpec(
            M=16, H=h, I=i, E=4, top_k=2, scheme=scheme, block_n=bn, block_k=bk, seed=number,
            dtype=("bfloat16", "float16")[number % 2], values=rng.choice([v for v in VALUES if v != "zero_rows"]),
        )  # fmt: skip
        yield replace(base, **features)


def flagged(schemes, change=lambda case: case, quantiser=None, **features):
    """In how many cases a wrong layer violates a NUM property."""
    count = 0
    for number, spec in enumerate(specs(schemes, **features)):
        case = build_experts(spec)
        trace = reference_of(case)
        wrong = mock.patch.object(emulation._Arithmetic, "quantized", quantiser) if quantiser else nullcontext()
        with wrong:
            output = emulate(change(case), NUMERICS, number)
        verdicts = judge_values(case, output, trace, budget_of(case, trace, NUMERICS))
        count += not all(verdict.holds for verdict in verdicts)
    return count


def with_stored(**changes):
    """The case with some of what belongs to its weights changed: by name, a function of the old value."""

    def change(case):
        return replace(case, stored=replace(case.stored, **{n: f(getattr(case.stored, n)) for n, f in changes.items()}))

    return change


def one_expert_off(scale):
    scale = scale.clone()
    scale[1] *= 1.03
    return scale


def halves_swapped(scale):
    return torch.cat(scale.chunk(2, dim=1)[::-1], dim=1)


def last_block_as_the_one_before(scale):
    scale = scale.clone()
    scale[..., -1] = scale[..., max(0, scale.shape[-1] - 2)]
    return scale


def transposed_blocks(scale):
    """Blocks of one row of the grid taken in the other order, as a kernel with swapped strides takes them."""
    return scale.flip(-1)


RIGHT = emulation._Arithmetic.quantized


def truncating(self, rows, how):
    right = RIGHT(self, rows, how)
    if right.scales is None:
        return right
    scaled = rows / right.scales
    down = torch.where(right.numbers.abs() > scaled.abs(), _toward_zero(right.numbers, how.dtype), right.numbers)
    return replace(right, numbers=down)


def _toward_zero(numbers, dtype):
    if dtype == torch.int8:
        return numbers - numbers.sign()
    bits = numbers.to(dtype).view(torch.int8)
    return torch.where(bits & 127 > 0, bits - 1, bits).view(dtype).float()


def other_largest(self, rows, how):
    """amax / 447 (int8: 126)."""
    right = RIGHT(self, rows, how)
    if right.scales is None:
        return right
    largest = 127.0 if how.dtype == torch.int8 else 448.0
    scales = right.scales * (largest / (largest - 1))
    scaled = (rows / scales).clamp(-largest, largest)
    return replace(right, numbers=scaled.round() if how.dtype == torch.int8 else scaled.to(how.dtype).float(),
                   scales=scales)  # fmt: skip


def wrapping(self, rows, how):
    """Values beyond the range become the format's NaN instead of its largest number."""
    right = RIGHT(self, rows, how)
    over = (rows / right.scales).abs() > 464 if right.scales is not None else torch.zeros(1, dtype=torch.bool)
    return replace(right, numbers=right.numbers.masked_fill(over, torch.nan))


def hidden_as_it_is():
    """A quantiser that leaves the second GEMM's input alone."""
    calls = []

    def quantized(self, rows, how):
        calls.append(1)
        return RIGHT(self, rows, how) if len(calls) % 2 else replace(RIGHT(self, rows, how), numbers=rows,
                                                                     scales=torch.ones_like(rows))  # fmt: skip

    return quantized


def per_tensor(self, rows, how):
    """One scale for all rows where each should have its own."""
    return RIGHT(self, rows, replace(how, granularity="tensor") if how is not None else None)


def bias_after_the_weight(case):
    """w2's bias without the routing weight: as if it were divided by it before."""
    rest = case.w2_bias / case.topk_weights[:, 0].mean()
    return replace(case, w2_bias=rest.to(case.w2_bias.dtype))


def with_activation(**changes):
    return lambda case: replace(case, activation=replace(case.activation, **changes))


BLOCKS, GROUPS, ZEROS = ["fp8_block"], ["int8_w8a16_group", "int4_group", "int4_group_zp"], ["int4_group_zp"]
FAULTS = {
    "w13's scale of one expert is 3 % off": (SCALED, {"change": with_stored(w13_scale=one_expert_off)}),
    "w2's scale of one expert is 3 % off": (SCALED, {"change": with_stored(w2_scale=one_expert_off)}),
    "the quantiser truncates": (QUANTIZED, {"quantiser": truncating}),
    "the scale is amax over one less": (DYNAMIC, {"quantiser": other_largest}),
    "a static scale does not clamp": (["fp8_tensor_static"], {"quantiser": wrapping}),
    "the hidden rows are not quantised": (QUANTIZED, {"quantiser": "hidden"}),
    "all rows share one scale": (["fp8_tensor_token", "fp8_channel_token", "int8_channel_token"],
                                 {"quantiser": per_tensor}),
    "the last block along K takes the scale before it": (
        BLOCKS + GROUPS, {"change": with_stored(w2_scale=last_block_as_the_one_before)}),
    "blocks along K are read backwards": (BLOCKS, {"change": with_stored(w13_scale=transposed_blocks)}),
    "gate and up take each other's scales": (
        ["fp8_channel_token", "fp8_block", "int8_w8a16_channel", "int4_group"],
        {"change": with_stored(w13_scale=halves_swapped)}),
    "zero points are ignored": (
        ZEROS, {"change": with_stored(w13_zero_point=lambda z: None, w2_zero_point=lambda z: None)}),
    "zero points of the second GEMM are ignored": (ZEROS, {"change": with_stored(w2_zero_point=lambda z: None)}),
    "nibbles are read in the other order": (
        ["int4_group"], {"change": lambda c: replace(c, w2=(c.w2 >> 4) | (c.w2 << 4))}),
    "w13's bias is lost": (SCALED, {"change": lambda c: replace(c, w13_bias=None), "bias": "both"}),
    "w2's bias is lost": (SCALED, {"change": lambda c: replace(c, w2_bias=None), "bias": "both"}),
    "the bias is added after the routing weight": (SCALED, {"change": bias_after_the_weight, "bias": "w2"}),
    "alpha is ignored": (SCALED, {"change": with_activation(alpha=1.702), "activation": "swigluoai_tight"}),
    "the limit is ignored": (SCALED, {"change": with_activation(limit=7.0), "activation": "swigluoai_tight"}),
    "alternating rows are read as packed": (
        [s for s in SCALED if s != "fp8_block"],
        {"change": with_activation(interleaved=False), "activation": "swigluoai_interleaved"}),
    # The two differ by 5e-4 at most, which 16-bit roundings hide.
    "gelu is taken for its tanh form": (
        ["none"], {"change": with_activation(name="gelu_tanh"), "activation": "gelu", "dtype": "float32"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_flagged(name):
    schemes, how = FAULTS[name]
    if how.get("quantiser") == "hidden":
        how = how | {"quantiser": hidden_as_it_is()}
    count = flagged(schemes, **how)
    assert count >= CASES // 2


def test_an_honest_layer_is_not_flagged():
    assert flagged(list(SCHEMES)) == 0
