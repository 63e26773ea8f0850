"""Rings: every rank sends to its right neighbour only, and all links are busy all the time.

Source: P. Patarasuk and X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", Journal of
Parallel and Distributed Computing 69 (2009). A chain is a ring cut open, through which slices flow one behind the other.
"""

from __future__ import annotations

from itertools import pairwise

from dsml_gpu.schedules.schedule import Schedule, Transfer
from dsml_gpu.schedules.steps import Steps, relabelled, seen_from, side_by_side, turned_round


def ring_all_reduce(nranks: int) -> Schedule:
    """All-reduce in 2(N-1) steps that move 2(N-1)/N of the data from each rank, the least that is possible."""
    return Schedule("all_reduce", "ring", nranks, nranks, reduce_scatter_steps(nranks) + all_gather_steps(nranks))


def bidirectional_ring_all_reduce(nranks: int) -> Schedule:
    """Two rings in opposite directions, each with half of the data.

    2(N-1) steps, 2(N-1)/N of the data from each rank in all, but only half of it to each neighbour: twice as fast where the
    ways to both neighbours are separate links.
    """
    steps = reduce_scatter_steps(nranks) + all_gather_steps(nranks)
    right, left = range(nranks), range(nranks - 1, -1, -1)
    rings = [
        relabelled(steps, ranks, [(half * nranks + chunk,) for chunk in range(nranks)])
        for half, ranks in enumerate((right, left))
    ]
    return Schedule("all_reduce", "bidirectional_ring", nranks, 2 * nranks, side_by_side(rings))


def ring_reduce_scatter(nranks: int) -> Schedule:
    """N-1 steps; each rank sends all blocks but its own once."""
    return Schedule("reduce_scatter", "ring", nranks, 1, reduce_scatter_steps(nranks))


def ring_all_gather(nranks: int) -> Schedule:
    """N-1 steps; each rank sends all blocks but its right neighbour's once."""
    return Schedule("all_gather", "ring", nranks, 1, all_gather_steps(nranks))


def chain_reduce(nranks: int, root: int = 0) -> Schedule:
    """N-1 steps, in which the data passes once through all ranks, from the left of the root round to it."""
    return Schedule("reduce", "ring", nranks, 1, turned_round(_chain(nranks, root), reduce=True), root)


def chain_broadcast(nranks: int, root: int = 0) -> Schedule:
    """N-1 steps, in which the data passes once through all ranks, from the root on to the right."""
    return Schedule("broadcast", "ring", nranks, 1, _chain(nranks, root), root)


def reduce_scatter_steps(nranks: int) -> Steps:
    """In step s rank r passes chunk r-1-s to its right neighbour, which adds its own; rank r ends with chunk r complete."""
    return tuple(
        tuple(Transfer(rank, (rank + 1) % nranks, (rank - 1 - step) % nranks, reduce=True) for rank in range(nranks))
        for step in range(nranks - 1)
    )


def all_gather_steps(nranks: int) -> Steps:
    """Rank r begins with chunk r; in step s it passes chunk r-s to its right neighbour."""
    return tuple(
        tuple(Transfer(rank, (rank + 1) % nranks, (rank - step) % nranks) for rank in range(nranks))
        for step in range(nranks - 1)
    )


def _chain(nranks: int, root: int) -> Steps:
    order = seen_from(root, nranks)
    return tuple((Transfer(left, right, 0),) for left, right in pairwise(order))
