"""Measuring on the CPU: records, verdicts, peers, the search for tiles."""

import json
from dataclasses import replace

import pytest
import torch

from moegate.bench import __main__ as command
from moegate.bench import machine, tune_device
from moegate.bench.floor import Ceilings
from moegate.bench.formats import FORMATS
from moegate.bench.operands import WeightBank, make_operands
from moegate.bench.peers import load_peer
from moegate.bench.record import Record
from moegate.bench.runner import measure_workload
from moegate.bench.session import OURS, LayerBench, run_workloads
from moegate.bench.timer import Captured, PairedRatio
from moegate.bench.tune import candidate_configs, measure_pairs, search
from moegate.bench.tune_candidates import default_pair
from moegate.bench.verification import WrongKernelError, verify_rows
from moegate.bench.workloads import MODELS, Model, Routing, Workload
from moegate.impl.fused_moe import fused_experts
from moegate.impl.platform import Platform
from moegate.impl.tuning.kernel_config import KernelConfig

TOY = Model("toy", 8, 2, 32, 48, "none")
SHARD = replace(TOY, name="toy-ep2", num_local_experts=4)
WORKLOAD = Workload(TOY, 6, dtype="fp32", cache_state="warm")
CEILINGS = Ceilings(1e10, 1e10, {"fp32": 1e11}, "a test")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The layers are tiny: threads that wait for each other on a busy machine would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measure(subjects, workload=WORKLOAD, **more):
    return measure_workload(workload, subjects, device="cpu", ceilings=CEILINGS, **{"budget": 0.005, **more})


def zeros(hidden_states, *_, **__):
    return torch.zeros_like(hidden_states)


def slightly_wrong(*args, **kwargs):
    return fused_experts(*args, **kwargs) * 1.01


def drops_an_expert(hidden_states, w13, w2, topk_weights, topk_ids, **kwargs):
    return fused_experts(hidden_states, w13, w2, topk_weights * (topk_ids != topk_ids[0, 0]), topk_ids, **kwargs)


def raises(*_, **__):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize("wrong", [zeros, slightly_wrong, drops_an_expert])
def test_a_wrong_kernel_is_never_timed(wrong):
    class Untouchable:
        method = "none"

        def time(self, run):
            raise AssertionError("a wrong kernel was timed")

        def finish(self):
            pass

    with pytest.raises(WrongKernelError, match=f"{OURS} is wrong and is not timed: its result used"):
        measure({OURS: wrong}, clock=Untouchable())


def test_a_graph_that_does_not_write_its_output_is_never_timed():
    def stale(calls, device):
        return Captured(lambda: None, [call() for call in calls], "cuda-graph")

    with pytest.raises(WrongKernelError, match="call 0 of its graph used inf"):
        measure({OURS: fused_experts}, capture=stale)


def test_a_graph_that_is_right_is_timed():
    def replaying(calls, device):
        outputs = [call() for call in calls]

        def run():
            for out, call in zip(outputs, calls, strict=True):
                out.copy_(call())

        return Captured(run, outputs, "cuda-graph")

    (record,) = measure({OURS: fused_experts}, capture=replaying).records
    assert record.method == "cuda-graph"


def test_the_judge_is_exchangeable_and_named():
    class Refuses:
        holds, budget_used = False, 1.7

    with pytest.raises(WrongKernelError, match=r"1\.7 of its error budget"):
        measure({OURS: fused_experts}, verify=lambda experts, operands: Refuses())
    (record,) = measure({OURS: fused_experts}).records
    assert record.verdict.by == "verify_by_budget"
    assert 0 < record.verdict.budget_used <= 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("model", [TOY, SHARD], ids=lambda model: model.name)
def test_rows_are_judged_right_on_every_dtype_and_shard(model, dtype):
    workload = Workload(model, 17, dtype=dtype)
    operands = make_operands(workload, WeightBank(model, workload.format, torch.device("cpu")), 0, 0)
    verdict = verify_rows(fused_experts, operands)
    assert verdict.holds
    assert not verify_rows(lambda *a, **k: fused_experts(*a, **k)[:-1], operands).holds
    assert not verify_rows(lambda *a, **k: fused_experts(*a, **k).double(), operands).holds
    assert not verify_rows(lambda *a, **k: fused_experts(*a, **k) + float("nan"), operands).holds


