"""The routed experts of one rank over tokens that a dispatch step has sorted: the batched activation format."""

from __future__ import annotations

import torch

from . import path
from .checks import FLOATS, debug_expect_counts, expect_activation, expect_apart, expect_bool, expect_int, expect_tensor
from .config import Activation, ActivationFormat, QuantScheme
from .experts.base import BatchedCall
from .kernels.device import current_device
from .lora.table import AdapterTable, expect_token_adapters
from .oracle.backends import AUTO
from .oracle.call import experts_of_call
from .platform import Platform
from .quantization import ExpertsQuantization
from .weights import debug_expect_scales, expect_experts_weights

# Axis 1 of a CUDA grid, which counts the experts, ends here (CUDA C++ Programming Guide, "Technical Specifications").
MOST_EXPERTS = 65_535
SCHEMES = (QuantScheme.NONE, QuantScheme.FP8_W8A8)


def batched_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    expert_num_tokens: torch.Tensor,
    *,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    quant: ExpertsQuantization | None = None,
    activation: Activation | str = Activation.SILU,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    interleaved: bool = False,
    adapters: AdapterTable | None = None,
    lora_ids: torch.Tensor | None = None,
    backend: str | None = None,
    allow_tf32: bool = False,
    dp_size: int = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each token through its expert: `out[e, r] = w2[e] @ act(gate, up) + b2[e]` for r < expert_num_tokens[e].

    gate and up are the upper and lower half of `w13[e] @ hidden_states[e, r] + b13[e]` (Shazeer, arXiv 2002.05202); an
    activation without a gate takes all of it. Slabs of one size for each expert are what low-latency all-to-all
    kernels deliver (DeepEP); routing weights are left to the combine step behind them. Rows behind an expert's count
    are neither read nor written. Nothing waits for the device, so the call can be captured in a CUDA graph. Last
    dimensions are contiguous; rows and slabs may be strided. Scales are contiguous.

    Args:
        hidden_states: [E_local, max_tokens, H] bfloat16, float16 or float32 (quantised: bfloat16 or float16); an
            expert's tokens are the first rows of its slab.
        w13: [E_local, 2I, H] of the same dtype, gate rows first, then up; [E_local, I, H] for an activation without a
            gate. Quantised: of the dtype that `quant` says.
        w2: [E_local, H, I] as w13.
        expert_num_tokens: [E_local] int32, tokens of each expert, in [0, max_tokens].
        w13_bias: [E_local, 2I] in the order of w13's rows, of the activations' dtype or float32.
        w2_bias: [E_local, H] likewise.
        quant: how w13 and w2 are stored: fp8_w8a8; None where they are of the activations' dtype.
        activation: between the two GEMMs.
        swiglu_alpha: of swigluoai (`ActivationFunction`).
        swiglu_limit: of swigluoai.
        interleaved: w13's gate and up rows alternate, from gate 0 on; not with scales in blocks.
        adapters: the layer's LoRA adapters.
        lora_ids: [E_local, max_tokens] int32, the slot of each row's adapter, -1 for none; None where no row has one.
            Ids behind an expert's count are not looked at.
        backend: a backend's name, honoured or refused; None or "auto" leaves it to `MOEGATE_BACKEND`, and to the
            oracle where that is not set (`moegate explain --batched`).
        allow_tf32: float32 operands may be rounded to TF32; without it they are multiplied as they are.
        dp_size: ranks with their own tokens, whose tokens may be among these: the oracle asks.
        out: [E_local, max_tokens, H] of the same dtype to write into; None allocates it, with zeros behind each
            expert's count. It may not overlap an input.

    Returns:
        [E_local, max_tokens, H] in the dtype of `hidden_states`; `out` where given.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device, layout or range, by name, before
            anything is launched; in debug mode (`checks.debug_checks`) also counts outside [0, max_tokens], scales
            that are not positive and finite, and lora_ids of slots that hold nothing.
    """
    function = expect_activation(activation, swiglu_alpha, swiglu_limit, interleaved)
    expect_bool("allow_tf32", allow_tf32)
    expect_int("dp_size", dp_size, low=1)
    expect_tensor("hidden_states", hidden_states, shape=("E_local", "max_tokens", "H"), dtypes=FLOATS)
    num_experts, max_tokens, hidden_size = hidden_states.shape
    dtypes = (hidden_states.dtype,)
    weights = expect_experts_weights(hidden_states, num_experts, w13, w2, w13_bias, w2_bias, quant, function)
    if weights.scheme not in SCHEMES:
        raise ValueError(f"quant: expected a scheme of {[str(s) for s in SCHEMES]} here, got {weights.scheme}")
    expect_tensor(
        "expert_num_tokens", expert_num_tokens, shape=(num_experts,), dtypes=(torch.int32,), like=hidden_states
    )
    # Rows of a slab are counted in 32 bits, and a block is at most 256 of them.
    if max_tokens + 256 >= 2**31 or num_experts > MOST_EXPERTS:
        raise ValueError(
            f"hidden_states: expected at most {MOST_EXPERTS} slabs of fewer than 2^31 rows and padding, "
            f"got {num_experts} x {max_tokens}"
        )
    lora = expect_token_adapters(
        adapters,
        lora_ids,
        (num_experts, max_tokens),
        num_experts,
        hidden_states,
        weights.intermediate_size,
        function,
    )
    experts = experts_of_call(
        AUTO if backend is None else backend,
        Platform.of(hidden_states.device),
        ActivationFormat.BATCHED,
        max(1, num_experts),  # a rank without experts asks as one with a single expert would
        1,
        hidden_size,
        weights.intermediate_size,
        hidden_states.dtype,
        weights.scheme,
        weights.block_shape,
        function.kind,
        weights.has_bias,
        False,
        adapters is not None,
        dp_size,
    )
    if out is not None:
        expect_tensor("out", out, shape=hidden_states.shape, dtypes=dtypes, like=hidden_states)
        inputs = {"hidden_states": hidden_states, "expert_num_tokens": expert_num_tokens, "lora_ids": lora_ids}
        expect_apart("out", out, **inputs, **weights.tensors())
    debug_expect_counts("expert_num_tokens", expert_num_tokens, max_tokens)
    debug_expect_scales(quant)
    if lora is not None:
        held = torch.arange(max_tokens, device=lora.lora_ids.device)[None, :] < expert_num_tokens[:, None]
        lora.table.debug_expect_ids("lora_ids", lora.lora_ids, held)

    path.note("backend", experts.backend)
    if out is None:
        out = torch.zeros(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    if num_experts == 0 or max_tokens == 0:
        return out
    with current_device(hidden_states):
        experts.apply(out, BatchedCall(hidden_states, weights, expert_num_tokens, function, allow_tf32, lora))
    return out
