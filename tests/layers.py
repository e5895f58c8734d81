"""Small layers with hashed weights, which several tests share."""

import torch

from moegate.conformance.values import on_grid
from moegate.impl.experts_module import RoutedExperts, SharedExperts
from moegate.impl.layer import Gate, MoELayer, RoutingMethod
from moegate.impl.quantization import ExpertsQuantization

E, TOP_K, H, I, SHARED_I = 8, 2, 64, 32, 96


def values(name, *shape, dtype=torch.bfloat16, device="cpu", exponent=None):
    """About 1/sqrt(fan-in), as trained weights are."""
    size = -(shape[-1].bit_length() - 1) // 2 + 1 if exponent is None else exponent
    return on_grid(7, name, shape, dtype, device, exponent=size)


def tokens(count, *, dtype=torch.bfloat16, device="cpu", name="x", hidden_size=H):
    return values(name, count, hidden_size, dtype=dtype, device=device, exponent=0)


def gate_of(*, dtype=torch.bfloat16, device="cpu", num_experts=E, hidden_size=H):
    return Gate(values("gate", num_experts, hidden_size, dtype=dtype, device=device))


def experts_of(*, dtype=torch.bfloat16, device="cpu", num_experts=E, hidden_size=H, size=I, **options):
    return RoutedExperts(
        values("w13", num_experts, 2 * size, hidden_size, dtype=dtype, device=device),
        values("w2", num_experts, hidden_size, size, dtype=dtype, device=device),
        dtype=dtype,
        **options,
    )


def shared_of(*, dtype=torch.bfloat16, device="cpu", gated=False, hidden_size=H, size=SHARED_I, **options):
    return SharedExperts(
        values("shared_w13", 2 * size, hidden_size, dtype=dtype, device=device),
        values("shared_w2", hidden_size, size, dtype=dtype, device=device),
        gate=values("shared_gate", 1, hidden_size, dtype=dtype, device=device) if gated else None,
        dtype=dtype,
        **options,
    )


def layer_of(*, dtype=torch.bfloat16, device="cpu", shared=True, gated=False, routing=None, **options):
    return MoELayer(
        gate_of(dtype=dtype, device=device),
        experts_of(dtype=dtype, device=device),
        RoutingMethod(TOP_K) if routing is None else routing,
        shared_experts=shared_of(dtype=dtype, device=device, gated=gated) if shared else None,
        **options,
    )


def quantised(weight, block=(32, 32)):
    """`[E, N, K]` in fp8 with scales of blocks, whose grid starts anew nowhere (N is a multiple of twice a block)."""
    bn, bk = block
    num_experts, n, k = weight.shape
    blocks = weight.float().view(num_experts, n // bn, bn, k // bk, bk)
    scale = blocks.abs().amax(dim=(2, 4)) / 448
    stored = (blocks / scale[:, :, None, :, None]).to(torch.float8_e4m3fn).view(num_experts, n, k)
    return stored, scale


def quantised_shared(*, device="cpu", gated=True):
    """Shared experts in fp8 blocks, whatever the routed ones are stored in."""
    w13, w13_scale = quantised(values("shared_w13", 2 * SHARED_I, H, device=device)[None])
    w2, w2_scale = quantised(values("shared_w2", H, SHARED_I, device=device)[None])
    quant = ExpertsQuantization("fp8_w8a8", w13_scale, w2_scale, block_shape=(32, 32))
    gate = values("shared_gate", 1, H, device=device) if gated else None
    return SharedExperts(w13[0], w2[0], gate=gate, quant=quant)
