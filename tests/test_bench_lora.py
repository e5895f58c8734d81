"""The cost of adapters, measured on the CPU: contenders, their judge, and the lines that are printed."""

import json

import pytest
import torch

from moegate.bench import __main__ as command
from moegate.bench.floor import Ceilings
from moegate.bench.lora import (
    ADAPTED,
    DEVICE_KNOWN,
    HOST_KNOWN,
    LoraContender,
    LoraContenders,
    LoraOptions,
    extra_times,
)
from moegate.bench.operands import WeightBank, make_operands
from moegate.bench.runner import measure_workload
from moegate.bench.session import LayerBench, run_workloads
from moegate.bench.verification import verify_rows
from moegate.bench.workloads import MODELS, Model, Workload
from moegate.impl.fused_moe import fused_experts

TOY = Model("toy", 8, 2, 32, 48, "none", num_local_experts=4)
WORKLOAD = Workload(TOY, 6, dtype="fp32", cache_state="warm")
CEILINGS = Ceilings(1e10, 1e10, {"fp32": 1e11}, "a test")
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def contenders():
    return LoraContenders(LoraOptions(4, 3), DEVICE).of(WORKLOAD)


def test_the_layer_with_adapters_is_timed_beside_the_layer_alone(contenders):
    measured = measure_workload(
        WORKLOAD, {"moegate": fused_experts, **contenders}, device="cpu", ceilings=CEILINGS, budget=0.005
    )
    assert not measured.failures
    assert [record.subject for record in measured.records] == ["moegate", ADAPTED, DEVICE_KNOWN, HOST_KNOWN]
    lines = extra_times(measured.records)
    assert len(lines) == 3
    assert all(name in line for name, line in zip((ADAPTED, DEVICE_KNOWN, HOST_KNOWN), lines, strict=True))


def test_adapters_that_are_not_applied_are_never_timed(contenders):
    class Forgetful(LoraContender):
        def __call__(self, *arguments, **options):
            return fused_experts(*arguments, **options)

    wrong = Forgetful(contenders[ADAPTED].table, contenders[ADAPTED].lora_ids)
    measured = measure_workload(
        WORKLOAD, {"moegate": fused_experts, "wrong": wrong}, device="cpu", ceilings=CEILINGS, budget=0.005
    )
    assert "is wrong and is not timed" in measured.failures["wrong"]


def test_the_judge_of_adapters_knows_one_adapter_from_another(contenders):
    operands = make_operands(WORKLOAD, WeightBank(TOY, WORKLOAD.format, DEVICE), call=0, weight_copy=0)
    right = contenders[ADAPTED]
    assert right.judge(right, operands).holds
    assert not right.judge(LoraContender(right.table, right.lora_ids.roll(1)), operands).holds
    assert not verify_rows(right, operands).holds
    none = contenders[DEVICE_KNOWN]
    assert torch.equal(operands.pass_to(none), operands.pass_to(contenders[HOST_KNOWN]))
    assert verify_rows(none, operands).holds


def test_quantised_weights_are_no_workload_of_adapters():
    bench = LayerBench(DEVICE, fixed_ceilings=True, budget=0.005, lora=LoraOptions(4, 2))
    run = run_workloads(bench, [Workload(TOY, 2, dtype="int8-w8a8", cache_state="warm")])
    assert [reason for *_, reason in run.failures + run.skipped] == [
        "ValueError: lora: expected plain weights, got int8-w8a8"
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--lora", "0"], "lora: expected"), (["--lora", "8", "--adapters", "65"], "adapters: expected")],
)
def test_a_rank_or_number_out_of_range_is_a_bad_argument(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        command.main([*words, "--device", "cpu"])
    assert left.value.code == 4
    assert said in capsys.readouterr().err


def test_the_command_prints_what_adapters_cost(capsys, tmp_path):
    target = tmp_path / "run.json"
    words = ["--models", "qwen3.5-35b-a3b/16", "--tokens", "2", "--lora", "8", "--adapters", "2", "--device", "cpu"]
    words += ["--dtype", "bf16"]
    assert command.main([*words, "--fixed-ceilings", "--budget", "0.005", "--json", str(target)]) == 0
    assert "M=2 lora: " in capsys.readouterr().out
    assert ADAPTED in [record["subject"] for record in json.loads(target.read_text())["records"]]


def test_the_models_of_the_bars_can_be_asked_for():
    assert Workload(MODELS["qwen3-30b-a3b"], 64, dtype="bf16").unsupported is None
