"""BATCHED: what the batched activation format asks for besides right numbers, which NUM judges.

A row behind an expert's count is nobody's: whatever it holds is not an input, and what is written there may be another
rank's tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...reference.batched import batched_experts
from ...reference.experts import Trace
from ..cases import BatchedCase, ExpertsCase
from ..judge import Verdict, declare
from ..numerics import Numerics
from .num import budget_of, judge_values, reference_of
from .path import BACKEND, Launches, judge_promotion, judge_tiles

BEHIND = declare(
    "BATCHED-01", "rows behind an expert's count stay as they were, and so does the memory around the result", "batched"
)
ZEROS = declare("BATCHED-02", "a result of the subject's own is zero behind each expert's count", "batched")
FORM = declare(
    "BATCHED-03",
    "the result is [E_local, max_tokens, H] in the dtype and on the device of hidden_states: the tensor to write into "
    "where one is given",
    "batched",
)
INPUTS = declare("BATCHED-04", "no operand of the batched format, nor the memory around it, is written", "batched")
REPEATABLE = declare(
    "BATCHED-05",
    "the same call gives the same bits, whatever uninitialised memory held, wherever they go and in whatever order "
    "programs ran",
    "batched",
)
LAUNCHES = declare(
    "BATCHED-06",
    "the kernels launched, and how often, are those of the batched format's table; without a row none is",
    "batched",
    "trace",
    "launches",
)


def memory_around(case: BatchedCase) -> Tensor:
    """The bits of the memory that `case.out` lies in, with the rows of tokens blanked: no call may change them."""
    out = case.out
    whole = torch.empty(0, dtype=out.dtype, device=out.device).set_(out.untyped_storage()).clone()
    view = whole.as_strided(out.shape, out.stride(), out.storage_offset())
    view[case.is_token] = 0
    return whole.view(torch.uint8)


def reference_of_batched(case: BatchedCase, routed: ExpertsCase) -> Trace:
    """The definition's rows of tokens, with the intermediates that the routed call has."""
    output = batched_experts(case.hidden_states, expert_num_tokens=case.expert_num_tokens, **case.layer())
    return replace(reference_of(routed), output=output[case.is_token])


def judge_rows(
    case: BatchedCase, routed: ExpertsCase, output: Tensor, trace: Trace, numerics: Numerics
) -> list[Verdict]:
    """Every NUM verdict on the rows of tokens: they are the routed call's, without the roundings of a weighted sum."""
    numerics = replace(numerics, weighted="float32", combine="float32", routing_weight="float32")
    return judge_values(routed, output[case.is_token], trace, budget_of(routed, trace, numerics))


def judge_form(case: BatchedCase, output: Any, out: Tensor | None) -> Verdict:
    """BATCHED-03."""
    x = case.hidden_states
    if not isinstance(output, Tensor):
        return FORM.verdict(False, f"expected a tensor, got {output!r}")
    same_place = out is None or (output.data_ptr() == out.data_ptr() and output.stride() == out.stride())
    return FORM.verdict(
        output.shape == x.shape and output.dtype == x.dtype and output.device == x.device and same_place,
        f"expected {list(x.shape)} {x.dtype} on {x.device}, got {list(output.shape)} {output.dtype} on "
        f"{output.device}" + ("" if same_place else ", elsewhere than in the tensor given"),
    )


def judge_memory(case: BatchedCase, around: Tensor, own: Tensor, numerics: Numerics) -> list[Verdict]:
    """BATCHED-01, 02, 04 and 05.

    Args:
        case: after a call that wrote into `case.out`.
        around: `memory_around` before it.
        own: the result of a second call, which allocated it.
        numerics: of the subject.
    """
    changed = memory_around(case) != around
    behind = own[~case.is_token]
    stray = int((behind != 0).sum())  # NaN is not zero either
    written = case.arena.changed()
    verdicts = [
        BEHIND.verdict(not changed.any(), f"{int(changed.sum())} bytes changed; counts {_counts(case)}"),
        ZEROS.verdict(not stray, f"{stray} of {behind.numel()} elements are not zero; counts {_counts(case)}"),
        INPUTS.verdict(not written, f"written: {written}"),
    ]
    if numerics.repeatable:
        first, second = (rows[case.is_token].contiguous().view(torch.uint8) for rows in (case.out, own))
        differs = int((first != second).sum())
        verdicts.append(REPEATABLE.verdict(not differs, f"{differs} bytes differ between two calls"))
    return verdicts


def judge_path(
    case: BatchedCase, record: Any, variant: str, launches: Launches | None, numerics: Numerics
) -> list[Verdict]:
    """PATH-02, and BATCHED-06 where the table has an entry for the batched format.

    Args:
        case: what ran.
        record: as `path.judge_path` has it.
        variant: the backend asked for, whose name that of the batched format holds.
        launches: the declared table, where there is one.
        numerics: declared.
    """
    ran = record.last("backend")
    verdicts = [BACKEND.verdict(variant in str(ran), f"asked for {variant} in slabs, ran {ran}")]
    table = launches(case) if launches is not None else {}
    if "batched" not in table:
        return verdicts
    launched = dict(record.launches)
    expected = table["batched"] if case.hidden_states.numel() else ({},)
    verdicts.append(LAUNCHES.verdict(launched in expected, f"expected {expected}, launched {launched}"))
    return verdicts + judge_tiles(record) + judge_promotion(case, record, numerics)


def _counts(case: BatchedCase) -> list[int]:
    return case.expert_num_tokens.tolist()