def test_a_record_survives_json():
    records = measure({OURS: fused_experts, "again": fused_experts}).records
    for record in records:
        data = json.loads(json.dumps(record.as_dict()))
        assert Record.from_dict(data) == record
        assert data["schema"] == "moegate-bench/1"
        assert data["seconds"] == record.timing.median
        assert data["ratio_to_floor"] == pytest.approx(record.timing.median / record.floor.seconds)
    data = records[0].as_dict()
    with pytest.raises(ValueError, match="schema: expected moegate-bench/1, got 'other'"):
        Record.from_dict({**data, "schema": "other"})
    with pytest.raises(ValueError, match="got none of floor"):
        Record.from_dict({key: value for key, value in data.items() if key != "floor"})


def test_a_record_says_where_it_ran_and_on_which_path():
    (record,) = measure({OURS: fused_experts}).records
    assert record.workload == WORKLOAD.id
    assert record.path["backend"] == ["cpu"]
    assert record.machine.torch == torch.__version__
    assert record.cache_state == "warm"
    assert len(record.timing.samples) >= 10


def test_a_cold_workload_without_proof_is_recorded_as_unproven():
    (record,) = measure({OURS: fused_experts}, replace(WORKLOAD, cache_state="cold")).records
    assert record.cache_state == "unproven"
    with pytest.raises(ValueError, match="cache_state: expected"):
        replace(record, cache_state="cold")


def test_a_record_of_a_wrong_kernel_cannot_be_made():
    (record,) = measure({OURS: fused_experts}).records
    with pytest.raises(ValueError, match="verdict: expected one that holds"):
        replace(record, verdict=replace(record.verdict, holds=False))


def test_peers_are_paired_with_ours_and_wrong_ones_left_out():
    measured = measure({OURS: fused_experts, "peer": fused_experts, "wrong": zeros, "broken": raises})
    assert [record.subject for record in measured.records] == [OURS, "peer"]
    ours, peer = measured.records
    assert set(ours.versus) == {"peer"}
    assert ours.versus["peer"] == PairedRatio.of(ours.timing, peer.timing)
    assert peer.versus[OURS] == PairedRatio.of(peer.timing, ours.timing)
    assert "WrongKernelError" in measured.failures["wrong"]
    assert measured.failures["broken"] == "RuntimeError: no such kernel"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="gpt-oss-120b: int4-g128 needs H and I that 128 divides"):
        measure({OURS: fused_experts}, Workload(MODELS["gpt-oss-120b"], 1, dtype="int4-g128"))
    with pytest.raises(ValueError, match="subjects: expected at least one"):
        measure({})
    with pytest.raises(ValueError, match="bank: expected weights of toy"):
        measure({OURS: fused_experts}, bank=WeightBank(SHARD, FORMATS["fp32"], torch.device("cpu")))


def test_a_run_goes_on_after_a_failure_and_says_so_in_its_exit_code():
    workloads = [
        WORKLOAD,
        Workload(MODELS["gpt-oss-120b"], 1, dtype="int4-g128"),
        Workload(SHARD, 3, Routing.parse("zipf1"), "fp32", "warm"),
    ]
    run = run_workloads(LayerBench(torch.device("cpu"), budget=0.005), workloads)
    assert [record.model for record in run.records] == ["toy", "toy-ep2"]
    assert [workload for workload, _ in run.skipped] == [workloads[1].id]
    assert run.exit_code == 0
    run = run_workloads(LayerBench(torch.device("cpu"), ours=zeros), workloads[:1])
    assert run.exit_code == 1
    assert "WrongKernelError" in run.failures[0][2]
    assert run_workloads(LayerBench(torch.device("cpu")), workloads[1:2]).exit_code == 3


