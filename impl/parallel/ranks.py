"""The process groups of a mesh, made once and shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from ..checks import expect_instance
from .agreement import together
from .collectives import Group, ProcessGroup
from .mesh import Mesh


@dataclass(frozen=True, eq=False)
class Ranks:
    """This rank's groups.

    Attributes:
        mesh: who is what.
        world: all ranks of the layer.
        peers: ranks that have all tokens between them (`Mesh.data_peers`); None where this rank has them all.
        replicas: ranks with the same tokens; None where there are no others.
        shards: ranks with columns of the same experts (`Mesh.shards`); None where experts are whole.
    """

    mesh: Mesh
    world: Group
    peers: Group | None
    replicas: Group | None
    shards: Group | None

    @property
    def rank(self) -> int:
        """This rank's number in the mesh."""
        return self.world.rank


def connect(mesh: Mesh, group: dist.ProcessGroup | None = None) -> Ranks:
    """Make the groups of a mesh; every rank of `group` calls this.

    Args:
        mesh: of as many ranks as `group` has.
        group: an initialised process group; None: the default one.

    Raises:
        TypeError: no mesh, or no process group.
        ValueError: torch.distributed is not initialised; another number of ranks, or ranks that name different meshes,
            the same on every rank.
    """
    expect_instance("mesh", mesh, Mesh)
    expect_instance("group", group, dist.ProcessGroup, optional=True)
    if group is None and not dist.is_initialized():
        raise ValueError("group: expected torch.distributed to be initialised (init_process_group), got no group")
    world = ProcessGroup("world", group)
    with together(world, {"mesh": str(mesh)}, always=True):
        expect_world_size(mesh, world.size)
    global_ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    mine: dict[str, Group | None] = {}
    for name, ranks_of in (("peers", mesh.data_peers), ("replicas", mesh.replicas), ("shards", mesh.shards)):
        mine[name] = None
        # Every rank makes every group, in one order: torch.distributed asks for that.
        for ranks in sorted({ranks_of(rank) for rank in range(mesh.world_size)}):
            if len(ranks) == mesh.world_size:
                mine[name] = ProcessGroup(name, group) if mesh.world_size > 1 else None
            elif len(ranks) > 1:
                made = dist.new_group([global_ranks[rank] for rank in ranks])
                if world.rank in ranks:
                    mine[name] = ProcessGroup(name, made)
    return Ranks(mesh, world, mine["peers"], mine["replicas"], mine["shards"])


def expect_world_size(mesh: Mesh, size: int) -> None:
    """Check that a group has the ranks of a mesh.

    Raises:
        ValueError: another number.
    """
    if size != mesh.world_size:
        raise ValueError(f"world size: expected the {mesh.world_size} ranks of {mesh}, got {size}")
