"""A layer of one's own under moegate: `moegate check --subject docs/examples/my_moe.py:MyMoE`."""

import torch
import torch.nn.functional as F

from moegate.conformance.numerics import Numerics
from moegate.conformance.subject import Capabilities, Subject


def my_fused_moe(x, gate_up, down, weights, ids):
    """The implementation to be judged, as a project might have it: `[M, H]` in, `[M, H]` out."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(len(gate_up)):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down[expert])
        out.index_add_(0, token, y.float() * weights[token, slot, None])
    return out.to(x.dtype)


class MyMoE(Subject):
    """What it can do, where it rounds, and the calls that the suite makes."""

    name = "my-moe"
    # Only what is declared is asked, and what is declared must pass.
    capabilities = Capabilities(
        dtypes=("bfloat16", "float32"),
        maps=("none",),  # no expert parallelism
        activations=("silu",),
        weight_on_input=False,
    )
    # Linear layers, the activation and its product return the dtype of x; weights and the sum over the top-k are
    # float32. The tolerance follows from this: there is none to choose.
    numerics = Numerics(gate="storage", expert_output="storage", weighted="float32")

    def experts(self, case, variant):
        """The routed experts' weighted sum, `[M, H]` in the dtype of `hidden_states`."""
        return my_fused_moe(case.hidden_states, case.w13, case.w2, case.topk_weights, case.topk_ids)


class WrongMoE(MyMoE):
    """Deliberately wrong: gate and up change places, as in a checkpoint that stores them the other way round."""

    name = "wrong-moe"

    def experts(self, case, variant):
        """As above, with the halves of w13 exchanged."""
        gate, up = case.w13.chunk(2, dim=1)
        swapped = torch.cat((up, gate), dim=1)
        return my_fused_moe(case.hidden_states, swapped, case.w2, case.topk_weights, case.topk_ids)
