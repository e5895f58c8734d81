"""Calls that are replayed: what is new in each (addresses), what makes another form, and what is never replayed."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from replay_forms import forgotten, plans, reasons

from moegate.conformance.subjects.moegate_replayed import elsewhere
from moegate.impl import path, replay
from moegate.impl.checks import debug_checks
from moegate.impl.fused_moe import fused_experts
from moegate.impl.lora.table import AdapterTable
from moegate.impl.path import record_path
from moegate.impl.platform import Platform
from moegate.impl.quantization import ExpertsQuantization
from moegate.impl.replay import Plan, replaying
from moegate.impl.routing import select_experts
from moegate.impl.tuning import lookup
from moegate.impl.tuning.kernel_config import KernelConfig, use_kernel_configs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not Platform.of(DEVICE).runs_triton, reason="Triton runs nowhere here"),
    pytest.mark.usefixtures(forgotten.__name__),
]
M, E, TOP_K, H, I = 5, 6, 2, 32, 16


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=DEVICE).to(dtype)


def arguments(seed=0, num_tokens=M, dtype=torch.bfloat16, **more):
    torch.manual_seed(seed)
    return {
        "hidden_states": randn(num_tokens, H, dtype=dtype),
        "w13": randn(E, 2 * I, H, dtype=dtype) / 4,
        "w2": randn(E, H, I, dtype=dtype) / 4,
        "topk_weights": torch.rand((num_tokens, TOP_K), device=DEVICE),
        "topk_ids": torch.rand((num_tokens, E), device=DEVICE).argsort(dim=1)[:, :TOP_K].int().contiguous(),
        "backend": "triton",
        **more,
    }


def test_a_form_is_recorded_at_its_second_call_and_replayed_from_the_third_on():
    first, second, third = (arguments(seed) for seed in range(3))
    expected = [fused_experts(**each) for each in (first, second, third)]
    assert not replay._forms, "nothing is replayed where nobody asked for it"
    with replaying():
        assert torch.equal(fused_experts(**first), expected[0])
        assert not plans()
        assert torch.equal(fused_experts(**second), expected[1])
        assert len(plans()) == 1
        assert torch.equal(fused_experts(**third), expected[2])
    assert len(replay._forms) == 1


def test_a_replay_checks_and_decides_nothing_anew(monkeypatch):
    given = arguments()
    with replaying(after=0):
        expected = fused_experts(**given)
        monkeypatch.setattr("moegate.impl.fused_moe.expect_experts_weights", pytest.fail)
        assert torch.equal(fused_experts(**given), expected)


def test_a_weight_that_was_freed_leaves_nothing_behind():
    with replaying(after=0):
        fused_experts(**arguments(1))
        for seed in range(2, 6):
            given = arguments(seed)
            assert torch.equal(fused_experts(**given), fused_experts.__wrapped__(**given))
        assert len(plans()) == 1


def test_each_replay_returns_memory_of_its_own():
    given = arguments()
    with replaying(after=0):
        outputs = [fused_experts(**given) for _ in range(3)]
        kept = outputs[1].clone()
        outputs[2].zero_()
    assert torch.equal(outputs[1], kept)
    assert len({output.data_ptr() for output in outputs}) == 3


def test_routing_is_replayed_too():
    bias = torch.randn(E, device=DEVICE)
    first, second = randn(M, E), randn(M, E)
    options = {"top_k": TOP_K, "scoring_func": "sigmoid", "e_score_correction_bias": bias}
    with replaying(after=0):
        select_experts(first, **options)
        weights, ids = select_experts(second, **options)
        assert len(plans()) == 1
    expected = select_experts(second, **options)
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids, expected[1])


def test_whoever_listens_hears_of_a_replay_what_he_hears_of_the_call():
    given = arguments()
    with record_path() as plain:
        fused_experts(**given)
    with replaying(after=0):
        for _ in range(3):
            with record_path() as record:
                fused_experts(**given)
            assert record.as_dict() == plain.as_dict()


# --- other forms ----------------------------------------------------------------------------------------------------


def strided(given):
    return given | {"hidden_states": randn(M, 2 * H)[:, :H]}


OTHERS = {
    "stride": strided,
    "alignment": lambda given: given | {"hidden_states": randn(M * H + 1)[1:].view(M, H)},
    "shape": lambda _: arguments(num_tokens=M + 1),
    "dtype": lambda _: arguments(dtype=torch.float16),
    "dtype of ids": lambda given: given | {"topk_ids": given["topk_ids"].long()},
    "expert map": lambda given: given | {"expert_map": torch.arange(E, device=DEVICE).flip(0).int()},
    "bias": lambda given: given | {"w2_bias": randn(E, H)},
    "activation": lambda given: given | {"activation": "gelu"},
    "number": lambda given: given | {"activation": "swigluoai", "swiglu_limit": 0.5},
    "order of rows": lambda given: given | {"interleaved": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_call_of_another_form_has_a_plan_of_its_own(name):
    given = arguments()
    other = OTHERS[name](given)
    expected = [fused_experts(**each) for each in (given, other)]
    with replaying(after=0):
        for _ in range(2):
            found = [fused_experts(**each) for each in (given, other)]
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert len(plans()) == 2


def test_tiles_that_are_asked_for_around_a_call_are_another_form():
    given = arguments()
    narrow = KernelConfig(block_size_m=16, block_size_n=16, block_size_k=16)
    with replaying(after=0), record_path() as record:
        fused_experts(**given)
        with use_kernel_configs(narrow):
            fused_experts(**given)
            fused_experts(**given)
        fused_experts(**given)
    assert [each["source"] == "override" for each in record.all("config")] == [False, True, True, False]


def test_a_backend_that_the_environment_asks_for_is_asked_again(monkeypatch):
    given = arguments(backend="auto")
    with replaying(after=0):
        for backend in ("triton", "cpu" if DEVICE == "cpu" else "triton", "triton"):
            monkeypatch.setenv("MOEGATE_BACKEND", backend)
            with record_path() as record:
                fused_experts(**given)
            assert record.last("backend") == backend


def test_tuned_files_that_are_forgotten_are_asked_for_again():
    given = arguments()
    with replaying(after=0):
        fused_experts(**given)
        assert plans()
        lookup.forget()
        assert not plans()


# --- what is checked all the same -----------------------------------------------------------------------------------

REFUSED = {
    "dp_size": (True, TypeError),
    "allow_tf32": (0, TypeError),
    "swiglu_alpha": ("1.702", TypeError),
    "activation": ("tanh", ValueError),
    "backend": ("none", ValueError),
    "topk_weights": ([1.0], TypeError),
    "expert_map": ({}, TypeError),
    "quant": ("fp8", TypeError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_argument_is_refused_by_name_after_good_calls(name):
    value, error = REFUSED[name]
    good = arguments(dp_size=1, allow_tf32=False, swiglu_alpha=1.702)
    with replaying(after=0):
        for _ in range(2):
            fused_experts(**good)
        for _ in range(2):
            with pytest.raises(error, match=f"{name}: expected"):
                fused_experts(**good | {name: value})
    assert len(replay._forms) == 1


def test_debug_checks_see_what_a_replay_would_not():
    given = arguments()
    with replaying(after=0):
        fused_experts(**given)
        given["topk_ids"][0, 0] = E
        with debug_checks(), pytest.raises(ValueError, match="topk_ids: expected ids in"):
            fused_experts(**given)


# --- what is never replayed -----------------------------------------------------------------------------------------


def test_a_call_that_does_more_than_launch_runs_as_it_stands_and_says_why():
    bias, logits = torch.randn(E, device=DEVICE).bfloat16(), randn(M, E)
    with replaying(after=0):
        expected = select_experts(logits, TOP_K, scoring_func="sigmoid", e_score_correction_bias=bias)
        with record_path() as record:
            found = select_experts(logits, TOP_K, scoring_func="sigmoid", e_score_correction_bias=bias)
    assert reasons() == ["the call runs aten._to_copy.default"]
    assert record.last("no_replay") == "the call runs aten._to_copy.default"
    assert torch.equal(found[0], expected[0])


def test_the_largest_magnitude_of_a_whole_tensor_starts_at_0_in_each_call():
    scales = {name: torch.rand(E, device=DEVICE) for name in ("w13_scale", "w2_scale")}
    given = arguments()
    given |= {name: given[name].to(torch.float8_e4m3fn) for name in ("w13", "w2")}
    given["quant"] = ExpertsQuantization("fp8_w8a8", **scales)
    if not Platform.of(DEVICE).has_fp8_e4m3:
        pytest.skip("no fp8 here")
    with replaying(after=0):
        for factor in (8, 1, 1):
            given["hidden_states"] = factor * given["hidden_states"]
            assert torch.equal(fused_experts(**given), fused_experts.__wrapped__(**given))


@pytest.mark.parametrize("name", ["out", "lora_ids", "custom_routing_function"])
def test_what_no_form_tells_apart_runs_as_it_stands(name):
    given = arguments()
    chosen = (given["topk_weights"], given["topk_ids"])
    with replaying(after=0):
        for _ in range(3):
            if name == "out":
                out = torch.empty_like(given["hidden_states"])
                assert fused_experts(**given, out=out) is out
                with pytest.raises(ValueError, match="out: expected memory apart"):
                    fused_experts(**given, out=given["hidden_states"])
            elif name == "lora_ids":
                table = AdapterTable(
                    num_slots=1, max_rank=8, num_experts=E, hidden_size=H, intermediate_size=I, device=DEVICE
                )
                fused_experts(**given, adapters=table)
            else:
                ids = select_experts(randn(M, E), TOP_K, custom_routing_function=lambda **_: chosen)[1]
                assert torch.equal(ids, chosen[1])
    assert not plans()


def test_tensors_that_share_memory_are_told_apart_by_their_place():
    buffer = randn(E * (2 * I * H + H * I)) / 4
    cut = E * 2 * I * H
    together = {"w13": buffer[:cut].view(E, 2 * I, H), "w2": buffer[cut:].view(E, H, I)}
    given, apart = arguments() | together, arguments(1)
    with replaying(after=0):
        for each in (given, apart, given):
            assert torch.equal(fused_experts(**each), fused_experts.__wrapped__(**each))
        assert len(plans()) == 1


def test_a_call_within_a_recorded_call_is_recorded_with_it():
    @replay.replayable(tuple)
    def outer(logits):
        return select_experts(logits, TOP_K)

    first, second = randn(M, E), randn(M, E)
    with replaying(after=0):
        for given in (first, second, second):
            select_experts(given, TOP_K)  # has a plan of its own, which the outer call's recording must not take
            with record_path() as record:
                found = outer(given)
            assert record.launches == {"topk_routing_kernel": 1}
            assert torch.equal(found[1], select_experts.__wrapped__(given, TOP_K)[1])
    assert len(plans()) == 2


def test_a_subclass_of_a_tensor_runs_as_it_stands():
    class Mine(torch.Tensor):
        pass

    given = arguments()
    with replaying(after=0):
        for _ in range(2):
            fused_experts(**given | {"hidden_states": given["hidden_states"].as_subclass(Mine)})
    assert not replay._forms


def test_a_profiler_of_triton_s_launches_hears_them():
    from triton import knobs

    given, heard = arguments(), []
    with replaying(after=0):
        fused_experts(**given)
        plan = plans()[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Plan, "replay", lambda *_: heard.append("replay"))
            fused_experts(**given)
            assert heard == ["replay"]
            knobs.runtime.launch_enter_hook.add(heard.append)
            try:
                fused_experts(**given)
            finally:
                knobs.runtime.launch_enter_hook.remove(heard.append)
    assert "replay" not in heard[1:]
    assert plans() == [plan]


def test_another_launcher_sees_every_launch(monkeypatch):
    given, seen = arguments(), []
    launch = path.launch

    def listening(kernel, *rest, **meta):
        seen.append(kernel.__name__)
        return launch(kernel, *rest, **meta)

    with replaying(after=0):
        fused_experts(**given)
        monkeypatch.setattr(path, "launch", listening)
        fused_experts(**given)
    assert len(seen) == 5


def test_forms_are_forgotten_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(replay, "_MOST_FORMS", 3)
    with replaying(after=0):
        for num_tokens in range(1, 9):
            fused_experts(**arguments(num_tokens=num_tokens))
            assert len(replay._forms) <= 3


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter runs one kernel at a time")
def test_threads_replay_one_plan_at_a_time_on_tensors_of_their_own():
    calls = [arguments(seed) for seed in range(4)]
    expected = [fused_experts(**each) for each in calls]
    with replaying(after=0):
        fused_experts(**calls[0])
    found = {}

    def work(number):
        with replaying(after=0):  # a context of its own
            for _ in range(5):
                found[number] = fused_experts(**calls[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected[number]) for number in range(4))


# --- the switch -----------------------------------------------------------------------------------------------------


def test_a_block_that_would_rather_be_replayed_is_unless_somebody_said_otherwise():
    ask = """
