"""Naive all-reduce: the baseline that every other algorithm is measured against."""

from __future__ import annotations

from dsml_gpu.schedules.schedule import Schedule, Transfer


def naive_all_reduce(nranks: int) -> Schedule:
    """Every rank sends all its data to rank 0, which reduces in the order of ranks, then sends the result back to all.

    Two steps, but all of the 2(N-1) times the data goes through one rank, and none of it goes back before all is there:
    what one writes who does not think of pipelining.
    """
    others = range(1, nranks)
    gather = tuple(Transfer(rank, 0, 0, reduce=True) for rank in others)
    scatter = tuple(Transfer(0, rank, 0) for rank in others)
    steps = (gather, scatter) if nranks > 1 else ()
    return Schedule("all_reduce", "naive", nranks, 1, steps, store_and_forward=True)
