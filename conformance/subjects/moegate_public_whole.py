"""What moegate's modules and whole layers must answer: the public calls that they are made of, one after the other.

Each rule stands here a second time, as it is documented.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from ...impl import experts_module, fused_shared, layer, ops
from ...impl.config import QuantScheme
from ...impl.experts.kernel_form import FORMS_VARIABLE, FormChoice, FormQuestion, KernelForm, form_choice, kernel_form
from ...impl.experts_module import RoutedExperts, SharedExperts
from ...impl.fused_moe import fused_experts
from ...impl.layer import Gate, MoELayer, RoutingMethod
from ...impl.lora.adapter import Adapter, LowRank
from ...impl.lora.table import AdapterTable
from ...impl.oracle.select import ENVIRONMENT_VARIABLE
from ...impl.path import record_path
from ...impl.plain_module import runs_as_written
from ...impl.platform import Platform
from ...impl.quantize import quantize_experts
from ...impl.replay import replaying
from ...impl.routing import select_experts
from ...impl.shared_experts import SWITCH_VARIABLE, THRESHOLD_VARIABLE, SharedExpertsSetting, order_of_call
from ...impl.tuning.lookup import FOLDER_VARIABLE
from ..properties.bad_input import Arguments, put
from ..properties.public import Answer, PublicCall
from .moegate_public import E, H, I, K, M, equals, full, lists, same_rows, uneven

_X = uneven(M, H)
_ROUTING: Arguments = {
    "topk_weights": torch.tensor([[0.75, 0.25], [0.5, 1.5], [0.125, 2.0], [1.0, 0.5]]),
    "topk_ids": torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2]], dtype=torch.int32),
}
_W13, _W2 = uneven(E, 2 * I, H), uneven(E, H, I)
_BIASES: Arguments = {"w13_bias": uneven(E, 2 * I), "w2_bias": uneven(E, H).float()}
# An alpha and a limit that most elements of a small layer feel.
_CLAMPED: Arguments = {"activation": "swigluoai", "swiglu_alpha": 1.25, "swiglu_limit": 0.25, "interleaved": True}


def _quantized(scheme: str, scale: str, shape: tuple[int, int] | None = None, **more: Any) -> Arguments:
    w13, w2, quant = quantize_experts(_W13, _W2, scheme, weight_scale=scale, block_shape=shape, **more)  # pyright: ignore[reportArgumentType]
    return {"w13": w13, "w2": w2, "quant": quant}


# What experts may be, and how they may be called: each argument where leaving it out changes the answer.
_EXPERTS: dict[str, tuple[Arguments, Arguments]] = {
    "biases": (_BIASES, {}),
    "a clamped activation of alternating rows": (_CLAMPED | _BIASES, {}),
    "an activation without a gate": ({"activation": "relu2_no_mul", "w13": _W13[:, :I].contiguous()}, {}),
    "weights on the input": (
        {"apply_router_weight_on_input": True},
        {name: routing[:, 1:].contiguous() for name, routing in _ROUTING.items()},
    ),
    "a map": (
        {"w13": _W13[:2], "w2": _W2[:2]},
        {"expert_map": torch.tensor([-1, 1, -1, 0], dtype=torch.int32), "global_num_experts": E},
    ),
    "int4 with zero points": (_quantized("int4_w4a16", "group", (0, 16), zero_points=True), {}),
    "fp8 in blocks": (_quantized("fp8_w8a8", "block", (16, 16)), {}),
    "fp8 with a scale a token": (_quantized("fp8_w8a8", "channel", per_act_token_quant=True), {}),
    "fp8 with static scales": (
        _quantized("fp8_w8a8", "tensor", a13_scale=torch.tensor([0.01]), a2_scale=torch.tensor([0.5])),
        {},
    ),
}


def _experts(**options: Any) -> RoutedExperts:
    return RoutedExperts(**({"w13": _W13, "w2": _W2, "backend": "cpu"} | options))


def _compiling(call: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """A call as a compiler traces it: through the operator, whose dispatch would import the compiler (2 s)."""
    # What the operator runs is not traced.
    with (
        mock.patch.object(torch.compiler, "is_compiling", side_effect=chain([True], repeat(False))),
        mock.patch.object(experts_module, "fused_experts_op", ops.fused_experts_op._init_fn),
        mock.patch.object(layer, "moe_layer_op", layer.moe_layer_op._init_fn),
    ):
        return call(*args, **kwargs)


def _forward_calls() -> list[PublicCall]:
    answers = []
    for what, (options, call) in _EXPERTS.items():
        given = {"hidden_states": _X, **_ROUTING} | call
        arguments = {"w13": _W13, "w2": _W2} | options | given
        right = same_rows(lambda arguments=arguments: fused_experts(**arguments, backend="cpu"))
        for traced in (False, True):
            where = put(options=options, traced=traced, **call)
            answers.append(Answer(f"{what}{', as an operator' if traced else ''}", right, where))

    def forward(options: Arguments, traced: bool, **given: Any) -> torch.Tensor:
        module = _experts(**options)
        # Its own backend comes before the environment's, which nobody knows.
        with mock.patch.dict(os.environ, {ENVIRONMENT_VARIABLE: "fastest"}):
            return _compiling(module, **given) if traced else module(**given)

    moved = _quantized("int8_w8a16", "channel")
    backend = "triton" if Platform.of("cpu").runs_triton else "cpu"

    def into(out: torch.Tensor, **given: Any) -> torch.Tensor:
        """What is in the memory to write into, behind rows of which it has every second one."""
        returned = fused_experts(_X, _W13, _W2, **given, backend=backend, out=out[::2])
        return torch.cat([out[::2], out[1::2], returned if returned.data_ptr() == out.data_ptr() else returned[:0]])

    def moved_scales(**options: Any) -> list[str]:
        """Where the scales are that a module on another device has."""
        quant = _experts(**options).to("meta").quant
        return [] if quant is None else [str(t.device) for t in quant.tensors().values() if t is not None]

    plain = {"hidden_states": _X, "w13": _W13, "w2": _W2, **_ROUTING, "backend": backend}
    return [
        PublicCall(
            "fused_moe.fused_experts",
            into,
            lambda: {"out": torch.full((2 * M, H), 7.0, dtype=torch.bfloat16), **_ROUTING},
            {},
            answers=[
                Answer(
                    "in the rows that it is given, and in no others",
                    same_rows(
                        lambda: torch.cat([(own := fused_experts(**plain)), torch.full_like(own, 7.0), own]),
                    ),
                )
            ],
        ),
        PublicCall(
            "experts_module.RoutedExperts.forward",
            forward,
            lambda: {"hidden_states": _X, **_ROUTING, "options": {}, "traced": False},
            {},
            answers=answers,
        ),
        PublicCall(
            "experts_module.RoutedExperts",
            moved_scales,
            lambda: dict(moved),
            {},
            answers=[Answer("scales that moved with it", equals(["meta", "meta"]))],
        ),
    ]


def _custom(hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool) -> Any:
    """Weights that hang on everything that the function is given."""
    weights = hidden_states[:, :topk].float().abs() + gating_output[:, :topk].float().abs() + renormalize
    return weights, torch.tensor([[0, 3]] * len(weights), dtype=torch.int32)[:, :topk].contiguous()


# Gates and ways to route, each where leaving a part of it out changes the answer; logits in float32 are others.
_GATES: dict[str, tuple[Arguments, RoutingMethod]] = {
    "a gate in float32": ({"weight": uneven(E, H, dtype=torch.float32)}, RoutingMethod(K)),
    "a gate with a bias": ({"weight": uneven(E, H), "bias": uneven(E) * 8}, RoutingMethod(K)),
    "weights that are not renormalised": ({"weight": uneven(E, H)}, RoutingMethod(K, renormalize=False)),
    "a scaling factor": ({"weight": uneven(E, H)}, RoutingMethod(K, routed_scaling_factor=2.5)),
    "sqrt(softplus)": ({"weight": uneven(E, H)}, RoutingMethod(K, scoring_func="sqrtsoftplus")),
    "a correction bias and groups": (
        {
            "weight": uneven(E, H, dtype=torch.float32),
            "e_score_correction_bias": torch.tensor([0.0, 8.0, 0.0, 4.0]),
        },
        RoutingMethod(1, scoring_func="sigmoid", num_expert_group=2, topk_group=1, group_ranking="max"),
    ),
    "a function of the caller's": (
        {"weight": uneven(E, H)},
        RoutingMethod(K, custom_routing_function=_custom, renormalize=False, routed_scaling_factor=0.5),
    ),
}


def _routed(gate: Arguments, method: RoutingMethod) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = gate["weight"], gate.get("bias")
    logits = F.linear(_X.to(weight.dtype), weight, bias)
    correction = gate.get("e_score_correction_bias")
    return select_experts(logits, **vars(method), e_score_correction_bias=correction, hidden_states=_X)


def _by_parts(gate: Arguments, method: RoutingMethod, **experts: Any) -> torch.Tensor:
    """The gate, the routing and the experts, each by its own public call."""
    weights, ids = _routed(gate, method)
    return fused_experts(_X, **({"w13": _W13, "w2": _W2} | experts), topk_weights=weights, topk_ids=ids, backend="cpu")


_GATE = {"weight": uneven(E, H)}
_SHARED_W13, _SHARED_W2 = uneven(4 * I, H) * 0.5, uneven(H, 2 * I) * 0.5


def _layer(gate: Arguments = _GATE, method: RoutingMethod | None = None, **options: Any) -> MoELayer:
    return MoELayer(Gate(**gate), _experts(), RoutingMethod(K) if method is None else method, **options)


def _shared() -> SharedExperts:
    return SharedExperts(_SHARED_W13, _SHARED_W2, backend="cpu")


def _twice(output: torch.Tensor) -> torch.Tensor:
    """The sum over two ranks that have the same."""
    return output * 2


def _fused_weights() -> tuple[torch.Tensor, torch.Tensor]:
    """The routed experts and behind them two shared ones, each with its own gate, up and down columns."""
    gate, up = _SHARED_W13[: 2 * I], _SHARED_W13[2 * I :]
    parts = [slice(0, I), slice(I, 2 * I)]
    w13 = torch.stack([torch.cat([gate[part], up[part]]) for part in parts])
    w2 = torch.stack([_SHARED_W2[:, part] for part in parts])
    return torch.cat([_W13, w13]), torch.cat([_W2, w2])


def _fused_layer() -> MoELayer:
    w13, w2 = _fused_weights()
    method = RoutingMethod(K, routed_scaling_factor=2.5)
    return MoELayer(Gate(**_GATE), RoutedExperts(w13, w2, backend="cpu"), method, num_fused_shared_experts=2)


def _fused_right() -> torch.Tensor:
    weights, ids = _routed(_GATE, RoutingMethod(K, routed_scaling_factor=2.5))
    weights = torch.cat([weights, torch.ones(M, 2)], dim=1)
    ids = torch.cat([ids, torch.tensor([[E, E + 1]] * M, dtype=torch.int32)], dim=1)
    return fused_experts(_X, *_fused_weights(), weights, ids, backend="cpu")


def _summed(external: bool) -> torch.Tensor:
    """Over two ranks, where external experts come summed already."""
    routed, shared = _by_parts(_GATE, RoutingMethod(K)), _shared()(_X)
    return _twice(routed) + shared if external else _twice(routed + shared)


def _copy_of_a_layer() -> MoELayer:
    """A copy whose original has other weights since."""
    original = MoELayer(Gate(**_GATE), _experts(w2=_W2.clone()), RoutingMethod(K))
    found = copy.deepcopy(original)
    original.experts.w2.zero_()
    found.original = original  # which lives as long, and may be taken for the copy
    return found


def _adapters() -> AdapterTable:
    """One slot, with an adapter of every expert's gate."""
    table = AdapterTable(1, 3, num_experts=E, hidden_size=H, intermediate_size=I, device="cpu")
    table.load(Adapter(gate={e: LowRank(uneven(2, H), uneven(I, 2)) for e in range(E)}))
    return table


