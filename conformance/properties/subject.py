"""SUBJECT: what every implementation owes, whatever it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..budget import Budget
from ..judge import Verdict, declare
from ..numerics import Numerics
from .meta import agree

RETURNS = declare("SUBJECT-01", "a call that the capabilities declare raises nothing and returns tensors")
SURVIVES = declare("SUBJECT-02", "the process of a subject outlives its calls, and can use its device after them")
ENDS = declare("SUBJECT-03", "a call ends within its time")
STATELESS = declare("SUBJECT-04", "a call gives what a fresh subject gives, whatever it was asked before", "experts")
FITS = declare("SUBJECT-05", "a call finds the memory that it asks for")
WITHIN = declare(
    "SUBJECT-06", "no kernel that Triton's interpreter runs reads or writes outside the memory of its arguments"
)


def judge_state(output: Tensor, fresh: Tensor, budget: Budget, numerics: Numerics) -> Verdict:
    """SUBJECT-04: `output` of a subject that ran other cases of the same sizes, `fresh` of one that ran none."""
    if not numerics.repeatable:
        return agree(STATELESS, output, fresh, budget)
    differs = (output != fresh) & ~(torch.isnan(output) & torch.isnan(fresh))
    where = ""
    if differs.any():
        token, column = divmod(int(differs.flatten().int().argmax()), output.shape[1])
        got, alone = float(output[token, column]), float(fresh[token, column])
        where = f": token {token}, column {column}: {got:.6g}, fresh {alone:.6g}"
    return STATELESS.verdict(not where, f"{int(differs.sum())} of {differs.numel()} elements differ{where}")
