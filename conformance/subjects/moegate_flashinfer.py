"""moegate's `flashinfer_cutlass` backend: a subject of its own, since it can do less than the others."""

from __future__ import annotations

from ..numerics import Numerics
from ..spec import ROUTINGS
from ..subject import Capabilities, Subject
from .moegate import MoegateSubject


class MoegateFlashinferSubject(MoegateSubject):
    """`fused_experts(..., backend="flashinfer_cutlass")` on an NVIDIA GPU."""

    name = "moegate:flashinfer_cutlass"
    variants = ("flashinfer_cutlass",)
    last_run = "untested under the suite (written for flashinfer-python 0.7)"
    # What `FlashInferCutlassExperts.refusal` refuses is not declared.
    capabilities = Capabilities(
        devices=("cuda",),
        dtypes=("bfloat16", "float16"),
        routings=tuple(routing for routing in ROUTINGS if routing != "repeated"),
        activations=(
            *("silu", "gelu", "gelu_tanh", "swigluoai", "swigluoai_interleaved", "swigluoai_tight"),
            *("silu_no_mul", "gelu_no_mul", "relu2_no_mul"),
        ),
        weight_on_input=False,
        hidden_multiple=8,
        intermediate_multiple=128,
    )
    numerics = Numerics()

    def unavailable(self, variant: str, device: str) -> str | None:
        """A GPU alone."""
        return Subject.unavailable(self, variant, device)

    def facets(self, variant: str) -> tuple[str, ...]:
        """The experts: everything else is the Triton backend's, and judged there."""
        return ("experts",)
