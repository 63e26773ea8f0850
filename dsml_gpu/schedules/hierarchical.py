"""Hierarchical all-reduce: inside each host, then across hosts, so that the slow links carry as little as possible.

Sources: M. Cho, U. Finkler, M. Serrano, D. Kung and H. Hunter, "BlueConnect: Decomposing all-reduce for deep learning on
heterogeneous network hierarchy", SysML 2019; the same as Horovod's hierarchical all-reduce.
"""

from __future__ import annotations

from dsml_gpu.schedules import ring
from dsml_gpu.schedules.binomial_tree import broadcast_steps
from dsml_gpu.schedules.schedule import Schedule
from dsml_gpu.schedules.steps import Steps, relabelled, side_by_side, turned_round


def hierarchical_all_reduce(nranks: int, hosts: tuple[int, ...]) -> Schedule:
    """All-reduce over ranks that share hosts.

    With M ranks on each of H hosts: a ring reduce-scatter in each host, ring all-reduces across hosts among the ranks that
    have the same part, and a ring all-gather in each host. 2(M-1) + 2(H-1) steps; each rank sends 2(M-1)/M of the data
    inside its host and 2(H-1)/(HM) of it to another one.

    Where hosts have different numbers of ranks: a binomial reduction to the first rank of each host, a ring all-reduce among
    these, and binomial broadcasts.

    Args:
        hosts: the host of each rank, any numbers.
    """
    members: dict[int, list[int]] = {}
    for rank in range(nranks):
        members.setdefault(hosts[rank], []).append(rank)
    groups = list(members.values())
    if len({len(group) for group in groups}) == 1:
        parts, steps = len(groups) * len(groups[0]), _by_parts(groups)
    else:
        parts, steps = len(groups), _by_leaders(groups)
    return Schedule("all_reduce", "hierarchical", nranks, parts, steps)


def _by_parts(groups: list[list[int]]) -> Steps:
    nhosts, size = len(groups), len(groups[0])
    parts = [tuple(range(local * nhosts, (local + 1) * nhosts)) for local in range(size)]
    inside = side_by_side(relabelled(ring.reduce_scatter_steps(size), group, parts) for group in groups)
    across = side_by_side(
        relabelled(_ring_steps(nhosts), [group[local] for group in groups], [(chunk,) for chunk in parts[local]])
        for local in range(size)
    )
    back = side_by_side(relabelled(ring.all_gather_steps(size), group, parts) for group in groups)
    return inside + across + back


def _by_leaders(groups: list[list[int]]) -> Steps:
    chunks = range(len(groups))
    down = [relabelled(broadcast_steps(len(group)), group, [chunks]) for group in groups]
    # Trees of different height: all reductions end with the last step, as all broadcasts begin with the first.
    up = turned_round(side_by_side(down), reduce=True)
    leaders = [group[0] for group in groups]
    across = relabelled(_ring_steps(len(groups)), leaders, [(chunk,) for chunk in chunks])
    return up + across + side_by_side(down)


def _ring_steps(nranks: int) -> Steps:
    return ring.reduce_scatter_steps(nranks) + ring.all_gather_steps(nranks)
