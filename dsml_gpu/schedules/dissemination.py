"""Dissemination barrier.

Source: D. Hensgen, R. Finkel and U. Manber, "Two algorithms for barrier synchronization", International Journal of Parallel
Programming 17 (1988).
"""

from __future__ import annotations

from dsml_gpu.schedules.schedule import Schedule, Transfer


def dissemination_barrier(nranks: int) -> Schedule:
    """ceil(log2 N) steps; in step k every rank tells the one 2**k to its right of all that it has heard."""
    steps = tuple(
        tuple(Transfer(rank, (rank + (1 << power)) % nranks, 0, reduce=True) for rank in range(nranks))
        for power in range((nranks - 1).bit_length())
    )
    return Schedule("barrier", "dissemination", nranks, 1, steps)
