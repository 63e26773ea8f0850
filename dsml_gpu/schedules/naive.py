"""Naive all-reduce: the baseline that every other algorithm is measured against."""

from __future__ import annotations

from functools import lru_cache

from dsml_gpu.schedules.schedule import Schedule, Transfer


@lru_cache(maxsize=64)
def naive_all_reduce(nranks: int, root: int = 0) -> Schedule:
    """Every rank sends all its data to `root`, which reduces in the order of ranks and sends the result back to all.

    Two steps, but all of the 2(N-1) times the data goes through the root.
    """
    others = [rank for rank in range(nranks) if rank != root]
    if not others:
        return Schedule("all_reduce", "naive", nranks, 1, ())
    gather = tuple(Transfer(rank, root, 0, reduce=True) for rank in others)
    scatter = tuple(Transfer(root, rank, 0, reduce=False) for rank in others)
    return Schedule("all_reduce", "naive", nranks, 1, (gather, scatter))