from moegate.impl.checks import debug_checks
from moegate.impl.replay import is_replaying, replaying, replaying_unless_said
with replaying_unless_said():
    told = [is_replaying()]
    with debug_checks():
        told += [is_replaying()]
with replaying(None), replaying_unless_said():
    told += [is_replaying()]
with replaying(3), replaying_unless_said():
    told += [is_replaying()]
print(*told, is_replaying())
"""
    told = {}
    for value in ("", "0", "1"):
        environment = os.environ | {"MOEGATE_REPLAY": value}
        done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=False)
        told[value] = done.stdout.strip() or done.stderr
    assert told == {
        "": "True False False True False",
        "0": "False False False True False",
        "1": "True False False True True",
    }


def test_the_environment_turns_it_on():
    ask = "from moegate.impl import replay; print(replay._in_force.get())"
    told = {}
    for value in ("1", "0", "maybe"):
        environment = os.environ | {"MOEGATE_REPLAY": value}
        done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=False)
        told[value] = done.stdout.strip() or done.stderr.strip().splitlines()[-1]
    assert (told["1"], told["0"]) == ("1", "None")
    assert told["maybe"].startswith("ValueError: MOEGATE_REPLAY: expected one of")


def test_replaying_refuses_what_is_no_number_of_calls():
    for bad, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="after: expected"), replaying(after=bad):
            pass


# --- the suite's subject --------------------------------------------------------------------------------------------


def test_the_suite_s_other_tensors_have_the_same_form_and_lie_elsewhere():
    for given in (randn(M, 2 * H)[:, 1 : H + 1], randn(E, H, I)[:, ::2], torch.rand(3, device=DEVICE)[1:]):
        other = elsewhere(given)
        assert (other.shape, other.stride(), other.dtype) == (given.shape, given.stride(), given.dtype)
        assert (other.data_ptr() - given.data_ptr()) % 16 == 0
        assert other.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()
        assert torch.equal(other, given.roll(1, 0))


@pytest.mark.skipif(DEVICE == "cpu", reason="a graph needs a GPU")
def test_a_replay_can_be_captured_in_a_graph():
    given = arguments()
    with replaying(after=0):
        fused_experts(**given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = fused_experts(**given)
    given["hidden_states"].copy_(randn(M, H))
    graph.replay()
    assert torch.equal(output, fused_experts(**given))
