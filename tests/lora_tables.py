"""Adapters of the small layers, and tables of some of their experts."""

from layers import E, H, I, values

from moegate.impl.lora.adapter import Adapter, LowRank
from moegate.impl.lora.table import AdapterTable

RANK = 8


def adapter_of(number, *, rank=RANK, device="cpu", shares_a=False, size=I):
    """An adapter of all experts, of the size of their weights."""

    def matrices(name, n, k):
        name = f"{name} {number}"
        a = values(f"a {name}", E, rank, k, device=device)
        b = values(f"b {name}", E, n, rank, device=device)
        return {expert: LowRank(a[expert], b[expert], 2.0) for expert in range(E)}

    if shares_a:
        return Adapter(gate_up=matrices("gate_up", 2 * size, H), down=matrices("down", H, size))
    return Adapter(matrices("gate", size, H), matrices("up", size, H), down=matrices("down", H, size))


def table_of(experts, *, num_slots=2, max_rank=RANK, load=2, size=I, num_experts=E, rank=RANK, device="cpu", **options):
    """A table of some experts, in this order, with adapters 0, 1, ... in its first slots."""
    local = {expert: place for place, expert in enumerate(experts)}
    table = AdapterTable(
        num_slots,
        max_rank,
        num_experts=num_experts,
        hidden_size=H,
        intermediate_size=size,
        device=device,
        expert_map=[local.get(expert, -1) for expert in range(num_experts)],
        **options,
    )
    shards = options.get("fully_sharded_over")
    for number in range(load):
        table.load(adapter_of(number, rank=rank, device=device, size=size * (1 if shards is None else shards.size)))
    return table
