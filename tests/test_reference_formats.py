"""The reference of quantised experts, activations and biases against scalar Python, written from the formats."""

import math
from itertools import pairwise

import pytest
import torch

from moegate.reference.activations import Activation
from moegate.reference.batched import batched_experts, routed_call
from moegate.reference.experts import experts, trace_experts
from moegate.reference.quantization import ActivationQuantization, QuantizedWeight, nearest

E4M3 = torch.float8_e4m3fn
CODES = torch.arange(256, dtype=torch.uint8).view(E4M3).double()
NUMBERS = sorted({float(code) for code in CODES if not math.isnan(code)})


def scalar_nearest(value):
    """The nearest e4m3 number by looking at all of them; of two equally near ones that with the even code."""
    value = max(-448.0, min(448.0, value))
    best = min(abs(value - number) for number in NUMBERS)
    near = [number for number in NUMBERS if abs(value - number) == best]
    even = [n for n in near if int(torch.tensor(n).to(E4M3).view(torch.uint8)) % 2 == 0]
    return near[0] if len(near) == 1 else even[0]


def test_fp8_rounds_to_the_nearest_number_and_ties_to_even():
    middles = [(a + b) / 2 for a, b in pairwise(NUMBERS)]
    beside = [m * (1 + s * 1e-13) for m in middles for s in (-1, 1)]
    values = [*NUMBERS, *middles, *beside, 464.0, 1e9, -1e9, 2.0**-10, 2.0**-10 * 1.0001, 0.0]
    got = nearest(torch.tensor(values, dtype=torch.float64), E4M3).tolist()
    assert got == [scalar_nearest(value) for value in values]


def test_int8_rounds_to_even_and_never_reaches_minus_128():
    values = torch.tensor([0.5, 1.5, -0.5, -2.5, 126.5, 127.4, 300.0, -128.0, -300.0], dtype=torch.float64)
    assert nearest(values, torch.int8).tolist() == [0, 2, 0, -2, 126, 127, 127, -127, -127]


def test_nan_stays_nan():
    assert nearest(torch.tensor([math.nan], dtype=torch.float64), E4M3).isnan().all()


