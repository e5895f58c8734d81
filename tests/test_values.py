"""Values from hashes: the same bits everywhere, exact on their dtype's grid, and of a sane distribution."""

import zlib
from itertools import product

import pytest
import torch

from moegate.conformance.values import MANTISSA_BITS, hashed, integers, on_grid

DTYPES = list(MANTISSA_BITS)


def test_a_smaller_tensor_holds_the_larger_ones_corner():
    large = on_grid(7, "w13", (6, 9, 11), torch.bfloat16, exponent=2, spread=3)
    small = on_grid(7, "w13", (3, 4, 5), torch.bfloat16, exponent=2, spread=3)
    assert torch.equal(small, large[:3, :4, :5])
    assert torch.equal(integers(7, "ids", (4, 2), 0, 99), integers(7, "ids", (9, 9), 0, 99)[:4, :2])


def scalar_hash(seed, tensor, index):
    """splitmix64's finaliser over the index, in Python's integers."""
    h = seed * 1_000_003 + zlib.crc32(tensor.encode())
    for position in index:
        h = (h + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB % 2**64
        h ^= h >> 31
    return h


def test_the_bits_are_those_of_integer_arithmetic():
    whole = hashed(3, "hidden_states", (2, 3, 4))
    for index in product(range(2), range(3), range(4)):
        assert int(whole[index]) % 2**64 == scalar_hash(3, "hidden_states", index)
    values = on_grid(3, "x", (9,), torch.float16, exponent=2)
    expected = [((scalar_hash(3, "x", (i,)) >> 53) - 1024) / 256 for i in range(9)]
    assert values.tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_lies_on_the_grid_of_its_dtype(dtype):
    bits = MANTISSA_BITS[dtype]
    mantissa = on_grid(1, "x", (64, 64), dtype, exponent=3).double() * 2.0 ** (bits - 3)
    assert torch.equal(mantissa, mantissa.round())
    assert mantissa.abs().max() <= 2**bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_uniform_around_zero(dtype):
    values = on_grid(5, "w2", (300, 300), dtype, exponent=1).double()
    assert abs(float(values.mean())) < 0.02
    assert float(values.std()) == pytest.approx(2 / 3**0.5, rel=0.01)
    assert -2 <= float(values.min()) < -1.98
    assert 1.98 < float(values.max()) < 2
    neighbours = torch.corrcoef(torch.stack([values[:, :-1].flatten(), values[:, 1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.02


def test_spread_values_reach_many_exponents():
    plain, spread = (on_grid(5, "x", (100, 100), torch.float32, spread=s).abs().log2() for s in (0, 6))
    low = torch.tensor([0.05, 0.95])
    plain_range, spread_range = (float(v.quantile(low).diff()) for v in (plain, spread))
    assert spread_range > plain_range + 2


def test_other_seeds_and_other_names_give_other_values():
    drawn = [hashed(seed, name, (32,)) for seed in range(20) for name in ("gate", "up", "w2")]
    assert len({int(value) for one in drawn for value in one}) == 32 * len(drawn)


def test_rows_and_columns_are_not_each_others_mirror():
    square = hashed(0, "x", (16, 16))
    assert square.unique().numel() == 256


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)], ids=str)
def test_an_empty_shape_gives_an_empty_tensor(shape):
    assert on_grid(0, "x", shape, torch.float16).shape == shape
    assert integers(0, "x", shape, 0, 5).shape == shape


def test_integers_cover_their_range_evenly_and_no_more():
    drawn = integers(2, "ids", (4000,), -3, 5)
    counts = torch.bincount(drawn + 3, minlength=8)
    assert counts.numel() == 8
    assert counts.min() > 400
