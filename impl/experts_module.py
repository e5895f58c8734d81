"""Experts as modules: routed ones with their parameters, and shared ones, which are one expert for every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .checks import FLOATS, expect_activation, expect_bool, expect_dtype, expect_one_of, expect_tensor
from .config import Activation
from .fused_moe import fused_experts
from .lora.table import AdapterTable
from .ops import fused_experts_op, quantization_arguments
from .oracle.backends import AUTO, UnquantizedMoeBackend
from .quantization import ExpertsQuantization
from .weights import expect_experts_weights


class RoutedExperts(nn.Module):
    """`fused_experts` with its parameters, which move with the module.

    Args:
        w13: `[E_local, 2I, H]`, as `fused_experts` documents it, like all that follow.
        w2: `[E_local, H, I]`.
        dtype: of the activations.
        w13_bias, w2_bias, quant, activation, swiglu_alpha, swiglu_limit, interleaved: what the experts are.
        apply_router_weight_on_input: top_k must be 1.
        backend: a backend's name or "auto".
        allow_tf32: of float32 operands.

    Raises:
        TypeError, ValueError: by name, as `fused_experts` does.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None

    def __init__(
        self,
        w13: torch.Tensor,
        w2: torch.Tensor,
        *,
        dtype: torch.dtype = torch.bfloat16,
        w13_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
        quant: ExpertsQuantization | None = None,
        activation: Activation | str = Activation.SILU,
        swiglu_alpha: float = 1.702,
        swiglu_limit: float = 7.0,
        interleaved: bool = False,
        apply_router_weight_on_input: bool = False,
        backend: str = "auto",
        allow_tf32: bool = False,
    ) -> None:
        super().__init__()
        expect_dtype("dtype", dtype)
        expect_one_of("backend", backend, (AUTO, *UnquantizedMoeBackend))
        expect_bool("apply_router_weight_on_input", apply_router_weight_on_input)
        expect_bool("allow_tf32", allow_tf32)
        function = expect_activation(activation, swiglu_alpha, swiglu_limit, interleaved)
        expect_tensor("w2", w2, shape=("E_local", "H", "columns"))
        like = torch.empty((0, w2.shape[1]), dtype=dtype, device=w2.device)
        checked = expect_experts_weights(like, "E_local", w13, w2, w13_bias, w2_bias, quant, function)
        self.dtype = dtype
        self.hidden_size = checked.hidden_size
        self.intermediate_size = checked.intermediate_size
        self.num_local_experts = checked.num_local_experts
        self.function = function
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self.backend = backend
        self.allow_tf32 = allow_tf32
        self._quant = quant
        for name, tensor in checked.tensors().items():
            # Buffers: integers and 8-bit floats among them have no gradient, and nothing here is trained.
            self.register_buffer(name, tensor)

    @property
    def quant(self) -> ExpertsQuantization | None:
        """How w13 and w2 are stored, with the scales where the module is now."""
        return self._quant

    def parameters_read(self) -> tuple[torch.Tensor | ExpertsQuantization | None, ...]:
        """What a call reads beside its arguments."""
        own = self._buffers
        return own["w13"], own["w2"], own["w13_bias"], own["w2_bias"], self._quant

    def identity(self) -> tuple[object, ...]:
        """What a call of these experts hangs on beside its arguments: settings, and where the parameters lie."""
        scales = () if self._quant is None else self._quant.tensors().values()
        tensors = (self.w13, self.w2, self.w13_bias, self.w2_bias, *scales)
        where = [None if one is None else (one.data_ptr(), one.dtype, one.shape, one.stride()) for one in tensors]
        scheme = None if self._quant is None else (self._quant.scheme, self._quant.block_shape)
        return (self.function, self.apply_router_weight_on_input, self.backend, self.allow_tf32, scheme, *where)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RoutedExperts:
        """Also the scales that `quant` holds move. Another dtype would be other weights, and is refused."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.w2.device)).dtype
        if probe is not self.dtype:
            raise TypeError(f"dtype: expected {self.dtype} to stay as it is, got {probe}: load the layer anew")
        moved = super()._apply(fn, recurse)
        if self._quant is not None:
            self._quant = replace(self._quant, **{name: getattr(self, name) for name in self._quant.tensors()})
        return moved

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None = None,
        global_num_experts: int | None = None,
        adapters: AdapterTable | None = None,
        lora_ids: torch.Tensor | None = None,
        *,
        dp_size: int = 1,
        input_scale: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The experts' weighted sum, `[M, H]`; arguments and errors as `fused_experts`.

        With adapters `torch.compile` does not take it apart: `MoELayer` is compiled whole. The last three are of calls
        that no compiler traces: an exchange between ranks makes them.
        """
        kind, alpha, limit = self.function.kind, self.function.alpha, self.function.limit
        if torch.compiler.is_compiling():
            if adapters is not None:
                raise ValueError("adapters: expected None under torch.compile, which takes a MoELayer with adapters")
            return fused_experts_op(
                hidden_states,
                self.w13,
                self.w2,
                topk_weights,
                topk_ids,
                self.w13_bias,
                self.w2_bias,
                expert_map,
                *quantization_arguments(self._quant),
                str(kind),
                alpha,
                limit,
                self.function.interleaved,
                self.apply_router_weight_on_input,
                global_num_experts,
                self.backend,
                self.allow_tf32,
            )
        return fused_experts(
            hidden_states,
            self.w13,
            self.w2,
            topk_weights,
            topk_ids,
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            quant=self._quant,
            activation=kind,
            swiglu_alpha=alpha,
            swiglu_limit=limit,
            interleaved=self.function.interleaved,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
            expert_map=expert_map,
            global_num_experts=global_num_experts,
            adapters=adapters,
            lora_ids=lora_ids,
            backend=self.backend,
            allow_tf32=self.allow_tf32,
            dp_size=dp_size,
            input_scale=input_scale,
            out=out,
        )

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        scheme = "none" if self._quant is None else str(self._quant.scheme)
        return (
            f"E_local={self.num_local_experts}, H={self.hidden_size}, I={self.intermediate_size}, "
            f"dtype={self.dtype}, scheme={scheme}, activation={self.function.kind}"
        )


