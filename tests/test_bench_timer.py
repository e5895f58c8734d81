"""Timing with a clock that the test controls."""

import math

import pytest
import torch

from moegate.bench.timer import (
    HostClock,
    PairedRatio,
    SampleClock,
    Timing,
    choose_rounds,
    interleave,
    one_after_another,
)


class FakeDevice:
    """A device whose passes take as long as they say, with a slow drift, and whose readings wait for `finish`."""

    method = "fake"

    def __init__(self, drift=0.0):
        self.now, self.drift, self.pending, self.finished = 0.0, drift, 0, True

    def spend(self, seconds):
        self.now += seconds * (1 + self.drift * self.now)

    def time(self, run):
        start = self.now
        run()
        seconds = self.now - start
        self.finished = False

        def read():
            if not self.finished:
                raise RuntimeError("read before finish")
            return seconds

        return read

    def finish(self):
        self.finished = True


def test_every_contender_is_timed_once_a_round_in_changing_order():
    device, order = FakeDevice(), []

    def contender(name, seconds):
        def run():
            order.append(name)
            device.spend(seconds)

        return run

    samples = interleave({"a": contender("a", 2.0), "b": contender("b", 3.0)}, device, rounds=20, seed=1)
    assert samples == {"a": pytest.approx([2.0] * 20), "b": pytest.approx([3.0] * 20)}
    rounds = [tuple(order[1 + 2 * i : 3 + 2 * i]) for i in range(20)]  # the first pass is untimed
    assert set(rounds) == {("a", "b"), ("b", "a")}


def test_a_drifting_clock_cancels_in_paired_ratios():
    device = FakeDevice(drift=0.01)
    samples = interleave({"a": lambda: device.spend(1.03), "b": lambda: device.spend(1.0)}, device, rounds=60, seed=3)
    ours, theirs = Timing(tuple(samples["a"])), Timing(tuple(samples["b"]))
    assert ours.spread > 0.2  # the drift dwarfs the difference
    assert PairedRatio.of(ours, theirs).median == pytest.approx(1.03, abs=0.015)


def test_the_device_is_looked_at_before_it_is_waited_for():
    device, seen = FakeDevice(), []
    interleave({"a": lambda: device.spend(1.0)}, device, rounds=3, while_running=lambda: seen.append(device.finished))
    assert seen == [False]


def test_statistics_of_samples():
    timing = Timing((5.0, 1.0, 2.0, 3.0, 4.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert timing.spread == pytest.approx(2 / 3)
    assert Timing((2.0,)).spread == 0.0
    ratio = PairedRatio.of(Timing((1.0, 2.0, 4.0)), Timing((2.0, 2.0, 2.0)))
    assert (ratio.median, ratio.low, ratio.high) == (1.0, 0.75, 1.5)


def test_rounds_fill_the_budget_within_limits():
    device = FakeDevice()
    run = {"a": lambda: device.spend(0.01)}
    assert choose_rounds(run, device, budget=0.3) == 30
    assert choose_rounds(run, device, budget=0.0) == 10
    assert choose_rounds(run, device, budget=100) == 60


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Timing(()), "samples: expected at least one"),
        (lambda: Timing((1.0, 0.0)), "samples: expected times of more than 0 s"),
        (lambda: Timing((1.0, math.nan)), "samples: expected times of more than 0 s"),
        (lambda: PairedRatio.of(Timing((1.0,)), Timing((1.0, 1.0))), "samples: expected as many of both"),
        (lambda: interleave({"a": lambda: None}, HostClock(), rounds=0), "rounds: expected at least 1"),
        (lambda: interleave({}, HostClock(), rounds=1), "passes: expected at least one"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_host_clock_times_what_runs():
    clock = HostClock()
    done = []
    reading = clock.time(lambda: done.append(sum(range(100_000))))
    clock.finish()
    assert done
    assert 0 < reading() < 10


def test_a_pass_on_the_host_runs_every_call():
    done = []
    captured = one_after_another([lambda i=i: done.append(i) for i in range(3)], torch.device("cpu"))
    captured.run()
    assert done == [0, 1, 2]
    assert captured.method == "host"


def test_played_back_samples_come_out_exactly():
    clock, samples = SampleClock(), [3e-5, 1e-5, 0.1, 7.123456789e-6]
    play, read = clock.play(samples), []
    for _ in samples:
        play.next()
        start = clock()
        play.advance()
        read.append(clock() - start)
    assert read == samples
