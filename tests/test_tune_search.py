"""The search for tiles and the files it writes, with a bench whose timings are made up."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from moegate.bench import tune_device
from moegate.bench.formats import FORMATS
from moegate.bench.timer import Timing
from moegate.bench.tune import (
    DEFAULT_TOKENS,
    Tuned,
    TunedFileOfLayer,
    Watcher,
    decide,
    layer_key,
    measure_pairs,
    plan_search,
    search,
    tune,
)
from moegate.bench.tune_candidates import GEMMS, default_pair, gemm_candidates, gemm_sizes
from moegate.bench.tune_device import CandidateError, InProcess, Plan, Remote, gemm_variant
from moegate.bench.verification import WrongKernelError
from moegate.bench.workloads import MODELS, Model, Workload
from moegate.impl.experts.kernel_form import use_kernel_forms
from moegate.impl.fused_moe import fused_experts
from moegate.impl.platform import Platform
from moegate.impl.tuning import lookup
from moegate.impl.tuning.kernel_config import KernelConfig, fit_block_k
from moegate.impl.tuning.names import ConfigKey
from moegate.impl.tuning.schema import TunedConfigError
from moegate.impl.tuning.writer import read_tuned_file

HOPPER = replace(Platform.parse("cuda:9.0"), name="NVIDIA H200", num_sms=132)
QWEN = MODELS["qwen3-30b-a3b"]
MIXTRAL = MODELS["mixtral-8x7b"]
WORKLOAD = Workload(QWEN, 8)
FAST13, FAST2 = KernelConfig(16, 64, 256, 1, 4, 3), KernelConfig(16, 128, 128, 1, 4, 3, True)
WRONG, BROKEN = KernelConfig(16, 128, 64, 1, 4, 4), KernelConfig(16, 32, 256, 1, 4, 3)


class FakeBench:
    """Every tile takes 10 us, but for those named; a layer takes the sum. `now` moves by a second a measurement."""

    times_gemms = True

    def __init__(self, seconds=None, errors=None, noise=0.0):
        self.seconds, self.errors, self.noise = seconds or {}, errors or {}, noise
        self.measured: Counter = Counter()
        self.now = 0.0
        self.prepared = []

    def steps(self, plans):
        return len(plans)

    def prepare(self, plans, *, until=float("inf"), on_done=lambda: None):
        self.prepared += plans
        for _ in plans:
            on_done()

    def _of(self, gemm, config):
        for key in ((gemm, config), config):
            if key in self.errors:
                raise self.errors[key]
        return self.seconds.get((gemm, config), 10e-6)

    def gemm(self, workload, gemm, config):
        self.now += 1
        self.measured[workload.model.name, workload.num_tokens] += 1
        return self._of(gemm, config)

    def layer(self, workload, pair):
        self.now += 1
        return Timing((self._layer(pair),))

    def final(self, workload, pairs):
        self.now += 1
        return [
            Timing(tuple(self._layer(pair) * (1 + self.noise * ((i * (n + 1)) % 3 - 1)) for i in range(12)))
            for n, pair in enumerate(pairs)
        ]

    def _layer(self, pair):
        return sum(self._of(gemm, config) for gemm, config in zip(GEMMS, pair, strict=True))


FASTER = {("w13", FAST13): 7e-6, ("w2", FAST2): 8e-6}


def run(tmp_path, bench, workloads=(WORKLOAD,), **more):
    return tune(
        list(workloads),
        bench=bench,
        platform=HOPPER,
        folder=tmp_path,
        triton_version="3.6.0",
        clock=lambda: bench.now,
        **more,
    )


def tokens_in(path):
    found = read_tuned_file(path)
    assert found is not None
    return list(found.entries)


def decided(workload, trials) -> Tuned:
    tuned = decide(workload, trials, default_pair(workload, HOPPER))
    assert tuned is not None
    return tuned


def found_by_lookup(monkeypatch, folder, model, num_tokens, dtype="bf16"):
    monkeypatch.setenv("MOEGATE_TUNED_CONFIG_FOLDER", str(folder))
    lookup.forget()
    return lookup.find_kernel_configs(
        num_tokens=num_tokens,
        top_k=model.top_k,
        num_experts=model.num_experts,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        dtype=FORMATS[dtype].activations,
        platform=HOPPER,
        scheme=FORMATS[dtype].scheme,
        block_shape=FORMATS[dtype].block_shape,
    )


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    yield
    lookup.forget()


def test_the_best_of_each_gemm_is_paired_and_chosen(tmp_path):
    (tuned,) = run(tmp_path, FakeBench(FASTER)).tuned
    assert tuned.pair == (FAST13, FAST2)
    assert tuned.is_better
    assert (tuned.best_seconds, tuned.default_seconds) == (pytest.approx(15e-6), pytest.approx(20e-6))


def test_tiles_of_different_row_blocks_are_never_paired():
    bench = FakeBench({("w13", KernelConfig(64, 128, 64, 1, 4, 3)): 1e-6, ("w2", KernelConfig(32, 64, 64)): 1e-6})
    workload = Workload(QWEN, 512)
    trials = search(workload, platform=HOPPER, bench=bench)
    pairs = [trial.pair for trial in trials if not trial.gemm]
    assert all(w13.block_size_m == w2.block_size_m for w13, w2 in pairs)
    tuned = decided(workload, trials)
    assert tuned.best_seconds == pytest.approx(11e-6)


def test_a_fast_wrong_candidate_loses_and_a_raising_one_is_recorded(tmp_path):
    errors = {WRONG: WrongKernelError("candidate is wrong"), BROKEN: CandidateError("compiling: its process died")}
    bench = FakeBench(FASTER | {("w13", WRONG): 1e-9, ("w2", WRONG): 1e-9}, errors)
    (tuned,) = run(tmp_path, bench).tuned
    assert tuned.pair == (FAST13, FAST2)
    failures = {trial.w13: trial.error for trial in tuned.failed}
    assert failures == {WRONG: "WrongKernelError: candidate is wrong", BROKEN: "compiling: its process died"}
    assert tuned.about()["failed"] == 4


def test_a_pair_that_is_wrong_only_as_a_layer_loses():
    class Wrong(FakeBench):
        def layer(self, workload, pair):
            if pair == (FAST13, FAST2):
                raise WrongKernelError("candidate is wrong")
            return super().layer(workload, pair)

    tuned = decided(WORKLOAD, search(WORKLOAD, platform=HOPPER, bench=Wrong(FASTER)))
    assert tuned.pair[0] == FAST13
    assert tuned.pair[1] != FAST2


def test_the_default_is_kept_where_nothing_beats_it_by_more_than_the_spread(tmp_path, monkeypatch):
    slightly = {("w13", FAST13): 9.9e-6}
    assert run(tmp_path / "calm", FakeBench(slightly)).tuned[0].pair[0] == FAST13
    (tuned,) = run(tmp_path / "noisy", FakeBench(slightly, noise=0.05)).tuned
    assert not tuned.is_better
    assert tuned.pair == default_pair(WORKLOAD, HOPPER)
    assert tuned.about()["taken"] == "default"
    assert found_by_lookup(monkeypatch, tmp_path / "noisy", QWEN, 8).key == 8


def test_where_the_default_fails_the_fastest_is_taken(tmp_path):
    default = default_pair(WORKLOAD, HOPPER)[0]
    (tuned,) = run(tmp_path, FakeBench(FASTER, {default: RuntimeError("no room")})).tuned
    assert tuned.pair == (FAST13, FAST2)
    assert tuned.default_seconds is None


def test_the_file_has_the_name_that_the_lookup_reads_and_is_used(tmp_path, monkeypatch):
    result = run(tmp_path, FakeBench(FASTER))
    name = "E=128,N=768,H=2048,top_k=8,device_name=NVIDIA_H200.json"
    assert [file.name for file in result.files] == [name]
    assert ConfigKey.parse(name) == layer_key(WORKLOAD, HOPPER)
    found = found_by_lookup(monkeypatch, tmp_path, QWEN, 9)
    assert (found.w13, found.w2, found.key) == (FAST13, FAST2, 8)
    assert found.source == str(tmp_path / name)


def test_tiles_for_fp8_blocks_are_measured_and_written_under_their_own_name(tmp_path, monkeypatch):
    best13, best2 = KernelConfig(16, 128, 128, 1, 8, 6, True), KernelConfig(16, 64, 128, 1, 4, 4)
    bench = FakeBench({("w13", best13): 7e-6, ("w2", best2): 8e-6})
    result = run(tmp_path, bench, [Workload(QWEN, 8, dtype="fp8-block"), WORKLOAD])
    name = "E=128,N=768,H=2048,top_k=8,device_name=NVIDIA_H200"
    assert [file.name for file in result.files] == [
        f"{name},dtype=fp8_w8a8,block_shape=[128,128].json",
        f"{name}.json",
    ]
    found = found_by_lookup(monkeypatch, tmp_path, QWEN, 9, "fp8-block")
    assert (found.w13, found.w2, found.key) == (best13, best2, 8)
    assert found.source == str(result.files[0])
    assert found_by_lookup(monkeypatch, tmp_path, QWEN, 9).source == str(result.files[1])


def test_the_file_says_where_it_comes_from(tmp_path):
    run(tmp_path, FakeBench(FASTER))
    document = json.loads(next(tmp_path.iterdir()).read_text())
    assert document["triton_version"] == "3.6.0"
    assert document["about"]["device"] == "NVIDIA H200"
    entry = document["about"]["tokens"]["8"]
    assert (entry["best_us"], entry["default_us"], entry["taken"]) == (15.0, 20.0, "best")
    assert entry["candidates"] > 70


def test_an_interrupted_run_goes_on_without_measuring_again(tmp_path):
    class Interrupted(FakeBench):
        def gemm(self, workload, gemm, config):
            if workload.num_tokens == 64:
                raise KeyboardInterrupt
            return super().gemm(workload, gemm, config)

    workloads = [Workload(QWEN, tokens) for tokens in (1, 8, 64)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupted(FASTER), workloads)
    path = tmp_path / layer_key(WORKLOAD, HOPPER).file_name
    assert tokens_in(path) == [1, 8]
    bench = FakeBench(FASTER)
    second = run(tmp_path, bench, workloads)
    assert [workload.num_tokens for workload in second.kept] == [1, 8]
    assert set(bench.measured) == {(QWEN.name, 64)}
    assert [plan.workload.num_tokens for plan in bench.prepared] == [64]
    assert set(json.loads(path.read_text())["about"]["tokens"]) == {"1", "8", "64"}
    third = FakeBench()
    assert len(run(tmp_path, third, workloads).kept) == 3
    assert not third.measured
    assert not third.prepared


def test_again_and_another_triton_measure_what_is_there(tmp_path):
    run(tmp_path, FakeBench(FASTER), [WORKLOAD, Workload(QWEN, 1)])
    assert run(tmp_path, FakeBench(), again=True).tuned[0].pair == default_pair(WORKLOAD, HOPPER)
    path = tmp_path / layer_key(WORKLOAD, HOPPER).file_name
    assert tokens_in(path) == [1, 8]
    path.write_text(path.read_text().replace('"3.6.0"', '"3.5.0"'))
    assert run(tmp_path, FakeBench(FASTER)).tuned[0].pair == (FAST13, FAST2)
    assert tokens_in(path) == [8]


def test_a_broken_file_is_an_error_and_is_left_alone(tmp_path):
    path = tmp_path / layer_key(WORKLOAD, HOPPER).file_name
    path.write_text("{")
    with pytest.raises(TunedConfigError, match="expected JSON"):
        run(tmp_path, FakeBench())
    assert path.read_text() == "{"


def test_nothing_is_begun_once_the_minutes_are_used_up(tmp_path):
    bench = FakeBench(FASTER)
    workloads = [Workload(QWEN, tokens) for tokens in DEFAULT_TOKENS]
    result = run(tmp_path, bench, workloads, minutes=2)
    # A workload of about 75 seconds is begun at 0 and at 75 seconds, and none after 120.
    assert [tuned.workload.num_tokens for tuned in result.tuned] == [1, 2]
    assert [workload.num_tokens for workload in result.left] == list(DEFAULT_TOKENS[2:])


def test_the_minutes_are_shared_between_the_models(tmp_path):
    workloads = [Workload(model, tokens) for model in (QWEN, MIXTRAL) for tokens in (1, 2, 4, 8)]
    result = run(tmp_path, FakeBench(FASTER), workloads, minutes=4)
    measured = Counter(tuned.workload.model.name for tuned in result.tuned)
    assert measured == {QWEN.name: 2, MIXTRAL.name: 2}
    assert len(result.files) == 2


@pytest.mark.parametrize(("dtype", "sorted_from"), [("bf16", 2048), ("fp8-block", 512)])
def test_tokens_at_which_other_kernels_run_by_default_come_last(tmp_path, dtype, sorted_from):
    counts = (4096, sorted_from, sorted_from // 2, 8)
    workloads = [Workload(model, count, dtype=dtype) for model in (QWEN, MODELS["qwen3.5-35b-a3b"]) for count in counts]
    with use_kernel_forms("measured"):
        result = run(tmp_path, FakeBench(), workloads[:4])
        assert [tuned.workload.num_tokens for tuned in result.tuned] == [sorted_from // 2, 8, 4096, sorted_from]
        cut = run(tmp_path / "cut", FakeBench(), workloads, minutes=6)
    of_general = [tuned.workload.num_tokens for tuned in cut.tuned if tuned.workload.num_tokens < sorted_from]
    assert of_general == [sorted_from // 2, 8] * 2
    assert cut.left
    assert all(workload.num_tokens >= sorted_from for workload in cut.left)
    with use_kernel_forms("general"):
        result = run(tmp_path, FakeBench(), workloads[:4], again=True)
    assert tuple(tuned.workload.num_tokens for tuned in result.tuned) == counts


def test_a_workload_of_which_nothing_can_be_measured_is_named_and_the_others_go_on(tmp_path):
    class Picky(FakeBench):
        def layer(self, workload, pair):
            if workload.num_tokens == 8:
                raise CandidateError("no such device")
            return super().layer(workload, pair)

    result = run(tmp_path, Picky(), [WORKLOAD, Workload(QWEN, 1)])
    assert result.failed == [(WORKLOAD, "no such device")]
    assert [tuned.workload.num_tokens for tuned in result.tuned] == [1]


def test_a_final_that_fails_believes_none_of_its_pairs():
    class Crashing(FakeBench):
        def final(self, workload, pairs):
            raise CandidateError("its process died of SIGSEGV")

    trials = search(WORKLOAD, platform=HOPPER, bench=Crashing())
    assert decide(WORKLOAD, trials, default_pair(WORKLOAD, HOPPER)) is None
    assert any(trial.error == "in the final: its process died of SIGSEGV" for trial in trials)


def test_progress_reaches_what_was_planned(tmp_path):
    class Count(Watcher):
        planned, steps = 0, 0

        def plan(self, steps):
            self.planned = steps

        def step(self):
            self.steps += 1

    watcher = Count()
    run(tmp_path, FakeBench(FASTER), [WORKLOAD, Workload(MIXTRAL, 4096)], watcher=watcher)
    assert watcher.steps == watcher.planned


def test_layers_that_look_for_one_file_are_tuned_once(tmp_path):
    twin = replace(QWEN, name="twin")
    result = run(tmp_path, FakeBench(), [WORKLOAD, Workload(twin, 8), Workload(twin, 1)])
    assert [(tuned.workload.model.name, tuned.workload.num_tokens) for tuned in result.tuned] == [
        (QWEN.name, 8),
        ("twin", 1),
    ]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_device_without_a_name_cannot_have_a_file():
    with pytest.raises(ValueError, match="device: expected one with a name"):
        layer_key(WORKLOAD, replace(HOPPER, name=""))


@pytest.mark.parametrize("model", [QWEN, MIXTRAL, MODELS["gpt-oss-like"], MODELS["minimax-m2.5-ep4"]])
@pytest.mark.parametrize("tokens", [1, 8, 64, 512, 4096, 8192])
def test_the_grid_is_of_a_bearable_size_and_holds_the_default(model, tokens):
    workload = Workload(model, tokens)
    for gemm, default in zip(GEMMS, default_pair(workload, HOPPER), strict=True):
        candidates = gemm_candidates(workload, gemm, HOPPER)
        assert candidates[0] == default
        assert 10 < len(candidates) == len(set(candidates)) <= 70
        assert all(config.shared_memory(workload.torch_dtype) <= HOPPER.shared_memory for config in candidates)


@pytest.mark.parametrize(
    ("tokens", "tile"),
    [
        (1, KernelConfig(16, 64, 128, 1, 4, 4, True)),
        (8, KernelConfig(16, 64, 256, 1, 4, 3)),
        (64, KernelConfig(16, 128, 128, 1, 4, 3, True)),
        (512, KernelConfig(64, 128, 64, 1, 4, 3)),
        (4096, KernelConfig(128, 256, 64, 8, 8, 4)),
    ],
)
def test_tiles_that_were_measured_to_be_good_are_in_the_grid(tokens, tile):
    assert tile in gemm_candidates(Workload(QWEN, tokens), "w13", HOPPER)


def test_a_limit_draws_the_same_candidates_each_time_and_keeps_the_default():
    plan = plan_search(WORKLOAD, HOPPER, limit=5)
    assert plan == plan_search(WORKLOAD, HOPPER, limit=5)
    assert (len(plan.w13), plan.w13[0]) == (6, default_pair(WORKLOAD, HOPPER)[0])


@pytest.mark.parametrize("name", ["minimax-m2.5-ep4", "qwen3.5-35b-a3b", "deepseek-v3-tp8", "gpt-oss-like"])
@pytest.mark.parametrize("tokens", [1, 64, 512, 4096])
def test_tiles_for_fp8_blocks_lie_in_one_block_of_scales(name, tokens):
    workload = Workload(MODELS[name], tokens, dtype="fp8-block")
    for gemm, default in zip(GEMMS, default_pair(workload, HOPPER), strict=True):
        candidates = gemm_candidates(workload, gemm, HOPPER)
        assert candidates[0] == default
        assert 5 < len(candidates) == len(set(candidates)) <= 50
        assert all(fit_block_k(config, (128, 128)) == config for config in candidates)
        assert all(config.block_size_n <= 128 for config in candidates)
    assert default_pair(workload, HOPPER) != default_pair(replace(workload, dtype="bf16"), HOPPER)


def test_operands_of_one_byte_leave_room_for_more_steps_in_flight():
    stages = [
        max(config.num_stages for config in gemm_candidates(Workload(QWEN, 8, dtype=dtype), "w13", HOPPER))
        for dtype in ("bf16", "fp8-block")
    ]
    assert stages == [5, 8]


def test_no_more_stages_are_tried_than_there_are_steps_to_fetch_ahead():
    short = Workload(MODELS["deepseek-v3-tp8"], 8, dtype="fp8-block")
    assert {config.num_stages for config in gemm_candidates(short, "w2", HOPPER)[1:]} == {3}


def test_float32_has_a_grid_of_its_own():
    candidates = gemm_candidates(Workload(QWEN, 64, dtype="fp32"), "w13", HOPPER)
    assert len(candidates) > 10
    assert not any(config.swap_ab for config in candidates)


def test_each_variant_is_compiled_once_for_all_tokens_gemms_and_models():
    workloads = [Workload(model, tokens) for model in (QWEN, MIXTRAL) for tokens in DEFAULT_TOKENS]
    plans = [plan_search(workload, HOPPER) for workload in workloads]
    remote = Remote.__new__(Remote)
    remote._device = "cuda:0"
    measured = sum(len(plan.w13) + len(plan.w2) for plan in plans)
    assert remote.steps(plans) < 230 < measured / 8
    assert gemm_variant(workloads[3], "w13", FAST13) == gemm_variant(workloads[4], "w2", FAST13)
    assert gemm_variant(workloads[0], "w13", FAST13) != gemm_variant(workloads[4], "w13", FAST13)
    assert gemm_sizes(workloads[0], "w2") == (2048, 768)


def test_a_candidate_that_did_not_compile_is_not_measured():
    remote = Remote.__new__(Remote)
    remote._failed = {gemm_variant(WORKLOAD, "w13", WRONG): "compiling: ended after 90 s"}
    with pytest.raises(CandidateError, match="compiling: ended after 90 s"):
        remote.gemm(Workload(QWEN, 16), "w13", WRONG)


def test_a_plan_gives_each_gemm_its_own_candidates():
    plan = Plan(WORKLOAD, (FAST13,), (FAST2,))
    assert (plan.candidates("w13"), plan.candidates("w2")) == ((FAST13,), (FAST2,))


def test_a_file_is_known_by_its_folder_and_key(tmp_path):
    file = TunedFileOfLayer(tmp_path, layer_key(WORKLOAD, HOPPER), "3.6.0", "NVIDIA H200")
    file.load()
    assert file.entries == {}
    assert file.path.parent == tmp_path


# --- kernels under the interpreter --------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(
    not Platform.of(torch.device("cpu")).runs_triton, reason="Triton runs on a GPU, or with TRITON_INTERPRET=1"
)
# Several blocks of scales along H, a tail behind the last one along I; a rank of two.
SMALL = Workload(Model("small", 4, 2, 256, 192, "none", num_local_experts=2), 3, dtype="fp8-block")
TILES = [KernelConfig(16, 32, 64, 1, 4, 1), KernelConfig(16, 64, 128, 1, 4, 1, swap_ab=True)]


@needs_triton
def test_a_layer_of_fp8_blocks_is_timed_under_each_pair_of_tiles_and_a_wrong_one_is_not():
    pair = (TILES[1], replace(TILES[1], swap_ab=False))
    (trial,) = measure_pairs(SMALL, [pair], device="cpu")
    assert (trial.error, trial.final) == ("", True)

    def scaled(*args, **options):
        return fused_experts(*args, **options) * 1.12

    (trial,) = measure_pairs(SMALL, [pair], device="cpu", experts=scaled)
    assert trial.error.startswith("WrongKernelError: candidate is wrong and is not timed: its result")


@needs_triton
@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("dtype", ["bf16", "fp8-block"])
def test_a_gemm_that_is_a_little_wrong_is_not_timed(monkeypatch, gemm, dtype):
    workload = replace(SMALL, dtype=dtype)
    assert InProcess("cpu").gemm(workload, gemm, TILES[1]) > 0
    right = tune_device.grouped_gemm

    def scaled(c, *args, **options):
        right(c, *args, **options)
        c *= 1.03

    monkeypatch.setattr(tune_device, "grouped_gemm", scaled)
    with pytest.raises(WrongKernelError, match=f"its {gemm} GEMM"):
        InProcess("cpu").gemm(workload, gemm, TILES[1])


@needs_triton
@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("which", ["a_scale", "b_scale"])
def test_a_gemm_of_fp8_blocks_that_reads_another_blocks_scale_is_not_timed(monkeypatch, gemm, which):
    right = tune_device._gemm_operands

    def shifted(*args):
        operands = right(*args)
        return replace(operands, **{which: getattr(operands, which).roll(1, dims=-1)})

    monkeypatch.setattr(tune_device, "_gemm_operands", shifted)
    with pytest.raises(WrongKernelError, match=f"its {gemm} GEMM"):
        InProcess("cpu").gemm(SMALL, gemm, TILES[0])
