"""A whole layer that is replayed: in one plan with its gate, on a GPU unless somebody says otherwise."""

import pytest
import torch
from replay_forms import forgotten, plans, reasons
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from moegate.impl import path, replay
from moegate.impl.experts_module import RoutedExperts
from moegate.impl.layer import Gate, MoELayer, RoutingMethod
from moegate.impl.path import record_path
from moegate.impl.platform import Platform
from moegate.impl.quantize import quantize_experts
from moegate.impl.replay import replaying

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not Platform.of(DEVICE).runs_triton, reason="Triton runs nowhere here"),
    pytest.mark.usefixtures(forgotten.__name__),
]
M, E, K, H, I = 3, 6, 2, 32, 16


def randn(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


def experts(**options):
    given = {"w13": randn(E, 2 * I, H), "w2": randn(E, H, I), "backend": "triton"}
    return RoutedExperts(**given | options)


def layer(gate=None, routing=None, of_experts=None, **options):
    gate = Gate(randn(E, H)) if gate is None else gate
    return MoELayer(gate, experts(**(of_experts or {})), routing or RoutingMethod(K), **options)


def as_it_stands(of, x):
    with replaying(None):
        return of(x)


def fp8_blocks():
    w13, w2, quant = quantize_experts(
        randn(E, 2 * I, H), randn(E, H, I), "fp8_w8a8", weight_scale="block", block_shape=(16, 16)
    )
    return {"w13": w13, "w2": w2, "quant": quant}


LAYERS = {
    "a gate in bfloat16": dict,
    "a gate in float32": lambda: {"gate": Gate(randn(E, H, dtype=torch.float32))},
    "a gate with a bias": lambda: {"gate": Gate(randn(E, H), randn(E))},
    "a correction bias and groups": lambda: {
        "gate": Gate(randn(E, H), e_score_correction_bias=randn(E, dtype=torch.float32)),
        "routing": RoutingMethod(K, scoring_func="sigmoid", num_expert_group=3, topk_group=2),
    },
    "fp8 in blocks": lambda: {"of_experts": fp8_blocks()},
    "experts of a map": lambda: {
        "of_experts": {"w13": randn(2, 2 * I, H), "w2": randn(2, H, I)},
        "expert_map": torch.tensor([-1, 1, -1, 0, -1, -1], dtype=torch.int32, device=DEVICE),
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_one_plan_with_the_bits_of_the_layer_as_it_stands(name):
    one = layer(**LAYERS[name]())
    with replaying(after=0):
        one(randn(M, H, seed=1))
        assert (len(plans()), reasons()) == (1, [])
        for seed in (2, 3):
            x = randn(M, H, seed=seed)
            replayed, again = one(x), one(x)
            assert torch.equal(replayed, as_it_stands(one, x))
            assert torch.equal(replayed, again)
            assert replayed.data_ptr() != again.data_ptr()
    assert len(plans()) == 1


def test_a_replay_of_a_layer_checks_and_decides_nothing_anew(monkeypatch):
    one, x = layer(), randn(M, H)
    with replaying(after=0):
        one(x)

        def nobody(*arguments, **more):
            raise AssertionError("a replay came by here")

        monkeypatch.setattr(MoELayer, "_routed_as_it_stands", nobody)
        one(x)
        with pytest.raises(AssertionError, match="came by here"):
            one(randn(M + 1, H))


def test_whoever_listens_hears_of_a_layer_what_he_hears_of_its_call():
    one, x = layer(), randn(M, H)
    with record_path() as stands:
        as_it_stands(one, x)
    with replaying(after=0):
        with record_path() as recorded:
            one(x)
        with record_path() as replayed:
            one(x)
    assert stands.launches
    assert recorded.as_dict() == stands.as_dict()
    assert replayed.as_dict() == stands.as_dict()


@pytest.mark.parametrize("what", ["gate in place", "gate", "experts in place", "experts", "map in place"])
def test_a_weight_that_changes_is_seen(what):
    expert_map = torch.arange(E, dtype=torch.int32, device=DEVICE)
    one, x = layer(expert_map=expert_map), randn(M, H)
    with replaying(after=0):
        before = one(x)
        match what:
            case "gate in place":
                one.gate.weight.neg_()
            case "gate":
                one.gate.weight = randn(E, H, seed=9)
            case "experts in place":
                one.experts.w2.mul_(2)
            case "experts":
                one.experts.w13 = randn(E, 2 * I, H, seed=9)
            case "map in place":
                expert_map.copy_(expert_map.flip(0))
        after = one(x)
    assert torch.equal(after, as_it_stands(one, x))
    assert not torch.equal(after, before)


def test_settings_that_change_make_another_form():
    one, x = layer(), randn(M, H)
    with replaying(after=0):
        before = one(x)
        one.routing = RoutingMethod(K, renormalize=False)
        after = one(x)
        assert len(plans()) == 2
        one.experts.allow_tf32 = True
        one(x)
        assert len(plans()) == 3
    assert not torch.equal(after, before)


class Twice(Gate):
    """A gate whose logits are larger."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) * 2


def _hook(module):
    calls = []
    module.register_forward_hook(lambda *arguments: calls.append(1))
    return calls


def _pre_hook(module):
    calls = []
    module.register_forward_pre_hook(lambda *arguments: calls.append(1))
    return calls


def _own_forward(module):
    calls, own = [], module.forward
    module.forward = lambda *arguments, **more: (calls.append(1), own(*arguments, **more))[1]
    return calls


@pytest.mark.parametrize("part", ["gate", "experts"])
@pytest.mark.parametrize("hang", [_hook, _pre_hook, _own_forward])
def test_what_hangs_on_a_module_is_called_each_time(part, hang):
    one, x = layer(), randn(M, H)
    with replaying(after=0):
        one(x)
        calls = hang(getattr(one, part))
        for _ in range(3):
            one(x)
    assert len(calls) == 3


def test_a_hook_on_all_modules_is_called_each_time():
    one, x, calls = layer(), randn(M, H), []
    with replaying(after=0):
        one(x)
        handle = register_module_forward_hook(lambda *arguments: calls.append(type(arguments[0])))
        try:
            one(x)
        finally:
            handle.remove()
    assert set(calls) == {Gate, RoutedExperts, MoELayer}


def test_a_gate_of_another_class_is_its_own():
    x = randn(M, H)
    usual, other = layer(), layer(Twice(randn(E, H)))
    with replaying(after=0):
        for _ in range(2):
            usual(x)
        outputs = [other(x) for _ in range(3)]
    assert all(torch.equal(output, as_it_stands(other, x)) for output in outputs)
    assert not torch.equal(outputs[0], as_it_stands(usual, x))


def test_a_parameter_in_the_place_of_a_buffer_is_read():
    one, x = layer(), randn(M, H)
    with replaying(after=0):
        one(x)
        weight = one.gate.weight
        del one.gate.weight
        one.gate.weight = nn.Parameter(-weight, requires_grad=False)
        found = one(x)
    assert torch.equal(found, as_it_stands(layer(Gate(-weight)), x))


def test_a_function_of_the_caller_s_routes_each_time():
    calls = []

    def choose(hidden_states, gating_output, topk, renormalize):
        calls.append(len(hidden_states))
        weights = torch.ones((len(hidden_states), topk), device=DEVICE)
        return weights, torch.arange(topk, dtype=torch.int32, device=DEVICE).repeat(len(hidden_states), 1)

    one = layer(routing=RoutingMethod(K, custom_routing_function=choose))
    with replaying(after=0):
        for _ in range(3):
            one(randn(M, H))
    assert calls == [M] * 3


BAD = {
    "another dtype": lambda: randn(M, H, dtype=torch.float16),
    "another width": lambda: randn(M, H + 16),
    "columns that are apart": lambda: randn(H, M).t(),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_hidden_states_are_refused_by_name_after_good_ones(name):
    one = layer()
    with replaying(after=0):
        for _ in range(2):
            one(randn(M, H))
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match="hidden_states: expected"):
                one(BAD[name]())


def test_adapters_and_shared_experts_stand_around_it():
    shared = nn.Linear(H, H, bias=False, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    one, x = layer(shared_experts=shared), randn(M, H)
    with replaying(after=0):
        found = [one(x) for _ in range(3)]
    assert len(plans()) == 1
    assert all(torch.equal(each, as_it_stands(one, x)) for each in found)


def test_without_a_word_a_layer_is_replayed_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(replay, "_in_force", type(replay._in_force)("unsaid", default=replay._UNSAID))
    one, x = layer(), randn(M, H)
    for _ in range(3):
        one(x)
    assert len(plans()) == (DEVICE == "cuda")
    replay.forget()
    monkeypatch.setattr(replay, "_in_force", type(replay._in_force)("off", default=None))
    for _ in range(3):
        one(x)
    assert replay._forms == {}


def test_an_operation_on_a_tensor_that_is_none_of_the_call_s_is_not_replayed():
    one, x = layer(), randn(M, H)
    kept = randn(M, E)
    one.gate.weight.zero_()

    def asked():
        path.operate(torch.neg, kept)
        return one._routed_as_it_stands(x, None)

    with replaying(after=0):
        replay.replayed(
            lambda: ("a call",), (x, one.gate.weight, one.experts.w13, one.experts.w2), asked, by_default=False
        )
    assert reasons() == ["an operation is given a tensor that is none of the call's"]
