"""The routed experts of one rank over tokens that a dispatch step has sorted: the batched activation format."""

from __future__ import annotations

import torch

from . import path
from .checks import FLOATS, debug_expect_counts, expect_activation, expect_apart, expect_bool, expect_tensor
from .config import Activation, ActivationFormat
from .kernels.device import current_device
from .oracle.backends import AUTO
from .oracle.call import experts_of_call
from .platform import Platform

# Axis 1 of a CUDA grid, which counts the experts, ends here (CUDA C++ Programming Guide, "Technical Specifications").
MOST_EXPERTS = 65_535


def batched_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    expert_num_tokens: torch.Tensor,
    *,
    activation: Activation | str = Activation.SILU,
    backend: str | None = None,
    allow_tf32: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each token through its expert: `out[e, r] = w2[e] @ (silu(gate) * up)` for r < expert_num_tokens[e].

    gate and up are the upper and lower half of `w13[e] @ hidden_states[e, r]` (Shazeer, arXiv 2002.05202). Slabs of
    one size for each expert are what low-latency all-to-all kernels deliver (DeepEP); routing weights are left to the
    combine step behind them. Rows behind an expert's count are neither read nor written. Nothing waits for the
    device, so the call can be captured in a CUDA graph. Last dimensions are contiguous; rows and slabs may be strided.

    Args:
        hidden_states: [E_local, max_tokens, H] bfloat16, float16 or float32; an expert's tokens are the first rows of
            its slab.
        w13: [E_local, 2I, H] of the same dtype, gate rows first, then up.
        w2: [E_local, H, I] of the same dtype.
        expert_num_tokens: [E_local] int32, tokens of each expert, in [0, max_tokens].
        activation: between the two GEMMs; silu for now.
        backend: a backend's name, honoured or refused; None or "auto" leaves it to `MOEGATE_BACKEND`, and to the
            oracle where that is not set (`moegate explain --batched`).
        allow_tf32: float32 operands may be rounded to TF32; without it they are multiplied as they are.
        out: [E_local, max_tokens, H] of the same dtype to write into; None allocates it, with zeros behind each
            expert's count. It may not overlap an input.

    Returns:
        [E_local, max_tokens, H] in the dtype of `hidden_states`; `out` where given.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device, layout or range, by name, before
            anything is launched; in debug mode (`checks.debug_checks`) also counts outside [0, max_tokens].
    """
    activation = expect_activation("activation", activation)
    expect_bool("allow_tf32", allow_tf32)
    expect_tensor("hidden_states", hidden_states, shape=("E_local", "max_tokens", "H"), dtypes=FLOATS)
    num_experts, max_tokens, hidden_size = hidden_states.shape
    dtypes = (hidden_states.dtype,)
    expect_tensor("w2", w2, shape=(num_experts, hidden_size, "I"), dtypes=dtypes, like=hidden_states)
    intermediate_size = w2.shape[2]
    expect_tensor("w13", w13, shape=(num_experts, 2 * intermediate_size, hidden_size), dtypes=dtypes, like=w2)
    if hidden_size < 1 or intermediate_size < 1:
        raise ValueError(f"w2: expected H and I of at least 1, got shape {list(w2.shape)}")
    expect_tensor("expert_num_tokens", expert_num_tokens, shape=(num_experts,), dtypes=(torch.int32,), like=w2)
    # Rows of a slab are counted in 32 bits, and a block is at most 256 of them.
    if max_tokens + 256 >= 2**31 or num_experts > MOST_EXPERTS:
        raise ValueError(
            f"hidden_states: expected at most {MOST_EXPERTS} slabs of fewer than 2^31 rows and padding, "
            f"got {num_experts} x {max_tokens}"
        )
    experts = experts_of_call(
        AUTO if backend is None else backend,
        Platform.of(hidden_states.device),
        ActivationFormat.BATCHED,
        max(1, num_experts),  # a rank without experts asks as one with a single expert would
        1,
        hidden_size,
        intermediate_size,
        hidden_states.dtype,
        activation,
        False,
    )
    if out is not None:
        expect_tensor("out", out, shape=hidden_states.shape, dtypes=dtypes, like=hidden_states)
        expect_apart("out", out, hidden_states=hidden_states, w13=w13, w2=w2, expert_num_tokens=expert_num_tokens)
    debug_expect_counts("expert_num_tokens", expert_num_tokens, max_tokens)

    path.note("backend", experts.backend)
    if out is None:
        out = torch.zeros(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    if num_experts == 0 or max_tokens == 0:
        return out
    with current_device(hidden_states):
        experts.apply(out, hidden_states, w13, w2, expert_num_tokens, activation=activation, allow_tf32=allow_tf32)
    return out
