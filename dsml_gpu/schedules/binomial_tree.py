"""Binomial trees: in each step every rank that has something gives it to one that has not, so their number doubles.

Source: R. Thakur, R. Rabenseifner and W. Gropp, "Optimization of collective communication operations in MPICH",
International Journal of High Performance Computing Applications 19 (2005), which has them from the folklore of hypercubes.
"""

from __future__ import annotations

from dsml_gpu.schedules.schedule import Schedule, Transfer
from dsml_gpu.schedules.steps import Steps, relabelled, seen_from, turned_round


def binomial_all_reduce(nranks: int) -> Schedule:
    """Reduce to rank 0, then broadcast: 2 ceil(log2 N) steps; a rank sends all the data at most ceil(log2 N) times."""
    broadcast = broadcast_steps(nranks)
    return Schedule("all_reduce", "binomial_tree", nranks, 1, turned_round(broadcast, reduce=True) + broadcast)


def binomial_reduce(nranks: int, root: int = 0) -> Schedule:
    """ceil(log2 N) steps; every rank but the root sends all the data once."""
    steps = turned_round(broadcast_steps(nranks, root), reduce=True)
    return Schedule("reduce", "binomial_tree", nranks, 1, steps, root)


def binomial_broadcast(nranks: int, root: int = 0) -> Schedule:
    """ceil(log2 N) steps; every rank but the root receives all the data once."""
    return Schedule("broadcast", "binomial_tree", nranks, 1, broadcast_steps(nranks, root), root)


def binomial_scatter(nranks: int, root: int = 0) -> Schedule:
    """ceil(log2 N) steps; a rank passes on the blocks of all ranks below it. The root sends each block but its own once."""
    return Schedule("scatter", "binomial_tree", nranks, 1, scatter_steps(nranks, root), root)


def binomial_gather(nranks: int, root: int = 0) -> Schedule:
    """ceil(log2 N) steps; the root receives each block but its own once."""
    return Schedule("gather", "binomial_tree", nranks, 1, turned_round(scatter_steps(nranks, root), reduce=False), root)


def binomial_barrier(nranks: int) -> Schedule:
    """Tokens go up a tree to rank 0 and down again: 2 ceil(log2 N) steps, 2(N-1) messages in all."""
    broadcast = broadcast_steps(nranks)
    return Schedule("barrier", "binomial_tree", nranks, 1, turned_round(broadcast, reduce=True) + broadcast)


def broadcast_steps(nranks: int, root: int = 0) -> Steps:
    """Chunk 0 from the root to all."""
    steps = tuple(tuple(Transfer(parent, child, 0) for parent, child, _ in edges) for edges in _edges_by_step(nranks))
    return relabelled(steps, seen_from(root, nranks), [(0,)])


def scatter_steps(nranks: int, root: int = 0) -> Steps:
    """Chunk r from the root to rank r."""
    order = seen_from(root, nranks)
    steps = tuple(
        tuple(Transfer(parent, child, chunk) for parent, child, below in edges for chunk in range(child, child + below))
        for edges in _edges_by_step(nranks)
    )
    return relabelled(steps, order, [(rank,) for rank in order])


def _edges_by_step(nranks: int) -> list[list[tuple[int, int, int]]]:
    """(parent, child, ranks of the child's subtree: the child and those that follow it), for rank 0 as the root."""
    steps = []
    for power in range((nranks - 1).bit_length() - 1, -1, -1):
        distance = 1 << power
        parents = range(0, nranks - distance, 2 * distance)
        steps.append([(parent, parent + distance, min(distance, nranks - parent - distance)) for parent in parents])
    return steps
