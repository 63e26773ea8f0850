"""Ring all-reduce.

Source: P. Patarasuk and X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", Journal of
Parallel and Distributed Computing 69 (2009).
"""

from __future__ import annotations

from functools import lru_cache

from dsml_gpu.schedules.schedule import Schedule, Transfer


@lru_cache(maxsize=64)
def ring_all_reduce(nranks: int) -> Schedule:
    """All-reduce in 2(N-1) steps that move 2(N-1)/N of the data from each rank, the least that is possible.

    Reduce-scatter: in step s rank r passes chunk r-s to its right neighbour, which adds its own; after N-1 steps rank r
    holds the complete chunk r+1. All-gather: the complete chunks go once more round the ring.
    """
    reduce_scatter = tuple(
        tuple(Transfer(rank, (rank + 1) % nranks, (rank - step) % nranks, reduce=True) for rank in range(nranks))
        for step in range(nranks - 1)
    )
    all_gather = tuple(
        tuple(Transfer(rank, (rank + 1) % nranks, (rank + 1 - step) % nranks, reduce=False) for rank in range(nranks))
        for step in range(nranks - 1)
    )
    return Schedule("all_reduce", "ring", nranks, nranks, reduce_scatter + all_gather)
