"""Bad input of everything public in `moegate.impl`: refused by name, before anything runs, with inputs as they were.

`python -m pytest tests/test_bad_input.py -q` ends with how many distinct bad inputs each function was given; `-v`
lists them. The functions that a subject shares with others are judged by `conformance/test_api.py` from the same
generator.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from public_calls import PublicCall
from public_files import FILE_CALLS
from public_layers import LAYER_CALLS
from public_values import VALUE_CALLS

import moegate.impl
from moegate.conformance.properties.api import BAD_CALLS
from moegate.conformance.properties.bad_input import Bad, Contents, refusal_of, time_limit
from moegate.impl.path import record_path

CALLS = (*LAYER_CALLS, *VALUE_CALLS, *FILE_CALLS)
# Judged with every subject: `conformance/properties/api.py`.
OF_SUBJECTS = {
    "fused_moe.fused_experts",
    "batched.batched_experts",
    "routing.select_experts",
    "align.moe_align_block_size",
}

# Public names that no user hands anything to, with the reason; a module's name stands for all that is in it.
BEHIND = {
    "align": "steps of `fused_experts`, whose arguments are checked",
    "checkpoint.readable": "a check itself",
    "checkpoint_models": "read by `load_layer`, whose config is checked here",
    "checks": "the checks themselves",
    "experts": "backends: the oracle and the functions that check hand them calls",
    "json_file": "tests/test_hostile_files.py",
    "kernels": "launched by functions that have checked their arguments",
    "lora.eager": "a step of the CPU backend",
    "parallel.adapters": "steps of `ParallelExperts.join`, whose arguments are checked",
    "lora.sharded": "steps of calls with a fully sharded table",
    "lora.table.StackedLowRank": "an adapter table's own memory",
    "lora.table.TokenAdapters": "made by `expect_token_adapters`",
    "lora.table.AdapterTable.debug_expect_ids": "a check itself",
    "lora.table.AdapterTable.expect_layer": "a check itself",
    "lora.table.expect_token_adapters": "a check itself",
    "once": "logs what this project says",
    "ops": "operators of compiled modules, which call `fused_experts`",
    "oracle.call": "asked by functions that have checked their arguments",
    "oracle.decision": "answers",
    "oracle.rules": "the oracle's own table",
    "overlap": "asked by the layer, but for `auxiliary_stream`",
    "parallel.agreement": "steps of a shared layer",
    "parallel.all_gather": "steps of a shared layer",
    "parallel.all_to_all": "steps of a shared layer",
    "parallel.collectives": "made by `connect`",
    "parallel.exchange": "steps of a shared layer",
    "parallel.experts.ParallelExperts.join": "called by the layer that is made with it",
    "parallel.experts.ParallelExperts.run": "called by the layer, which has checked its arguments",
    "parallel.experts.ParallelExperts.partial_sums": "called by `run`",
    "parallel.placement.PlacementTables": "made by `ExpertPlacement.tables`",
    "parallel.ranks.Ranks": "made by `connect`",
    "parallel.ranks.expect_world_size": "a check itself",
    "parallel.rows": "steps of a shared layer",
    "parallel.shards": "steps of a shared layer",
    "parallel.slabs": "steps of a shared layer",
    "parallel.travel": "steps of a shared layer",
    "parallel.wire": "steps of a shared layer",
    "path": "what the implementation notes of itself",
    "quantize.quantize_with_torch": "a step of `quantize_activations`",
    "quantize.dequantize_activations": "its arguments are what `quantize_activations` gave",
    "routing.expect_method": "a check itself",
    "layer.RoutingMethod": "plain fields, checked by `MoELayer` against its number of experts",
    "shared_experts.OrderDecision": "answers",
    "shared_experts.OrderReason": "answers",
    "shared_experts.order_of_call": "asked by the layer",
    "shared_experts.is_stream_disabled": "tests/test_bad_options.py, as an environment variable",
    "shared_experts.stream_token_threshold": "tests/test_bad_options.py, as an environment variable",
    "tuning.kernel_config.KernelConfig.shared_memory": "asked by the tile rule",
    "tuning.kernel_config.expect_scales": "a check itself",
    "tuning.kernel_config.fit_block_k": "a step of the lookup",
    "tuning.limits": "steps of the lookup and the search",
    "tuning.lookup.Layer": "made by the lookup, which checks in it",
    "tuning.lookup.TunedConfigs": "answers",
    "tuning.lookup.nearest": "a step of the lookup",
    "tuning.schema": "tests/test_hostile_files.py",
    "tuning.writer.read_tuned_file": "tests/test_hostile_files.py",
    "weights": "checks themselves",
    "whole_file": "tests/test_crashes.py and, as options, tests/test_bad_options.py",
    "config.ActivationFunction": "made by `expect_activation`",
}


def _parameters(function: Any) -> list[str]:
    try:
        return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    except (TypeError, ValueError):
        return []


def public_names() -> list[str]:
    """Every public function, class and method of the implementation that takes an argument."""
    names = []
    for found in pkgutil.walk_packages(moegate.impl.__path__, "moegate.impl."):
        module = importlib.import_module(found.name)
        where = found.name.removeprefix("moegate.impl.")
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != found.name:
                continue
            if inspect.isclass(value):
                if _parameters(value) and not issubclass(value, Exception) and not hasattr(value, "__members__"):
                    names.append(f"{where}.{name}")
                for method, inside in vars(value).items():
                    plain = inside.__func__ if isinstance(inside, (staticmethod, classmethod)) else inside
                    if not method.startswith("_") and inspect.isfunction(plain) and _parameters(plain):
                        names.append(f"{where}.{name}.{method}")
            elif callable(value) and (_parameters(value) or hasattr(value, "fn")):
                names.append(f"{where}.{name}")
    return names


def _is_behind(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:count]) in BEHIND for count in range(1, len(parts) + 1))


def _cases() -> list[Any]:
    return [pytest.param(call, bad, id=f"{call.name}-{bad}") for call in CALLS for bad in call.bad]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("call", "bad"), _cases())
def test_bad_input_is_refused_by_name_before_anything_happens(call: PublicCall, bad: Bad, tmp_path: Path) -> None:
    arguments = bad.change(call.good())
    contents = Contents(arguments)
    with record_path() as record:
        wrong = refusal_of(lambda: call.call(**arguments), bad.argument)
    assert not wrong
    assert contents.changed() == []
    assert dict(record.launches) == {}
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", [call for call in CALLS if not call.needs], ids=lambda call: call.name)
def test_what_the_bad_calls_start_from_is_accepted(call: PublicCall) -> None:
    with time_limit():
        call.call(**call.good())


def test_every_public_function_has_an_entry() -> None:
    there = {call.name for call in CALLS} | OF_SUBJECTS
    missing = [name for name in public_names() if name not in there and not _is_behind(name)]
    assert missing == [], "give each a call in tests/public_*.py, or a reason in BEHIND"


def test_no_entry_is_of_a_function_that_is_gone() -> None:
    names = public_names()
    gone = [call.name for call in CALLS if call.name not in names and not call.name.endswith(".forward")]
    idle = [name for name in BEHIND if not any(each == name or each.startswith(f"{name}.") for each in names)]
    assert (gone, idle) == ([], [])


def test_bad_inputs_are_distinct_and_many() -> None:
    counts = Counter(f"{call.name}-{bad}" for call in CALLS for bad in call.bad)
    counts.update(map(str, BAD_CALLS))
    assert [name for name, count in counts.items() if count > 1] == []
    assert len(counts) > 2500


class Anything:
    """A function of one argument."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (1, "accepted"),
        (ValueError("x: expected an int, got 3"), ""),
        (ValueError("expected an int, got 3"), "does not name x"),
        (ValueError("xs: expected an int, got 3"), "does not name x"),
        (TypeError("x: bad"), "does not say what was expected"),
        (TypeError("x: expected an int, got \x1b[2J"), "control characters"),
        (AttributeError("x: expected an int, got 3"), "raised AttributeError"),
    ],
)
def test_a_refusal_that_says_too_little_is_a_finding(answer: Any, wrong: str) -> None:
    said = refusal_of(Anything(answer), "x")
    assert said == wrong if not wrong else wrong in said


def test_a_call_that_hangs_is_a_finding() -> None:
    def forever() -> None:
        while True:
            pass

    with pytest.raises(TimeoutError, match="still running"), time_limit(0.05):
        forever()
