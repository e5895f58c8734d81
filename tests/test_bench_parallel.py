"""The model of many ranks, by hand-computed numbers, and the measurement of several as far as a CPU can take it."""

import json
from dataclasses import replace

import pytest
import torch

from moegate.bench import parallel as measurement
from moegate.bench.__main__ import main
from moegate.bench.ep_model import (
    Link,
    bytes_of_row,
    chance_of_rank,
    communication_times,
    estimate,
    imbalance,
    parse_ranks,
    share_of_rank,
)
from moegate.bench.operands import WeightBank, make_operands
from moegate.bench.workloads import MODELS, SMALL_MODELS, Workload
from moegate.conformance.simulated_ranks import run_simulated
from moegate.conformance.subjects.moegate_parallel import ranks_of
from moegate.impl.parallel.mesh import Mesh

QWEN, SMALL = MODELS["qwen3-30b-a3b"], SMALL_MODELS["qwen3-30b-a3b/16"]
LINK = Link(bandwidth=100e9, latency=5e-6)


def test_an_all_gather_is_its_bytes_and_the_steps_of_a_ring():
    workload = Workload(QWEN, 8192)
    there, back = communication_times(workload, 4, "all_gather", LINK)
    # 3 x 2,048 tokens come to each rank, each of 2,048 bf16 and 8 pairs of 8 bytes.
    assert there == pytest.approx(3 * 5e-6 + 3 * 2048 * (4096 + 64) / 100e9)
    assert back == pytest.approx(3 * 5e-6 + 3 * 2048 * 4096 / 100e9)


def test_an_all_to_all_sends_to_a_rank_the_tokens_that_have_an_expert_there():
    assert chance_of_rank(replace(QWEN, num_experts=4, top_k=1), 4) == pytest.approx(1 / 4)
    assert chance_of_rank(replace(QWEN, num_experts=4, top_k=2), 2) == pytest.approx(1 - 1 / 6)
    assert chance_of_rank(replace(QWEN, num_experts=4, top_k=4), 4) == pytest.approx(1)
    # A rank holds one expert or two: the mean of their chances.
    assert chance_of_rank(replace(QWEN, num_experts=3, top_k=1), 2) == pytest.approx(1 / 2)
    workload = Workload(QWEN, 8192)
    there, back = communication_times(workload, 4, "all_to_all", LINK)
    rows = 3 * 2048 * chance_of_rank(QWEN, 4)
    assert there == pytest.approx(2 * 5e-6 + rows * 4160 / 100e9)
    assert back == pytest.approx(5e-6 + rows * 4096 / 100e9)


def test_rows_travel_as_the_scheme_stores_them():
    assert bytes_of_row(Workload(QWEN, 1)) == (4096 + 64, 4096)
    assert bytes_of_row(Workload(QWEN, 1, dtype="fp8-block")) == (2048 + 4 * 16 + 64, 4096)
    assert bytes_of_row(Workload(QWEN, 1, dtype="int4-g128")) == (4096 + 64, 4096)


def test_an_estimate_adds_measured_and_modelled_times_and_says_which_are_which():
    both = estimate(Workload(QWEN, 1024), 8, LINK, share=100e-6, one_device=500e-6)
    assert [one.exchange for one in both] == ["all_gather", "all_to_all"]
    for one in both:
        assert one.seconds == pytest.approx(100e-6 + one.dispatch + one.combine)
        assert one.communication == pytest.approx(1 - 100e-6 / one.seconds)
        assert one.speedup == pytest.approx(500e-6 / one.seconds)
    assert share_of_rank(Workload(QWEN, 1), 128).model.local_experts == 1
    assert share_of_rank(Workload(QWEN, 1), 3).model.local_experts == 43
    assert imbalance(Workload(QWEN, 4096), 2) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("text", ["", "1", "257", "2,x", "-2"])
def test_numbers_of_ranks_that_cannot_be_are_refused(text):
    with pytest.raises(ValueError, match=r"simulate-ep: expected numbers of ranks in \[2, 256\]"):
        parse_ranks(text)


def test_the_command_prints_a_model_as_a_model(capsys, tmp_path):
    file = tmp_path / "model.json"
    arguments = ["--device", "cpu", "--models", SMALL.name, "--tokens", "4", "--budget", "0.01"]
    link = ["--link-bandwidth", "400", "--link-latency", "10"]
    assert main([*arguments, "--simulate-ep", "2,64", *link, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "MODEL, not measured: 400 GB/s and 10 us a link" in printed
    assert "assumed: a model, not a measurement" in printed
    report = json.loads(file.read_text())
    assert report["is_model"]
    assert report["schema"] == "moegate-ep-model/1"
    assert {(one["ranks"], one["exchange"]) for one in report["estimates"]} == {
        (ranks, exchange) for ranks in (2, 64) for exchange in ("all_gather", "all_to_all")
    }
    assert all(one["share"] > 0 and one["one_device"] > 0 for one in report["estimates"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--simulate-ep", "2"], "simulate-ep: expected link-bandwidth and link-latency beside it"),
        (["--link-latency", "2"], "link-bandwidth, link-latency: expected beside simulate-ep alone"),
        (
            ["--simulate-ep", "2", "--link-bandwidth", "0", "--link-latency", "1"],
            "link-bandwidth: expected a number above 0",
        ),
        (["--simulate-ep", "200", "--link-bandwidth", "1", "--link-latency", "1"], "128 experts, got 200"),
    ],
)
def test_a_model_that_cannot_be_is_refused_by_name(capsys, arguments, error):
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", "--models", SMALL.name, "--tokens", "4", *arguments])
    assert ended.value.code == 4
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("own_first", [False, True])
@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_a_layer_is_judged_before_its_time_counts(exchange, own_first):
    workload = Workload(SMALL, 9, dtype="fp32", cache_state="warm")
    bank = WeightBank(SMALL, workload.format, torch.device("cpu"))
    batches = [make_operands(workload, bank, call=call, weight_copy=0) for call in range(2)]

    def body(rank, links):
        layer = measurement.SharedLayer(ranks_of(Mesh(dp_size=2, ep_size=2), links), batches, exchange, own_first)
        layer.judge()
        sizes = layer.travelling()
        layer.experts.w2 = layer.experts.w2 * 1.1
        try:
            layer.judge()
        except RuntimeError as error:
            return sizes, str(error)

    (first, wrong), (second, _) = [outcome.result for outcome in run_simulated(2, body)]
    assert wrong.startswith(f"{exchange}: NUM-")
    if exchange == "all_gather":
        assert first == second == (5 * (128 * 4 + 64), 5 * 128 * 4)
    else:
        assert first[0] / (128 * 4 + 64) == second[1] / (128 * 4)  # what one receives, the other sends


def test_a_machine_with_too_few_gpus_is_told_so(capsys):
    gpus = torch.cuda.device_count()
    assert measurement.main(["--ranks", str(gpus + 1)]) == 4
    assert measurement.main(["--ranks", "1", "--backend", "gloo"]) == 3
    assert measurement.main(["--dtype", "fp8-block"]) == 4
    assert "dtype: expected bf16, fp16 or fp32, got 'fp8-block'" in capsys.readouterr().err
