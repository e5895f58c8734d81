from contextlib import contextmanager

import pytest
import torch

from moegate.conformance.cases import build_experts
from moegate.conformance.guarded import CallError
from moegate.conformance.properties.large import MANY_ROWS, OPERANDS, judge_far_apart, judge_last_tokens
from moegate.conformance.spec import ExpertsSpec

pytestmark = [pytest.mark.moegate_facets("experts"), pytest.mark.moegate_executions(len(OPERANDS), 2)]


@contextmanager
def untouched_memory():
    """What is never written is not filled either."""
    was = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = was


@pytest.mark.parametrize("operand", OPERANDS)
def test_operands_far_apart_give_the_bits_of_dense_ones(moegate_session, moegate_variant, operand):
    session, variant, capabilities = moegate_session, moegate_variant, moegate_session.subject.capabilities
    bias = "both" if operand.endswith("bias") else "none"
    if not capabilities.padded_rows or bias not in capabilities.biases or "bfloat16" not in capabilities.dtypes:
        pytest.skip(f"{session.subject.name} does not declare rows of {operand} that lie apart")
    spec = ExpertsSpec(M=3, H=32, I=32, E=3, top_k=2, bias=bias)
    case = build_experts(spec, session.device)
    with untouched_memory():
        try:
            verdicts = judge_far_apart(case, operand, lambda case: session.subject.experts(case, variant))
        except CallError as error:
            verdicts = [error.verdict]
    session.ledger.ran(variant, spec, 2)
    session.ledger.settle(verdicts, spec, f"{session.command()} --select 'far_apart and {operand}'")


@pytest.mark.moegate_executions(1, 1)
def test_the_last_tokens_of_a_large_batch_are_within_budget(moegate_session, moegate_variant):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject
    if session.device not in MANY_ROWS.devices:
        pytest.skip("rows of more than 2^31 elements need a GPU's memory and speed")
    spec = ExpertsSpec(M=20_480, H=64, I=8192, E=8, top_k=8)
    case = session.prepared(build_experts(spec, session.device), variant)
    try:
        with untouched_memory():
            output = subject.experts(case, variant)
        verdicts = judge_last_tokens(case, output, subject.numerics)
    except CallError as error:
        verdicts = [error.verdict]
    session.ledger.ran(variant, spec)
    session.settle(verdicts, spec, variant=variant)