def test_a_peer_is_loaded_from_a_file(tmp_path):
    path = tmp_path / "my_peer.py"
    path.write_text("NAME = 'theirs'\nfrom moegate.impl.fused_moe import fused_experts as call\nnumber = 3\n")
    assert load_peer(f"{path}:call") == ("theirs", fused_experts)
    path.with_name("bad.py").write_text("import no_such_module_at_all\n")
    for reference, message in [
        (str(path), "or path/to/file.py:callable"),
        (f"{path}:number", "expected a callable number"),
        (f"{path}x:call", "or path/to/file.py:callable"),
        (f"{tmp_path}/absent.py:call", "expected a file"),
        (f"{tmp_path}/bad.py:call", "failed to load: ModuleNotFoundError"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_peer(reference)
    with pytest.raises(ValueError, match="got 'theirs' twice"):
        LayerBench(torch.device("cpu"), peers=[f"{path}:call"] * 2)


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    peer = tmp_path / "theirs.py"
    peer.write_text("from moegate.impl.fused_moe import fused_experts\n")
    out = tmp_path / "out.json"
    options = ["--models", "mixtral-8x7b/64,gpt-oss-120b/16", "--dtype", "int4-g32"]
    options += ["--tokens", "1", "--budget", "0.01"]
    assert command.main([*options, "--device", "cpu", "--peer", f"{peer}:fused_experts", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "mixtral-8x7b/64",
        "floor us",
        "theirs us",
        "holds",
        "skipped: gpt-oss-120b/16",
        "measured on cpu",
    ):
        assert expected in text
    data = json.loads(out.read_text())
    assert [record["subject"] for record in data["records"]] == ["moegate", "theirs"]
    assert data["skipped"][0]["reason"].startswith("int4-g32 needs H and I that 32 divides")
    nothing = ["--models", "gpt-oss-120b/16", "--dtype", "int4-g32", "--tokens", "1", "--device", "cpu"]
    assert command.main(nothing) == 3


@pytest.mark.parametrize("options", [["--tokens", "0"], ["--models", "no"], ["--device", "tpu"], ["--no-such-option"]])
def test_bad_arguments_exit_with_four(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([*options])
    assert stopped.value.code == 4
    assert "moegate bench: " in capsys.readouterr().err


def test_tiles_that_fail_are_recorded_and_the_others_measured():
    from moegate.impl.tuning import kernel_config

    def picky(*args, **kwargs):
        config = kernel_config._override.get()
        if config and config[0].block_size_n == 128:
            raise RuntimeError("out of shared memory")
        if config and config[0].block_size_n == 256:
            return zeros(*args)
        return fused_experts(*args, **kwargs)

    configs = [KernelConfig(16, n, 32) for n in (64, 128, 256, 32)]
    trials = measure_pairs(WORKLOAD, [(c, c) for c in configs], device="cpu", experts=picky)
    assert {trial.w13.block_size_n for trial in trials[:2]} == {32, 64}
    assert all(trial.final and trial.timing for trial in trials[:2])
    errors = {trial.w13.block_size_n: trial.error for trial in trials[2:]}
    assert "out of shared memory" in errors[128]
    assert "WrongKernelError" in errors[256]
    assert json.dumps([trial.as_dict() for trial in trials])


def test_a_pair_that_breaks_the_device_ends_the_trying_and_not_the_run():
    calls = []

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        return fused_experts(*args, **kwargs)

    trials = measure_pairs(WORKLOAD, [(KernelConfig(16, n, 32),) * 2 for n in (32, 64)], device="cpu", experts=breaks)
    assert any("not tried" in trial.error for trial in trials)


def test_a_search_tries_the_default_first_and_then_the_second_gemm(monkeypatch):
    # What is asked for is the order and that all of it runs: of each one's many samples a first is enough.
    monkeypatch.setattr(tune_device, "_BRIEF_ROUNDS", 1)
    monkeypatch.setattr(tune_device, "choose_rounds", lambda *_, **__: 1)
    ticks, tried = [], []

    class Heard(tune_device.InProcess):
        def gemm(self, workload, gemm, config):
            tried.append((gemm, config))
            return super().gemm(workload, gemm, config)

    candidates = [KernelConfig(16, 64, 32), KernelConfig(16, 128, 32)]
    trials = search(WORKLOAD, candidates, bench=Heard("cpu"), on_progress=lambda: ticks.append(1))
    assert len(ticks) == len(trials)
    assert all(not trial.error for trial in trials)
    if not Platform.of(torch.device("cpu")).runs_triton:  # then only layers can be timed
        assert not tried
        return
    first, second = default_pair(WORKLOAD, Platform.of(torch.device("cpu")))
    assert tried == [(gemm, tile) for gemm, own in (("w13", first), ("w2", second)) for tile in (own, *candidates)]


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_candidates_fit_the_platform(tokens):
    hopper = replace(Platform.parse("cuda:9.0"), num_sms=132)
    workload = Workload(MODELS["qwen3-30b-a3b"], tokens)
    candidates = candidate_configs(workload, hopper)
    assert len(candidates) > 20
    assert len(set(candidates)) == len(candidates)
    assert all(config.shared_memory(torch.bfloat16) <= hopper.shared_memory for config in candidates)


def test_clocks_of_a_cpu_are_unknown_and_a_failing_query_is_no_error(monkeypatch):
    assert machine.read_clocks(torch.device("cpu")) == machine.Clocks()
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine._nvidia_smi("driver_version") is None
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/bin/false")
    assert machine._nvidia_smi("driver_version") is None
