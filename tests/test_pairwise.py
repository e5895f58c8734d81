"""A covering array holds every pair that can be held, no row that may not be run, and the same rows every time."""

import random
from itertools import combinations, product

import pytest

from moegate.conformance.pairwise import covering_array, pairs_of

FEATURES = {
    "dtype": ("bfloat16", "float16", "float32"),
    "scoring": ("softmax", "sigmoid"),
    "groups": (None, 2, 8),
    "bias": (False, True),
    "top_k": (1, 2, 8),
}


def all_rows(features):
    return [dict(zip(features, values, strict=True)) for values in product(*features.values())]


def possible_pairs(features, is_valid):
    """Every pair of every valid row, by brute force."""
    return set().union(*(pairs_of(row) for row in all_rows(features) if is_valid(row)))


def test_every_pair_is_in_some_row_and_the_rows_are_few():
    rows = covering_array(FEATURES)
    assert set().union(*map(pairs_of, rows)) == possible_pairs(FEATURES, lambda row: True)
    assert 9 <= len(rows) <= 14 < len(all_rows(FEATURES))


def random_constraint(seed):
    """Features, and a predicate that forbids some combinations of two and three values."""
    rng = random.Random(seed)
    features = {f"f{n}": tuple(range(rng.randint(2, 4))) for n in range(rng.randint(3, 5))}
    forbidden = [
        {name: rng.choice(features[name]) for name in rng.sample(list(features), rng.choice((2, 3)))} for _ in range(4)
    ]
    return features, lambda row: not any(all(row[n] == v for n, v in bad.items()) for bad in forbidden)


@pytest.mark.parametrize("seed", range(60))
def test_under_constraints_exactly_the_possible_pairs_are_covered_by_valid_rows(seed):
    features, is_valid = random_constraint(seed)
    rows = covering_array(features, is_valid)
    assert all(is_valid(row) and list(row) == list(features) for row in rows)
    assert set().union(*map(pairs_of, rows)) == possible_pairs(features, is_valid)


def test_the_same_arguments_give_the_same_rows_and_another_seed_gives_others():
    assert covering_array(FEATURES) == covering_array(FEATURES) != covering_array(FEATURES, seed=1)


def test_a_pair_names_its_features_in_alphabetical_order():
    assert pairs_of({"b": 1, "a": 2, "c": 3}) == {
        (("a", 2), ("b", 1)),
        (("a", 2), ("c", 3)),
        (("b", 1), ("c", 3)),
    }


def test_one_feature_has_a_row_for_each_of_its_values():
    assert covering_array({"a": (1, 2, 3)}, lambda row: row["a"] != 2) == [{"a": 1}, {"a": 3}]


def test_a_misspelt_feature_in_a_constraint_is_an_error_and_not_an_open_answer():
    with pytest.raises(KeyError, match="colour"):
        covering_array({"a": (1, 2), "b": (1, 2)}, lambda row: row["colour"] != "red")


@pytest.mark.parametrize(
    ("features", "is_valid", "named"),
    [({"a": (), "b": (1,)}, lambda row: True, "features"), ({"a": (1,), "b": (1,)}, lambda row: False, "is_valid")],
)
def test_what_has_no_row_is_refused_by_name(features, is_valid, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        covering_array(features, is_valid)


def test_many_features_take_few_rows_and_little_time():
    features = {f"f{n}": tuple(range(8)) for n in range(10)}
    rows = covering_array(features)
    assert set().union(*map(pairs_of, rows)) == {
        ((a, x), (b, y)) for a, b in combinations(sorted(features), 2) for x in range(8) for y in range(8)
    }
    assert len(rows) < 160
