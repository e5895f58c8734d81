"""Everything public in `moegate.impl` is among the public calls that the suite judges, or says why it is not.

What a public call may be given stands in `conformance/subjects/moegate_public_*.py`; the functions that a subject
shares with others are judged by `conformance/test_api.py` from the same generator.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import moegate.impl
from moegate.conformance.loading import load_subject
from moegate.conformance.properties.api import BAD_CALLS
from moegate.conformance.properties.bad_input import IntKind, refusal_of, time_limit
from moegate.conformance.properties.public import Answer, PublicCall, judge_public_call
from moegate.impl.path import PathRecord, record_path

CALLS = load_subject("moegate").public()
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
    "parallel.expected_rows": "what an exchange expects of its own calls",
    "parallel.landing": "steps of a shared layer, but for `forget_landings`, which takes nothing",
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
    "replay.Plan": "made by a recording",
    "replay.Slot": "made by a recording",
    "replay.replayable": "decorates functions that check their arguments",
    "routing.expect_method": "a check itself",
    "layer.RoutingMethod": "plain fields, checked by `MoELayer` against its number of experts",
    "shared_experts.OrderDecision": "answers",
    "shared_experts.OrderReason": "answers",
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


def test_every_public_function_has_an_entry() -> None:
    there = {call.name for call in CALLS} | OF_SUBJECTS
    missing = [name for name in public_names() if name not in there and not _is_behind(name)]
    assert missing == [], "give each a call in conformance/subjects/moegate_public_*.py, or a reason in BEHIND"


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


def expect_low(x: Any, low: int = 1) -> int:
    """What refuses as it should."""
    if type(x) is not int or x < low:
        raise ValueError(f"x: expected an int of at least {low}, got {x!r}")
    return x


def violated(call: Any, trace: Any = record_path, **more: Any) -> set[str]:
    """What a public call with one argument, an int of at least 1, violates."""
    public = PublicCall("f", call, lambda: {"x": 1}, {"x": IntKind(1)}, **more)
    return {verdict.property.id for verdict in judge_public_call(public, trace) if not verdict.holds}


def test_a_public_call_that_refuses_by_name_and_answers_right_holds() -> None:
    answer = Answer("two", lambda found: "" if found == 2 else f"got {found}", lambda good: {"x": 2})
    assert violated(expect_low, answers=[answer], edges=[("a large number", lambda good: {"x": 2**70})]) == set()


def test_a_public_call_that_refuses_too_little_is_a_finding() -> None:
    assert violated(lambda x: expect_low(x, low=0)) == {"API-04"}


def test_a_public_call_that_refuses_too_much_is_a_finding() -> None:
    assert violated(lambda x: expect_low(x, low=2)) == {"API-06"}


def test_a_public_call_that_does_something_before_it_refuses_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def writes(x: Any) -> int:
        (tmp_path / repr(x)[:9]).touch()
        return expect_low(x)

    @contextmanager
    def launched() -> Iterator[PathRecord]:
        yield PathRecord(launches=Counter(["a_kernel"]))

    assert violated(writes) == violated(expect_low, launched) == {"API-05"}


def test_a_public_call_that_answers_wrong_is_a_finding() -> None:
    answer = Answer("itself", lambda found: f"got {found}")
    assert violated(expect_low, answers=[answer]) == {"API-07"}