def _whole_adapter() -> AdapterTable:
    """One slot, with an adapter of both GEMMs."""
    table = AdapterTable(1, 3, num_experts=E, hidden_size=H, intermediate_size=I, device="cpu")
    table.load(Adapter(gate={0: LowRank(full(2, H), full(I, 2))}, down={0: LowRank(full(2, I), full(H, 2))}))
    return table


class _OtherGate(Gate):
    """Of a class that may have a forward of its own."""


def _gates() -> list[nn.Module]:
    """One as it was written, and others that run something else when they are called."""
    plain, hooked, hooked_before, own, stored = (Gate(**_GATE) for _ in range(5))
    hooked.register_forward_hook(lambda *_: None)
    hooked_before.register_forward_pre_hook(lambda *_: None)
    own.forward = plain.forward
    del stored.weight
    stored.weight = nn.Parameter(_GATE["weight"], requires_grad=False)
    return [plain, hooked, hooked_before, own, stored, _OtherGate(**_GATE)]


def _layer_calls() -> list[PublicCall]:
    here = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
    half = {"w13": _W13[:2], "w2": _W2[:2]}
    external = SharedExpertsSetting(uses_external_experts=True)
    adapters, ids = _adapters(), torch.tensor([0, -1, 0, -1], dtype=torch.int32)
    answers = [
        Answer(
            what, same_rows(lambda gate=gate, method=method: _by_parts(gate, method)), put(self=_layer(gate, method))
        )
        for what, (gate, method) in _GATES.items()
    ]
    answers += [
        Answer(
            "the experts of a map",
            same_rows(lambda: _by_parts(_GATE, RoutingMethod(K), **half, expert_map=here, global_num_experts=E)),
            put(self=MoELayer(Gate(**_GATE), _experts(**half), RoutingMethod(K), expert_map=here)),
        ),
        Answer("fused shared experts", same_rows(_fused_right), put(self=_fused_layer())),
        Answer(
            "shared experts, summed over ranks with the routed ones",
            same_rows(lambda: _summed(external=False)),
            put(self=_layer(shared_experts=_shared(), reduce=_twice)),
        ),
        Answer(
            "external experts, which come summed",
            same_rows(lambda: _summed(external=True)),
            put(self=_layer(shared_experts=_shared(), reduce=_twice, setting=external)),
        ),
        Answer(
            "a copy, as an operator",
            same_rows(lambda: _by_parts(_GATE, RoutingMethod(K))),
            put(self=_copy_of_a_layer(), traced=True),
        ),
        Answer(
            "adapters, as an operator",
            same_rows(lambda: _by_parts(_GATE, RoutingMethod(K), adapters=adapters, lora_ids=ids)),
            put(self=_layer(adapters=adapters), lora_ids=ids, traced=True),
        ),
    ]

    def forward(self: MoELayer, traced: bool, **given: Any) -> torch.Tensor:
        return _compiling(self, **given) if traced else self(**given)

    return [
        PublicCall(
            "layer.MoELayer.forward",
            forward,
            lambda: {"self": _layer(), "hidden_states": _X, "traced": False},
            {},
            answers=answers,
        ),
        PublicCall(
            "plain_module.runs_as_written",
            lambda modules: [runs_as_written(module, Gate) for module in modules],
            lambda: {"modules": [Gate(**_GATE)]},
            {},
            answers=[Answer("not where something hangs on it", equals([True] + [False] * 5), put(modules=_gates()))],
        ),
        PublicCall(
            "lora.table.AdapterTable.evict",
            lambda self, slot: [len(self.slices_of(slot)), self.evict(slot), len(self.slices_of(slot)), self.loaded],
            lambda: {"self": _whole_adapter(), "slot": 0},
            {},
            answers=[Answer("a slot that adds nothing to either GEMM", equals([2, None, 0, ()]))],
        ),
        PublicCall(
            "fused_shared.append_shared_experts",
            lambda **a: fused_shared.append_shared_experts(**a)[1],
            lambda: {**_ROUTING, "num_experts": E, "num_shared_experts": 2},
            {},
            answers=[
                Answer(
                    "ids behind the routed ones", lists([[*row, E, E + 1] for row in _ROUTING["topk_ids"].tolist()])
                ),
                Answer(
                    "none for padding, one beside a choice",
                    lists([[-1, -1, -1, -1], [-1, 2, E, E + 1]]),
                    put(
                        topk_weights=full(2, 2, dtype=torch.float32),
                        topk_ids=torch.tensor([[-1, -1], [-1, 2]], dtype=torch.int32),
                    ),
                ),
            ],
        ),
        PublicCall(
            "fused_shared.fuse_shared_experts",
            lambda **a: torch.cat([part.flatten() for part in fused_shared.fuse_shared_experts(**a)]),
            lambda: {"w13": _W13, "w2": _W2, "shared_w13": _SHARED_W13, "shared_w2": _SHARED_W2},
            {},
            answers=[
                Answer(
                    "experts whose columns of I are their own",
                    same_rows(lambda: torch.cat([part.flatten() for part in _fused_weights()])),
                )
            ],
        ),
    ]


