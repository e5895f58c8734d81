"""NUM: the output is within the derived budget of the float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.experts import Trace
from ..budget import Budget, experts_budget
from ..calibration import limits
from ..cases import ExpertsCase
from ..evidence import evidence_of
from ..judge import Verdict, declare
from ..numerics import Numerics
from ..operands import ExpertsOperands
from ..statistics import statistics

ELEMENT = declare(
    "NUM-01", "every element is within its error budget of the float64 reference", "experts", is_value=True
)
ROW_RMS = declare("NUM-02", "the RMS error of every row is within its budget", "experts", is_value=True)
ROW_GAIN = declare(
    "NUM-03", "no row is scaled: its slope on the reference is 1 within its standard error", "experts", is_value=True
)
EXPERT_GAIN = declare(
    "NUM-04",
    "no expert's share is scaled: its slope over all its rows is 1 within its standard error",
    "experts",
    is_value=True,
)
ABSENT = declare(
    "NUM-05",
    "tokens without an expert held here get rows of exactly zero",
    "experts",
    needs=lambda can: set(can.maps) != {"none"} or {"some_invalid", "all_invalid"} & set(can.routings),
)


def reference_of(case: ExpertsCase) -> Trace:
    """The reference's trace of a case."""
    return case.operands().trace()


def budget_of(case: ExpertsCase, trace: Trace, numerics: Numerics) -> Budget:
    """The budget of a case under declared numerics."""
    return experts_budget(trace, case.operands(), numerics)


def judge_values(case: ExpertsCase | ExpertsOperands, output: Tensor, trace: Trace, budget: Budget) -> list[Verdict]:
    """Every NUM verdict on one output; none for a case without tokens."""
    call = case.operands() if isinstance(case, ExpertsCase) else case
    if output.shape[0] == 0:
        return []
    measured = statistics(output, trace, budget, call.w2)
    limit = limits(budget.is_quantized)
    verdicts = []

    used = measured.elementwise / limit.elementwise
    evidence = evidence_of(output, trace.output, used, ids=call.topk_ids, trace=trace)
    detail = evidence.text()
    verdicts.append(ELEMENT.verdict((used <= 1).all(), detail, budget_used=float(used.max()), evidence=evidence))
    rms = measured.row_rms / limit.row_rms
    verdicts.append(
        ROW_RMS.verdict(
            (rms <= 1).all(),
            f"token {int(rms.argmax())}: RMS error over budget {float(rms.max()):.3g}; worst element: {detail}",
            budget_used=float(rms.max()),
            evidence=evidence,
        )
    )
    for prop, values, bound, what in (
        (ROW_GAIN, measured.row_gain, limit.row_gain, "token"),
        (EXPERT_GAIN, measured.expert_gain, limit.expert_gain, "local expert"),
    ):
        gains = values / bound
        seen = ~gains.isnan()
        if seen.any():
            gains = torch.where(seen, gains, 0.0)
            holds = bool((gains <= 1).all())
            verdicts.append(
                prop.verdict(
                    holds,
                    f"{what} {int(gains.argmax())}: gain error over budget {float(gains.max()):.3g}; worst element: "
                    f"{detail}",
                    budget_used=float(gains.max()),
                    evidence=evidence,
                )
            )
    absent = (trace.local_ids < 0).all(dim=1)
    if absent.any():
        rows = output[absent]
        verdicts.append(ABSENT.verdict((rows == 0).all(), f"token {int(absent.nonzero()[0])} of {int(absent.sum())}"))
    return verdicts
