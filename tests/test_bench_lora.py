"""The cost of adapters, measured on the CPU: contenders, their judge, and the lines that are printed."""

import json
from dataclasses import replace

import pytest
import torch

from moegate.bench import __main__ as command
from moegate.bench.floor import Ceilings, adapter_bytes, floor
from moegate.bench.gate.worker import workload_as_data, workload_from
from moegate.bench.lora import (
    ADAPTED,
    DEVICE_KNOWN,
    HOST_KNOWN,
    LoraContender,
    extra_times,
    lora_contenders,
)
from moegate.bench.operands import WeightBank, make_operands
from moegate.bench.runner import measure_workload
from moegate.bench.selection import select_workloads
from moegate.bench.session import LayerBench, run_workloads
from moegate.bench.verification import verify_by_budget, verify_rows
from moegate.bench.workloads import MODELS, LoraOptions, Model, Routing, Workload
from moegate.impl.fused_moe import fused_experts

TOY = Model("toy", 8, 2, 32, 48, "none", num_local_experts=4)
WORKLOAD = Workload(TOY, 6, dtype="fp32", cache_state="warm")
CEILINGS = Ceilings(1e10, 1e10, {"fp32": 1e11}, "a test")
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def contenders():
    return lora_contenders(WORKLOAD, LoraOptions(4, 3), WeightBank(TOY, WORKLOAD.format, DEVICE))


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


ADAPTED_WORKLOAD = replace(WORKLOAD, lora=LoraOptions(4, 3))


def test_a_workload_has_adapters_of_its_own_and_says_so():
    assert "-fp32+lora4x3-M6-" in ADAPTED_WORKLOAD.id
    operands = make_operands(ADAPTED_WORKLOAD, WeightBank(TOY, WORKLOAD.format, DEVICE), call=2, weight_copy=0)
    assert operands.lora_ids is not None
    assert operands.lora_ids.tolist() == [2, 0, 1, 2, 0, 1]
    assert verify_by_budget(fused_experts, operands).holds
    assert verify_rows(fused_experts, operands).holds
    measured = measure_workload(
        ADAPTED_WORKLOAD, {"moegate": fused_experts}, device="cpu", ceilings=CEILINGS, budget=0.005
    )
    assert measured.records[0].dtype == "fp32+lora4x3"


@pytest.mark.parametrize("verify", [verify_by_budget, verify_rows])
@pytest.mark.parametrize(
    "changes",
    [
        lambda operands: {"adapters": None, "lora_ids": None},
        lambda operands: {"lora_ids": operands.lora_ids.roll(1)},
        lambda operands: {"lora_ids": torch.full_like(operands.lora_ids, -1)},
    ],
    ids=["forgotten", "of another token", "of no token"],
)
def test_a_layer_with_wrong_adapters_is_never_timed(verify, changes):
    operands = make_operands(ADAPTED_WORKLOAD, WeightBank(TOY, WORKLOAD.format, DEVICE), call=0, weight_copy=0)
    wrong = replace(operands, **changes(operands)).pass_to(fused_experts)
    assert not verify(lambda *_, **__: wrong, operands).holds


def test_an_adapter_is_read_once_for_each_expert_that_its_tokens_meet():
    one = replace(ADAPTED_WORKLOAD, num_tokens=1)
    local = int((one.topk_ids() < TOY.local_experts).sum())
    # Two As over H, one B over gate and up, an A over I, a B over H; ranks of 4, in float32.
    assert adapter_bytes(one) == local * 4 * (2 * 32 + 2 * 48 + 48 + 32) * 4
    many = replace(ADAPTED_WORKLOAD, num_tokens=600, routing=Routing("all-to-one"))
    assert adapter_bytes(many) == 3 * 2 * 4 * (2 * 32 + 2 * 48 + 48 + 32) * 4
    assert adapter_bytes(WORKLOAD) == 0
    assert floor(ADAPTED_WORKLOAD, CEILINGS).bytes == floor(WORKLOAD, CEILINGS).bytes + adapter_bytes(ADAPTED_WORKLOAD)
    assert floor(ADAPTED_WORKLOAD, CEILINGS).operations > floor(WORKLOAD, CEILINGS).operations


def test_adapters_are_among_what_is_timed_where_nobody_names_models():
    chosen = select_workloads(torch.device("cuda"))
    assert [(w.model.name, w.num_tokens, str(w.lora)) for w in chosen if w.lora] == [
        ("qwen3-30b-a3b", 1, "lora16x8"),
        ("qwen3-30b-a3b", 64, "lora16x8"),
    ]
    assert len({workload.id for workload in chosen}) == len(chosen)
    assert [w.num_tokens for w in select_workloads(DEVICE, tokens="8") if w.lora] == [8]
    assert not any(w.lora for w in select_workloads(torch.device("cuda"), models="qwen3-30b-a3b"))
    assert not any(w.lora for w in select_workloads(torch.device("cuda"), dtype="fp8-block"))


def test_another_process_gets_the_same_adapters():
    small = next(w for w in select_workloads(DEVICE) if w.lora)
    assert workload_from(json.loads(json.dumps(workload_as_data(small)))) == small


def test_quantised_weights_are_no_workload_of_adapters():
    assert "plain weights" in str(replace(ADAPTED_WORKLOAD, dtype="int8-w8a8").unsupported)
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