def _orders(settings: list[tuple[str, str]], platform: Platform) -> list[str]:
    """What calls decide one after the other, each in the environment (threshold, switch) that it meets."""
    found = []
    for threshold, switch in settings:
        with mock.patch.dict(os.environ, {THRESHOLD_VARIABLE: threshold, SWITCH_VARIABLE: switch}):
            found.append(str(order_of_call(SharedExpertsSetting(), platform, True, 8).order))
    return found


def _tiles_of_replays(folders: list[dict[str, int]]) -> list[int | None]:
    """`block_size_n` of calls of one form, each with its own folder of tuned tiles."""
    found = []
    arguments = {"hidden_states": _X, "w13": _W13, "w2": _W2, **_ROUTING, "backend": "triton"}
    with replaying(0):
        for sizes in folders:
            with TemporaryDirectory() as folder, mock.patch.dict(os.environ, {FOLDER_VARIABLE: folder}):
                (Path(folder) / f"E={E},N={I},device_name=cpu.json").write_text(json.dumps({str(M): sizes}))
                with record_path() as record:
                    fused_experts(**arguments)
            found.append(record.last("config")["block_size_n"])
    return found


def _alike_but_for_one_thing() -> list[MoELayer]:
    """Layers on Triton, each of which a plan of another one would serve, were it taken for its own."""
    one, bias = RoutingMethod(1, renormalize=False), {**_GATE, "bias": uneven(E) * 8}
    sigmoid = RoutingMethod(1, scoring_func="sigmoid", renormalize=False)
    weight32 = {"weight": uneven(E, H, dtype=torch.float32)}
    corrected = weight32 | {"e_score_correction_bias": torch.tensor([0.0, 8.0, 0.0, 4.0])}
    tight = _CLAMPED | {"swiglu_limit": 0.125}
    here = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
    parts: list[tuple[Arguments, RoutingMethod, Arguments, Arguments]] = [
        (_GATE, RoutingMethod(K), {}, {}),
        (_GATE, RoutingMethod(K, renormalize=False), {}, {}),
        (_GATE, one, {}, {}),
        (_GATE, one, {"apply_router_weight_on_input": True}, {}),
        (_GATE, RoutingMethod(K), _CLAMPED, {}),
        (_GATE, RoutingMethod(K), tight, {}),
        (_GATE, RoutingMethod(K), {"w13": _W13[:2], "w2": _W2[:2]}, {"expert_map": here}),
        (_GATE, RoutingMethod(K), {"w13": _W13[2:], "w2": _W2[2:]}, {"expert_map": here.flip(0).contiguous()}),
        (bias, RoutingMethod(K), {}, {}),
        (weight32, sigmoid, {}, {}),
        (corrected, sigmoid, {}, {}),
        (_GATE, RoutingMethod(K), _quantized("fp8_w8a8", "block", (16, 16)), {}),
        (_GATE, RoutingMethod(K), _quantized("int8_w8a16", "channel"), {}),
    ]
    return [
        MoELayer(Gate(**gate), _experts(**experts | {"backend": "triton"}), method, **options)
        for gate, method, experts, options in parts
    ]


