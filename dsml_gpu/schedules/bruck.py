"""Bruck's algorithms: log2 N steps for any N, by sending ever more to ranks that are ever farther away.

Sources: J. Bruck, C.-T. Ho, S. Kipnis, E. Upfal and D. Weathersby, "Efficient algorithms for all-to-all communications in
multiport message-passing systems", IEEE Transactions on Parallel and Distributed Systems 8 (1997). Reductions: J. L. Traeff,
"Optimal, non-pipelined reduce-scatter and allreduce algorithms", 2024, which is the all-gather turned round.
"""

from __future__ import annotations

from dsml_gpu.schedules.binomial_tree import scatter_steps
from dsml_gpu.schedules.schedule import Schedule, Transfer
from dsml_gpu.schedules.steps import Steps, turned_round


def bruck_all_reduce(nranks: int) -> Schedule:
    """Reduce-scatter and all-gather: 2 ceil(log2 N) steps that move 2(N-1)/N of the data from each rank, for any N."""
    gather = all_gather_steps(nranks)
    return Schedule("all_reduce", "bruck", nranks, nranks, turned_round(gather, reduce=True) + gather)


def bruck_reduce_scatter(nranks: int) -> Schedule:
    """ceil(log2 N) steps; each rank sends all blocks but its own once."""
    return Schedule("reduce_scatter", "bruck", nranks, 1, turned_round(all_gather_steps(nranks), reduce=True))


def bruck_all_gather(nranks: int) -> Schedule:
    """ceil(log2 N) steps; each rank sends N-1 blocks."""
    return Schedule("all_gather", "bruck", nranks, 1, all_gather_steps(nranks))


def bruck_reduce(nranks: int, root: int = 0) -> Schedule:
    """Reduce-scatter, then a binomial gather to the root: 2 ceil(log2 N) steps, about 2 times the data at the root.

    Rabenseifner's reduce (2004), with Traeff's reduce-scatter in place of halving, so that any N will do.
    """
    scatter = turned_round(all_gather_steps(nranks), reduce=True)
    gather = turned_round(scatter_steps(nranks, root), reduce=False)
    return Schedule("reduce", "bruck", nranks, nranks, scatter + gather, root)


def bruck_all_to_all(nranks: int) -> Schedule:
    """ceil(log2 N) steps, each with about half of all blocks: more data for fewer messages than one to each rank.

    A block that has to go a distance j to the right goes 2**k to the right in step k where bit k of j is set.
    """
    steps = tuple(
        tuple(
            Transfer((src + gone) % nranks, (src + gone + distance) % nranks, src * nranks + (src + whole) % nranks)
            for src in range(nranks)
            for whole in range(nranks)
            if whole & distance
            for gone in (whole & (distance - 1),)
        )
        for distance in _distances(nranks)
    )
    return Schedule("all_to_all", "bruck", nranks, 1, steps)


def all_gather_steps(nranks: int) -> Steps:
    """Rank r begins with chunk r. At distance d it has d chunks, from r on, and sends what is missing d to the left."""
    return tuple(
        tuple(
            Transfer(rank, (rank - distance) % nranks, (rank + ahead) % nranks)
            for rank in range(nranks)
            for ahead in range(min(distance, nranks - distance))
        )
        for distance in _distances(nranks)
    )


def _distances(nranks: int) -> list[int]:
    return [1 << power for power in range((nranks - 1).bit_length())]
