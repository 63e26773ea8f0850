"""Recursive halving and doubling: partners exchange halves of what they work on, so that the data halves with each step.

Source: R. Rabenseifner, "Optimization of collective reduction operations", ICCS 2004; R. Thakur, R. Rabenseifner and
W. Gropp, "Optimization of collective communication operations in MPICH", International Journal of High Performance
Computing Applications 19 (2005).
"""

from __future__ import annotations

from dsml_gpu.schedules.recursive_doubling import between, distances, fold
from dsml_gpu.schedules.schedule import Schedule, Transfer
from dsml_gpu.schedules.steps import Steps, relabelled, turned_round


def halving_doubling_all_reduce(nranks: int) -> Schedule:
    """Reduce-scatter by halving, all-gather by doubling: 2 log2 N steps that move 2(N-1)/N of the data from each rank.

    Where N is no power of two, two steps more, in which the ranks that are too many hand over all their data and get all.
    """
    core, handed = fold(nranks)
    chunks = range(len(core))
    before = tuple(Transfer(extra, keeper, chunk, reduce=True) for extra, keeper in handed for chunk in chunks)
    after = tuple(Transfer(keeper, extra, chunk) for extra, keeper in handed for chunk in chunks)
    doubling = doubling_steps(len(core))
    exchanges = relabelled(turned_round(doubling, reduce=True) + doubling, core, [(chunk,) for chunk in chunks])
    return Schedule("all_reduce", "halving_doubling", nranks, len(core), between(before, exchanges, after))


def doubling_steps(nranks: int) -> Steps:
    """All-gather: rank r begins with chunk r; at distance d it exchanges the d chunks that it has with its partner.

    Args:
        nranks: a power of two.
    """
    return tuple(
        tuple(
            Transfer(rank, rank ^ distance, chunk)
            for rank in range(nranks)
            for chunk in range(rank & -distance, (rank & -distance) + distance)
        )
        for distance in distances(nranks)
    )