def _in_turn(layers: int, after: int | None) -> torch.Tensor:
    """What so many of these layers make of two tokens each, where calls are replayed `after` others."""
    tokens = _X[2:3], _X[:1]
    with replaying(after):
        return torch.cat([layer(x) for layer in _alike_but_for_one_thing()[:layers] for x in tokens])


def _replay_calls() -> list[PublicCall]:
    if not Platform.of("cpu").runs_triton:
        return []
    every = len(_alike_but_for_one_thing())
    narrow, wide = ({"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": 32} for n in (16, 32))
    return [
        PublicCall(
            "replay.replaying",
            _tiles_of_replays,
            lambda: {"folders": [narrow]},
            {},
            answers=[Answer("the tiles of each folder", equals([16, 32]), put(folders=[narrow, wide]))],
        ),
        PublicCall(
            "replay.replayed",
            _in_turn,
            lambda: {"layers": 1, "after": 0},
            {},
            answers=[Answer("of each layer its own", same_rows(lambda: _in_turn(every, None)), put(layers=every))],
        ),
    ]


_BESIDE, _BEHIND = "multi_stream_overlapped", "no_overlap"
_HOPPER = Platform.parse("cuda:9.0")


def _question(**changes: Any) -> FormQuestion:
    """Prefill of a layer with many rows an expert and many tiles."""
    return FormQuestion(
        **{
            "num_pairs": 16 * 256,
            "top_k": 2,
            "num_experts": 16,
            "num_local_experts": 16,
            "hidden_size": 32_768,
            "intermediate_size": 2048,
            "is_gated": True,
            "dtype": torch.bfloat16,
            "scheme": QuantScheme.NONE,
            "is_naive": False,
            "has_adapters": False,
            "on_copy_grid": True,
            "platform": _HOPPER,
        }
        | changes
    )