@pytest.mark.parametrize(
    ("how", "shares"),
    [
        (ActivationQuantization(E4M3, "tensor"), lambda r, c: 0),
        (ActivationQuantization(E4M3, "token"), lambda r, c: r),
        (ActivationQuantization(torch.int8, "token"), lambda r, c: r),
        (ActivationQuantization(E4M3, "group", group=4), lambda r, c: (r, c // 4)),
        (ActivationQuantization(E4M3, static_scale=0.01), lambda r, c: 0),
    ],
    ids=["tensor", "token", "int8", "group", "static"],
)
def test_activations_share_scales_as_their_granularity_says(how, shares):
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] = 0
    largest = 448 if how.dtype == E4M3 else 127
    amax = {}
    for r in range(3):
        for c in range(10):
            amax[shares(r, c)] = max(amax.get(shares(r, c), 0.0), abs(float(x[r, c])))
    values, scales = how.quantize(x)
    for r in range(3):
        for c in range(10):
            top = amax[shares(r, c)]
            scale = how.static_scale or (top / largest if top else 1.0)
            assert float(scales[r, c]) == scale
            v = float(x[r, c]) / scale
            expected = scalar_nearest(v) if how.dtype == E4M3 else max(-127, min(127, round(v)))
            assert float(values[r, c]) == expected
    assert torch.equal(how.rounded(x), values.double() * scales)


def test_blocks_start_anew_at_the_first_up_row_and_are_cut_off_at_the_ends():
    n, k, bn, bk = 5, 7, 2, 3  # gate and up of five rows each: three blocks of rows a part, three of columns
    values = torch.arange(10 * k).reshape(1, 10, k).remainder(17).to(torch.int8)
    scale = torch.rand(1, 6, 3, generator=torch.Generator().manual_seed(1)) + 1
    weight = QuantizedWeight(values, scale, block_shape=(bn, bk), parts=2).expert(0)
    for row in range(10):
        for column in range(k):
            block = (row // n) * 3 + row % n // bn
            expected = float(values[0, row, column]) * float(scale[0, block, column // bk])
            assert float(weight[row, column]) == expected


@pytest.mark.parametrize("zeros", [True, False])
def test_nibbles_and_zero_points_are_unpacked_even_index_first(zeros):
    n, k, group = 4, 8, 4
    generator = torch.Generator().manual_seed(2)
    packed = torch.randint(0, 256, (1, n, k // 2), generator=generator).to(torch.uint8)
    zero = torch.randint(0, 256, (1, n // 2, k // group), generator=generator).to(torch.uint8) if zeros else None
    scale = torch.rand(1, n, k // group, generator=generator)
    quantized = QuantizedWeight(packed, scale, zero, (0, group))
    assert quantized.shape == (1, n, k)
    weight = quantized.expert(0)
    for row in range(n):
        for column in range(k):
            nibble = int(packed[0, row, column // 2]) >> (4 * (column % 2)) & 15
            z = 8 if zero is None else int(zero[0, row // 2, column // group]) >> (4 * (row % 2)) & 15
            assert float(weight[row, column]) == (nibble - z) * float(scale[0, row, column // group])


def scalar_activation(name, g, u, alpha=1.702, limit=7.0):
    if name == "swigluoai":
        g, u = min(g, limit), max(-limit, min(limit, u))
        return g / (1 + math.exp(-alpha * g)) * (u + 1)
    kind = name.removesuffix("_no_mul")
    a = {
        "silu": lambda: g / (1 + math.exp(-g)),
        "gelu": lambda: g * (1 + math.erf(g / math.sqrt(2))) / 2,
        "gelu_tanh": lambda: g / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
        "relu2": lambda: max(g, 0.0) ** 2,
    }[kind]()
    return a if name.endswith("_no_mul") else a * u


NAMES = ("silu", "gelu", "gelu_tanh", "swigluoai", "silu_no_mul", "gelu_no_mul", "relu2_no_mul")


@pytest.mark.parametrize("name", NAMES)
def test_activations_and_their_slopes_are_those_of_the_scalar_form(name):
    activation = Activation(name)
    for g in (-9.0, -1.3, -0.2, 0.3, 2.0, 6.5, 8.0):
        for u in (-8.0, -0.7, 1.1, 9.0):
            gate, up = torch.tensor(g, dtype=torch.float64), torch.tensor(u, dtype=torch.float64)
            assert float(activation(gate, up)) == pytest.approx(scalar_activation(name, g, u), rel=1e-12, abs=1e-15)
            step = 1e-6
            for slope, value in (
                (activation.of_gate_slope, activation.of_gate),
                (activation.of_up_slope, activation.of_up),
            ):
                at = gate if value == activation.of_gate else up
                quotient = float(value(at + step) - value(at - step)) / (2 * step)
                assert float(slope(at)) == pytest.approx(quotient, abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_no_activation_bends_more_than_its_curvature_says(name):
    activation = Activation(name, alpha=1.25, limit=6.0)
    gate = torch.linspace(-12, 5.9, 4001, dtype=torch.float64)
    bend = activation.of_gate_slope(gate).diff() / gate.diff()
    assert 0.9 * activation.curvature < float(bend.abs().max()) <= activation.curvature * 1.001


@pytest.mark.parametrize("interleaved", [True, False])
def test_rows_are_split_and_joined_in_the_order_of_the_format(interleaved):
    rows = torch.arange(6.0)
    activation = Activation("swigluoai", interleaved=interleaved)
    gate, up = activation.split(rows)
    assert gate.tolist() == ([0, 2, 4] if interleaved else [0, 1, 2])
    assert up.tolist() == ([1, 3, 5] if interleaved else [3, 4, 5])
    assert torch.equal(activation.joined(gate, up), rows)


def test_biases_are_added_behind_the_weight_on_the_input_and_before_the_weight_on_the_output():
    one = torch.ones(1, 1, dtype=torch.float64)
    arguments = {"w13_bias": torch.tensor([[3.0]]), "w2_bias": torch.tensor([[5.0]])}
    layer = (one, 2 * one[None], 7 * one[None], 0.5 * one, torch.zeros(1, 1).int())
    relu2 = Activation("relu2_no_mul")
    on_output = experts(*layer, **arguments, activation=relu2)
    on_input = experts(*layer, **arguments, activation=relu2, apply_router_weight_on_input=True)
    assert float(on_output) == 0.5 * (7 * (2 + 3) ** 2 + 5)
    assert float(on_input) == 7 * (0.5 * 2 + 3) ** 2 + 5


def test_the_batched_format_says_what_the_routed_call_says():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    counts = torch.tensor([3, 1], dtype=torch.int32)
    layer = {
        "w13": torch.randn(2, 8, 6, generator=generator, dtype=torch.float64),
        "w2": torch.randn(2, 6, 4, generator=generator, dtype=torch.float64),
        "w13_bias": torch.randn(2, 8, generator=generator),
        "w2_bias": torch.randn(2, 6, generator=generator),
        "activation": Activation("swigluoai"),
        "quantize_input": ActivationQuantization(E4M3, "tensor"),
        "quantize_hidden": ActivationQuantization(E4M3, "tensor"),
    }
    slabs = batched_experts(x, expert_num_tokens=counts, **layer)
    rows, weights, ids, where = routed_call(x, counts)
    routed = trace_experts(rows, topk_weights=weights, topk_ids=ids, **layer).output
    torch.testing.assert_close(slabs[where], routed, rtol=1e-13, atol=1e-13)
    assert (slabs[1, 1:] == 0).all()