class SharedExperts(nn.Module):
    """A dense gated MLP beside the routed experts, `g(x) * W2 act(W13 x)`, with its own dtype of weights and scheme.

    It is one expert to which every token goes, with the weight 1, or sigmoid(gate x) where it has a gate of its own
    (Qwen2-MoE, arXiv 2407.10671, 2.2.2): so it rounds where a routed expert does. DeepSeek-V3's several shared experts
    are one of their summed width (arXiv 2412.19437, 2.1.2).

    Args:
        w13: `[2I, H]`, gate rows first; quantised: of the dtype that `quant` says.
        w2: `[H, I]`.
        gate: `[1, H]` of the sigmoid gate, in the dtype in which its logit is computed; None without.
        quant: as of one expert: scales have a first dimension of 1.
        options: `RoutedExperts`' other arguments.

    Raises:
        TypeError, ValueError: by name.
    """

    gate: torch.Tensor | None

    def __init__(
        self,
        w13: torch.Tensor,
        w2: torch.Tensor,
        *,
        gate: torch.Tensor | None = None,
        quant: ExpertsQuantization | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        expect_tensor("w2", w2, shape=("H", "I"))
        expect_tensor("w13", w13, shape=("rows", "columns"), like=w2)
        self.expert = RoutedExperts(w13[None], w2[None], quant=quant, **options)
        if gate is not None:
            expect_tensor("gate", gate, shape=(1, self.expert.hidden_size), dtypes=FLOATS, like=w2)
        self.register_buffer("gate", gate)
        # Every row is the same one, at a stride of 0: nothing is written for a call.
        self.register_buffer("_first", torch.zeros((1, 1), dtype=torch.int32, device=w2.device), persistent=False)
        self.register_buffer("_one", torch.ones((1, 1), dtype=torch.float32, device=w2.device), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[M, H]` to `[M, H]`; nothing is reduced over ranks.

        Raises:
            TypeError, ValueError: hidden states of another shape, dtype or device.
        """
        shape, dtypes = ("M", self.expert.hidden_size), (self.expert.dtype,)
        expect_tensor("hidden_states", hidden_states, shape=shape, dtypes=dtypes, like=self.expert.w2)
        num_tokens = hidden_states.shape[0]
        if self.gate is None:
            weights = self._one.expand(num_tokens, 1)
        else:
            weights = torch.sigmoid(F.linear(hidden_states.to(self.gate.dtype), self.gate).float())
        return self.expert(hidden_states, weights, self._first.expand(num_tokens, 1))