def _decision_calls() -> list[PublicCall]:
    measured, everywhere = FormChoice.MEASURED, FormChoice.EVERYWHERE
    forms = [
        ("many rows on Hopper", measured, {}, KernelForm.SORTED),
        ("many rows on Blackwell, which nobody measured", measured, {"platform": "cuda:10.0"}, KernelForm.GENERAL),
        ("many rows on AMD", everywhere, {"platform": "rocm:gfx942"}, KernelForm.GENERAL),
        ("100 rows an expert", measured, {"num_pairs": 1600}, KernelForm.GENERAL),
        # The other rank's pairs are no rows here.
        (
            "100 rows an expert of half of them",
            measured,
            {"num_pairs": 1600, "num_local_experts": 8},
            KernelForm.GENERAL,
        ),
        (
            "200 rows an expert of half of them",
            measured,
            {"num_pairs": 3200, "num_local_experts": 8},
            KernelForm.SORTED,
        ),
        ("tokens with adapters", everywhere, {"has_adapters": True}, KernelForm.GENERAL),
        ("few tokens with adapters", everywhere, {"has_adapters": True, "is_naive": True}, KernelForm.GENERAL),
        ("few tokens", everywhere, {"is_naive": True}, KernelForm.STREAMED),
        ("few tokens, where measured", measured, {"is_naive": True}, KernelForm.GENERAL),
        ("float32", everywhere, {"dtype": torch.float32}, KernelForm.GENERAL),
        ("int8 weights", everywhere, {"scheme": QuantScheme.INT8_W8A16}, KernelForm.GENERAL),
        ("rows off the grid", everywhere, {"on_copy_grid": False}, KernelForm.GENERAL),
    ]

    def decided(choice: FormChoice, platform: str = "cuda:9.0", **changes: Any) -> str:
        return str(kernel_form(_question(platform=Platform.parse(platform), **changes), choice).form)

    return [
        PublicCall(
            "shared_experts.order_of_call",
            _orders,
            lambda: {"settings": [("", "")], "platform": _HOPPER},
            {},
            answers=[
                Answer("beside the routed ones", equals([_BESIDE])),
                Answer(
                    "a switch that is turned while the process runs",
                    equals([_BESIDE, _BEHIND, _BEHIND, _BESIDE, _BEHIND]),
                    put(settings=[("", ""), ("", "1"), ("", "TRUE"), ("", "off"), ("", " On ")]),
                ),
                Answer(
                    "a threshold that is moved while the process runs",
                    equals([_BESIDE, _BEHIND, _BESIDE, _BEHIND]),
                    put(settings=[("8", ""), ("7", ""), ("", ""), ("0", "")]),
                ),
            ],
        ),
        PublicCall(
            "experts.kernel_form.kernel_form",
            decided,
            lambda: {"choice": everywhere},
            {},
            answers=[
                Answer(what, equals(str(form)), put(choice=choice, **changes)) for what, choice, changes, form in forms
            ],
        ),
        PublicCall(
            "experts.kernel_form.form_choice",
            form_choice,
            lambda: {"environment": {}},
            {},
            answers=[
                Answer("what was measured, where nothing is said", equals(measured)),
                Answer("what was measured, where an empty text is said", equals(measured), _asked("")),
                Answer("everywhere", equals(everywhere), _asked("Everywhere")),
            ],
        ),
    ]


def _asked(text: str) -> Callable[[Arguments], Arguments]:
    return put(environment={FORMS_VARIABLE: text})


WHOLE_CALLS: tuple[PublicCall, ...] = (*_forward_calls(), *_layer_calls(), *_replay_calls(), *_decision_calls())
