"""What ranks expect of the rows of an all-to-all: alike on all ranks, and not for long where it fails."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moegate.impl.parallel.expected_rows import ExpectedRows, room_for, round_up

PADDED = 256


def numbers(rows):
    return np.array(rows, dtype=np.int32)


def after(*calls, rank=0):
    """What a rank expects after calls with such numbers of rows."""
    expected = ExpectedRows(rank)
    said = [expected.learn(PADDED, numbers(rows)) for rows in calls]
    return expected, said


@given(st.lists(st.lists(st.lists(st.integers(0, PADDED), min_size=3, max_size=3), min_size=3, max_size=3), max_size=6))
def test_what_one_rank_is_to_send_is_what_the_other_expects_and_has_room_for_every_call_that_is_said_to_fit(calls):
    ranks = [ExpectedRows(rank) for rank in range(3)]
    for rows in calls:
        rooms = [rank.room(PADDED, torch.device("cpu")) for rank in ranks]
        said = [rank.learn(PADDED, numbers(rows)) for rank in ranks]
        assert len(set(said)) == 1
        assert len({room is None for room in rooms}) == 1
        for i, sender in enumerate(rooms):
            for j, receiver in enumerate(rooms):
                if sender is not None and receiver is not None:
                    assert sender.sent[j] == receiver.received[i] <= PADDED
                    assert not said[0] or rows[i][j] <= sender.sent[j]
            assert sender is None or sender.on_device.tolist() == sender.sent


@given(st.integers(0, 100_000))
def test_room_is_for_a_few_more_rows_than_there_were(number):
    ((room,),) = room_for(numbers([[number]]), 1 << 30).tolist()
    assert number <= room <= (number + 2 * number**0.5) * 17 / 16 + 1
    assert room_for(numbers([[number]]), number).tolist() == [[number]]
    assert number <= round_up(number) <= number * 17 / 16


def test_nothing_is_expected_of_another_number_of_padded_tokens():
    expected, _ = after([[9, 9], [9, 9]], [[9, 9], [9, 9]])
    assert expected.room(PADDED, torch.device("cpu")) is not None
    assert expected.room(PADDED + 1, torch.device("cpu")) is None


def test_much_room_for_few_rows_is_given_up():
    expected, said = after([[200, 200], [200, 200]], [[200, 200], [200, 200]], [[20, 20], [20, 20]])
    assert said == [False, True, True]
    assert expected.room(PADDED, torch.device("cpu")) is None


@pytest.mark.parametrize("failures", range(8))
def test_each_call_beyond_the_room_doubles_how_many_must_keep_to_the_next(failures):
    expected, device = ExpectedRows(0), torch.device("cpu")

    def calls_until_trusted(rows):
        count = 0
        while expected.room(PADDED, device) is None:
            expected.learn(PADDED, numbers(rows))
            count += 1
        return count

    few, many = [[20, 20], [20, 20]], [[200, 200], [200, 200]]
    assert calls_until_trusted(few) == 2
    for failure in range(failures):
        assert not expected.learn(PADDED, numbers(many))
        expected.learn(PADDED, numbers(few))  # gives up what the others had
        assert calls_until_trusted(few) == min(2 ** (failure + 1), 64)


def test_few_numbers_of_padded_tokens_are_remembered():
    expected, one = ExpectedRows(0), numbers([[1]])
    for padded in range(1, 200):
        expected.learn(padded, one)
        expected.learn(padded, one)
    known = [padded for padded in range(1, 200) if expected.room(padded, torch.device("cpu")) is not None]
    assert known == list(range(136, 200))
